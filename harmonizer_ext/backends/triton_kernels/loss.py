# Triton compiles this source: types are those of a launch, and constants are upper case.
# mypy: ignore-errors
# ruff: noqa: N803
"""The full-size level of the fused loss: down to level 1, and the gradient back from it.

MATH.md (7) to (17). ``loss_released`` and ``loss_paper`` have the levels in between, ``statistics``
the first kernel.
Tokens of 0: a sample is neither read nor worked on. Maps that are not finite arrive here as records
of NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from harmonizer_ext.backends.triton_kernels.pyramid import tap, tile_of
from harmonizer_ext.backends.triton_kernels.statistics import RECORD, store_moments

#: Sums of one tile: energy, and the two of (13) or (15).
SUMS: tl.constexpr = tl.constexpr(3)
#: Numbers of one level's gradient: factor, mean of G, slope kappa, derivative c of the energy.
COEFFICIENTS: tl.constexpr = tl.constexpr(4)


@triton.jit
def cut(centred):
    """Positive part; of NaN 0, which the scales of such a map turn into NaN again."""
    return tl.where(centred > 0, centred, 0.0)


@triton.jit(do_not_specialize=["stride", "tiles_x", "tiles", "slots"])
def loss_columns(
    m,
    h,
    weights,
    records,
    column_a,
    column_b,
    column_mask,
    partials,
    stride,
    m_b,
    h_b,
    height,
    width,
    tiles_x,
    tiles,
    slots,
    PAPER: tl.constexpr,
    GRADIENT: tl.constexpr,
    COARSE: tl.constexpr,
    BEFORE: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """Level 0's sums, and the vertical half of the step to level 1.

    Released: of the difference, and for (14) of (m - mu)+ and [m > mu], whose sixteenths float16
    holds exactly. D is linear, so that the difference's columns are made of the two maps' once
    their taps are summed: nothing of full size is written, and no tap computes a difference but
    the two of five that are this tile's own rows. Paper: of the two maps.
    """
    b = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    if tl.load(weights + b) != 0:
        mean = tl.load(records + b * RECORD)
        scale = tl.load(records + b * RECORD + 1)
        mean_h = tl.load(records + b * RECORD + 2)
        scale_h = tl.load(records + b * RECORD + 3)
        coarse_height = (height + 1) // 2
        y, x, inside = tile_of(tile, tiles_x, coarse_height, width, BLOCK_Y, BLOCK_X)
        m += b * m_b
        h += b * h_b
        # Below every mean, so that what lies outside is cut to zero like any pixel. The paper's
        # pyramid is of the raw maps, where outside is zero and the sums need a mask.
        other: tl.constexpr = 0.0 if PAPER else -float("inf")
        total_a = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
        total_b = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
        total_mask = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
        energy = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
        masked = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
        moment = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
        for k in tl.static_range(5):
            # Without a coarser level only the two rows of its own are read.
            if COARSE or k == BEFORE or k == BEFORE + 1:
                row = 2 * y + (k - BEFORE)
                row_inside = inside & (row >= 0) & (row < height)
                at = row * width + x
                value = tl.load(m + at, mask=row_inside, other=other)
                value_h = tl.load(h + at, mask=row_inside, other=other).to(tl.float32)
                centred = value - mean
                s = cut(centred)
                t = cut(value_h - mean_h)
                above = centred > 0
                if k == BEFORE or k == BEFORE + 1:
                    d = tl.fma(s, scale, -(t * scale_h))
                    if PAPER:
                        d = tl.where(row_inside, d, 0.0)
                    energy = tl.fma(d, d, energy)
                    if GRADIENT:
                        masked += tl.where(above, d, 0.0)
                        moment = tl.fma(d, s, moment)
                if PAPER:
                    total_a = tl.fma(value, tap(k), total_a)
                    total_b = tl.fma(value_h, tap(k), total_b)
                else:
                    total_a = tl.fma(s, tap(k), total_a)
                    total_b = tl.fma(t, tap(k), total_b)
                    total_mask += tl.where(above, tap(k), 0.0)
        partials += b * slots + tile
        tl.store(partials, tl.sum(energy))
        if GRADIENT:
            tl.store(partials + stride, tl.sum(masked))
            tl.store(partials + 2 * stride, tl.sum(moment))
        if COARSE:
            at = y * width + x
            plane = b * coarse_height * width
            if PAPER:
                tl.store(column_a + plane + at, total_a, mask=inside)
                tl.store(column_b + plane + at, total_b, mask=inside)
            else:
                difference = tl.fma(total_a, scale, -(total_b * scale_h))
                tl.store(column_a + plane + at, difference, mask=inside)
                if GRADIENT:
                    tl.store(column_b + plane + at, total_a, mask=inside)
                    tl.store(column_mask + plane + at, total_mask.to(tl.float16), mask=inside)


@triton.jit(do_not_specialize=["stride", "level_stride_a", "level_stride_b", "tiles_x", "tiles"])
def loss_rows(
    column_a,
    column_b,
    column_mask,
    weights,
    level_a,
    level_b,
    level_mask,
    partials,
    stride,
    level_stride_a,
    level_stride_b,
    height,
    width,
    tiles_x,
    tiles,
    PAPER: tl.constexpr,
    GRADIENT: tl.constexpr,
    BEFORE: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """The horizontal half of the step to level 1; with PAPER the moments of its tiles too."""
    b = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    if tl.load(weights + b) != 0:
        coarse_height = (height + 1) // 2
        coarse_width = (width + 1) // 2
        y, x, inside = tile_of(tile, tiles_x, coarse_height, coarse_width, BLOCK_Y, BLOCK_X)
        # Pointers first, so that the taps become constants of the load instructions.
        start = b * coarse_height * width + (y * width + 2 * x - BEFORE)
        a_at = column_a + start
        b_at = column_b + start
        mask_at = column_mask + start
        total_a = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
        total_b = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
        total_mask = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
        for k in tl.static_range(5):
            column = 2 * x + (k - BEFORE)
            tap_inside = inside & (column >= 0) & (column < width)
            value = tl.load(a_at + k, mask=tap_inside, other=0.0)
            total_a = tl.fma(value, tap(k), total_a)
            if PAPER or GRADIENT:
                value = tl.load(b_at + k, mask=tap_inside, other=0.0)
                total_b = tl.fma(value, tap(k), total_b)
            if GRADIENT and not PAPER:
                value = tl.load(mask_at + k, mask=tap_inside, other=0.0).to(tl.float32)
                total_mask = tl.fma(value, tap(k), total_mask)
        at = y * coarse_width + x
        tl.store(level_a + b * level_stride_a + at, total_a, mask=inside)
        if PAPER or GRADIENT:
            tl.store(level_b + b * level_stride_b + at, total_b, mask=inside)
        if GRADIENT and not PAPER:
            plane = b * coarse_height * coarse_width
            tl.store(level_mask + plane + at, total_mask.to(tl.float16), mask=inside)
        if PAPER:
            store_level_moments(partials + b * tiles + tile, stride, total_a, total_b, inside)


@triton.jit
def store_level_moments(partials, stride, a, b, inside):
    """Moments of a tile of either map of a coarse level, shifted by the tile's rounded mean."""
    count = tl.sum(tl.where(inside, 1.0, 0.0))
    tl.store(partials, count)
    shift = tl.sum(tl.where(inside, a, 0.0)) / count
    store_moments(partials + stride, stride, a, shift, count, inside)
    shift = tl.sum(tl.where(inside, b, 0.0)) / count
    store_moments(partials + 5 * stride, stride, b, shift, count, inside)


