"""The fused loss, every implementation, against the float64 reference and its own promises."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import (
    FORMULATIONS,
    Case,
    Target,
    assert_rows_close,
    conditioned,
    make_case,
    near_the_cut,
    skip_unless_supported,
)

import harmonizer_ext as hx
from harmonizer_ext import backends

SIZES = [
    *((n, n) for n in (1, 2, 5, 7, 16, 31, 33, 64, 224)),
    (225, 223),
    (512, 384),
    (3, 50),
    (97, 1),
]

# float32 has a relative step of 6e-8. A pixel passes through about 20 roundings and sums of up to
# 64 terms a lane: 64 * 6e-8 at the very worst, and 5e-6 leaves nothing unexplained.
FLOAT32_RTOL = 5e-6
# The same count in float64 steps of 1.1e-16, where sums over 2e5 pixels are double as well.
FLOAT64_RTOL = 1e-12


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_agrees_with_reference(
    target: Target, generator: torch.Generator, height: int, width: int, channels: int
) -> None:
    excused = 0
    for levels, (formulation, distance) in itertools.product(range(1, 7), FORMULATIONS):
        case = make_case(generator, height, width, channels=channels)
        options = {"formulation": formulation, "distance": distance, "levels": levels}
        near = near_the_cut(case, levels, formulation, 3e-6)
        excused += int(near.sum())
        assert_rows_close(
            case.run(target.backend, target.device, **options),
            case.run("reference", dtype=torch.float64, **options),
            conditioned(FLOAT32_RTOL, case, levels, formulation),
            except_rows=near,
        )
    # 54 rows of up to 2e5 pixels of which 3e-6 are excused by chance.
    assert excused <= 40


@pytest.mark.parametrize(("formulation", "distance"), FORMULATIONS)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 5), (33, 64), (225, 223)])
def test_float64_agrees_to_float64(
    target: Target,
    generator: torch.Generator,
    height: int,
    width: int,
    formulation: str,
    distance: str,
) -> None:
    skip_unless_supported(target, torch.float64)
    case = make_case(generator, height, width, dtype=torch.float64)
    options = {"formulation": formulation, "distance": distance, "levels": 6}
    assert_rows_close(
        case.run(target.backend, **options), case.run("reference", **options), FLOAT64_RTOL
    )


@pytest.mark.parametrize("scale", [1e-7, 1e-5, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize(("formulation", "distance"), FORMULATIONS)
def test_saliency_of_any_size(
    target: Target, generator: torch.Generator, scale: float, formulation: str, distance: str
) -> None:
    case = make_case(generator, 61, 64, scale=scale)
    options = {"formulation": formulation, "distance": distance}
    assert_rows_close(
        case.run(target.backend, target.device, **options),
        case.run("reference", dtype=torch.float64, **options),
        FLOAT32_RTOL,
        except_rows=near_the_cut(case, 5, formulation, 3e-6),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("formulation", "distance"), FORMULATIONS)
@pytest.mark.parametrize(("height", "width"), [(16, 16), (225, 223)])
def test_half_precision(
    target: Target,
    generator: torch.Generator,
    dtype: torch.dtype,
    height: int,
    width: int,
    formulation: str,
    distance: str,
) -> None:
    # Values are rounded before either side sees them, so that only the gradient's single rounding
    # on writing separates the two. Quantized maps do lie on their mean: then the row is excused.
    case = make_case(generator, height, width, scale=1.0, dtype=dtype)
    options = {"formulation": formulation, "distance": distance}
    near = near_the_cut(case, 5, formulation, 1e-6)
    assert not near.all()
    rows, grad = case.run(target.backend, target.device, **options)
    expected_rows, expected = case.run("reference", dtype=torch.float64, **options)
    torch.testing.assert_close(rows, expected_rows, rtol=FLOAT32_RTOL, atol=0)
    # Half a unit in the last place of each element, of the subnormals below, and float32's error.
    info = torch.finfo(dtype)
    size = expected.abs().amax((1, 2, 3), keepdim=True)
    allowed = expected.abs() * info.eps / 2 + info.smallest_normal * info.eps / 2
    excess = (grad - expected).abs() - allowed - FLOAT32_RTOL * size
    assert excess[~near].max() <= 0


def test_mixed_dtypes(target: Target, generator: torch.Generator) -> None:
    case = make_case(generator, 33, 31, scale=1.0, dtype=torch.bfloat16)
    wide = Case(case.saliency, case.heatmaps.float() + 1e-4, case.tokens)
    rows, grad = wide.run(target.backend, target.device)
    expected_rows, expected = wide.run("reference", dtype=torch.float64)
    torch.testing.assert_close(rows, expected_rows, rtol=FLOAT32_RTOL, atol=0)
    # One rounding to bfloat16's 8 bits.
    torch.testing.assert_close(grad, expected, rtol=2**-8, atol=FLOAT32_RTOL * expected.abs().max())


def _strided(maps: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values behind other strides."""
    batch, channels, height, width = maps.shape
    inside = torch.full((batch + 1, channels + 2, height + 3, width + 5), torch.nan)
    view = inside[1:, 1:-1, 2:-1, 3:-2]
    view.copy_(maps)
    every_second = torch.full((batch, channels, height, 2 * width), torch.nan)[..., ::2]
    every_second.copy_(maps)
    return {
        "channels_last": maps.to(memory_format=torch.channels_last),
        "slice": view,
        "every second column": every_second,
        "transposed": maps.transpose(2, 3).contiguous().transpose(2, 3),
        "one channel repeated": maps[:, :1].expand(-1, 3, -1, -1),
        "flipped batch": maps.flip(0).contiguous().flip(0),
    }


