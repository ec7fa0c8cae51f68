"""The sample that every reader of ClickMe returns, and how it is made of a stored record."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .jpeg import Decoder, decode_jpeg

__all__ = ["LEFT_OUT", "ClickMeSample", "check_label", "decode_sample", "left_out"]

#: Label of a sample that stands for one that cannot be read (``on_error="mark"``).
LEFT_OUT = -1

_STORED_SIZE = 256
_CLASSES = 1000


class ClickMeSample(NamedTuple):
    """One image with its human map, or a batch of them.

    ``torch.utils.data.default_collate`` batches the fields to (B, 3, H, W), (B, 1, H, W), (B,)
    int64 and (B,) float32.

    Attributes:
        image: (3, H, W), RGB, 0 to 255, not normalized. Its strides may be those of (H, W, 3), as
            decoders write it.
        heatmap: (1, H, W), 0 to 255.
        label: ImageNet class, 0 to 999.
        token: () float32, 1: this image has a human map.
    """

    image: Tensor
    heatmap: Tensor
    label: int
    token: Tensor


def decode_sample(
    image: bytes,
    heatmap: bytes,
    label: int,
    decoder: Decoder,
    into: tuple[Tensor, Tensor] | None = None,
) -> ClickMeSample:
    """Decodes a record of the released data: image (3, 256, 256), heatmap (1, 256, 256), uint8.

    What of ``into`` is a contiguous (256, 256, channels) uint8 is written to and viewed.

    Raises:
        ValueError: a JPEG cannot be decoded or has another size or number of channels, or the
            label lies outside of 0 to 999.
    """
    check_label(label)
    pixels, map_ = (None, None) if into is None else into
    return ClickMeSample(
        decode_jpeg("image", image, 3, _STORED_SIZE, decoder, _fitting(pixels, 3)),
        decode_jpeg("heatmap", heatmap, 1, _STORED_SIZE, decoder, _fitting(map_, 1)),
        label,
        torch.ones((), dtype=torch.float32, device="cpu"),
    )


def left_out() -> ClickMeSample:
    """Stands for a sample that cannot be read: zeros, the label -1, the token 0."""
    size = _STORED_SIZE
    return ClickMeSample(
        torch.zeros(size, size, 3, dtype=torch.uint8, device="cpu").permute(2, 0, 1),
        torch.zeros(1, size, size, dtype=torch.uint8, device="cpu"),
        LEFT_OUT,
        torch.zeros((), dtype=torch.float32, device="cpu"),
    )


def _fitting(memory: Tensor | None, channels: int) -> Tensor | None:
    if (
        memory is None
        or memory.dtype != torch.uint8
        or memory.shape != (_STORED_SIZE, _STORED_SIZE, channels)
        or not memory.is_contiguous()
    ):
        return None
    return memory


def check_label(label: int) -> None:
    if not 0 <= label < _CLASSES:
        raise ValueError(f"label must lie between 0 and {_CLASSES - 1}, got {label}")
