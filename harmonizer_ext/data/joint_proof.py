"""Whether a transform moves a human map along with its image, shown by what it does to a pattern.

Some transforms move whatever is an image and leave everything else where it was, without a word.
So each is tried before it is used: on an image with some blocks in it and the same blocks in its
map, and once more without the blocks, by the same random numbers. What differs between the two
images is where the blocks went, whatever became of the colours; and so it is for the maps.

torchvision's own that move the image alone are refused by name besides, wherever they stand: at a
low magnitude they move it by too little for a few draws to show.
"""

from __future__ import annotations

import collections
import copy
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from harmonizer_ext import defaults
from harmonizer_ext.data import moved_pattern
from harmonizer_ext.data.moved_pattern import Pair, Shown
from harmonizer_ext.data.tv_heatmap import Heatmap
from harmonizer_ext.random_numbers import RandomNumbers
from harmonizer_ext.trial import FAILURES

#: Sides of the pattern, with the draws of a transform as it is and with every probability at one.
#: A crop may need a larger pattern than the first, and so may a blur.
_SIDES = ((96, (12, 72)), (256, (3, 12)), (512, (1, 3)))

#: The least side of a sample at whose size a transform is tried: blocks of fewer than three pixels
#: are no pattern.
LEAST_SIDE = 32

#: Draws at the size of a sample, and its pixels from which on they are fewer.
_DRAWS_AT_A_SAMPLE, _LARGE = 4, 2**19

#: Draws that must show a small shift, which one alone may seem to show; and draws that are looked
#: through for one in vain.
_SHIFTS, _VAIN = 3, 8

_AGAINST = (Shown.SHIFTED, Shown.APART, Shown.INVERTED)


class _CannotTry(Exception):  # noqa: N818 - no error, and never seen outside
    """The transform does not take the pattern, which says nothing of others."""


# --- one draw -------------------------------------------------------------------------------------


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


def _draw(transform: Any, pair: Pair, seed: int, little: bool) -> Shown:
    """The kind of what one draw shows; clear evidence against the transform is taken twice."""
    results = [_applied(transform, *inputs, seed) for inputs in pair]
    shown = moved_pattern.shown(results[0], results[1], min(pair[0][0].shape[-2:]), little)
    if shown not in _AGAINST:
        return shown
    return shown if _again(transform, pair, seed, results) else Shown.UNCLEAR


def _again(transform: Any, pair: Pair, seed: int, results: list[tuple[Tensor, Tensor]]) -> bool:
    """Whether a draw gives the same again: one with random numbers of its own draws anew."""
    for _ in range(3):
        for inputs, before in zip(pair, results, strict=True):
            for one, other in zip(before, _applied(transform, *inputs, seed), strict=True):
                if one.shape != other.shape:
                    return False
                if not torch.allclose(one.float(), other.float(), equal_nan=True):
                    return False
    return True


def _draws(transform: Any, pair: Pair, draws: int) -> collections.Counter[Shown]:
    """Counts of what the draws show, up to the one that decides against the transform."""
    counts: collections.Counter[Shown] = collections.Counter()
    for seed in range(draws):
        little = counts[Shown.AROUND] + counts[Shown.UNCLEAR] < _VAIN
        counts[_draw(transform, pair, seed, little)] += 1
        if _decides(counts, draws) is not None:
            break
    return counts


def _decides(counts: collections.Counter[Shown], draws: int) -> str | None:
    """The reason against a transform; None where there is none."""
    if counts[Shown.INVERTED]:
        return "after which the map is low where it was high"
    if counts[Shown.APART] or counts[Shown.SHIFTED] >= min(_SHIFTS, draws):
        return "after which the map is not where its image is"
    return None


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


def _prove(transform: Callable[..., Any], size: tuple[int, int], draws: tuple[int, int]) -> bool:
    """Whether some draw shows image and map together; False where none shows anything clear."""
    counts: collections.Counter[Shown] = collections.Counter()
    pair = moved_pattern.pattern(*size)
    for tried, number in zip((_copied(transform), _all_of_it(transform)), draws, strict=True):
        found = _draws(tried, pair, number)
        reason = _decides(found, number)
        if reason is not None:
            raise _refusal(transform, reason)
        counts += found
    if not counts.keys() - {Shown.NOTHING}:
        raise _refusal(transform, "which leaves nothing of the image to be seen")
    return counts[Shown.TOGETHER] + counts[Shown.AROUND] > 0


def _sizes(size: tuple[int, int] | None) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    if size is None:
        return [((side, side), draws) for side, draws in _SIDES]
    draws = max(1, min(_DRAWS_AT_A_SAMPLE, _DRAWS_AT_A_SAMPLE * _LARGE // (size[0] * size[1])))
    return [(size, (draws, draws))]


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
    reason, tried = None, False
    # Images as small as these take longer by several threads, and much longer on a busy machine.
    torch.set_num_threads(1)
    try:
        with defaults.ordinary():
            for (height, width), draws in _sizes(size):
                try:
                    clear = _prove(transform, (height, width), draws)
                except _CannotTry as error:
                    reason = error.__cause__
                else:
                    tried = True
                    if clear:
                        break
    finally:
        torch.set_num_threads(threads)
        numbers.put_back()
    if not tried and isinstance(reason, TypeError) and "argument" in str(reason):
        raise ValueError(
            f"transform: expected one that takes an image and its map, transform(image, heatmap), "
            f"got {transform!r}, which does not: {reason}"
        ) from reason
    return tried
