"""NumPy's files, whose headers are compared with their sizes before an array is made."""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Iterable
from typing import Any, BinaryIO

from .reading import MAX_BYTES, UnreadableError, check_size, open_file, reading
from .text import shown

__all__ = ["numpy", "open_zip", "read_npy", "read_npz"]


def read_npy(path: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> Any:
    """The array of a ``.npy`` file.

    Raises:
        UnreadableError: it is none, damaged, larger than ``max_bytes``, or holds Python objects,
            which are never read.
    """
    with open_file(path) as file:
        return _array(file, os.fstat(file.fileno()).st_size, path, max_bytes)


def read_npz(data: bytes, name: object, keys: Iterable[str], max_bytes: int) -> dict[str, Any]:
    """Reads those of the arrays ``keys`` that a ``.npz`` archive has.

    Raises:
        UnreadableError: as of ``read_npy``, and for an archive that is none.
    """
    arrays = {}
    with open_zip(data, name) as archive:
        members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        wanted = {key: members[key] for key in keys if key in members}
        check_size(name, sum(member.file_size for member in wanted.values()), max_bytes)
        for key, member in wanted.items():
            label = f"{shown(name)}: {key}"
            with reading(label), archive.open(member) as file:
                arrays[key] = _array(file, member.file_size, label, max_bytes)  # type: ignore[arg-type]
                file.read(1)  # beyond the last byte: only there the checksum is compared
    return arrays


def open_zip(data: bytes, name: object) -> zipfile.ZipFile:
    """A zip archive that lies in memory; nothing of it is decompressed.

    Raises:
        UnreadableError: it is none, or two of its files have one name.
    """
    with reading(name, "a readable archive"):
        archive = zipfile.ZipFile(io.BytesIO(data))
    names = archive.namelist()
    if len(set(names)) != len(names):
        raise UnreadableError(f"{shown(name)}: expected files of different names in the archive")
    return archive


def _array(file: BinaryIO, size: int, name: object, max_bytes: int) -> Any:
    np = numpy()
    with reading(name, "a readable array of NumPy"):
        version = np.lib.format.read_magic(file)
        # The third version differs from the second in the names of fields.
        read = {1: "read_array_header_1_0"}.get(version[0], "read_array_header_2_0")
        shape, _, dtype = getattr(np.lib.format, read)(file)
    if dtype.hasobject or dtype.kind not in "biufc":
        raise UnreadableError(
            f"{shown(name)}: expected an array of numbers, got the type {shown(dtype)}; objects "
            f"are not read, because that may run code (allow_pickle=False)"
        )
    announced = math.prod(shape) * dtype.itemsize
    check_size(name, announced, max_bytes)
    if announced != size - file.tell():
        raise UnreadableError(
            f"{shown(name)}: expected {announced} bytes for an array of the shape {shape}, got "
            f"{size - file.tell()}"
        )
    file.seek(0)
    with reading(name, "a readable array of NumPy"):
        return np.lib.format.read_array(file, allow_pickle=False)


def numpy() -> Any:
    """The package.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import numpy
    except ImportError as error:
        raise ImportError(
            "reading .npz and .npy files needs NumPy: pip install harmonizer-ext[train]"
        ) from error
    return numpy
