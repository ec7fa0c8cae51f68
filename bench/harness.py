"""Timing side by side, peak memory, and the record: what every benchmark here shares.

All implementations of a case are called in turn, in a new order every round, so that whatever else
the machine does falls on all of them. Every call takes the next of several sets of inputs, together
more than twice the last-level cache: in training a saliency comes from a backward pass over
hundreds of megabytes and is in no cache either.
"""

from __future__ import annotations

import os
import sys

# A thread that waits by spinning takes its core from the next implementation, and from whoever else
# uses the machine. The OpenMP runtime reads this once, when it is loaded.
if "torch" in sys.modules and os.environ.get("OMP_WAIT_POLICY") != "passive":
    raise RuntimeError("import harness before torch: it sets OMP_WAIT_POLICY=passive")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# But for some microseconds: waking a thread takes longer than many an operation of a training step.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import ctypes
import datetime
import gc
import importlib.metadata
import json
import math
import platform
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import records
import torch

from harmonizer_ext import available_backends

ROOT = Path(__file__).resolve().parent.parent

RESULTS = ROOT / "bench" / "results"
#: Where a run leaves its record and its pictures; git ignores it. What is worth keeping is
#: committed in RESULTS.
RUNS = ROOT / "runs" / "bench"

Name = TypeVar("Name")
Result = TypeVar("Result")
Call = Callable[[int], object]


class SelfTimed(Protocol):
    """A call that says itself how long it took: another process's, or one of a row of calls."""

    def milliseconds(self, index: int) -> float: ...


def say(text: str) -> None:
    """Progress, apart from the result on stdout."""
    print(text, file=sys.stderr, flush=True)


# --- what fails -----------------------------------------------------------------------------------

#: Exit status of a program whose GPU answers no longer; a new process can go on.
CONTEXT_LOST = 70


def reason(error: BaseException) -> str:
    """An error in a line, with the one it followed: to leave a failed capture is an error too."""

    def line(of: BaseException) -> str:
        return f"{type(of).__name__}: {(str(of).strip().splitlines() or [''])[0][:300]}"

    first = error
    while first.__context__ is not None and not first.__suppress_context__:
        first = first.__context__
    return line(error) if first is error else f"{line(error)} (after {line(first)})"


def attempt(call: Callable[[], Result], failed: Callable[[str], object]) -> Result | None:
    """Returns what ``call`` returns; or None, once ``failed`` has been given the reason.

    Raises:
        SystemExit: the GPU answers no longer, as after an access outside of its memory: whatever
            this process would measure from then on would fail too.
    """
    try:
        return call()
    except Exception as error:  # noqa: BLE001  contenders are apart, whatever one of them does
        why = reason(error)
    # The error is gone, and with it all that its frames held.
    failed(why)
    if torch.cuda.is_initialized():
        gc.collect()
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            say(f"the GPU answers no longer: {reason(error)}")
            sys.exit(CONTEXT_LOST)
    return None


def each(
    names: Iterable[Name],
    call: Callable[[Name], Result],
    failed: Callable[[Name, str], object],
) -> dict[Name, Result]:
    """The results of ``call`` by name, without the names for which it raises an error."""
    found = {
        name: attempt(partial(call, name), lambda why, name=name: failed(name, why))
        for name in names
    }
    return {name: result for name, result in found.items() if result is not None}


