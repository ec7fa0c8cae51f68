"""JPEG decoders: Pillow, and libjpeg-turbo's own interface with either inverse DCT."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from harmonizer_ext import contract
from harmonizer_ext.files.images import open_image, orientation
from harmonizer_ext.files.reading import UnreadableError, reading

__all__ = ["Decoder", "choose_decoder", "decode_jpeg"]

#: ``"pillow"`` and ``"simplejpeg"`` take libjpeg's exact inverse DCT, ``"simplejpeg-fast"`` takes
#: its fast one, as TensorFlow does by default.
Decoder = Literal["pillow", "simplejpeg", "simplejpeg-fast"]

_MODULES = {
    "pillow": "PIL.JpegImagePlugin",
    "simplejpeg": "simplejpeg",
    "simplejpeg-fast": "simplejpeg",
}
#: By EXIF's number: the axes (rows, columns) that are reversed, from 5 on after they are swapped.
_FLIPS = {2: (1,), 3: (0, 1), 4: (0,), 5: (), 6: (1,), 7: (0, 1), 8: (0,)}


def choose_decoder(decoder: Decoder | None) -> Decoder:
    """The decoder asked for; for None that of the released pipeline, or Pillow without it.

    Raises:
        ValueError: an unknown name.
        ImportError: its package is not installed.
    """
    if decoder is None:
        if importlib.util.find_spec("simplejpeg") is not None:
            return "simplejpeg-fast"
        _module("pillow")
        contract.warn(
            "decoder: Pillow decodes, whose pixels differ from those of the released pipeline by a "
            "few grey levels; pip install simplejpeg for the same, or say decoder='pillow'"
        )
        return "pillow"
    if decoder not in get_args(Decoder):
        raise ValueError(f"decoder must be one of {get_args(Decoder)}, got {decoder!r}")
    _module(decoder)
    return decoder


def decode_jpeg(
    name: str,
    data: bytes,
    channels: Literal[1, 3],
    size: int,
    decoder: Decoder,
    into: Tensor | None = None,
) -> Tensor:
    """Decodes a square JPEG.

    Args:
        name: of what is decoded, for error texts.
        data: the file.
        channels: 3 for a colour image, to RGB, 1 for a grey one. No conversion between them.
        size: height and width; checked before the pixels are decoded.
        decoder: see ``Decoder``.
        into: memory to write to, a contiguous (size, size, channels) uint8; None is new memory.

    Returns:
        (channels, size, size) uint8, a view of a contiguous (size, size, channels), turned as it is
        displayed where it says so (EXIF). ClickMe's images as released do not.

    Raises:
        UnreadableError: it is no JPEG, damaged, or of another size or number of channels.
        ImportError: the decoder is not installed; or Pillow, which reads EXIF.
    """
    decode = _pillow if decoder == "pillow" else _simplejpeg
    pixels = decode(name, data, channels, size, decoder, into)
    return _upright(name, data, pixels).permute(2, 0, 1)


def _upright(name: str, data: bytes, pixels: Tensor) -> Tensor:
    """The pixels (size, size, channels) as they are displayed, in new memory if they are turned."""
    if not _has_metadata(data):
        return pixels
    with open_image(data, name, formats=("JPEG",)) as image:
        turned = orientation(image)
    if turned == 1:
        return pixels
    swapped = pixels.transpose(0, 1) if turned > 4 else pixels
    return swapped.flip(_FLIPS[turned]).contiguous()


def _has_metadata(data: bytes) -> bool:
    """Whether there is an APP1 before the pixels, which EXIF and XMP are; or who knows what."""
    at = 2
    while data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        marker = data[at + 1]
        if marker in (0xDA, 0xE1):
            return marker == 0xE1
        # A byte of filling, or a segment with its length.
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return True


def _pillow(
    name: str, data: bytes, channels: int, size: int, decoder: Decoder, into: Tensor | None
) -> Tensor:
    mode = {1: "L", 3: "RGB"}[channels]
    _module(decoder)
    # Room for the size that is expected, and for headers that say another one.
    with open_image(data, name, formats=("JPEG",)) as image:
        width, height = image.size
        if image.mode != mode or (height, width) != (size, size):
            raise _unexpected(name, channels, size, f"mode {image.mode}", height, width)
        pixels = image.tobytes()
    # Pillow gives immutable bytes, tensors are not: the one copy, of a tenth of tobytes()'s time.
    made = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).reshape(size, size, channels)
    return made if into is None else into.copy_(made)


def _simplejpeg(
    name: str, data: bytes, channels: int, size: int, decoder: Decoder, into: Tensor | None
) -> Tensor:
    simplejpeg = _module(decoder)
    with reading(name, "a readable JPEG"):
        height, width, stored, _ = simplejpeg.decode_jpeg_header(data)
        kinds = {1: ("Gray",), 3: ("YCbCr", "RGB")}[channels]
        if stored not in kinds or (height, width) != (size, size):
            raise _unexpected(name, channels, size, f"colour space {stored}", height, width)
        pixels = (
            torch.empty((size, size, channels), dtype=torch.uint8, device="cpu")
            if into is None
            else into
        )
        simplejpeg.decode_jpeg(
            data,
            "RGB" if channels == 3 else "GRAY",
            fastdct=decoder == "simplejpeg-fast",
            buffer=pixels.numpy(),
        )
        return pixels


def _unexpected(
    name: str, channels: int, size: int, kind: str, height: int, width: int
) -> UnreadableError:
    return UnreadableError(
        f"{name} must be a JPEG of {channels} channels and {size}x{size} pixels, got {kind} and "
        f"{height}x{width}"
    )


def _module(decoder: Decoder) -> Any:
    try:
        return importlib.import_module(_MODULES[decoder])
    except ImportError as error:
        raise ImportError(
            f'decoder="{decoder}" needs the package {decoder.partition("-")[0]}: '
            "pip install harmonizer-ext[train]"
        ) from error
