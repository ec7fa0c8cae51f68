"""Images without human maps, in the forms in which libraries give them."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from harmonizer_ext.clickme import ClickMeSample

__all__ = ["without_map"]


def without_map(
    item: Any, index: int | None = None, image_key: str = "image", label_key: str = "label"
) -> ClickMeSample:
    """A sample with a map of zeros and the token 0.

    Args:
        item: (image, label), as torchvision's ImageFolder, timm and ``to_tuple`` of WebDataset
            give them; a mapping with both, as Hugging Face's ``datasets`` gives it; or a
            ``ClickMeSample``. The image is a PIL image with 8 bits a channel or fewer, or a
            tensor (3, H, W) uint8.
        index: for the text of an error.
        image_key, label_key: of a mapping.

    Returns:
        Image (3, H, W) uint8, heatmap (1, H, W) zeros that take no memory, label, token 0.

    Raises:
        ValueError, TypeError: another form; the text has the index.
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
    pixels = image if isinstance(image, Tensor) else _pil_pixels(image, where)
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


def _pil_pixels(image: Any, where: str) -> Tensor:
    """(3, H, W) with the strides of (H, W, 3), as decoders write it."""
    if not hasattr(image, "convert"):
        raise TypeError(
            f"unmapped: expected a PIL image or a tensor, sample{where} has {type(image).__name__}"
        )
    if image.mode.startswith(("I", "F")):
        # Pillow cuts off what is above 255.
        raise ValueError(
            f"unmapped: expected an image with 8 bits a channel, sample{where} has the mode "
            f"{image.mode!r}; scale it to 0..255 in the data set"
        )
    image = image.convert("RGB")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.reshape(image.height, image.width, 3).permute(2, 0, 1)
