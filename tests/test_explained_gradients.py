"""check_gradients(explain=...): right explanations pass, wrong ones are found and named."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_networks import CLASSES, Through
from torch import Tensor, nn

import harmonizer_ext as hx
from harmonizer_ext.explanations import (
    Attribution,
    GradCAM,
    GradientTimesInput,
    InputGradient,
    IntegratedGradients,
    SmoothGrad,
)

BATCH, SIZE = 3, 8


class Convolutions(nn.Module):
    def __init__(self, activation: Callable[[], nn.Module] = nn.Softplus, norm: bool = False):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), activation())
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.more = nn.Sequential(nn.Conv2d(6, 5, 3, padding=1), activation())
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.more(self.norm(self.features(x))).mean((2, 3)))


@pytest.fixture
def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(BATCH, 3, SIZE, SIZE, generator=generator), torch.arange(BATCH)


def scaled(factor: float, model: Any, images: Tensor, targets: Any, *, create_graph: bool) -> Any:
    logits, maps = hx.input_gradient(model, images, targets, create_graph=create_graph)
    return logits, factor * maps


class OfLayer(nn.Module):
    """Holds a layer of the network and a projection of its own."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.cam = GradCAM(layer, relu=False)
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, model: Any, images: Tensor, targets: Any, *, create_graph: bool) -> Any:
        logits, maps = self.cam(model, images, targets, create_graph=create_graph)
        return logits, self.gain * maps


RIGHT: dict[str, Callable[[Any], Any]] = {
    "input gradient": lambda model: hx.input_gradient,
    "abs_max": lambda model: InputGradient("abs_max"),
    "gradient times input": lambda model: GradientTimesInput("mean"),
    "SmoothGrad": lambda model: SmoothGrad(2, seed=None, reduce="l2"),
    "integrated gradients": lambda model: IntegratedGradients(2, torch.tensor(0.1)),
    "Grad-CAM by name": lambda model: GradCAM("features", relu=False),
    "Grad-CAM by layer": lambda model: GradCAM(model.features, relu=False),
    "module": lambda model: OfLayer(model.features),
    "partial": lambda model: functools.partial(scaled, 3.0),
}


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("name", RIGHT)
def test_right_explanations_pass(name: str, norm: bool, batch: tuple[Tensor, Tensor]) -> None:
    model = Convolutions(norm=norm)
    before = [t.clone() for t in model.state_dict().values()]
    found = hx.check_gradients(model, *batch, explain=RIGHT[name](model))
    assert found.passed is True, found
    # The square of the step, and 1e-16 over it.
    assert found.finite_difference.relative_error is not None, found
    assert found.finite_difference.relative_error < 1e-6
    for a, b in zip(model.state_dict().values(), before, strict=True):
        assert torch.equal(a, b)


def test_the_numbers_are_those_of_the_input_gradient(batch: tuple[Tensor, Tensor]) -> None:
    model = Convolutions()
    without = hx.check_gradients(model, *batch)
    explained = hx.check_gradients(model, *batch, explain=hx.input_gradient)
    for field in ("loss", "saliency_std", "zero_share", "zero_parameters", "parameters"):
        assert getattr(explained, field) == getattr(without, field)


def cam_of_constants(model: Any, images: Tensor, targets: Any, *, create_graph: bool) -> Any:
    """Grad-CAM as most libraries have it: the gradient is a number to whoever trains through it."""
    with torch.enable_grad():
        features = model.features(images)
        logits = model.head(model.more(model.norm(features)).mean((2, 3)))
        score = logits.gather(1, targets[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, features, retain_graph=True)
        return logits, (gradient.mean((2, 3), keepdim=True) * features).sum(1)


def two_thirds(model: Any, images: Tensor, targets: Any, *, create_graph: bool) -> Any:
    logits, maps = hx.input_gradient(model, images, targets, create_graph=create_graph)
    return logits, torch.cat([maps[:, :2], maps[:, 2:].detach()], 1)


class Hooked:
    def __call__(self, model: Any, images: Tensor, targets: Any, *, create_graph: bool) -> Any:
        logits, maps = hx.input_gradient(model, images, targets, create_graph=create_graph)
        maps = maps * 1
        if create_graph:
            maps.register_hook(lambda gradient: gradient * 1.01)
        return logits, maps


WRONG: dict[str, Any] = {
    "constants": cam_of_constants, "two thirds": two_thirds, "one per cent": Hooked()
}  # fmt: skip


@pytest.mark.parametrize("activation", [nn.Softplus, nn.ReLU])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_explanations_are_found_and_named(
    name: str, activation: Any, batch: tuple[Tensor, Tensor]
) -> None:
    found = hx.check_gradients(Convolutions(activation), *batch, explain=WRONG[name])
    assert found.passed is False, found
    assert found.finite_difference.relative_error is not None
    assert found.finite_difference.relative_error > 1e-3
    assert found.forward_over_reverse.relative_error is None
    if name == "constants":
        assert found.finite_difference.worst_parameter in ("head.weight", "more.0.weight")
        assert "head.weight" in found.zero_parameters


@pytest.mark.skipif(importlib.util.find_spec("captum") is None, reason="pip install captum")
def test_grad_cam_of_captum(batch: tuple[Tensor, Tensor]) -> None:
    """It is copied along with the model that it holds."""
    from captum import attr

    class Resized:
        def __init__(self, model: Any) -> None:
            self.cam = attr.LayerGradCam(model, model.features)

        def attribute(self, images: Tensor, target: Tensor) -> Tensor:
            maps = self.cam.attribute(images, target=target)
            return F.interpolate(maps, images.shape[-2:], mode="bilinear")

    model = Convolutions()
    found = hx.check_gradients(model, *batch, explain=Attribution(Resized(model), reduce="mean"))
    assert found.passed is False, found
    assert "head.weight" in found.zero_parameters


def test_what_it_refuses(batch: tuple[Tensor, Tensor]) -> None:
    model = Through(nn.Tanh())

    def of_itself(_: Any, images: Tensor, targets: Any, *, create_graph: bool) -> Any:
        return hx.input_gradient(model, images, targets, create_graph=create_graph)

    with pytest.raises(ValueError, match="explain: expected one that explains the model that it"):
        hx.check_gradients(model, *batch, explain=of_itself)
    with pytest.raises(hx.NoGraphError, match="expected a tensor that carries a graph"):
        hx.check_gradients(
            model, *batch, explain=lambda m, x, y, create_graph: (
                hx.input_gradient(m, x, y, create_graph=False)
            )
        )  # fmt: skip
