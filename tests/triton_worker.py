"""The Triton backend in Triton's interpreter: what test_triton_interpreter.py runs in a process.

    TRITON_INTERPRET=1 python -m pytest tests/triton_worker.py

The compiled kernels are tested in test_triton_compiled.py. Here it is shown that users' way to run
without a GPU, ``TRITON_INTERPRET=1``, works; each interpreted program costs some 70 ms.
"""

from __future__ import annotations

import os

import pytest
import test_positive_part_mse as mse_tests
import test_standardize as standardize_tests
import torch
from conftest import FORMULATIONS, Target, assert_rows_close, make_case, near_the_cut
from test_loss import FLOAT32_RTOL

import harmonizer_ext as hx

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 before Python starts"

TARGET = Target("triton", "cpu")


@pytest.mark.parametrize(("formulation", "distance"), FORMULATIONS)
def test_loss(generator: torch.Generator, formulation: str, distance: str) -> None:
    case = make_case(generator, 33, 40, channels=5)
    options = {"formulation": formulation, "distance": distance, "levels": 5}
    near = near_the_cut(case, 5, formulation, 3e-6)
    assert not near.all()
    assert_rows_close(
        case.run("triton", **options),
        case.run("reference", dtype=torch.float64, **options),
        FLOAT32_RTOL,
        except_rows=near,
    )


def test_building_blocks(generator: torch.Generator) -> None:
    standardize_tests.test_by_hand(TARGET)
    mse_tests.test_by_hand(TARGET)
    x = torch.randn(2, 3, 9, 8, generator=generator)
    levels = hx.gaussian_pyramid(x, 3, backend="triton")
    for got, expected in zip(levels, hx.gaussian_pyramid(x.double(), 3), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)


def test_the_interpreter_is_named_but_never_picked() -> None:
    available = hx.available_backends("cpu")
    assert available[-1] == "triton"
    assert available[0] != "triton"
    with pytest.raises(RuntimeError, match=r'float32; take backend="reference" for float64'):
        hx.standardize_cut(torch.ones(2, 2, dtype=torch.float64), backend="triton")


if __name__ == "__main__":
    # What Triton's interpreter needs of NumPy, in one kernel.
    hx.standardize_cut(torch.ones(2, 2), backend="triton")
