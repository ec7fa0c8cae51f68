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
from harmonizer_ext.alignment import metrics, ranks

stats = pytest.importorskip("scipy.stats", reason="scipy (extra: test) is the oracle here")

# Ranks and their sums are whole numbers, exact in float64; what remains is scipy's own rounding
# (Pearson on ranks of up to 5e4 pixels), some 1e-15.
RANK_TOLERANCE = 1e-12


Metric = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
METRICS = [alignment.spearman, alignment.pearson, alignment.dice, alignment.iou]


def random_maps(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------------- pearson


def scipy_pearson(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    return np.array(
        [
            stats.pearsonr(x.flatten(), y.flatten()).statistic
            for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True)
        ]
    )


# Sums of up to 700 products of numbers below 1 in float64, 1e-16 each, here and in scipy.
PEARSON_TOLERANCE = 1e-13


def test_pearson_by_hand() -> None:
    # Deviations (-1, 0, 1) and (-2, 1, 1): 3 / sqrt(2 * 6).
    a, b = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[0.0, 3.0, 3.0]]])
    assert alignment.pearson(a, b).tolist() == pytest.approx([math.sqrt(0.75)], abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int16])
@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e5])
def test_pearson_equals_scipy(dtype: torch.dtype, scale: float) -> None:
    if dtype == torch.int16:
        scale = 1000.0
    a, b = random_maps(40, 4, 24, 29), random_maps(41, 4, 24, 29)
    b = b + a * torch.tensor([-3.0, -0.3, 0.3, 3.0])[:, None, None]
    a, b = (a * scale).to(dtype), b.clamp(min=0)
    np.testing.assert_allclose(
        alignment.pearson(a, b).numpy(), scipy_pearson(a, b), rtol=0, atol=PEARSON_TOLERANCE
    )


def test_pearson_of_numbers_whose_squares_vanish() -> None:
    a, b = random_maps(42, 2, 8, 8), random_maps(43, 2, 8, 8)
    expected = alignment.pearson(a, b)
    for scale in (2.0**-700, 2.0**700):
        assert torch.equal(alignment.pearson(a * scale, b), expected)


def test_undefined_pearson_is_nan_in_its_row_only() -> None:
    a, b = random_maps(44, 5, 8, 9), random_maps(45, 5, 8, 9)
    expected = alignment.pearson(a, b)
    a[1] = 0.1  # whose mean over 72 pixels is not 0.1
    b[2, 3, 3] = math.nan
    a[3, 0, 0] = math.inf
    result = alignment.pearson(a, b)
    assert result.isnan().tolist() == [False, True, True, True, False]
    assert torch.equal(result[[0, 4]], expected[[0, 4]])


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
def test_misfits_are_named(
    metric: Metric, shape_a: tuple[int, ...], shape_b: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="must be ") as error:
        metric(torch.zeros(shape_a), torch.zeros(shape_b))
    assert str(shape_a) in str(error.value)


def test_wrong_types_are_named() -> None:
    maps = torch.zeros(1, 4, 4)
    with pytest.raises(TypeError, match=r"b must be a torch\.Tensor of maps, got ndarray"):
        alignment.spearman(maps, np.zeros((1, 4, 4)))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a must hold real numbers"):
        alignment.dice(maps.to(torch.complex64), maps)
    with pytest.raises(ValueError, match="on one device, got a: cpu and b: meta"):
        alignment.spearman(maps, maps.to("meta"))


# ---------------------------------------------------------------------------- all of them


