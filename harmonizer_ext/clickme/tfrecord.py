"""Reads and writes TFRecord files of ``tf.train.Example`` messages without TensorFlow.

A TFRecord file is a sequence of records, little-endian: length (8 bytes), masked CRC-32C of the
length (4), data (length), masked CRC-32C of the data (4). The data are a protocol buffer message of
the type ``tf.train.Example`` (tensorflow/core/example/{example,feature}.proto), of which this file
knows what there is to know: a map from names to lists of bytes, floats or integers.
"""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from harmonizer_ext.files.output import replacing
from harmonizer_ext.files.reading import MAX_BYTES, UnreadableError, looks_like, open_file
from harmonizer_ext.files.text import shown

__all__ = [
    "TFRecordError",
    "index_records",
    "parse_example",
    "read_record",
    "scan_records",
    "write_records",
]

Feature = list[bytes] | list[float] | list[int]

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5


class TFRecordError(UnreadableError):
    """A file is truncated, corrupt, or no TFRecord file. The text names the file and the offset.

    Attributes:
        path, offset, reason: of the record. -1 and "" in an error that a DataLoader has rebuilt
            from the text of its worker's, which is ``path`` then.
    """

    def __init__(self, path: str | os.PathLike[str], offset: int = -1, reason: str = "") -> None:
        super().__init__(path, offset, reason)
        self.path = Path(path)
        self.offset = offset
        self.reason = reason

    def __str__(self) -> str:
        if self.offset < 0:
            return str(self.args[0])
        return shown(f"{self.path}, record at byte {self.offset}: {self.reason}")


def index_records(path: str | os.PathLike[str], *, verify: bool = True) -> Tensor:
    """Finds where the records of a file begin, reading the lengths only.

    Args:
        path: the file.
        verify: whether to check the lengths' checksums.

    Returns:
        (n,) int64: the byte offset of each record's header.

    Raises:
        TFRecordError: a record runs past the end of the file or its length is corrupt, or the file
            is empty.
        ImportError: ``verify`` without the package ``google-crc32c``.
    """
    offsets, error = scan_records(path, verify=verify)
    if error is not None:
        raise error
    return offsets


def scan_records(
    path: str | os.PathLike[str], *, verify: bool = True
) -> tuple[Tensor, TFRecordError | None]:
    """Finds where the records of a file begin, as far as they can be followed.

    Args:
        path: the file.
        verify: whether to check the lengths' checksums.

    Returns:
        (n,) int64, the byte offset of each whole record's header, and the error that
        ``index_records`` raises, or None where it raises none. Behind a corrupt length nothing can
        be found, since only the length says where the next record begins.

    Raises:
        ImportError: ``verify`` without the package ``google-crc32c``.
    """
    offsets: list[int] = []
    error = None
    offset = 0
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            error = TFRecordError(path, 0, "the file is empty; was its download interrupted?")
        while offset < size:
            try:
                length = _length(path, offset, file.read(_HEADER.size), verify)
            except TFRecordError as corrupt:
                error = _told_apart(corrupt, file)
                break
            end = offset + _HEADER.size + length + _FOOTER.size
            if end > size:
                error = TFRecordError(
                    path,
                    offset,
                    f"its length is {length} bytes, which needs a file of {end} bytes, but the "
                    f"file ends at {size}: truncated, or no TFRecord file",
                )
                error = _told_apart(error, file)
                break
            offsets.append(offset)
            offset = end
            file.seek(offset)
    return torch.tensor(offsets, dtype=torch.int64, device="cpu"), error


def _told_apart(error: TFRecordError, file: IO[bytes]) -> TFRecordError:
    """The error of a file's first record, with what the file is instead where that is seen."""
    if error.offset:
        return error
    file.seek(0)
    found = looks_like(file.read(64))
    reason = f"{error.reason}. It looks like {found}" if found else error.reason
    return TFRecordError(error.path, 0, reason)


