"""What harmonizing costs a training step: time and peak memory, for networks of three families.

A section of ``run.py``. One step is the forward and backward passes and an SGD update of a network
from timm with random weights. Compared are cross entropy alone, the harmonized step with all rows
and with only the part that has a human map (15 %), and the harmonized step with the loss on maps in
eager PyTorch; and the loss on maps by itself, so that its share of the step is seen.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import harness  # first of all: it sets what torch reads when it is loaded

# isort: split
import bench_loss
import peers
import torch
from torch import Tensor, nn

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

Step = Callable[[], object]


def contiguous_gradient(
    model: nn.Module, images: Tensor, targets: Tensor, *, create_graph: bool
) -> tuple[Tensor, Tensor]:
    """``input_gradient`` that gives the network the loss's gradient as dense (B, C, H, W).

    The library gives one map that all channels share, a view of stride 0. This tells what it would
    cost or save to write it out.
    """
    logits, maps = hx.input_gradient(model, images, targets, create_graph=create_graph)
    maps.register_hook(Tensor.contiguous)
    return logits, maps


@dataclass(frozen=True)
class Workload:
    """A network and a batch."""

    network: str
    batch: int
    size: int

    @property
    def mapped_rows(self) -> int:
        return max(1, round(MAPPED * self.batch))

    @property
    def name(self) -> str:
        return f"{self.network} {self.batch}x3x{self.size}x{self.size}"

    @property
    def description(self) -> dict[str, Any]:
        return {**asdict(self), "dtype": "float32", "mapped_rows": self.mapped_rows}

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
        model = _network(workload).to(device)
        tokens = torch.zeros(batch)
        tokens[torch.randperm(batch, generator=generator)[: workload.mapped_rows]] = 1
        return cls(
            workload,
            model,
            # So small a step that the thousandth is computed on the weights of the first.
            torch.optim.SGD(model.parameters(), lr=1e-9, momentum=0.9),
            torch.randn(batch, 3, size, size, generator=generator).to(device),
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
        def run() -> None:
            loss().backward()
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
        """What a reader of the row must know."""
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


def measure(
    workload: Workload, device: str, seconds: float, compiled: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of the record; and what does not run, with PyTorch's own words."""
    problem = Problem.of(workload, device)
    calls = problem.steps() | problem.losses()
    failed = []
    for name, step in problem.compiled_steps().items() if compiled else ():
        harness.say(f"      compiling: {workload.name}, {name}")
        try:
            step()
        # TorchDynamo's own errors are RuntimeErrors too.
        except RuntimeError as error:
            failed.append(f"{workload.name}, {name}: {_first_line(error)}")
            problem.optimizer.zero_grad(set_to_none=True)
        else:
            calls[name] = step
    # More rounds of the same batch: a step's activations leave nothing of it in a cache.
    times = harness.interleave(
        {name: lambda _, call=call: call() for name, call in calls.items()},
        device=device,
        seconds=seconds,
        minimum_rounds=5,
    )
    harmonized = times[ALL_ROWS].median
    rows = []
    for name, timing in times.items():
        row = {"case": workload.name, **workload.description, "implementation": name}
        row |= harness.timing_row(timing)
        if name in (FUSED_LOSS_ALONE, EAGER_LOSS_ALONE):
            of = harmonized if name == FUSED_LOSS_ALONE else times[EAGER_LOSS].median
            row["share_of_step"] = timing.median / of
        else:
            row["times_plain"] = timing.median / times[PLAIN].median
        note = problem.note(name)
        rows.append(row | ({"note": note} if note else {}))
    return rows, failed


def peak_memory(workload: Workload, name: str, device: str) -> int:
    """Peak extra bytes of a step, the graph, activations and gradients; see ``peak_extra_bytes``.

    The step before it is a whole one, so that the optimizer's state is there already.
    """
    step = Problem.of(workload, device).steps()[name]
    return harness.peak_extra_bytes(lambda _: step(), step, device)


def measure_memory(workload: Workload, device: str) -> list[dict[str, Any]]:
    """Rows of the record, on the CPU from processes of their own."""
    steps = (PLAIN, ALL_ROWS, MAPPED_ROWS, EAGER_LOSS)
    if torch.device(device).type == "cuda":
        measured = [peak_memory(workload, name, device) for name in steps]
    else:
        of = {"subject": "step", "of": workload.to_json()}
        measured = harness.peaks_in_forks([{**of, "implementation": name} for name in steps])
    peaks = dict(zip(steps, measured, strict=True))
    names = {"case": workload.name, **workload.description}
    return [
        names
        | {"implementation": name, "quantity": "peak extra memory", "unit": "MB"}
        | {"value": peak / 1e6, "times_plain": peak / peaks[PLAIN]}
        for name, peak in peaks.items()
    ]
