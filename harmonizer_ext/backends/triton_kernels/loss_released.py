# Triton compiles this source: types are those of a launch, and constants are upper case.
# mypy: ignore-errors
# ruff: noqa: N803
"""The coarse levels of the released formulation; MATH.md (8), (11) to (14).

One program walks all levels of its sample, down and back up, with a barrier between levels, which
stay in the caches. Levels too large for that are in ``loss_large``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from harmonizer_ext.backends.triton_kernels.loss import COEFFICIENTS, merge_sums, store_coefficients
from harmonizer_ext.backends.triton_kernels.pyramid import (
    downsample,
    level_size,
    tile_of,
    upsample,
)
from harmonizer_ext.backends.triton_kernels.statistics import RECORD


@triton.jit
def energy_factor(weight, levels, pixels):
    """c of (11)."""
    return 2.0 * weight / (levels * pixels)


@triton.jit
def finish_released(
    b, weight, record, coefficients, rows, partials, stride, own, extra, pixels, levels, share,
    energy, sum_g, sum_ge, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row loss and level 0's coefficients, from level 0's sums and what the other levels added."""
    energy_0, masked, moment = merge_sums(partials, stride, own, BLOCK)
    more = merge_sums(partials + own, stride, extra, BLOCK)
    w = weight.to(tl.float64)
    c = energy_factor(w, levels, pixels)
    loss = energy_0 / pixels + more[0] + energy
    tl.store(rows + b, (w * loss / levels).to(tl.float32))
    store_coefficients(
        coefficients + b * COEFFICIENTS,
        record + b * RECORD,
        share,
        c * masked + more[1] + sum_g,
        c * moment + more[2] + sum_ge,
        pixels,
        c.to(tl.float32),
    )


@triton.jit(
    do_not_specialize=[
        "stride",
        "plane_stride",
        "height",
        "width",
        "levels",
        "first",
        "first_offset",
        "own",
        "slots",
    ]
)
def loss_coarse_released(
    planes,
    above,
    mask_level,
    weights,
    records,
    coefficients,
    partials,
    rows,
    stride,
    plane_stride,
    height,
    width,
    levels,
    first,
    first_offset,
    own,
    slots,
    share,
    GRADIENT: tl.constexpr,
    FINISH: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Levels ``first`` and up of the difference's pyramid, in ``planes``: p becomes q.

    FINISH: ``first`` is level 1, so that this program ends the row; otherwise it leaves its sums in
    the last slot for ``loss_finish_released``.
    """
    b = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + b)
    if weight != 0:
        base = planes + b * plane_stride
        offset = first_offset
        for level in range(first, levels - 1):
            fine_height = level_size(height, level)
            fine_width = level_size(width, level)
            coarse_height = level_size(height, level + 1)
            coarse_width = level_size(width, level + 1)
            tiles_x = tl.cdiv(coarse_width, BLOCK_X)
            following = offset + fine_height * fine_width
            for tile in range(0, tl.cdiv(coarse_height, BLOCK_Y) * tiles_x):
                y, x, inside = tile_of(tile, tiles_x, coarse_height, coarse_width, BLOCK_Y, BLOCK_X)
                value = downsample(
                    base + offset, fine_height, fine_width, fine_width, 1, y, x, inside
                )
                tl.store(base + following + y * coarse_width + x, value, mask=inside)
            offset = following
            tl.debug_barrier()
        energy = tl.full((), 0.0, tl.float64)
        sum_g = tl.full((), 0.0, tl.float64)
        sum_ge = tl.full((), 0.0, tl.float64)
        for step in range(0, levels - first):
            level = levels - 1 - step
            fine_height = level_size(height, level)
            fine_width = level_size(width, level)
            coarse_width = level_size(width, level + 1)
            tiles_x = tl.cdiv(fine_width, BLOCK_X)
            pixels = tl.cast(fine_height * fine_width, tl.float32)
            factor = energy_factor(weight, levels, pixels)
            squares = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
            masked = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
            moment = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
            for tile in range(0, tl.cdiv(fine_height, BLOCK_Y) * tiles_x):
                y, x, inside = tile_of(tile, tiles_x, fine_height, fine_width, BLOCK_Y, BLOCK_X)
                at = y * fine_width + x
                p = tl.load(base + offset + at, mask=inside, other=0.0)
                squares = tl.fma(p, p, squares)
                if GRADIENT:
                    q = p * factor
                    if step > 0:
                        q += upsample(
                            # Made anew: an alias of `offset` would not be carried by the loop.
                            base + offset + fine_height * fine_width, fine_height, fine_width,
                            coarse_width, 1, y, x, inside,
                        )  # fmt: skip
                    # In place, and how Triton deals elements to threads is its own affair: all have
                    # read before one writes.
                    tl.debug_barrier()
                    tl.store(base + offset + at, q, mask=inside)
                    if level == 1:
                        plane = b * fine_height * fine_width
                        share_of_mask = tl.load(mask_level + plane + at, mask=inside, other=0.0)
                        masked = tl.fma(q, share_of_mask.to(tl.float32), masked)
                        part_above = tl.load(above + plane + at, mask=inside, other=0.0)
                        moment = tl.fma(q, part_above, moment)
            energy += (tl.sum(squares) / pixels).to(tl.float64)
            if GRADIENT:
                sum_g += tl.sum(masked).to(tl.float64)
                sum_ge += tl.sum(moment).to(tl.float64)
            offset -= level_size(height, level - 1) * level_size(width, level - 1)
            tl.debug_barrier()
        if FINISH:
            finish_released(
                b, weight, records, coefficients, rows, partials + b * slots, stride, own, 0,
                tl.cast(height * width, tl.float64), levels, share, energy, sum_g, sum_ge, BLOCK,
            )  # fmt: skip
        else:
            partials += b * slots + slots - 1
            tl.store(partials, energy.to(tl.float32))
            tl.store(partials + stride, sum_g.to(tl.float32))
            tl.store(partials + 2 * stride, sum_ge.to(tl.float32))
    else:
        tl.store(rows + b, 0.0)


@triton.jit(do_not_specialize=["stride", "height", "width", "levels", "own", "slots"])
def loss_finish_released(
    weights, records, coefficients, partials, rows, stride, height, width, levels, own, slots,
    share, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + b)
    if weight != 0:
        zero = tl.full((), 0.0, tl.float64)
        finish_released(
            b, weight, records, coefficients, rows, partials + b * slots, stride, own, slots - own,
            tl.cast(height * width, tl.float64), levels, share, zero, zero, zero, BLOCK,
        )  # fmt: skip