def test_chunks_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = random_maps(56, 7, 12, 13), random_maps(57, 7, 12, 13)
    b[3] = 1
    whole = [metric(a, b) for metric in METRICS]
    pieces = []

    def three(a: torch.Tensor, b: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        pieces.append(len(a))
        return list(zip(a.split(3), b.split(3), strict=True))

    monkeypatch.setattr(metrics, "in_chunks", three)
    torch.testing.assert_close(
        [metric(a, b) for metric in METRICS], whole, rtol=0, atol=0, equal_nan=True
    )
    assert pieces == [7] * len(METRICS)
    large = torch.empty(1).expand(1000, 224, 224)
    sizes = [len(x) for x, _ in ranks.in_chunks(large, large)]
    assert sum(sizes) == 1000
    assert max(sizes) * 224 * 224 <= 1 << 24


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_gpu_equals_cpu(metric: Metric, dtype: torch.dtype) -> None:
    a, b = (9 * random_maps(seed, 6, 61, 67) for seed in (58, 59))
    a, b = a.to(dtype), (a + b).clamp(min=0).to(dtype)
    b[2] = 1
    # Counts and ranks are exact; Pearson's sums are taken in another order.
    torch.testing.assert_close(
        metric(a.cuda(), b.cuda()).cpu(), metric(a, b), rtol=0, atol=1e-12, equal_nan=True
    )


def test_no_graph_is_kept() -> None:
    a = random_maps(14, 2, 8, 8).requires_grad_()
    assert not alignment.spearman(a, a.detach()).requires_grad
    assert not alignment.dice(a, a.detach()).requires_grad


# ---------------------------------------------------------------------------- resolutions


def test_reduced_pixels_are_the_mean_of_the_middle_four() -> None:
    maps = random_maps(60, 2, 32, 48).float()
    for reducer in (4, 16):
        middle = maps.unflatten(1, (-1, reducer)).unflatten(3, (-1, reducer))
        first = reducer // 2 - 1
        middle = middle[:, :, first : first + 2, :, first : first + 2]
        # Three additions in float32 of numbers below 4, in either order.
        torch.testing.assert_close(
            alignment.reduce_resolution(maps, reducer), middle.mean((2, 4)), rtol=0, atol=1e-6
        )


def test_reducer_one_changes_nothing() -> None:
    maps = random_maps(61, 2, 7, 9)
    assert torch.equal(alignment.reduce_resolution(maps[:, None], 1), maps)


@pytest.mark.parametrize("reducer", [0, -4, 8])
def test_reducers_leave_something(reducer: int) -> None:
    with pytest.raises(ValueError, match=f"reducer: expected 1 to 7 for maps of 7x9 .*{reducer}"):
        alignment.reduce_resolution(torch.zeros(1, 7, 9), reducer)


@pytest.mark.parametrize("size", [224, 64, 50])
@pytest.mark.parametrize("reducer", [1, 4, 16])
def test_resolutions_are_those_of_the_first_evaluation(size: int, reducer: int) -> None:
    # Its metrics.py is in no package. This is what it does to both maps before a metric:
    # sz = int(explanations.shape[1] / reducer); tf.image.resize(explanations, (sz, sz)).
    reason = released.why_not()
    if reason is not None:
        pytest.skip(reason)
    tensorflow = released.load().tensorflow
    maps = random_maps(62, 2, size, size).float()
    edge = int(size / reducer)
    expected = tensorflow.image.resize(maps.numpy()[..., None], (edge, edge)).numpy()[..., 0]
    # Weights and interpolation in float32 in another order: some roundings of numbers below 4.
    np.testing.assert_allclose(
        alignment.reduce_resolution(maps, reducer).numpy(), expected, rtol=0, atol=4e-6
    )


# ---------------------------------------------------------------------------- the released code


def click_maps(code: released.Released, seed: int, count: int, size: int) -> np.ndarray:
    """Clicks on a few pixels, blurred as the released ClickMe reader does it."""
    generator = np.random.default_rng(seed)
    clicks = np.zeros((count, size, size, 1), np.float32)
    for image in clicks:
        for _ in range(int(generator.integers(1, 30))):
            y, x = generator.normal(size / 2, size / 6, 2).clip(0, size - 1).astype(int)
            image[y, x] += 1
    blurred = code.gaussian_blur(clicks, code.gaussian_kernel(10, 10))
    return np.asarray(blurred)[..., 0]


def test_metrics_of_blurred_clicks_equal_the_released_code() -> None:
    reason = released.why_not()
    if reason is not None:
        pytest.skip(reason)
    code = released.load()
    human = click_maps(code, 0, 4, 224)
    assert (human == 0).mean() > 0.2  # ties, and many
    generator = np.random.default_rng(1)
    model = np.abs(generator.normal(size=human.shape)).astype(np.float32) * (0.1 + human)
    model[3] = click_maps(code, 2, 1, 224)[0]
    a, b = torch.tensor(model), torch.tensor(human)
    for ours, theirs in (
        (alignment.spearman, code.spearman_correlation),
        (alignment.dice, code.dice),
        (alignment.iou, code.intersection_over_union),
    ):
        expected = theirs(model, human)
        assert np.ptp(expected) > 0.01
        # A dice there is a quotient of two float32.
        np.testing.assert_allclose(ours(a, b).numpy(), expected, rtol=1e-7, atol=1e-12)


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
