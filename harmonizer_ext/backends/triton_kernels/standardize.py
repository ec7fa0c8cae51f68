# Triton compiles this source: types are those of a launch, and constants are upper case.
# mypy: ignore-errors
# ruff: noqa: N803
"""Standardize and cut, and its backward, one program a map; MATH.md (3) and (3')."""

from __future__ import annotations

import triton
import triton.language as tl

from harmonizer_ext.backends.triton_kernels.loss import cut
from harmonizer_ext.backends.triton_kernels.statistics import (
    STANDARDIZE_EPSILON,
    checked_std,
    pixel_offset,
)


@triton.jit
def map_statistics(
    source, pixels, width, stride_y, stride_x,
    FLAT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and standard deviation of one map, float64: two passes, shifted by the first pixel."""
    shift = tl.load(source).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, pixels, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < pixels
        at = pixel_offset(i, width, stride_y, stride_x, FLAT, WIDE)
        value = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
        total += tl.where(inside, value - shift, 0.0)
    n = tl.cast(pixels, tl.float64)
    offset = tl.sum(total.to(tl.float64)) / n
    # Apart, because their sum may need more bits than float32 has.
    offset_32 = offset.to(tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, pixels, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < pixels
        at = pixel_offset(i, width, stride_y, stride_x, FLAT, WIDE)
        value = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(inside, value - shift - offset_32, 0.0)
        squares = tl.fma(centred, centred, squares)
    mean = shift.to(tl.float64) + offset
    return mean, checked_std(mean, tl.sum(squares.to(tl.float64)) / n)


@triton.jit(do_not_specialize=["channels"])
def standardize_cut(
    maps,
    output,
    channels,
    pixels,
    width,
    stride_b,
    stride_c,
    stride_y,
    stride_x,
    FLAT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0)
    maps += (index // channels).to(tl.int64) * stride_b
    maps += (index % channels).to(tl.int64) * stride_c
    output += index.to(tl.int64) * pixels
    mean, std = map_statistics(maps, pixels, width, stride_y, stride_x, FLAT, WIDE, BLOCK)
    scale = (1.0 / (std + STANDARDIZE_EPSILON)).to(tl.float32)
    mean_32 = mean.to(tl.float32)
    for start in range(0, pixels, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < pixels
        at = pixel_offset(i, width, stride_y, stride_x, FLAT, WIDE)
        value = tl.load(maps + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(output + i, cut(value - mean_32) * scale, mask=inside)


@triton.jit(do_not_specialize=["channels"])
def standardize_cut_backward(
    gradient,
    maps,
    output,
    channels,
    pixels,
    width,
    gradient_b,
    gradient_c,
    gradient_y,
    gradient_x,
    stride_b,
    stride_c,
    stride_y,
    stride_x,
    GRADIENT_FLAT: tl.constexpr,
    FLAT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0)
    b = (index // channels).to(tl.int64)
    c = (index % channels).to(tl.int64)
    maps += b * stride_b + c * stride_c
    gradient += b * gradient_b + c * gradient_c
    output += index.to(tl.int64) * pixels
    mean, std = map_statistics(maps, pixels, width, stride_y, stride_x, FLAT, WIDE, BLOCK)
    mean_32 = mean.to(tl.float32)
    sum_g = tl.zeros((BLOCK,), tl.float32)
    sum_ge = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, pixels, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < pixels
        at = pixel_offset(i, width, stride_y, stride_x, FLAT, WIDE)
        centred = tl.load(maps + at, mask=inside, other=0.0).to(tl.float32) - mean_32
        at = pixel_offset(i, width, gradient_y, gradient_x, GRADIENT_FLAT, WIDE)
        above = inside & (centred > 0)
        g = tl.load(gradient + at, mask=above, other=0.0).to(tl.float32)
        sum_g += g
        sum_ge += tl.where(above, g * centred, 0.0)
    n = tl.cast(pixels, tl.float64)
    r = 1.0 / (std + STANDARDIZE_EPSILON)
    safe = tl.where(std > 0, std, 1.0)
    slope = tl.where(std > 0, tl.sum(sum_ge.to(tl.float64)) / n * r / safe, 0.0).to(tl.float32)
    g_mean = (tl.sum(sum_g.to(tl.float64)) / n).to(tl.float32)
    scale = r.to(tl.float32)
    for start in range(0, pixels, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < pixels
        at = pixel_offset(i, width, stride_y, stride_x, FLAT, WIDE)
        centred = tl.load(maps + at, mask=inside, other=0.0).to(tl.float32) - mean_32
        at = pixel_offset(i, width, gradient_y, gradient_x, GRADIENT_FLAT, WIDE)
        g = tl.load(gradient + at, mask=inside & (centred > 0), other=0.0).to(tl.float32)
        tl.store(output + i, scale * (g - g_mean - centred * slope), mask=inside)
