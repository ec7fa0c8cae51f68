"""Turns an hour with a GPU into evidence: tests, sanitizers and benchmark in one record.

Called by ``gpu_check.sh``. Needs no network. Ends inside eight minutes, because every step has a
limit; what runs out of time is cut off where it is, what it had found is kept, and the next step
runs all the same. The record is bench/results/<date>-<time>-<gpu>.json, written after every step.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harmonizer_ext import backends

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")

#: Seconds that each step may take; less where the whole check runs out of time.
LIMITS = {"self_test": 60, "tests": 170, "sanitizer": 90, "benchmark": 150}

#: What proves something without a GPU, or has nothing to do with one, and takes its time.
ELSEWHERE = (
    "test_triton_interpreter.py",
    "test_triton_compile.py",
    "test_native.py",
    "test_networks.py",
    "test_distributed.py",
    "test_cuda_compile.py",
    "test_cuda_machine.py",
    "test_devices.py",
    "*on_host*",
)

#: What only a GPU can show comes first, then the loss, so that a limit costs the least.
FIRST = (
    "test_gpu.py",
    "test_step_gpu.py",
    "test_loss.py",
    "test_ops.py",
    "test_pyramid.py",
    "test_standardize.py",
)


def fused_backends() -> list[str]:
    return [name for name in backends.available_backends("cuda") if name != "reference"]


def workers() -> int:
    """How many processes share the GPU: each takes two cores and 2 GiB of its memory."""
    free, _ = torch.cuda.mem_get_info()
    return max(1, min(8, (os.cpu_count() or 2) // 2, free >> 31))


# --- running --------------------------------------------------------------------------------------


@dataclass
class Done:
    """How a command ended: its exit status, None where the time ran out, and what it printed."""

    status: int | None
    output: str
    seconds: float


def run(command: list[str], deadline: float, environment: dict[str, str] | None = None) -> Done:
    """Runs a command until ``deadline`` on the monotonic clock; then interrupts it, then kills it.

    An interrupted pytest writes its report of what it has run. One that waits for a GPU that does
    not answer hears nothing but a kill.
    """
    shown = " ".join(command)
    print(f"$ {shown[:150]}{'...' if len(shown) > 150 else ''}", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | (environment or {}),
            start_new_session=True,
        )
        status: int | None
        try:
            status = process.wait(max(deadline - start, 1))
        except subprocess.TimeoutExpired:
            status = None
            for kind in (signal.SIGINT, signal.SIGKILL):
                os.killpg(process.pid, kind)
                try:
                    process.wait(8)
                    break
                except subprocess.TimeoutExpired:
                    continue
        output.seek(0)
        text = output.read()
    seconds = time.monotonic() - start
    print(f"  {seconds:.0f} s, exit status {status}: {shown[-60:]}", flush=True)
    return Done(status, text, seconds)


# --- tests ----------------------------------------------------------------------------------------


def collect(deadline: float) -> tuple[dict[str, list[str]], str | None]:
    """Names of the tests by the backend that they test on the GPU, "rest" for the others.

    And, where a file could not even be read, what pytest says of it.
    """
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = run([*command, *(f"--ignore-glob={ROOT}/tests/{name}" for name in ELSEWHERE)], deadline)
    names = [line for line in done.output.splitlines() if re.match(r"tests/\S+::", line)]

    def rank(name: str) -> int:
        file = name.partition("::")[0].removeprefix("tests/")
        return FIRST.index(file) if file in FIRST else len(FIRST)

    fused = fused_backends()
    groups: dict[str, list[str]] = {name: [] for name in (*fused, "rest")}
    for name in sorted(names, key=rank):
        # "cuda-cuda" among the parameters is the backend and its device; see tests/conftest.py.
        found = re.search(rf"[\[-]({'|'.join(fused) or 'none'})-cuda[\]-]", name)
        groups[found[1] if found else "rest"].append(name)
    return groups, None if done.status == 0 and names else done.output[-4000:]


def parse_report(report: Path, done: Done) -> dict[str, Any]:
    """Counts and failures of one pytest process, from its report or from what it printed."""
    counts: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": []}
    if report.exists() and report.stat().st_size:
        suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
        counts["skipped"] = int(suite.get("skipped", 0))
        counts["failed"] = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        counts["passed"] = int(suite.get("tests", 0)) - counts["skipped"] - counts["failed"]
        counts["failures"] = [
            f"{case.get('classname')}::{case.get('name')}: {(problem.get('message') or '')[:300]}"
            for case in suite.iter("testcase")
            for problem in case
            if problem.tag in ("failure", "error")
        ]
        return counts
    # A crash or a kill: no report.
    for name, outcome in re.findall(
        r"^(tests/.+) (PASSED|FAILED|SKIPPED|ERROR)\b", done.output, re.MULTILINE
    ):
        counts["failed" if outcome == "ERROR" else outcome.lower()] += 1
        if outcome in ("FAILED", "ERROR"):
            counts["failures"].append(name)
    last = done.output[done.output.rfind("\ntests/") :].strip().partition("\n")[0]
    if done.status is not None or last.startswith("tests/"):
        why = "killed at the limit" if done.status is None else f"exit status {done.status}"
        counts["failed"] += 1
        counts["failures"].append(f"{why}, the last test was {last}:\n{done.output[-1500:]}")
    return counts


def run_tests(folder: Path, deadline: float) -> dict[str, Any]:
    """The whole suite, a process for every few tests, each backend's in turn."""
    count = workers()
    environment = {"OMP_NUM_THREADS": "2", "PYTHONUNBUFFERED": "1"}
    result: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "not_run": 0, "failures": []}

    def shard(group: str, number: int, names: list[str]) -> dict[str, Any]:
        if deadline - time.monotonic() < 15:
            return {"not_run": len(names)}
        report = folder / f"{group}-{number}.xml"
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider"]
        # A test that hangs prints where it does.
        command += ["-o", "faulthandler_timeout=60", f"--junitxml={report}", *names]
        done = run(command, deadline - 10, environment)
        part = parse_report(report, done)
        ran = part["passed"] + part["failed"] + part["skipped"]
        if done.status not in (0, 1) or part["failed"]:
            print(done.output[-3000:], flush=True)
        return part | {"not_run": max(len(names) - ran, 0)}

    groups, problem = collect(deadline)
    if problem is not None:
        result["failed"] += 1
        result["failures"].append(f"pytest could not collect every test:\n{problem}")
    with ThreadPoolExecutor(count) as pool:
        jobs = {
            group: [
                # Dealt out like cards: every process has its share of what comes first.
                pool.submit(shard, group, i, names[i::count])
                for i in range(min(count, len(names)))
            ]
            for group, names in groups.items()
        }
        for group, futures in jobs.items():
            totals = dict.fromkeys(("passed", "failed", "skipped", "not_run"), 0)
            for part in (future.result() for future in futures):
                for key in totals:
                    totals[key] += part.get(key, 0)
                    result[key] += part.get(key, 0)
                result["failures"] += part.get("failures", [])
            result[group] = totals
            print(f"tests of {group}: {totals}", flush=True)
    return result


