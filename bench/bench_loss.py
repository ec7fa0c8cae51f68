"""Loss and gradient of the fused loss against eager PyTorch, torch.compile and a copy.

    python bench/bench_loss.py --batch 32 --size 224 --threads 2

Prints a table and writes bench/results/<date>-<processor>-<device>.json.

Bytes on the model of one pass, per pixel of a map, in float32 with three channels: 12 for reading
the saliency (C, H, W), 4 for reading the human map, 4 for writing the gradient (H, W), which is the
same for every channel and is stored once: 20. The floor is a ``copy_`` that reads and writes the
same number of bytes together. It is no lower bound in the strict sense: half of what it moves it
writes, of the loss one fifth.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import harness  # first of all: it sets what torch reads when it is loaded

# isort: split
import peers
import torch
from torch import Tensor

import harmonizer_ext as hx

Maps = tuple[Tensor, Tensor, Tensor]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Run = Callable[..., object]

CHANNELS = 3
COPY = "copy_ of the same bytes"
COMPILE = "torch.compile"


@dataclass(frozen=True)
class Case:
    """One input and what is computed of it."""

    name: str
    batch: int
    height: int
    width: int
    dtype: torch.dtype
    formulation: str = "released"
    gradient: bool = True
    #: Measured against everything there is, not against the first eager peer alone.
    headline: bool = False

    @property
    def bytes_per_pixel(self) -> int:
        size = self.dtype.itemsize
        # Human maps stay in float32 beside a saliency in half precision, as a loader gives them.
        return CHANNELS * size + self.heatmap_dtype.itemsize + (size if self.gradient else 0)

    @property
    def heatmap_dtype(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def bytes(self) -> int:
        return self.batch * self.height * self.width * self.bytes_per_pixel

    @property
    def input_key(self) -> tuple[object, ...]:
        """Equal for cases that read the same maps."""
        return self.batch, self.height, self.width, self.dtype

    @property
    def description(self) -> dict[str, Any]:
        return {
            "formulation": self.formulation,
            "saliency": [self.batch, CHANNELS, self.height, self.width],
            "dtype": str(self.dtype).removeprefix("torch."),
            "computed": "loss and gradient" if self.gradient else "loss",
            "bytes_per_pixel": self.bytes_per_pixel,
            "megabytes": self.bytes / 1e6,
        }

    def __str__(self) -> str:
        of = self.description
        shape = "x".join(str(length) for length in of["saliency"])
        return (
            f"{self.name}: {shape} {of['dtype']}, {of['computed']}, "
            f"{self.bytes_per_pixel} B/px, {self.bytes / 1e6:.1f} MB"
        )

    def maps(self, device: str, seed: int) -> Maps:
        generator = torch.Generator().manual_seed(seed)
        shape = (self.batch, CHANNELS, self.height, self.width)
        saliency = torch.randn(shape, generator=generator) * 1e-3
        heatmaps = torch.rand(self.batch, *shape[2:], generator=generator)
        return (
            saliency.to(device, self.dtype),
            heatmaps.to(device, self.heatmap_dtype),
            torch.ones(self.batch, dtype=self.heatmap_dtype, device=device),
        )


def cases(batch: int, size: int, dtype: torch.dtype) -> list[Case]:
    return [
        Case("released", batch, size, size, dtype, headline=True),
        Case("paper", batch, size, size, dtype, formulation="paper", headline=True),
        Case("released, bfloat16 saliency", batch, size, size, torch.bfloat16),
        Case("released, odd size", batch, size + 1, size - 1, dtype),
        Case("released, forward only", batch, size, size, dtype, gradient=False),
        Case("released, batch of one", 1, size, size, dtype),
    ]


# --- implementations ------------------------------------------------------------------------------


def through_autograd(loss: Loss, gradient: bool) -> Run:
    """Value and gradient, or the value alone; what every implementation but the op is timed as."""

    def run(saliency: Tensor, heatmaps: Tensor, tokens: Tensor) -> object:
        if not gradient:
            with torch.no_grad():
                return loss(saliency, heatmaps, tokens)
        maps = saliency.detach().requires_grad_()
        value = loss(maps, heatmaps, tokens)
        return value, torch.autograd.grad(value, maps)[0]

    return run


def fused_op(case: Case, backend: str) -> Run:
    """The fused op by itself: row losses and the gradient of their sum."""

    def run(saliency: Tensor, heatmaps: Tensor, tokens: Tensor) -> object:
        return torch.ops.harmonizer_ext.harmonization(
            saliency, heatmaps, tokens, case.formulation, 5, "mse", backend, case.gradient
        )

    return run


def implementations(case: Case, device: str, compiled: bool) -> dict[str, Run]:
    """By name, the fused ones first; what this machine cannot run is not among them."""
    found: dict[str, Run] = {}
    for backend in hx.available_backends(device):
        loss = partial(hx.harmonization_loss, formulation=case.formulation, backend=backend)
        if backend != "reference":
            found[f"{backend}: op"] = fused_op(case, backend)
        if backend != "reference" or case.headline:
            found[f"{backend}: harmonization_loss"] = through_autograd(loss, case.gradient)
    eager = peers.EAGER[case.formulation]
    for peer in eager if case.headline else eager[:1]:
        found[peer.__name__] = through_autograd(peer, case.gradient)
    if compiled and case.headline:
        for peer in peers.COMPILED[case.formulation]:
            graph = torch.compile(peer, dynamic=False)
            found[f"{COMPILE}({peer.__name__})"] = through_autograd(graph, case.gradient)
    return found


# --- measuring ------------------------------------------------------------------------------------

Key = tuple[str, str]  # case, implementation


def over_sets(run: Run, sets: Sequence[Sequence[Tensor]]) -> harness.Call:
    """A call that takes the inputs from the next set every time."""
    return lambda index: run(*sets[index % len(sets)])


def copy_call(case: Case, device: str) -> harness.Call:
    """The floor: half the case's bytes read, half of them written."""
    sets = [
        [torch.rand(case.bytes // 8, device=device), torch.empty(case.bytes // 8, device=device)]
        for _ in range(harness.sets_beyond_cache(case.bytes, device))
    ]
    for source, target in sets:
        target.copy_(source)  # touches every page
    return over_sets(lambda source, target: target.copy_(source), sets)


def check_agreement(case: Case, name: str, result: Any, expected: Any) -> None:
    """The speed of a wrong result means nothing, and torch.compile is tested nowhere else.

    One part in a hundred: a gradient in bfloat16 is rounded to 4 parts in a thousand, and wrong
    pyramids or statistics are tens of parts off.
    """
    result, expected = (r if isinstance(r, tuple) else (r,) for r in (result, expected))
    # The op gives row losses, and the gradient of their sum rather than of their mean.
    pairs = [(result[0].mean(), expected[0])]
    if case.gradient:
        scale = case.batch if result[0].ndim else 1
        pairs.append((result[1].float() / scale, expected[1].float()))
    for what, (got, want) in zip(("loss", "gradient"), pairs, strict=False):
        error = float(((got - want).norm() / want.norm()).detach())
        if not error < 1e-2:
            raise RuntimeError(f"{case.name}: {what} of {name} is {error:.1e} off the reference")


def measure_time(
    selected: list[Case], device: str, compiled: bool, seconds: float
) -> dict[Key, harness.Timing]:
    """All implementations of all cases in one interleaved loop."""
    sets: dict[tuple[object, ...], list[Maps]] = {}
    calls: dict[Key, harness.Call] = {}
    for case in selected:
        if case.input_key not in sets:
            count = harness.sets_beyond_cache(case.bytes, device)
            sets[case.input_key] = [case.maps(device, seed) for seed in range(count)]
        calls[case.name, COPY] = copy_call(case, device)
        maps = sets[case.input_key][0]
        loss = partial(hx.harmonization_loss, formulation=case.formulation, backend="reference")
        expected = through_autograd(loss, case.gradient)(*maps)
        for name, run in implementations(case, device, compiled).items():
            harness.say(f"  check and warm up: {case.name}, {name}")
            check_agreement(case, name, run(*maps), expected)
            calls[case.name, name] = over_sets(run, sets[case.input_key])
    return harness.interleave(calls, device=device, seconds=seconds)


def peak_memory_here(case: Case, name: str, device: str) -> int:
    """Bytes; for a process of its own."""
    run = implementations(case, device, compiled=name.startswith(COMPILE))[name]
    maps = case.maps(device, 0)
    # A small input leaves no workspace behind. A compiled graph serves one shape, and allocates
    # what it works in anew at every call.
    small = maps if name.startswith(COMPILE) else replace(case, height=16, width=16).maps(device, 0)

    def warm_up() -> None:
        torch.rand(1 << 22, device=device).sum()  # starts the threads
        run(*small)

    return harness.peak_extra_bytes(lambda _: run(*maps), warm_up, device)


def measure_memory(
    selected: list[Case], device: str, compiled: bool, arguments: list[str]
) -> dict[Key, int]:
    """Peak extra bytes of every implementation of the headline cases, each in a new process."""
    peaks = {}
    for case in selected:
        for name in implementations(case, device, compiled) if case.headline else ():
            harness.say(f"  memory: {case.name}, {name}")
            command = [str(Path(__file__)), *arguments, "--peak-memory-of", case.name, name]
            peaks[case.name, name] = harness.in_child(command)
    return peaks


# --- reporting ------------------------------------------------------------------------------------


@dataclass
class Results:
    """Everything measured, and what follows from it."""

    cases: list[Case]
    times: dict[Key, harness.Timing]
    peaks: dict[Key, int]

    def names(self, case: Case) -> list[str]:
        return [name for where, name in self.times if where == case.name]

    def eager(self, case: Case) -> str:
        return peers.EAGER[case.formulation][0].__name__

    def best_compiled(self, case: Case) -> str | None:
        """The fastest torch.compile, by its median."""
        compiled = [name for name in self.names(case) if name.startswith(COMPILE)]
        return min(compiled, key=lambda n: self.times[case.name, n].median, default=None)

    def rows(self) -> list[dict[str, Any]]:
        """The record's rows; every one has a quantity, a value and its unit."""
        rows = []
        for case in self.cases:
            yardsticks = {
                "times_copy": COPY,
                "times_faster_than_eager": self.eager(case),
                "times_faster_than_best_compile": self.best_compiled(case),
            }
            for name in self.names(case):
                timing = self.times[case.name, name]
                row = {"case": case.name, "implementation": name, **harness.timing_row(timing)}
                row["gigabytes_per_second"] = case.bytes / timing.median / 1e6
                for column, other in yardsticks.items():
                    # How much faster than the loss a copy is says nothing that times_copy does not.
                    if other is not None and (name != COPY or column == "times_copy"):
                        ratio = timing.median / self.times[case.name, other].median
                        row[column] = ratio if column == "times_copy" else 1 / ratio
                rows.append(row)
                if (case.name, name) in self.peaks:
                    names = {"case": case.name, "implementation": name}
                    peak = self.peaks[case.name, name] / 1e6
                    rows.append(
                        names | {"quantity": "peak extra memory", "unit": "MB", "value": peak}
                    )
        return rows

    def goals(self) -> list[dict[str, Any]]:
        """What the fused kernels of the best backend should reach, and what they do."""
        released, paper = self.cases[:2]
        # The implementations come best backend first, after the copy.
        backend = self.names(released)[1].split(":")[0]
        own = [name for name in self.names(released) if name.startswith(f"{backend}:")]
        goals: list[dict[str, Any]] = []

        def ratio(text: str, a: Key, b: Key, goal: float, at_least: bool) -> None:
            by_median = self.times[a].median / self.times[b].median
            by_quartile = self.times[a].lower_quartile / self.times[b].lower_quartile
            goals.append(
                {
                    "goal": text,
                    "unit": "ratio",
                    "wanted": f"{'>=' if at_least else '<='} {goal:g}",
                    "by_median": by_median,
                    "by_lower_quartile": by_quartile,
                    "met": by_median >= goal if at_least else by_median <= goal,
                }
            )

        for name in own:
            mine = (released.name, name)
            eager = (released.name, self.eager(released))
            ratio(f"{eager[1]} / {name}", eager, mine, 15, at_least=True)
            compiled = self.best_compiled(released)
            if compiled is not None:
                ratio(f"{compiled} / {name}", (released.name, compiled), mine, 5, at_least=True)
            ratio(f"{name} / {COPY}", mine, (released.name, COPY), 2, at_least=False)
            ratio(f"{name}, paper / released", (paper.name, name), mine, 1.6, at_least=False)
            if mine in self.peaks:
                goals.append(self._memory_goal(released, name))
        return goals

    def _memory_goal(self, case: Case, name: str) -> dict[str, Any]:
        pixels = case.height * case.width
        gradient = case.batch * pixels * case.dtype.itemsize
        # A thread works on two maps and their pyramids in the accumulation dtype: at most 8/3 maps,
        # and a few rows. Half a megabyte is how finely the resident set can be read.
        workspace = torch.get_num_threads() * 3 * pixels * case.heatmap_dtype.itemsize
        peak = self.peaks[case.name, name]
        return {
            "goal": f"{name}: peak extra memory, the gradient and a workspace per thread",
            "unit": "MB",
            "wanted": f"<= {(gradient + workspace + 5e5) / 1e6:.1f}",
            "value": peak / 1e6,
            "met": peak <= gradient + workspace + 5e5,
        }


def _format(value: float | None, pattern: str) -> str:
    return "-" if value is None else format(value, pattern)


def print_table(results: Results) -> None:
    rows = results.rows()
    peaks = {(r["case"], r["implementation"]): r["value"] for r in rows if r["unit"] == "MB"}
    header = ("ms", "20 % .. 80 %", "25 %", "GB/s", "x copy", "vs eager", "vs compile", "extra MB")
    widths = (9, 19, 9, 7, 8, 10, 12, 10)
    for case in results.cases:
        print(f"\n{case}")
        titles = "".join(f"{text:>{w}}" for text, w in zip(header, widths, strict=True))
        print(f"  {'':<40}{titles}")
        for row in rows:
            if row["case"] != case.name or row["quantity"] != "time":
                continue
            cells = (
                f"{row['value']:.3f}",
                f"{row['quantile_20']:.3f} .. {row['quantile_80']:.3f}",
                f"{row['lower_quartile']:.3f}",
                f"{row['gigabytes_per_second']:.1f}",
                f"{row['times_copy']:.2f}",
                _format(row.get("times_faster_than_eager"), ".1f"),
                _format(row.get("times_faster_than_best_compile"), ".1f"),
                _format(peaks.get((case.name, row["implementation"])), ".1f"),
            )
            text = "".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True))
            print(f"  {row['implementation']:<40}{text}")


