"""How far a model's importance maps agree with people's: Spearman, Dice, IoU, and their summary.

The metrics of the released package (``harmonization/evaluation/metrics.py`` and ``clickme.py``,
0.0.9), for whole batches of torch tensors on any device. Nothing here is differentiable.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "CLICKME_CEILING",
    "AlignmentScore",
    "alignment_score",
    "dice",
    "iou",
    "score_correlations",
    "spearman",
]

CLICKME_CEILING = 0.65753
"""Spearman correlation between people on ImageNet ClickMe: what a perfect model would reach.

``HUMAN_SPEARMAN_CEILING`` of the released ``evaluation/clickme.py``. Another data set has another.
"""

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
    flat_a, flat_b = _flat_pair(a, b)
    ranks_a, ranks_b = _centred_ranks(flat_a), _centred_ranks(flat_b)
    covariance = (ranks_a * ranks_b).sum(1)
    scale = ranks_a.square().sum(1).sqrt() * ranks_b.square().sum(1).sqrt()
    correlation = (covariance / scale).clamp(-1, 1)
    undefined = flat_a.isnan().any(1) | flat_b.isnan().any(1)
    return correlation.masked_fill(undefined, math.nan)


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
    both, count_a, count_b, undefined = _overlap(a, b, percentile)
    score = 2 * both / (count_a + count_b + _EPSILON)
    return score.masked_fill(undefined, math.nan)


@torch.no_grad()
def iou(a: Tensor, b: Tensor, percentile: float = 10) -> Tensor:
    """Intersection over union of the strongest pixels of each pair of maps.

    As the released ``intersection_over_union``: ``|A and B| / (|A or B| + 1e-9)``. Pixels are
    chosen as in ``dice``; NaN, arguments, result and errors are as there.
    """
    both, count_a, count_b, undefined = _overlap(a, b, percentile)
    score = both / (count_a + count_b - both + _EPSILON)
    return score.masked_fill(undefined, math.nan)


@dataclass(frozen=True)
class AlignmentScore:
    """Human alignment of a model on a set of images.

    Attributes:
        spearman: mean Spearman correlation over the pairs that have one.
        score: ``spearman / ceiling``; 1 is as close to people as people are to one another.
        standard_error: bootstrap standard error of ``score``, over images. NaN below two pairs.
        maps: number of pairs that went into the mean.
        excluded: number of pairs left out because their correlation is undefined: one of the
            maps is constant (a zero gradient, for instance) or holds a NaN.
        ceiling: the ceiling used.
    """

    spearman: float
    score: float
    standard_error: float
    maps: int
    excluded: int
    ceiling: float


def alignment_score(
    model_maps: Tensor,
    human_maps: Tensor,
    *,
    ceiling: float = CLICKME_CEILING,
    resamples: int = 1000,
    seed: int = 0,
) -> AlignmentScore:
    """Mean Spearman correlation between model and human maps, relative to the human ceiling.

    The ``alignment_score`` of the released ``evaluate_clickme``, except that there one undefined
    pair makes the score NaN; here such pairs are left out of the mean and counted in ``excluded``.
    For a data set that does not fit into memory collect ``spearman`` batch by batch and give all of
    them to ``score_correlations``.

    Args:
        model_maps: (B, H, W) or (B, 1, H, W). The released evaluation takes the largest absolute
            value over channels of the input gradient.
        human_maps: the same B, H and W, in either form, on the same device.
        ceiling: correlation between people, 0.65753 for ImageNet ClickMe (the default).
        resamples: number of bootstrap resamples.
        seed: of the resampling; the same seed gives the same standard error.

    Raises:
        TypeError: a map is no real tensor.
        ValueError: the shapes or devices do not fit; ``ceiling`` or ``resamples`` is not positive.
    """
    return score_correlations(
        spearman(model_maps, human_maps), ceiling=ceiling, resamples=resamples, seed=seed
    )


@torch.no_grad()
def score_correlations(
    correlations: Tensor,
    *,
    ceiling: float = CLICKME_CEILING,
    resamples: int = 1000,
    seed: int = 0,
) -> AlignmentScore:
    """Summarizes Spearman correlations that were collected over batches.

    Args:
        correlations: (n,) results of ``spearman``; NaN entries are left out and counted.
        ceiling: as in ``alignment_score``.
        resamples: as in ``alignment_score``.
        seed: as in ``alignment_score``.

    Returns:
        The summary. Without any defined correlation its three numbers are NaN and ``maps`` is 0.

    Raises:
        ValueError: ``correlations`` has not one dimension; ``ceiling`` or ``resamples`` is not
            positive.
    """
    if correlations.ndim != 1:
        raise ValueError(
            f"correlations must have the shape (n,), got {tuple(correlations.shape)}; "
            "concatenate the results of spearman() with torch.cat"
        )
    if not ceiling > 0:
        raise ValueError(f"ceiling must be positive, got {ceiling}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    # On the CPU, so that a seed means the same on every machine.
    values = correlations.detach().cpu().double()
    defined = values[~values.isnan()]
    mean = defined.mean().item()
    error = _bootstrap_standard_error(defined, resamples, seed) if len(defined) > 1 else math.nan
    return AlignmentScore(
        spearman=mean,
        score=mean / ceiling,
        standard_error=error / ceiling,
        maps=len(defined),
        excluded=len(values) - len(defined),
        ceiling=ceiling,
    )


def _bootstrap_standard_error(values: Tensor, resamples: int, seed: int) -> float:
    """Standard deviation of the mean over samples drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    size = len(values)
    rows = max(1, (1 << 22) // size)  # at most 32 MiB of indices at a time
    means = [
        values[torch.randint(size, (min(rows, resamples - done), size), generator=generator)].mean(
            1
        )
        for done in range(0, resamples, rows)
    ]
    return torch.cat(means).std(correction=0).item()


def _centred_ranks(flat: Tensor) -> Tensor:
    """Twice the midranks (B, N) minus their mean, exact integers.

    A value's midrank is the mean of the positions it could take in the sorted row: (number below +
    number not above + 1) / 2. Doubled and centred it is below + not above - N, and a constant row
    is exactly zero.
    """
    ordered = flat.sort(1).values
    below = torch.searchsorted(ordered, flat)
    not_above = torch.searchsorted(ordered, flat, right=True)
    return (below + not_above - flat.shape[1]).to(_widest(flat.device))


def _overlap(a: Tensor, b: Tensor, percentile: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts (B,) of the pixels above the threshold in both maps, in a and in b; rows with NaN."""
    if not 0 <= percentile <= 100:
        raise ValueError(
            f"percentile is the share of pixels to compare, 0 to 100, got {percentile}"
        )
    flat_a, flat_b = (flat.float() for flat in _flat_pair(a, b))
    above_a = flat_a > _threshold(flat_a, percentile)
    above_b = flat_b > _threshold(flat_b, percentile)
    dtype = _widest(flat_a.device)
    undefined = flat_a.isnan().any(1) | flat_b.isnan().any(1)
    return (
        (above_a & above_b).sum(1).to(dtype),
        above_a.sum(1).to(dtype),
        above_b.sum(1).to(dtype),
        undefined,
    )


def _threshold(flat: Tensor, percentile: float) -> Tensor:
    """``np.percentile(row, 100 - percentile)`` of each row, (B, 1).

    Interpolated in the dtype of the maps, as NumPy does: between neighbouring floats the rounding
    decides whether the upper one lies strictly above.
    """
    last = flat.shape[1] - 1
    position = last * (100 - percentile) / 100  # multiplied first: exact where it is whole
    lower = min(math.floor(position), last)
    upper = min(lower + 1, last)
    ordered = flat.sort(1).values
    return torch.lerp(ordered[:, lower, None], ordered[:, upper, None], position - lower)


def _flat_pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Checks two batches of maps and flattens them to (B, H W)."""
    for name, maps in (("a", a), ("b", b)):
        if not isinstance(maps, Tensor):
            raise TypeError(
                f"{name} must be a torch.Tensor of maps, got {type(maps).__name__}; "
                "torch.as_tensor converts an array"
            )
        if maps.is_complex():
            raise TypeError(f"{name} must hold real numbers, got {maps.dtype}")
    flat = []
    for name, maps in (("a", a), ("b", b)):
        single_channel = maps.ndim == 4 and maps.shape[1] == 1
        if not (maps.ndim == 3 or single_channel) or 0 in maps.shape[-2:]:
            raise ValueError(
                f"{name} must be maps of shape (B, H, W) or (B, 1, H, W), got a: "
                f"{tuple(a.shape)} and b: {tuple(b.shape)}; reduce channels first, for instance "
                "by maps.mean(1)"
            )
        flat.append(maps.squeeze(1) if single_channel else maps)
    if flat[0].shape != flat[1].shape:
        raise ValueError(
            "a and b must be the same number of maps of the same size, got a: "
            f"{tuple(a.shape)} and b: {tuple(b.shape)}; resize one of them, for instance by "
            "torch.nn.functional.interpolate"
        )
    if a.device != b.device:
        raise ValueError(f"a and b must be on one device, got a: {a.device} and b: {b.device}")
    first, second = (
        (maps.float() if _is_half_or_bool(maps) else maps).detach().flatten(1) for maps in flat
    )
    return first, second


def _is_half_or_bool(maps: Tensor) -> bool:
    # Exact in float32, and not every sorting operation takes them.
    return maps.dtype in (torch.bool, torch.float16, torch.bfloat16)


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