@triton.jit
def pixel_gradient(
    centred, centred_h, scale, scale_h, factor, g_mean, slope, chain, up, PAPER: tl.constexpr
):
    """(13) and (17), or (15) and (16), of pixels less the means of their maps."""
    g = tl.fma(cut(centred), scale, -(cut(centred_h) * scale_h))
    if not PAPER:
        g = tl.fma(g, chain, up)
    g = tl.where(centred > 0, g, 0.0)
    out = factor * tl.fma(centred, -slope, g - g_mean)
    if PAPER:
        out += up
    return out


@triton.jit(do_not_specialize=["level_stride", "tiles_x", "tiles"])
def loss_gradient(
    m,
    h,
    weights,
    records,
    coefficients,
    level,
    gradient,
    m_b,
    h_b,
    level_stride,
    height,
    width,
    tiles_x,
    tiles,
    PAPER: tl.constexpr,
    COARSE: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BEFORE_Y: tl.constexpr,
    BEFORE_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """The gradient of the saliency, written once; (13), (15), (16), (17).

    A tile of coarse positions makes the 2 x 2 fine pixels of each from the 3 x 3 around it: 9 loads
    for 4 pixels. With IN_PLACE ``gradient`` is ``m``.
    """
    b = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    coarse_height = (height + 1) // 2
    coarse_width = (width + 1) // 2
    fine_x = (tile % tiles_x) * (2 * BLOCK_X) + tl.arange(0, 2 * BLOCK_X)[None, :]
    y, x, inside = tile_of(tile, tiles_x, coarse_height, coarse_width, BLOCK_Y, BLOCK_X)
    gradient += b * height * width
    active = tl.load(weights + b) != 0
    if active:
        mean = tl.load(records + b * RECORD)
        scale = tl.load(records + b * RECORD + 1)
        mean_h = tl.load(records + b * RECORD + 2)
        scale_h = tl.load(records + b * RECORD + 3)
        factor = tl.load(coefficients + b * COEFFICIENTS)
        g_mean = tl.load(coefficients + b * COEFFICIENTS + 1)
        slope = tl.load(coefficients + b * COEFFICIENTS + 2)
        chain = tl.load(coefficients + b * COEFFICIENTS + 3)
        m += b * m_b
        h += b * h_b
        even_even = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
        even_odd = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
        odd_even = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
        odd_odd = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
        if COARSE:
            # Pointers first, so that the taps become constants of the load instructions.
            here_at = level + b * level_stride + (y * coarse_width + x)
            before_at = here_at - coarse_width
            after_at = here_at + coarse_width
            for i in tl.static_range(3):
                column = x + (i - 1)
                column_inside = inside & (column >= 0) & (column < coarse_width)
                before = tl.load(before_at + (i - 1), mask=column_inside & (y > 0), other=0.0)
                here = tl.load(here_at + (i - 1), mask=column_inside, other=0.0)
                after = tl.load(
                    after_at + (i - 1), mask=column_inside & (y < coarse_height - 1), other=0.0
                )
                wide = tl.fma(here, 0.375, (before + after) * 0.0625)
                # An even length: 2 y takes (4, 4) with the one before, 2 y + 1 takes (1, 6, 1);
                # an odd length: 2 y takes (1, 6, 1), 2 y + 1 takes (4, 4) with the one after.
                if BEFORE_Y == 1:
                    even_row = (before + here) * 0.25
                    odd_row = wide
                else:
                    even_row = wide
                    odd_row = (here + after) * 0.25
                if BEFORE_X == 1:
                    even_odd = tl.fma(even_row, tap(2 * i), even_odd)
                    odd_odd = tl.fma(odd_row, tap(2 * i), odd_odd)
                    if i < 2:
                        even_even = tl.fma(even_row, 0.25, even_even)
                        odd_even = tl.fma(odd_row, 0.25, odd_even)
                else:
                    even_even = tl.fma(even_row, tap(2 * i), even_even)
                    odd_even = tl.fma(odd_row, tap(2 * i), odd_even)
                    if i > 0:
                        even_odd = tl.fma(even_row, 0.25, even_odd)
                        odd_odd = tl.fma(odd_row, 0.25, odd_odd)
        even, even_inside = 2 * y * width + fine_x, (2 * y < height) & (fine_x < width)
        odd, odd_inside = even + width, (2 * y + 1 < height) & (fine_x < width)
        even_m = tl.load(m + even, mask=even_inside, other=0.0) - mean
        odd_m = tl.load(m + odd, mask=odd_inside, other=0.0) - mean
        even_h = tl.load(h + even, mask=even_inside, other=0.0).to(tl.float32) - mean_h
        odd_h = tl.load(h + odd, mask=odd_inside, other=0.0).to(tl.float32) - mean_h
        if IN_PLACE:
            # How Triton deals elements to threads is its own affair: all have read before one
            # writes.
            tl.debug_barrier()
        up = tl.interleave(even_even, even_odd)
        out = pixel_gradient(
            even_m, even_h, scale, scale_h, factor, g_mean, slope, chain, up, PAPER
        )
        tl.store(gradient + even, out, mask=even_inside)
        up = tl.interleave(odd_even, odd_odd)
        out = pixel_gradient(odd_m, odd_h, scale, scale_h, factor, g_mean, slope, chain, up, PAPER)
        tl.store(gradient + odd, out, mask=odd_inside)
    else:
        for i in tl.static_range(2):
            row = 2 * y + i
            zero = tl.zeros((BLOCK_Y, 2 * BLOCK_X), tl.float32)
            tl.store(gradient + row * width + fine_x, zero, mask=(row < height) & (fine_x < width))


@triton.jit
def merge_sums(partials, stride, slots, BLOCK: tl.constexpr):
    """The three sums of a sample's tiles, float64, in index order."""
    first = tl.zeros((BLOCK,), tl.float64)
    second = tl.zeros((BLOCK,), tl.float64)
    third = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, slots, BLOCK):
        t = start + tl.arange(0, BLOCK)
        inside = t < slots
        first += tl.load(partials + t, mask=inside, other=0.0).to(tl.float64)
        second += tl.load(partials + stride + t, mask=inside, other=0.0).to(tl.float64)
        third += tl.load(partials + 2 * stride + t, mask=inside, other=0.0).to(tl.float64)
    return tl.sum(first), tl.sum(second), tl.sum(third)


@triton.jit
def store_coefficients(coefficients, record, factor, sum_g, sum_ge, pixels, chain):
    """Stores what a pixel's gradient needs once its level's sums are known; (13), (15)."""
    r = tl.load(record + 1).to(tl.float64)
    std = tl.load(record + 4).to(tl.float64)
    slope = tl.where(std > 0, sum_ge / pixels * r / tl.where(std > 0, std, 1.0), 0.0)
    tl.store(coefficients, (factor * r).to(tl.float32))
    tl.store(coefficients + 1, (sum_g / pixels).to(tl.float32))
    tl.store(coefficients + 2, slope.to(tl.float32))
    tl.store(coefficients + 3, chain)