@pytest.mark.parametrize("layout", _strided(torch.zeros(1, 3, 2, 2)).keys())
@pytest.mark.parametrize(("height", "width"), [(17, 33), (64, 48)])
def test_any_strides(
    target: Target, generator: torch.Generator, layout: str, height: int, width: int
) -> None:
    case = make_case(generator, height, width)
    strided = _strided(case.saliency)[layout]
    heatmaps = _strided(case.heatmaps.unsqueeze(1).expand(-1, 3, -1, -1))[layout][:, 0]
    rows, grad = Case(strided, heatmaps, case.tokens).run(target.backend, target.device)
    expected = Case(strided.contiguous(), heatmaps.contiguous(), case.tokens)
    expected_rows, expected_grad = expected.run(target.backend, target.device)
    if target.backend == "cuda":
        # A thread's pixels are four neighbours where those can be read at once, else every n-th:
        # another order of the same sums.
        assert_rows_close((rows, grad), (expected_rows, expected_grad), FLOAT32_RTOL)
        return
    # Strides decide only where a value is read from: not one bit may change.
    assert torch.equal(rows, expected_rows)
    assert torch.equal(grad, expected_grad)


def test_shapes_with_and_without_channels(target: Target, generator: torch.Generator) -> None:
    case = make_case(generator, 20, 24, channels=1)
    rows, grad = case.run(target.backend, target.device)
    flat = case.saliency[:, 0].to(target.device).requires_grad_()
    loss = hx.harmonization_loss(
        flat,
        case.heatmaps[:, None].to(target.device),
        case.tokens.to(target.device),
        reduction="none",
        backend=target.backend,
    )
    (flat_grad,) = torch.autograd.grad(loss.sum(), flat)
    assert torch.equal(loss.detach().cpu().double(), rows)
    assert torch.equal(flat_grad.cpu().double(), grad[:, 0])


@pytest.mark.parametrize(("formulation", "distance"), FORMULATIONS)
def test_row_without_token_is_not_read(
    target: Target, generator: torch.Generator, formulation: str, distance: str
) -> None:
    case = make_case(generator, 40, 33)
    options = {"formulation": formulation, "distance": distance}
    rows, grad = case.run(target.backend, target.device, **options)
    assert rows[1] == 0
    assert (grad[1] == 0).all()
    case.saliency[1], case.heatmaps[1] = torch.nan, torch.inf
    poisoned = case.run(target.backend, target.device, **options)
    assert torch.equal(poisoned[0], rows)
    assert torch.equal(poisoned[1], grad)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["saliency", "heatmaps"])
