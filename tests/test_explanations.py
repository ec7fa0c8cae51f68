"""Explanations against closed forms, Captum and finite differences; evaluation of any of them."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import timm_networks
import torch
from small_networks import CLASSES, Transformer, make_batch
from torch import Tensor, nn

import harmonizer_ext as hx
from harmonizer_ext.explanations import (
    Attribution,
    GradCAM,
    GradientTimesInput,
    InputGradient,
    IntegratedGradients,
    SmoothGrad,
    importance_maps,
    reduce_channels,
)

ROWS, SIZE = 3, 8

needs_captum = pytest.mark.skipif(
    importlib.util.find_spec("captum") is None, reason="pip install --no-deps captum: the oracle"
)
needs_timm = pytest.mark.skipif(
    timm_networks.why_no_timm() is not None, reason=timm_networks.why_no_timm() or ""
)


class Quadratic(nn.Module):
    """Logit c of x is ``sum(weight_c * x) + 1/2 sum(curvature_c * x^2)``."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        shape = (CLASSES, 3, SIZE, SIZE)
        self.weight = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        self.curvature = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        terms = self.weight * x[:, None] + self.curvature * x[:, None].square() / 2
        return terms.flatten(2).sum(2)


class Convolutions(nn.Module):
    """Smooth, with a ReLU that works in place behind the layer that Grad-CAM looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.features = nn.Sequential(nn.Tanh(), nn.Conv2d(6, 5, 3, padding=1))
        self.activation = nn.ReLU(inplace=True)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.activation(self.features(self.first(x))).mean((2, 3)))


@pytest.fixture
def images(generator: torch.Generator) -> Tensor:
    return torch.randn(ROWS, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)


@pytest.fixture
def labels() -> Tensor:
    return torch.tensor([2, 0, 3])


@pytest.fixture
def quadratic(generator: torch.Generator) -> Quadratic:
    return Quadratic(generator)


@pytest.fixture
def convolutions() -> Convolutions:
    torch.manual_seed(0)
    return Convolutions().double().eval()


def close(a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """Sums of up to some hundred terms of order one, in float64, in another order."""
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12 * scale)


# --- what they compute ----------------------------------------------------------------------------


def test_channels_are_reduced_as_described() -> None:
    maps = torch.tensor([3.0, -4.0, 0.0]).view(1, 3, 1, 1).expand(2, 3, 5, 7)
    for reduce, expected in (("abs_max", 4.0), ("mean", -1 / 3), ("l2", 5.0)):
        assert torch.equal(reduce_channels(maps, reduce), torch.full((2, 5, 7), expected))
    assert reduce_channels(maps, None) is maps
    with pytest.raises(ValueError, match="reduce: expected one of 'abs_max', 'mean', 'l2', got"):
        reduce_channels(maps, "max")
    with pytest.raises(ValueError, match=r"maps: expected \(B, C, H, W\)"):
        reduce_channels(maps[0, 0], "mean")


@pytest.mark.parametrize("reduce", ["abs_max", "mean", "l2"])
def test_gradients_of_a_quadratic(
    quadratic: Quadratic, images: Tensor, labels: Tensor, reduce: Any
) -> None:
    """Closed forms: the gradient is linear in the image, so noise leaves its mean, and the path
    from 0 has the gradient of its middle."""
    weight, curvature = quadratic.weight[labels], quadratic.curvature[labels]
    gradient = weight + curvature * images
    for explain, expected in (
        (InputGradient(reduce), gradient),
        (GradientTimesInput(reduce), gradient * images),
        (IntegratedGradients(7, reduce=reduce), images * (weight + curvature * images / 2)),
        (
            IntegratedGradients(
                4, baseline=torch.tensor([1.0, -2.0, 0.5])[:, None, None], reduce=reduce
            ),
            (images - torch.tensor([1.0, -2.0, 0.5])[:, None, None].double())
            * (
                weight
                + curvature * (images + torch.tensor([1.0, -2.0, 0.5])[:, None, None].double()) / 2
            ),
        ),
    ):
        logits, maps = explain(quadratic, images, labels, create_graph=False)
        close(maps, reduce_channels(expected, reduce).detach())
        close(logits, quadratic(images))


def test_integrated_gradients_are_complete(convolutions: Convolutions, images: Tensor) -> None:
    """The maps, summed over pixels, are the difference of the logits to those of the baseline."""
    smooth = nn.Sequential(convolutions.first, nn.Tanh(), nn.Flatten(), nn.LazyLinear(1).double())
    _, maps = IntegratedGradients(400, baseline=0.3, reduce="mean")(
        smooth, images, torch.zeros(ROWS, dtype=torch.long), create_graph=False
    )
    difference = smooth(images) - smooth(torch.full_like(images, 0.3))
    # The midpoint rule's error falls with the square of the steps: 1e-5 of the way's second
    # derivative, which is of order one here.
    torch.testing.assert_close(3 * maps.sum((1, 2)), difference[:, 0], rtol=0, atol=1e-4)


def test_smoothgrad_is_the_mean_over_its_noise(
    quadratic: Quadratic, images: Tensor, labels: Tensor
) -> None:
    explain = SmoothGrad(samples=4, noise=0.2, seed=3, reduce="mean")
    generator = torch.Generator().manual_seed(3)
    noise = torch.stack(
        [torch.randn(3, SIZE, SIZE, generator=generator) for _ in range(4)]
    ).double()
    spread = images.flatten(1).amax(1) - images.flatten(1).amin(1)
    moved = images + 0.2 * spread[:, None, None, None] * noise.mean(0)
    expected = quadratic.weight[labels] + quadratic.curvature[labels] * moved
    logits, maps = explain(quadratic, images, labels, create_graph=False)
    close(maps, expected.mean(1).detach(), scale=10)
    assert torch.equal(logits, quadratic(images).detach())  # without noise


def test_smoothgrad_does_not_depend_on_the_batch(
    convolutions: Convolutions, images: Tensor, labels: Tensor
) -> None:
    explain = SmoothGrad(samples=3)
    _, together = explain(convolutions, images, labels, create_graph=False)
    for row in range(ROWS):
        one = slice(row, row + 1)
        _, alone = explain(convolutions, images[one], labels[one], create_graph=False)
        close(alone, together[one])


def test_smoothgrad_without_a_seed_draws_anew(
    convolutions: Convolutions, images: Tensor, labels: Tensor
) -> None:
    torch.manual_seed(0)
    explain = SmoothGrad(samples=2, seed=None)
    first, second = (explain(convolutions, images, labels, create_graph=False)[1] for _ in range(2))
    assert not torch.allclose(first, second)


@needs_captum
def test_captum_agrees(convolutions: Convolutions, images: Tensor, labels: Tensor) -> None:
    from captum import attr

    baseline = 0.25
    layer = convolutions.features
    cam = attr.LayerGradCam(convolutions, layer).attribute(
        images, target=labels, relu_attributions=True
    )
    cam = attr.LayerAttribution.interpolate(cam, (SIZE, SIZE), interpolate_mode="bilinear")
    integrated = attr.IntegratedGradients(convolutions)
    for explain, expected in (
        (InputGradient(None), attr.Saliency(convolutions).attribute(images, labels, abs=False)),
        (GradientTimesInput(None), attr.InputXGradient(convolutions).attribute(images, labels)),
        (
            IntegratedGradients(9, baseline, reduce=None),
            integrated.attribute(images, baseline, labels, n_steps=9, method="riemann_middle"),
        ),
        (GradCAM("features"), cam[:, 0]),
        (GradCAM(layer), cam[:, 0]),
    ):
        _, maps = explain(convolutions, images, labels, create_graph=False)
        # Captum's steps are float32.
        rtol = 1e-5 if isinstance(explain, IntegratedGradients) else 1e-10
        torch.testing.assert_close(maps, expected.detach(), rtol=rtol, atol=1e-9)


@needs_captum
def test_smoothgrad_tends_to_that_of_captum(convolutions: Convolutions, images: Tensor) -> None:
    """Two independent draws of n noises differ by the standard error of their difference."""
    from captum import attr

    row, label, count = images[:1], torch.tensor([1]), 600
    deviation = 0.3 * float(row.max() - row.min())
    torch.manual_seed(1)
    tunnel = attr.NoiseTunnel(attr.Saliency(convolutions))
    theirs = tunnel.attribute(
        row, target=label, abs=False, stdevs=deviation, nt_samples=count,
        nt_samples_batch_size=100,
    )  # fmt: skip
    _, ours = SmoothGrad(count, 0.3, reduce=None)(convolutions, row, label, create_graph=False)
    points = row + deviation * torch.randn(400, 3, SIZE, SIZE, dtype=torch.float64)
    _, single = InputGradient(None)(convolutions, points, label.expand(400), create_graph=False)
    error = single.std(0) * (2 / count) ** 0.5
    score = ((ours - theirs.detach())[0] / error.clamp(min=1e-12)).square().mean()
    # 1 in expectation, over 192 correlated values; without noise it is far above.
    assert score < 2
    _, plain = InputGradient(None)(convolutions, row, label, create_graph=False)
    assert ((ours - plain)[0] / error.clamp(min=1e-12)).square().mean() > 10


def test_grad_cam_of_tokens(images: Tensor, labels: Tensor) -> None:
    """The grid by hand, of a network whose logits are linear in the layer's tokens."""
    torch.manual_seed(0)
    model = Transformer().double().eval()
    wide = torch.cat([images, images], 3)  # 8x16 pixels: 4x8 tokens
    _, maps = GradCAM("blocks.1", relu=False)(model, wide, labels, create_graph=False)
    tokens = model.patches(wide).flatten(2).transpose(1, 2)
    for block in model.blocks:
        tokens = block(tokens)
    weights = model.head.weight[labels] / tokens.shape[1]  # the logits are of the mean token
    grid = torch.einsum("btd,bd->bt", tokens, weights).unflatten(1, (1, 4, 8))
    expected = nn.functional.interpolate(grid, (8, 16), mode="bilinear", align_corners=False)
    close(maps, expected[:, 0].detach())


