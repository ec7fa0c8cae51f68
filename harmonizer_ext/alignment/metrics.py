"""Agreement of two batches of maps, pair by pair: Spearman, Pearson, Dice, IoU.

Spearman, Dice and IoU are those of the released package (``harmonization/evaluation/metrics.py``,
0.0.9), for whole batches of torch tensors on any device. Nothing here is differentiable.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .ranks import in_chunks, rank_correlation, widest

# Added to both denominators, as EPSILON of the released metrics.py: no pixel above either threshold
# gives 0 instead of 0 / 0.
_EPSILON = 1e-9


@torch.no_grad()
def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Spearman rank correlation of each pair of maps, ties sharing their mean rank.

    Equal to ``scipy.stats.spearmanr`` of the flattened maps. The released
    ``spearman_correlation`` rounds its maps to float32 first; here float64 maps are ranked as they
    are.

    Args:
        a: maps, (B, H, W) or (B, 1, H, W), any real dtype. Any scale: only the order counts.
        b: maps of the same B, H and W, in either form, on the same device.

    Returns:
        (B,) float64 (float32 on devices without it), between -1 and 1. NaN for a pair whose
        correlation is undefined: one of the maps is constant or holds a NaN.

    Raises:
        TypeError: an argument is no real tensor.
        ValueError: the shapes or devices do not fit.
    """
    a, b = checked_pair(a, b)
    return torch.cat([rank_correlation(*pair) for pair in in_chunks(a, b)])


