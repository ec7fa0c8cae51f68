"""Whether a transform moves a human map along with its image, shown by what it does to a pattern.

Some transforms move whatever is an image and leave everything else where it was, without a word.
So each is tried before it is used: on an image with some blocks in it and the same blocks in its
map, and once more without the blocks, by the same random numbers. What differs between the two
images is where the blocks went, whatever became of the colours; and so it is for the maps.

torchvision's own that move the image alone are refused by name besides, wherever they stand: at a
low magnitude they move it by too little for a few draws to show.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from harmonizer_ext import defaults
from harmonizer_ext.data.tv_heatmap import Heatmap
from harmonizer_ext.random_numbers import RandomNumbers
from harmonizer_ext.trial import FAILURES

#: Sides of the pattern. A crop may need a larger one than the first.
_SIDES = (96, 256, 512)

#: Top and left of the blocks, in parts of the sides: no flip, turn or shift brings all of them to
#: places where there were blocks before.
_PLACES = ((0.06, 0.10), (0.10, 0.62), (0.34, 0.36), (0.46, 0.83), (0.62, 0.06), (0.85, 0.50))
_BLOCK = 0.08

#: Draws of a transform as it is, and with every probability at one.
_DRAWS, _DRAWS_OF_ALL = 16, 96

#: Part of what moved in the image that may lie elsewhere than in the map, by more than a pixel:
#: borders are resampled in two ways, and a blur spreads them.
_APART = 0.35


class _CannotTry(Exception):  # noqa: N818 - no error, and never seen outside
    """The transform does not take the pattern, which says nothing of others."""


# --- the pattern ----------------------------------------------------------------------------------


def _pattern(height: int, width: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Image (3, H, W) uint8 and map (1, H, W) float32, without and with the blocks."""
    generator = torch.Generator("cpu").manual_seed(0)
    shape = (1, height, width)
    noise = torch.randint(0, 256, shape, generator=generator, device="cpu", dtype=torch.float32)
    blocks = torch.zeros(shape, dtype=torch.bool, device="cpu")
    size_y, size_x = (max(2, round(_BLOCK * side)) for side in (height, width))
    for top, left in _PLACES:
        y, x = round(top * height), round(left * width)
        blocks[:, y : y + size_y, x : x + size_x] = True
    # All grey levels everywhere, so that what depends on them all depends little on the blocks.
    image = torch.where(blocks, noise / 4, noise)
    with_blocks = torch.where(blocks, 192 + noise / 4, noise)
    images = [x.expand(3, -1, -1).to(torch.uint8).contiguous() for x in (image, with_blocks)]
    maps = [torch.where(blocks, level, 20.0) for level in (20.0, 220.0)]
    return (images[0], maps[0]), (images[1], maps[1])


def _seeded(seed: int) -> None:
    # Not torch.manual_seed, which notes every call for a GPU that a worker never sees.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed)


