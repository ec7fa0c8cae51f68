# Triton compiles this source: types are those of a launch, and constants are upper case.
# mypy: ignore-errors
# ruff: noqa: N803
"""The pyramid step and its adjoint, MATH.md (4) and (4'), as tiles and as kernels of their own.

Triton gives no access to a neighbour's register, so that every tap is a load of its own through
the first-level cache. Out-of-range taps are masked loads, which give the zero padding.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def level_size(size, level):
    """ceil(size / 2**level), the length of an axis after so many steps."""
    return ((size - 1) >> level) + 1


@triton.jit
def tap(k: tl.constexpr):
    """(1, 4, 6, 4, 1) / 16."""
    return 0.375 if k == 2 else (0.25 if k % 2 == 1 else 0.0625)


@triton.jit
def downsample(source, height, width, stride_y, stride_x, y, x, inside):
    """D of a fine level at coarse positions (y, x), float32; (4)."""
    top = 2 * y - 1 - height % 2
    left = 2 * x - 1 - width % 2
    total = tl.zeros(inside.shape, tl.float32)
    for i in tl.static_range(5):
        row = top + i
        row_inside = inside & (row >= 0) & (row < height)
        line = tl.zeros(inside.shape, tl.float32)
        for j in tl.static_range(5):
            column = left + j
            value = tl.load(
                source + row * stride_y + column * stride_x,
                mask=row_inside & (column >= 0) & (column < width),
                other=0.0,
            ).to(tl.float32)
            line = tl.fma(value, tap(j), line)
        total = tl.fma(line, tap(i), total)
    return total


@triton.jit
def upsample(source, height, width, stride_y, stride_x, y, x, inside):
    """D transposed of a coarse level at fine positions (y, x) of height x width, float32; (4').

    With u = y + beta the taps sit at u // 2, u // 2 - 1 and u // 2 - 2 and are (1, 6, 1) where u is
    even, (4, 4, 0) where it is odd. The tap of 0 is not read: 0 times infinity is no 0.
    """
    u = y + 1 + height % 2
    v = x + 1 + width % 2
    even_y = u % 2 == 0
    even_x = v % 2 == 0
    coarse_height = (height + 1) // 2
    coarse_width = (width + 1) // 2
    total = tl.zeros(inside.shape, tl.float32)
    for i in tl.static_range(3):
        row = u // 2 - i
        row_inside = inside & (row >= 0) & (row < coarse_height)
        if i == 2:
            row_inside = row_inside & even_y
        line = tl.zeros(inside.shape, tl.float32)
        for j in tl.static_range(3):
            column = v // 2 - j
            tap_inside = row_inside & (column >= 0) & (column < coarse_width)
            if j == 2:
                tap_inside = tap_inside & even_x
            value = tl.load(
                source + row * stride_y + column * stride_x, mask=tap_inside, other=0.0
            ).to(tl.float32)
            line = tl.fma(value, tl.where(even_x, 0.375 if j == 1 else 0.0625, 0.25), line)
        total = tl.fma(line, tl.where(even_y, 0.375 if i == 1 else 0.0625, 0.25), total)
    return total


@triton.jit
def tile_of(tile, tiles_x, height, width, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    """Rows (BLOCK_Y, 1), columns (1, BLOCK_X) and the mask of one tile of a map."""
    y = (tile // tiles_x) * BLOCK_Y + tl.arange(0, BLOCK_Y)[:, None]
    x = (tile % tiles_x) * BLOCK_X + tl.arange(0, BLOCK_X)[None, :]
    return y, x, (y < height) & (x < width)


@triton.jit(do_not_specialize=["channels", "tiles_x", "tiles"])
def pyramid_step(
    source,
    output,
    carried,
    channels,
    height,
    width,
    stride_b,
    stride_c,
    stride_y,
    stride_x,
    tiles_x,
    tiles,
    CARRY: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """One level from the one above; CARRY also keeps it in float32 for the level below."""
    index = tl.program_id(0) // tiles
    coarse_height = (height + 1) // 2
    coarse_width = (width + 1) // 2
    y, x, inside = tile_of(
        tl.program_id(0) % tiles, tiles_x, coarse_height, coarse_width, BLOCK_Y, BLOCK_X
    )
    plane = source + (index // channels).to(tl.int64) * stride_b
    plane += (index % channels).to(tl.int64) * stride_c
    read_y, read_x = y, x
    if WIDE:
        read_y, read_x = y.to(tl.int64), x.to(tl.int64)
    value = downsample(plane, height, width, stride_y, stride_x, read_y, read_x, inside)
    at = index.to(tl.int64) * coarse_height * coarse_width + y * coarse_width + x
    tl.store(output + at, value, mask=inside)
    if CARRY:
        tl.store(carried + at, value, mask=inside)


@triton.jit(do_not_specialize=["channels", "tiles_x", "tiles"])
def pyramid_adjoint_step(
    coarse,
    gradient,
    output,
    channels,
    height,
    width,
    coarse_b,
    coarse_c,
    coarse_y,
    coarse_x,
    gradient_b,
    gradient_c,
    gradient_y,
    gradient_x,
    tiles_x,
    tiles,
    ADD: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """The adjoint of one step, plus the gradient of the fine level itself where ADD."""
    index = tl.program_id(0) // tiles
    y, x, inside = tile_of(tl.program_id(0) % tiles, tiles_x, height, width, BLOCK_Y, BLOCK_X)
    b = (index // channels).to(tl.int64)
    c = (index % channels).to(tl.int64)
    read_y, read_x = y, x
    if WIDE:
        read_y, read_x = y.to(tl.int64), x.to(tl.int64)
    plane = coarse + b * coarse_b + c * coarse_c
    value = upsample(plane, height, width, coarse_y, coarse_x, read_y, read_x, inside)
    if ADD:
        plane = gradient + b * gradient_b + c * gradient_c
        value += tl.load(
            plane + read_y * gradient_y + read_x * gradient_x, mask=inside, other=0.0
        ).to(tl.float32)
    tl.store(output + index.to(tl.int64) * height * width + y * width + x, value, mask=inside)
