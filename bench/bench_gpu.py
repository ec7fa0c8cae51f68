"""The fused backends of a GPU against eager PyTorch, CUDA graphs, torch.compile and a copy.

    python bench/bench_gpu.py --output rows.json

What it measures is one call that gives loss and gradient: of a fused backend the op itself, of a
peer the forward and the backward pass; and a copy of the same bytes. ``bench_loss.py`` has the
bytes on the model and the peers, ``harness.py`` the clock: events round every call, implementations
in turn, inputs from sets that together exceed the cache. A GPU's short calls are launched faster
than they run only when several wait in its queue, so that a plain call includes what its launches
cost; a CUDA graph of one call on every set does not.

Every contender is on its own: what it raises is the reason in its row, and the others go on.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import bench_loss  # first of all: through harness it sets what torch reads when it is loaded

# isort: split
import harness
import peers
import program
import records
import torch

import harmonizer_ext as hx

GRAPH = ", CUDA graph"


@dataclass(frozen=True)
class Contender:
    """One implementation.

    Attributes:
        run: gives loss and gradient.
        columns: what its rows say beside the name.
        plain: whether it is also called without a graph, and its memory measured.
        graph: whether it is captured.
    """

    run: bench_loss.Run
    columns: Mapping[str, Any] = field(default_factory=dict)
    plain: bool = True
    graph: bool = True


def case(
    formulation: str, batch: int, height: int, width: int, dtype: torch.dtype
) -> bench_loss.Case:
    name = str(dtype).removeprefix("torch.")
    return bench_loss.Case(
        f"{formulation} B={batch} {height}x{width} {name}",
        batch,
        height,
        width,
        dtype,
        formulation=formulation,
    )


def cases(quick: bool) -> list[bench_loss.Case]:
    """Batches at 224x224, then other sizes, in float32 and bfloat16, both formulations.

    Last, because compiling takes half a minute a graph, the targets once more beside torch.compile.
    """
    shapes = [(64, 224, 224), (512, 224, 224), (8, 224, 224)]
    shapes += [(64, n, n) for n in (112, 256, 384, 512)] + [(64, 225, 223)]
    dtypes = [torch.float32, torch.bfloat16]
    if quick:
        tiny = [
            case(formulation, 2, 33, 31, torch.float32) for formulation in ("released", "paper")
        ]
        return [replace(tiny[0], headline=True), tiny[1]]
    plain = [
        case(formulation, *shape, dtype)
        for shape in shapes
        for dtype in dtypes
        for formulation in ("released", "paper")
    ]
    headlines = [
        replace(of, name=f"{of.name}, with {bench_loss.COMPILE}", headline=True)
        for of in plain
        if of.dtype == torch.float32 and of.batch >= 64 and of.height == of.width == 224
    ]
    return plain + headlines


def contenders(of: bench_loss.Case, device: str) -> dict[str, Contender]:
    """The fused op of every backend, the eager peer, and the compiled ones of a headline case."""
    found = {
        f"{backend}: op": Contender(bench_loss.fused_op(of, backend))
        for backend in bench_loss.backends_of(of, device)
        if backend != "reference"
    }
    eager = peers.EAGER[of.formulation][0]
    found[eager.__name__] = Contender(bench_loss.through_autograd(eager, gradient=True))
    for peer in peers.COMPILED[of.formulation] if of.headline else ():
        run = bench_loss.through_autograd(torch.compile(peer, dynamic=False), gradient=True)
        found[f"{bench_loss.COMPILE}({peer.__name__})"] = Contender(run, graph=False)
    return found


def captured(run: bench_loss.Run, sets: Sequence[Sequence[Any]]) -> harness.Call:
    """One CUDA graph that calls ``run`` on every set of inputs in turn."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # Outside of the graph's own context, which after an error leaves the stream that it chose.
    with torch.cuda.stream(stream):
        run(*sets[0])
        with torch.cuda.graph(graph, stream=stream):
            # Results that were freed would give their memory, in the cache by then, to the next.
            results = [run(*inputs) for inputs in sets]
    torch.cuda.current_stream().wait_stream(stream)
    del results
    return lambda _: graph.replay()


