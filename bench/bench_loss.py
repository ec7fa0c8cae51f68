"""The loss against eager PyTorch, torch.compile, TensorFlow and a copy: cases, contestants, timing.

``run.py`` is the program; this module is what its sections on the loss measure. For developers the
fused loss of every backend is in the suite too:

    pytest bench/bench_loss.py --benchmark-only

Bytes on the model of one pass, per pixel of a map, in float32 with three channels: 12 for reading
the saliency (C, H, W), 4 for reading the human map, 4 for writing the gradient (H, W), which is the
same for every channel and is stored once: 20. The floor is a ``copy_`` that reads and writes the
same number of bytes together. It is no lower bound in the strict sense: half of what it moves it
writes, of the loss one fifth.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import harness  # first of all: it sets what torch reads when it is loaded

# isort: split
import peers
import pytest
import torch
from peers_tensorflow import TensorFlowPeer
from torch import Tensor

import harmonizer_ext as hx
from harmonizer_ext import backends

Maps = tuple[Tensor, Tensor, Tensor]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Run = Callable[..., object]

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
    channels: int = 3
    levels: int = 5
    channels_last: bool = False

    @property
    def bytes_per_pixel(self) -> int:
        size = self.dtype.itemsize
        # Human maps stay in float32 beside a saliency in half precision, as a loader gives them.
        return self.channels * size + self.heatmap_dtype.itemsize + (size if self.gradient else 0)

    @property
    def heatmap_dtype(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def bytes(self) -> int:
        return self.batch * self.height * self.width * self.bytes_per_pixel

    @property
    def input_key(self) -> tuple[object, ...]:
        """A key that is equal for cases that read the same maps."""
        shape = (self.batch, self.channels, self.height, self.width)
        return *shape, self.dtype, self.channels_last

    @property
    def description(self) -> dict[str, Any]:
        return {
            "formulation": self.formulation,
            "saliency": [self.batch, self.channels, self.height, self.width],
            "dtype": str(self.dtype).removeprefix("torch."),
            "levels": self.levels,
            "memory_format": "channels_last" if self.channels_last else "contiguous",
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
        # Made on the device: gigabytes for a GPU would take a CPU minutes.
        generator = torch.Generator(device).manual_seed(seed)
        shape = (self.batch, self.channels, self.height, self.width)
        saliency = torch.randn(shape, generator=generator, device=device) * 1e-3
        heatmaps = torch.rand(self.batch, *shape[2:], generator=generator, device=device)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return (
            saliency.to(self.dtype, memory_format=layout),
            heatmaps.to(self.heatmap_dtype),
            torch.ones(self.batch, dtype=self.heatmap_dtype, device=device),
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"dtype": self.description["dtype"]})

    @classmethod
    def from_json(cls, text: str) -> Case:
        fields = json.loads(text)
        return cls(**fields | {"dtype": getattr(torch, fields["dtype"])})


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
            saliency,
            heatmaps,
            tokens,
            case.formulation,
            case.levels,
            "mse",
            backend,
            case.gradient,
        )

    return run


def _compiled_peers(case: Case) -> tuple[Loss, ...]:
    """The compiled peers.

    To save time: without a gradient only that of the released loss without convolutions.
    """
    candidates = peers.COMPILED[case.formulation]
    if case.gradient:
        return candidates
    return candidates[-1:] if case.formulation == "released" else ()


def backends_of(case: Case, device: str) -> list[str]:
    """The backends that take the case's dtype, best first."""
    kind, dtype = torch.device(device).type, case.heatmap_dtype
    return [b for b in hx.available_backends(device) if backends.why_not(b, kind, dtype) is None]


