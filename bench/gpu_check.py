"""Turns ten minutes with a GPU into evidence: measurements, tests and sanitizers in one record.

Called by ``gpu_check.sh``. Needs no network, and PyTorch only in its children. Ends inside nine
minutes: every step has a limit, and what it did not need is the next ones'. The most valuable
comes first. Each row is in the record as soon as it is measured; what fails, hangs or ends its
process has the reason in its row, and a new process goes on behind it (``gpu_run.py``). Whenever
and however this is ended, the record is whole and nothing runs on (``keeper.py``).

``HARMONIZER_STAND_IN=1`` runs all of it, small, on tests/gpu_on_host.py; no figure is kept.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gpu_run
import records

ROOT = gpu_run.ROOT
RESULTS = ROOT / "bench" / "results"
NO_GPU = 3

_STEMS = ("loss", "ops", "pyramid", "standardize", "positive_part_mse")
OPERATIONS = tuple(f"tests/test_{stem}.py" for stem in _STEMS)
GPU_TESTS = ("tests/test_gpu.py", "tests/test_step_gpu.py")
HARMONIZED = "harmonized, all rows"


@dataclass(frozen=True)
class Step:
    """One part of the check.

    Attributes:
        name: in the record.
        seconds: its limit, if those before it have needed all of theirs.
        arguments: of Python.
        small: behind or in the place of them on the stand-in.
        patience: seconds without a word from a process after which it is given up.
        tools: of compute-sanitizer, each of which watches a process of its own.
        beside_build: whether it measures nothing and needs no CUDA kernels, so that it can run
            while they are compiled.
    """

    name: str
    seconds: int
    arguments: Sequence[str]
    small: Sequence[str] = ()
    patience: int = 45
    tools: Sequence[str] = ()
    beside_build: bool = False

    @property
    def is_pytest(self) -> bool:
        return self.arguments[:2] == ("-m", "pytest")


_TEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
_ONCE = ("--seconds", "0.001", "--rounds", "2")
_STEP = ("bench/bench_step.py", "--networks")
_TINY = (*_STEP, "test_vit:2x32", *_ONCE, "--precisions", "bfloat16", "--implementations")
_STEPS = ("cross entropy alone", HARMONIZED, "harmonized, rows with a map")
_COMPILED = f"{HARMONIZED}, torch.compile"
#: Every kernel and every specialization, at odd sizes and in odd layouts.
_KERNELS = "specialization or ((triton-cuda or cuda-cuda) and (agrees or strides))"
_SWEEP = ("bench/gpu_sweep.py", "--sizes")

#: In this order; together with describing the machine, less than nine minutes.
PLAN = (
    Step("self_test", 20, ("-m", "harmonizer_ext"), ("-m", "harmonizer_ext")),
    Step(
        "sweep",
        55,
        (*_SWEEP, "224", "--batches", "64,512"),
        (*_SWEEP, "112", "--batches", "1", "--dtypes", "float32", "--prefetch", "0", *_ONCE)
        + ("--formulations", "released"),
    ),
    Step(
        "loss",
        60,
        ("bench/bench_gpu.py", "--seconds", "0.5"),
        ("bench/bench_gpu.py", "--quick", *_ONCE),
    ),
    Step(
        "gpu_tests",
        65,
        (*_TEST, *GPU_TESTS),
        (*_TEST, *GPU_TESTS, "-k", "(graph_capture and released) or does_not_wait"),
    ),
    Step(
        "triton_tests",
        45,
        (*_TEST, *OPERATIONS, "-k", "triton-cuda"),
        (*_TEST, OPERATIONS[-1], "-k", "triton-cuda and by_hand"),
        beside_build=True,
    ),
    Step(
        "cuda_tests",
        35,
        (*_TEST, *OPERATIONS, "-k", "cuda-cuda"),
        (*_TEST, OPERATIONS[-1], "-k", "cuda-cuda and by_hand"),
    ),
    Step(
        "training_step",
        90,
        (*_STEP, "resnet50:64x224", "vit_small_patch16_224:64x224", "--profile", "20")
        + ("--precisions", "TF32", "bfloat16", "float32", "--seconds", "3")
        + ("--implementations", *_STEPS, "loss on maps alone, fused"),
        (*_TINY, HARMONIZED, "loss on maps alone, fused", "--profile", "20"),
    ),
    Step(
        "sanitizers",
        85,
        (*_TEST, GPU_TESTS[0], *OPERATIONS, "-k", _KERNELS),
        (*_TEST, OPERATIONS[-1], "-k", "(triton-cuda or cuda-cuda) and by_hand"),
        patience=80,
        tools=("memcheck", "racecheck"),
    ),
    Step(
        "compiled_step",
        65,
        (*_STEP, "resnet50:64x224", "--precisions", "TF32", "--implementations", _COMPILED),
        (*_TINY, _COMPILED),
        patience=65,
    ),
)
#: Seconds to import PyTorch and to ask it for the GPU, before all of them.
DESCRIBE = 15
BUILD = 150
TESTERS = 8
#: The stand-in is as slow as the machine is busy, and no time on it is anybody's.
SLOWNESS = 6 if records.STAND_IN else 1


# --- one step -------------------------------------------------------------------------------------


def python(arguments: Sequence[str]) -> list[str]:
    """The interpreter with its arguments, on the stand-in where that is asked for."""
    stand_in = [str(ROOT / "tests" / "gpu_on_host.py")] if records.STAND_IN else []
    return [sys.executable, *stand_in, *arguments]


def commands(step: Step, left: float) -> list[list[str]]:
    """The commands of a step, which run side by side."""
    arguments = [*(step.small if records.STAND_IN else step.arguments)]
    # It ends by itself, so that what it has not done is listed, and a sanitizer gives its verdict.
    budget = f"{max(1, left - (20 if step.tools else 8)):.0f}"
    if not step.is_pytest:
        told = [] if arguments[0] == "-m" else ["--output", gpu_run.JOURNAL, "--budget", budget]
        return [python([*arguments, *told])]
    arguments += ["-p", "pytest_journal", "--journal", gpu_run.JOURNAL]
    if step.tools:
        arguments += ["--budget", budget, "--shuffle"]
        return [[*sanitizer(tool), *python(arguments)] for tool in step.tools]
    count = 1 if records.STAND_IN else max(1, min(TESTERS, (os.cpu_count() or 2) // 2))
    return [python([*arguments, "--share", f"{i}/{count}"]) for i in range(count)]


def sanitizer(tool: str) -> list[str]:
    """compute-sanitizer with a tool; on the stand-in the interpreter of PTX watches by itself."""
    if records.STAND_IN:
        return []
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"))
    found = shutil.which("compute-sanitizer", path=path) or "compute-sanitizer"
    # PyTorch's own kernels (namespace at, as it is mangled) are not what is tested.
    return [found, "--tool", tool, "--kernel-name-exclude", "kernel_substring=N2at"]


def judge(step: Step, tool: str, record: gpu_run.Record, ended: gpu_run.Ended) -> None:
    """A sanitizer's verdict: racecheck counts hazards, the others errors."""
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", ended.output)
    row: dict[str, Any] = {
        "case": f"verdict of {tool}",
        "errors": int(found[-1]) if found else None,
    }
    if row["errors"] != 0:
        row["failed"] = ended.output[-3000:] or ended.reason
    record.hear(step.name, {"row": row})