class Measurement:
    """One case: contenders are made ready one by one, then timed in turn."""

    def __init__(self, of: bench_loss.Case, device: str, journal: records.Journal) -> None:
        self.case, self.device, self.journal = of, device, journal
        self.count = harness.sets_beyond_cache(of.bytes, device)
        self.calls: dict[str, harness.Call] = {}
        self.columns: dict[str, dict[str, Any]] = {}

    def failed(self, name: str, why: str) -> None:
        harness.say(f"  {self.case.name}: {name}: {why}")
        # If this was the last thing that the GPU did, it is this that is left out from then on.
        self.journal.begin(f"{self.case.name} / {name.removesuffix(GRAPH)}")
        self.journal.row(case=self.case.name, implementation=name, failed=why)

    def _prepare(
        self, name: str, contender: Contender, sets: Sequence[Sequence[Any]], expected: Any
    ) -> None:
        columns: dict[str, Any] = {**contender.columns}
        if expected is not None:
            bench_loss.check_agreement(self.case, name, contender.run(*sets[0]), expected)
        on_gpu = torch.device(self.device).type == "cuda"
        if contender.plain:
            if on_gpu and expected is not None:
                peak = harness.peak_extra_bytes(
                    lambda _: contender.run(*sets[0]), lambda: None, self.device
                )
                columns["peak_extra_megabytes"] = peak / 1e6
            self.calls[name] = bench_loss.over_sets(contender.run, sets)
            self.columns[name] = columns
        if contender.graph and on_gpu:
            self.calls[name + GRAPH] = captured(contender.run, sets)
            self.columns[name + GRAPH] = columns

    def prepare(self, found: Mapping[str, Contender]) -> None:
        """Checks and captures every contender; one that fails has its row."""
        sets = [self.case.maps(self.device, seed) for seed in range(self.count)]
        reference = partial(
            hx.harmonization_loss, formulation=self.case.formulation, backend="reference"
        )
        expected = bench_loss.through_autograd(reference, gradient=True)(*sets[0])
        copy = Contender(bench_loss.copy_run, plain=any(c.plain for c in found.values()))
        inputs = bench_loss.copy_sets(self.case, self.device, self.count)
        for name, contender in {bench_loss.COPY: copy, **found}.items():
            if self.journal.begin(f"{self.case.name} / {name}"):
                of = (inputs, None) if name == bench_loss.COPY else (sets, expected)
                harness.attempt(
                    partial(self._prepare, name, contender, *of), partial(self.failed, name)
                )

    def time(self, seconds: float, rounds: int) -> None:
        """Times what is ready; a row each."""
        if not self.journal.begin(f"{self.case.name} / timing"):
            return
        timings = harness.interleave(
            self.calls,
            device=self.device,
            seconds=seconds,
            minimum_rounds=rounds,
            failed=self.failed,
        )
        for name, timing in timings.items():
            in_graph = name.endswith(GRAPH)
            copy = timings.get(bench_loss.COPY + (GRAPH if in_graph else ""))
            # A graph is all sets; a row is one call.
            one = timing.divided_by(self.count if in_graph else 1)
            row = {"case": self.case.name, **self.case.description, "implementation": name}
            row |= self.columns[name] | harness.timing_row(one)
            row["gigabytes_per_second"] = self.case.bytes / one.median / 1e6
            if copy is not None:
                row["times_copy"] = timing.median / copy.median
            self.journal.row(**row)


def measure(
    of: bench_loss.Case,
    found: Mapping[str, Contender],
    device: str,
    journal: records.Journal,
    seconds: float,
    rounds: int = 15,
) -> None:
    """Rows of one case, of whatever can be measured of it."""
    measurement = Measurement(of, device, journal)
    harness.attempt(lambda: measurement.prepare(found), partial(measurement.failed, "inputs"))
    measurement.time(seconds, rounds)
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """A table of one case, the fastest first, and what failed."""
    measured = [row for row in rows if "value" in row]
    if records.STAND_IN:
        print(f"  ran, on a stand-in for a GPU: {[row['implementation'] for row in measured]}")
    elif measured:
        of = measured[0]
        print(f"\n{of['case']}: {of['bytes_per_pixel']} B/px, {of['megabytes']:.1f} MB")
        titles = ("us", "20 % .. 80 %", "GB/s", "x copy", "extra MB")
        print(f"  {'':<44}" + "{:>9}{:>20}{:>8}{:>8}{:>10}".format(*titles))
    for row in () if records.STAND_IN else sorted(measured, key=lambda row: row["value"]):
        peak, copies = row.get("peak_extra_megabytes"), row.get("times_copy")
        print(
            f"  {row['implementation']:<44}{row['value'] * 1e3:>9.1f}"
            f"{row['quantile_20'] * 1e3:>10.1f} ..{row['quantile_80'] * 1e3:>7.1f}"
            f"{row['gigabytes_per_second']:>8.0f}"
            f"{'-' if copies is None else format(copies, '.2f'):>8}"
            f"{'-' if peak is None else format(peak, '.1f'):>10}"
        )
    for row in rows:
        if "value" not in row:
            why = row.get("failed") or row.get("left_out")
            print(f"  {row['case']}, {row.get('implementation', 'all')}: {why}")
    sys.stdout.flush()


def main() -> int:
    parser = program.arguments(__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny cases: does it run at all?")
    args = parser.parse_args()
    work = {
        of.name: lambda journal, of=of: measure(
            of, contenders(of, args.device), args.device, journal, args.seconds, args.rounds
        )
        for of in cases(args.quick)
    }
    return program.work_through(work, args, print_rows)


if __name__ == "__main__":
    sys.exit(main())