@needs_timm
def test_grad_cam_of_a_vision_transformer_with_a_class_token() -> None:
    timm = timm_networks.import_timm()
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", depth=2, embed_dim=24, num_heads=2, img_size=64, num_classes=5
    ).eval()
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([1, 4])
    logits, maps = importance_maps(GradCAM("blocks.1.norm1"), model, images, labels)
    assert maps.shape == (2, 64, 64)
    assert torch.equal(logits, model(images).detach())
    # The class token alone is read behind the last block.
    with pytest.raises(ValueError, match="got 2 of 2 that are constant, rows 0, 1"):
        importance_maps(GradCAM("blocks.1"), model, images, labels)


# --- training through them ------------------------------------------------------------------------

EXPLANATIONS = {
    "gradient, abs_max": InputGradient("abs_max"),
    "gradient, mean": InputGradient("mean"),
    "gradient, l2": InputGradient("l2"),
    "gradient times input": GradientTimesInput("mean"),
    "SmoothGrad": SmoothGrad(3, reduce="l2"),
    "integrated gradients": IntegratedGradients(3, baseline=0.1, reduce="abs_max"),
    "Grad-CAM": GradCAM("features", relu=False),
    "Grad-CAM, relu": GradCAM("features"),
}


@pytest.mark.parametrize("name", EXPLANATIONS)
def test_parameter_gradients_by_finite_differences(
    name: str, convolutions: Convolutions, images: Tensor, labels: Tensor
) -> None:
    """The gradient of a smooth function of the maps along random directions, in float64."""
    explain = EXPLANATIONS[name]
    generator = torch.Generator().manual_seed(0)
    heatmaps = torch.rand(ROWS, SIZE, SIZE, generator=generator, dtype=torch.float64) / 100
    convolutions.activation = nn.Softplus()
    parameters = list(convolutions.parameters())

    def distance() -> Tensor:
        _, maps = explain(convolutions, images, labels, create_graph=True)
        return (maps - heatmaps).square().sum()

    exact = torch.autograd.grad(distance(), parameters, materialize_grads=True)
    assert all(gradient.norm() > 0 for gradient in exact[:-1])  # the last bias has no part in maps
    for _ in range(3):
        along = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        values = []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                for parameter, direction in zip(parameters, along, strict=True):
                    parameter.add_(direction, alpha=step)
            values.append(distance().detach())
        with torch.no_grad():
            for parameter, direction in zip(parameters, along, strict=True):
                parameter.add_(direction, alpha=1e-6)
        slope = sum((g * v).sum() for g, v in zip(exact, along, strict=True))
        # Rounding: 1e-16 of the value over 2e-6. Truncation: the step's square, 1e-12, times a
        # third derivative.
        difference = (values[0] - values[1]) / 2e-6
        torch.testing.assert_close(difference, slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", EXPLANATIONS)
def test_the_loss_takes_them(name: str, generator: torch.Generator) -> None:
    torch.manual_seed(0)
    model, batch = Convolutions(), make_batch(generator, ROWS, SIZE)
    out = hx.harmonizer_loss(model, **batch, explain=EXPLANATIONS[name])
    _, maps = EXPLANATIONS[name](model, batch["images"], batch["labels"], create_graph=False)
    with torch.no_grad():
        expected = hx.harmonization_loss(maps, batch["heatmaps"])
    torch.testing.assert_close(out.harmonization, expected)
    torch.testing.assert_close(out.logits, model(batch["images"]).detach())
    out.loss.backward()
    assert model.first.weight.grad.norm() > 0


def test_grad_cam_trains_through_attention(generator: torch.Generator) -> None:
    """Attention's fused kernels have no second derivative: another one must be chosen."""
    model, batch = Transformer(), make_batch(generator, ROWS, SIZE)
    hx.harmonizer_loss(model, **batch, explain=GradCAM("blocks.1.norm")).loss.backward()
    assert model.patches.weight.grad.norm() > 0


# --- evaluation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "explain", [hx.input_gradient, *EXPLANATIONS.values()], ids=["input_gradient", *EXPLANATIONS]
)
def test_maps_are_the_same_in_any_mode(
    mode: Any, explain: Any, convolutions: Convolutions, images: Tensor, labels: Tensor
) -> None:
    expected_logits, expected = explain(convolutions, images, labels, create_graph=False)
    with mode():
        logits, maps = importance_maps(
            explain, convolutions, images.clone(), labels.clone(), undefined="keep"
        )
        assert torch.is_grad_enabled() is (mode is torch.enable_grad)
        assert torch.is_inference_mode_enabled() is (mode is torch.inference_mode)
    assert torch.equal(maps, reduce_channels(expected, "abs_max"))
    assert torch.equal(logits, expected_logits)
    assert not maps.requires_grad
    assert not logits.requires_grad
    assert not maps.is_inference()