def do(step: Step, deadline: float, record: gpu_run.Record) -> None:
    """One step with all its processes."""
    start, of = time.monotonic(), record[step.name]
    every = commands(step, deadline - start)
    print(f"\n{step.name}: at most {deadline - start:.0f} s, {len(every)} processes", flush=True)
    environment = {"OMP_NUM_THREADS": "2"} if step.is_pytest or step.tools else {}
    # PyTorch's cached blocks would hide an access outside a tensor.
    environment |= {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if step.tools else {}
    run = partial(gpu_run.drive, step.name, deadline=deadline, record=record)
    with ThreadPoolExecutor(len(every)) as pool:
        jobs = []
        for number, command in enumerate(every):
            options: dict[str, Any] = {
                "patience": step.patience * SLOWNESS,
                "environment": environment,
            }
            if step.tools and not records.STAND_IN:
                options["judge"] = partial(judge, step, step.tools[number], record)
            jobs.append(pool.submit(run, command, **options))
        ended = [job.result() for job in jobs]
    of["seconds"] = round(time.monotonic() - start, 1)
    of["ended"] = ", ".join(dict.fromkeys(each.reason for each in ended))
    if not records.STAND_IN:  # which says how long it took
        of["output"] = ended[0].output.splitlines()[-40:]
    record.save()
    shown = {key: of[key] for key in ("ended", "seconds", "planned", "done", "tally")}
    print(ended[0].output[-1500:], f"{step.name}: {shown}, {len(of['rows'])} rows", sep="\n")


def good(step: dict[str, Any]) -> bool:
    """Whether all of it was done and nothing failed."""
    return (
        step["ended"] == "exit status 0"
        and step["done"] == step["planned"]
        and not any("failed" in row or "budget" in row.get("left_out", "") for row in step["rows"])
    )


# --- the native module ----------------------------------------------------------------------------


def build(capability: str, deadline: float) -> dict[str, Any]:
    """Compiles the native module for this GPU alone and puts it where it is imported from."""
    start = time.monotonic()
    environment = {"HARMONIZER_CUDA": "1", "HARMONIZER_CUDA_ARCHS": capability.replace(".", "")}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder]
        command += ["--build-temp", str(Path(folder) / "temporary")]
        ended = gpu_run.run(command, deadline, environment=environment)
        made = list(Path(folder).rglob("_native*.so"))
        if ended.status == 0 and made:
            # In one move: a process may have the old one open.
            near = ROOT / "harmonizer_ext" / f".{made[0].name}.new"
            shutil.copy2(made[0], near)
            near.replace(ROOT / "harmonizer_ext" / made[0].name)
    result: dict[str, Any] = {"seconds": round(time.monotonic() - start, 1)}
    if ended.status == 0 and made:
        return result | {"outcome": "built"}
    return result | {"failed": ended.reason, "compiler_said_last": ended.output.splitlines()[-30:]}