@torch.no_grad()
def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation of each pair of maps.

    Equal to ``scipy.stats.pearsonr`` of the flattened maps; the released package has none.

    Args:
        a: maps, (B, H, W) or (B, 1, H, W), any real dtype.
        b: maps of the same B, H and W, in either form, on the same device.

    Returns:
        (B,) float64 (float32 on devices without it), between -1 and 1. NaN for a pair whose
        correlation is undefined: one of the maps is constant or holds a NaN or an infinity.

    Raises:
        TypeError: an argument is no real tensor.
        ValueError: the shapes or devices do not fit.
    """
    a, b = checked_pair(a, b)
    return torch.cat(
        [(_standard(x) * _standard(y)).sum(1).clamp(-1, 1) for x, y in in_chunks(a, b)]
    )


@torch.no_grad()
def dice(a: Tensor, b: Tensor, percentile: float = 10) -> Tensor:
    """Sorensen-Dice overlap of the strongest pixels of each pair of maps.

    As the released ``dice``: a pixel counts if it lies strictly above the map's threshold, which is
    the linearly interpolated quantile at ``1 - percentile / 100`` of the map in float32. With ties
    at the threshold fewer than ``percentile`` percent of the pixels count, none in a constant map.
    ``2 |A and B| / (|A| + |B| + 1e-9)``, hence 0 where no pixel counts.

    Args:
        a: maps, (B, H, W) or (B, 1, H, W), any real dtype.
        b: maps of the same B, H and W, in either form, on the same device.
        percentile: share of pixels to compare, in percent, between 0 and 100.

    Returns:
        (B,) float64 (float32 on devices without it), between 0 and 1. NaN for a pair that holds a
        NaN (the released function gives 0 there, which looks like a result).

    Raises:
        TypeError: a map is no real tensor.
        ValueError: the shapes or devices do not fit, or ``percentile`` lies outside of 0 to 100.
    """
    return overlap(a, b, percentile).dice()


@torch.no_grad()
def iou(a: Tensor, b: Tensor, percentile: float = 10) -> Tensor:
    """Intersection over union of the strongest pixels of each pair of maps.

    As the released ``intersection_over_union``: ``|A and B| / (|A or B| + 1e-9)``. Pixels are
    chosen as in ``dice``; NaN, arguments, result and errors are as there.
    """
    return overlap(a, b, percentile).iou()


@torch.no_grad()
def reduce_resolution(maps: Tensor, reducer: int) -> Tensor:
    """Maps at a fraction of their size, as the evaluation of the paper compared them.

    ``evaluation/metrics.py`` of the authors' first code (serre-lab/Harmonization-old) resizes both
    maps by ``tf.image.resize`` to ``int(H / reducer)`` before each metric, for reducers 1, 4
    and 16: bilinear interpolation **without** antialiasing. At 224x224 a pixel of the result is
    the mean of the middle 2x2 of its 4x4 or 16x16 pixels, not of all of them. Averaging over all
    is ``torch.nn.functional.avg_pool2d``. The released package compares at full size only.

    Args:
        maps: (B, H, W) or (B, 1, H, W), any real dtype.
        reducer: what height and width are divided by, rounded down. 1 gives the maps themselves.

    Returns:
        (B, H // reducer, W // reducer) float32. (There both sides are those of the height.)

    Raises:
        TypeError: ``maps`` is no real tensor.
        ValueError: the shape does not fit, or nothing would be left of it.
    """
    maps = checked_maps("maps", maps)
    if reducer == 1:
        return maps
    size = (maps.shape[1] // reducer, maps.shape[2] // reducer) if reducer >= 1 else (0, 0)
    if 0 in size:
        raise ValueError(
            f"reducer: expected 1 to {min(maps.shape[1:])} for maps of {maps.shape[1]}x"
            f"{maps.shape[2]} pixels, got {reducer}"
        )
    return F.interpolate(maps[:, None].float(), size, mode="bilinear").squeeze(1)


class Overlap(NamedTuple):
    """Pixels above the threshold, (B,) each: in both maps, in a, in b; which rows hold a NaN."""

    both: Tensor
    a: Tensor
    b: Tensor
    undefined: Tensor

    def dice(self) -> Tensor:
        score = 2 * self.both / (self.a + self.b + _EPSILON)
        return score.masked_fill(self.undefined, math.nan)

    def iou(self) -> Tensor:
        score = self.both / (self.a + self.b - self.both + _EPSILON)
        return score.masked_fill(self.undefined, math.nan)


@torch.no_grad()
def overlap(a: Tensor, b: Tensor, percentile: float) -> Overlap:
    """Counts that ``dice`` and ``iou`` are made of; arguments and errors are theirs."""
    if not 0 <= percentile <= 100:
        raise ValueError(
            f"percentile is the share of pixels to compare, 0 to 100, got {percentile}"
        )
    parts = [_overlap(x, y, percentile) for x, y in in_chunks(*checked_pair(a, b))]
    return Overlap(*map(torch.cat, zip(*parts, strict=True)))


def _overlap(a: Tensor, b: Tensor, percentile: float) -> Overlap:
    a, b = a.flatten(1).float(), b.flatten(1).float()
    above_a = a > _threshold(a, percentile)
    above_b = b > _threshold(b, percentile)
    dtype = widest(a.device)
    return Overlap(
        (above_a & above_b).sum(1).to(dtype),
        above_a.sum(1).to(dtype),
        above_b.sum(1).to(dtype),
        a.isnan().any(1) | b.isnan().any(1),
    )


def _threshold(flat: Tensor, percentile: float) -> Tensor:
    """``np.percentile(row, 100 - percentile)`` of each row, (B, 1).

    Interpolated in the dtype of the maps, as NumPy does: between neighbouring floats the rounding
    decides whether the upper one lies strictly above.
    """
    last = flat.shape[1] - 1
    position = last * (100 - percentile) / 100  # multiplied first: exact where it is whole
    lower = min(math.floor(position), last)
    # Selecting the pixels above and then the lowest two of them is three times as fast as sorting.
    top = flat.topk(last - lower + 1, 1, sorted=False).values
    ends = top.topk(min(2, top.shape[1]), 1, largest=False).values
    return torch.lerp(ends[:, :1], ends[:, -1:], position - lower)


def _standard(maps: Tensor) -> Tensor:
    """Rows (B, N) of mean 0 and length 1; of NaN where a map is constant or not finite."""
    flat = maps.flatten(1).to(widest(maps.device))
    constant = flat.amax(1, keepdim=True) == flat.amin(1, keepdim=True)
    centred = (flat - flat.mean(1, keepdim=True)).masked_fill(constant, 0)
    # Divided by the largest first: squares of very small values would vanish.
    centred = centred / centred.abs().amax(1, keepdim=True)
    return centred / centred.square().sum(1, keepdim=True).sqrt()


def checked_maps(name: str, maps: Tensor) -> Tensor:
    """Maps as (B, H, W).

    Raises:
        TypeError: they are no real tensor.
        ValueError: they have another shape.
    """
    if not isinstance(maps, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor of maps, got {type(maps).__name__}; "
            "torch.as_tensor converts an array"
        )
    if maps.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {maps.dtype}")
    single_channel = maps.ndim == 4 and maps.shape[1] == 1
    if not (maps.ndim == 3 or single_channel) or 0 in maps.shape[-2:]:
        raise ValueError(
            f"{name} must be maps of shape (B, H, W) or (B, 1, H, W), got {tuple(maps.shape)}; "
            "reduce channels first, for instance by maps.mean(1)"
        )
    return maps.detach().squeeze(1) if single_channel else maps.detach()


def checked_pair(
    a: Tensor, b: Tensor, names: tuple[str, str] = ("a", "b")
) -> tuple[Tensor, Tensor]:
    """Two batches of maps as (B, H, W) each.

    Raises:
        TypeError: one is no real tensor.
        ValueError: the shapes or devices do not fit.
    """
    first, second = checked_maps(names[0], a), checked_maps(names[1], b)
    if first.shape != second.shape:
        raise ValueError(
            f"{names[0]} and {names[1]} must be the same number of maps of the same size, got "
            f"{names[0]}: {tuple(a.shape)} and {names[1]}: {tuple(b.shape)}; resize one of them, "
            "for instance by torch.nn.functional.interpolate"
        )
    if a.device != b.device:
        raise ValueError(
            f"{names[0]} and {names[1]} must be on one device, got {names[0]}: {a.device} and "
            f"{names[1]}: {b.device}"
        )
    return first, second
