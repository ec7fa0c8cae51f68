"""The CUDA kernels' own source, run on the CPU: values and indices."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import cuda_cases
import cuda_on_host as host
import cuda_paths
import pytest
import test_loss as loss_tests
import test_loss_overflow as overflow_tests
import test_positive_part_mse as mse_tests
import test_pyramid as pyramid_tests
import test_standardize as standardize_tests
import torch
from conftest import (
    FORMULATIONS,
    Case,
    Target,
    assert_agrees,
    conditioned,
    make_case,
)

from harmonizer_ext import backends

pytestmark = pytest.mark.skipif(
    host.why_not_here() is not None, reason=f"cuda on host: {host.why_not_here()}"
)

TARGET = Target("cuda_on_host", "cpu")
EACH_FORMULATION = pytest.mark.parametrize(("formulation", "distance"), FORMULATIONS)
EACH_DEVICE = pytest.mark.parametrize("device", ["hopper", "turing", "tiny"])


@pytest.fixture(scope="module", autouse=True)
def _programs() -> None:
    # All begin to be built at once, the one that the first tests wait for first.
    host.programs().start()


@pytest.fixture(autouse=True)
def _backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "harmonizer_ext.backends.cuda_on_host", host.backend)
    order = (*backends.PREFERENCE["cpu"], "cuda_on_host")
    monkeypatch.setitem(backends.PREFERENCE, "cpu", order)
    monkeypatch.setattr(host.backend, "variant", 0)
    monkeypatch.setattr(host.backend, "device", {})
    yield
    backends.get.cache_clear()


# --- values: the loss ----------------------------------------------------------------------------


def _agrees(case: Case, levels: int, formulation: str, distance: str) -> None:
    options: dict[str, Any] = {
        "levels": levels,
        "formulation": formulation,
        "distance": distance,
    }
    rtol = conditioned(loss_tests.FLOAT32_RTOL, case, levels, formulation)
    assert_agrees(case, case.run("cuda_on_host", **options), rtol, **options)


@EACH_DEVICE
@pytest.mark.parametrize(
    ("height", "width", "channels"),
    [(1, 1, 3), (1, 7, 1), (5, 5, 4), (33, 31, 3), (64, 64, 1), (97, 130, 4), (225, 223, 3)],
)
def test_loss(
    generator: torch.Generator, device: str, height: int, width: int, channels: int
) -> None:
    host.backend.device = cuda_paths.DEVICES[device]
    every = range(1, 8) if height < 97 else (2, 5)
    for levels, (formulation, distance) in itertools.product(every, FORMULATIONS):
        case = make_case(generator, height, width, channels=channels)
        _agrees(case, levels, formulation, distance)


@pytest.mark.parametrize("levels", [5, 7])
def test_specializations_of_the_loss(generator: torch.Generator, levels: int) -> None:
    variants = cuda_paths.variants(host.run)
    assert {variant.size for variant in variants} >= {112, 128, 224, 256, 384, 448, 512}
    for host.backend.variant, _, size, formulation, _, _ in variants:
        case = make_case(generator, size, size, channels=3 if size < 384 else 1)
        distance = "l2" if formulation == "paper" and levels == 7 else "mse"
        _agrees(case, levels, formulation, distance)


@EACH_FORMULATION
@pytest.mark.parametrize("layout", loss_tests._strided(torch.zeros(1, 3, 2, 2)).keys())
def test_loss_strides(
    generator: torch.Generator, layout: str, formulation: str, distance: str
) -> None:
    # Strides may choose another path, and its order of sums: the bits may differ.
    for device, size in (("hopper", (17, 33)), ("tiny", (64, 48)), ("hopper", (112, 112))):
        host.backend.device = cuda_paths.DEVICES[device]
        case = make_case(generator, *size)
        heatmaps = case.heatmaps[:, None].expand(-1, 3, -1, -1)
        case.saliency = loss_tests._strided(case.saliency)[layout]
        case.heatmaps = loss_tests._strided(heatmaps)[layout][:, 0]
        _agrees(case, 5, formulation, distance)


@EACH_FORMULATION
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_of_halves(
    generator: torch.Generator, dtype: torch.dtype, formulation: str, distance: str
) -> None:
    for device, size in (("hopper", (33, 20)), ("tiny", (64, 64)), ("hopper", (112, 112))):
        host.backend.device = cuda_paths.DEVICES[device]
        arguments = (TARGET, generator, dtype, *size, formulation, distance)
        loss_tests.test_half_precision(*arguments)
    loss_tests.test_mixed_dtypes(TARGET, generator)


@pytest.mark.parametrize(("device", "size"), [("hopper", 40), ("tiny", 41), ("hopper", 112)])
@EACH_FORMULATION
def test_loss_of_what_is_not_finite(
    generator: torch.Generator, device: str, size: int, formulation: str, distance: str
) -> None:
    host.backend.device = cuda_paths.DEVICES[device]
    options = {"formulation": formulation, "distance": distance}
    case = make_case(generator, size, size)
    rows, grad = case.run("cuda_on_host", **options)
    assert rows[1] == 0
    assert (grad[1] == 0).all()
    # The second row has no token: whatever it holds is not read.
    case.saliency[1], case.heatmaps[1] = torch.nan, torch.inf
    poisoned = case.run("cuda_on_host", **options)
    assert torch.equal(poisoned[0], rows)
    assert torch.equal(poisoned[1], grad)
    for where, value in (
        ("saliency", torch.nan),
        ("saliency", -torch.inf),
        ("heatmaps", torch.inf),
    ):
        maps = getattr(case, where)
        before = maps.clone()
        maps[0, ..., size // 2, 7] = value
        poisoned = case.run("cuda_on_host", **options)
        assert poisoned[0][0].isnan()
        assert poisoned[1][0].isnan().all()
        assert torch.equal(poisoned[0][1:], rows[1:])
        assert torch.equal(poisoned[1][1:], grad[1:])
        maps.copy_(before)


@pytest.mark.parametrize(("device", "size"), [("hopper", (1, 1)), ("tiny", (33, 31))])
@pytest.mark.parametrize("constant", [0.3, -7.7e-5, 1e4])
def test_loss_of_constant_maps(
    generator: torch.Generator, device: str, size: tuple[int, int], constant: float
) -> None:
    host.backend.device = cuda_paths.DEVICES[device]
    loss_tests.test_constant_maps(TARGET, generator, constant, *size)
    loss_tests.test_constant_maps(TARGET, generator, constant, 112, 112)


def test_loss_large_mean_and_neighbours(generator: torch.Generator) -> None:
    overflow_tests.test_std_of_what_is_not_finite_is_nan(TARGET, generator)
    loss_tests.test_large_mean_and_small_spread(TARGET, generator)
    loss_tests.test_rows_do_not_see_each_other(TARGET, generator)


@EACH_FORMULATION
@pytest.mark.parametrize(
    ("device", "size"),
    # The last but one: level 1 is what one lane makes, so that no other's mean shows its overflow.
    [("hopper", (24, 24)), ("tiny", (40, 40)), ("tiny", (32, 4)), ("hopper", (112, 112))],
)
def test_loss_overflow(
    generator: torch.Generator, device: str, size: tuple[int, int], formulation: str, distance: str
) -> None:
    host.backend.device = cuda_paths.DEVICES[device]
    # Where sums overflow, in a thread or over threads, and beyond.
    exponents = (13, 16, 17, 18, 19, 20, 25, 37) if size[0] == 112 else tuple(range(13, 39))
    arguments = (TARGET, generator, formulation, distance, size, exponents)
    overflow_tests.check_overflow(*arguments)


@EACH_FORMULATION
@pytest.mark.parametrize("size", [61, 112])
def test_loss_value_alone(
    generator: torch.Generator, size: int, formulation: str, distance: str
) -> None:
    case = make_case(generator, size, size)
    inputs = (case.saliency, case.heatmaps, case.tokens, formulation, 5, distance)
    rows, _, std = host.backend.harmonization(*inputs, True)
    value, nothing, same_std = host.backend.harmonization(*inputs, False)
    assert nothing.shape == (0,)
    assert torch.equal(value, rows)
    assert torch.equal(std, same_std)
    expected = case.saliency.double().mean(1).std((1, 2), correction=0)
    expected[1] = 0
    torch.testing.assert_close(std.double(), expected, rtol=1e-6, atol=0)


# --- values: the building blocks -----------------------------------------------------------------


@pytest.mark.parametrize("device", ["hopper", "turing"])
@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (1, 7), (5, 5), (33, 31), (64, 64), (97, 130), (225, 223)]
)
def test_building_blocks(generator: torch.Generator, device: str, height: int, width: int) -> None:
    host.backend.device = cuda_paths.DEVICES[device]
    size = (height, width)
    pyramid_tests.test_agrees_with_reference(TARGET, generator, *size, torch.float32)
    pair = (torch.float32, torch.float32)
    mse_tests.test_agrees_with_reference(TARGET, generator, *size, *pair)
    for scale in (1e-6, 1.0, 1e4):
        arguments = (TARGET, generator, *size, scale, torch.float32)
        standardize_tests.test_agrees_with_reference(*arguments)


@pytest.mark.parametrize("device", ["hopper", "turing"])
@pytest.mark.parametrize("layout", loss_tests._strided(torch.zeros(1, 3, 2, 2)).keys())
def test_building_blocks_strides(generator: torch.Generator, device: str, layout: str) -> None:
    host.backend.device = cuda_paths.DEVICES[device]
    for size in ((9, 8), (97, 100)):

        def adjoint(*levels: torch.Tensor, size: tuple[int, int] = size) -> torch.Tensor:
            return host.backend.pyramid_adjoint(list(levels), *size)

        maps = torch.randn(2, 3, *size, generator=generator)
        strided = loss_tests._strided(maps)[layout]
        other = loss_tests._strided(maps.flip(2))[layout]
        gradients = [
            loss_tests._strided(level)[layout]
            for level in host.backend.pyramid(strided.contiguous(), 4)
        ]
        calls = [
            (host.backend.standardize_cut, (strided,)),
            (host.backend.standardize_cut_backward, (other, strided)),
            (lambda x: host.backend.pyramid(x, 4), (strided,)),
            (adjoint, gradients),
            (host.backend.positive_part_mse, (strided[:, 0], other[:, 1])),
            (host.backend.positive_part_mse_backward, (torch.ones(2), strided[:, 0], other[:, 1])),
        ]
        for function, arguments in calls:
            got = function(*arguments)
            expected = function(*(argument.contiguous() for argument in arguments))
            # A tensor, or several.
            for a, b in zip(got, expected, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_building_blocks_in_halves(generator: torch.Generator, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    for height, width in ((33, 20), (64, 64)):
        maps = torch.randn(2, 3, height, width, generator=generator).to(dtype)
        wide = maps.double().requires_grad_()
        got = [*host.backend.pyramid(maps, 4), host.backend.standardize_cut(maps)]
        reference = backends.get("reference")
        expected = [*reference.pyramid(wide, 4), reference.standardize_cut(wide)]
        upstream = [torch.randn(p.shape, generator=generator).to(dtype) for p in expected]
        # The cut makes the derivative of what lies at the mean jump: that of the pyramid alone.
        (want,) = torch.autograd.grad(expected[:-1], wide, [u.double() for u in upstream[:-1]])
        got.append(host.backend.pyramid_adjoint(upstream[:-1], height, width))
        for a, b in zip(got, (*expected, want), strict=True):
            assert a.dtype == dtype
            # One rounding on writing, however deep, and float32's error.
            allowed = b.abs() * info.eps / 2 + info.smallest_normal * info.eps
            excess = (a.double() - b).abs() - allowed - 5e-6 * b.abs().max()
            assert excess.max() <= 0
        pairs = ((dtype, torch.float32), (torch.float16, torch.bfloat16))
        for pair in pairs:
            mse_tests.test_agrees_with_reference(TARGET, generator, height, width, *pair)


@pytest.mark.parametrize("device", ["hopper", "turing"])
def test_building_blocks_special_maps(generator: torch.Generator, device: str) -> None:
    host.backend.device = cuda_paths.DEVICES[device]
    standardize_tests.test_by_hand(TARGET)
    standardize_tests.test_nan_stays_in_its_map(TARGET, generator)
    for constant in (0.0, 0.3, -1e-7, 1e4):
        standardize_tests.test_constant_maps_are_zero(TARGET, generator, constant)
        # Large enough for several blocks a map.
        flat = torch.full((2, 1, 97, 130), constant)
        assert (host.backend.standardize_cut(flat) == 0).all()
        upstream = torch.randn(flat.shape, generator=generator)
        assert (host.backend.standardize_cut_backward(upstream, flat) == 0).all()
    mse_tests.test_by_hand(TARGET)
    mse_tests.test_nan_stays_in_its_map(TARGET, generator)
    pyramid_tests.test_adjoint_identity(TARGET, generator, 64, 33)


# --- the plan of maps too large to run here -------------------------------------------------------


@pytest.mark.parametrize("device", ["hopper", "turing"])
def test_plan_of_every_size(device: str) -> None:
    sizes = [(1, 1), (1, 4096), (4096, 1), (7, 5), (224, 224), (1023, 1025), (4096, 4096)]
    wanted = [
        {"batch": batch, "height": height, "width": width, "levels": levels, "formulation": paper}
        for (height, width), batch, levels, paper in itertools.product(
            [*sizes, (40_000, 53_000)], (1, 64, 512, 100_000), (1, 2, 5, 16), (0, 1)
        )
    ]
    cases = [cuda_cases.Case("plan", options=options) for options in wanted]
    plans = host.run(cases, environment=cuda_paths.DEVICES[device])
    for options, plan in zip(wanted, plans, strict=True):
        got = plan.options
        assert got, plan.text
        assert not [name for name, left in got.items() if "uncovered" in name and left], options
        assert 1 <= got["samples"] <= options["batch"], options
        assert got["blocks"] < 2**31, options
        assert got["shared_bytes"] <= got["shared_limit"], options
        # Maps, and levels of both, whose rows begin at multiples of four, and little else.
        pixels = options["height"] * (options["width"] + 3 & ~3)
        assert got["workspace_bytes"] <= got["samples"] * (16 * pixels + 2**15) + 2**20, options


# --- indices and order: each path once ------------------------------------------


def every_path(largest: int = 512, batch: int = 3) -> list[tuple[str, cuda_cases.Case]]:
    return cuda_paths.every_path(host.backend, host.run, largest, batch)


def _run_paths(
    paths: list[tuple[str, cuda_cases.Case]], sanitizer: str = "", **settings: str
) -> list[dict[str, torch.Tensor]]:
    return cuda_paths.run_paths(functools.partial(host.run, sanitizer=sanitizer), paths, **settings)


def test_order_of_blocks_and_threads_does_not_matter() -> None:
    paths = every_path()
    forwards, backwards = _run_paths(paths), _run_paths(paths, HARMONIZER_REVERSE="1")
    for (_, case), a, b in zip(paths, forwards, backwards, strict=True):
        assert cuda_paths.same_bits(a, b), case.operation
        # What was never written is NaN.
        assert not any(tensor.isnan().any() for tensor in a.values()), case.operation


def test_indices() -> None:
    paths = every_path()
    for result in _run_paths(paths, "address,undefined"):
        assert not any(tensor.isnan().any() for tensor in result.values())