def describe() -> int:
    """Prints what there is, for the record; in a process of its own."""
    import harness
    import torch

    from harmonizer_ext import backends

    if not torch.cuda.is_available():
        return NO_GPU
    native = sorted((ROOT / "harmonizer_ext").glob("_native*.so"))
    properties = torch.cuda.get_device_properties(0)
    found = harness.machine("cuda") | {
        "gpu": torch.cuda.get_device_name(),
        "compute_capability": "{}.{}".format(*torch.cuda.get_device_capability()),
        "multiprocessors": properties.multi_processor_count,
        "cuda_kernels": backends.get("cuda").description(),
        "why_no_cuda_kernels": backends.why_not("cuda", "cuda"),
        "native_modules": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in native
        },
    }
    print(json.dumps(found))
    return 0


# --- all of it ------------------------------------------------------------------------------------


def driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown: {error}"
    return said.stdout.partition("\n")[0] or f"unknown: {said.stderr.strip()}"


def check(
    steps: Sequence[Step], machine: dict[str, Any], record: gpu_run.Record, start: float
) -> None:
    """Does the steps in their order; those that can, while the native module is compiled."""
    ends, total = {}, DESCRIBE * SLOWNESS
    for step in steps:
        total += step.seconds * SLOWNESS
        ends[step.name] = start + total
    left = list(steps)
    with ThreadPoolExecutor(1) as pool:
        building = None
        if machine.get("why_no_cuda_kernels") and not records.STAND_IN:
            print(
                f"compiling the CUDA kernels, because {machine['why_no_cuda_kernels']}", flush=True
            )
            arguments = (machine["compute_capability"], time.monotonic() + BUILD)
            building = pool.submit(build, *arguments)
        while left:
            step = left[0]
            if building is not None and not building.done():
                step = next((step for step in left if step.beside_build), step)
                if not step.beside_build:
                    building.result()
            if building is not None and building.done():
                record.save(build=building.result())
                print(f"build: {building.result()}", flush=True)
                building = None
            left.remove(step)
            deadline = min(ends[step.name], start + total)
            if deadline - time.monotonic() < 10:
                deadline = min(time.monotonic() + step.seconds, start + total)
            if deadline - time.monotonic() < 5:
                record[step.name]["ended"] = "left out: no time was left"
                record.save()
                continue
            try:
                do(step, deadline, record)
            except Exception as error:  # noqa: BLE001  the next step is worth as much
                record[step.name]["ended"] = f"the check itself failed: {error!r}"
                record.save()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="default: a new file in bench/results")
    parser.add_argument("--steps", help=f"default: {','.join(step.name for step in PLAN)}")
    parser.add_argument("--describe", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.describe:
        return describe()
    names = args.steps.split(",") if args.steps else [step.name for step in PLAN]
    steps = [step for step in PLAN if step.name in names]
    if unknown := set(names) - {step.name for step in PLAN}:
        parser.error(f"--steps: expected some of {parser.format_help()}, got {', '.join(unknown)}")
    start = time.monotonic()
    ended = gpu_run.run(
        python([str(Path(__file__).resolve()), "--describe"]), start + 6 * DESCRIBE * SLOWNESS
    )
    no_torch = "No module named 'torch'" in ended.output
    if ended.status == NO_GPU or no_torch or (records.STAND_IN and ended.status != 0):
        print(
            "gpu_check: no GPU that PyTorch can use on this machine; nothing was run and nothing "
            f"was written (HARMONIZER_STAND_IN=1 takes a stand-in). {ended.output}",
            file=sys.stderr,
        )
        return 2
    machine: dict[str, Any] = {"gpu": "unknown", "failed": ended.output}
    if ended.status == 0:
        machine = json.loads(ended.output.splitlines()[-1]) | {"driver": driver_version()}
    now = datetime.datetime.now(datetime.timezone.utc)
    slug = re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")
    folder = ROOT / "runs" / "stand-in" if records.STAND_IN else RESULTS
    output = args.output or folder / f"{now:%Y-%m-%d-%H%M%S}-{slug}.json"
    record = gpu_run.Record(
        output, machine=machine, plan={step.name: step.seconds for step in steps}
    )
    if records.STAND_IN and RESULTS in output.resolve().parents:
        parser.error(f"--output: expected another folder than {RESULTS} for a stand-in's record")
    record.save(seconds_to_describe=round(time.monotonic() - start, 1), verdict="not finished")
    check(steps, machine, record, start)
    bad = [name for name, step in record.content["steps"].items() if not good(step)]
    bad += ["build"] if "failed" in record.content.get("build", {}) else []
    record.save(verdict=f"not all well: {', '.join(bad)}" if bad else "all well")
    print(f"\n{record.content['verdict']}; wrote {output}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