def test_a_model_made_in_inference_mode_is_refused(images: Tensor, labels: Tensor) -> None:
    with torch.inference_mode():
        model = Convolutions().double()
    with pytest.raises(RuntimeError, match="model: expected parameters that autograd can record"):
        importance_maps(InputGradient(), model, images, labels)


def test_maps_of_another_size_are_refused(
    convolutions: Convolutions, images: Tensor, labels: Tensor
) -> None:
    def coarse(images: Tensor, labels: Tensor) -> Tensor:
        return images.mean(1)[:, ::2, ::2]

    for function in (coarse, lambda images, labels: images.mean(1)[:2]):
        with pytest.raises(ValueError, match=r"expected maps \(3, 8, 8\) or with channels.*got"):
            importance_maps(Attribution(function), convolutions, images, labels)


def test_constant_and_infinite_maps_are_refused_or_kept(
    convolutions: Convolutions, images: Tensor, labels: Tensor
) -> None:
    fixed = images[:, 0].clone()
    fixed[1] = 0.7
    explain = Attribution(lambda images, labels: fixed)
    with pytest.raises(ValueError, match="got 1 of 3 that are constant, rows 1; usual causes"):
        importance_maps(explain, convolutions, images, labels)
    _, maps = importance_maps(explain, convolutions, images, labels, undefined="keep")
    assert torch.equal(maps, fixed)
    fixed[1] = images[1, 0]
    fixed[2, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="got 1 of 3 that are not finite, rows 2; usual causes"):
        importance_maps(explain, convolutions, images, labels)


