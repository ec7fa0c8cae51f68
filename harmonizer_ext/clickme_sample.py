"""A ClickMe sample, the decoding of its JPEGs, and the released preprocessing of its pixels."""

from __future__ import annotations

import functools
import io
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "ClickMeSample",
    "Decoder",
    "EncodedSample",
    "Preprocess",
    "check_options",
    "decode",
    "preprocessed",
    "released_heatmap",
    "released_preprocessing",
]

#: Both JPEGs of a released sample are squares of this many pixels.
STORED_SIZE = 256
RELEASED_SIZE = 224
CLASSES = 1000

Preprocess = Literal["released", "released-heatmap"] | None
Decoder = Literal["pillow", "simplejpeg"]


class ClickMeSample(NamedTuple):
    """One image with its human map.

    ``torch.utils.data.default_collate`` batches the fields to (B, 3, H, W), (B, 1, H, W), (B,)
    int64 and (B,) float32.

    Attributes:
        image: (3, 224, 224) float32, 0 to 255, RGB, not normalized.
        heatmap: (1, 224, 224) float32, 0 to 255.
        label: ImageNet class, 0 to 999.
        token: () float32, 1: this image has a human map.
    """

    image: Tensor
    heatmap: Tensor
    label: int
    token: Tensor


class EncodedSample(NamedTuple):
    """One sample as it is stored: two JPEG files and the class."""

    image: bytes
    heatmap: bytes
    label: int


def check_options(preprocess: Preprocess, decoder: Decoder) -> None:
    """Fails for what a data set could not do later, rather than in a worker.

    Raises:
        ValueError: an unknown name.
        ImportError: the decoder is not installed.
    """
    if preprocess not in ("released", "released-heatmap", None):
        raise ValueError(
            'preprocess must be "released", "released-heatmap" or None, got ' + repr(preprocess)
        )
    if decoder == "simplejpeg":
        _simplejpeg()
    elif decoder == "pillow":
        pillow_image()
    else:
        raise ValueError(f'decoder must be "pillow" or "simplejpeg", got {decoder!r}')


def check_label(label: int, classes: int = CLASSES) -> int:
    if not 0 <= label < classes:
        raise ValueError(f"label must lie between 0 and {classes - 1}, got {label}")
    return label


def decode(encoded: EncodedSample, decoder: Decoder = "pillow") -> ClickMeSample:
    """Decodes both JPEGs.

    Both decoders are libjpeg-turbo with its exact inverse DCT and give the same pixels.

    Returns:
        The sample with image (3, 256, 256) and heatmap (1, 256, 256), both uint8.

    Raises:
        ValueError: a JPEG cannot be decoded or has another size or kind, or the label lies outside
            of 0 to 999.
        ImportError: the decoder is not installed.
    """
    check_label(encoded.label)
    planes = _simplejpeg_planes if decoder == "simplejpeg" else _pillow_planes
    return ClickMeSample(
        planes("image", encoded.image, "RGB"),
        planes("heatmap", encoded.heatmap, "L"),
        encoded.label,
        torch.ones(()),
    )


def preprocessed(sample: ClickMeSample, preprocess: Preprocess) -> ClickMeSample:
    """A decoded sample with the preprocessing of this name, see ``ClickMe``."""
    if preprocess == "released":
        image, heatmap = released_preprocessing(sample.image, sample.heatmap)
        return sample._replace(image=image, heatmap=heatmap)
    if preprocess == "released-heatmap":
        return sample._replace(heatmap=released_heatmap(sample.heatmap, STORED_SIZE))
    return sample


def released_preprocessing(image: Tensor, heatmap: Tensor) -> tuple[Tensor, Tensor]:
    """What ``parse_clickme_prototype`` (``harmonization/common/clickme_dataset.py``) does.

    The image is resized to 224x224, bilinearly without antialiasing; the heatmap goes through
    ``released_heatmap``. No normalization: values stay within 0 to 255.

    Args:
        image: (C, H, W) or (B, C, H, W), any real dtype, on any device.
        heatmap: (1, H, W) or (B, 1, H, W), any real dtype.

    Returns:
        The image (C, 224, 224) and the heatmap (1, 224, 224), float32, batched as they came.
    """
    return _resize(image.float(), RELEASED_SIZE), released_heatmap(heatmap, RELEASED_SIZE)


