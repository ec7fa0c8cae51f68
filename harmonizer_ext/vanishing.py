"""Maps that are rounding and nothing else, because the target's gradient vanishes.

The similarity of an embedding with its own copy is at its maximum; a probability may be saturated,
a target constant. The gradient is then zero, or what rounding leaves of zero, and the standardized
maps of noise have a loss and a gradient like any others. How small a map is says nothing: real ones
may be of any size. But a real map is nearly the same for images that differ by some roundings, and
noise is another one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harmonizer_ext import contract, distributed, network
from harmonizer_ext.trial import FAILURES, Trial, coarsest, other_images, scatter

#: Maps (R, ...) of images and targets, by the way that is trained through, without a graph.
Again = Callable[[Any, Tensor, Any], Tensor]

#: By how many rounding units images are moved: in float32 and wider, and in half precision, where
#: a unit is a hundredth and real maps change with few.
_UNITS, _UNITS_OF_HALF = 64, 4

#: Mean cosine between the maps of any two of them: of real ones nearly 1 (in half precision 0.7 and
#: more), of noise 0, give or take one over the square root of the number of maps, or the square of
#: what noise is biased by (a sum of probabilities is more often below 1 than above it).
_SURE, _LEAST = 0.9, 0.4

#: Maps, each of one row, after which one is sure, and after which one decides.
_FEW, _MANY = 16, 64


def _directions(maps: Tensor) -> Tensor:
    """(R, N) of length 1; 0 where a map is zero everywhere."""
    flat = maps.detach().flatten(1).double()
    # Divided by the largest first: squares of very small values would vanish.
    largest = flat.abs().amax(1, keepdim=True)
    flat = flat / torch.where(largest > 0, largest, 1)
    length = flat.norm(dim=1, keepdim=True)
    return flat / torch.where(length > 0, length, 1)


def _moved(images: Tensor, units: float, generator: torch.Generator) -> Tensor:
    """Images moved by some roundings, within the range of their values.

    A network may take no others, and have a root or a logarithm that begins at a black pixel: zeros
    stay what they are, but in an image of zeros alone.
    """
    noise = torch.randn(images.shape, generator=generator, dtype=torch.float32, device="cpu")
    low, high = images.amin(), images.amax()
    black = (images == 0).flatten(1).all(1).view(-1, *[1] * (images.ndim - 1))
    largest = torch.maximum(high, -low)
    size = torch.where(black, torch.where(largest > 0, largest, 1), images.abs())
    moved = images + units * size * noise.to(images)
    return torch.where(low < high, moved.clamp(low, high), moved)


def _is_noise(again: Callable[[Tensor], Tensor], images: Tensor, units: float) -> bool:
    """Whether the maps of all rows are others whenever the images move by a few roundings."""
    base = again(images)
    if not bool(base.isfinite().all()):
        return False  # which is a fault of another kind, and seen in the loss
    # Rows that have no map at all, such as those without a label, say nothing of the others.
    some = base.flatten(1).any(1)
    some = some if bool(some.any()) else ~some
    number = int(some.sum())
    total = _directions(base)[some]
    # Of n maps the squared length of their sum is that of each, and twice the cosine of each pair.
    alone = total.square().sum(1)
    generator = torch.Generator("cpu").manual_seed(0)
    mean = 1.0
    for count in range(2, 2 + math.ceil(_MANY / number)):
        direction = _directions(again(_moved(images, units, generator)))[some]
        total, alone = total + direction, alone + direction.square().sum(1)
        pairs = count * (count - 1)
        mean = float((total.square().sum(1) - alone).mean()) / pairs
        if mean > _SURE and (count - 1) * number >= _FEW:
            return False
    if mean >= _LEAST:
        return False
    # A network that draws from a generator which nobody can put back has other maps every time.
    first, second = _directions(base), _directions(again(images))
    same = (first * second).sum(1) > _SURE
    return bool((same | ~(first.any(1) | second.any(1))).all())


def _other_targets(targets: Any, classes: int) -> Any:
    """Other labels, different ones for neighbours; a function of the logits stays what it is."""
    if not isinstance(targets, Tensor):
        return targets
    if targets.is_floating_point():
        return targets.roll(1, -1)
    shift = torch.arange(1, targets.shape[0] + 1, device=targets.device, dtype=targets.dtype)
    return (targets + shift) % classes


def check(
    model: Any,
    images: Tensor,
    targets: Any,
    logits: Tensor,
    again: Again,
    *things: Any,
    scaled: bool = False,
) -> None:
    """Refuses maps that are noise for any images, labels and weights.

    Where they are noise here alone, as at the first step of a head that starts with zeros, it is
    said. Costs the maps twice more, or as often as makes sixteen rows; and four times as many where
    that leaves a doubt.

    Args:
        model: maps images to logits; one whose forward pass waits for other processes is not tried.
        images: (R, C, H, W), of the rows whose maps count.
        targets: their labels, or a function of the logits.
        logits: (R, classes).
        again: gives maps of a model, images and targets.
        things: callables that may keep something, such as an explanation.
        scaled: whether a GradScaler makes zeros of float16 into numbers as it goes on.

    Raises:
        ValueError: the target's gradient vanishes.
    """
    if images.shape[0] == 0 or distributed.runs_together(model):
        return
    model = distributed.unwrapped(model)
    images = images.detach()
    unit = torch.finfo(coarsest(images, logits)).eps
    units = (_UNITS_OF_HALF if unit > 1e-4 else _UNITS) * unit
    trial = Trial(model, images.device, *things)
    try:
        said = _found(trial, model, images, targets, logits.shape[-1], units, again, scaled)
    finally:
        trial.put_back()
    if said is not None:
        contract.warn(said)


def _found(
    trial: Trial,
    model: Any,
    images: Tensor,
    targets: Any,
    classes: int,
    units: float,
    again: Again,
    scaled: bool,
) -> str | None:
    """Finds what is to be said of these maps, or None.

    Raises:
        ValueError: they are noise, and so are those of other images, labels and weights.
    """

    start = trial.state

    def run(pixels: Tensor, labels: Any = targets) -> Tensor:
        start.put_back()  # generators of random numbers of the network's own are part of it
        trial.random.put_back()
        return again(model, pixels, labels)

    try:
        if not _is_noise(run, images, units):
            return None
    except FAILURES:  # it takes no images but those that it was given
        return None
    largest = float(run(images).abs().amax())
    size = f"rounding of at most {largest:.0e} and nothing else" if largest else "zero"
    trial.put_back()
    scatter(network.parameters(model))
    start = trial.now(trial.state)
    others = _other_targets(targets, classes)
    try:
        always = _is_noise(lambda pixels: run(pixels, others), other_images(images), units)
    except FAILURES:  # labels of another kind than these
        always = False
    if always and not (scaled and not largest):
        raise ValueError(
            f"saliency: expected maps that depend on the images, got maps that are {size} for all "
            f"of {images.shape[0]} images, and for other images and labels too: the gradient of "
            f"the target vanishes. The usual causes: the similarity of an embedding with itself "
            f"or its detached copy, which is at its maximum (compare it with another one); a "
            f"target that is constant or detached; saturated probabilities (explain the logits); "
            f"float16, in which small gradients are zero (pass scaler=)"
        )
    return (
        f"saliency: the maps of all {images.shape[0]} images of this batch are {size}, so that the "
        f"alignment teaches nothing here. "
        + (
            "The GradScaler's factor is too small for float16, and grows with the updates"
            if always
            else "For other images, labels or weights they are not: a head that starts with zeros "
            "goes on from its first update; with equal labels, BatchNorm before the head leaves no "
            "gradient"
        )
    )
