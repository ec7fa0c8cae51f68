"""Lower precision, loss scaling, memory formats and accumulated gradients of a harmonized step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from distributed_worker import NETWORKS, Transformer
from torch import Tensor, nn
from torch.amp import GradScaler

import harmonizer_ext as hx

BATCH, CLASSES, SIZE = 8, 5, 12

Gradients = dict[str, Tensor]


@pytest.fixture
def batch(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "images": torch.randn(BATCH, 3, SIZE, SIZE, generator=generator),
        "labels": torch.randint(0, CLASSES, (BATCH,), generator=generator),
        "heatmaps": torch.rand(BATCH, SIZE, SIZE, generator=generator),
        "tokens": torch.tensor([1, 0, 1, 0.5, 0, 0, 1, 0]),
    }


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
    square = sum(float((got[n].double() - want[n].double()).square().sum()) for n in want)
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
    step(model, batch).loss.backward()
    want = gradients(model)
    step(model, batch, lambda_harmonization=0.0).loss.backward()
    without = gradients(model)
    with torch.autocast("cpu", dtype):
        out = step(model, batch)
        assert model(batch["images"]).dtype == dtype
    out.loss.backward()
    # The loss and everything behind the maps stays in float32.
    for tensor in (out.loss, out.cross_entropy, out.harmonization, out.saliency, out.saliency_std):
        assert tensor.dtype == torch.float32
    got = gradients(model)
    assert all(g.dtype == torch.float32 for g in got.values())
    # Forward, backward and backward again are some twenty operations deep, each rounded to the
    # dtype; what is standardized is a difference of values that were.
    bound = 20 * torch.finfo(dtype).eps
    assert apart(got, want) < bound
    assert apart(without, want) > 2 * bound  # the alignment is not what is lost in the rounding


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
        batch["images"] = batch["images"].bfloat16().float()
    step(model, batch).loss.backward()
    want = gradients(model)
    model.bfloat16()
    out = step(model, batch | {"images": batch["images"].bfloat16()})
    assert out.loss.dtype == out.harmonization.dtype == out.weight_penalty.dtype == torch.float32
    assert out.saliency.dtype == torch.bfloat16
    out.loss.backward()
    assert apart(gradients(model), want) < 20 * torch.finfo(torch.bfloat16).eps  # as autocast


# --- loss scaling ---------------------------------------------------------------------------------


class Faint(nn.Module):
    """Logits whose gradient with respect to a pixel is below the smallest float16, 6e-8."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, CLASSES)
        with torch.no_grad():
            self.conv.weight *= 0.01
            self.head.weight *= 0.001

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.silu(self.conv(x)).mean((2, 3)))