def implementations(case: Case, device: str, compiled: bool) -> dict[str, Run]:
    """All that this machine can run, by name, the fused ones first."""
    found: dict[str, Run] = {}
    for backend in backends_of(case, device):
        loss = partial(
            hx.harmonization_loss,
            formulation=case.formulation,
            levels=case.levels,
            backend=backend,
        )
        if backend != "reference":
            found[f"{backend}: op"] = fused_op(case, backend)
        if backend != "reference" or case.headline:
            found[f"{backend}: harmonization_loss"] = through_autograd(loss, case.gradient)
    eager = peers.EAGER[case.formulation]
    for peer in eager if case.headline else eager[:1]:
        found[peer.__name__] = through_autograd(partial(peer, levels=case.levels), case.gradient)
    if compiled and case.headline:
        for peer in _compiled_peers(case):
            graph = torch.compile(partial(peer, levels=case.levels), dynamic=False)
            found[f"{COMPILE}({peer.__name__})"] = through_autograd(graph, case.gradient)
    return found


# --- measuring ------------------------------------------------------------------------------------

Key = tuple[str, str]  # case, implementation


def over_sets(run: Run, sets: Sequence[Sequence[Tensor]]) -> harness.Call:
    """A call that takes the inputs from the next set every time."""
    return lambda index: run(*sets[index % len(sets)])


def copy_run(source: Tensor, target: Tensor) -> object:
    return target.copy_(source)


def copy_sets(case: Case, device: str, count: int) -> list[tuple[Tensor, Tensor]]:
    """Sources and targets of the floor: half the case's bytes read, half of them written."""
    size = case.bytes // 8
    sets = [
        (torch.rand(size, device=device), torch.empty(size, device=device)) for _ in range(count)
    ]
    for each in sets:
        copy_run(*each)  # touches every page
    return sets


def copy_call(case: Case, device: str) -> harness.Call:
    """The floor, on the next set every time."""
    count = harness.sets_beyond_cache(case.bytes, device)
    return over_sets(copy_run, copy_sets(case, device, count))


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
    selected: Sequence[Case],
    device: str,
    compiled: bool,
    seconds: float,
    *,
    failed: Callable[[Key, str], object],
    tensorflow: TensorFlowPeer | None = None,
    minimum_rounds: int = 15,
    back_to_back: bool = False,
) -> dict[Key, harness.Timing]:
    """All implementations of all cases in one interleaved loop, of calls or of short rows of them.

    TensorFlow runs in a process of its own, where it is also timed, but takes its turn in the loop:
    while one framework works the other waits. What raises an error or gives a wrong result is left
    out, and ``failed`` is told why.
    """
    sets: dict[tuple[object, ...], list[Maps]] = {}
    calls: dict[Key, harness.Call | harness.SelfTimed] = {}

    def prepare(case: Case) -> None:
        if case.input_key not in sets:
            count = harness.sets_beyond_cache(case.bytes, device)
            sets[case.input_key] = [case.maps(device, seed) for seed in range(count)]
        calls[case.name, COPY] = copy_call(case, device)
        maps = sets[case.input_key][0]
        loss = partial(
            hx.harmonization_loss,
            formulation=case.formulation,
            levels=case.levels,
            backend="reference",
        )
        expected = through_autograd(loss, case.gradient)(*maps)

        def add(name: str, run: Callable[[], Any], call: harness.Call | harness.SelfTimed) -> None:
            def checked() -> None:
                check_agreement(case, name, run(), expected)
                calls[case.name, name] = call

            harness.attempt(checked, lambda why: failed((case.name, name), why))

        for name, run in implementations(case, device, compiled).items():
            if name.startswith(COMPILE):
                harness.say(f"      compiling: {case.name}, {name}")
            add(name, partial(run, *maps), over_sets(run, sets[case.input_key]))
        if tensorflow is not None and case.headline and case.formulation == "released":
            remote = tensorflow.load(maps, case.levels, case.gradient, len(sets[case.input_key]))
            for name, call in remote.items():
                add(name, call.result, call)

    for case in selected:
        harness.attempt(
            partial(prepare, case), lambda why, case=case: failed((case.name, "inputs"), why)
        )
    if back_to_back:
        calls = {key: harness.BackToBack(call, device) for key, call in calls.items()}
    return harness.interleave(
        calls, device=device, seconds=seconds, minimum_rounds=minimum_rounds, failed=failed
    )


