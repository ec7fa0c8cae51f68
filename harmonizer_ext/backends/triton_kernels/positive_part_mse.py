# Triton compiles this source: types are those of a launch, and constants are upper case.
# mypy: ignore-errors
# ruff: noqa: N803
"""Mean squared error of positive parts and its backward; MATH.md (6) and (6')."""

from __future__ import annotations

import triton
import triton.language as tl

from harmonizer_ext.backends.triton_kernels.statistics import pixel_offset


@triton.jit
def positive(value):
    """max(value, 0) that lets NaN through."""
    return tl.where(value <= 0, 0.0, value)


@triton.jit
def positive_part_mse(
    a,
    b,
    rows,
    pixels,
    width,
    a_b,
    a_y,
    a_x,
    b_b,
    b_y,
    b_x,
    A_FLAT: tl.constexpr,
    B_FLAT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row."""
    index = tl.program_id(0).to(tl.int64)
    a += index * a_b
    b += index * b_b
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, pixels, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < pixels
        at = pixel_offset(i, width, a_y, a_x, A_FLAT, WIDE)
        a_value = tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
        at = pixel_offset(i, width, b_y, b_x, B_FLAT, WIDE)
        b_value = tl.load(b + at, mask=inside, other=0.0).to(tl.float32)
        d = positive(a_value) - positive(b_value)
        squares = tl.fma(d, d, squares)
    total = tl.sum(squares.to(tl.float64)) / tl.cast(pixels, tl.float64)
    tl.store(rows + index, total.to(tl.float32))


@triton.jit(do_not_specialize=["tiles"])
def positive_part_mse_backward(
    gradient,
    a,
    b,
    gradient_a,
    gradient_b,
    pixels,
    width,
    tiles,
    share,
    a_b,
    a_y,
    a_x,
    b_b,
    b_y,
    b_x,
    A_FLAT: tl.constexpr,
    B_FLAT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = (tl.program_id(0) // tiles).to(tl.int64)
    i = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    inside = i < pixels
    at = pixel_offset(i, width, a_y, a_x, A_FLAT, WIDE)
    a_value = tl.load(a + index * a_b + at, mask=inside, other=0.0).to(tl.float32)
    at = pixel_offset(i, width, b_y, b_x, B_FLAT, WIDE)
    b_value = tl.load(b + index * b_b + at, mask=inside, other=0.0).to(tl.float32)
    d = (positive(a_value) - positive(b_value)) * (tl.load(gradient + index) * share)
    at = index * pixels + i
    # Written so that a NaN keeps its gradient of NaN.
    tl.store(gradient_a + at, tl.where(a_value <= 0, 0.0, d), mask=inside)
    tl.store(gradient_b + at, tl.where(b_value <= 0, 0.0, -d), mask=inside)
