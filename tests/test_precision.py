"""Lower precision, loss scaling, memory formats and accumulated gradients of a harmonized step."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from distributed_scenarios import NETWORKS
from torch import Tensor, nn
from torch.amp import GradScaler

import harmonizer_ext as hx

BATCH, CLASSES, SIZE = 8, 5, 12

#: Errors of a gradient in units of the dtype's epsilon: forward, backward and backward again are
#: some twenty operations deep, each of which rounds by half an epsilon and no two alike, so that
#: their errors add up as the root of their number; and maps of which the mean is taken away lose a
#: factor of two or three.
ROUNDING = 8

Gradients = dict[str, Tensor]


@pytest.fixture
def batch(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "images": torch.randn(BATCH, 3, SIZE, SIZE, generator=generator),
        "labels": torch.randint(0, CLASSES, (BATCH,), generator=generator),
        "heatmaps": torch.rand(BATCH, SIZE, SIZE, generator=generator),
        "tokens": torch.tensor([1, 0, 1, 0.5, 0, 0, 1, 0]),
    }


def clear_of_the_cut(batch: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The batch with images in whose maps no pixel is near the mean.

    There the loss cuts, and its gradient jumps: whoever rounds differently may be on either side.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(512, 3, SIZE, SIZE, generator=generator)
    labels = torch.randint(0, CLASSES, (512,), generator=generator)
    maps = hx.input_gradient(model, images, labels, create_graph=False)[1].mean(1).flatten(1)
    maps = maps - maps.mean(1, keepdim=True)
    nearest = maps.abs().amin(1) / maps.std(1)
    rows = nearest.topk(BATCH).indices
    assert nearest[rows].min() > 4 * torch.finfo(torch.bfloat16).eps
    return batch | {"images": images[rows], "labels": labels[rows]}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]()


def gradients(model: nn.Module) -> Gradients:
    found = {name: p.grad.detach().clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def step(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> hx.HarmonizerOutput:
    """A loss of which the alignment is the larger part."""
    return hx.harmonizer_loss(model, **batch, **({"lambda_harmonization": 3.0} | options))


def apart(got: Gradients, want: Gradients) -> float:
    """Distance of two gradients, relative to the length of the second."""
    assert got.keys() == want.keys()
    square = sum(float((got[n].detach().double() - want[n].double()).square().sum()) for n in want)
    return math.sqrt(square / sum(float(w.double().square().sum()) for w in want.values()))


def assert_equal(got: Gradients, want: Gradients, rtol: float) -> None:
    """Element by element, relative to the largest element of each parameter."""
    assert got.keys() == want.keys()
    for name in want:
        error = (got[name] - want[name]).abs().max() / want[name].abs().max()
        assert error <= rtol, f"{name}: off by {error:.1e} of its largest element"


# --- autocast -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["convolutional", "transformer"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name: str, dtype: torch.dtype, batch: dict[str, Tensor]) -> None:
    model = network(name)
    batch = clear_of_the_cut(batch, model)
    step(model, batch).loss.backward()
    want = gradients(model)
    step(model, batch, lambda_harmonization=0.0).loss.backward()
    without = gradients(model)
    with torch.autocast("cpu", dtype):
        out = step(model, batch)
        assert model(batch["images"]).dtype == dtype
    out.loss.backward()
    # The loss and everything behind the maps stays in float32: its value is that of the maps.
    rows = out.saliency_rows
    value = hx.harmonization_loss(
        out.saliency.requires_grad_(), batch["heatmaps"][rows], batch["tokens"][rows], levels=5
    )
    torch.testing.assert_close(out.harmonization, value.detach() * len(rows) / BATCH)
    for tensor in (out.loss, out.cross_entropy, out.harmonization, out.saliency, out.saliency_std):
        assert tensor.dtype == torch.float32
    got = gradients(model)
    assert all(g.dtype == torch.float32 for g in got.values())
    assert apart(got, want) < ROUNDING * torch.finfo(dtype).eps
    assert apart(without, want) > 0.1  # the alignment is not what is lost in the rounding


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_checkpoints_under_autocast(dtype: torch.dtype | None, batch: dict[str, Tensor]) -> None:
    found = []
    for name in ("transformer", "checkpointed transformer"):
        model = network(name)
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = step(model, batch).loss
        loss.backward()  # outside of every context, where attention would choose another kernel
        found.append(gradients(model))
    # The same operations in the same precision, recomputed.
    assert_equal(found[1], found[0], rtol=0)


def test_bfloat16_parameters(batch: dict[str, Tensor]) -> None:
    model = network("convolutional")
    with torch.no_grad():  # the same numbers in both
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
        batch = clear_of_the_cut(batch, model)
        batch["images"] = batch["images"].bfloat16().float()
    step(model, batch).loss.backward()
    want = gradients(model)
    model.bfloat16()
    out = step(model, batch | {"images": batch["images"].bfloat16()})
    assert out.loss.dtype == out.harmonization.dtype == out.weight_penalty.dtype == torch.float32
    assert out.saliency.dtype == torch.bfloat16
    out.loss.backward()
    assert apart(gradients(model), want) < ROUNDING * torch.finfo(torch.bfloat16).eps


# --- loss scaling ---------------------------------------------------------------------------------


class Faint(nn.Module):
    """Logits whose gradient with respect to a pixel is near 6e-8, the smallest float16."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, CLASSES)
        with torch.no_grad():
            self.conv.weight *= 3.0
            self.head.weight *= 3e-4

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.silu(self.conv(x)).mean((2, 3)))


