"""Turns an hour with a GPU into evidence: tests, sanitizers and benchmark in one record.

Called by ``gpu_check.sh``. Needs no network. Ends inside eight minutes, because every step has a
limit of its own; a step that fails or runs out of time is in the record as such and the next one
runs all the same. The record is bench/results/<date>-<time>-<gpu>.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")

#: Seconds for each step; together with start-up less than eight minutes.
LIMITS = {"tests": 180, "sanitizer": 25, "benchmark": 160}

#: What proves something without a GPU, or has nothing to do with one, and takes its time.
ELSEWHERE = ("test_triton_interpreter.py", "test_triton_compile.py", "test_native.py")


def run(command: list[str], seconds: float, **options: Any) -> tuple[int | None, str]:
    """Exit status, None where the time ran out, and everything printed."""
    print(f"$ {' '.join(command)}", flush=True)
    start = time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            timeout=seconds,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        printed = error.stdout or b""
        status, output = None, printed.decode(errors="replace")
    print(f"  {time.monotonic() - start:.0f} s, exit status {status}", flush=True)
    return status, output


def run_tests(work: Path) -> dict[str, Any]:
    """The whole suite; the fixtures find the GPU."""
    report = work / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [f"--ignore=tests/{name}" for name in ELSEWHERE]
    status, output = run([*command, f"--junitxml={report}"], LIMITS["tests"])
    if status is None or not report.exists():
        return {"passed": 0, "failed": 0, "skipped": 0, "error": output[-4000:]}
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    total, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    result: dict[str, Any] = {"passed": total - skipped - failed, "failed": failed}
    result |= {"skipped": skipped, "seconds": float(suite.get("time", 0))}
    if failed:
        result["failures"] = [
            f"{case.get('classname')}::{case.get('name')}: {(problem.get('message') or '')[:300]}"
            for case in suite.iter("testcase")
            for problem in case
            if problem.tag in ("failure", "error")
        ]
        print(output[-4000:])
    return result


def run_sanitizers() -> dict[str, Any]:
    """Each tool's verdict: number of errors, or why there is none."""
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if tool is None:
        return dict.fromkeys(SANITIZERS, "compute-sanitizer is not installed (CUDA toolkit)")
    results: dict[str, Any] = {}
    # PyTorch's cached blocks would hide an access outside a tensor.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for name in SANITIZERS:
        command = [tool, "--tool", name, "--kernel-name-exclude", "kernel_substring=at::"]
        status, output = run(
            [*command, sys.executable, "bench/gpu_sanitize.py"],
            LIMITS["sanitizer"],
            env=environment,
        )
        summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)
        if summary is None:
            reason = (
                f"no verdict within {LIMITS['sanitizer']} s" if status is None else "no verdict"
            )
            results[name] = f"{reason}: {output[-1000:]}"
        else:
            results[name] = int(summary[1])
            if results[name]:
                print(output[-4000:])
    return results


def run_benchmark(work: Path) -> dict[str, Any]:
    rows = work / "rows.json"
    command = [sys.executable, "bench/bench_gpu.py", "--output", str(rows)]
    command += ["--budget", str(LIMITS["benchmark"] - 30)]
    status, output = run(command, LIMITS["benchmark"])
    print(output)
    measured: dict[str, Any] = json.loads(rows.read_text()) if rows.exists() else {"rows": []}
    if status != 0:
        measured["error"] = output[-4000:]
    return measured


def version_of(command: list[str]) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown: {error}"
    return done.stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="default: a new file in bench/results")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip or "no GPU"
        print(
            f"gpu_check: PyTorch sees no GPU on this machine (PyTorch {torch.__version__}, built "
            f"for {built}); nothing was run and nothing was written",
            file=sys.stderr,
        )
        return 2
    try:
        import triton

        triton_version = triton.__version__
    except ModuleNotFoundError:
        triton_version = "not installed"
    now = datetime.datetime.now(datetime.timezone.utc)
    gpu = torch.cuda.get_device_name()
    record: dict[str, Any] = {
        "gpu": gpu,
        "driver": version_of(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        ).splitlines()[0],
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": version_of(["git", "describe", "--always", "--dirty", "--abbrev=12"]),
        "date": now.isoformat(timespec="seconds"),
    }
    print(record, flush=True)
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    output = args.output or RESULTS / f"{now:%Y-%m-%d-%H%M}-{slug}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for key, step in {
            "tests": lambda: run_tests(Path(folder)),
            "sanitizer": run_sanitizers,
            "benchmark": lambda: run_benchmark(Path(folder)),
        }.items():
            result = step()
            record |= result if key == "benchmark" else {key: result}
            # After every step, so that an interrupted check leaves what it has.
            output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\ntests: {record['tests']}\nsanitizer: {record['sanitizer']}\nwrote {output}")
    clean = all(count == 0 for count in record["sanitizer"].values())
    good = record["tests"]["failed"] == 0 and record["tests"]["passed"] > 0 and clean
    return 0 if good and "error" not in record else 1


if __name__ == "__main__":
    sys.exit(main())
