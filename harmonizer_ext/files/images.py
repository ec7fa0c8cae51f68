"""The one door for pictures: Pillow with a list of formats, sizes checked before pixels are made.

Nothing else in this project opens an image (``tests/test_image_door.py``): Pillow left to itself
hands some formats to other programs, Ghostscript for one.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .reading import MAX_BYTES, UnreadableError, looks_like, open_file, reading
from .text import shown

__all__ = [
    "FORMATS",
    "finite_map",
    "open_image",
    "orientation",
    "pillow_errors",
    "read_image",
    "read_map",
    "rgb_pixels",
    "suffixes",
]

#: The formats that are opened. All of them are decoded within Pillow.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")

_ORIENTATION = 0x0112
_TILE_SIZES = (322, 323)
#: Pillow's modes of 16 bits a channel; it reduces those of three channels to 8 bits itself.
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_GREY = ("1", "L", "I", "F", *_SIXTEEN_BITS)


def suffixes() -> tuple[str, ...]:
    """Ends of the names of files that ``open_image`` opens, in small letters, as Pillow has them.

    Raises:
        ImportError: Pillow is not installed.
    """
    registered = _pillow().registered_extensions().items()
    return tuple(sorted(suffix for suffix, kind in registered if kind in FORMATS))


@contextlib.contextmanager
def open_image(
    source: str | os.PathLike[str] | bytes | BinaryIO,
    name: object = None,
    *,
    formats: tuple[str, ...] = FORMATS,
    max_bytes: int = MAX_BYTES,
) -> Iterator[Any]:
    """A picture as Pillow opens it: its header is read, its pixels are not.

    Args:
        source: a path, the content of a file, or a file.
        name: for the texts of errors; the path, if not given.
        formats: of ``FORMATS``, those that are expected.
        max_bytes: of the decoded picture at three bytes a pixel.

    Raises:
        UnreadableError: it is none of these, damaged, or larger; also for what is raised of the
            picture's content within the ``with`` block.
        ImportError: Pillow is not installed.
    """
    pillow = _pillow()
    if name is None:
        name = source if isinstance(source, str | os.PathLike) else "image"
    expected = f"a readable picture ({', '.join(formats)})"
    with contextlib.ExitStack() as stack:
        if isinstance(source, bytes):
            file: BinaryIO = io.BytesIO(source)
        elif isinstance(source, str | os.PathLike):
            file = stack.enter_context(open_file(source))
        else:
            file = source
        with reading(name):
            file.seek(0)
            head = file.read(32)
        _check_pixels(name, _webp_size(head), max_bytes)
        try:
            with reading(name, expected):
                image = stack.enter_context(pillow.open(file, formats=formats))
        except pillow.DecompressionBombError as error:
            raise UnreadableError(
                f"{shown(name)}: expected a picture of at most {max_bytes // 3} pixels (max_bytes "
                f"/ 3), got more than Pillow's own limit: {error}"
            ) from error
        except UnreadableError as error:
            if not isinstance(error.__cause__, pillow.UnidentifiedImageError):
                raise
            found = looks_like(head) if head else "an empty file"
            if found in ("a PNG", "a JPEG"):
                found += " that is damaged"
            found = found or "another kind of file, or a damaged one"
            raise UnreadableError(f"{shown(name)}: expected {expected}, got {found}") from error
        _check_pixels(name, image.size, max_bytes)
        with reading(name, expected):
            tile = _tile(image)
        _check_pixels(name, tile, max_bytes, "tiles")
        with reading(name, expected):
            yield image


def _check_pixels(
    name: object, size: tuple[int, int], max_bytes: int, what: str = "a picture"
) -> None:
    width, height = size
    if 3 * width * height > max_bytes:
        raise UnreadableError(
            f"{shown(name)}: expected {what} of at most {max_bytes // 3} pixels (max_bytes / "
            f"3), its header says {width}x{height} (width x height)"
        )


def _tile(image: Any) -> tuple[int, int]:
    """Width and height of a TIFF's tiles, which are decoded whole, however small the picture is.

    Strips are as wide as the picture, and decoders make none of more rows than it has.
    """
    tags = getattr(image, "tag_v2", {})
    width, height = (tags.get(tag, 0) for tag in _TILE_SIZES)
    if not isinstance(width, int) or not isinstance(height, int):
        raise ValueError(f"TIFF tiles of {width!r} by {height!r} pixels")
    return width, height


def _webp_size(head: bytes) -> tuple[int, int]:
    """Size of a WebP by its header; Pillow's decoder makes the canvas when it is opened."""
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP" or len(head) < 30:
        return 0, 0
    if head[12:16] == b"VP8X":
        width, height = (int.from_bytes(head[at : at + 3], "little") for at in (24, 27))
        return width + 1, height + 1
    if head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = (int.from_bytes(head[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    return width, height


def orientation(image: Any) -> int:
    """How a picture is turned where it is displayed: 1 (as stored) to 8, by its EXIF or XMP.

    Metadata that cannot be read turn nothing.
    """
    try:
        with reading("EXIF"):
            value = image.getexif().get(_ORIENTATION, 1)
    except UnreadableError:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(image: Any) -> Any:
    """The picture as it is displayed, decoded."""
    image.load()  # before its metadata: Pillow turns a TIFF itself
    way = _pillow().Transpose
    ways = {
        2: way.FLIP_LEFT_RIGHT,
        3: way.ROTATE_180,
        4: way.FLIP_TOP_BOTTOM,
        5: way.TRANSPOSE,
        6: way.ROTATE_270,
        7: way.TRANSVERSE,
        8: way.ROTATE_90,
    }
    turn = ways.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def rgb_pixels(image: Any, name: object = "image", max_bytes: int = MAX_BYTES) -> Tensor:
    """The pixels of a Pillow image as it is displayed: 8 bits a channel, whatever it is stored as.

    Of 16 bits a channel the upper eight are taken; grey, palettes and CMYK become RGB as Pillow
    converts them; transparency is dropped, as timm and torchvision do.

    Returns:
        (3, H, W) uint8 with the strides of (H, W, 3), as decoders write it.

    Raises:
        UnreadableError: it cannot be decoded, is larger than ``max_bytes``, or has 32 bits a
            channel, of which nobody says what is white.
    """
    _check_pixels(name, image.size, max_bytes)
    with reading(name, "a readable picture"):
        image = _upright(image)
        sixteen = image.mode in _SIXTEEN_BITS or (image.mode == "I" and image.format == "PNG")
        if sixteen:
            image = _eight_bits(image)
        elif image.mode.startswith(("I", "F")):
            raise UnreadableError(
                f"{shown(name)}: expected a picture with 8 or 16 bits a channel, got Pillow's mode "
                f"{image.mode!r}; scale it to 0..255 and store 8 bits"
            )
        if image.mode != "RGB":
            image = image.convert("RGB")
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return pixels.reshape(image.height, image.width, 3).permute(2, 0, 1)


def _eight_bits(image: Any) -> Any:
    """The upper half of a grey image of 16 bits, as Pillow takes it of three channels."""
    import numpy as np

    values = np.asarray(image)
    if values.dtype.itemsize == 4:  # older versions of Pillow read 16 bits into 32
        values = values.clip(0, 65535)
    return _pillow().fromarray((values.astype(np.uint16) >> 8).astype(np.uint8))


def read_image(path: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> Tensor:
    """A picture by its path, as ``rgb_pixels``: (3, H, W) uint8.

    Raises:
        UnreadableError: it cannot be read; the text names it.
    """
    with open_image(path, max_bytes=max_bytes) as image:
        return rgb_pixels(image, path, max_bytes)


def read_map(path: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> Tensor:
    """A human map that is stored as a picture: (H, W) float32, with the values that are stored.

    Grey of any depth is taken. Colours (RGB, palettes) and transparency are taken where they are
    none: channels that are equal, and opaque.

    Raises:
        UnreadableError: it cannot be read, is coloured or transparent, or holds values that are
            not finite.
    """
    import numpy as np

    with open_image(path, max_bytes=max_bytes) as image:
        image = _upright(image)
        values = np.asarray(image if image.mode in _GREY else image.convert("RGBA"))
        if values.ndim == 3:
            red, green, blue, alpha = np.moveaxis(values, 2, 0)
            if (red != green).any() or (red != blue).any() or (alpha != 255).any():
                raise UnreadableError(
                    f"{shown(path)}: expected a grey map, got colours or transparency (Pillow's "
                    f"mode {image.mode}); store one channel"
                )
            values = red
        return finite_map(torch.from_numpy(values.astype(np.float32)), path)


def finite_map(values: Tensor, name: object) -> Tensor:
    """The map itself, (H, W) float32, if all of it is finite.

    Raises:
        UnreadableError: it holds a NaN or an infinity, or what float32 makes one.
    """
    if not bool(values.isfinite().all()):
        raise UnreadableError(f"{shown(name)}: expected a map of finite numbers, got others")
    return values


def pillow_errors() -> tuple[type[Exception], ...]:
    """Errors of Pillow beside those of content: of too large an image, where it is imported."""
    module = sys.modules.get("PIL.Image")
    return () if module is None else (module.DecompressionBombError,)


def _pillow() -> Any:
    try:
        import PIL.Image
    except ImportError as error:
        raise ImportError(
            "reading pictures needs Pillow: pip install harmonizer-ext[train]"
        ) from error
    return PIL.Image