@pytest.fixture
def faint_batch(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "images": torch.randn(4, 3, 64, 64, generator=generator),
        "labels": torch.randint(0, CLASSES, (4,), generator=generator),
        "heatmaps": torch.rand(4, 64, 64, generator=generator),
    }


def alignment_alone(
    model: nn.Module, batch: dict[str, Tensor], in_float16: bool, **options: Any
) -> hx.HarmonizerOutput:
    def nothing(logits: Tensor, labels: Tensor) -> Tensor:
        return 0 * logits.float().sum()

    with torch.autocast("cpu", torch.float16, enabled=in_float16):
        return hx.harmonizer_loss(model, **batch, criterion=nothing, lambda_weights=0, **options)


def unscaled_gradients(model: nn.Module, loss: Tensor, scaler: GradScaler) -> Gradients:
    scaler.scale(loss).backward()
    return {name: g / scaler.get_scale() for name, g in gradients(model).items()}


@pytest.mark.filterwarnings("ignore:saliency. the standard deviation")
def test_a_scaler_keeps_maps_that_vanish_in_float16(faint_batch: dict[str, Tensor]) -> None:
    model, scaler = Faint(), GradScaler("cpu")  # its scale is 2**16, more than float16 holds
    out = alignment_alone(model, faint_batch, in_float16=False)
    out.loss.backward()
    want = gradients(model)
    smallest = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
    assert 0 < out.saliency.abs().median() < smallest / 2

    kept = alignment_alone(model, faint_batch, in_float16=True, scaler=scaler)
    eps = torch.finfo(torch.float16).eps
    assert apart({"maps": kept.saliency}, {"maps": out.saliency}) < ROUNDING * eps
    # Of 16,000 pixels one in some thousand is so near the mean that rounding decides on which side.
    assert apart(unscaled_gradients(model, kept.loss, scaler), want) < 3 * ROUNDING * eps

    lost = alignment_alone(model, faint_batch, in_float16=True)
    assert lost.saliency.count_nonzero() == 0
    assert apart(unscaled_gradients(model, lost.loss, scaler), want) == 1  # nothing of it