def _open(path: str | os.PathLike[str]) -> IO[bytes]:
    """Opens without a buffer, which would read 8 kB around every 12-byte header."""
    try:
        return open_file(path).detach()  # type: ignore[attr-defined, no-any-return]
    except UnreadableError as error:
        raise TFRecordError(path, 0, str(error).removeprefix(f"{shown(path)}: ")) from error


def read_record(
    path: str | os.PathLike[str],
    offset: int,
    *,
    verify: bool = True,
    max_bytes: int = MAX_BYTES,
) -> bytes:
    """Reads the data of one record.

    Args:
        path: the file.
        offset: the byte offset of the record's header, from ``index_records``.
        verify: whether to check both checksums.
        max_bytes: of the data; a longer record is not read.

    Raises:
        TFRecordError: the record is truncated or too long, or does not match its checksums.
        ImportError: ``verify`` without the package ``google-crc32c``.
    """
    with _open(path) as file:
        available = os.fstat(file.fileno()).st_size - offset - _HEADER.size - _FOOTER.size
        file.seek(offset)
        length = _length(path, offset, file.read(_HEADER.size), verify)
        if length > available:
            raise TFRecordError(
                path, offset, f"it has {length} bytes, but the file ends {length - available} early"
            )
        if length > max_bytes:
            raise TFRecordError(
                path,
                offset,
                f"its length is {length} bytes, expected at most {max_bytes}; pass a larger "
                f"max_bytes if that is right",
            )
        body = file.read(length + _FOOTER.size)
    if len(body) != length + _FOOTER.size:
        raise TFRecordError(path, offset, f"{len(body)} of {length + _FOOTER.size} bytes were read")
    data = body[:length]
    if verify:
        _check(path, offset, "data", data, _FOOTER.unpack_from(body, length)[0])
    return data


def _length(path: str | os.PathLike[str], offset: int, header: bytes, verify: bool) -> int:
    if len(header) < _HEADER.size:
        raise TFRecordError(
            path, offset, f"the file ends within the header, {len(header)} of {_HEADER.size} bytes"
        )
    length, checksum = _HEADER.unpack(header)
    if verify:
        _check(path, offset, "length", header[:8], checksum)
    return int(length)


def _check(
    path: str | os.PathLike[str], offset: int, part: str, data: bytes, expected: int
) -> None:
    checksum = _masked_checksum(data)
    if checksum != expected:
        raise TFRecordError(
            path,
            offset,
            f"the {part} does not match its checksum ({checksum:08x}, stored {expected:08x}): the "
            "file is corrupt, or is no TFRecord file",
        )


