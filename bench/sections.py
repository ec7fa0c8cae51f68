"""The sections of a run: each is a list of steps, with how long each will take about.

A step measures some cases and gives rows of the record. The estimates are for a laptop of two
cores; a step that compiles takes its estimate only the first time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import harness  # first of all: it sets what torch reads when it is loaded

# isort: split
import bench_instructions
import bench_loss
import bench_package
import bench_step
import records
import torch
from bench_loss import Case
from peers_tensorflow import NAMES as TENSORFLOW_NAMES
from peers_tensorflow import TensorFlowError, TensorFlowPeer

from harmonizer_ext import backends

Rows = list[dict[str, Any]]

#: In the order in which they run.
SECTIONS = ("loss", "memory", "sweep", "latency", "step", "import", "build", "instructions")

#: Measured only where they are asked for: they take minutes and change with the sources alone.
ON_REQUEST = ("build", "instructions")


@dataclass(frozen=True)
class Options:
    """The options that were asked for; ``run.py`` has the flags."""

    batch: dict[str, int]
    size: int
    seconds: float
    quick: bool
    compiled: bool
    compiled_steps: bool
    tensorflow: bool
    networks: tuple[str, ...] = ()


@dataclass
class LeftOut:
    """A measurement that was left out, and why; for the record and the reader."""

    entries: list[dict[str, str]] = field(default_factory=list)
    #: How many of them were tried and raised an error.
    failures: int = 0

    def add(self, what: str, why: str) -> None:
        self.entries.append({"what": what, "why": why})
        harness.say(f"      left out: {what}: {why}")

    def failed(self, what: str | tuple[str, str], why: str) -> None:
        self.failures += 1
        self.add(what if isinstance(what, str) else ", ".join(what), why)


@dataclass(frozen=True)
class Step:
    """One line of progress: what it is, about how long it takes, and what it gives."""

    section: str
    label: str
    seconds: float
    measure: Callable[[], Rows]


# --- the loss -------------------------------------------------------------------------------------


def headline_cases(options: Options, device: str) -> list[Case]:
    batch, size = options.batch[device], options.size
    return [
        Case("released", batch, size, size, torch.float32, headline=True),
        Case("paper", batch, size, size, torch.float32, formulation="paper", headline=True),
        Case(
            "released, loss only", batch, size, size, torch.float32, gradient=False, headline=True
        ),
        Case(
            "paper, loss only",
            batch,
            size,
            size,
            torch.float32,
            formulation="paper",
            gradient=False,
            headline=True,
        ),
        # In the same loop as what they are compared with.
        Case("released, bfloat16 saliency", batch, size, size, torch.bfloat16),
        Case("released, odd size", batch, size + 1, size - 1, torch.float32),
    ]


def _with_graphs(cases: Sequence[Case], device: str, seconds: float, left_out: LeftOut) -> Rows:
    """Fused ops and the eager peer, on a GPU from CUDA graphs, which leaves the launches out."""
    import bench_gpu

    journal = records.Journal(None)
    for case in cases:
        found = {
            name: bench_gpu.Contender(run, plain=False)
            for name, run in bench_loss.implementations(case, device, False).items()
            if name.endswith(": op") or name == bench_loss.eager_name(case)
        }
        bench_gpu.measure(case, found, device, journal, seconds)
    for row in journal.rows:
        if "failed" in row:
            left_out.failed(f"{row['case']}, {row['implementation']}, in a graph", row["failed"])
    return [
        row
        for row in journal.rows
        if "value" in row and not row["implementation"].startswith(bench_loss.COPY)
    ]


def loss_steps(options: Options, device: str, left_out: LeftOut) -> list[Step]:
    cases = headline_cases(options, device)

    def measure() -> Rows:
        def timed(tensorflow: TensorFlowPeer | None) -> Rows:
            times = bench_loss.measure_time(
                cases,
                device,
                options.compiled,
                options.seconds,
                failed=left_out.failed,
                tensorflow=tensorflow,
            )
            return bench_loss.time_rows(cases, times)

        what = "the authors' TensorFlow code"
        if not options.tensorflow:
            left_out.add(what, "--no-tensorflow")
            return timed(None)
        if torch.device(device).type == "cuda":
            left_out.add(f"{what} on {device}", "measured on the CPU only")
            return timed(None)
        try:
            peer = TensorFlowPeer(torch.get_num_threads())
        except TensorFlowError as error:
            left_out.add(what, str(error))
            return timed(None)
        with peer:
            return timed(peer)

    compiling = 90.0 if options.compiled else 0.0
    label = "both formulations against every peer"
    steps = [Step("loss", label, options.seconds + compiling + 10, measure)]
    if torch.device(device).type == "cuda":
        seconds = options.seconds / len(cases)
        steps.append(
            Step(
                "loss",
                "the same from CUDA graphs",
                options.seconds,
                lambda: _with_graphs(cases, device, seconds, left_out),
            )
        )
    return steps


# --- memory ---------------------------------------------------------------------------------------


def memory_steps(options: Options, device: str, left_out: LeftOut) -> list[Step]:
    """Peak extra memory of loss and gradient, every implementation of both formulations."""
    reason = harness.why_no_peak_memory(device)
    if reason is not None:
        left_out.add("peak memory", reason)
        return []

    def measure_tensorflow(case: Case) -> Rows:
        rows = []
        small = replace(case, height=16, width=16)
        for name in TENSORFLOW_NAMES.values():
            try:
                peer = TensorFlowPeer(torch.get_num_threads(), harness.EXACT_RESIDENT_SET)
            except TensorFlowError as error:
                left_out.add("memory of the authors' TensorFlow code", str(error))
                break
            with peer:
                call, warm_up = (
                    peer.load(of.maps(device, 0), of.levels, of.gradient, 1)[name]
                    for of in (case, small)
                )
                rows.append(bench_loss.memory_row(case, name, call.peak_extra_bytes(warm_up)))
        return rows

    steps = []
    for case in headline_cases(options, device)[:2]:
        names = list(bench_loss.implementations(case, device, options.compiled))
        compiling = 10.0 if options.compiled else 0.0
        steps.append(
            Step(
                "memory",
                f"{case.name}, {len(names)} implementations",
                4 + len(names) + compiling,
                lambda case=case, names=names: bench_loss.measure_memory(
                    case, names, device, left_out.failed
                ),
            )
        )
    if options.tensorflow and torch.device(device).type == "cpu":
        case = headline_cases(options, device)[0]
        steps.append(Step("memory", "released, TensorFlow", 12, lambda: measure_tensorflow(case)))
    return steps


# --- sweeps ---------------------------------------------------------------------------------------


def sweep_cases(options: Options, device: str) -> list[tuple[str, Case]]:
    """(what is varied, case): each varies one thing of a released float32 loss and gradient."""
    on_gpu = torch.device(device).type == "cuda"
    size = options.size
    # The batch that the sizes and the rest are measured at.
    usual = 64 if on_gpu else 8

    def case(
        name: str, batch: int = usual, height: int = size, width: int = size, **of: Any
    ) -> Case:
        return Case(f"sweep, {name}", batch, height, width, of.pop("dtype", torch.float32), **of)

    batches = (1, 2, 4, 8, 16, 32, 64, 128) + ((256, 512, 1024) if on_gpu else ())
    sizes = [(n, n) for n in (56, 112, 160, 256, 384, 512)] + [(size + 1, size - 1)]
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float64)
    if options.quick:
        batches, sizes, dtypes = (1, 2), [(33, 31)], (torch.bfloat16,)
    found = [("batch", case(f"batch {batch}", batch)) for batch in batches]
    found += [
        ("batch", case(f"paper, batch {batch}", batch, formulation="paper"))
        for batch in batches[:: 2 if options.quick else 3]
    ]
    # The usual one stands in every sweep once, under the name that is varied there.
    found += [("size", case(f"size {h}x{w}", height=h, width=w)) for h, w in [(size, size), *sizes]]
    found += [
        ("dtype", case(f"dtype {str(dtype).removeprefix('torch.')}", dtype=dtype))
        for dtype in (torch.float32, *dtypes)
    ]
    found += [("channels", case(f"channels {n}", channels=n)) for n in (1, 3, 6)]
    found += [("channels", case("channels 3, channels_last", channels_last=True))]
    found += [("levels", case(f"levels {levels}", levels=levels)) for levels in (1, 3, 5, 6)]
    return found


def sweep_steps(options: Options, device: str, left_out: LeftOut) -> list[Step]:
    def measure(varied: str, case: Case) -> Rows:
        times = bench_loss.measure_time(
            [case],
            device,
            False,
            options.seconds / 40,
            failed=left_out.failed,
            minimum_rounds=5,
        )
        return bench_loss.time_rows([case], times, varied=varied)

    return [
        Step(
            "sweep",
            case.name.removeprefix("sweep, "),
            # The eager peer and the reference, at least five times and twice before.
            options.seconds / 40 + 0.4 + 12 * 2.5e-8 * case.batch * case.height * case.width,
            lambda varied=varied, case=case: measure(varied, case),
        )
        for varied, case in sweep_cases(options, device)
    ]


# --- latency, steps, package ----------------------------------------------------------------------


def latency_steps(options: Options, device: str, left_out: LeftOut) -> list[Step]:
    """One image: what a call costs beside its pixels. The small one has hardly any.

    Back to back as in a loop of their own; and each between calls of the others, which have pushed
    its code and its inputs out of the caches, as a training step does.
    """
    size = options.size
    cases = [
        Case(name, 1, length, length, torch.float32, gradient=gradient)
        for name, length in (("one image", size), ("one small image", 16))
        for gradient in (True, False)
    ]

    def measure() -> Rows:
        rows: Rows = []
        for suffix, back_to_back in ((", back to back", True), ("", False)):
            named = [
                replace(c, name=c.name + ("" if c.gradient else ", loss only") + suffix)
                for c in cases
            ]
            seconds = options.seconds / 8
            times = bench_loss.measure_time(
                named, device, False, seconds, failed=left_out.failed, back_to_back=back_to_back
            )
            rows += bench_loss.time_rows(named, times)
        return rows

    return [Step("latency", "one image", options.seconds / 4 + 2, measure)]


def step_steps(options: Options, device: str, left_out: LeftOut) -> list[Step]:
    reason = bench_step.why_no_networks()
    if reason is not None:
        left_out.add("the training step", reason)
        return []
    if not options.compiled_steps:
        why = "compiling takes a minute a network; --compile-steps measures it"
        left_out.add(f"compiled training steps on {device}", why)

    def failed_in(workload: bench_step.Workload) -> bench_step.Failed:
        return lambda name, why: left_out.failed(f"{workload.name}, {name}", why)

    def measure(workload: bench_step.Workload) -> Rows:
        seconds = options.seconds / 3
        return bench_step.measure(
            workload, device, seconds, options.compiled_steps, failed_in(workload)
        )

    steps = []
    for workload in bench_step.workloads(device, options.quick, options.networks):
        compiling = 120.0 if options.compiled_steps else 0.0
        steps.append(
            Step(
                "step",
                f"{workload.name}: time",
                options.seconds / 3 + 9 + compiling,
                lambda workload=workload: measure(workload),
            )
        )
        if harness.why_no_peak_memory(device) is None:
            steps.append(
                Step(
                    "step",
                    f"{workload.name}: memory",
                    9,
                    lambda workload=workload: bench_step.measure_memory(
                        workload, device, failed_in(workload)
                    ),
                )
            )
    return steps


def import_steps(options: Options, device: str, left_out: LeftOut) -> list[Step]:
    processes = 2 if options.quick else 3
    return [
        Step(
            "import",
            f"{processes} new processes",
            2.0 * (processes + 1),
            lambda: bench_package.measure_import(processes),
        )
    ]


def build_steps(options: Options, device: str, left_out: LeftOut) -> list[Step]:
    steps = [Step("build", "CPU kernels", 40, lambda: bench_package.measure_build(cuda=False))]
    if bench_package.has_nvcc():
        build = bench_package.measure_build
        steps.append(Step("build", "CPU and CUDA kernels", 300, lambda: build(cuda=True)))
    return steps


def instructions_steps(options: Options, device: str, left_out: LeftOut) -> list[Step]:
    reason = bench_instructions.why_not() or backends.why_not("cpu", "cpu")
    if reason is not None:
        left_out.add("instructions of the CPU kernels", reason)
        return []
    return [Step("instructions", "one by one", 150, bench_instructions.measure)]


_STEPS = {
    "loss": loss_steps,
    "memory": memory_steps,
    "sweep": sweep_steps,
    "latency": latency_steps,
    "step": step_steps,
    "import": import_steps,
    "build": build_steps,
    "instructions": instructions_steps,
}

#: Measured once, whatever the devices.
_OF_THE_PACKAGE = ("import", "build", "instructions")


def plan(
    sections: Sequence[str], devices: Sequence[str], options: Options, left_out: LeftOut
) -> list[tuple[str, Step]]:
    """(device, step) of everything to do, in order."""
    return [
        (device, step)
        for section in SECTIONS
        if section in sections
        for device in (devices[:1] if section in _OF_THE_PACKAGE else devices)
        for step in _STEPS[section](options, device, left_out)
    ]
