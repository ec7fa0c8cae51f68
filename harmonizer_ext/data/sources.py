"""Images without human maps, in the forms in which libraries give them."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from harmonizer_ext.clickme import ClickMeSample
from harmonizer_ext.files.images import open_image, rgb_pixels
from harmonizer_ext.files.reading import MAX_BYTES, UnreadableError

__all__ = ["without_map"]


def without_map(
    item: Any,
    index: int | None = None,
    image_key: str = "image",
    label_key: str = "label",
    *,
    max_bytes: int = MAX_BYTES,
) -> ClickMeSample:
    """A sample with a map of zeros and the token 0.

    Args:
        item: (image, label), as torchvision's ImageFolder, timm and ``to_tuple`` of WebDataset
            give them; a mapping with both, as Hugging Face's ``datasets`` gives it; or a
            ``ClickMeSample``. The image is a PIL image, which becomes RGB as
            ``harmonizer_ext.files.images.rgb_pixels`` says; a tensor (3, H, W) uint8; or what
            ``datasets.Image(decode=False)`` gives, the file's content or its path, which is then
            read as that module reads pictures.
        index: for the text of an error.
        image_key, label_key: of a mapping.
        max_bytes: of the pixels.

    Returns:
        Image (3, H, W) uint8, heatmap (1, H, W) zeros that take no memory, label, token 0.

    Raises:
        UnreadableError: the image cannot be decoded, is too large, or has 32 bits a channel.
        ValueError, TypeError: another form. The text has the index.
    """
    where = "" if index is None else f" {index}"
    if isinstance(item, Mapping):
        missing = [key for key in (image_key, label_key) if key not in item]
        if missing:
            raise ValueError(
                f"unmapped: sample{where} has no {' and no '.join(map(repr, missing))}, only "
                f"{sorted(item)}; name the keys with image_key and label_key"
            )
        image, label = item[image_key], item[label_key]
    elif isinstance(item, ClickMeSample):
        image, label = item.image, item.label
    elif isinstance(item, Sequence) and len(item) == 2:
        image, label = item
    else:
        raise TypeError(
            f"unmapped: expected (image, label) or a mapping, sample{where} is "
            f"{type(item).__name__}"
        )
    pixels = image if isinstance(image, Tensor) else _decoded(image, where, max_bytes)
    if pixels.ndim != 3 or pixels.shape[0] != 3 or pixels.dtype != torch.uint8:
        raise ValueError(
            f"unmapped: expected an image (3, H, W) uint8, sample{where} is "
            f"{tuple(pixels.shape)} {pixels.dtype}"
        )
    try:
        number = operator.index(label)
    except TypeError as error:
        raise TypeError(
            f"unmapped: expected an integer label, sample{where} has {type(label).__name__}"
        ) from error
    if number < 0:
        raise ValueError(
            f"unmapped: expected a class from 0 on, sample{where} has the label {number}; "
            "-1 is usual where labels are kept secret, as in a test split"
        )
    zero = torch.zeros((), dtype=torch.float32, device="cpu")
    return ClickMeSample(pixels, zero.expand(1, *pixels.shape[1:]), number, zero)


def _decoded(image: Any, where: str, max_bytes: int) -> Tensor:
    """(3, H, W) with the strides of (H, W, 3), as decoders write it."""
    name = f"unmapped: sample{where}"
    if isinstance(image, Mapping) and image.keys() == {"bytes", "path"}:
        source = image["path"] if image["bytes"] is None else image["bytes"]
        if not isinstance(source, str | bytes):
            raise UnreadableError(f"{name}: expected an image's content or path, got neither")
        with open_image(source, name, max_bytes=max_bytes) as opened:
            return rgb_pixels(opened, name, max_bytes)
    if not hasattr(image, "convert"):
        raise TypeError(
            f"unmapped: expected a PIL image or a tensor, sample{where} has {type(image).__name__}"
        )
    return rgb_pixels(image, name, max_bytes)