def peak_memory(case: Case, name: str, device: str) -> int:
    """Peak extra bytes of one implementation; on the CPU for a process of its own."""
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
    case: Case, names: Sequence[str], device: str, failed: Callable[[Key, str], object]
) -> list[dict[str, Any]]:
    """Rows of the record: ``peak_memory``, on the CPU in processes of their own."""
    if torch.device(device).type == "cuda":
        peaks = harness.each(
            names,
            lambda name: peak_memory(case, name, device),
            lambda name, why: failed((case.name, name), why),
        )
    else:
        of = {"subject": "loss", "of": case.to_json()}
        found = harness.peaks_in_forks([{**of, "implementation": name} for name in names])
        peaks = dict(zip(names, found, strict=True))
    return [memory_row(case, name, peak) for name, peak in peaks.items()]


# --- rows of the record ---------------------------------------------------------------------------


def eager_name(case: Case) -> str:
    """The eager peer that speed-ups are counted from: the loss as released or as printed."""
    return peers.EAGER[case.formulation][0].__name__


def memory_row(case: Case, name: str, peak: int) -> dict[str, Any]:
    """A row of the record."""
    row = {"case": case.name, **case.description, "implementation": name}
    return row | {"quantity": "peak extra memory", "unit": "MB", "value": peak / 1e6}


def time_rows(
    cases: Sequence[Case], times: dict[Key, harness.Timing], **columns: Any
) -> list[dict[str, Any]]:
    """The record's rows; every one has a quantity, a value and its unit."""
    rows = []
    for case in cases:
        mine = {name: timing for (where, name), timing in times.items() if where == case.name}
        compiled = [name for name in mine if name.startswith(COMPILE)]
        yardsticks = {
            "times_copy": COPY,
            "times_faster_than_eager": eager_name(case),
            "times_faster_than_best_compile": min(
                compiled, key=lambda name: mine[name].median, default=None
            ),
        }
        for name, timing in mine.items():
            row = {"case": case.name, **case.description, **columns, "implementation": name}
            row |= harness.timing_row(timing)
            row["gigabytes_per_second"] = case.bytes / timing.median / 1e6
            for column, other in yardsticks.items():
                # How much faster than the loss a copy is says nothing that times_copy does not.
                if other in mine and (name != COPY or column == "times_copy"):
                    ratio = timing.median / mine[other].median
                    row[column] = ratio if column == "times_copy" else 1 / ratio
            rows.append(row)
    return rows


# --- pytest-benchmark -----------------------------------------------------------------------------


@pytest.mark.benchmark(group="harmonization_loss, 32x3x224x224 float32")
@pytest.mark.parametrize("computed", ["loss", "loss and gradient"])
@pytest.mark.parametrize("formulation", ["released", "paper"])
@pytest.mark.parametrize(("device", "backend"), harness.targets())
def test_harmonization_loss(
    benchmark: Any, device: str, backend: str, formulation: str, computed: str
) -> None:
    case = Case("", 32, 224, 224, torch.float32, formulation, computed != "loss")
    loss = partial(hx.harmonization_loss, formulation=formulation, backend=backend)
    run = through_autograd(loss, case.gradient)
    maps = case.maps(device, 0)
    benchmark(harness.finished(lambda: run(*maps), device))


@pytest.mark.benchmark(group="harmonization_loss, 1x3x224x224 float32: latency")
@pytest.mark.parametrize(("device", "backend"), harness.targets(reference=False))
def test_latency(benchmark: Any, device: str, backend: str) -> None:
    case = Case("", 1, 224, 224, torch.float32)
    run = through_autograd(partial(hx.harmonization_loss, backend=backend), gradient=True)
    maps = case.maps(device, 0)
    benchmark(harness.finished(lambda: run(*maps), device))