def _applied(transform: Any, image: Tensor, heatmap: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    _seeded(seed)
    try:
        result = transform(tv_tensors.Image(image.clone()), Heatmap(heatmap.clone()))
    except FAILURES as error:
        raise _CannotTry from error
    return checked(result, image)


def checked(result: Any, image: Tensor) -> tuple[Tensor, Tensor]:
    """Image and map that a transform returned, as plain tensors of one size.

    Raises:
        ValueError: it returned something else.
    """
    pair = isinstance(result, (tuple, list)) and len(result) == 2
    if not pair or not all(isinstance(part, Tensor) and part.ndim == 3 for part in result):
        kinds = [type(part).__name__ for part in result] if pair else type(result).__name__
        raise ValueError(
            f"transform: expected one that returns an image (C, H, W) and a map (1, H, W), got "
            f"{kinds}; for several crops of an image apply it several times"
        )
    moved, heatmap = (part.as_subclass(Tensor) for part in result)
    if moved.shape[-2:] != heatmap.shape[-2:]:
        raise ValueError(
            f"transform: expected image and map of one size after the transform, got "
            f"{tuple(moved.shape)} and {tuple(heatmap.shape)} of {tuple(image.shape)}"
        )
    return moved, heatmap


# --- where the blocks went ------------------------------------------------------------------------


def _where(without: Tensor, with_blocks: Tensor) -> Tensor | None:
    """(H, W) bool, where two results differ by half of the most or more; None where nowhere."""
    if without.shape != with_blocks.shape:
        return None
    difference = (with_blocks.float() - without.float()).abs().mean(0).nan_to_num()
    largest = difference.amax()
    return difference > largest / 2 if largest > 0 else None


def _apart(image: Tensor, heatmap: Tensor | None) -> float:
    """Part of the image's blocks that the map has elsewhere, by more than a pixel."""
    if heatmap is None:
        return 1.0
    near = F.max_pool2d(heatmap[None, None].float(), 3, stride=1, padding=1)[0, 0] > 0
    return float((image & ~near).sum() / image.sum())


def _moves_apart(transform: Any, height: int, width: int, draws: int) -> tuple[bool, bool]:
    """Whether a draw moves image and map apart, and whether any showed where the blocks went."""
    without, with_blocks = _pattern(height, width)
    shown = False
    for seed in range(draws):
        plain = _applied(transform, *without, seed)
        blocks = _applied(transform, *with_blocks, seed)
        image, heatmap = (_where(a, b) for a, b in zip(plain, blocks, strict=True))
        if image is None:
            continue  # covered up, or black: nothing is seen in the image
        shown = True
        if _apart(image, heatmap) > _APART:
            return True, True
    return False, shown


# --- transforms within transforms -----------------------------------------------------------------


def _parts(transform: Any) -> Iterator[Any]:
    """A transform and those within it."""
    pending = [transform]
    while pending:
        part = pending.pop()
        yield part
        inner = getattr(part, "transforms", None)
        pending += list(inner) if isinstance(inner, (list, tuple)) else []
        pending += list(part.children()) if isinstance(part, nn.Module) else []


def _all_of_it(transform: Any) -> Any:
    """A copy in which nothing is left to chance that has a probability of its own."""
    whole = _copied(transform)
    if whole is transform:
        return whole
    for part in _parts(whole):
        p = getattr(part, "p", None)
        if isinstance(p, float) and 0 < p < 1:
            part.p = 1.0
        elif isinstance(part, v2.RandomChoice):
            part.p = [1 / len(part.transforms)] * len(part.transforms)
    return whole


def _copied(transform: Any) -> Any:
    """A copy, so that a transform that counts its calls goes on where it was."""
    try:
        return copy.deepcopy(transform)
    except (TypeError, RuntimeError, AttributeError, copy.Error):
        return transform


def _of_images_alone(transform: Any) -> str | None:
    """Name of one of torchvision's AutoAugment family: by how little it moves, it moves no map."""
    for part in _parts(transform):
        if type(part).__module__ == v2.AutoAugment.__module__:
            return type(part).__name__
    return None


def _of_the_first_version(transform: Any) -> str | None:
    """Name of a transform of torchvision's first version, which takes an image alone."""
    for part in _parts(transform):
        module = type(part).__module__
        if module.startswith("torchvision.transforms.") and ".v2" not in module:
            return type(part).__name__
    return None


# --- the proof ------------------------------------------------------------------------------------


def _refusal(transform: Callable[..., Any], what: str) -> ValueError:
    return ValueError(
        f"transform: expected one that moves image and map alike, got {transform!r}, {what}. "
        f"torchvision's AutoAugment, RandAugment, TrivialAugmentWide and AugMix move images alone: "
        f"use v2.RandomAffine, RandomPerspective or RandomRotation for geometry, v2.ColorJitter, "
        f"RandomPosterize, RandomSolarize or RandomEqualize for colours. A function of your own "
        f"must move both by the same draw"
    )


def _prove(transform: Callable[..., Any], height: int, width: int) -> None:
    seen = False
    for tried, draws in ((_copied(transform), _DRAWS), (_all_of_it(transform), _DRAWS_OF_ALL)):
        apart, shown = _moves_apart(tried, height, width, draws)
        seen = seen or shown
        if apart:
            raise _refusal(transform, "after which the map is not where its image is")
    if not seen:
        raise _refusal(transform, "which leaves nothing of the image to be seen")


def prove(transform: Callable[..., Any], size: tuple[int, int] | None = None) -> bool:
    """Refuses a transform that moves image and map apart; random numbers go on as before.

    Args:
        transform: of a ``tv_tensors.Image`` and a ``Heatmap``.
        size: height and width of what it will be given; None tries some.

    Returns:
        Whether it could be tried: False where it takes none of these sizes.

    Raises:
        ValueError: it moves them apart, or takes no two inputs, or returns something else.
    """
    old = _of_the_first_version(transform)
    if old is not None:
        raise ValueError(
            f"transform: expected one of torchvision.transforms.v2, which moves image and map "
            f"alike, got {old} of torchvision.transforms, which takes an image alone; v2 has one "
            f"of the same name"
        )
    alone = _of_images_alone(transform)
    if alone is not None:
        raise _refusal(transform, f"whose {alone} moves the image alone")
    numbers, threads = RandomNumbers(torch.device("cpu")), torch.get_num_threads()
    reason: BaseException | None = None
    # Images as small as these take longer by several threads, and much longer on a busy machine.
    torch.set_num_threads(1)
    try:
        with defaults.ordinary():
            for height, width in [size] if size else [(side, side) for side in _SIDES]:
                try:
                    _prove(transform, height, width)
                except _CannotTry as error:
                    reason = error.__cause__
                else:
                    return True
    finally:
        torch.set_num_threads(threads)
        numbers.put_back()
    if isinstance(reason, TypeError) and "argument" in str(reason):
        raise ValueError(
            f"transform: expected one that takes an image and its map, transform(image, heatmap), "
            f"got {transform!r}, which does not: {reason}"
        ) from reason
    return False
