"""standardize_cut: kernels against the reference, constants, NaN, one derivative and no second."""

from __future__ import annotations

import pytest
import torch
from conftest import Target, skip_unless_supported

import harmonizer_ext as hx

SIZES = [(1, 1), (2, 3), (7, 5), (31, 33), (224, 224), (225, 223)]

# As in test_loss.py: about 20 roundings of 6e-8 (1.1e-16) and sums of up to 64 terms a lane,
# relative to the largest element of a map.
RTOL = {torch.float32: 5e-6, torch.float64: 1e-13}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_agrees_with_reference(
    target: Target,
    generator: torch.Generator,
    height: int,
    width: int,
    scale: float,
    dtype: torch.dtype,
) -> None:
    skip_unless_supported(target, dtype)
    # Skewed, so that few pixels lie at the mean, where the cut makes the gradient jump.
    maps = torch.randn(2, 3, height, width, generator=generator, dtype=dtype).exp() * scale
    upstream = torch.randn(maps.shape, generator=generator, dtype=dtype)
    x = maps.to(target.device).requires_grad_()
    y = maps.double().requires_grad_()
    got = hx.standardize_cut(x, backend=target.backend)
    expected = hx.standardize_cut(y, backend="reference")
    (grad,) = torch.autograd.grad(got, x, upstream.to(target.device))
    (want,) = torch.autograd.grad(expected, y, upstream.double())
    centred = (y - y.mean((2, 3), keepdim=True)).detach()
    near = (centred.abs() < 1e-5 * y.detach()).flatten(2).any(2) & (centred != 0).flatten(2).any(2)
    for a, b, rows in ((got, expected, torch.zeros_like(near)), (grad, want, near)):
        size = b.detach().abs().amax((2, 3), keepdim=True)
        # The gradient cancels where a map has a few pixels: what enters it is the upstream
        # gradient over the standard deviation.
        if a is grad:
            size = size + 1 / (maps.double().std((2, 3), correction=0, keepdim=True) + 1e-5)
        excess = (a.detach().cpu().double() - b.detach()).abs() - RTOL[dtype] * size
        assert (~rows).any()
        assert excess[~rows].max() <= 0


def test_by_hand(target: Target) -> None:
    # mean 2, population std 1: (3 - 2) / (1 + 1e-5).
    maps = torch.tensor([[1.0, 3.0]], device=target.device)
    got = hx.standardize_cut(maps, backend=target.backend).cpu()
    torch.testing.assert_close(got, torch.tensor([[0.0, 1 / 1.00001]]), rtol=2e-7, atol=0)


@pytest.mark.parametrize("constant", [0.0, 0.3, -1e-7, 1e4])
def test_constant_maps_are_zero(
    target: Target, generator: torch.Generator, constant: float
) -> None:
    maps = torch.full((2, 31, 33), constant, device=target.device, requires_grad=True)
    out = hx.standardize_cut(maps, backend=target.backend)
    # Not ones: whatever is the same everywhere, the subtraction of the mean removes.
    upstream = torch.randn(out.shape, generator=generator).to(target.device)
    (grad,) = torch.autograd.grad(out, maps, upstream)
    assert (out == 0).all()
    assert (grad == 0).all()


def test_nan_stays_in_its_map(target: Target, generator: torch.Generator) -> None:
    maps = torch.randn(3, 9, 8, generator=generator).to(target.device)
    clean = hx.standardize_cut(maps, backend=target.backend)
    maps[1, 4, 4] = torch.nan
    x = maps.clone().requires_grad_()
    out = hx.standardize_cut(x, backend=target.backend)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert out[1].isnan().all()
    assert grad[1].isnan().all()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


def test_derivatives() -> None:
    maps = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(hx.standardize_cut, maps)
    (grad,) = torch.autograd.grad(hx.standardize_cut(maps).sum(), maps, create_graph=True)
    with pytest.raises(RuntimeError, match=r'standardize_cut: .* backend="reference"'):
        grad.square().sum().backward()
    assert torch.autograd.gradgradcheck(
        lambda x: hx.standardize_cut(x, backend="reference"), maps, fast_mode=True
    )
