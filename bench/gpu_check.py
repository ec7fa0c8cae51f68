"""Turns ten minutes with a GPU into evidence: measurements, tests and sanitizers in one record.

Called by ``gpu_check.sh``. Needs no network, and PyTorch only in its children. Ends inside nine
minutes: every step has a limit, and what it did not need is the next ones'. The most valuable
comes first. Each row is in the record as soon as it is measured; what fails, hangs or ends its
process has the reason in its row, and a new process goes on behind it. Whenever and however this
is ended, the record is whole and nothing runs on (``keeper.py``).

``HARMONIZER_STAND_IN=1`` runs all of it, small, on tests/gpu_on_host.py; no figure is kept.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import re
import selectors
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import records

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
NO_GPU, CONTEXT_LOST = 3, 70  # exit statuses: of --describe, and of a program (see harness.py)

OPERATIONS = [
    f"tests/test_{stem}.py"
    for stem in ("loss", "ops", "pyramid", "standardize", "positive_part_mse")
]
HARMONIZED = "harmonized, all rows"
COMPILED = ("cross entropy alone, torch.compile", f"{HARMONIZED}, torch.compile")


@dataclass(frozen=True)
class Step:
    """One part of the check.

    Attributes:
        name: in the record.
        seconds: its limit, if those before it have needed all of theirs.
        arguments: of Python.
        small: in their place on the stand-in.
        patience: seconds without a word from a process after which it is given up.
        processes: how many share the work, at most; tests alone can.
        tools: of compute-sanitizer, one process each; without, a process of its own.
        beside_build: whether it measures nothing and needs no CUDA kernels, so that it can run
            while they are compiled.
    """

    name: str
    seconds: int
    arguments: Sequence[str]
    small: Sequence[str]
    patience: int = 45
    processes: int = 1
    tools: Sequence[str] = ()
    beside_build: bool = False

    @property
    def is_pytest(self) -> bool:
        return "pytest" in self.arguments


def _tests(files: Sequence[str], expression: str = "") -> tuple[str, ...]:
    chosen = ("-k", expression) if expression else ()
    return ("-m", "pytest", "-q", "-p", "no:cacheprovider", *files, *chosen)


_ONCE = ("--seconds", "0.001", "--rounds", "2")
_STEP = ("bench/bench_step.py", "--networks")
_TINY = (*_STEP, "vit_tiny_patch16_224:2x32", *_ONCE, "--precisions", "bfloat16")
_GPU_TESTS = ("tests/test_gpu.py", "tests/test_step_gpu.py")

#: In this order; together with describing the machine, less than nine minutes.
PLAN = (
    Step("self_test", 20, ("-m", "harmonizer_ext"), ("-m", "harmonizer_ext")),
    Step(
        "sweep",
        55,
        ("bench/gpu_sweep.py", "--sizes", "224", "--batches", "64,512"),
        ("bench/gpu_sweep.py", "--sizes", "112", "--batches", "1", "--dtypes", "float32", *_ONCE),
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
        _tests(_GPU_TESTS),
        _tests(_GPU_TESTS, "(graph_capture and released) or does_not_wait or scaler"),
        processes=8,
    ),
    Step(
        "triton_tests",
        45,
        _tests(OPERATIONS, "triton-cuda"),
        _tests(OPERATIONS[3:], "triton-cuda and by_hand"),
        processes=8,
        beside_build=True,
    ),
    Step(
        "cuda_tests",
        35,
        _tests(OPERATIONS, "cuda-cuda"),
        _tests(OPERATIONS[3:], "cuda-cuda and by_hand"),
        processes=8,
    ),
    Step(
        "training_step",
        90,
        (
            *(*_STEP, "resnet50:64x224", "vit_small_patch16_224:64x224", "--profile", "20"),
            *("--precisions", "TF32", "bfloat16", "float32", "--seconds", "3"),
        ),
        (*_TINY, "--profile", "20"),
    ),
    Step(
        "sanitizers",
        85,
        ("bench/gpu_sanitize.py",),
        ("bench/gpu_sanitize.py", "--sizes", "5x7"),
        patience=80,
        tools=("memcheck", "racecheck"),
    ),
    Step(
        "compiled_step",
        65,
        (*_STEP, "resnet50:64x224", "--precisions", "TF32", "--implementations", *COMPILED),
        (*_TINY, "--implementations", *COMPILED),
        patience=65,
    ),
)
#: Seconds to import PyTorch and to ask it for the GPU, before all of them.
DESCRIBE = 15
BUILD = 150


def why(status: int) -> str:
    """How a process ended, in words."""
    return f"killed by signal {status - 128}" if status > 128 else f"exit status {status}"


class Record:
    """The record of all steps, which several threads write to."""

    def __init__(self, path: Path, **head: Any) -> None:
        self.path = path
        self.content: dict[str, Any] = {**head, "steps": {}}
        self._lock = threading.Lock()
        self._written = 0.0

    def step(self, name: str) -> dict[str, Any]:
        empty = {"ended": "not yet", "planned": 0, "done": 0, "tally": {}, "rows": []}
        found: dict[str, Any] = self.content["steps"].setdefault(name, empty)
        return found

    def save(self, at_once: bool = True) -> None:
        """Several times a second is enough where a thousand tests are counted."""
        if at_once or time.monotonic() - self._written > 0.3:
            records.write(self.path, self.content)
            self._written = time.monotonic()

    def hear(self, step: str, event: dict[str, Any]) -> None:
        """Takes up what a process tells."""
        with self._lock:
            of = self.step(step)
            if "row" in event:
                of["rows"].append(event["row"])
                problem = event["row"].get("failed")
                if problem is not None:
                    print(f"  FAILED {event['row']}"[:600], flush=True)
            elif "tally" in event:
                of["tally"][event["tally"]] = of["tally"].get(event["tally"], 0) + 1
            elif "end" in event:
                of["done"] += 1
            elif "plan" in event:
                of["planned"] += len(event["plan"])
            self.save(at_once="row" in event)

    def set(self, **content: Any) -> None:
        with self._lock:
            self.content |= content
            self.save()


# --- one process ----------------------------------------------------------------------------------


@dataclass
class Ended:
    """How a process ended: its status, None where it was cut off, and the end of what it said."""

    status: int | None
    output: str
    running: str | None = None
    silent: bool = False


def run(
    command: Sequence[str],
    deadline: float,
    hear: Any = None,
    patience: float = 1e9,
    environment: dict[str, str] | None = None,
) -> Ended:
    """Runs a command under the keeper until ``deadline``, or until it is silent for too long.

    Args:
        command: where it has the argument ``{journal}``, this becomes a pipe.
        hear: is given every event from that pipe.
    """
    reading, writing = os.pipe()
    command = [part.replace("{journal}", f"/dev/fd/{writing}") for part in command]
    path = os.pathsep.join((str(ROOT), str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1"} | (
        environment or {}
    )
    running: str | None = None
    with tempfile.TemporaryFile("w+", errors="replace") as output, os.fdopen(reading) as events:
        keeper = subprocess.Popen(
            [sys.executable, "-S", "-E", str(ROOT / "bench" / "keeper.py"), *command],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=(writing,),
            start_new_session=True,
        )
        os.close(writing)
        assert keeper.stdin is not None
        silent_since, closed = time.monotonic(), False
        os.set_blocking(reading, False)
        rest = ""
        with selectors.DefaultSelector() as selector:
            selector.register(reading, selectors.EVENT_READ)
            while True:
                over = keeper.poll() is not None
                for _ in selector.select(0 if over else 0.2):
                    text = os.read(reading, 1 << 16).decode(errors="replace")
                    if not text:
                        selector.unregister(reading)
                        continue
                    silent_since = time.monotonic()
                    *lines, rest = (rest + text).split("\n")
                    for event in map(json.loads, lines):
                        running = event.get("begin", None if "end" in event else running)
                        if hear is not None:
                            hear(event)
                if over:
                    break
                now = time.monotonic()
                if not closed and (now > deadline or now - silent_since > patience):
                    closed, silent = True, now <= deadline
                    keeper.stdin.close()
        keeper.stdin.close()
        output.seek(0)
        said = output.read()[-4000:]
    cut = closed and keeper.returncode != 0
    return Ended(None if cut else keeper.returncode, said, running, cut and silent)


# --- one step -------------------------------------------------------------------------------------


def python(arguments: Sequence[str]) -> list[str]:
    """The interpreter with its arguments, on the stand-in where that is asked for."""
    stand_in = [str(ROOT / "tests" / "gpu_on_host.py")] if records.STAND_IN else []
    return [sys.executable, *stand_in, *arguments]


def commands(step: Step, left: float) -> dict[str, list[str]]:
    """By what a row says of it, the commands of a step, which run side by side."""
    arguments = list(step.small if records.STAND_IN else step.arguments)
    if step.is_pytest:
        count = 1 if records.STAND_IN else max(1, min(step.processes, (os.cpu_count() or 2) // 2))
        arguments += ["-p", "pytest_journal", "--journal", "{journal}", "--share"]
        return {f"{i + 1} of {count}": python([*arguments, f"{i}/{count}"]) for i in range(count)}
    if arguments[0] == "-m":
        return {"": python(arguments)}
    # It ends by itself, so that what it has not done is listed.
    budget = left - (20 if step.tools else 8)
    arguments += ["--output", "{journal}", "--budget", f"{max(budget, 1):.0f}"]
    found = {}
    for tool in step.tools or ("",):
        watched = [] if records.STAND_IN or not tool else [*_sanitizer(tool)]
        found[tool] = [*watched, *python(arguments)]
    return found


def _sanitizer(tool: str) -> list[str]:
    """compute-sanitizer with a tool; PyTorch's kernels (at, mangled) are not what is tested."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"))
    found = shutil.which("compute-sanitizer", path=path) or "compute-sanitizer"
    return [found, "--tool", tool, "--kernel-name-exclude", "kernel_substring=N2at"]