# --- sanitizers -----------------------------------------------------------------------------------


def run_sanitizers(deadline: float) -> dict[str, Any]:
    """Every tool's verdict on every backend: number of errors, or why there is none."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"))
    tool = shutil.which("compute-sanitizer", path=path)
    if tool is None:
        return dict.fromkeys(SANITIZERS, "compute-sanitizer is not installed (CUDA toolkit)")
    # PyTorch's cached blocks would hide an access outside a tensor.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "2"}
    results: dict[str, Any] = {}

    def sanitize(backend: str, name: str) -> tuple[int | str, str]:
        left = deadline - time.monotonic()
        if left < 25:
            return "not run: no time was left", ""
        command = [tool, "--tool", name]
        # PyTorch's kernels (namespace at, as it is mangled) are not what is tested; but what one
        # has written is initialized, and initcheck sees that of a kernel that it watches alone.
        if name != "initcheck":
            command += ["--kernel-name-exclude", "kernel_substring=N2at"]
        command += [sys.executable, "bench/gpu_sanitize.py", "--backend", backend]
        # It stops by itself after the size it is at, so that there is a verdict on what it did.
        done = run([*command, "--seconds", f"{left / 2:.0f}"], deadline - 5, environment)
        covered = [line for line in done.output.splitlines() if line.startswith("ran ")][-1:]
        # initcheck and synccheck end like memcheck; racecheck counts hazards.
        summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", done.output)
        if summary is None:
            return f"no verdict, exit status {done.status}: {done.output[-1000:]}", ""
        if int(summary[1]) or not covered:
            print(done.output[-4000:], flush=True)
        if not covered:
            return f"it stopped early, exit status {done.status}: {done.output[-1000:]}", ""
        return int(summary[1]), covered[0]

    with ThreadPoolExecutor(workers()) as pool:
        pairs = [(backend, name) for backend in fused_backends() for name in SANITIZERS]
        for (backend, name), (verdict, covered) in zip(
            pairs, pool.map(lambda pair: sanitize(*pair), pairs), strict=True
        ):
            results[f"{name}: {backend}"] = verdict
            print(f"  {name} of {backend}: {verdict} ({covered})", flush=True)
    return results


# --- benchmark and record -------------------------------------------------------------------------


def run_benchmark(folder: Path, deadline: float) -> dict[str, Any]:
    rows = folder / "rows.json"
    budget = max(deadline - time.monotonic() - 25, 10)
    command = [sys.executable, "bench/bench_gpu.py", "--output", str(rows)]
    done = run([*command, "--budget", f"{budget:.0f}"], deadline)
    print(done.output, flush=True)
    measured: dict[str, Any] = json.loads(rows.read_text()) if rows.exists() else {"rows": []}
    if done.status != 0:
        measured["error"] = done.output[-4000:]
    return measured


def run_self_test(deadline: float) -> dict[str, Any]:
    done = run([sys.executable, "-m", "harmonizer_ext"], deadline)
    print(done.output, flush=True)
    return {"status": done.status, "report": done.output.splitlines()}


def version_of(command: list[str]) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown: {error}"
    return done.stdout.strip()


def package_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def environment_record(now: datetime.datetime) -> dict[str, Any]:
    driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "gpu": torch.cuda.get_device_name(),
        "compute_capability": "{}.{}".format(*torch.cuda.get_device_capability()),
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
        "driver": version_of(driver).splitlines()[0],
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "cuda_kernels": backends.get("cuda").description(),
        "backends": fused_backends(),
        "cores": os.cpu_count(),
        "commit": version_of(["git", "describe", "--always", "--dirty", "--abbrev=12"]),
        "date": now.isoformat(timespec="seconds"),
    }


def verdict(record: dict[str, Any], steps: Iterable[str]) -> bool:
    """Whether all that was asked for ran and nothing failed."""
    good = record["backends"] != []
    for step in steps:
        if step == "self_test":
            good &= record[step]["status"] == 0
        elif step == "tests":
            tests = record[step]
            good &= tests["failed"] == 0 and tests["not_run"] == 0 and tests["passed"] > 0
        elif step == "sanitizer":
            good &= all(count == 0 for count in record[step].values())
        else:
            good &= "error" not in record and record["rows"] != []
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="default: a new file in bench/results")
    parser.add_argument("--minutes", type=float, default=7.7, help="for all of it; default 7.7")
    parser.add_argument("--started", type=float, help="seconds since 1970; default: now")
    parser.add_argument("--steps", default=",".join(LIMITS), help="default: %(default)s")
    args = parser.parse_args()
    steps = args.steps.split(",")
    unknown = set(steps) - set(LIMITS)
    if unknown:
        parser.error(f"--steps: expected some of {', '.join(LIMITS)}, got {', '.join(unknown)}")
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip or "no GPU"
        print(
            f"gpu_check: PyTorch sees no GPU on this machine (PyTorch {torch.__version__}, built "
            f"for {built}); nothing was run and nothing was written",
            file=sys.stderr,
        )
        return 2
    spent = time.time() - args.started if args.started else 0.0
    end = time.monotonic() - spent + 60 * args.minutes
    now = datetime.datetime.now(datetime.timezone.utc)
    record = environment_record(now) | {"seconds_to_build": round(spent, 1)}
    print(json.dumps(record, indent=1), flush=True)
    slug = re.sub(r"[^a-z0-9]+", "-", record["gpu"].lower()).strip("-")
    output = args.output or RESULTS / f"{now:%Y-%m-%d-%H%M}-{slug}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for step in steps:
            deadline = min(time.monotonic() + LIMITS[step], end)
            if step == "self_test":
                record[step] = run_self_test(deadline)
            elif step == "tests":
                record[step] = run_tests(Path(folder), deadline)
            elif step == "sanitizer":
                record[step] = run_sanitizers(deadline)
            else:
                record |= run_benchmark(Path(folder), deadline)
            # After every step, so that an interrupted check leaves what it has.
            output.write_text(json.dumps(record, indent=1) + "\n")
    good = verdict(record, steps)
    for step in set(steps) & {"tests", "sanitizer"}:
        print(f"\n{step}: {json.dumps(record[step], indent=1)}")
    print(f"{'all well' if good else 'NOT all well'}; wrote {output}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