def test_an_overflow_is_skipped_and_recovered_from(batch: dict[str, Tensor]) -> None:
    model = network("convolutional")
    scaler = GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scales, moved, finite = [], [], []
    for _ in range(4):
        before = copy.deepcopy(model.state_dict())
        with torch.autocast("cpu", torch.float16):
            out = step(model, batch, scaler=scaler)
        finite.append(bool(out.loss.isfinite()))
        scaler.scale(out.loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
        after = model.state_dict()
        moved.append(any(not torch.equal(after[name], before[name]) for name in before))
        assert bool(norm.isfinite()) == moved[-1]
    # The loss is seen in float32, and the maps are scaled by what float16 holds.
    assert finite == [True] * 4
    assert scales == [2.0**28, 2.0**16, 2.0**16, 2.0**16]
    assert moved == [False, False, True, True]


@pytest.mark.parametrize("rows", ["mapped", "all"])
def test_a_batch_without_maps_overflows_nothing(rows: str, batch: dict[str, Tensor]) -> None:
    model, scaler = network("convolutional"), GradScaler("cpu")
    batch["tokens"] = torch.zeros(BATCH)
    with torch.autocast("cpu", torch.float16):
        loss = step(model, batch, scaler=scaler, rows=rows).loss
    assert all(g.isfinite().all() for g in unscaled_gradients(model, loss, scaler).values())


@pytest.mark.parametrize("create_graph", [False, True])
def test_input_gradient_with_a_scaler(create_graph: bool, faint_batch: dict[str, Tensor]) -> None:
    model, args = Faint(), (faint_batch["images"], faint_batch["labels"])
    _, want = hx.input_gradient(model, *args, create_graph=False)
    for scale in (1.0, 2.0**10, 2.0**16, 2.0**24):
        scaler = GradScaler("cpu", init_scale=scale)
        with torch.autocast("cpu", torch.float16):
            logits, maps = hx.input_gradient(model, *args, create_graph=create_graph, scaler=scaler)
        assert maps.requires_grad == create_graph
        assert (logits.dtype, maps.dtype) == (torch.float16, torch.float32)
        assert scaler.get_scale() == scale
        error = apart({"": maps}, {"": want})
        if scale == 1:
            assert error > 0.5
        else:
            assert error < ROUNDING * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_disabled_scaler_changes_nothing(dtype: torch.dtype, batch: dict[str, Tensor]) -> None:
    model, off = network("convolutional").to(dtype), GradScaler("cpu", enabled=False)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    found = []
    for scaler in (None, off):
        out = step(model, batch, scaler=scaler)
        out.loss.backward()
        found.append((out.saliency, out.loss.detach(), gradients(model)))
    assert found[1][0].dtype == dtype
    for a, b in zip(found[0][:2], found[1][:2], strict=True):
        assert torch.equal(a, b)
    assert_equal(found[1][2], found[0][2], rtol=0)


def test_an_own_explanation_scales_by_itself() -> None:
    with pytest.raises(ValueError, match="scaler: expected None with an explain of your own"):
        hx.HarmonizerLoss(Faint(), explain=hx.input_gradient, scaler=GradScaler("cpu"))


# --- memory format and accumulated gradients ------------------------------------------------------


def double(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


@pytest.mark.parametrize("rows", ["all", "mapped"])
def test_channels_last(rows: str, batch: dict[str, Tensor]) -> None:
    batch = double(batch)
    model = network("convolutional").double()
    want = step(model, batch, rows=rows)
    want.loss.backward()
    expected = gradients(model)
    model.to(memory_format=torch.channels_last)
    batch["images"] = batch["images"].to(memory_format=torch.channels_last)
    out = step(model, batch, rows=rows)
    out.loss.backward()
    # Other kernels, whose sums run in another order: rounding of 1e-16, as in test_distributed.
    torch.testing.assert_close(out.saliency, want.saliency, rtol=1e-10, atol=1e-16)
    assert_equal(gradients(model), expected, rtol=1e-10)


@pytest.mark.parametrize("reduction", ["mean", "mean_valid"])
@pytest.mark.parametrize("rows", ["all", "mapped"])
def test_accumulated_gradients(reduction: str, rows: str, batch: dict[str, Tensor]) -> None:
    batch = double(batch)
    model = network("convolutional").double()
    step(model, batch, rows=rows, reduction=reduction).loss.backward()
    want = gradients(model)
    micro_batches = 4
    tokens = batch["tokens"]
    if reduction == "mean_valid":
        # "mean" over a micro-batch, with tokens that sum to the number of rows of the whole batch:
        # a micro-batch by itself cannot know how many maps the others have.
        tokens = tokens * BATCH / tokens.sum()
    parts = {k: v.chunk(micro_batches) for k, v in (batch | {"tokens": tokens}).items()}
    for part in range(micro_batches):
        micro_batch = {k: v[part] for k, v in parts.items()}
        (step(model, micro_batch, rows=rows).loss / micro_batches).backward()
    assert_equal(gradients(model), want, rtol=1e-10)  # only the order of sums differs
