"""An independent writer of ClickMe shards: checksums, framing, messages and pictures by hand."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image", reason="Pillow (extra: train) encodes the JPEGs")

#: In grey levels, between two implementations of the preprocessing. Both compute source coordinates
#: (up to 256) in float32, where neighbours lie 1.5e-5 apart: two roundings, in two directions, each
#: times a difference of at most 255 grey levels.
PIXEL_TOLERANCE = 2 * 2 * 1.5e-5 * 255


def crc32c(data: bytes) -> int:
    """Castagnoli CRC, bit by bit, reflected polynomial 0x82F63B78."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    value = crc32c(data)
    rotated = (value >> 15) | (value << 17 & 0xFFFFFFFF)
    return ((rotated + 0xA282EAD8) % 2**32).to_bytes(4, "little")


def framed(data: bytes) -> bytes:
    length = len(data).to_bytes(8, "little")
    return length + masked(length) + data + masked(data)


def varint(value: int) -> bytes:
    value %= 2**64
    out = b""
    while value >= 128:
        out += bytes([value % 128 + 128])
        value //= 128
    return out + bytes([value])


def delimited(number: int, content: bytes) -> bytes:
    return varint(number * 8 + 2) + varint(len(content)) + content


def example(**features: bytes | int) -> bytes:
    """A tf.train.Example of single values."""
    entries = b""
    for name, value in features.items():
        if isinstance(value, bytes):
            feature = delimited(1, delimited(1, value))
        else:
            feature = delimited(3, delimited(1, varint(value)))
        entries += delimited(1, delimited(1, name.encode()) + delimited(2, feature))
    return delimited(1, entries)


def jpeg(pixels: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", **{"quality": 95, **options})
    return buffer.getvalue()


def picture(seed: int, size: int = 256) -> np.ndarray:
    """A photograph's stand-in: a few waves of different colours and some noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    waves = [
        sum(
            np.sin(2 * np.pi * (fy * y + fx * x) + phase)
            for fy, fx, phase in rng.uniform(0, 9, (3, 3))
        )
        for _ in range(3)
    ]
    noisy = 128 + 35 * np.stack(waves, -1) + rng.normal(0, 6, (size, size, 3))
    return noisy.clip(0, 255).astype(np.uint8)


def click_map(seed: int, size: int = 256) -> np.ndarray:
    """Clicks as ClickMe has them: small bright discs on black, some at the border."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    disc = np.zeros((size, size))
    for centre_y, centre_x in [(0, 40), (size - 1, size - 1), *rng.uniform(0, size, (12, 2))]:
        disc = np.maximum(disc, 255 * np.exp(-((y - centre_y) ** 2 + (x - centre_x) ** 2) / 300))
    return disc.astype(np.uint8)


def record(seed: int, **changed: bytes | int) -> bytes:
    features: dict[str, bytes | int] = {
        "image": jpeg(picture(seed)),
        "heatmap": jpeg(click_map(seed)),
        "label": (seed * 37) % 1000,
    }
    return example(**{**features, **changed})