@pytest.mark.parametrize(("formulation", "distance"), FORMULATIONS)
def test_nan_poisons_its_own_row(
    target: Target,
    generator: torch.Generator,
    value: float,
    where: str,
    formulation: str,
    distance: str,
) -> None:
    case = make_case(generator, 33, 40)
    options = {"formulation": formulation, "distance": distance}
    rows, grad = case.run(target.backend, target.device, **options)
    getattr(case, where)[0, ..., 20, 7] = value
    poisoned_rows, poisoned_grad = case.run(target.backend, target.device, **options)
    assert poisoned_rows[0].isnan()
    assert poisoned_grad[0].isnan().all()
    assert torch.equal(poisoned_rows[1:], rows[1:])
    assert torch.equal(poisoned_grad[1:], grad[1:])


def _huge_maps(generator: torch.Generator, height: int, width: int) -> torch.Tensor:
    """Maps of about 1 that overflow in different places when they are scaled, (5, H, W)."""
    noise = torch.randn(height, width, generator=generator)
    y = torch.arange(height)[:, None]
    x = torch.arange(width)[None, :]
    return torch.stack(
        [
            noise,
            1 - 2.0 * ((x + y) % 2),  # the same mean wherever one looks
            1 + 1e-3 * noise,  # whose coarse levels fall towards the border
            (x == width // 3) * (y == height // 2) * 1.0,
            noise.sign() * (y < height // 2),
        ]
    )


def check_overflow(
    target: Target,
    generator: torch.Generator,
    formulation: str,
    distance: str,
    size: tuple[int, int] = (24, 24),
    exponents: tuple[int, ...] = tuple(range(13, 39)),
) -> None:
    """A map of any finite size is standardized right or its row is NaN; nothing in between."""
    patterns = _huge_maps(generator, *size)
    scales = torch.tensor([10.0**exponent for exponent in exponents])
    huge = (scales[:, None, None, None] * patterns.clamp(-3, 3)).flatten(0, 1)
    assert huge.isfinite().all()
    other = torch.rand(len(huge), *size, generator=generator)
    options = {"formulation": formulation, "distance": distance, "levels": 3}
    levels = 3 if formulation == "paper" else 1
    for saliency, heatmaps in ((huge, other), (other, huge)):
        case = Case(saliency[:, None], heatmaps, None)
        expected, _ = case.run("reference", dtype=torch.float64, **options)
        largest = torch.stack(
            [
                level.std((-2, -1), correction=0)[:, 0]
                for level in hx.gaussian_pyramid(huge[:, None].double(), levels)
            ]
        ).amax(0)
        for backend, device in ((target.backend, target.device), ("reference", "cpu")):
            rows, grad = case.run(backend, device, **options)
            nan = rows.isnan()
            # Of more than 2e19 the square is beyond float32; of 1e13 the sum of squares is not.
            assert nan[largest > 2e19].all()
            assert not nan[largest < 1e13].any()
            assert (largest > 2e19).any()
            assert (largest < 1e13).any()
            torch.testing.assert_close(rows[~nan], expected[~nan], rtol=1e-2, atol=1e-6)
            assert torch.equal(grad.isnan().flatten(1).all(1), nan)
            assert torch.equal(grad.isnan().flatten(1).any(1), nan)


@pytest.mark.parametrize(("formulation", "distance"), FORMULATIONS)
def test_overflow_is_nan_not_a_plausible_number(
    target: Target, generator: torch.Generator, formulation: str, distance: str
) -> None:
    check_overflow(target, generator, formulation, distance)


def test_std_of_what_is_not_finite_is_nan(target: Target, generator: torch.Generator) -> None:
    # What is logged as the saliency's standard deviation: 0 would say that the map is constant.
    for backend, device in ((target.backend, target.device), ("reference", "cpu")):
        for value in (torch.nan, torch.inf, 1e30):
            case = make_case(generator, 16, 17)
            case.saliency[0, :, 3, 4] = value
            maps = (case.saliency, case.heatmaps, case.tokens)
            maps = tuple(x.to(device) for x in maps)
            more = () if backend == "reference" else (False,)
            std = backends.get(backend).harmonization(*maps, "released", 3, "mse", *more)[-1]
            assert std.isnan().tolist() == [True, False, False]
            assert std[1] == 0


def test_overflow_of_float64_is_nan(target: Target, generator: torch.Generator) -> None:
    skip_unless_supported(target, torch.float64)
    for formulation, distance in FORMULATIONS:
        maps = _huge_maps(generator, 24, 24).double()[:, None]
        heatmaps = torch.rand(5, 24, 24, generator=generator, dtype=torch.float64)
        options = {"formulation": formulation, "distance": distance}
        expected, _ = Case(maps * 1e10, heatmaps, None).run("reference", **options)
        for backend in (target.backend, "reference"):
            rows, _ = Case(maps * 1e100, heatmaps, None).run(backend, **options)
            torch.testing.assert_close(rows, expected, rtol=1e-9, atol=0)
            rows, grad = Case(maps * 1e170, heatmaps, None).run(backend, **options)
            assert rows.isnan().all()
            assert grad.isnan().all()


@pytest.mark.parametrize("constant", [0.0, 0.3, 0.1, 1.0, -7.7e-5, 1e4])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (33, 31), (224, 224)])
def test_constant_maps(
    target: Target, generator: torch.Generator, constant: float, height: int, width: int
) -> None:
    case = make_case(generator, height, width)
    # Constant saliency: nothing to align, and nothing may push it. The pyramid of the paper's
    # formulation is not constant near the border, so that only "released" is exactly this simple.
    flat = Case(torch.full_like(case.saliency, constant), case.heatmaps, case.tokens)
    rows, grad = flat.run(target.backend, target.device)
    expected_rows, _ = flat.run("reference", dtype=torch.float64)
    assert (grad == 0).all()
    # What is left is the human map, brought to a maximum of 1e-6: 1e-12 in the loss.
    torch.testing.assert_close(rows, expected_rows, rtol=1e-4, atol=1e-18)
    # Constant human map: t = 0.
    flat = Case(case.saliency, torch.full_like(case.heatmaps, constant), case.tokens)
    zero = Case(case.saliency, torch.zeros_like(case.heatmaps), case.tokens)
    for got, expected in zip(
        flat.run(target.backend, target.device),
        zero.run(target.backend, target.device),
        strict=True,
    ):
        assert torch.equal(got, expected)


