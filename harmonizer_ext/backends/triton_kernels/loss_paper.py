# Triton compiles this source: types are those of a launch, and constants are upper case.
# mypy: ignore-errors
# ruff: noqa: N803
"""The coarse levels of the paper's formulation; MATH.md (9), (10), (15), (16).

One program walks all levels of its sample, down and back up, with a barrier between levels, which
stay in the caches. Levels too large for that are in ``loss_large``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from harmonizer_ext.backends.triton_kernels.loss import (
    COEFFICIENTS,
    cut,
    merge_sums,
    store_coefficients,
)
from harmonizer_ext.backends.triton_kernels.pyramid import (
    downsample,
    level_size,
    tile_of,
    upsample,
)
from harmonizer_ext.backends.triton_kernels.statistics import (
    RECORD,
    checked_std,
    merge_moments,
    store_record,
)


@triton.jit
def level_difference(x_value, y_value, record, inside):
    """d, 0 outside the map, and x - mu of one tile; (9)."""
    centred = x_value - tl.load(record)
    d = cut(centred) * tl.load(record + 1)
    d -= cut(y_value - tl.load(record + 2)) * tl.load(record + 3)
    return tl.where(inside, d, 0.0), centred


@triton.jit
def level_gradient(d, centred, coefficients):
    """gamma of one tile; (15)."""
    g = tl.where(centred > 0, d, 0.0) - tl.load(coefficients + 1)
    return tl.load(coefficients) * (g - centred * tl.load(coefficients + 2))


@triton.jit
def finish_level(
    record, coefficients, weight, share, pixels, energy, sum_g, sum_ge, L2: tl.constexpr
):
    """A level's distance, float64, and its coefficients; (10), (15)."""
    if L2:
        distance = tl.sqrt(energy)
        # NaN fails every comparison; it is in the scale as well.
        chain = tl.where(energy > 0, 1.0 / tl.where(energy > 0, distance, 1.0), 0.0)
    else:
        distance = energy / pixels
        chain = 2.0 / pixels
    factor = weight.to(tl.float64) * chain * share
    store_coefficients(coefficients, record, factor, sum_g, sum_ge, pixels, 0.0)
    return distance


