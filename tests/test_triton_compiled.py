"""Kernels that Triton compiled, executed: values of each for two architectures, races, barriers.

Most cases are those of the other test files, called with the Triton backend as their target.
Nothing here is said of AMD's GPUs: their code is made of the same Triton IR by another code
generator.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import ptx_on_host
import pytest
import torch
from conftest import (
    FORMULATIONS,
    Case,
    Target,
    assert_agrees,
    assert_rows_close,
    make_case,
    near_the_cut,
)

pytest.importorskip("triton", reason="triton is not installed")

import test_lazy_tensors as lazy_tests
import test_loss as loss_tests
import test_loss_overflow as overflow_tests
import test_positive_part_mse as mse_tests
import test_pyramid as pyramid_tests
import test_standardize as standardize_tests
import triton
import triton.language as tl
import triton_on_host
from triton_on_host import Driver

import harmonizer_ext as hx
from harmonizer_ext.backends import triton as backend
from harmonizer_ext.backends.triton_kernels import launch

pytestmark = [
    pytest.mark.skipif(launch.interpreted(), reason="this process interprets its kernels"),
    pytest.mark.skipif(
        ptx_on_host.why_not_here() is not None, reason=f"ptx on host: {ptx_on_host.why_not_here()}"
    ),
]

TARGET = Target("triton", "cpu")
EACH_FORMULATION = pytest.mark.parametrize(("formulation", "distance"), FORMULATIONS)

#: Many programs a map, several tiles a row and a column, partial tiles at the edges.
SMALL_TILES = launch.Tuning(
    moments=512, columns=256, rows=128, gradient=128, coarse=128, merge=4, whole_map=256
)
#: Fewer elements in a tile than threads: some elements are held by several threads.
FEW_ELEMENTS = launch.Tuning(
    moments=128, columns=32, rows=16, gradient=16, coarse=32, merge=4, whole_map=64
)
#: Levels 1 and 2 of a 61x64 map get kernels of their own, as those of a large map do.
LARGE_MAP = launch.Tuning(
    moments=2048, columns=1024, rows=256, gradient=512, coarse=256, coarse_pixels=200
)
LARGE_MAP_FEW_ELEMENTS = launch.Tuning(
    moments=512, columns=64, rows=16, gradient=16, coarse=64, coarse_pixels=200
)
#: Two samples of 61x64 at a time.
PARTS = launch.Tuning(
    moments=4096, columns=2048, rows=1024, gradient=1024, workspace_bytes=2 * 10 * 61 * 64
)
TUNINGS = {
    "tiles": SMALL_TILES,
    "few elements": FEW_ELEMENTS,
    "large": LARGE_MAP,
    "large, few elements": LARGE_MAP_FEW_ELEMENTS,
    "parts": PARTS,
}


@pytest.fixture(params=["sm_80", "sm_90"], autouse=True)
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    with triton_on_host.executing(request.param) as made:
        yield made


@pytest.fixture(autouse=True)
def _restore_tuning() -> Iterator[None]:
    yield
    launch.tuning = None


def _check(case: Case, **options: Any) -> None:
    assert_agrees(case, case.run("triton", **options), loss_tests.FLOAT32_RTOL, **options)


@EACH_FORMULATION
@pytest.mark.parametrize(
    ("height", "width", "channels"),
    [(1, 1, 3), (2, 3, 1), (4, 4, 3), (8, 8, 3), (16, 31, 4), (33, 40, 5), (61, 64, 3)],
)
def test_every_number_of_levels(
    generator: torch.Generator,
    height: int,
    width: int,
    channels: int,
    formulation: str,
    distance: str,
) -> None:
    for levels in range(1, 7):
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
@pytest.mark.parametrize("tuning", TUNINGS)
def test_other_partitions(
    generator: torch.Generator, tuning: str, formulation: str, distance: str
) -> None:
    launch.tuning = TUNINGS[tuning]
    case = make_case(generator, 61, 64)
    _check(case, formulation=formulation, distance=distance, levels=5)


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
    allowed = expected.abs() * 2.0**-8 + loss_tests.FLOAT32_RTOL * size
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
        allowed = b.abs() * info.eps / 2 + 1e-6 * b.abs().max()
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


# --- order of threads, races, barriers ------------------------------------------------------------


def _loss(
    size: tuple[int, int], formulation: str, dtype: torch.dtype = torch.float32, levels: int = 5
) -> Callable[[], list[torch.Tensor]]:
    case = make_case(torch.Generator().manual_seed(0), *size, dtype=dtype, scale=1.0)
    maps = (case.saliency, case.heatmaps, case.tokens)
    distance = "l2" if formulation == "paper" else "mse"
    return lambda: list(backend.harmonization(*maps, formulation, levels, distance, True))


def _blocks(name: str) -> Callable[[], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 3, 37, 45, generator=generator) for _ in range(2))
    ones = torch.ones(2)
    return {
        "standardize": lambda: [backend.standardize_cut(x), backend.standardize_cut_backward(y, x)],
        "pyramid": lambda: [
            *(levels := backend.pyramid(x, 4)),
            backend.pyramid_adjoint(levels, 37, 45),
        ],
        "mse": lambda: [
            backend.positive_part_mse(x[:, 0], y[:, 0]),
            *backend.positive_part_mse_backward(ones, x[:, 0], y[:, 0]),
        ],
    }[name]


#: Every kernel, on both sides of what makes Triton choose another layout.
PATHS: dict[str, tuple[launch.Tuning | None, Callable[[], list[torch.Tensor]]]] = {
    "released": (None, _loss((61, 64), "released")),
    "paper": (None, _loss((61, 64), "paper")),
    "released, bfloat16": (None, _loss((64, 64), "released", torch.bfloat16, levels=4)),
    "released, few elements": (FEW_ELEMENTS, _loss((16, 16), "released")),
    "paper, few elements": (FEW_ELEMENTS, _loss((16, 16), "paper")),
    "released, large": (LARGE_MAP, _loss((61, 64), "released")),
    "paper, large": (LARGE_MAP, _loss((61, 64), "paper")),
    "released, large, few elements": (LARGE_MAP_FEW_ELEMENTS, _loss((36, 40), "released")),
    "paper, large, few elements": (LARGE_MAP_FEW_ELEMENTS, _loss((36, 40), "paper")),
    "standardize": (None, _blocks("standardize")),
    "pyramid": (None, _blocks("pyramid")),
    "mse": (None, _blocks("mse")),
}
#: Barriers of the source that Triton's own make superfluous, as it compiles today: before
#: loss_coarse_paper reads again what it has written it adds that up, and a sum has barriers in it.
SUPERFLUOUS = {"loss_coarse_paper": 1}


def _bits(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [t.contiguous().view(torch.uint8).clone() for t in tensors if t.numel()]


def _equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_order_of_threads_and_programs_does_not_matter(driver: Driver, path: str) -> None:
    launch.tuning, call = PATHS[path]
    expected = _bits(call())
    for order in ptx_on_host.ORDERS[1:]:
        driver.options = ptx_on_host.Options(order=order)
        assert _equal(_bits(call()), expected), order


@pytest.mark.parametrize("path", PATHS)
def test_every_barrier_is_needed(driver: Driver, path: str) -> None:
    launch.tuning, call = PATHS[path]
    expected = _bits(call())
    assert driver.launched
    for kernel in {launched.ptx: launched for launched in driver.launched}.values():
        needless = []
        for where, edited in ptx_on_host.without_each_barrier(kernel.ptx):
            driver.edit = lambda text, old=kernel.ptx, new=edited: new if text == old else text
            if not _noticed(driver, call, expected):
                needless.append(where)
        allowed = SUPERFLUOUS.get(kernel.name, 0)
        # Where a tile has as many elements as there are threads, no two threads hold the same one,
        # and none would read what another writes in its place.
        in_place = kernel.name.startswith(("loss_coarse", "loss_level_up", "loss_gradient"))
        allowed += in_place and "few elements" not in path
        # Where a level has several tiles, the barriers within them do for the one behind them.
        allowed += kernel.name == "loss_coarse_released" and path.endswith("large, few elements")
        assert len(needless) <= allowed, f"{kernel.name}: {needless}"


def _noticed(
    driver: Driver, call: Callable[[], list[torch.Tensor]], expected: list[torch.Tensor]
) -> bool:
    for order in ("ascending", "descending"):
        driver.options = ptx_on_host.Options(order=order)
        try:
            if not _equal(_bits(call()), expected):
                return True
        except ptx_on_host.KernelError:
            return True
    return False


@pytest.mark.parametrize("formulation", ["released", "paper"])
def test_an_address_that_is_off_by_a_row_is_noticed(
    driver: Driver, generator: torch.Generator, formulation: str
) -> None:
    case = make_case(generator, 61, 64)
    expected = case.run("reference", dtype=torch.float64, formulation=formulation)

    def later(text: str) -> str:
        # The first store of the kernel writes a row of 64 floats further on.
        store = re.search(r"st\.global\S* \[ %rd\d+ \+ ", text)
        assert store is not None
        return f"{text[: store.end()]}256{text[store.end() + 1 :]}"

    case.run("triton", formulation=formulation)
    assert driver.launched
    for name in dict.fromkeys(kernel.name for kernel in driver.launched):
        driver.edit = lambda text, name=name: later(text) if f".entry {name}(" in text else text
        try:
            rows, gradient = case.run("triton", formulation=formulation)
        except ptx_on_host.KernelError:
            continue
        with pytest.raises(AssertionError):
            assert_rows_close((rows, gradient), expected, loss_tests.FLOAT32_RTOL)


# --- what Triton does not carry through a loop ----------------------------------------------------


@triton.jit
def _alias(out, start, count):  # type: ignore[no-untyped-def]
    a = start
    b = a
    for i in range(0, count):
        tl.store(out + i, b)
        b = a
        a -= 3


def test_triton_does_not_carry_an_alias(driver: Driver) -> None:
    # In Python b lags a by one turn. Triton finds what a loop carries by comparing values before
    # and after its body, where b and a begin as one: kernels must not be written so.
    out = torch.zeros(5, dtype=torch.int32)
    _alias[(1,)](out, 20, 5)
    assert out.tolist() != [20, 20, 17, 14, 11], (
        f"Triton {triton.__version__} carries an alias: this test and its comment can go"
    )
    assert out.tolist() == [20] * 5
