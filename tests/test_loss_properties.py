"""The fused loss on inputs that Hypothesis hunts for; apart, because not every machine has it."""

from __future__ import annotations

import pytest
import torch
from conftest import (
    FORMULATIONS,
    Target,
    assert_rows_close,
    conditioned,
    make_case,
    near_the_cut,
)
from test_loss import FLOAT32_RTOL

from harmonizer_ext.contract import level_sizes

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
@given(
    height=st.integers(4, 70),
    width=st.integers(4, 70),
    channels=st.integers(1, 5),
    levels=st.integers(1, 8),
    exponent=st.floats(-7, 4),
    formulation=st.sampled_from(FORMULATIONS),
    seed=st.integers(0, 2**31),
)
def test_properties(
    target: Target,
    height: int,
    width: int,
    channels: int,
    levels: int,
    exponent: float,
    formulation: tuple[str, str],
    seed: int,
) -> None:
    # Of a map of a few pixels the gradient is what rounding leaves of a cancellation: two pixels
    # are always standardized to 1 and -1. The grid above has them, in float64 too.
    coarsest = level_sizes(height, width, levels)[-1 if formulation[0] == "paper" else 0]
    assume(coarsest[0] * coarsest[1] >= 12)
    generator = torch.Generator().manual_seed(seed)
    case = make_case(generator, height, width, channels=channels, scale=10**exponent)
    options = {"formulation": formulation[0], "distance": formulation[1], "levels": levels}
    rows, grad = case.run(target.backend, target.device, **options)
    assert_rows_close(
        (rows, grad),
        case.run("reference", dtype=torch.float64, **options),
        # Hypothesis hunts for the worst: twice the bound of the grid.
        2 * conditioned(FLOAT32_RTOL, case, levels, formulation[0]),
        except_rows=near_the_cut(case, levels, formulation[0], 3e-6),
    )
    assert (rows >= 0).all()
    # The gradient of a standardized map does not change its mean: MATH.md (13) sums to zero.
    if formulation[0] == "released":
        total = grad.sum((1, 2, 3)).abs()
        assert (total <= 1e-6 * grad.abs().sum((1, 2, 3)) + 1e-30).all()
    # All channels have the same gradient.
    assert torch.equal(grad, grad[:, :1].expand_as(grad))