def _masked_checksum(data: bytes) -> int:
    try:
        import google_crc32c
    except ImportError as error:
        raise ImportError(
            "TFRecord checksums need google-crc32c: pip install harmonizer-ext[train], or pass "
            "verify=False to read without the check"
        ) from error
    checksum = google_crc32c.value(data)
    # Rotated and shifted, as TFRecord stores it, because the data may hold checksums themselves.
    return int(((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def write_records(
    path: str | os.PathLike[str],
    examples: Iterable[Mapping[str, bytes | int | Sequence[bytes] | Sequence[int]]],
) -> int:
    """Writes a TFRecord file of ``tf.train.Example`` messages.

    The file appears at ``path`` when it is whole: an interruption leaves what was there before.

    Args:
        path: the file.
        examples: the features of each record by name: bytes, an integer of 64 bits, or several of
            one kind.

    Returns:
        The number of records written.

    Raises:
        TypeError: a feature is of another type.
        OverflowError: an integer needs more than 64 bits.
        ImportError: the package ``google-crc32c`` is not installed.
    """
    count = 0
    with replacing(path) as file:
        for example in examples:
            data = _serialized(example)
            length = len(data).to_bytes(8, "little")
            file.write(length + _FOOTER.pack(_masked_checksum(length)))
            file.write(data + _FOOTER.pack(_masked_checksum(data)))
            count += 1
    return count


def _serialized(example: Mapping[str, Any]) -> bytes:
    entries = b""
    for name, value in example.items():
        values: list[Any] = [value] if isinstance(value, bytes | int) else list(value)
        if all(isinstance(item, bytes) for item in values):
            feature = _field(1, b"".join(_field(1, item) for item in values))
        elif all(isinstance(item, int) for item in values):
            # to_bytes refuses what 64 bits do not hold; negative numbers are two's complement.
            unsigned = [
                int.from_bytes(item.to_bytes(8, "little", signed=True), "little") for item in values
            ]
            feature = _field(3, _field(1, b"".join(map(_varint_bytes, unsigned))))
        else:
            kinds = sorted({type(item).__name__ for item in values})
            raise TypeError(f"feature {name!r} must be bytes or integers, got {', '.join(kinds)}")
        entries += _field(1, _field(1, name.encode()) + _field(2, feature))
    return _field(1, entries)


def _field(number: int, content: bytes) -> bytes:
    return _varint_bytes(number << 3 | _LENGTH_DELIMITED) + _varint_bytes(len(content)) + content


def _varint_bytes(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def parse_example(data: bytes, *, most: int | None = None) -> dict[str, Feature]:
    """Decodes a serialized ``tf.train.Example``.

    Args:
        data: the message.
        most: values of a feature to decode; a message of numbers takes a multiple of its size as
            a list. None decodes all.

    Returns:
        The features by name, each a list of bytes, of floats or of integers. A feature without a
        value is an empty list.

    Raises:
        ValueError: the message is malformed.
    """
    features: dict[str, Feature] = {}
    for number, message in _fields(memoryview(data)):
        if number != 1:  # Example.features
            continue
        for entry_number, entry in _fields(_message(message)):
            if entry_number != 1:  # Features.feature, a map: one entry per name
                continue
            name, feature = "", memoryview(b"")
            for part_number, part in _fields(_message(entry)):
                if part_number == 1:
                    name = bytes(_message(part)).decode()
                elif part_number == 2:
                    feature = _message(part)
            features[name] = _feature(feature, most)
    return features


def _feature(message: memoryview, most: int | None) -> Feature:
    values: Feature = []
    for kind, content in _fields(message):
        if kind not in (1, 2, 3):  # BytesList, FloatList, Int64List; each has its values in field 1
            continue
        items = (item for number, item in _fields(_message(content)) if number == 1)
        decoded: Iterator[Any]
        if kind == 1:
            decoded = (bytes(_message(item)) for item in items)
        elif kind == 2:
            # Packed (one run of values) or not (a field each): the same bytes.
            decoded = (x for item in items for x in _floats(_message(item)))
        else:
            decoded = (_signed(x) for item in items for x in _integers(item))
        values = list(itertools.islice(decoded, most))
    return values


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a message: number, and an integer for varints, bytes for all others."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == _VARINT:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire_type == _LENGTH_DELIMITED:
            size, position = _varint(message, position)
        elif wire_type in (_FIXED32, _FIXED64):
            size = 4 if wire_type == _FIXED32 else 8
        else:
            raise ValueError(f"malformed message: wire type {wire_type} at byte {position}")
        if position + size > len(message):
            raise ValueError(
                f"malformed message: a field of {size} bytes at byte {position} of {len(message)}"
            )
        yield number, message[position : position + size]
        position += size


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            raise ValueError(f"malformed message: ends within an integer at byte {position}")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError(f"malformed message: an integer of more than ten bytes at byte {position}")


def _integers(item: int | memoryview) -> Iterator[int]:
    if isinstance(item, int):
        yield item
        return
    position = 0
    while position < len(item):
        value, position = _varint(item, position)
        yield value


def _floats(item: memoryview) -> Iterator[float]:
    if len(item) % 4:
        raise ValueError(f"malformed message: {len(item)} bytes where floats of four belong")
    for (value,) in struct.iter_unpack("<f", item):
        yield value


def _signed(value: int) -> int:
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >= 1 << 63 else value


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("malformed message: an integer where a message, bytes or floats belong")
    return value
