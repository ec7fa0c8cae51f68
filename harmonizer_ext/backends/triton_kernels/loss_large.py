# Triton compiles this source: types are those of a launch, and constants are upper case.
# mypy: ignore-errors
# ruff: noqa: N803
"""Coarse levels of large maps, a tile a program and a launch a level.

The same mathematics as in ``loss_released`` and ``loss_paper``, which take over from the first
level that one program can walk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from harmonizer_ext.backends.triton_kernels.loss import (
    COEFFICIENTS,
    cut,
    merge_sums,
    store_level_moments,
)
from harmonizer_ext.backends.triton_kernels.loss_paper import (
    finish_level,
    level_difference,
    level_gradient,
)
from harmonizer_ext.backends.triton_kernels.loss_released import energy_factor
from harmonizer_ext.backends.triton_kernels.pyramid import downsample, tile_of, upsample
from harmonizer_ext.backends.triton_kernels.statistics import RECORD


@triton.jit(do_not_specialize=["stride", "plane_stride", "height", "width", "tiles_x", "tiles"])
def loss_level_down(
    fine_a,
    fine_b,
    coarse_a,
    coarse_b,
    weights,
    partials,
    stride,
    plane_stride,
    height,
    width,
    tiles_x,
    tiles,
    PAPER: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """One pyramid step for large maps, a tile a program; with PAPER of both maps, and moments."""
    b = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    if tl.load(weights + b) != 0:
        coarse_width = (width + 1) // 2
        y, x, inside = tile_of(tile, tiles_x, (height + 1) // 2, coarse_width, BLOCK_Y, BLOCK_X)
        at = b * plane_stride + y * coarse_width + x
        plane = b * plane_stride
        value_a = downsample(fine_a + plane, height, width, width, 1, y, x, inside)
        tl.store(coarse_a + at, value_a, mask=inside)
        if PAPER:
            value_b = downsample(fine_b + plane, height, width, width, 1, y, x, inside)
            tl.store(coarse_b + at, value_b, mask=inside)
            store_level_moments(partials + b * tiles + tile, stride, value_a, value_b, inside)


@triton.jit(
    do_not_specialize=[
        "stride",
        "plane_stride",
        "height",
        "width",
        "levels",
        "tiles_x",
        "tiles",
        "slots",
        "slot",
    ]
)
def loss_level_up_released(
    fine,
    coarse,
    above,
    mask_level,
    weights,
    partials,
    stride,
    plane_stride,
    height,
    width,
    levels,
    tiles_x,
    tiles,
    slots,
    slot,
    GRADIENT: tl.constexpr,
    DOTS: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """One level of (12) for large maps, a tile a program; DOTS at level 1 for (14)."""
    b = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    weight = tl.load(weights + b)
    if weight != 0:
        y, x, inside = tile_of(tile, tiles_x, height, width, BLOCK_Y, BLOCK_X)
        at = b * plane_stride + y * width + x
        pixels = tl.cast(height * width, tl.float32)
        p = tl.load(fine + at, mask=inside, other=0.0)
        partials += b * slots + slot + tile
        tl.store(partials, tl.sum(p * p) / pixels)
        if GRADIENT:
            up = upsample(
                coarse + b * plane_stride, height, width, (width + 1) // 2, 1, y, x, inside
            )
            q = tl.fma(p, energy_factor(weight, levels, pixels), up)
            tl.debug_barrier()  # in place: all have read before one writes
            tl.store(fine + at, q, mask=inside)
            masked = tl.full((), 0.0, tl.float32)
            moment = tl.full((), 0.0, tl.float32)
            if DOTS:
                at = b * height * width + y * width + x
                value = tl.load(mask_level + at, mask=inside, other=0.0).to(tl.float32)
                masked = tl.sum(q * value)
                moment = tl.sum(q * tl.load(above + at, mask=inside, other=0.0))
            tl.store(partials + stride, masked)
            tl.store(partials + 2 * stride, moment)


@triton.jit(do_not_specialize=["stride", "plane_stride", "tiles"])
def loss_level_sums(
    plane_a,
    plane_b,
    weights,
    records,
    partials,
    stride,
    plane_stride,
    pixels,
    tiles,
    BLOCK: tl.constexpr,
):
    """The sums of one tile of a coarse level, for large maps."""
    b = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    if tl.load(weights + b) != 0:
        i = tile * BLOCK + tl.arange(0, BLOCK)
        inside = i < pixels
        x_value = tl.load(plane_a + b * plane_stride + i, mask=inside, other=0.0)
        y_value = tl.load(plane_b + b * plane_stride + i, mask=inside, other=0.0)
        d, centred = level_difference(x_value, y_value, records + b * RECORD, inside)
        partials += b * tiles + tile
        tl.store(partials, tl.sum(d * d))
        tl.store(partials + stride, tl.sum(tl.where(centred > 0, d, 0.0)))
        tl.store(partials + 2 * stride, tl.sum(d * cut(centred)))


@triton.jit(do_not_specialize=["stride", "pixels", "slots"])
def loss_finish_level(
    weights, records, coefficients, partials, distances, stride, pixels, slots, share,
    L2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A level's distance and coefficients from its tiles, for large maps."""
    b = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + b)
    if weight != 0:
        energy, sum_g, sum_ge = merge_sums(partials + b * slots, stride, slots, BLOCK)
        n = tl.cast(pixels, tl.float64)
        distance = finish_level(
            records + b * RECORD, coefficients + b * COEFFICIENTS, weight, share, n, energy,
            sum_g, sum_ge, L2,
        )  # fmt: skip
        tl.store(distances + b, distance)


@triton.jit(do_not_specialize=["plane_stride", "height", "width", "tiles_x", "tiles"])
def loss_level_up_paper(
    fine_a,
    fine_b,
    coarse,
    weights,
    records,
    coefficients,
    plane_stride,
    height,
    width,
    tiles_x,
    tiles,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """One level of (16) for large maps, a tile a program, in place of the saliency's level."""
    b = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    if tl.load(weights + b) != 0:
        y, x, inside = tile_of(tile, tiles_x, height, width, BLOCK_Y, BLOCK_X)
        at = b * plane_stride + y * width + x
        x_value = tl.load(fine_a + at, mask=inside, other=0.0)
        y_value = tl.load(fine_b + at, mask=inside, other=0.0)
        d, centred = level_difference(x_value, y_value, records + b * RECORD, inside)
        gamma = level_gradient(d, centred, coefficients + b * COEFFICIENTS)
        gamma += upsample(
            coarse + b * plane_stride, height, width, (width + 1) // 2, 1, y, x, inside
        )
        tl.debug_barrier()  # in place: all have read before one writes
        tl.store(fine_a + at, gamma, mask=inside)
