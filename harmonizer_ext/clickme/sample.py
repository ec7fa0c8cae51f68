"""What every reader of ClickMe returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["ClickMeSample"]


class ClickMeSample(NamedTuple):
    """One image with its human map, or a batch of them.

    ``torch.utils.data.default_collate`` batches the fields to (B, 3, H, W), (B, 1, H, W), (B,)
    int64 and (B,) float32.

    Attributes:
        image: (3, H, W), RGB, 0 to 255, not normalized: (3, 224, 224) float32 with
            ``preprocess="released"``, (3, 256, 256) uint8 without. The strides are free: a decoded
            image is a view of the decoder's (H, W, 3).
        heatmap: (1, H, W), 0 to 255, of the image's height and width and of the same dtype.
        label: ImageNet class, 0 to 999.
        token: () float32, 1: this image has a human map.
    """

    image: Tensor
    heatmap: Tensor
    label: int
    token: Tensor
