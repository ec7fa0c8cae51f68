# Triton compiles this source: types are those of a launch, and constants are upper case.
# mypy: ignore-errors
# ruff: noqa: N803
"""Mean, standard deviation and maximum of maps from the moments of their tiles; MATH.md (1), (2).

A tile's moments are shifted by its first pixel and taken in two passes over registers, and tiles
are merged in float64 in index order. A constant map therefore has a standard deviation of exactly
zero, a large mean cancels against nothing, and the same inputs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

STANDARDIZE_EPSILON: tl.constexpr = tl.constexpr(1e-5)
MAXIMUM_EPSILON: tl.constexpr = tl.constexpr(1e-6)

#: Quantities of one tile: pixels, then shift, mean less shift, sum of squares about the mean and
#: maximum of the saliency, then of the human map.
MOMENTS: tl.constexpr = tl.constexpr(9)
#: Numbers of one map's record: mean and scale of the saliency, of the human map, and the standard
#: deviation of the saliency.
RECORD: tl.constexpr = tl.constexpr(8)


@triton.jit
def tile_moments(values, shift, count, inside):
    """Mean less shift, and sum of squares about the mean, of the pixels inside."""
    centred = tl.where(inside, values - shift, 0.0)
    offset = tl.sum(centred) / count
    centred = tl.where(inside, centred - offset, 0.0)
    return offset, tl.sum(centred * centred)


@triton.jit
def store_moments(partials, stride, values, shift, count, inside):
    offset, squares = tile_moments(values, shift, count, inside)
    tl.store(partials, shift)
    tl.store(partials + stride, offset)
    tl.store(partials + 2 * stride, squares)
    tl.store(partials + 3 * stride, tl.max(tl.where(inside, values, -float("inf"))))


@triton.jit
def merge_moments(partials, stride, quantity, tiles, BLOCK: tl.constexpr):
    """Mean, variance and maximum of a map, float64; ``partials`` points at its first count."""
    total = tl.zeros((BLOCK,), tl.float64)
    pixels = tl.zeros((BLOCK,), tl.float64)
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    for start in range(0, tiles, BLOCK):
        t = start + tl.arange(0, BLOCK)
        inside = t < tiles
        count = tl.load(partials + t, mask=inside, other=0.0).to(tl.float64)
        at = partials + quantity * stride + t
        mean = tl.load(at, mask=inside, other=0.0).to(tl.float64)
        mean += tl.load(at + stride, mask=inside, other=0.0).to(tl.float64)
        total += count * mean
        pixels += count
        best = tl.maximum(best, tl.load(at + 3 * stride, mask=inside, other=-float("inf")))
    n = tl.sum(pixels)
    mean = tl.sum(total) / n
    squares = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, tiles, BLOCK):
        t = start + tl.arange(0, BLOCK)
        inside = t < tiles
        count = tl.load(partials + t, mask=inside, other=0.0).to(tl.float64)
        at = partials + quantity * stride + t
        apart = tl.load(at, mask=inside, other=0.0).to(tl.float64)
        apart += tl.load(at + stride, mask=inside, other=0.0).to(tl.float64)
        apart = tl.where(inside, apart - mean, 0.0)
        squares += tl.load(at + 2 * stride, mask=inside, other=0.0).to(tl.float64)
        squares += count * apart * apart
    return mean, tl.sum(squares) / n, tl.max(best).to(tl.float64)


@triton.jit
def checked_std(mean, variance):
    """Standard deviation in float64, NaN where mean or variance is not a finite float32.

    An overflown variance would otherwise turn the map into zeros and the loss into a plausible lie.
    """
    finite = (tl.abs(mean.to(tl.float32)) < float("inf")) & (variance.to(tl.float32) < float("inf"))
    return tl.where(finite, tl.sqrt(variance), float("nan"))


@triton.jit
def store_record(record, m_mean, m_std, m_max, h_mean, h_std, h_max, RELEASED: tl.constexpr):
    """Stores what the later kernels need of a map; a map that is not finite poisons all of it.

    Comparisons swallow a NaN, so that it travels in the scales: whatever the cut leaves is
    multiplied by them.
    """
    r = 1.0 / (m_std + STANDARDIZE_EPSILON)
    r_h = 1.0 / (h_std + STANDARDIZE_EPSILON)
    if RELEASED:
        # Maxima of the standardized maps follow from those of the maps; (7).
        s_max = (m_max - m_mean) * r
        t_max = (h_max - h_mean) * r_h
        r_h = r_h / (t_max + MAXIMUM_EPSILON) * (s_max + MAXIMUM_EPSILON)
    poison = m_std * 0.0 + h_std * 0.0
    tl.store(record, m_mean.to(tl.float32))
    tl.store(record + 1, (r + poison).to(tl.float32))
    tl.store(record + 2, h_mean.to(tl.float32))
    tl.store(record + 3, (r_h + poison).to(tl.float32))
    tl.store(record + 4, m_std.to(tl.float32))


@triton.jit
def channel_mean(source, offset, channels, stride_c, share, inside, CHANNELS: tl.constexpr):
    """Mean over channels of the pixels at ``offset``, float32; (5)."""
    total = tl.load(source + offset, mask=inside, other=0.0).to(tl.float32)
    if CHANNELS > 0:
        for c in tl.static_range(1, CHANNELS):
            plane = source + tl.cast(c, tl.int64) * stride_c
            total += tl.load(plane + offset, mask=inside, other=0.0).to(tl.float32)
    else:
        for c in range(1, channels):
            plane = source + tl.cast(c, tl.int64) * stride_c
            total += tl.load(plane + offset, mask=inside, other=0.0).to(tl.float32)
    if CHANNELS != 1:
        total = total * share
    return total


@triton.jit
def pixel_offset(i, width, stride_y, stride_x, FLAT: tl.constexpr, WIDE: tl.constexpr):
    """The place of pixel i of a map. FLAT: rows follow each other at the columns' stride."""
    y, x = i // width, i % width
    if WIDE:
        i, y, x = i.to(tl.int64), y.to(tl.int64), x.to(tl.int64)
    if FLAT:
        return i * stride_x
    return y * stride_y + x * stride_x


