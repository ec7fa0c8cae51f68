"""The ceiling of a model, people's agreement among themselves, and the baseline it must beat."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .meter import AlignmentMeter
from .metrics import checked_maps, spearman
from .ranks import widest
from .scores import AlignmentValues, summarize


@dataclass(frozen=True)
class Ceiling:
    """Agreement between halves of the participants.

    Attributes:
        ceiling: mean over images: the argument ``ceiling`` of the scores.
        standard_error: bootstrap standard error of ``ceiling``, over images. NaN below two.
        maps: number of images that went into the mean.
        excluded: number of images left out: fewer than two participants, or no split whose halves
            both have a defined metric.
        per_image: (maps + excluded,) float64, mean over splits; NaN where excluded.
    """

    ceiling: float
    standard_error: float
    maps: int
    excluded: int
    per_image: Tensor


@torch.no_grad()
def split_half_ceiling(
    maps: Iterable[Tensor],
    *,
    splits: int = 1000,
    metric: Callable[[Tensor, Tensor], Tensor] = spearman,
    spearman_brown: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> Ceiling:
    """Inter-rater alignment: how well half of the participants predict the other half.

    The paper's "mean split-half correlation across 1000 random splits of the participant pool"
    (section 4.1), which is 0.65753 for ImageNet ClickMe. For each image its participants are split
    at random into two halves (of an odd number, one half has one more), the maps of each half are
    averaged, and the two means compared; the mean over splits is the image's agreement, and the
    mean over images the ceiling. So does the lab's ``compute_human_ceiling_split_half.py``
    (serre-lab/human_clickme_data_processing; its later ``ceiling_floor_estimate.py`` draws each
    half up to the full number again, with replacement). Where an image has no more than ``splits``
    different splits, each is taken once: what more and more random ones tend to.

    Halves agree less than the whole with another whole would, so that a model may exceed this
    ceiling. The paper mentions no correction for it.

    Blurred maps agree better than clicks: give maps as the model will be compared with. For a
    progress bar wrap the images: ``split_half_ceiling(tqdm(images))``.

    Args:
        maps: for each image, in turn, its participants' maps (participants, H, W), on any device.
            A tensor (images, participants, H, W) will do, and so will a generator, which is read
            once. Numbers of participants and sizes may differ between images.
        splits: number of splits of each image.
        metric: from two batches (B, H, W) to (B,). For a ceiling at another resolution, call
            ``reduce_resolution`` in it.
        spearman_brown: whether to extrapolate each image's agreement r from halves to all
            participants, 2 r / (1 + r). A correction for means of independent ratings, which
            was derived for Pearson's correlation; the paper mentions none.
        resamples: number of bootstrap resamples, over images.
        seed: of splits and resampling.

    Raises:
        TypeError: an image's maps are no real tensor.
        ValueError: an image's maps have another shape; ``splits`` or ``resamples`` is not positive.
    """
    if splits < 1:
        raise ValueError(f"splits must be at least 1, got {splits}")
    generator = torch.Generator("cpu").manual_seed(seed)
    agreements: list[float] = []
    for number, image in enumerate(maps):
        image = checked_maps(f"maps[{number}]", image)
        halves = _splits(len(image), splits, generator)
        agreements.append(_agreement(image, halves, metric) if len(halves) else math.nan)
    per_image = torch.tensor(agreements, dtype=torch.float64, device="cpu")
    if spearman_brown:
        per_image = 2 * per_image / (1 + per_image)
    summary = summarize(per_image, resamples=resamples, seed=seed)
    return Ceiling(
        ceiling=summary.mean,
        standard_error=summary.standard_error,
        maps=summary.maps,
        excluded=summary.excluded,
        per_image=per_image,
    )


def _splits(participants: int, splits: int, generator: torch.Generator) -> Tensor:
    """Draws the first halves: (splits, participants) float64, 1 for those that are in it."""
    half = participants // 2
    if half == 0:
        return torch.empty(0, participants, dtype=torch.float64, device="cpu")
    even = participants % 2 == 0  # then each split has a twin, with its halves exchanged
    if math.comb(participants, half) // (2 if even else 1) <= splits:
        chosen = itertools.combinations(range(participants), half)
        first = torch.tensor([c for c in chosen if not even or c[0] == 0], device="cpu")
    else:
        draws = torch.rand(
            splits, participants, generator=generator, dtype=torch.float32, device="cpu"
        )
        first = draws.argsort(1)[:, :half]
    members = torch.zeros(len(first), participants, dtype=torch.float64, device="cpu")
    return members.scatter_(1, first, 1)


def _agreement(
    image: Tensor, first_halves: Tensor, metric: Callable[[Tensor, Tensor], Tensor]
) -> float:
    """Mean of the metric over splits, undefined ones left out."""
    dtype = image.dtype if image.is_floating_point() else torch.float32
    # Summed in float64 and rounded after: pixels with the same clicks keep the same value, in
    # whatever order a sum is taken.
    flat = image.flatten(1).to(widest(image.device))
    members = first_halves.to(flat)
    results = []
    for chosen in members.split(max(1, (1 << 22) // flat.shape[1])):
        halves = [
            (half @ flat / half.sum(1, keepdim=True)).to(dtype).unflatten(1, image.shape[1:])
            for half in (chosen, 1 - chosen)
        ]
        results.append(metric(*halves))
    return torch.cat(results).nanmean().item()


@torch.no_grad()
def center_bias(
    human_maps: Tensor | Iterable[Tensor], *, meter: AlignmentMeter | None = None
) -> AlignmentValues:
    """The control for centre bias: each image's map predicted by the mean map of all others.

    People photograph things in the middle of the picture. What knows that and nothing of the image
    reaches this level; a model that does not exceed it has not been shown to look where people
    look. The image's own map is left out of its prediction, which would otherwise know a little of
    what it predicts.

    Args:
        human_maps: (n, H, W) or (n, 1, H, W); or batches of these, all of one size, in anything
            that can be iterated twice, such as a list or a ``DataLoader`` that does not shuffle.
        meter: what to measure; it is reset. None is ``AlignmentMeter()``. Nothing is gathered from
            other processes: each one needs all maps.

    Returns:
        What a model's ``AlignmentMeter.compute`` returns: score and compare it likewise. A map
        that is not finite is in nobody's mean, and excluded itself.

    Raises:
        TypeError: ``human_maps`` can be iterated only once, or holds no real tensor.
        ValueError: the shapes do not fit, or fewer than two maps are finite.
    """
    if isinstance(human_maps, Iterator):
        raise TypeError(
            "human_maps must be a tensor or something that can be iterated twice, got "
            f"{type(human_maps).__name__}; list(...) makes one"
        )
    batches = [human_maps] if isinstance(human_maps, Tensor) else human_maps
    total: Tensor | None = None
    count = 0
    for batch in batches:
        batch = checked_maps("human_maps", batch)
        finite = batch[_is_finite(batch)].to(widest(batch.device))
        if total is not None and total.shape != finite.shape[1:]:
            raise ValueError(
                f"human_maps must all be of one size, got {tuple(total.shape)} and "
                f"{tuple(finite.shape[1:])}"
            )
        total = finite.sum(0) if total is None else total + finite.sum(0)
        count += len(finite)
    if total is None or count < 2:
        raise ValueError(f"human_maps must be two finite maps or more, got {count}")
    meter = meter or AlignmentMeter()
    meter.reset()
    for batch in batches:
        batch = checked_maps("human_maps", batch)
        dtype = batch.dtype if batch.is_floating_point() else torch.float32
        others = ((total - batch.to(total)) / (count - 1)).masked_fill(
            ~_is_finite(batch)[:, None, None], math.nan
        )
        # Rounded, so that pixels of equal means are equal again.
        meter.update(others.to(dtype), batch)
    return meter.compute(gather=False)


def _is_finite(maps: Tensor) -> Tensor:
    return maps.flatten(1).isfinite().all(1)
