"""Explanations made of input gradients; each can be trained through.

Training through the mean of n gradients takes the memory of n graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from harmonizer_ext.saliency import Targets, input_gradient

from .maps import Reduce, check_reduce, reduce_channels

Model = Callable[..., Tensor]


@dataclass(frozen=True)
class InputGradient:
    """Gradient of the target's logit with respect to the image (Simonyan et al., 2014).

    With ``reduce="abs_max"`` the saliency of the released ``evaluate_clickme``; with ``"mean"``
    that of the released training loss. Twice differentiable (``harmonizer_loss``'s own default is
    ``harmonizer_ext.input_gradient``, which is this with ``reduce=None``).

    Attributes:
        reduce: channels to one value; see ``Reduce``.
    """

    reduce: Reduce = "abs_max"

    def __post_init__(self) -> None:
        check_reduce(self.reduce)

    def __call__(
        self, model: Model, images: Tensor, targets: Targets, *, create_graph: bool
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, classes) and maps (B, H, W)."""
        logits, gradient = input_gradient(model, images, targets, create_graph=create_graph)
        return logits, reduce_channels(gradient, self.reduce)


@dataclass(frozen=True)
class GradientTimesInput:
    """Gradient times the image as the network takes it (Shrikumar et al., 2016).

    Zero where the input is zero: for standardized images where a pixel has the mean colour of the
    training set. Twice differentiable.

    Attributes:
        reduce: channels to one value, after the product; ``"mean"`` is the sum, the more usual
            one, but for a factor.
    """

    reduce: Reduce = "abs_max"

    def __post_init__(self) -> None:
        check_reduce(self.reduce)

    def __call__(
        self, model: Model, images: Tensor, targets: Targets, *, create_graph: bool
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, classes) and maps (B, H, W)."""
        logits, gradient = input_gradient(model, images, targets, create_graph=create_graph)
        return logits, reduce_channels(images * gradient, self.reduce)


@dataclass(frozen=True)
class SmoothGrad:
    """Mean gradient at the image with Gaussian noise added (Smilkov et al., 2017).

    Twice differentiable. The logits are those of the image without noise, so that it runs the
    model ``samples + 1`` times.

    Attributes:
        samples: number of noisy copies.
        noise: standard deviation of the noise, as a part of each image's range (largest minus
            smallest value); the paper recommends 0.1 to 0.2. (Captum's ``stdevs`` is absolute.)
        seed: of the noise, which is then the same for all images and calls, so that a map does not
            depend on the batch that its image came in. None draws anew at each call, and for each
            image, from PyTorch's generator: for training.
        reduce: channels to one value, of the mean.
    """

    samples: int = 50
    noise: float = 0.15
    seed: int | None = 0
    reduce: Reduce = "abs_max"

    def __post_init__(self) -> None:
        check_reduce(self.reduce)
        _check_count("samples", self.samples)
        if not self.noise > 0:
            raise ValueError(f"noise: expected a number above 0, got {self.noise!r}")

    def __call__(
        self, model: Model, images: Tensor, targets: Targets, *, create_graph: bool
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, classes) and maps (B, H, W)."""
        flat = images.detach().flatten(1)
        deviation = self.noise * (flat.amax(1) - flat.amin(1)).view(-1, 1, 1, 1)
        points = (images + deviation * noise for noise in self._draws(images))
        gradient = _mean_gradient(model, points, self.samples, targets, create_graph)
        return _logits(model, images, create_graph), reduce_channels(gradient, self.reduce)

    def _draws(self, images: Tensor) -> Iterator[Tensor]:
        # On the CPU, so that a seed means the same on every machine.
        generator = None if self.seed is None else torch.Generator("cpu").manual_seed(self.seed)
        for _ in range(self.samples):
            if generator is None:
                yield torch.randn_like(images)
            else:
                yield torch.randn(
                    images.shape[1:], generator=generator, dtype=torch.float32, device="cpu"
                ).to(images)


@dataclass(frozen=True)
class IntegratedGradients:
    """Gradients along the way from a baseline to the image (Sundararajan et al., 2017).

    ``(images - baseline) * mean of the gradients`` at the middles of ``steps`` equal parts of the
    way (Captum: ``method="riemann_middle"``). Summed over channels and pixels that tends to the
    difference of the logits. Twice differentiable. Runs the model ``steps + 1`` times.

    Attributes:
        steps: number of gradients.
        baseline: in the values that the network takes: a number, or a tensor that fits (C, H, W),
            such as (C, 1, 1). 0 is the mean colour for standardized images.
        reduce: channels to one value, after the product.
    """

    steps: int = 50
    baseline: float | Tensor = 0.0
    reduce: Reduce = "abs_max"

    def __post_init__(self) -> None:
        check_reduce(self.reduce)
        _check_count("steps", self.steps)

    def __call__(
        self, model: Model, images: Tensor, targets: Targets, *, create_graph: bool
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, classes) and maps (B, H, W)."""
        baseline = torch.as_tensor(self.baseline, dtype=images.dtype, device=images.device)
        way = images - baseline
        if way.shape != images.shape:
            raise ValueError(
                f"baseline: expected a shape that fits images {tuple(images.shape[1:])}, got "
                f"{tuple(baseline.shape)}"
            )
        points = (baseline + (step + 0.5) / self.steps * way for step in range(self.steps))
        gradient = _mean_gradient(model, points, self.steps, targets, create_graph)
        return _logits(model, images, create_graph), reduce_channels(way * gradient, self.reduce)


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected a whole number of 1 or more, got {value!r}")


def _mean_gradient(
    model: Model, points: Iterator[Tensor], count: int, targets: Targets, create_graph: bool
) -> Tensor:
    """One batch at a time: without a graph the memory is that of a single gradient."""
    gradients = (input_gradient(model, p, targets, create_graph=create_graph)[1] for p in points)
    total = next(gradients)
    for gradient in gradients:
        total = total + gradient
    return total / count


def _logits(model: Model, images: Tensor, create_graph: bool) -> Tensor:
    with torch.set_grad_enabled(create_graph):
        return model(images)
