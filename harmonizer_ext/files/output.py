"""Files that are written: whole or not at all, and never through a link."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .reading import FLAGS
from .text import cell, shown

__all__ = [
    "make_folder",
    "open_to_append",
    "remove_partial",
    "replacing",
    "write_bytes",
    "write_rows",
    "write_text",
]

#: Behind the name of a file that is being written: process, random digits.
_PARTIAL = re.compile(r".+\.\d+-[0-9a-f]{8}\.partial")
_NEW = os.O_CREAT | os.O_EXCL | FLAGS


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of ``path`` when the block ends without an error.

    Until then it has a name of its own beside it, which no other process uses. A link at ``path``
    is replaced; what it leads to is left alone. After a power cut there is the old file or the new
    one.

    Raises:
        OSError: there is no such folder, no room, or no right to write.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    descriptor = os.open(partial, os.O_RDWR | _NEW, 0o666)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # before the name: after a power cut it would be empty
        os.replace(partial, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file as ``replacing`` does."""
    with replacing(path) as file:
        file.write(content)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 as ``replacing`` does; bytes of names that are none come out as ``\\udc80``."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_rows(path: str | os.PathLike[str], rows: Iterable[Iterable[Any]]) -> None:
    """Writes a CSV file as ``replacing`` does, its cells as ``text.cell`` makes them."""
    file = io.StringIO(newline="")
    csv.writer(file).writerows([cell(value) for value in row] for row in rows)
    write_text(path, file.getvalue())


def open_to_append(path: str | os.PathLike[str], *, empty: bool = False) -> BinaryIO:
    """A file to go on with where it ends, or, with ``empty``, from its start.

    Raises:
        ValueError: it is a link, has a second name, or is no file.
    """
    flags = os.O_RDWR | os.O_CREAT | FLAGS
    if os.path.islink(path):
        raise ValueError(f"{shown(path)}: expected a file to write to, got a link; remove it")
    descriptor = os.open(path, flags, 0o666)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        os.close(descriptor)
        raise ValueError(
            f"{shown(path)}: expected a file of one name to write to, got something else; remove it"
        )
    if empty:
        os.ftruncate(descriptor, 0)
    file = os.fdopen(descriptor, "r+b")
    file.seek(0, os.SEEK_END)
    return file


def make_folder(path: str | os.PathLike[str], *, below: str | os.PathLike[str]) -> Path:
    """Makes a folder in an output folder, ``below``, and the folders between the two.

    The output folder itself may be a link, by which a disk is chosen; in it, links are not
    followed.

    Raises:
        ValueError: a folder between the two is a link.
    """
    path, below = Path(path), Path(below)
    below.mkdir(parents=True, exist_ok=True)
    made = below
    for part in path.relative_to(below).parts:
        made /= part
        if made.is_symlink():
            raise ValueError(
                f"output: expected a folder to write to, got the link {shown(made)}; remove it, or "
                f"name the folder that it leads to as the output"
            )
        made.mkdir(exist_ok=True)
    return path


def remove_partial(folder: str | os.PathLike[str]) -> None:
    """Removes what processes that were killed have left half written in a folder.

    Only for whoever has the folder for itself (``lock.locked``).
    """
    for entry in os.scandir(folder):
        if _PARTIAL.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
            os.unlink(entry.path)