def test_channels_need_a_reduction(
    convolutions: Convolutions, images: Tensor, labels: Tensor
) -> None:
    with pytest.raises(ValueError, match="reduce: expected a way to one number per pixel"):
        importance_maps(hx.input_gradient, convolutions, images, labels, reduce=None)


# --- other libraries ------------------------------------------------------------------------------


@needs_captum
def test_attributions_of_captum(convolutions: Convolutions, images: Tensor, labels: Tensor) -> None:
    from captum import attr

    explain = Attribution(
        attr.IntegratedGradients(convolutions), n_steps=8, method="riemann_middle"
    )
    with torch.inference_mode():
        logits, maps = importance_maps(explain, convolutions, images, labels)
    _, expected = IntegratedGradients(8)(convolutions, images, labels, create_graph=False)
    torch.testing.assert_close(maps, expected, rtol=1e-5, atol=1e-9)  # Captum's steps are float32
    close(logits, convolutions(images).detach())
    with pytest.raises(ValueError, match="expected an attribution of this model, got one of anoth"):
        importance_maps(explain, Convolutions().double(), images, labels)
    with pytest.raises(hx.NoGraphError, match=r"maps of Attribution\(Saliency.* without one"):
        hx.harmonizer_loss(
            convolutions,
            images,
            labels,
            images[:, 0],
            explain=Attribution(attr.Saliency(convolutions)),
        )


