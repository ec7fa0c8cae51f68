"""Ceilings of synthetic participants of known reliability, and the centre-bias control."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from harmonizer_ext import alignment

stats = pytest.importorskip("scipy.stats", reason="scipy (extra: test) is the oracle here")


def random_maps(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def participants(seed: int, images: int, count: int, size: int, noise: float) -> torch.Tensor:
    """Maps that all see, with standard deviation 1, and each one's own noise."""
    common = random_maps(seed, images, 1, size, size)
    return common + noise * random_maps(seed + 1, images, count, size, size)


def spearman_of_normals(pearson: float) -> float:
    """Expected rank correlation of many pairs of normal variables."""
    return 6 / math.pi * math.asin(pearson / 2)


# ---------------------------------------------------------------------------- known reliability

# A mean of 40 lies beyond so many standard errors once in 2000 times; and its bootstrap is itself
# known to 1 / sqrt(2 * 40), 11 %.
SURE = 3.5


@pytest.mark.parametrize(("count", "splits"), [(4, 1000), (20, 40)])
@pytest.mark.parametrize("noise", [0.5, 2.0])
def test_ceiling_of_known_reliability(count: int, splits: int, noise: float) -> None:
    # The mean of k participants has variance 1 + noise^2 / k, of which halves share 1.
    halves = 1 / (1 + noise**2 / (count / 2))
    whole = 1 / (1 + noise**2 / count)
    maps = participants(0, 40, count, 24, noise)
    result = alignment.split_half_ceiling(maps, splits=splits)
    assert (result.maps, result.excluded) == (40, 0)
    expected = spearman_of_normals(halves)
    # The ranks of 576 pixels bring it closer to 0 by less than 1 / 576.
    assert abs(result.ceiling - expected) < SURE * result.standard_error + 2e-3
    assert 0 < result.standard_error < 0.02

    # Of Pearson, the correction for halves is exact.
    for brown, theory in ((False, halves), (True, whole)):
        linear = alignment.split_half_ceiling(
            maps, splits=splits, metric=alignment.pearson, spearman_brown=brown
        )
        assert abs(linear.ceiling - theory) < SURE * linear.standard_error + 2e-3
    assert whole - halves > 20 * linear.standard_error or noise == 0.5


def test_standard_error_of_the_ceiling() -> None:
    # Ceilings of 60 studies of 30 images each scatter as each one says of itself.
    studies = [
        alignment.split_half_ceiling(participants(2 * study + 10, 30, 4, 12, 1.0))
        for study in range(60)
    ]
    scatter = np.std([study.ceiling for study in studies], ddof=1)
    claimed = np.mean([study.standard_error for study in studies])
    # 60 studies give their scatter to 1 / sqrt(120), 9 %; four of them. And a bootstrap of 30
    # images is too small by 1 - sqrt(29 / 30), 2 %.
    assert claimed == pytest.approx(scatter, rel=0.38)


# ---------------------------------------------------------------------------- splits by hand


def scipy_ceiling(image: torch.Tensor, halves: list[tuple[int, ...]]) -> float:
    results = []
    for half in halves:
        others = [i for i in range(len(image)) if i not in half]
        first, second = image[list(half)].mean(0), image[others].mean(0)
        results.append(stats.spearmanr(first.flatten(), second.flatten()).statistic)
    return float(np.mean(results))


def test_few_participants_are_split_in_every_way_once() -> None:
    images = [participants(seed, 1, count, 9, 1.0)[0] for seed, count in ((0, 2), (2, 5), (4, 6))]
    result = alignment.split_half_ceiling(iter(images), splits=10)
    expected = [
        scipy_ceiling(images[0], [(0,)]),
        scipy_ceiling(images[1], list(itertools.combinations(range(5), 2))),
        scipy_ceiling(images[2], [c for c in itertools.combinations(range(6), 3) if 0 in c]),
    ]
    np.testing.assert_allclose(result.per_image.numpy(), expected, rtol=0, atol=1e-12)
    assert result.ceiling == pytest.approx(np.mean(expected), abs=1e-12)
    seen = []

    def counted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        seen.append(len(a))
        return alignment.spearman(a, b)

    alignment.split_half_ceiling(images, splits=10, metric=counted)
    assert seen == [1, 10, 10]