# --- time -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call.

    On a machine that others use, noise only ever adds: the lower quartile is steadier than the
    median there, and the same on a quiet one.
    """

    median: float
    quantile_20: float
    quantile_80: float
    lower_quartile: float
    minimum: float
    samples: int

    @classmethod
    def of(cls, milliseconds: list[float]) -> Timing:
        percent = statistics.quantiles(milliseconds, n=100, method="inclusive")
        return cls(
            median=percent[49],
            quantile_20=percent[19],
            quantile_80=percent[79],
            lower_quartile=percent[24],
            minimum=min(milliseconds),
            samples=len(milliseconds),
        )

    def divided_by(self, calls: int) -> Timing:
        """The time of one of several calls which were timed together."""
        times = {k: v / calls for k, v in asdict(self).items() if k != "samples"}
        return Timing(**times, samples=self.samples)


def _elapsed_cpu(call: Call, index: int) -> float:
    start = time.perf_counter()
    result = call(index)
    elapsed = time.perf_counter() - start
    del result  # freed outside the measurement
    return elapsed * 1e3


def _elapsed_cuda(call: Call, index: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    result = call(index)
    end.record()
    end.synchronize()
    del result
    return float(start.elapsed_time(end))


_CLOCKS = {"cpu": _elapsed_cpu, "cuda": _elapsed_cuda}


def clock(device: str) -> Callable[[Call, int], float]:
    """Milliseconds of one call on a device.

    Raises:
        ValueError: there is no clock for devices of this type.
    """
    kind = torch.device(device).type
    if kind not in _CLOCKS:
        raise ValueError(f"device: expected one of {', '.join(_CLOCKS)}, got {device!r}")
    return _CLOCKS[kind]


class BackToBack:
    """A call that follows others of its kind, as in a loop: its code and inputs are in the caches.

    The median of a few; what ran between two turns of ``interleave`` is in the calls before.
    """

    def __init__(self, call: Call, device: str) -> None:
        self._call = call
        self._clocked = clock(device)

    def milliseconds(self, index: int) -> float:
        times = [self._clocked(self._call, index) for _ in range(8)]
        return statistics.median(times[3:])


def interleave(
    calls: Mapping[Name, Call | SelfTimed],
    *,
    device: str,
    seconds: float,
    minimum_rounds: int = 15,
    failed: Callable[[Name, str], object] | None = None,
) -> dict[Name, Timing]:
    """Times calls in turn.

    Args:
        calls: by name; each is given a running number that picks its set of inputs.
        device: what they run on.
        seconds: about how long to measure, warm-up apart.
        minimum_rounds: how often each is called at least, however long that takes; 2 or more.
        failed: is told of a call that raises an error, which is then left out; without it the error
            goes on.
    """
    clocked = clock(device)
    samples: dict[Name, list[float]] = {name: [] for name in calls}

    def elapsed(name: Name, index: int) -> float:
        call = calls[name]

        def timed() -> float:
            return clocked(call, index) if callable(call) else call.milliseconds(index)

        if failed is None:
            return timed()
        milliseconds = attempt(timed, lambda why: failed(name, why))
        if milliseconds is None:
            del samples[name]
            return 0.0
        return milliseconds

    for name in calls:
        elapsed(name, 0)
    round_seconds = max(sum(elapsed(name, 1) for name in list(samples)) / 1e3, 1e-6)
    rounds = min(max(int(seconds / round_seconds), minimum_rounds), 1000)
    shuffle, index = random.Random(0), 0
    slow = rounds * round_seconds > 10
    for number in range(rounds):
        if slow and number and number % max(rounds // 5, 1) == 0:
            say(f"      round {number} of {rounds}, {round_seconds:.1f} s each")
        for name in shuffle.sample(list(samples), len(samples)):
            milliseconds = elapsed(name, index)
            if name in samples:
                samples[name].append(milliseconds)
            index += 1
    return {name: Timing.of(values) for name, values in samples.items()}


def last_level_cache_bytes(device: str) -> int:
    """Size of the largest cache; 64 MiB where the system does not say."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [64 << 20]
    found = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    if found:
        units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
        texts = [path.read_text().strip() for path in found]
        sizes = [int(text[:-1]) * units[text[-1]] for text in texts]
    return max(sizes)


def sets_beyond_cache(bytes_per_set: int, device: str) -> int:
    """How many sets of inputs are more than twice the last-level cache; 2 to 256."""
    wanted = math.ceil(2 * last_level_cache_bytes(device) / bytes_per_set) + 1
    return min(max(wanted, 2), 256)


# --- memory ---------------------------------------------------------------------------------------

# With these glibc returns every freed block of 64 KiB or more to the system at once, so that the
# resident set is what is in use and not what was once in use.
EXACT_RESIDENT_SET = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def why_no_peak_memory(device: str) -> str | None:
    """None where ``peak_extra_bytes`` works, otherwise the reason."""
    if torch.device(device).type == "cuda" or Path("/proc/self/clear_refs").exists():
        return None
    return f"peak memory of a process needs Linux's /proc, this is {platform.system()}"