@triton.jit(
    do_not_specialize=[
        "moments_stride",
        "sums_stride",
        "plane_stride",
        "level_stride",
        "height",
        "width",
        "levels",
        "first",
        "first_offset",
        "moment_tiles",
        "slots",
    ]
)
def loss_coarse_paper(
    planes_a,
    planes_b,
    weights,
    records,
    coefficients,
    distances,
    moments,
    sums,
    rows,
    moments_stride,
    sums_stride,
    plane_stride,
    level_stride,
    height,
    width,
    levels,
    first,
    first_offset,
    moment_tiles,
    slots,
    share,
    GRADIENT: tl.constexpr,
    L2: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Levels ``first`` and up of either map's pyramid; the saliency's becomes Gamma.

    ``records`` and ``coefficients`` hold a level's samples every ``level_stride`` samples. Levels
    between 0 and ``first`` have left their distances; level 0 its sums, level ``first`` its
    moments.
    """
    b = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + b)
    if weight != 0:
        energy, sum_g, sum_ge = merge_sums(sums + b * slots, sums_stride, slots, BLOCK)
        loss = finish_level(
            records + b * RECORD, coefficients + b * COEFFICIENTS, weight, share,
            tl.cast(height * width, tl.float64), energy, sum_g, sum_ge, L2,
        )  # fmt: skip
        for level in range(1, tl.minimum(first, levels)):
            loss += tl.load(distances + (level - 1) * level_stride + b)
        base_a = planes_a + b * plane_stride
        base_b = planes_b + b * plane_stride
        offset = first_offset
        for level in range(first, levels):
            fine_height = level_size(height, level)
            fine_width = level_size(width, level)
            pixels = fine_height * fine_width
            at = level * level_stride + b
            if level == first:
                m_mean, m_variance, m_max = merge_moments(
                    moments + b * moment_tiles, moments_stride, 1, moment_tiles, BLOCK
                )
                h_mean, h_variance, h_max = merge_moments(
                    moments + b * moment_tiles, moments_stride, 5, moment_tiles, BLOCK
                )
            else:
                parent_height = level_size(height, level - 1)
                parent_width = level_size(width, level - 1)
                parent = offset - parent_height * parent_width
                tiles_x = tl.cdiv(fine_width, BLOCK_X)
                tiles = tl.cdiv(fine_height, BLOCK_Y) * tiles_x
                total_a = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
                total_b = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
                for tile in range(0, tiles):
                    y, x, inside = tile_of(tile, tiles_x, fine_height, fine_width, BLOCK_Y, BLOCK_X)
                    pixel = offset + y * fine_width + x
                    value = downsample(
                        base_a + parent, parent_height, parent_width, parent_width, 1,
                        y, x, inside,
                    )  # fmt: skip
                    total_a += value
                    tl.store(base_a + pixel, value, mask=inside)
                    value = downsample(
                        base_b + parent, parent_height, parent_width, parent_width, 1,
                        y, x, inside,
                    )  # fmt: skip
                    total_b += value
                    tl.store(base_b + pixel, value, mask=inside)
                tl.debug_barrier()
                n = tl.cast(pixels, tl.float64)
                m_mean = tl.sum(total_a).to(tl.float64) / n
                h_mean = tl.sum(total_b).to(tl.float64) / n
                shift_a = m_mean.to(tl.float32)
                shift_b = h_mean.to(tl.float32)
                square_a = tl.zeros((BLOCK_Y * BLOCK_X,), tl.float32)
                square_b = tl.zeros((BLOCK_Y * BLOCK_X,), tl.float32)
                for start in range(0, pixels, BLOCK_Y * BLOCK_X):
                    i = start + tl.arange(0, BLOCK_Y * BLOCK_X)
                    inside = i < pixels
                    value = tl.load(base_a + offset + i, mask=inside, other=0.0) - shift_a
                    value = tl.where(inside, value, 0.0)
                    square_a = tl.fma(value, value, square_a)
                    value = tl.load(base_b + offset + i, mask=inside, other=0.0) - shift_b
                    value = tl.where(inside, value, 0.0)
                    square_b = tl.fma(value, value, square_b)
                m_variance = tl.sum(square_a).to(tl.float64) / n
                h_variance = tl.sum(square_b).to(tl.float64) / n
                m_max = m_mean
                h_max = h_mean
            record = records + at * RECORD
            store_record(
                record, m_mean, checked_std(m_mean, m_variance), m_max,
                h_mean, checked_std(h_mean, h_variance), h_max, False,
            )  # fmt: skip
            tl.debug_barrier()
            squares = tl.zeros((BLOCK_Y * BLOCK_X,), tl.float32)
            masked = tl.zeros((BLOCK_Y * BLOCK_X,), tl.float32)
            moment = tl.zeros((BLOCK_Y * BLOCK_X,), tl.float32)
            for start in range(0, pixels, BLOCK_Y * BLOCK_X):
                i = start + tl.arange(0, BLOCK_Y * BLOCK_X)
                inside = i < pixels
                x_value = tl.load(base_a + offset + i, mask=inside, other=0.0)
                y_value = tl.load(base_b + offset + i, mask=inside, other=0.0)
                d, centred = level_difference(x_value, y_value, record, inside)
                squares = tl.fma(d, d, squares)
                masked += tl.where(centred > 0, d, 0.0)
                moment = tl.fma(d, cut(centred), moment)
            loss += finish_level(
                record, coefficients + at * COEFFICIENTS, weight, share,
                tl.cast(pixels, tl.float64),
                tl.sum(squares).to(tl.float64), tl.sum(masked).to(tl.float64),
                tl.sum(moment).to(tl.float64), L2,
            )  # fmt: skip
            offset += pixels
            tl.debug_barrier()
        tl.store(rows + b, (weight.to(tl.float64) * loss).to(tl.float32))
        if GRADIENT:
            following = offset
            for step in range(0, levels - first):
                level = levels - 1 - step
                fine_height = level_size(height, level)
                fine_width = level_size(width, level)
                coarse_width = level_size(width, level + 1)
                following = offset
                offset -= fine_height * fine_width
                at = level * level_stride + b
                tiles_x = tl.cdiv(fine_width, BLOCK_X)
                for tile in range(0, tl.cdiv(fine_height, BLOCK_Y) * tiles_x):
                    y, x, inside = tile_of(tile, tiles_x, fine_height, fine_width, BLOCK_Y, BLOCK_X)
                    pixel = offset + y * fine_width + x
                    x_value = tl.load(base_a + pixel, mask=inside, other=0.0)
                    y_value = tl.load(base_b + pixel, mask=inside, other=0.0)
                    d, centred = level_difference(x_value, y_value, records + at * RECORD, inside)
                    gamma = level_gradient(d, centred, coefficients + at * COEFFICIENTS)
                    if step > 0:
                        gamma += upsample(
                            base_a + following, fine_height, fine_width, coarse_width, 1,
                            y, x, inside,
                        )  # fmt: skip
                    tl.debug_barrier()  # in place: all have read before one writes
                    tl.store(base_a + pixel, gamma, mask=inside)
                tl.debug_barrier()
    else:
        tl.store(rows + b, 0.0)
