"""The authors' preprocessing of ClickMe, for single samples and for batches, on any device."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["released_preprocessing"]


def released_preprocessing(image: Tensor, heatmap: Tensor) -> tuple[Tensor, Tensor]:
    """What ``parse_clickme_prototype`` (``harmonization/common/clickme_dataset.py``) does.

    The image is resized to 224x224. The heatmap is resized to 64x64, blurred, and resized to
    224x224. All three resizings are bilinear without antialiasing, so that the first one of the
    heatmap reads a quarter of the pixels. The blur correlates with a 10x10 Gaussian of standard
    deviation 10, almost a box: its taps reach 4 pixels back and 5 ahead in both directions, and its
    peak is at one pixel ahead in x and in the middle in y, because of the even size. Beyond the
    border there are zeros, and the weights are not renormalized, so the border is darkened. No
    normalization: values stay within 0 to 255.

    Args:
        image: (C, H, W), any real dtype.
        heatmap: (1, H, W), any real dtype.

    Returns:
        The image (C, 224, 224) and the heatmap (1, 224, 224), float32.
    """
    small = _resize(heatmap.float(), 64)
    # (left, right, top, bottom): TensorFlow's SAME for an even kernel has the odd zero at the end.
    padded = F.pad(small, (4, 5, 4, 5))
    horizontal, vertical = _blur_kernels()
    blurred = F.conv2d(F.conv2d(padded[None], horizontal), vertical)[0]
    return _resize(image.float(), 224), _resize(blurred, 224)


@functools.lru_cache(maxsize=1)
def _blur_kernels() -> tuple[Tensor, Tensor]:
    """The released ``gaussian_kernel``, which is separable: (1, 1, 1, 10) and (1, 1, 10, 1)."""
    taps = torch.arange(10, dtype=torch.float64)
    horizontal = torch.exp(-((taps - 5) ** 2) / (2 * 10**2))
    vertical = torch.exp(-((taps - 4) ** 2) / (2 * 10**2))
    return (
        (horizontal / horizontal.sum()).float().reshape(1, 1, 1, 10),
        (vertical / vertical.sum()).float().reshape(1, 1, 10, 1),
    )


def _resize(maps: Tensor, size: int) -> Tensor:
    return F.interpolate(maps[None], (size, size), mode="bilinear", align_corners=False)[0]
