"""The members of tar archives: where they lie and how long they are, none of them read."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from .reading import UnreadableError, looks_like, reading
from .text import shown

__all__ = ["Member", "members"]

#: Bytes of a name, or of other extended headers, of one member.
_MOST_HEADER = 2**20


class Member(NamedTuple):
    """A file in an archive: its name, where it begins, and its size."""

    name: str
    offset: int
    size: int


class _Headers:
    """The file that tarfile reads headers from, some of which say how much of them follows."""

    def __init__(self, file: BinaryIO, name: object) -> None:
        self._file, self._name = file, name

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MOST_HEADER:
            raise UnreadableError(
                f"{shown(self._name)}: expected headers of at most {_MOST_HEADER} bytes, got one "
                f"of {size}"
            )
        return self._file.read(size)

    def seek(self, offset: int) -> int:
        return self._file.seek(offset)

    def tell(self) -> int:
        return self._file.tell()


def members(file: BinaryIO, name: object) -> Iterator[Member]:
    """The plain files of an archive in their order. Folders, links and devices are left out.

    The file may be read from while this is iterated.

    Raises:
        UnreadableError: it is no tar archive, compressed, damaged or cut, or has a sparse file,
            which is longer than its place in the archive.
    """
    with reading(name):
        head = file.read(512)
        file.seek(0)
        size = os.fstat(file.fileno()).st_size
    if found := looks_like(head):
        raise UnreadableError(f"{shown(name)}: expected a plain tar archive, got {found}")
    with reading(name, "a whole tar archive"):
        archive = tarfile.TarFile(fileobj=_Headers(file, name))  # type: ignore[arg-type]
    end = 0
    while True:
        with reading(name, "a whole tar archive"):
            member = archive.next()
            archive.members = []  # type: ignore[attr-defined] # tarfile would keep them all
        if member is None:
            break
        if member.size < 0 or member.offset < end:
            raise UnreadableError(f"{shown(name)}: expected members one after another, got others")
        end = member.offset_data
        if not member.isreg():
            continue
        if member.issparse():
            raise UnreadableError(
                f"{shown(name)}: expected plain files, got the sparse file {shown(member.name)}"
            )
        end += member.size
        if end > size:
            raise UnreadableError(
                f"{shown(name)} is no whole tar archive: it ends within {shown(member.name)}"
            )
        yield Member(member.name, member.offset_data, member.size)
    with reading(name):
        file.seek(archive.offset)
        rest = file.read(512)
    if rest.strip(b"\0"):
        raise UnreadableError(
            f"{shown(name)}: expected the end of the archive at byte {archive.offset}, got others; "
            f"it is damaged there, and what follows would be lost"
        )