def test_many_participants_are_split_at_random() -> None:
    image = participants(6, 1, 9, 10, 1.0)  # 126 splits
    of_all = alignment.split_half_ceiling(image, splits=126).ceiling
    drawn = [alignment.split_half_ceiling(image, splits=125, seed=s).ceiling for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    halves = list(itertools.combinations(range(9), 4))
    each = [scipy_ceiling(image[0], [half]) for half in halves]
    assert of_all == pytest.approx(np.mean(each), abs=1e-12)
    # The mean of 125 draws; five of its standard errors.
    assert abs(drawn[0] - of_all) < 5 * np.std(each) / math.sqrt(125)


def test_images_without_agreement_are_excluded_and_counted() -> None:
    good = participants(8, 1, 4, 8, 1.0)[0]
    half_blank = good.clone()
    half_blank[:2] = 0.0  # one of its three splits has a constant half
    images = [good, good[:1], torch.zeros(4, 8, 8), half_blank, good[:0]]
    result = alignment.split_half_ceiling(images)
    assert (result.maps, result.excluded) == (2, 3)
    assert result.per_image.isnan().tolist() == [False, True, True, False, True]
    defined = [(0, 2), (0, 3)]
    assert result.per_image[3].item() == pytest.approx(
        scipy_ceiling(half_blank, defined), abs=1e-12
    )
    nothing = alignment.split_half_ceiling([])
    assert math.isnan(nothing.ceiling)
    assert nothing.maps == 0


def test_binary_clicks_keep_their_ties() -> None:
    clicks = (participants(9, 3, 7, 15, 1.0) > 1.2).to(torch.uint8)
    result = alignment.split_half_ceiling(clicks, splits=35)
    halves = list(itertools.combinations(range(7), 3))
    expected = [scipy_ceiling(image.double() * 12, halves) for image in clicks]  # / 3, / 4: whole
    np.testing.assert_allclose(result.per_image.numpy(), expected, rtol=0, atol=1e-12)


def test_equal_ratings_tie_in_whatever_order() -> None:
    # No sums of these three are equal but those of the same ratings, in other orders. Added as they
    # are, in float32, many would differ by a rounding.
    ratings = torch.tensor([0.1, 0.7, 3.3])
    chosen = torch.randint(3, (6, 20, 20), generator=torch.Generator().manual_seed(0))
    result = alignment.split_half_ceiling([ratings[chosen]])
    expected = []
    for half in itertools.combinations(range(6), 3):
        others = [i for i in range(6) if i not in half]
        # As often as each rating occurs in a half: exact numbers.
        sums = [
            sum((chosen[list(h)] == i).sum(0) * w for i, w in enumerate((1, 7, 33)))
            for h in (half, others)
        ]
        expected.append(stats.spearmanr(*(s.flatten() for s in sums)).statistic)
    assert result.ceiling == pytest.approx(np.mean(expected), abs=1e-12)


def test_another_metric() -> None:
    maps = participants(10, 2, 2, 32, 1.0)

    def quarter(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return alignment.spearman(*(alignment.reduce_resolution(x, 4) for x in (a, b)))

    result = alignment.split_half_ceiling(maps, metric=quarter)
    assert torch.equal(result.per_image, quarter(maps[:, 0], maps[:, 1]))


def test_ceiling_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="splits must be at least 1, got 0"):
        alignment.split_half_ceiling([], splits=0)
    with pytest.raises(ValueError, match=r"maps\[1\] must be maps of shape"):
        alignment.split_half_ceiling([torch.zeros(2, 4, 4), torch.zeros(4, 4)])


# ---------------------------------------------------------------------------- centre bias


def test_center_bias_leaves_the_image_itself_out() -> None:
    human = random_maps(11, 6, 16, 16).clamp(min=0)
    result = alignment.center_bias(human)
    expected = [
        stats.spearmanr(
            human[[j for j in range(6) if j != i]].mean(0).flatten(), human[i].flatten()
        )
        for i in range(6)
    ]
    np.testing.assert_allclose(
        result.values["spearman"].numpy(), [e.statistic for e in expected], rtol=0, atol=1e-12
    )
    # With itself in, unrelated maps would seem to predict one another.
    assert abs(result.summaries()["spearman"].mean) < 0.1
    assert alignment.spearman(human.mean(0).expand(6, 16, 16), human).mean() > 0.3


def test_center_bias_of_batches_is_that_of_the_whole() -> None:
    human = random_maps(12, 7, 32, 32).float()
    meter = alignment.AlignmentMeter(metrics=("dice", "pearson"), reducers=(1, 4))
    whole = alignment.center_bias(human, meter=meter)
    parts = alignment.center_bias(list(human[:, None].split(3)), meter=meter)
    assert set(whole.values) == {"dice", "pearson", "dice/4", "pearson/4"}
    # Sums of seven in another order, rounded to float32.
    torch.testing.assert_close(parts.values, whole.values, rtol=0, atol=1e-6)


def test_centred_maps_are_predicted_by_others() -> None:
    y, x = torch.meshgrid(*(torch.linspace(-2, 2, 20),) * 2, indexing="ij")
    centred = torch.exp(-(x**2) - y**2) + 0.01 * random_maps(13, 5, 20, 20)
    assert alignment.center_bias(centred).summaries()["spearman"].mean > 0.9


def test_center_bias_of_maps_that_are_not_finite() -> None:
    human = random_maps(14, 5, 8, 8)
    expected = alignment.center_bias(human[[0, 2, 4]]).values["spearman"]
    human[1, 2, 3] = math.nan
    human[3, 0, 0] = math.inf
    result = alignment.center_bias(human)
    assert result.summaries()["dice"].excluded == 2
    values = result.values["spearman"]
    assert values.isnan().tolist() == [False, True, False, True, False]
    torch.testing.assert_close(values[[0, 2, 4]], expected, rtol=0, atol=1e-12)
    assert result.summaries()["spearman"].excluded == 2


def test_center_bias_arguments_are_checked() -> None:
    def batches() -> Iterator[torch.Tensor]:
        yield torch.zeros(2, 8, 8)

    with pytest.raises(TypeError, match="can be iterated twice, got generator"):
        alignment.center_bias(batches())
    with pytest.raises(ValueError, match="two finite maps or more, got 1"):
        alignment.center_bias(torch.zeros(1, 8, 8))
    with pytest.raises(ValueError, match=r"all be of one size, got \(8, 8\) and \(9, 8\)"):
        alignment.center_bias([torch.zeros(2, 8, 8), torch.zeros(2, 9, 8)])
