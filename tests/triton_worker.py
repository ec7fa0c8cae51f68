"""The Triton backend in Triton's interpreter: what test_triton_interpreter.py runs in a process.

    TRITON_INTERPRET=1 python -m pytest tests/triton_worker.py

Most cases are those of the other test files, called with the Triton backend as their target: each
interpreted program costs some 70 ms, so that only few of their parameters are taken.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import test_lazy_tensors as lazy_tests
import test_loss as loss_tests
import test_loss_overflow as overflow_tests
import test_positive_part_mse as mse_tests
import test_pyramid as pyramid_tests
import test_standardize as standardize_tests
import torch
from conftest import FORMULATIONS, Case, Target, assert_rows_close, make_case, near_the_cut

import harmonizer_ext as hx
from harmonizer_ext.backends import triton as backend
from harmonizer_ext.backends.triton_kernels import launch

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 before Python starts"

TARGET = Target("triton", "cpu")
EACH_FORMULATION = pytest.mark.parametrize(("formulation", "distance"), FORMULATIONS)

#: The interpreter, unlike a GPU, truncates on writing bfloat16: a whole unit in the last place.
INTERPRETED_BFLOAT16_STEP = 2.0**-7

#: Many programs a map, several tiles a row and a column, partial tiles at the edges.
SMALL_TILES = launch.Tuning(
    moments=512, columns=256, rows=128, gradient=128, coarse=128, merge=4, whole_map=256
)
#: Levels 1 and 2 of a 61x64 map get kernels of their own, as those of a large map do.
LARGE_MAP = launch.Tuning(
    moments=2048, columns=1024, rows=256, gradient=512, coarse=256, coarse_pixels=200
)
#: Two samples of 61x64 at a time.
PARTS = launch.Tuning(
    moments=4096, columns=2048, rows=1024, gradient=1024, workspace_bytes=2 * 10 * 61 * 64
)


@pytest.fixture(autouse=True)
def _restore_tuning() -> Iterator[None]:
    yield
    launch.tuning = None


def _check(case: Case, **options: object) -> None:
    levels, formulation = int(str(options["levels"])), str(options["formulation"])
    near = near_the_cut(case, levels, formulation, 3e-6)
    assert not near.all()
    assert_rows_close(
        case.run("triton", **options),
        case.run("reference", dtype=torch.float64, **options),
        loss_tests.FLOAT32_RTOL,
        except_rows=near,
    )


@EACH_FORMULATION
@pytest.mark.parametrize(
    ("height", "width", "channels", "levels"),
    [(1, 1, 3, 2), (2, 3, 1, 6), (16, 31, 4, 1), (33, 40, 5, 5)],
)
def test_agrees_with_reference(
    generator: torch.Generator,
    height: int,
    width: int,
    channels: int,
    levels: int,
    formulation: str,
    distance: str,
) -> None:
    case = make_case(generator, height, width, channels=channels)
    _check(case, formulation=formulation, distance=distance, levels=levels)


@pytest.mark.parametrize("seed", range(3))
def test_other_inputs(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scale = (1e-6, 1e-2, 1e3)[seed]
    formulation, distance = FORMULATIONS[seed]
    launch.tuning = LARGE_MAP if seed == 2 else None
    case = make_case(generator, 64 + seed, 48 - seed, scale=scale)
    # Means below zero: what lies outside a map must not count as a pixel above its mean.
    case.saliency, case.heatmaps = -case.saliency, case.heatmaps - 0.5
    _check(case, formulation=formulation, distance=distance, levels=5)


@pytest.mark.parametrize(("formulation", "distance"), FORMULATIONS[:2])
def test_odd_size_in_full(generator: torch.Generator, formulation: str, distance: str) -> None:
    _check(make_case(generator, 225, 223), formulation=formulation, distance=distance, levels=5)


@EACH_FORMULATION
@pytest.mark.parametrize("tuning", [SMALL_TILES, LARGE_MAP, PARTS], ids=["tiles", "large", "parts"])
def test_other_partitions(
    generator: torch.Generator, tuning: launch.Tuning, formulation: str, distance: str
) -> None:
    launch.tuning = tuning
    case = make_case(generator, 61, 64)
    _check(case, formulation=formulation, distance=distance, levels=5)


@EACH_FORMULATION
def test_gpu_tiles(generator: torch.Generator, formulation: str, distance: str) -> None:
    launch.tuning = launch.Tuning()
    case = make_case(generator, 37, 48)
    _check(case, formulation=formulation, distance=distance, levels=3)


@pytest.mark.parametrize(
    ("tuning", "formulation", "distance"),
    [(None, "released", "mse"), (LARGE_MAP, "released", "mse"), (LARGE_MAP, "paper", "l2")],
)
def test_value_alone(
    generator: torch.Generator, tuning: launch.Tuning | None, formulation: str, distance: str
) -> None:
    launch.tuning = tuning
    case = make_case(generator, 61, 64)
    inputs = (case.saliency, case.heatmaps, case.tokens, formulation, 5, distance)
    rows, _, std = backend.harmonization(*inputs, True)
    value, nothing, same_std = backend.harmonization(*inputs, False)
    assert nothing.shape == (0,)
    assert torch.equal(value, rows)
    assert torch.equal(std, same_std)
    expected = case.saliency.double().mean(1).std((1, 2), correction=0)
    expected[1] = 0
    torch.testing.assert_close(std.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", loss_tests._strided(torch.zeros(1, 3, 2, 2)).keys())
def test_any_strides(generator: torch.Generator, layout: str) -> None:
    launch.tuning = SMALL_TILES if layout in ("channels_last", "slice") else None
    loss_tests.test_any_strides(TARGET, generator, layout, 17, 33)


@pytest.mark.parametrize("formulation", ["released", "paper"])
def test_float16(generator: torch.Generator, formulation: str) -> None:
    loss_tests.test_half_precision(TARGET, generator, torch.float16, 16, 16, formulation, "mse")


@pytest.mark.parametrize("formulation", ["released", "paper"])
@pytest.mark.parametrize("heatmaps", [torch.bfloat16, torch.float32])
def test_bfloat16(generator: torch.Generator, heatmaps: torch.dtype, formulation: str) -> None:
    case = make_case(generator, 33, 31, scale=1.0, dtype=torch.bfloat16)
    case.heatmaps = case.heatmaps.to(heatmaps)
    near = near_the_cut(case, 5, formulation, 1e-6)
    assert not near.all()
    rows, grad = case.run("triton", formulation=formulation)
    expected_rows, expected = case.run("reference", dtype=torch.float64, formulation=formulation)
    torch.testing.assert_close(rows, expected_rows, rtol=loss_tests.FLOAT32_RTOL, atol=0)
    size = expected.abs().amax((1, 2, 3), keepdim=True)
    allowed = expected.abs() * INTERPRETED_BFLOAT16_STEP + loss_tests.FLOAT32_RTOL * size
    assert ((grad - expected).abs() - allowed)[~near].max() <= 0


@EACH_FORMULATION
def test_row_without_token_is_not_read(
    generator: torch.Generator, formulation: str, distance: str
) -> None:
    loss_tests.test_row_without_token_is_not_read(TARGET, generator, formulation, distance)


@pytest.mark.parametrize(
    ("value", "where", "formulation", "distance"),
    [
        (torch.nan, "saliency", "released", "mse"),
        (torch.inf, "heatmaps", "released", "mse"),
        (-torch.inf, "saliency", "paper", "mse"),
        (torch.nan, "heatmaps", "paper", "l2"),
    ],
)
def test_nan_poisons_its_own_row(
    generator: torch.Generator, value: float, where: str, formulation: str, distance: str
) -> None:
    loss_tests.test_nan_poisons_its_own_row(TARGET, generator, value, where, formulation, distance)


def test_nan_against_a_constant_map(generator: torch.Generator) -> None:
    # No pixel lies above the mean, so that no comparison carries the NaN into the gradient.
    case = make_case(generator, 8, 9)
    case.saliency[0] = 0.3
    case.heatmaps[0, 2, 2] = torch.nan
    for formulation in ("released", "paper"):
        rows, grad = case.run("triton", formulation=formulation, levels=1)
        assert rows.isnan().tolist() == [True, False, False]
        assert grad[0].isnan().all()
        assert not grad[1:].isnan().any()


@pytest.mark.parametrize(("formulation", "distance"), FORMULATIONS[:2])
def test_overflow_is_nan(generator: torch.Generator, formulation: str, distance: str) -> None:
    exponents = (13, 18, 21)
    overflow_tests.check_overflow(TARGET, generator, formulation, distance, (16, 16), exponents)


def test_lazy_tensors(generator: torch.Generator) -> None:
    blocks = ("standardize_cut", "gaussian_pyramid", "positive_part_mse")
    lazy_tests.check("triton", "cpu", generator, "negated", "loss, released, mse", *blocks)
    lazy_tests.check("triton", "cpu", generator, "without memory", "loss alone")


@pytest.mark.parametrize(("constant", "size"), [(0.3, (33, 31)), (-7.7e-5, (1, 1)), (1e4, (9, 64))])
def test_constant_maps(generator: torch.Generator, constant: float, size: tuple[int, int]) -> None:
    launch.tuning = SMALL_TILES
    loss_tests.test_constant_maps(TARGET, generator, constant, *size)


def test_large_mean_and_small_spread(generator: torch.Generator) -> None:
    loss_tests.test_large_mean_and_small_spread(TARGET, generator)


@EACH_FORMULATION
def test_same_inputs_same_bits(generator: torch.Generator, formulation: str, distance: str) -> None:
    case = make_case(generator, 17, 20)
    options = {"formulation": formulation, "distance": distance}
    first, again = (case.run("triton", **options) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_rows_do_not_see_each_other(generator: torch.Generator) -> None:
    loss_tests.test_rows_do_not_see_each_other(TARGET, generator)


def test_nothing_to_align() -> None:
    maps = torch.randn(2, 3, 8, 8, requires_grad=True)
    for batch, tokens in ((0, None), (2, torch.zeros(2))):
        loss = hx.harmonization_loss(
            maps[:batch], torch.rand(batch, 8, 8), tokens, backend="triton"
        )
        (grad,) = torch.autograd.grad(loss, maps)
        assert loss.item() == 0
        assert (grad == 0).all()


# --- building blocks ------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width", "levels"), [(5, 7, 5), (16, 31, 3)])
def test_pyramid(generator: torch.Generator, height: int, width: int, levels: int) -> None:
    launch.tuning = SMALL_TILES if height == 16 else None
    x = torch.randn(2, 3, height, width, generator=generator).requires_grad_()
    y = x.detach().double().requires_grad_()
    got = hx.gaussian_pyramid(x, levels, backend="triton")
    expected = hx.gaussian_pyramid(y, levels, backend="reference")
    upstream = [torch.randn(p.shape, generator=generator) for p in expected]
    for p, q in zip(got, expected, strict=True):
        pyramid_tests._assert_close(p.detach(), q.detach(), levels)
    (grad,) = torch.autograd.grad(got, x, upstream)
    (want,) = torch.autograd.grad(expected, y, [u.double() for u in upstream])
    pyramid_tests._assert_close(grad, want, levels)


def test_pyramid_adjoint_identity(generator: torch.Generator) -> None:
    pyramid_tests.test_adjoint_identity(TARGET, generator, 64, 33)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pyramid_in_halves(generator: torch.Generator, dtype: torch.dtype) -> None:
    # A level is made of the one above before that is rounded: one rounding, however deep.
    x = torch.randn(2, 3, 33, 20, generator=generator).to(dtype)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    y = x.detach().double().requires_grad_()
    got = hx.gaussian_pyramid(x, 4, backend="triton")[1:]
    expected = hx.gaussian_pyramid(y, 4, backend="reference")[1:]
    upstream = [torch.randn(p.shape, generator=generator).to(dtype) for p in expected]
    (grad,) = torch.autograd.grad(got, x, upstream)
    (want,) = torch.autograd.grad(expected, y, [u.double() for u in upstream])
    info = torch.finfo(dtype)
    for a, b in zip((*got, grad), (*expected, want), strict=True):
        assert a.dtype == dtype
        step = INTERPRETED_BFLOAT16_STEP if dtype == torch.bfloat16 else info.eps / 2
        allowed = b.abs() * step + 1e-6 * b.abs().max()
        assert ((a.detach().double() - b.detach()).abs() <= allowed).all()


@pytest.mark.parametrize(("size", "scale"), [((7, 5), 1.0), ((31, 33), 1e4), ((31, 33), 1e-6)])
def test_standardize(generator: torch.Generator, size: tuple[int, int], scale: float) -> None:
    launch.tuning = SMALL_TILES if scale == 1e4 else None
    standardize_tests.test_agrees_with_reference(TARGET, generator, *size, scale, torch.float32)


def test_standardize_strided(generator: torch.Generator) -> None:
    maps = torch.randn(2, 3, 9, 8, generator=generator)
    upstream = torch.randn(2, 3, 9, 8, generator=generator)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        x = maps.to(memory_format=layout).requires_grad_()
        out = hx.standardize_cut(x, backend="triton")
        (grad,) = torch.autograd.grad(out, x, upstream.to(memory_format=layout))
        results.append((out.detach(), grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_standardize_by_hand_and_constants(generator: torch.Generator) -> None:
    standardize_tests.test_by_hand(TARGET)
    standardize_tests.test_constant_maps_are_zero(TARGET, generator, 0.3)


def test_standardize_nan(generator: torch.Generator) -> None:
    standardize_tests.test_nan_stays_in_its_map(TARGET, generator)


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float16", "float32")])
def test_positive_part_mse(generator: torch.Generator, dtypes: tuple[str, str]) -> None:
    launch.tuning = SMALL_TILES
    mse_tests.test_agrees_with_reference(
        TARGET, generator, 31, 33, *(getattr(torch, name) for name in dtypes)
    )


def test_positive_part_mse_by_hand(generator: torch.Generator) -> None:
    mse_tests.test_by_hand(TARGET)
    mse_tests.test_nan_stays_in_its_map(TARGET, generator)


# --- the backend as the registry sees it ----------------------------------------------------------


def test_the_interpreter_is_named_but_never_picked() -> None:
    available = hx.available_backends("cpu")
    assert available[-1] == "triton"
    assert available[0] != "triton"
    with pytest.raises(RuntimeError, match=r'float32; take backend="reference" for float64'):
        hx.standardize_cut(torch.ones(2, 2, dtype=torch.float64), backend="triton")


if __name__ == "__main__":
    # What Triton's interpreter needs of NumPy, in one kernel.
    hx.standardize_cut(torch.ones(2, 2), backend="triton")
