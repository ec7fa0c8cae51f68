"""The authors' preprocessing of ClickMe, for single samples and for batches, on any device."""

from __future__ import annotations

import functools
import math
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from .sample import ClickMeSample

__all__ = ["Preprocess", "check_preprocess", "preprocess_sample", "released_preprocessing"]

#: ``"released"``: ``released_preprocessing``. ``"released-heatmap"``: the image as it is, and the
#: heatmap reduced to 64x64 and blurred as released, then brought to the size of the image, so that
#: a crop of one is a crop of the other; float32, because the rounding to uint8 would be up to 4e-3
#: of its range. None: the pixels as they are stored.
Preprocess = Literal["released", "released-heatmap"] | None


def released_preprocessing(image: Tensor, heatmap: Tensor) -> tuple[Tensor, Tensor]:
    """Does what ``parse_clickme_prototype`` (``harmonization/common/clickme_dataset.py``) does.

    The image is resized to 224x224. The heatmap is resized to 64x64, blurred, and resized to
    224x224. All three resizings are bilinear without antialiasing, so that the first one of the
    heatmap reads a quarter of the pixels. The blur correlates with a 10x10 Gaussian of standard
    deviation 10, almost a box: its taps reach 4 pixels back and 5 ahead in both directions, and its
    peak is at one pixel ahead in x and in the middle in y, because of the even size. Beyond the
    border there are zeros, and the weights are not renormalized, so the border is darkened. No
    normalization: values stay within 0 to 255.

    One sample or a batch of them, on any device. In training, workers that only decode
    (``ClickMe(..., preprocess=None)``) with this on each batch take less time in all.

    Args:
        image: (C, H, W) or (B, C, H, W), any real dtype.
        heatmap: (1, H, W) or (B, 1, H, W), any real dtype.

    Returns:
        The image ([B,] C, 224, 224) and the heatmap ([B,] 1, 224, 224), float32.
    """
    return _resize(image.float(), (224, 224)), _blurred_heatmap(heatmap, (224, 224))


def check_preprocess(preprocess: Preprocess) -> None:
    if preprocess not in ("released", "released-heatmap", None):
        raise ValueError(
            f'preprocess must be "released", "released-heatmap" or None, got {preprocess!r}'
        )


def preprocess_sample(sample: ClickMeSample, preprocess: Preprocess) -> ClickMeSample:
    if preprocess is None:
        return sample
    if preprocess == "released":
        image, heatmap = released_preprocessing(sample.image, sample.heatmap)
        return sample._replace(image=image, heatmap=heatmap)
    height, width = sample.image.shape[-2:]
    return sample._replace(heatmap=_blurred_heatmap(sample.heatmap, (height, width)))


def _blurred_heatmap(heatmap: Tensor, size: tuple[int, int]) -> Tensor:
    small = _resize(heatmap.float(), (64, 64))
    # (left, right, top, bottom): TensorFlow's SAME for an even kernel has the odd zero at the end.
    padded = F.pad(small, (4, 5, 4, 5))
    # The released gaussian_kernel is separable.
    return _resize(_correlate(_correlate(padded, _taps(5), -1), _taps(4), -2), size)


@functools.lru_cache(maxsize=2)
def _taps(peak: int) -> list[float]:
    taps = [math.exp(-((tap - peak) ** 2) / (2 * 10**2)) for tap in range(10)]
    return [tap / sum(taps) for tap in taps]


def _correlate(padded: Tensor, taps: list[float], dim: int) -> Tensor:
    """Sums of shifted maps: a convolution would be rounded to TF32, or to bfloat16 by autocast."""
    size = padded.shape[dim] - len(taps) + 1
    total = padded.narrow(dim, 0, size) * taps[0]
    for start, tap in enumerate(taps[1:], 1):
        total.add_(padded.narrow(dim, start, size), alpha=tap)
    return total


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear without antialiasing, (C, H, W) or (B, C, H, W)."""
    batch = maps if maps.dim() == 4 else maps[None]
    resized = F.interpolate(batch, size, mode="bilinear", align_corners=False)
    return resized if maps.dim() == 4 else resized[0]