def released_heatmap(heatmap: Tensor, size: int = RELEASED_SIZE) -> Tensor:
    """The heatmap resized to 64x64, blurred, and resized to its final size, as released.

    Both resizings are bilinear without antialiasing, so that the first one reads a quarter of the
    pixels. The blur correlates with a 10x10 Gaussian of standard deviation 10, almost a box: its
    taps reach 4 pixels back and 5 ahead in both directions, and its peak is at one pixel ahead in x
    and in the middle in y, because of the even size. Beyond the border there are zeros, and the
    weights are not renormalized, so the border is darkened.

    Args:
        heatmap: (1, H, W) or (B, 1, H, W), any real dtype.
        size: of the result; 224 as released.

    Returns:
        (1, size, size) or (B, 1, size, size), float32.
    """
    small = _resize(heatmap.float(), 64)
    # (left, right, top, bottom): TensorFlow's SAME for an even kernel has the odd zero at the end.
    padded = F.pad(small, (4, 5, 4, 5))
    horizontal, vertical = (kernel.to(padded.device) for kernel in _blur_kernels())
    return _resize(F.conv2d(F.conv2d(padded, horizontal), vertical), size)


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
    """Bilinear without antialiasing, (..., C, H, W) to (..., C, size, size)."""
    height, width = maps.shape[-2:]
    if height == width and 8 * size == 7 * height:
        return _seven_eighths(maps)
    batch = maps if maps.ndim == 4 else maps[None]
    resized = F.interpolate(batch, (size, size), mode="bilinear", align_corners=False)
    return resized if maps.ndim == 4 else resized[0]


def _seven_eighths(maps: Tensor) -> Tensor:
    """Bilinear resizing by 7/8, in a third of the time that ``F.interpolate`` takes.

    Every 8 pixels become 7, each between a pixel and its next, with the same weights in every 8.
    """
    *batch, height, width = maps.shape
    pixel = torch.arange(7, dtype=torch.float32, device=maps.device)
    weight = (pixel + 0.5) * 8 / 7 - 0.5 - pixel
    rows = maps.reshape(*batch, height // 8, 8, width)
    rows = torch.lerp(rows[..., :7, :], rows[..., 1:, :], weight[:, None])
    columns = rows.reshape(*batch, height // 8 * 7, width // 8, 8)
    columns = torch.lerp(columns[..., :7], columns[..., 1:], weight)
    return columns.reshape(*batch, height // 8 * 7, width // 8 * 7)


def pillow_pixels(image: Any) -> Tensor:
    """The pixels of a Pillow image of mode RGB or L: (channels, H, W) uint8."""
    width, height = image.size
    # Plane by plane: Pillow separates the channels faster than a transposition would.
    planes = b"".join(band.tobytes() for band in image.split())
    return torch.frombuffer(bytearray(planes), dtype=torch.uint8).reshape(-1, height, width)


def _pillow_planes(name: str, data: bytes, mode: str) -> Tensor:
    try:
        # Pillow's exceptions for bad data are OSError (UnidentifiedImageError among them),
        # SyntaxError, ValueError and, for sizes that cannot be, DecompressionBombError.
        with pillow_image().open(io.BytesIO(data), formats=["JPEG"]) as image:
            _check_kind(name, image.mode, image.size[1], image.size[0], mode)
            image.load()
    except (OSError, SyntaxError, pillow_image().DecompressionBombError) as error:
        raise ValueError(f"{name} is no readable JPEG: {error}") from error
    return pillow_pixels(image)


def _simplejpeg_planes(name: str, data: bytes, mode: str) -> Tensor:
    simplejpeg = _simplejpeg()
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        kind = {"Gray": "L", "YCbCr": "RGB", "RGB": "RGB"}.get(space, space)
        _check_kind(name, kind, height, width, mode)
        pixels = simplejpeg.decode_jpeg(data, colorspace="RGB" if mode == "RGB" else "GRAY")
    except ValueError as error:
        if str(error).startswith(name):
            raise
        raise ValueError(f"{name} is no readable JPEG: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _check_kind(name: str, found: str, height: int, width: int, mode: str) -> None:
    if found != mode or (height, width) != (STORED_SIZE, STORED_SIZE):
        raise ValueError(
            f"{name} must be a JPEG of mode {mode} and {STORED_SIZE}x{STORED_SIZE} pixels, got "
            f"mode {found} and {height}x{width}"
        )


def pillow_image() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "ClickMe decodes JPEGs with Pillow: pip install harmonizer-ext[train]"
        ) from error
    return Image


def _simplejpeg() -> Any:
    try:
        import simplejpeg
    except ImportError as error:
        raise ImportError(
            'decoder="simplejpeg" needs the package: pip install simplejpeg'
        ) from error
    return simplejpeg