def test_functions_of_images_and_labels(
    convolutions: Convolutions, images: Tensor, labels: Tensor
) -> None:
    def channels_of_numpy(images: Tensor, labels: Tensor) -> np.ndarray:
        return (images * labels.view(-1, 1, 1, 1)).detach().numpy() + images.detach().numpy()

    explain = Attribution(channels_of_numpy, reduce="mean")
    _, maps = importance_maps(explain, convolutions, images, labels)
    close(maps, (images * (labels + 1).view(-1, 1, 1, 1)).mean(1))
    with pytest.raises(TypeError, match="targets: expected a tensor of labels, got function"):
        explain(convolutions, images, lambda logits: logits[:, 0], create_graph=False)
    with pytest.raises(TypeError, match="function: expected an object with attribute"):
        Attribution(3)


def test_a_function_with_a_graph_can_be_trained_through(
    convolutions: Convolutions, images: Tensor, labels: Tensor
) -> None:
    def squared_gradient(images: Tensor, labels: Tensor) -> Tensor:
        scores = convolutions(images).gather(1, labels[:, None]).sum()
        return torch.autograd.grad(scores, images, create_graph=True)[0].square().sum(1)

    out = hx.harmonizer_loss(
        convolutions, images, labels, images[:, 0], explain=Attribution(squared_gradient)
    )
    out.loss.backward()
    assert convolutions.first.weight.grad.norm() > 0


# --- bad arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: InputGradient("max"),
            "reduce: expected one of 'abs_max', 'mean', 'l2', got 'max'",
        ),
        (lambda: SmoothGrad(0), "samples: expected a whole number of 1 or more, got 0"),
        (lambda: SmoothGrad(noise=0), "noise: expected a number above 0, got 0"),
        (lambda: IntegratedGradients(1.5), "steps: expected a whole number of 1 or more, got 1.5"),
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_layers(convolutions: Convolutions, images: Tensor, labels: Tensor) -> None:
    class Twice(Convolutions):
        def forward(self, x: Tensor) -> Tensor:
            self.first(x)
            return super().forward(x)

    for layer, model, message in (
        (
            "feature",
            convolutions,
            "layer: expected the dotted name of a module, got 'feature'; the",
        ),
        (nn.Identity(), convolutions, "layer: expected a module of the model, got one of another"),
        ("head", convolutions, r"layer: expected an output .* got \(3, 4\)"),
        ("first", Twice().double(), "layer: expected one that runs once, got one that ran 2 times"),
    ):
        with pytest.raises(ValueError, match=message):
            GradCAM(layer)(model, images, labels, create_graph=False)
    with pytest.raises(TypeError, match=r"model: Grad-CAM looks into it"):
        GradCAM("head")(convolutions.forward, images, labels, create_graph=False)
    with pytest.raises(ValueError, match="baseline: expected a shape that fits images"):
        IntegratedGradients(2, torch.zeros(5, 3, SIZE, SIZE))(
            convolutions, images[:1], labels[:1], create_graph=False
        )
    with pytest.raises(ValueError, match="layer: expected tokens that fill a grid"):
        GradCAM("blocks.1")(Transformer().double(), images[..., :5], labels, create_graph=False)
