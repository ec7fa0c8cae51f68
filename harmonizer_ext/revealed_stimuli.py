"""Stimuli that reveal the most important pixels of an image, and the curve of decisions on them.

The experiment of the paper's section 3 and figure 5, on *how* features are used: is it an animal,
when only 1 to 100 percent of the pixels that matter to people are there, on a phase-scrambled
background of the same image? The paper describes its masks in its appendix 1; here exactly the most
important pixels are revealed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harmonizer_ext.alignment import MetricSummary, pearson, spearman, summarize

__all__ = [
    "ANIMAL_CLASSES",
    "CurveCorrelation",
    "Stimulus",
    "animal_probability",
    "correlate_curves",
    "decision_curve",
    "important_pixels",
    "phase_scrambled",
    "reveal_levels",
    "revealed_stimuli",
]

ANIMAL_CLASSES = 398
"""ImageNet classes 0 (tench) to 397 (puffer) are animals, the others are not."""

_IMAGENET_CLASSES = 1000


def reveal_levels(count: int = 10, lowest: float = 0.01) -> tuple[float, ...]:
    """Shares of the important pixels to reveal, evenly spaced on a logarithmic scale.

    Args:
        count: how many, two or more.
        lowest: the first; the last is 1.

    Raises:
        ValueError: ``count`` is below two, or ``lowest`` does not lie between 0 and 1.
    """
    if count < 2:
        raise ValueError(f"count must be at least 2, got {count}")
    if not 0 < lowest < 1:
        raise ValueError(f"lowest must lie between 0 and 1, got {lowest}")
    return tuple(lowest ** (1 - i / (count - 1)) for i in range(count))


def important_pixels(importance: Tensor) -> int:
    """How many pixels of a map (H, W) anybody found important: those above zero.

    Images are comparable where as many pixels of each are revealed. What all of a set can reveal is
    the smallest of their numbers.
    """
    return int((importance > 0).sum())


def phase_scrambled(image: Tensor, generator: torch.Generator) -> Tensor:
    """The image with random phases, its amplitude spectrum and mean colour kept.

    The phases of white noise are added to those of the image, the same to all channels, so that
    colours stay related as they were. Values may leave the image's range a little.

    Args:
        image: (C, H, W), any real dtype.
        generator: on the CPU; what it gives next is the noise.

    Returns:
        (C, H, W) float64 on the image's device.
    """
    noise = torch.rand(image.shape[-2:], dtype=torch.float64, device="cpu", generator=generator)
    # Positive noise has phase 0 at frequency 0: the mean stays.
    phase = torch.fft.fft2(noise).angle().to(image.device)
    spectrum = torch.fft.fft2(image.double()) * torch.polar(torch.ones_like(phase), phase)
    scrambled: Tensor = torch.fft.ifft2(spectrum).real
    return scrambled


@dataclass(frozen=True)
class Stimulus:
    """An image of which some pixels are revealed.

    Attributes:
        image: (3, H, W) uint8.
        pixels: number of revealed pixels.
        shift: rows down and columns right by which they were moved to the centre.
    """

    image: Tensor
    pixels: int
    shift: tuple[int, int]


def revealed_stimuli(
    image: Tensor, importance: Tensor, pixels: Sequence[int], *, seed: int
) -> list[Stimulus]:
    """Reveals the most important pixels of an image, on its phase-scrambled self.

    The revealed pixels are moved together so that their mean position is the middle of the image,
    or as near to it as they can come without one leaving the image. The background is that of all
    stimuli of the image. Pixels of equal importance follow one another in random order.

    Args:
        image: (3, H, W), 0 to 255, uint8 or floating point.
        importance: (H, W), the larger the more important; only pixels above zero are revealed.
        pixels: how many to reveal, for each stimulus. Larger ones contain smaller ones.
        seed: of background and order; the same seed gives the same stimuli.

    Raises:
        ValueError: the shapes do not fit, the map holds a NaN, or more pixels are asked for than
            are important.
    """
    if image.ndim != 3 or image.shape[0] != 3 or image.shape[1:] != importance.shape:
        raise ValueError(
            "image and importance must have the shapes (3, H, W) and (H, W), got "
            f"{tuple(image.shape)} and {tuple(importance.shape)}"
        )
    if importance.isnan().any():
        raise ValueError("importance must be finite, got a NaN")
    available = important_pixels(importance)
    if not all(1 <= count <= available for count in pixels):
        raise ValueError(
            f"pixels must lie between 1 and {available}, which are important in this image, got "
            f"{list(pixels)}"
        )
    generator = torch.Generator("cpu").manual_seed(seed)
    image, importance = image.cpu(), importance.cpu()
    background = phase_scrambled(image, generator).round().clamp(0, 255).to(torch.uint8)
    revealed = image.double().round().clamp(0, 255).to(torch.uint8)
    shuffled = torch.randperm(importance.numel(), generator=generator, device="cpu")
    order = shuffled[importance.flatten()[shuffled].argsort(descending=True, stable=True)]
    height, width = importance.shape
    stimuli = []
    for count in pixels:
        y, x = order[:count] // width, order[:count] % width
        down, right = _to_centre(y, height), _to_centre(x, width)
        stimulus = background.clone()
        stimulus[:, y + down, x + right] = revealed[:, y, x]
        stimuli.append(Stimulus(stimulus, count, (down, right)))
    return stimuli


def _to_centre(positions: Tensor, size: int) -> int:
    wanted = round((size - 1) / 2 - positions.double().mean().item())
    return min(max(wanted, -int(positions.min())), size - 1 - int(positions.max()))


# --- decisions ------------------------------------------------------------------------------------


def animal_probability(logits: Tensor) -> Tensor:
    """The probability that an ImageNet classifier gives to all animal classes, (B,) of (B, 1000).

    Raises:
        ValueError: the logits are not of the 1000 ImageNet classes.
    """
    if logits.ndim != 2 or logits.shape[1] != _IMAGENET_CLASSES:
        raise ValueError(
            f"logits must have the shape (B, {_IMAGENET_CLASSES}), those of the ImageNet classes, "
            f"got {tuple(logits.shape)}"
        )
    return logits.double().softmax(1)[:, :ANIMAL_CLASSES].sum(1)


def decision_curve(
    correct: Tensor, *, resamples: int = 1000, seed: int = 0
) -> tuple[MetricSummary, ...]:
    """Accuracy at each level, with its bootstrap standard error over images.

    Args:
        correct: (images, levels), 1 for a right decision and 0 for a wrong one.
        resamples: number of bootstrap resamples.
        seed: of the resampling.
    """
    return tuple(
        summarize(column, resamples=resamples, seed=seed) for column in correct.double().unbind(1)
    )


@dataclass(frozen=True)
class CurveCorrelation:
    """How much the curve of a network resembles that of people, over levels.

    Attributes:
        pearson: correlation of accuracies; NaN where a curve is flat.
        pearson_error: bootstrap standard error of it, over images.
        spearman: correlation of their ranks.
        spearman_error: bootstrap standard error of it, over images.
    """

    pearson: float
    pearson_error: float
    spearman: float
    spearman_error: float


def correlate_curves(
    correct: Tensor, human: Tensor, *, resamples: int = 1000, seed: int = 0
) -> CurveCorrelation:
    """Correlation between the decision curves of a network and of people.

    Args:
        correct: (images, levels), 1 for a right decision of the network and 0 for a wrong one.
        human: (levels,) accuracy of people at the same levels.
        resamples: number of bootstrap resamples: of the network's images.
        seed: of the resampling.

    Raises:
        ValueError: the numbers of levels differ.
    """
    if correct.ndim != 2 or human.shape != correct.shape[1:]:
        raise ValueError(
            "correct and human must have the shapes (images, levels) and (levels,), got "
            f"{tuple(correct.shape)} and {tuple(human.shape)}"
        )
    correct, human = correct.double(), human.double()
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = (resamples, len(correct))
    drawn = torch.randint(len(correct), shape, generator=generator, device="cpu")
    curves = torch.stack([correct.mean(0), *(correct[rows].mean(0) for rows in drawn)])
    estimates = []
    for metric in (pearson, spearman):
        values = metric(curves[:, None], human.expand_as(curves)[:, None])
        resampled = values[1:][~values[1:].isnan()]
        error = resampled.std(correction=0).item() if len(resampled) > 1 else math.nan
        estimates += [values[0].item(), error]
    return CurveCorrelation(*estimates)
