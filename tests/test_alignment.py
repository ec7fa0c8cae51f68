"""Alignment metrics against scipy, NumPy by hand, and the authors' released code."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import numpy as np
import pytest
import released
import torch

from harmonizer_ext import alignment

stats = pytest.importorskip("scipy.stats", reason="scipy (extra: test) is the oracle here")

# Ranks and their sums are whole numbers, exact in float64; what remains is scipy's own rounding
# (Pearson on ranks of up to 5e4 pixels), some 1e-15.
RANK_TOLERANCE = 1e-12


def random_maps(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scipy_spearman(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    return np.array(
        [
            stats.spearmanr(x.flatten(), y.flatten()).statistic
            for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True)
        ]
    )


# ---------------------------------------------------------------------------- spearman


def test_spearman_by_hand() -> None:
    # Without ties 1 - 6 sum d^2 / (n (n^2 - 1)): d = (1, -1, 0, 0), so 1 - 12 / 60.
    a = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    b = torch.tensor([[[20.0, 10.0], [30.0, 1000.0]]])
    assert alignment.spearman(a, b).tolist() == pytest.approx([0.8], abs=1e-15)
    # Midranks (1.5, 1.5, 3, 4) against (1, 2, 3, 4): 4.5 / sqrt(4.5 * 5).
    tied = torch.tensor([[[7.0, 7.0], [8.0, 9.0]]])
    assert alignment.spearman(tied, a).tolist() == pytest.approx([math.sqrt(0.9)], abs=1e-15)


def test_spearman_equals_scipy_on_random_maps() -> None:
    a, b = random_maps(0, 5, 31, 33), random_maps(1, 5, 31, 33)
    b = b + a * torch.tensor([-3.0, -0.3, 0.0, 0.3, 3.0])[:, None, None]
    np.testing.assert_allclose(
        alignment.spearman(a, b).numpy(), scipy_spearman(a, b), rtol=0, atol=RANK_TOLERANCE
    )


@pytest.mark.parametrize("levels", [2, 3, 10])
def test_spearman_equals_scipy_with_heavy_ties(levels: int) -> None:
    a = (random_maps(2, 6, 24, 17) * levels / 4).round()
    b = (
        (random_maps(3, 6, 24, 17) * levels / 4 + a).round().clamp(min=0)
    )  # as a cut map: half zeros
    assert len(torch.unique(b)) <= 3 * levels
    np.testing.assert_allclose(
        alignment.spearman(a, b).numpy(), scipy_spearman(a, b), rtol=0, atol=RANK_TOLERANCE
    )


def test_spearman_at_full_resolution() -> None:
    a, b = random_maps(4, 2, 224, 224), random_maps(5, 2, 224, 224)
    b = (a + b).clamp(min=0)
    np.testing.assert_allclose(
        alignment.spearman(a, b).numpy(), scipy_spearman(a, b), rtol=0, atol=RANK_TOLERANCE
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_spearman_of_every_dtype(dtype: torch.dtype) -> None:
    # Rounding to the dtype makes ties; the oracle gets the rounded maps.
    a, b = random_maps(6, 3, 20, 21).to(dtype), random_maps(7, 3, 20, 21)
    b = (b + a.double()).to(dtype)
    np.testing.assert_allclose(
        alignment.spearman(a, b).numpy(), scipy_spearman(a, b), rtol=0, atol=RANK_TOLERANCE
    )


def test_spearman_of_integers_bools_and_mixed_dtypes() -> None:
    a, b = random_maps(8, 2, 9, 9), random_maps(9, 2, 9, 9)
    mask = a > 0.3
    expected = scipy_spearman(mask, b)
    for maps in (mask, mask.long(), mask.to(torch.uint8), mask.half()):
        np.testing.assert_allclose(
            alignment.spearman(maps, b).numpy(), expected, rtol=0, atol=RANK_TOLERANCE
        )


def test_spearman_depends_on_order_alone() -> None:
    a, b = random_maps(10, 2, 16, 16), random_maps(11, 2, 16, 16)
    expected = alignment.spearman(a, b)
    assert torch.equal(alignment.spearman(a.exp() * 1e-30, b), expected)
    assert torch.equal(alignment.spearman(b, a), expected)
    assert torch.equal(alignment.spearman(-a, b), -expected)
    assert torch.equal(alignment.spearman(a, a), torch.ones(2, dtype=torch.float64))


def test_negative_zero_ties_with_zero() -> None:
    a = torch.tensor([[[0.0, -0.0, 1.0, -1.0]]])
    plain = torch.tensor([[[0.0, 0.0, 1.0, -1.0]]])
    b = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    assert torch.equal(alignment.spearman(a, b), alignment.spearman(plain, b))


def test_undefined_spearman_is_nan_in_its_row_only() -> None:
    a, b = random_maps(12, 4, 8, 8), random_maps(13, 4, 8, 8)
    expected = alignment.spearman(a, b)
    a[1] = 0.3
    b[2, 3, 3] = math.nan
    result = alignment.spearman(a, b)
    assert result.isnan().tolist() == [False, True, True, False]
    assert torch.equal(result[[0, 3]], expected[[0, 3]])


def test_no_graph_is_kept() -> None:
    a = random_maps(14, 2, 8, 8).requires_grad_()
    assert not alignment.spearman(a, a.detach()).requires_grad
    assert not alignment.dice(a, a.detach()).requires_grad


# ---------------------------------------------------------------------------- dice and iou


def numpy_overlap(
    a: torch.Tensor, b: torch.Tensor, percentile: float
) -> tuple[list[float], list[float]]:
    dices, ious = [], []
    for x, y in zip(a.float().numpy(), b.float().numpy(), strict=True):
        x = x > np.percentile(x, 100 - percentile)
        y = y > np.percentile(y, 100 - percentile)
        union = (x | y).sum()
        dices.append(2 * (x & y).sum() / (x.sum() + y.sum()) if union else 0.0)
        ious.append((x & y).sum() / union if union else 0.0)
    return dices, ious


# The pixel counts are exact; the 1e-9 in the denominator moves a ratio by at most 1e-9.
RATIO_TOLERANCE = 2e-9


def test_dice_and_iou_by_hand() -> None:
    # 20 pixels, the top 10 percent: the quantile at 0.9 * 19 = 17.1 leaves two pixels above.
    a = torch.arange(20.0).reshape(1, 4, 5)
    b = a.clone()
    b[0, 3, 3], b[0, 3, 4], b[0, 0, 0] = 19.0, -1.0, 18.0  # its top two: pixels 18 and 0
    assert alignment.dice(a, b).tolist() == pytest.approx([0.5], abs=RATIO_TOLERANCE)
    assert alignment.iou(a, b).tolist() == pytest.approx([1 / 3], abs=RATIO_TOLERANCE)
    # Twenty percent: 0.8 * 19 = 15.2, four pixels above: 16..19 against 18, 0, 17, 16.
    assert alignment.dice(a, b, percentile=20).tolist() == pytest.approx([0.75], abs=1e-8)
    assert alignment.iou(a, b, percentile=20).tolist() == pytest.approx([0.6], abs=1e-8)


@pytest.mark.parametrize("percentile", [0, 1, 5, 10, 12.5, 25, 50, 90, 100])
@pytest.mark.parametrize("shape", [(31, 33), (41, 41), (11, 1), (1, 1)])
def test_dice_and_iou_equal_numpy(percentile: float, shape: tuple[int, int]) -> None:
    a, b = random_maps(15, 4, *shape), random_maps(16, 4, *shape)
    b = (a + b).float().double()
    b[1] = (b[1] * 2).round()  # ties at the threshold
    b[2] = 1.0  # no pixel is above it
    dices, ious = numpy_overlap(a, b, percentile)
    dice = alignment.dice(a, b, percentile=percentile)
    iou = alignment.iou(a, b, percentile=percentile)
    np.testing.assert_allclose(dice.numpy(), dices, rtol=0, atol=RATIO_TOLERANCE)
    np.testing.assert_allclose(iou.numpy(), ious, rtol=0, atol=RATIO_TOLERANCE)
    assert dice[2] == 0
    assert iou[2] == 0


@pytest.mark.parametrize("percentile", [10, 33, 50, 72])  # weights 0.1, 0.33, 0.5, 0.28
def test_threshold_between_neighbouring_floats(percentile: float) -> None:
    # A result that rounds to the upper neighbour leaves it out, one that rounds to the lower one
    # counts it; float64 would always count it.
    values = np.float32(0.1) + np.arange(1200, dtype=np.float32) * np.spacing(np.float32(0.1))
    rows = np.stack([np.roll(values[start : start + 1000], 5 * start) for start in range(200)])
    maps = torch.tensor(rows).reshape(-1, 10, 100)
    other = random_maps(35, *maps.shape)
    expected = numpy_overlap(maps, other, percentile)[1]
    result = alignment.iou(maps, other, percentile)
    np.testing.assert_allclose(result.numpy(), expected, rtol=0, atol=RATIO_TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dice_and_iou_of_every_dtype(dtype: torch.dtype) -> None:
    a, b = random_maps(17, 3, 20, 20).to(dtype), random_maps(18, 3, 20, 20).to(dtype)
    dices, ious = numpy_overlap(a, b, 10)
    np.testing.assert_allclose(alignment.dice(a, b).numpy(), dices, rtol=0, atol=RATIO_TOLERANCE)
    np.testing.assert_allclose(alignment.iou(a, b).numpy(), ious, rtol=0, atol=RATIO_TOLERANCE)


def test_a_nan_makes_its_row_nan() -> None:
    a, b = random_maps(19, 3, 8, 8), random_maps(20, 3, 8, 8)
    a[1, 2, 2] = math.nan
    assert alignment.dice(a, b).isnan().tolist() == [False, True, False]
    assert alignment.iou(b, a).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("percentile", [-1, 100.5, math.nan])
def test_percentile_out_of_range(percentile: float) -> None:
    a = random_maps(21, 1, 4, 4)
    with pytest.raises(ValueError, match="percentile is the share of pixels"):
        alignment.dice(a, a, percentile=percentile)


# ---------------------------------------------------------------------------- shapes


Metric = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
METRICS = [alignment.spearman, alignment.dice, alignment.iou]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("batch", [1, 3])
def test_channel_axis_is_optional_on_either_side(metric: Metric, batch: int) -> None:
    a, b = random_maps(22, batch, 12, 10), random_maps(23, batch, 12, 10)
    expected = metric(a, b)
    assert expected.shape == (batch,)
    assert expected.dtype == torch.float64
    for pair in ((a[:, None], b), (a, b[:, None]), (a[:, None], b[:, None])):
        assert torch.equal(metric(*pair), expected)
    strided = torch.empty(batch, 10, 12).double().transpose(1, 2).copy_(a)
    assert not strided.is_contiguous()
    assert torch.equal(metric(strided, b), expected)


@pytest.mark.parametrize("metric", METRICS)
def test_empty_batch(metric: Metric) -> None:
    assert metric(torch.empty(0, 8, 8), torch.empty(0, 1, 8, 8)).shape == (0,)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("shape_a", "shape_b"),
    [
        ((2, 8, 8), (3, 8, 8)),
        ((2, 8, 8), (2, 8, 9)),
        ((2, 3, 8, 8), (2, 1, 8, 8)),
        ((8, 8), (8, 8)),
        ((2, 1, 1, 8, 8), (2, 8, 8)),
        ((2, 0, 8), (2, 0, 8)),
    ],
)
def test_misfits_are_named_with_both_shapes(
    metric: Metric, shape_a: tuple[int, ...], shape_b: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="must be ") as error:
        metric(torch.zeros(shape_a), torch.zeros(shape_b))
    assert str(shape_a) in str(error.value)
    assert str(shape_b) in str(error.value)


def test_wrong_types_are_named() -> None:
    maps = torch.zeros(1, 4, 4)
    with pytest.raises(TypeError, match=r"b must be a torch\.Tensor of maps, got ndarray"):
        alignment.spearman(maps, np.zeros((1, 4, 4)))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a must hold real numbers"):
        alignment.dice(maps.to(torch.complex64), maps)
    with pytest.raises(ValueError, match="on one device, got a: cpu and b: meta"):
        alignment.spearman(maps, maps.to("meta"))


# ---------------------------------------------------------------------------- the score


def test_alignment_score_excludes_and_counts_undefined_pairs() -> None:
    model, human = random_maps(24, 6, 16, 16), random_maps(25, 6, 16, 16)
    human = human + model
    model[2] = 0.0
    human[4] = 1.0
    kept = [0, 1, 3, 5]
    mean = scipy_spearman(model[kept], human[kept]).mean()
    score = alignment.alignment_score(model[:, None], human)
    assert score.maps == 4
    assert score.excluded == 2
    assert score.ceiling == 0.65753
    assert score.spearman == pytest.approx(mean, abs=RANK_TOLERANCE)
    assert score.score == pytest.approx(mean / 0.65753, abs=2 * RANK_TOLERANCE)
    other = alignment.alignment_score(model, human, ceiling=0.44223)
    assert other.score == pytest.approx(mean / 0.44223, abs=4 * RANK_TOLERANCE)


@pytest.mark.parametrize("count", [50, 20000])
def test_standard_error_is_that_of_the_mean(count: int) -> None:
    values = torch.tanh(random_maps(26, count))
    result = alignment.score_correlations(values, ceiling=0.5, resamples=1000)
    expected = values.std(correction=0).item() / math.sqrt(count) / 0.5
    # A standard deviation estimated from R resamples varies by 1 / sqrt(2 R), 2.2 %; five of them.
    assert result.standard_error == pytest.approx(expected, rel=0.112)


def test_standard_error_follows_its_seed() -> None:
    values = random_maps(27, 40)
    errors = [alignment.score_correlations(values, seed=seed).standard_error for seed in (0, 0, 1)]
    assert errors[0] == errors[1] != errors[2]
    shuffled_state = torch.random.get_rng_state()
    alignment.score_correlations(values)
    assert torch.equal(torch.random.get_rng_state(), shuffled_state)  # the global one is untouched


def test_batches_summarize_to_the_whole() -> None:
    model, human = random_maps(28, 6, 8, 8), random_maps(29, 6, 8, 8)
    parts = torch.cat([alignment.spearman(model[i : i + 2], human[i : i + 2]) for i in (0, 2, 4)])
    assert alignment.score_correlations(parts) == alignment.alignment_score(model, human)


def test_one_pair_has_no_standard_error_and_none_has_no_score() -> None:
    model, human = random_maps(30, 1, 8, 8), random_maps(31, 1, 8, 8)
    one = alignment.alignment_score(model, human)
    assert math.isnan(one.standard_error)
    assert one.maps == 1
    assert not math.isnan(one.score)
    none = alignment.alignment_score(model * 0, human)
    assert math.isnan(none.score)
    assert math.isnan(none.spearman)
    assert (none.maps, none.excluded) == (0, 1)


def test_score_arguments_are_checked() -> None:
    values = random_maps(32, 4)
    with pytest.raises(ValueError, match="ceiling must be positive, got 0"):
        alignment.score_correlations(values, ceiling=0)
    with pytest.raises(ValueError, match="resamples must be at least 1, got 0"):
        alignment.score_correlations(values, resamples=0)
    with pytest.raises(ValueError, match=r"shape \(n,\), got \(2, 2\)"):
        alignment.score_correlations(values.reshape(2, 2))


# ---------------------------------------------------------------------------- the released code


def test_all_metrics_equal_the_released_code() -> None:
    reason = released.why_not()
    if reason is not None:
        pytest.skip(reason)
    code = released.load()
    a, b = random_maps(33, 6, 64, 48).float(), random_maps(34, 6, 64, 48).float()
    b = b + a
    b[1] = b[1].clamp(min=0)  # half of the pixels tied at zero
    b[2] = b[2].round()
    b[3] = (b[3] > 2).float()  # fewer than ten percent are above zero
    b[4] *= 1e-7
    pair = (a.numpy(), b.numpy())
    np.testing.assert_allclose(
        alignment.spearman(a, b).numpy(),
        code.spearman_correlation(*pair),
        rtol=0,
        atol=RANK_TOLERANCE,
    )
    for percentile in (5, 10, 25):
        np.testing.assert_allclose(
            alignment.iou(a, b, percentile).numpy(),
            code.intersection_over_union(*pair, percentile=percentile),
            rtol=1e-15,
        )
        np.testing.assert_allclose(
            alignment.dice(a, b, percentile).numpy(),
            code.dice(*pair, percentile=percentile),
            rtol=1e-7,  # a quotient of two float32 there
        )
    assert code.human_spearman_ceiling == alignment.CLICKME_CEILING


def test_defaults_equal_the_released_ones() -> None:
    reason = released.why_not()
    if reason is not None:
        pytest.skip(reason)
    code = released.load()
    for ours, theirs in (
        (alignment.dice, code.dice),
        (alignment.iou, code.intersection_over_union),
    ):
        default = inspect.signature(ours).parameters["percentile"].default
        assert default == inspect.signature(theirs).parameters["percentile"].default
