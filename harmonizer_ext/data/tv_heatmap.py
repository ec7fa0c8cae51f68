"""A human map as a tv_tensor: moved like its image, never coloured."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

__all__ = ["Heatmap"]


class Heatmap(tv_tensors.TVTensor):  # type: ignore[misc]
    """A map (1, H, W), float32, that ``torchvision.transforms.v2`` moves along with its image.

    ``tv_tensors.Mask`` is for labels of pixels, which it resamples by taking the nearest; a
    heatmap is resampled bilinearly. What changes colours has no kernel for it and leaves it alone.
    What is erased from the image is erased from it, whatever the image is filled with.
    """


def _register(functional: Any, kernel: Any, resamples: bool) -> None:
    def moved(heatmap: Tensor, *arguments: Any, **options: Any) -> Heatmap:
        if resamples:
            options["interpolation"] = InterpolationMode.BILINEAR
        if options.get("fill") is not None:
            options["fill"] = 0  # the map's, where the image is given a colour
        return Heatmap(kernel(heatmap.as_subclass(Tensor), *arguments, **options))

    F.register_kernel(functional, Heatmap)(moved)


def _erased(
    heatmap: Tensor, i: int, j: int, h: int, w: int, v: Any, inplace: bool = False
) -> Heatmap:
    """People cannot have looked at the image where nothing is left of it."""
    erased = heatmap.as_subclass(Tensor) if inplace else heatmap.as_subclass(Tensor).clone()
    erased[..., i : i + h, j : j + w] = 0
    return Heatmap(erased)


F.register_kernel(F.erase, Heatmap)(_erased)

for _functional, _kernel, _resamples in (
    (F.horizontal_flip, F.horizontal_flip_image, False),
    (F.vertical_flip, F.vertical_flip_image, False),
    (F.crop, F.crop_image, False),
    (F.center_crop, F.center_crop_image, False),
    (F.pad, F.pad_image, False),
    (F.resize, F.resize_image, True),
    (F.resized_crop, F.resized_crop_image, True),
    (F.rotate, F.rotate_image, True),
    (F.affine, F.affine_image, True),
    (F.perspective, F.perspective_image, True),
    (F.elastic, F.elastic_image, True),
):
    _register(_functional, _kernel, _resamples)
