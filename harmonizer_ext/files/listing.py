"""Folders listed with the links in them, in one order, and without going round in circles."""

from __future__ import annotations

import collections
import contextlib
import errno
import os
from collections.abc import Iterator, Sequence

from .text import shown

__all__ = ["walk"]

#: As often a folder may be reached by different ways; links that lead to one another make many.
_MOST_WAYS = 64


def walk(folder: str | os.PathLike[str], suffixes: Sequence[str] = ()) -> Iterator[str]:
    """The path of every file under a folder, in the order of names; hidden ones too.

    A link to a folder is followed like the folder itself, but not one that leads back to a folder
    that it lies in. What is neither a file nor a folder (a pipe, a link to nowhere that has the
    name of a wanted file) is listed as well, so that whoever reads it is told.

    Args:
        folder: where to begin.
        suffixes: of the files that are wanted, in small letters. A link to nowhere with another
            name may be one to a folder of them that is not mounted; hidden links are none.

    Raises:
        ValueError: links lead to one folder by more than 64 ways, or one may be of a folder that
            is not there.
        OSError: a folder cannot be listed.
    """
    ways: collections.Counter[tuple[int, int]] = collections.Counter()
    own = _identity(folder)
    stack = [(_entries(folder), own)]
    within = {own}
    while stack:
        entries, own = stack[-1]
        entry = next(entries, None)
        if entry is None:
            stack.pop()
            within.discard(own)
        elif not _is_folder(entry):
            _check_link(entry, suffixes)
            yield entry.path
        elif (identity := _identity(entry.path)) not in within:  # else a circle
            ways[identity] += 1
            if ways[identity] > _MOST_WAYS:
                raise ValueError(
                    f"{shown(folder)}: expected folders, got links that lead to "
                    f"{shown(entry.path)} by more than {_MOST_WAYS} ways; remove the links to "
                    f"folders that contain each other"
                )
            within.add(identity)
            stack.append((_entries(entry.path), identity))


def _entries(folder: str | os.PathLike[str]) -> Iterator[os.DirEntry[str]]:
    with os.scandir(os.fspath(folder)) as entries:
        return iter(sorted(entries, key=lambda entry: entry.name))


def _check_link(entry: os.DirEntry[str], suffixes: Sequence[str]) -> None:
    wanted = os.path.splitext(entry.name)[1].lower() in suffixes
    if wanted or entry.name.startswith(".") or not entry.is_symlink():
        return
    try:
        os.stat(entry.path)
    except OSError as error:
        if error.errno == errno.ELOOP:
            return  # a circle of links, behind which there is no folder
        raise ValueError(
            f"{shown(entry.path)}: expected a link to a folder or a file, got a link to "
            f"{shown(os.readlink(entry.path))}, which is not there; mount it, or remove the link"
        ) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    with contextlib.suppress(OSError):  # a link to itself
        return entry.is_dir()
    return False


def _identity(folder: str | os.PathLike[str]) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino
