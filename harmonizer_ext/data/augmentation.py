"""Image and human map augmented by the same geometry, with torchvision's transforms.

Images stay uint8 until they are on the device: resampling them is twice as fast, and so is moving.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from harmonizer_ext import defaults
from harmonizer_ext.clickme import ClickMeSample
from harmonizer_ext.data import joint_proof
from harmonizer_ext.data.tv_heatmap import Heatmap

__all__ = ["JointTransform", "evaluation_transform", "training_transform"]


class JointTransform:
    """A transform of ``torchvision.transforms.v2``, or of one's own, for image and map.

    The transform is called with a ``tv_tensors.Image`` and, where there is a map, a ``Heatmap`` of
    the same size. Geometry moves both alike; colour changes the image alone. What is erased from
    the image is erased from the map by ``v2.RandomErasing``; a cutout of one's own may leave the
    map as it is.

    That image and map stay together is shown when this is made: the transform, or a copy of it, is
    tried on a pattern some hundred times, in a part of a second, and the random numbers are put
    back. At the first sample with a map, and at the first that is twice as high or wide, it is
    tried some times more at the sample's size. What a function of one's own does once in hundreds
    of calls, or by a pixel or two, may escape this.

    Args:
        transform: of one or two tensors; it keeps their number.

    Raises:
        ValueError: the transform moves image and map apart, as torchvision's AutoAugment,
            RandAugment, TrivialAugmentWide and AugMix do, or does not take two inputs; at the
            call, where image and map differ in size before it or after.
    """

    def __init__(self, transform: Callable[..., Any]) -> None:
        self.transform = transform
        joint_proof.prove(transform)
        #: Sizes at which it was tried, in powers of two.
        self._tried: set[tuple[int, int]] = set()

    def __call__(self, sample: ClickMeSample) -> ClickMeSample:
        """The sample, with its image (3, H, W) and its map (1, H, W) transformed."""
        with defaults.ordinary():  # torchvision draws wherever tensors are made by default
            return self._transformed(sample)

    def _transformed(self, sample: ClickMeSample) -> ClickMeSample:
        image = tv_tensors.Image(sample.image)
        if not sample.token:
            # A map of zeros is one of zeros wherever it is moved.
            moved = self.transform(image).as_subclass(Tensor)
            heatmap = torch.zeros(1, *moved.shape[1:], dtype=torch.float32, device=moved.device)
            return sample._replace(image=moved, heatmap=heatmap)
        _check_sizes(sample.image, sample.heatmap)
        height, width = image.shape[-2:]
        power = height.bit_length(), width.bit_length()
        if power not in self._tried and min(height, width) >= joint_proof.LEAST_SIDE:
            joint_proof.prove(self.transform, (height, width))
            self._tried.add(power)
        result = self.transform(image, Heatmap(sample.heatmap.float()))
        moved, heatmap = joint_proof.checked(result, image)
        return sample._replace(image=moved, heatmap=heatmap)

    def __repr__(self) -> str:
        return f"JointTransform({self.transform})"


def _check_sizes(image: Tensor, heatmap: Tensor) -> None:
    if image.shape[-2:] != heatmap.shape[-2:]:
        raise ValueError(
            f"sample: expected image and map of one size, got {tuple(image.shape)} and "
            f'{tuple(heatmap.shape)}; ClickMe(preprocess="released-heatmap") gives such'
        )


def training_transform(
    size: int,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    rotation: float = 0.0,
) -> JointTransform:
    """Random rotation, random resized crop, random left-right flip: as timm and torchvision train.

    Args:
        size: side of the result.
        scale: smallest and largest area of the crop, of the whole.
        ratio: smallest and largest aspect of the crop, width over height.
        hflip: probability of a flip.
        rotation: largest angle, in degrees; what comes in from outside is black, and no map.
    """
    steps: list[Any] = []
    with defaults.ordinary():  # they keep tensors
        if rotation:
            steps.append(v2.RandomRotation(rotation, interpolation=v2.InterpolationMode.BILINEAR))
        steps.append(v2.RandomResizedCrop(size, scale=scale, ratio=ratio, antialias=True))
        if hflip:
            steps.append(v2.RandomHorizontalFlip(hflip))
    return JointTransform(v2.Compose(steps))


def evaluation_transform(size: int) -> JointTransform:
    """The shorter side resized to ``size``, with antialiasing, and the square in the middle."""
    return JointTransform(v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)]))