def drive(step: Step, label: str, command: list[str], deadline: float, record: Record) -> Ended:
    """Runs a command to its end, in a new process behind whatever ends one."""
    done: set[str] = set()
    given_up: set[str] = set()

    def hear(event: dict[str, Any]) -> None:
        # A process that goes on plans what the first one planned.
        if not ("plan" in event and given_up):
            record.hear(step.name, event)
        if "end" in event:
            done.add(event["end"])

    # PyTorch's cached blocks would hide an access outside a tensor.
    environment = {"OMP_NUM_THREADS": "2"} if step.is_pytest or step.tools else {}
    environment |= {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if step.tools else {}
    with tempfile.TemporaryDirectory() as folder:
        skip = Path(folder) / "skip.json"
        while True:
            skip.write_text(json.dumps(sorted(done | given_up)))
            again = ["--skip", str(skip)] if given_up else []
            ended = run([*command, *again], deadline, hear, step.patience, environment)
            if step.tools and not records.STAND_IN:
                _sanitizer_verdict(step, label, ended, record)
            if ended.status in (0, 1) or (step.is_pytest and ended.status == 5):
                return ended
            name = ended.running
            reason = (
                f"nothing was heard of it for {step.patience} s"
                if ended.silent
                else f"the limit of the step was reached after {step.seconds} s or more"
                if ended.status is None
                else why(ended.status)
            )
            if ended.status != CONTEXT_LOST:  # which is told by the one that found it
                where = {"case": name or "the process"} | ({"process": label} if label else {})
                last = ended.output.strip()[-1500:]
                record.hear(
                    step.name, {"row": {**where, "failed": f"{reason}; it said last: {last}"}}
                )
            if name is None or name in given_up or time.monotonic() > deadline - 5:
                return ended
            given_up.add(name)


def _sanitizer_verdict(step: Step, tool: str, ended: Ended, record: Record) -> None:
    # racecheck counts hazards, the others errors.
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", ended.output)
    row: dict[str, Any] = {"case": "verdict", "tool": tool}
    row |= (
        {"errors": int(found[-1])} if found else {"failed": f"no verdict: {ended.output[-1500:]}"}
    )
    if found and int(found[-1]):
        row["failed"] = ended.output[-3000:]
    record.hear(step.name, {"row": row})


def do(step: Step, deadline: float, record: Record) -> None:
    """One step with all its processes."""
    start = time.monotonic()
    of = commands(step, deadline - start)
    print(f"\n{step.name}: at most {deadline - start:.0f} s", flush=True)
    record.step(step.name)
    record.save()
    with ThreadPoolExecutor(len(of)) as pool:
        jobs = [
            pool.submit(drive, step, label, command, deadline, record)
            for label, command in of.items()
        ]
        ended = [job.result() for job in jobs]
    content = record.step(step.name)
    content["seconds"] = round(time.monotonic() - start, 1)
    content["ended"] = ", ".join("cut off" if e.status is None else why(e.status) for e in ended)
    content["output"] = ended[0].output.splitlines()[-40:]
    record.save()
    shown = {key: content[key] for key in ("ended", "seconds", "planned", "done", "tally")}
    print(
        ended[0].output[-1500:],
        f"{step.name}: {shown}, {len(content['rows'])} rows",
        sep="\n",
        flush=True,
    )


def good(step: dict[str, Any]) -> bool:
    """Whether all of it was done and nothing failed."""
    return (
        set(step["ended"].split(", ")) == {"exit status 0"}
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
        ended = run(command, deadline, environment=environment)
        made = list(Path(folder).rglob("_native*.so"))
        if ended.status == 0 and made:
            # In one move: a process may have the old one open.
            near = ROOT / "harmonizer_ext" / f".{made[0].name}.new"
            shutil.copy2(made[0], near)
            near.replace(ROOT / "harmonizer_ext" / made[0].name)
    result: dict[str, Any] = {"seconds": round(time.monotonic() - start, 1)}
    if ended.status == 0 and made:
        return result | {"outcome": "built"}
    reason = "cut off" if ended.status is None else why(ended.status)
    return result | {"failed": reason, "compiler_said_last": ended.output.splitlines()[-30:]}


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


def check(steps: Sequence[Step], machine: dict[str, Any], record: Record, start: float) -> None:
    """Does the steps in their order; those that can, while the native module is compiled."""
    ends, total = {}, DESCRIBE
    for step in steps:
        total += step.seconds
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
                record.set(build=building.result())
                print(f"build: {building.result()}", flush=True)
                building = None
            left.remove(step)
            deadline = min(ends[step.name], start + total)
            if deadline - time.monotonic() < 10:
                deadline = min(time.monotonic() + step.seconds, start + total)
            if deadline - time.monotonic() < 5:
                record.step(step.name)["ended"] = "left out: no time was left"
                record.save()
            else:
                do(step, deadline, record)


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
    ended = run(python([str(Path(__file__).resolve()), "--describe"]), start + 6 * DESCRIBE)
    if ended.status == NO_GPU or "No module named 'torch'" in ended.output:
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
    output = args.output or folder / f"{now:%Y-%m-%d-%H%M}-{slug}.json"
    record = Record(output, machine=machine, plan={step.name: step.seconds for step in steps})
    record.set(seconds_to_describe=round(time.monotonic() - start, 1), verdict="not finished")
    check(steps, machine, record, start)
    bad = [name for name, step in record.content["steps"].items() if not good(step)]
    bad += ["build"] if "failed" in record.content.get("build", {}) else []
    record.set(verdict=f"not all well: {', '.join(bad)}" if bad else "all well")
    print(f"\n{record.content['verdict']}; wrote {output}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