def test_large_mean_and_small_spread(target: Target, generator: torch.Generator) -> None:
    # The variance of such a map is lost entirely where squares of the raw values are subtracted.
    case = make_case(generator, 64, 64)
    case.heatmaps = case.heatmaps * 1e-2 + 1
    rows, grad = case.run(target.backend, target.device)
    expected = case.run("reference", dtype=torch.float64)
    # float32 stores 1 + 1e-2 h to 6e-8, one part in 1e5 of the spread; both sides see that input,
    # but the mean is rounded once more.
    assert_rows_close((rows, grad), expected, 2e-5)


@pytest.mark.parametrize(("formulation", "distance"), FORMULATIONS)
def test_same_inputs_same_bits(
    target: Target, generator: torch.Generator, formulation: str, distance: str
) -> None:
    case = make_case(generator, 65, 66)
    options = {"formulation": formulation, "distance": distance}
    first = case.run(target.backend, target.device, **options)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 4, 3):
            torch.set_num_threads(count)
            again = case.run(target.backend, target.device, **options)
            assert torch.equal(first[0], again[0])
            assert torch.equal(first[1], again[1])
    finally:
        torch.set_num_threads(threads)


def test_rows_do_not_see_each_other(target: Target, generator: torch.Generator) -> None:
    case = make_case(generator, 30, 47)
    rows, grad = case.run(target.backend, target.device)
    for i in range(3):
        alone = Case(case.saliency[i : i + 1], case.heatmaps[i : i + 1], case.tokens[i : i + 1])
        row, row_grad = alone.run(target.backend, target.device)
        assert torch.equal(row[0], rows[i])
        assert torch.equal(row_grad[0], grad[i])


@pytest.mark.parametrize("backend", ["reference", None])
def test_reductions(backend: str | None, generator: torch.Generator) -> None:
    case = make_case(generator, 12, 15)
    maps = case.saliency.double().requires_grad_()
    heatmaps = case.heatmaps.double()

    def loss(reduction: str) -> torch.Tensor:
        return hx.harmonization_loss(
            maps, heatmaps, case.tokens, reduction=reduction, backend=backend
        )

    rows = loss("none")
    assert rows.shape == (3,)
    for reduction, expected in {
        "sum": rows.sum(),
        "mean": rows.sum() / 3,
        "mean_valid": rows.sum() / 1.5,
    }.items():
        torch.testing.assert_close(loss(reduction), expected, rtol=1e-14, atol=0)
        got = torch.autograd.grad(loss(reduction), maps)[0]
        want = torch.autograd.grad(expected, maps, retain_graph=True)[0]
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("reduction", ["mean", "mean_valid", "sum"])
def test_nothing_to_align_is_zero_in_the_graph(backend: str | None, reduction: str) -> None:
    for batch, tokens in ((0, None), (2, torch.zeros(2))):
        maps = torch.randn(batch, 3, 8, 8, requires_grad=True)
        heatmaps = torch.rand(batch, 8, 8)
        loss = hx.harmonization_loss(maps, heatmaps, tokens, reduction=reduction, backend=backend)
        assert loss.item() == 0
        loss.backward()
        assert torch.equal(maps.grad, torch.zeros_like(maps))