@triton.jit(do_not_specialize=["stride", "channels", "tiles"])
def loss_moments(
    saliency,
    heatmaps,
    weights,
    m_out,
    h_out,
    partials,
    stride,
    channels,
    pixels,
    width,
    tiles,
    share,
    s_b,
    s_c,
    s_y,
    s_x,
    h_b,
    h_y,
    h_x,
    CHANNELS: tl.constexpr,
    S_FLAT: tl.constexpr,
    H_FLAT: tl.constexpr,
    WIDE: tl.constexpr,
    STORE_M: tl.constexpr,
    STORE_H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Channel mean, written once, and the moments of one tile of either map.

    The channel mean in float32 is written because two later kernels read it: 4 + 2 * 4 bytes a
    pixel against 2 * 12 for reading three channels of float32 again. For bfloat16 it is 12 against
    2 * 6, a draw that saves the instructions of the channel mean.

    The order of a sum follows the layout of the registers, and that the width of the loads. Maps of
    other strides are therefore stored densely and read back before they are summed, so that not
    one bit depends on where a value came from. (The barrier is one of the program, whose own tile
    this is.)
    """
    b = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    if tl.load(weights + b) != 0:
        i = tile * BLOCK + tl.arange(0, BLOCK)
        inside = i < pixels
        saliency += b * s_b
        heatmaps += b * h_b
        at = pixel_offset(i, width, s_y, s_x, S_FLAT, WIDE)
        m = channel_mean(saliency, at, channels, s_c, share, inside, CHANNELS)
        if STORE_M:
            m_out += b * pixels
            tl.store(m_out + i, m, mask=inside)
        at = pixel_offset(i, width, h_y, h_x, H_FLAT, WIDE)
        h = tl.load(heatmaps + at, mask=inside, other=0.0)
        if STORE_H:
            h_out += b * pixels
            tl.store(h_out + i, h, mask=inside)
        if STORE_M or STORE_H:
            tl.debug_barrier()
        first = tile * BLOCK
        if STORE_M:
            m = tl.load(m_out + i, mask=inside, other=0.0)
            m_shift = tl.load(m_out + first)
        else:
            m_shift = tl.load(saliency + first).to(tl.float32)
        if STORE_H:
            h = tl.load(h_out + i, mask=inside, other=0.0)
            h_shift = tl.load(h_out + first).to(tl.float32)
        else:
            h_shift = tl.load(heatmaps + first).to(tl.float32)
        count = tl.minimum(pixels - first, BLOCK).to(tl.float32)
        partials += b * tiles + tile
        tl.store(partials, count)
        store_moments(partials + stride, stride, m, m_shift, count, inside)
        store_moments(partials + 5 * stride, stride, h.to(tl.float32), h_shift, count, inside)


@triton.jit(do_not_specialize=["stride", "tiles"])
def loss_merge(
    partials,
    weights,
    record,
    saliency_std,
    stride,
    tiles,
    RELEASED: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One level's statistics of one sample from its tiles; the first level's are reported."""
    b = tl.program_id(0).to(tl.int64)
    active = tl.load(weights + b) != 0
    if active:
        partials += b * tiles
        m_mean, m_variance, m_max = merge_moments(partials, stride, 1, tiles, BLOCK)
        h_mean, h_variance, h_max = merge_moments(partials, stride, 5, tiles, BLOCK)
        m_std = checked_std(m_mean, m_variance)
        h_std = checked_std(h_mean, h_variance)
        store_record(record + b * RECORD, m_mean, m_std, m_max, h_mean, h_std, h_max, RELEASED)
        if FIRST:
            tl.store(saliency_std + b, m_std.to(tl.float32))
    else:
        if FIRST:
            tl.store(saliency_std + b, 0.0)
