"""Grouped convolutions: PyTorch's own derivatives as the oracle, without PyTorch's loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_networks import make_batch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import harmonizer_ext as hx
from harmonizer_ext import double_backward
from harmonizer_ext.grouped_convolution import GroupedConvolutions

GEOMETRIES = [
    {"groups": 6, "padding": 1},
    {"groups": 6, "padding": (1, 0), "stride": (2, 1)},
    {"groups": 3, "padding": 2, "dilation": 2},
    {"groups": 2, "stride": 2},
    {"groups": 3, "padding": "same"},
    {"groups": 1, "padding": 1},
]


def tensors(groups: int, generator: torch.Generator) -> list[Tensor]:
    shapes = (2, 6, 7, 8), (6, 6 // groups, 3, 3), (6,)
    return [torch.randn(s, generator=generator).double().requires_grad_() for s in shapes]


def twice(inputs: list[Tensor], geometry: dict[str, Any], seed: int) -> list[Tensor]:
    """Value, gradients, and gradients of a function of the gradients."""
    out = F.conv2d(*inputs, **geometry)
    generator = torch.Generator().manual_seed(seed)

    def direction(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).double()

    first = torch.autograd.grad((out.tanh() * direction(out)).sum(), inputs, create_graph=True)
    total = sum((g * direction(g)).sum() for g in first)
    assert isinstance(total, Tensor)
    return [out, *first, *torch.autograd.grad(total, inputs)]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_derivatives_of_both_orders(
    geometry: dict[str, Any], channels_last: bool, generator: torch.Generator
) -> None:
    inputs = tensors(geometry["groups"], generator)
    if channels_last:
        image = inputs[0].detach().contiguous(memory_format=torch.channels_last)
        inputs[0] = image.requires_grad_()
    want = twice(inputs, geometry, 1)
    with GroupedConvolutions():
        got = twice(inputs, geometry, 1)
    for a, b in zip(got, want, strict=True):
        # The same sums in another order.
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    with GroupedConvolutions():
        check = torch.autograd.gradgradcheck
        assert check(lambda *x: F.conv2d(*x, **geometry), inputs, fast_mode=True)


def test_one_image_and_keywords(generator: torch.Generator) -> None:
    image, weight, bias = tensors(3, generator)
    with GroupedConvolutions():
        got = F.conv2d(input=image[0], weight=weight, groups=3)
        torch.testing.assert_close(got, F.conv2d(image[:1], weight, groups=3)[0])
        torch.testing.assert_close(
            F.conv2d(image, weight, bias=bias, groups=3),
            F.conv2d(image, weight, groups=3) + bias.view(-1, 1, 1),
        )


class Depthwise(nn.Module):
    def __init__(self, channels: int = 32, checkpointed: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, 2, 1)
        self.depthwise = nn.Conv2d(channels, channels, 5, 1, 2, groups=channels)
        self.head = nn.Linear(channels, 4)
        self.checkpointed = checkpointed

    def block(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.depthwise(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)
        return self.head(x.mean((2, 3)))


@pytest.fixture
def batch(generator: torch.Generator) -> dict[str, Tensor]:
    return make_batch(generator, 4, 16)


def convolutions(call: Callable[[], Any]) -> tuple[Any, int]:
    """The result of a call, and how many convolutions of PyTorch run in it, forward and back."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = call()
    names = ("aten::convolution", "aten::convolution_backward")
    return result, sum(event.count for event in profile.key_averages() if event.key in names)


def step(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    model.zero_grad()
    hx.harmonizer_loss(model, **batch, lambda_harmonization=10.0).loss.backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_step_convolves_once_a_layer_and_pass(
    batch: dict[str, Tensor], checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Depthwise(checkpointed=checkpointed)
    step(model, batch)  # the first looks at more than itself
    got, ours = convolutions(lambda: step(model, batch))
    monkeypatch.setattr(double_backward, "has_grouped_convolutions", lambda model: False)
    want, pytorchs = convolutions(lambda: step(model, batch))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * float(b.abs().max()))
    assert ours < 20
    # Should this fail, PyTorch has repaired its loop, and the module can go.
    assert pytorchs > 32


def test_frozen_weights_and_images(batch: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    model = Depthwise()
    whole = step(model, batch)
    model.depthwise.weight.requires_grad_(False)
    parts = step(model, batch)
    for part, want, parameter in zip(parts, whole, model.parameters(), strict=True):
        if parameter.requires_grad:
            torch.testing.assert_close(part, want, rtol=1e-5, atol=1e-7)
        else:
            assert part is None


def test_autocast(batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Depthwise()
    exact = torch.cat([g.flatten() for g in step(model, batch)])

    def error() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            out = hx.harmonizer_loss(model, **batch, lambda_harmonization=10.0)
        model.zero_grad()
        out.loss.backward()
        assert out.logits.dtype == torch.bfloat16
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        got = torch.cat([p.grad.flatten() for p in model.parameters()])
        return float((got - exact).norm())

    ours = error()
    monkeypatch.setattr(double_backward, "has_grouped_convolutions", lambda model: False)
    # Rounded in other places: as far from float32 as PyTorch's own, by and large.
    assert ours < 1.5 * error()


def test_the_mode_is_gone_afterwards(batch: dict[str, Tensor]) -> None:
    model = Depthwise()
    step(model, batch)
    assert not torch.overrides._get_current_function_mode_stack()
    x = model.stem(batch["images"])
    assert type(model.depthwise(x).grad_fn).__name__ == "ConvolutionBackward0"


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(batch: dict[str, Tensor], backend: str) -> None:
    torch.manual_seed(0)
    model = Depthwise()
    want = step(model, batch)
    compiled = hx.HarmonizerLoss(model, lambda_harmonization=10.0, compile={"backend": backend})
    for _ in range(2):
        model.zero_grad()
        _, count = convolutions(lambda: compiled(*batch.values()).loss.backward())
        for parameter, grad in zip(model.parameters(), want, strict=True):
            atol = 1e-5 * float(grad.abs().max())
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=atol)
    assert 0 < count < 20  # of the second call, which compiles nothing
