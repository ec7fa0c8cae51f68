"""The cost of harmonizing a training step: time and peak memory, for networks of three families.

    python bench/bench_step.py --networks resnet50:64x224 --precisions TF32 bfloat16 --profile 20

A section of ``run.py``, and by itself a program for a GPU. One step is the forward and backward
passes and an SGD update of a network from timm with random weights. Compared are cross entropy
alone, the harmonized step with all rows and with only the part that has a human map (15 %), and the
harmonized step with the loss on maps in eager PyTorch; and the loss on maps by itself, so that its
share of the step is seen.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import harness  # first of all: it sets what torch reads when it is loaded

# isort: split
import bench_loss
import peers
import program
import records
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

import harmonizer_ext as hx

sys.path.append(str(harness.ROOT / "python"))
import timm_networks

PLAIN = "cross entropy alone"
ALL_ROWS = "harmonized, all rows"
MAPPED_ROWS = "harmonized, rows with a map"
EAGER_LOSS = "harmonized, all rows, eager loss"
CONTIGUOUS = "harmonized, all rows, gradient written for every channel"
FUSED_LOSS_ALONE = "loss on maps alone, fused"
EAGER_LOSS_ALONE = "loss on maps alone, eager"
COMPILED = ", torch.compile"

#: Part of the rows that has a human map; about what ClickMe has of ImageNet.
MAPPED = 0.15

#: What computes: as PyTorch is set, all in float32, products in TF32 (10 bits), or under autocast
#: with channels_last.
PRECISIONS = ("default", "float32", "TF32", "bfloat16")

_AS_SET = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)

Step = Callable[[], object]


def contiguous_gradient(
    model: nn.Module, images: Tensor, targets: Tensor, *, create_graph: bool
) -> tuple[Tensor, Tensor]:
    """``input_gradient`` that gives the network the loss's gradient as dense (B, C, H, W).

    The library gives one map that all channels share, a view of stride 0. This tells what it would
    cost or save to write it out.
    """
    logits, maps = hx.input_gradient(model, images, targets, create_graph=create_graph)
    if maps.requires_grad:
        maps.register_hook(Tensor.contiguous)
    return logits, maps


@dataclass(frozen=True)
class Workload:
    """A network and a batch."""

    network: str
    batch: int
    size: int
    precision: str = "default"

    @property
    def mapped_rows(self) -> int:
        return max(1, round(MAPPED * self.batch))

    @property
    def name(self) -> str:
        name = f"{self.network} {self.batch}x3x{self.size}x{self.size}"
        return name if self.precision == "default" else f"{name} {self.precision}"

    @property
    def description(self) -> dict[str, Any]:
        dtype = "bfloat16" if self.precision == "bfloat16" else "float32"
        return {**asdict(self), "dtype": dtype, "mapped_rows": self.mapped_rows}

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Workload:
        return cls(**json.loads(text))


def workload_of(text: str) -> Workload:
    """``NETWORK:BATCHxSIZE``, such as ``vit_small_patch16_224:20x128``, or the network alone."""
    match = re.fullmatch(r"([\w.-]+?)(?::(\d+)x(\d+))?", text)
    if match is None:
        raise ValueError(f"expected NETWORK or NETWORK:BATCHxSIZE, got {text!r}")
    return Workload(match[1], int(match[2] or 16), int(match[3] or 224))


def workloads(device: str, quick: bool, named: Sequence[str] = ()) -> list[Workload]:
    """Small networks at a reduced size for the CPU, common ones at full size for a GPU."""
    if named:
        return [workload_of(text) for text in named]
    if quick:
        return [Workload("vit_tiny_patch16_224", 4, 32)]
    if torch.device(device).type == "cuda":
        names = ("resnet50", "vit_base_patch16_224", "convnext_tiny")
        return [Workload(name, 64, 224) for name in names]
    names = ("resnet18", "vit_tiny_patch16_224", "convnext_atto")
    return [Workload(name, 16, 96) for name in names]


# --- networks -------------------------------------------------------------------------------------


why_no_networks = timm_networks.why_no_timm


def _network(workload: Workload) -> nn.Module:
    timm = timm_networks.import_timm()
    name, size = workload.network, workload.size
    options: dict[str, Any] = (
        {"img_size": size} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    )
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=1000, **options)
    return model.train()


# --- steps ----------------------------------------------------------------------------------------


@dataclass
class Problem:
    """A network with its optimizer and one batch."""

    workload: Workload
    model: nn.Module
    optimizer: torch.optim.Optimizer
    images: Tensor
    labels: Tensor
    heatmaps: Tensor
    tokens: Tensor  # on the CPU, so that choosing rows waits for nothing

    @classmethod
    def of(cls, workload: Workload, device: str) -> Problem:
        generator = torch.Generator().manual_seed(0)
        batch, size = workload.batch, workload.size
        half = workload.precision == "bfloat16"
        layout = torch.channels_last if half else torch.contiguous_format
        model = _network(workload).to(device, memory_format=layout)
        exact = {"default": _AS_SET, "TF32": (True, True)}.get(workload.precision, (False, False))
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = exact
        tokens = torch.zeros(batch)
        tokens[torch.randperm(batch, generator=generator)[: workload.mapped_rows]] = 1
        return cls(
            workload,
            model,
            # So small a step that the thousandth is computed on the weights of the first.
            torch.optim.SGD(model.parameters(), lr=1e-9, momentum=0.9),
            torch.randn(batch, 3, size, size, generator=generator).to(device, memory_format=layout),
            torch.randint(1000, (batch,), generator=generator).to(device),
            torch.rand(batch, size, size, generator=generator).to(device),
            tokens,
        )

    def _cross_entropy(self, logits: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, self.labels, label_smoothing=0.1)

    def plain_loss(self) -> Tensor:
        return self._cross_entropy(self.model(self.images))

    def harmonized_loss(self, rows: str, explain: Any = None) -> Tensor:
        # The weight penalty is left to the optimizer, as cross entropy alone leaves it.
        return hx.harmonizer_loss(
            self.model,
            self.images,
            self.labels,
            self.heatmaps,
            None if rows == "all" else self.tokens,
            lambda_weights=0.0,
            rows=rows,
            explain=explain,
        ).loss

    def eager_loss(self) -> Tensor:
        logits, maps = hx.input_gradient(self.model, self.images, self.labels, create_graph=True)
        ones = torch.ones_like(self.tokens, device=self.images.device)
        return self._cross_entropy(logits) + peers.eager_released(maps, self.heatmaps, ones)

    def step(self, loss: Callable[[], Tensor]) -> Step:
        half = self.workload.precision == "bfloat16"

        def run() -> None:
            with torch.autocast(self.images.device.type, torch.bfloat16, enabled=half):
                value = loss()
            value.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

        return run

    def steps(self) -> dict[str, Step]:
        return {
            PLAIN: self.step(self.plain_loss),
            ALL_ROWS: self.step(lambda: self.harmonized_loss("all")),
            MAPPED_ROWS: self.step(lambda: self.harmonized_loss("mapped")),
            EAGER_LOSS: self.step(self.eager_loss),
            CONTIGUOUS: self.step(lambda: self.harmonized_loss("all", contiguous_gradient)),
        }

    def compiled_loss(self, rows: str) -> Callable[[], Tensor]:
        step = hx.HarmonizerLoss(self.model, lambda_weights=0.0, rows=rows, compile=True)
        tokens = None if rows == "all" else self.tokens
        return lambda: step(self.images, self.labels, self.heatmaps, tokens).loss

    def compiled_steps(self) -> dict[str, Step]:
        return {
            PLAIN + COMPILED: self.step(torch.compile(self.plain_loss)),
            ALL_ROWS + COMPILED: self.step(self.compiled_loss("all")),
            MAPPED_ROWS + COMPILED: self.step(self.compiled_loss("mapped")),
        }

    def losses(self) -> dict[str, Step]:
        """The loss on maps by itself, value and gradient."""
        saliency = torch.randn_like(self.images) * 1e-3
        maps = (saliency, self.heatmaps, torch.ones(self.workload.batch, device=saliency.device))
        fused = bench_loss.through_autograd(hx.harmonization_loss, gradient=True)
        eager = bench_loss.through_autograd(peers.eager_released, gradient=True)
        return {FUSED_LOSS_ALONE: lambda: fused(*maps), EAGER_LOSS_ALONE: lambda: eager(*maps)}

    def note(self, name: str) -> str | None:
        """A note with all that a reader of the row must know."""
        couples = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.model.modules())
        if name == MAPPED_ROWS and couples:
            return (
                "BatchNorm normalizes the two parts of the batch apart, so that this is another "
                'loss; rows="auto" takes all rows here'
            )
        return None


# --- measuring ------------------------------------------------------------------------------------


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"


Failed = Callable[[str, str], object]  # implementation, reason


def _ready(
    problem: Problem,
    found: dict[str, Step],
    device: str,
    failed: Failed,
    begin: Callable[[str], bool],
) -> dict[str, float]:
    """Seconds of the first call of each implementation that runs, compiling included."""
    first = {}
    for name, step in found.items():
        if not begin(name):
            continue
        if name.endswith(COMPILED):
            harness.say(f"      compiling: {problem.workload.name}, {name}")
        start = time.perf_counter()
        ran = harness.each(
            [name], lambda _, step=step: (harness.finished(step, device)(), 1), failed
        )
        problem.optimizer.zero_grad(set_to_none=True)
        first |= dict.fromkeys(ran, time.perf_counter() - start)
    return first


def measure(
    workload: Workload,
    device: str,
    seconds: float,
    compiled: bool,
    failed: Failed,
    *,
    names: Sequence[str] = (),
    begin: Callable[[str], bool] = lambda name: True,
    rounds: int = 5,
    top: int = 0,
) -> list[dict[str, Any]]:
    """Rows of the record.

    Args:
        failed: is told which implementation does not run, with PyTorch's own words.
        names: of the implementations; default: all.
        begin: is asked before each whether to try it.
        top: how many kernels to list of a harmonized step, those that take longest.
    """
    problem = Problem.of(workload, device)
    found = problem.steps() | problem.losses() | (problem.compiled_steps() if compiled else {})
    found = {name: step for name, step in found.items() if not names or name in names}
    first = _ready(problem, found, device, failed, begin)
    calls = {name: found[name] for name in first}
    base = {"case": workload.name, **workload.description}
    kernels: list[dict[str, Any]] | None = []
    if top and ALL_ROWS in calls and begin("kernels"):
        kernels = harness.attempt(
            lambda: _kernels(calls[ALL_ROWS], top), partial(failed, "kernels")
        )
    # More rounds of the same batch: a step's activations leave nothing of it in a cache.
    times = harness.interleave(
        {name: lambda _, call=call: call() for name, call in calls.items()},
        device=device,
        seconds=seconds,
        minimum_rounds=rounds,
        failed=failed,
    )
    rows = []
    for name, timing in times.items():
        row = {**base, "implementation": name} | harness.timing_row(timing)
        alone = {FUSED_LOSS_ALONE: ALL_ROWS, EAGER_LOSS_ALONE: EAGER_LOSS}.get(name)
        of = times.get(alone or PLAIN)
        if of is not None:
            row["share_of_step" if alone else "times_plain"] = timing.median / of.median
        if name.endswith(COMPILED):
            row["seconds_to_compile"] = first[name]
        note = problem.note(name)
        rows.append(row | ({"note": note} if note else {}))
    return rows + [{**base, "implementation": ALL_ROWS, **kernel} for kernel in kernels or ()]


def _kernels(step: Step, top: int) -> list[dict[str, Any]]:
    """Rows of the kernels that take longest in one step.

    Raises:
        RuntimeError: the profiler saw none.
    """
    if ProfilerActivity.CUDA not in torch.profiler.supported_activities():
        return [{"quantity": "kernel", "left_out": "this PyTorch has no profiler for a GPU"}]
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    events = [e for e in profile.key_averages() if e.device_type == DeviceType.CUDA]
    total = sum(event.self_device_time_total for event in events)
    if not total:
        raise RuntimeError("the profiler saw no kernels; may this user read the GPU's counters?")
    events.sort(key=lambda event: -event.self_device_time_total)
    return [
        {"quantity": "kernel", "kernel": event.key[:200], "calls": event.count, "unit": "ms"}
        | {"value": event.self_device_time_total / 1e3}
        | {"share_of_step": event.self_device_time_total / total}
        for event in events[:top]
    ]


def peak_memory(workload: Workload, name: str, device: str) -> int:
    """Peak extra bytes of a step, the graph, activations and gradients; see ``peak_extra_bytes``.

    The step before it is a whole one, so that the optimizer's state is there already.
    """
    step = Problem.of(workload, device).steps()[name]
    return harness.peak_extra_bytes(lambda _: step(), step, device)


def measure_memory(workload: Workload, device: str, failed: Failed) -> list[dict[str, Any]]:
    """Rows of the record, on the CPU from processes of their own."""
    steps = (PLAIN, ALL_ROWS, MAPPED_ROWS, EAGER_LOSS)
    if torch.device(device).type == "cuda":
        peaks = harness.each(steps, lambda name: peak_memory(workload, name, device), failed)
    else:
        of = {"subject": "step", "of": workload.to_json()}
        found = harness.peaks_in_forks([{**of, "implementation": name} for name in steps])
        peaks = dict(zip(steps, found, strict=True))
    names = {"case": workload.name, **workload.description}
    return [
        names
        | {"implementation": name, "quantity": "peak extra memory", "unit": "MB"}
        | {"value": peak / 1e6}
        | ({"times_plain": peak / peaks[PLAIN]} if PLAIN in peaks else {})
        for name, peak in peaks.items()
    ]


# --- as a program ---------------------------------------------------------------------------------


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        what = f"{row['case']}, {row.get('kernel') or row.get('implementation', 'all')}"
        value = row.get("failed") or row.get("left_out")
        if value is None:
            value = "ran" if records.STAND_IN else f"{row['value']:.3f} {row['unit']}"
        print(f"  {what}: {value}", flush=True)


def main() -> int:
    parser = program.arguments(__doc__, rounds=5)
    add = parser.add_argument
    add("--networks", nargs="+", required=True, metavar="NETWORK[:BATCHxSIZE]", help="of timm")
    add("--precisions", nargs="+", choices=PRECISIONS, default=["default"])
    add(
        "--implementations", nargs="+", default=(), help="default: all; compiled ones are asked for"
    )
    add("--profile", type=int, default=0, metavar="N", help="list N kernels of a step")
    args = parser.parse_args()
    reason = why_no_networks()
    if reason is not None:
        print(f"bench_step: {reason}; nothing was run and nothing was written", file=sys.stderr)
        return 2

    def work(workload: Workload, journal: records.Journal) -> None:
        rows = measure(
            workload,
            args.device,
            args.seconds,
            any(name.endswith(COMPILED) for name in args.implementations),
            lambda name, why: journal.row(case=workload.name, implementation=name, failed=why),
            names=args.implementations,
            begin=lambda name: journal.begin(f"{workload.name} / {name}"),
            rounds=args.rounds,
            top=args.profile,
        )
        for row in rows:
            journal.row(**row)

    workloads = [
        replace(workload_of(text), precision=precision)
        for precision in args.precisions
        for text in args.networks
    ]
    return program.work_through(
        {workload.name: partial(work, workload) for workload in workloads}, args, print_rows
    )


if __name__ == "__main__":
    sys.exit(main())
