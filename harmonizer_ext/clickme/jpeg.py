"""JPEG decoders: Pillow, and libjpeg-turbo's own interface with either inverse DCT."""

from __future__ import annotations

import importlib
import importlib.util
import io
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from harmonizer_ext import contract

__all__ = ["Decoder", "choose_decoder", "decode_jpeg"]

#: ``"pillow"`` and ``"simplejpeg"`` take libjpeg's exact inverse DCT, ``"simplejpeg-fast"`` takes
#: its fast one, as TensorFlow does by default.
Decoder = Literal["pillow", "simplejpeg", "simplejpeg-fast"]

_MODULES = {
    "pillow": "PIL.JpegImagePlugin",
    "simplejpeg": "simplejpeg",
    "simplejpeg-fast": "simplejpeg",
}


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
        (channels, size, size) uint8, a view of a contiguous (size, size, channels).

    Raises:
        ValueError: it is no JPEG, damaged, or of another size or number of channels.
        ImportError: the decoder is not installed.
    """
    decode = _pillow if decoder == "pillow" else _simplejpeg
    return decode(name, data, channels, size, decoder, into).permute(2, 0, 1)


def _pillow(
    name: str, data: bytes, channels: int, size: int, decoder: Decoder, into: Tensor | None
) -> Tensor:
    try:
        # Not Image.open, which warns of large images before their size can be checked here. Bad
        # data raise OSError or SyntaxError.
        with _module(decoder).JpegImageFile(io.BytesIO(data)) as image:
            mode = {1: "L", 3: "RGB"}[channels]
            width, height = image.size
            if image.mode != mode or (height, width) != (size, size):
                raise _unexpected(name, channels, size, f"mode {image.mode}", height, width)
            pixels = image.tobytes()
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{name} is no readable JPEG: {error}") from error
    # Pillow gives immutable bytes, tensors are not: the one copy, of a tenth of tobytes()'s time.
    made = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).reshape(size, size, channels)
    return made if into is None else into.copy_(made)


def _simplejpeg(
    name: str, data: bytes, channels: int, size: int, decoder: Decoder, into: Tensor | None
) -> Tensor:
    simplejpeg = _module(decoder)
    try:
        height, width, stored, _ = simplejpeg.decode_jpeg_header(data)
        kinds = {1: ("Gray",), 3: ("YCbCr", "RGB")}[channels]
        if stored in kinds and (height, width) == (size, size):
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
    except ValueError as error:
        raise ValueError(f"{name} is no readable JPEG: {error}") from error
    raise _unexpected(name, channels, size, f"colour space {stored}", height, width)


def _unexpected(
    name: str, channels: int, size: int, kind: str, height: int, width: int
) -> ValueError:
    return ValueError(
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