@pytest.mark.parametrize("channels", [1, 3])
def test_upstream_gradient_scales_rows(
    target: Target, generator: torch.Generator, channels: int
) -> None:
    case = make_case(generator, 21, 20, channels=channels)
    maps = case.saliency.to(target.device).requires_grad_()
    rows = hx.harmonization_loss(
        maps,
        case.heatmaps.to(target.device),
        case.tokens.to(target.device),
        reduction="none",
        backend=target.backend,
    )
    upstream = torch.tensor([3.0, 5.0, -0.25], device=target.device)
    ones, scaled = (
        torch.autograd.grad(rows, maps, grad, retain_graph=True)[0]
        for grad in (torch.ones_like(rows), upstream)
    )
    torch.testing.assert_close(scaled, ones * upstream[:, None, None, None], rtol=3e-7, atol=0)
    # A second backward through the same graph must find the stored gradient as it was.
    rows.sum().backward(retain_graph=True)
    rows.sum().backward()
    torch.testing.assert_close(maps.grad, 2 * ones, rtol=0, atol=0)


@pytest.mark.parametrize(("formulation", "distance"), FORMULATIONS)
def test_reference_gradcheck(generator: torch.Generator, formulation: str, distance: str) -> None:
    # The stop-gradient of the released form is no derivative of its value: at a saliency whose
    # largest pixel is moved by none of the others, finite differences see it only through that
    # pixel and the statistics. So it is checked against the value with that factor held fixed.
    case = make_case(generator, 6, 7, batch=2, channels=2, dtype=torch.float64)
    case.saliency = case.saliency * 1e3
    if formulation == "paper":

        def value(maps: torch.Tensor) -> torch.Tensor:
            return hx.harmonization_loss(
                maps,
                case.heatmaps,
                formulation=formulation,
                distance=distance,
                levels=3,
                reduction="none",
                backend="reference",
            )

        assert torch.autograd.gradcheck(value, case.saliency.requires_grad_())
        assert torch.autograd.gradgradcheck(value, case.saliency, fast_mode=True)
        return

    peak = hx.standardize_cut(case.saliency.mean(1), backend="reference").amax((1, 2)) + 1e-6
    human = hx.standardize_cut(case.heatmaps, backend="reference")
    human = human / (human.amax((1, 2), keepdim=True) + 1e-6) * peak[:, None, None]

    def frozen(maps: torch.Tensor) -> torch.Tensor:
        difference = hx.standardize_cut(maps.mean(1), backend="reference") - human
        levels = hx.gaussian_pyramid(difference, 3, backend="reference")
        return torch.stack([p.square().mean((1, 2)) for p in levels]).mean(0)

    maps = case.saliency.requires_grad_()
    assert torch.autograd.gradcheck(frozen, maps)
    rows = hx.harmonization_loss(
        maps, case.heatmaps, levels=3, reduction="none", backend="reference"
    )
    torch.testing.assert_close(rows, frozen(maps), rtol=1e-13, atol=0)
    got, want = (torch.autograd.grad(r.sum(), maps)[0] for r in (rows, frozen(maps)))
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-15)


def test_equal_maps_have_no_loss(target: Target, generator: torch.Generator) -> None:
    case = make_case(generator, 32, 33, channels=1, scale=1.0)
    same = Case(case.saliency, case.saliency[:, 0], None)
    for formulation, distance in FORMULATIONS:
        rows, _ = same.run(
            target.backend, target.device, formulation=formulation, distance=distance
        )
        # Two standardizations of one map in float32, and (max + 1e-6)/(max + 1e-6).
        assert rows.max() < 1e-5
