"""positive_part_mse: kernels against the reference, by hand, NaN, one derivative and no second."""

from __future__ import annotations

import pytest
import torch
from conftest import Target, skip_unless_supported

import harmonizer_ext as hx


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 5), (31, 33), (225, 223)])
@pytest.mark.parametrize(
    ("dtype_a", "dtype_b"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
    ],
)
def test_agrees_with_reference(
    target: Target,
    generator: torch.Generator,
    height: int,
    width: int,
    dtype_a: torch.dtype,
    dtype_b: torch.dtype,
) -> None:
    skip_unless_supported(target, torch.promote_types(dtype_a, dtype_b))
    a, b = (
        torch.randn(3, height, width, generator=generator).to(dtype).to(target.device)
        for dtype in (dtype_a, dtype_b)
    )
    inputs = a.requires_grad_(), b.requires_grad_()
    wide = tuple(x.detach().double().cpu().requires_grad_() for x in inputs)
    upstream = torch.randn(3, generator=generator).double()
    got = hx.positive_part_mse(*inputs, backend=target.backend)
    expected = hx.positive_part_mse(*wide, backend="reference")
    # A lane adds up to 64 squares of float32: at most 64 * 6e-8.
    rtol = 1e-13 if dtype_a == torch.float64 else 4e-6
    torch.testing.assert_close(got.detach().cpu().double(), expected, rtol=rtol, atol=0)
    grads = torch.autograd.grad(got, inputs, upstream.to(got.dtype).to(target.device))
    wants = torch.autograd.grad(expected, wide, upstream.to(got.dtype).double())
    for grad, want, dtype in zip(grads, wants, (dtype_a, dtype_b), strict=True):
        assert grad.dtype == dtype
        # One rounding on writing, after a few in the accumulation type; subnormals have a fixed
        # step.
        info = torch.finfo(dtype)
        torch.testing.assert_close(
            grad.cpu().double(),
            want,
            rtol=info.eps + 4 * rtol,
            atol=info.smallest_normal * info.eps,
        )


def test_by_hand(target: Target) -> None:
    a = torch.tensor([[[1.0, -2.0], [3.0, 0.0]]], device=target.device, requires_grad=True)
    b = torch.tensor([[[-1.0, 2.0], [1.0, 0.0]]], device=target.device, requires_grad=True)
    out = hx.positive_part_mse(a, b, backend=target.backend)
    # (1 - 0)^2 + (0 - 2)^2 + (3 - 1)^2 + 0, over 4.
    assert out.tolist() == [2.25]
    grad_a, grad_b = torch.autograd.grad(out.sum(), (a, b))
    assert grad_a.tolist() == [[[0.5, 0.0], [1.0, 0.0]]]
    assert grad_b.tolist() == [[[0.0, 1.0], [-1.0, 0.0]]]


def test_nan_stays_in_its_map(target: Target, generator: torch.Generator) -> None:
    a = torch.randn(3, 9, 8, generator=generator).to(target.device)
    b = torch.randn(3, 9, 8, generator=generator).to(target.device)
    a[1, 3, 3] = torch.nan
    rows = hx.positive_part_mse(a, b, backend=target.backend)
    assert rows.isnan().tolist() == [False, True, False]


def test_derivatives() -> None:
    a, b = (torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(hx.positive_part_mse, (a, b))
    (grad,) = torch.autograd.grad(hx.positive_part_mse(a, b).sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match=r'positive_part_mse: .* backend="reference"'):
        grad.square().sum().backward()
