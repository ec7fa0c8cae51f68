"""Folders listed with the links in them, in one order, and without going round in circles."""

from __future__ import annotations

import collections
import contextlib
import os
from collections.abc import Iterator

from .text import shown

__all__ = ["walk"]

#: As often a folder may be reached by different ways; links that lead to one another make many.
_MOST_WAYS = 64


def walk(folder: str | os.PathLike[str]) -> Iterator[str]:
    """The path of every file under a folder, in the order of names; hidden ones too.

    A link to a folder is followed like the folder itself, but not one that leads back to a folder
    that it lies in. What is neither a file nor a folder (a link to nowhere, a pipe) is listed as
    well, so that whoever reads it is told.

    Raises:
        ValueError: links lead to one folder by more than 64 ways.
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


def _is_folder(entry: os.DirEntry[str]) -> bool:
    with contextlib.suppress(OSError):  # a link to itself
        return entry.is_dir()
    return False


def _identity(folder: str | os.PathLike[str]) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino
