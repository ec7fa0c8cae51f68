"""Maps so large that sums overflow: the loss is right or NaN, and nothing in between."""

from __future__ import annotations

import pytest
import torch
from conftest import FORMULATIONS, Case, Target, make_case, skip_unless_supported

import harmonizer_ext as hx
from harmonizer_ext import backends


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
