"""Numbers per image to numbers per model: means, standard errors, ceilings, paired differences."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .metrics import spearman

CLICKME_CEILING = 0.65753
"""Spearman correlation between people on ImageNet ClickMe: what a perfect model would reach.

``HUMAN_SPEARMAN_CEILING`` of the released ``evaluation/clickme.py``; ``split_half_ceiling``
computes that of another data set.
"""


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
    For a data set that does not fit into memory there is ``AlignmentMeter``.

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
    _check_values("correlations", correlations)
    if not ceiling > 0:
        raise ValueError(f"ceiling must be positive, got {ceiling}")
    summary = summarize(correlations, resamples=resamples, seed=seed)
    return AlignmentScore(
        spearman=summary.mean,
        score=summary.mean / ceiling,
        standard_error=summary.standard_error / ceiling,
        maps=summary.maps,
        excluded=summary.excluded,
        ceiling=ceiling,
    )


@dataclass(frozen=True)
class MetricSummary:
    """One number per image, over a set of images.

    Attributes:
        mean: over the images that have one. NaN without any.
        standard_error: bootstrap standard error of the mean, over images. NaN below two.
        maps: number of images that went into the mean.
        excluded: number of images left out because their number is NaN.
    """

    mean: float
    standard_error: float
    maps: int
    excluded: int


@torch.no_grad()
def summarize(values: Tensor, *, resamples: int = 1000, seed: int = 0) -> MetricSummary:
    """Mean and bootstrap standard error of one number per image.

    Args:
        values: (n,), results of any metric; NaN entries are left out and counted.
        resamples: number of bootstrap resamples.
        seed: of the resampling; the same seed gives the same standard error.

    Raises:
        ValueError: ``values`` has not one dimension; ``resamples`` is not positive.
    """
    _check_values("values", values)
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    # On the CPU, so that a seed means the same on every machine.
    values = values.detach().cpu().double()
    defined = values[~values.isnan()]
    several = len(defined) > 1
    return MetricSummary(
        mean=defined.mean().item(),
        standard_error=_bootstrap(defined, resamples, seed) if several else math.nan,
        maps=len(defined),
        excluded=len(values) - len(defined),
    )


def _check_values(name: str, values: Tensor) -> None:
    if values.ndim != 1:
        raise ValueError(
            f"{name} must have the shape (n,), one number per image, got {tuple(values.shape)}; "
            "concatenate the results of several batches with torch.cat"
        )


def _bootstrap(values: Tensor, resamples: int, seed: int) -> float:
    """Standard deviation of the mean over samples drawn with replacement."""
    generator = torch.Generator("cpu").manual_seed(seed)
    size = len(values)
    rows = max(1, (1 << 22) // size)  # at most 32 MiB of indices at a time
    means = []
    for done in range(0, resamples, rows):
        shape = (min(rows, resamples - done), size)
        drawn = torch.randint(size, shape, generator=generator, device="cpu")
        means.append(values[drawn].mean(1))
    return torch.cat(means).std(correction=0).item()


@dataclass(frozen=True)
class AlignmentValues:
    """Every metric of every image, as ``AlignmentMeter.compute`` collects them.

    Attributes:
        values: by name, (n,) float64 on the CPU each. The name is that of the metric, with
            ``/4`` behind it at a quarter of the resolution.
        indices: (n,) ascending numbers of the images, or None where none were given.
    """

    values: dict[str, Tensor]
    indices: Tensor | None

    def summaries(self, *, resamples: int = 1000, seed: int = 0) -> dict[str, MetricSummary]:
        """Mean, standard error and counts, by the names of ``values``."""
        return {
            name: summarize(values, resamples=resamples, seed=seed)
            for name, values in self.values.items()
        }

    def score(
        self,
        *,
        ceiling: float = CLICKME_CEILING,
        name: str = "spearman",
        resamples: int = 1000,
        seed: int = 0,
    ) -> AlignmentScore:
        """``score_correlations`` of one of ``values``: ``"spearman"``, or at another resolution.

        Raises:
            KeyError: there are no such values.
            ValueError: ``ceiling`` or ``resamples`` is not positive.
        """
        return score_correlations(
            self.values[name], ceiling=ceiling, resamples=resamples, seed=seed
        )


def compare(
    first: AlignmentValues,
    second: AlignmentValues,
    *,
    name: str = "spearman",
    resamples: int = 1000,
    seed: int = 0,
) -> MetricSummary:
    """Difference between two models on the same images, with the standard error of the pairs.

    How hard an image is, is common to both models. The standard error of the differences is
    therefore smaller, often several times, than the errors of the two means suggest.

    Args:
        first: of one model.
        second: of the other, on the same images.
        name: which of their values.
        resamples: number of bootstrap resamples, over images.
        seed: of the resampling.

    Returns:
        The mean of first minus second, over the images where both are defined.

    Raises:
        KeyError: there are no such values.
        ValueError: they are not of the same images, as far as that can be seen: by their indices,
            or by their number where neither has any.
    """
    ours, theirs = first.values[name], second.values[name]
    if first.indices is None or second.indices is None:
        same = first.indices is None and second.indices is None and len(ours) == len(theirs)
    else:
        same = torch.equal(first.indices, second.indices)
    if not same:
        described = [
            f"{len(a.values[name])} {'without' if a.indices is None else 'with'} indices"
            for a in (first, second)
        ]
        raise ValueError(
            "first and second must be of the same images, got first: "
            f"{described[0]}, second: {described[1]}; give AlignmentMeter.update the images' "
            "indices to make sure"
        )
    return summarize(ours - theirs, resamples=resamples, seed=seed)