def _status_bytes(key: str) -> int:
    match = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError(f"/proc/self/status has no {key}: peak memory needs Linux")
    return int(match[1]) << 10


def peak_extra_bytes(call: Call, warm_up: Callable[[], object], device: str) -> int:
    """Most memory in use during one call beyond what was in use before it, its result included.

    On the CPU this is the peak of the process's resident set, which sees what no counter of tensors
    does: workspaces of kernels and of the convolution library, the stacks of threads. It needs a
    process of its own (see ``in_child``) and is good to about half a megabyte.

    Args:
        call: the measured call.
        warm_up: loads code and starts threads, and must leave no workspace of the size that
            ``call`` needs, or that would not be counted.
        device: what the call runs on.
    """
    warm_up()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call(0)
        torch.cuda.synchronize()
        del result
        return int(torch.cuda.max_memory_allocated()) - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of VmRSS
    before = _status_bytes("VmRSS")
    result = call(0)
    peak = _status_bytes("VmHWM") - before
    del result
    return peak


def in_child(arguments: list[str], exact_memory: bool = True) -> Any:
    """The last line that another Python process prints, read as JSON.

    Args:
        arguments: of the interpreter.
        exact_memory: its malloc gives back what it frees, for ``peak_extra_bytes``.
    """
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **(EXACT_RESIDENT_SET if exact_memory else {})},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peaks_in_forks(jobs: list[dict[str, str]]) -> list[int]:
    """Peak extra bytes of the jobs of ``peak_memory.py``, each in a process of its own."""
    arguments = ["bench/peak_memory.py", str(torch.get_num_threads()), json.dumps(jobs)]
    return [int(peak) for peak in in_child(arguments)]


# --- pytest-benchmark -----------------------------------------------------------------------------


def targets(reference: bool = True) -> list[tuple[str, str]]:
    """(device, backend) of everything that runs here."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return [
        (device, backend)
        for device in devices
        for backend in available_backends(device)
        if reference or backend != "reference"
    ]


def finished(call: Callable[[], object], device: str) -> Callable[[], object]:
    """The call and the end of its work: a clock on the host would see a GPU's launches alone."""
    if torch.device(device).type != "cuda":
        return call

    def run() -> object:
        result = call()
        torch.cuda.synchronize()
        return result

    return run


# --- the record -----------------------------------------------------------------------------------

#: What decides a figure besides the hardware. What is not installed is not in the record.
PACKAGES = ("torch", "triton", "tensorflow", "tensorflow-cpu", "harmonization", "timm", "numpy")


def processor_name(device: str) -> str:
    """The model's name as the system has it."""
    if torch.device(device).type == "cuda":
        return str(torch.cuda.get_device_name(device))
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return match[1].strip() if match else platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown: not a git checkout"


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    # The build that runs, which the metadata of an editable install may not name.
    return {**found, "torch": torch.__version__}


def machine(*devices: str) -> dict[str, Any]:
    """The machine that was measured on, for the record."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "devices": {
            device: {
                "name": processor_name(device),
                "last_level_cache_bytes": last_level_cache_bytes(device),
                "backends": list(available_backends(device)),
            }
            for device in devices
        },
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_before": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": _versions(),
        "cuda": torch.version.cuda,
        "omp_wait_policy": os.environ["OMP_WAIT_POLICY"],
        "gomp_spincount": os.environ["GOMP_SPINCOUNT"],
    }


def timing_row(timing: Timing) -> dict[str, Any]:
    """A row of the record, without its names."""
    return {"quantity": "time", "unit": "ms", "value": timing.median, **asdict(timing)}


def default_output(devices: list[str]) -> Path:
    """runs/bench/<date>-<time>-<processors>.json"""
    names = "-".join(processor_name(device) for device in devices)
    slug = re.sub(r"[^a-z0-9]+", "-", names.lower()).strip("-")
    return RUNS / f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d-%H%M}-{slug}.json"


write_record = records.write