def print_goals(goals: list[dict[str, Any]]) -> None:
    print("\ngoals, set for 32x224x224 float32 (by medians; by lower quartiles in brackets)")
    for goal in goals:
        measured = (
            f"{goal['value']:.1f} MB"
            if goal["unit"] == "MB"
            else f"{goal['by_median']:.2f} ({goal['by_lower_quartile']:.2f})"
        )
        verdict = "met" if goal["met"] else "MISSED"
        print(f"  {verdict:<7}{goal['wanted']:>8}  {measured:>16}  {goal['goal']}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224, help="height and width of the maps")
    parser.add_argument("--threads", type=int, help="default: PyTorch's own choice")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16", "float64"], default="float32"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=25, help="of measuring, warm-up apart")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--output", type=Path, help="default: a new file in bench/results")
    parser.add_argument("--peak-memory-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()

    harness.clock(args.device)  # refuses an unknown device before any work
    if args.threads:
        torch.set_num_threads(args.threads)
    selected = cases(args.batch, args.size, getattr(torch, args.dtype))
    if args.peak_memory_of:
        wanted, name = args.peak_memory_of
        (case,) = (case for case in selected if case.name == wanted)
        print(peak_memory_here(case, name, args.device))
        return 0

    machine = harness.machine(args.device)
    compiled = not args.no_compile
    harness.say("timing (torch.compile takes a minute or two where nothing is cached) ...")
    times = measure_time(selected, args.device, compiled, args.seconds)
    peaks = {}
    if not args.no_memory:
        arguments = ["--batch", str(args.batch), "--size", str(args.size), "--dtype", args.dtype]
        arguments += ["--threads", str(torch.get_num_threads()), "--device", args.device]
        peaks = measure_memory(selected, args.device, compiled, arguments)

    results = Results(selected, times, peaks)
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print_table(results)
    print_goals(results.goals())
    record = {
        "benchmark": "bench_loss",
        "machine": machine,
        "cases": {case.name: case.description for case in selected},
        "rows": results.rows(),
        "goals": results.goals(),
    }
    harness.write_record(args.output or harness.default_output(args.device), record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
