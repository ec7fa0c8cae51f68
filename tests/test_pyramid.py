"""gaussian_pyramid: kernels against the reference, the adjoint, derivatives of every order."""

from __future__ import annotations

import pytest
import torch
from conftest import Target, skip_unless_supported

import harmonizer_ext as hx

SIZES = [(1, 1), (2, 2), (5, 7), (16, 31), (33, 64), (224, 224), (225, 223), (3, 130)]

# A level is a chain of sums of five products: at most 10 roundings each, relative to the largest
# element, because the taps are positive and add up to one.
RTOL = {torch.float32: 10 * 6e-8, torch.float64: 10 * 1.1e-16}


def _assert_close(got: torch.Tensor, expected: torch.Tensor, levels: int) -> None:
    allowed = RTOL[got.dtype] * levels * expected.abs().max()
    assert (got.cpu().double() - expected).abs().max() <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_agrees_with_reference(
    target: Target, generator: torch.Generator, height: int, width: int, dtype: torch.dtype
) -> None:
    skip_unless_supported(target, dtype)
    maps = torch.randn(2, 3, height, width, generator=generator, dtype=dtype)
    x = maps.to(target.device).requires_grad_()
    y = maps.double().requires_grad_()
    for levels in range(1, 7):
        got = hx.gaussian_pyramid(x, levels, backend=target.backend)
        expected = hx.gaussian_pyramid(y, levels, backend="reference")
        assert [p.shape for p in got] == [p.shape for p in expected]
        upstream = [torch.randn(p.shape, generator=generator, dtype=dtype) for p in expected]
        for p, q in zip(got, expected, strict=True):
            _assert_close(p.detach(), q.detach(), levels)
        (grad,) = torch.autograd.grad(got, x, [u.to(target.device) for u in upstream])
        (want,) = torch.autograd.grad(expected, y, [u.double() for u in upstream])
        _assert_close(grad, want, levels)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("length", "response"),
    [
        # Row i: what an impulse at i becomes, in sixteenths. Even: one zero before; odd: two.
        (6, [[4, 0, 0], [6, 1, 0], [4, 4, 0], [1, 6, 1], [0, 4, 4], [0, 1, 6]]),
        (5, [[6, 1, 0], [4, 4, 0], [1, 6, 1], [0, 4, 4], [0, 1, 6]]),
    ],
)
def test_taps_by_hand(length: int, response: list[list[int]], axis: int) -> None:
    for backend in hx.available_backends("cpu"):
        for position in range(length):
            impulse = torch.zeros((length, 1) if axis == 0 else (1, length))
            impulse.view(-1)[position] = 1.0
            level = hx.gaussian_pyramid(impulse, 2, backend=backend)[1]
            # The other axis has one pixel, which keeps its middle tap, 6/16.
            assert (level.view(-1) * 16 * 16 / 6).tolist() == response[position]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (6, 7), (64, 33)])
def test_adjoint_identity(
    target: Target, generator: torch.Generator, height: int, width: int
) -> None:
    x = torch.randn(1, 1, height, width, generator=generator).to(target.device).requires_grad_()
    coarse = hx.gaussian_pyramid(x, 4, backend=target.backend)[-1]
    y = torch.randn(coarse.shape, generator=generator).to(target.device)
    (adjoint,) = torch.autograd.grad(coarse, x, y)
    left = (coarse.detach().double() * y.double()).sum()
    right = (x.detach().double() * adjoint.double()).sum()
    bound = (coarse.detach().abs() * y.abs()).sum().item()
    assert abs(left - right) <= 1e-6 * bound


def test_derivatives_of_any_order() -> None:
    maps = torch.randn(2, 2, 7, 6, dtype=torch.float64, requires_grad=True)

    def coarse(x: torch.Tensor) -> list[torch.Tensor]:
        return hx.gaussian_pyramid(x, 3)[1:]

    assert torch.autograd.gradcheck(coarse, maps)
    assert torch.autograd.gradgradcheck(coarse, maps)


@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6), (2, 3, 5, 6), (0, 3, 5, 6)])
def test_shapes(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    levels = hx.gaussian_pyramid(x, 3)
    assert levels[0] is x
    assert [p.shape for p in levels[1:]] == [(*shape[:-2], 3, 3), (*shape[:-2], 2, 2)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_value(target: Target, dtype: torch.dtype) -> None:
    # A map of one pixel is multiplied by (6/16)^2 = 9/64, which is exact in float32: this takes
    # every one of the 65,536 values, subnormals, infinities and NaN among them, through reading
    # and rounding.
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    got = (
        hx.gaussian_pyramid(values.view(-1, 1, 1).to(target.device), 2, backend=target.backend)[1]
        .cpu()
        .view(-1)
    )
    expected = (values.float() * (9 / 64)).to(dtype)
    assert torch.equal(got.isnan(), values.isnan())
    number = ~values.isnan()
    assert torch.equal(got[number], expected[number])
