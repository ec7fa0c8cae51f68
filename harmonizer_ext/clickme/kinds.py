"""Which files there are at a path, and of what kind: one answer for all readers and programs."""

from __future__ import annotations

import collections
import glob
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harmonizer_ext.files.text import shown

__all__ = ["KINDS", "find_files", "kind_of_name"]

#: Kinds of files with human maps, by the ends of their names. TFDS numbers its shards at the end.
KINDS = {
    "tfrecords": re.compile(r"\.tfrecords?(-\d+-of-\d+)?$", re.IGNORECASE),
    "tar": re.compile(r"\.tar$", re.IGNORECASE),
    "files": re.compile(r"\.(npz|pth)$", re.IGNORECASE),
}
#: Ends of names of files that another program packed, none of which is read; tables and notes,
#: which hold no maps, may be packed.
_PACKED = re.compile(
    r"(?<!\.csv)(?<!\.tsv)(?<!\.json)(?<!\.txt)(?<!\.md)(?<!\.log)"
    r"(\.(gz|bz2|xz|zst|lz4|lzma|z|zip|7z|rar)|\.t(gz|bz2?|xz|zst))$",
    re.IGNORECASE,
)
_SUFFIXES = {"tfrecords": (".tfrecords",), "tar": (".tar",), "files": (".npz", ".pth")}

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def find_files(
    paths: Paths,
    *kinds: str,
    argument: str = "paths",
    folders: bool = False,
    mixed: bool = False,
) -> tuple[str, list[Path]]:
    """The files with human maps that paths lead to, all of one kind.

    Args:
        paths: a file, a directory, a glob pattern, or a sequence of these. The files of a directory
            or a pattern are taken in natural order: ``val-2`` before ``val-10``. A name that exists
            is that file or directory, whatever characters it has.
        kinds: those that the caller reads, of ``KINDS``. A file that is named one by one, or by a
            pattern that leads to no others, is taken for the first of them where its name tells
            nothing.
        argument: name of the argument, for the texts of errors.
        folders: whether a directory with ``images/`` and ``maps/`` is of the kind "folder".
        mixed: whether several kinds may come together; the first file's is returned.

    Returns:
        The kind, and the files; for "folder" the directory itself.

    Raises:
        FileNotFoundError: a path leads to no such file.
        ValueError: there are files of several kinds, which the text counts; others beside them
            that are packed, or in folders below; a file is meant by two names.
    """
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    by_name = {path: _at(path, kinds, argument, folders) for path in dict.fromkeys(paths)}
    found = [item for path in paths for item in by_name[path]]
    if not found:
        raise FileNotFoundError(f"no ClickMe file found: {argument} is empty")
    if mixed:
        found = [item for item in found if item[1] in kinds]
    counts = collections.Counter(kind for _, kind in found)
    if len(counts) > 1 and not mixed:
        numbers = " and ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        raise ValueError(
            f"{argument}: expected files of one kind, got {numbers} in "
            f"{', '.join(map(shown, paths))}; name those that are meant, such as DIRECTORY/*.npz"
        )
    _check_once({name: [path for path, _ in items] for name, items in by_name.items()}, argument)
    file, kind = found[0]
    if kind not in (*kinds, "folder"):
        raise ValueError(f"{argument}: expected {_wanted(kinds)} files, got {shown(file)}")
    return kind, [path for path, _ in found]


def _at(
    given: str | os.PathLike[str], kinds: Sequence[str], argument: str, folders: bool
) -> list[tuple[Path, str]]:
    """The files at one path, with their kinds."""
    path = Path(given)
    if os.path.isfile(path):
        return [(path, kind_of_name(path.name) or kinds[0])]
    found: list[tuple[Path, str]] = []
    in_folder = os.path.isdir(path)
    if in_folder:
        if folders and (path / "images").is_dir() and (path / "maps").is_dir():
            found.append((path, "folder"))
        names = [path / name for name in os.listdir(path) if not name.startswith(".")]
    else:
        names = [Path(name) for name in glob.glob(os.fspath(given))]
    names = sorted((name for name in names if not os.path.isdir(name)), key=_natural_order)
    named = [(name, kind) for name in names if (kind := kind_of_name(name.name))]
    if in_folder and named:
        _check_beside(path, argument)
    found += named if named or in_folder else [(name, kinds[0]) for name in names]
    # Where a directory has none of the wanted kinds, others are as good as none.
    if not found or (in_folder and not {kind for _, kind in found} & {*kinds, "folder"}):
        patterns = " or ".join(
            str(path / f"*{suffix}") for kind in kinds for suffix in _SUFFIXES[kind]
        )
        raise FileNotFoundError(
            f"{argument}: expected {_wanted(kinds)} files, found none at {shown(path)} "
            f"({shown(patterns if in_folder else given)} matches no file); "
            f"`python python/prepare_clickme.py download` fetches ClickMe"
        )
    return found


def _check_beside(folder: Path, argument: str) -> None:
    """Refuses a folder whose files are not all that it has: packed ones, and folders of others."""
    counts: collections.Counter[str] = collections.Counter()
    for name in os.listdir(folder):
        path = folder / name
        if name.startswith("."):
            continue
        if os.path.isdir(path):
            inner = sum(kind_of_name(other) is not None for other in os.listdir(path))
            counts[f"in the folder {shown(name)}"] += inner
        elif packed := _PACKED.search(name):
            counts[f"packed ({shown(packed[0].lower())})"] += 1
    others = " and ".join(f"{count} {what}" for what, count in sorted(counts.items()) if count)
    if others:
        raise ValueError(
            f"{argument}: expected all files of {shown(folder)} to be readable as they are, got "
            f"{others}, which would be left out; unpack or move them, or name the files that are "
            f"meant, such as {shown(folder)}/*.npz"
        )


def _check_once(files: Mapping[Any, Sequence[Path]], argument: str) -> None:
    """Refuses a file that is meant by several names; one name may be given as often as one likes.

    Raises:
        ValueError: by a folder and by its own name, say, or by a link.
    """
    names: dict[str, list[str]] = {}
    for name, paths in files.items():
        for path in paths:
            names.setdefault(os.path.realpath(path), []).append(shown(name))
    for file, by in names.items():
        if len(by) > 1:
            raise ValueError(
                f"{argument}: expected every file once, got {shown(file)} {len(by)} times by "
                f"{', '.join(by[:4])}; name it once"
            )


def _wanted(kinds: Sequence[str]) -> str:
    *others, last = [suffix for kind in kinds for suffix in _SUFFIXES[kind]]
    return f"{', '.join(others)}{' or ' * bool(others)}{last}"


def kind_of_name(name: str) -> str | None:
    """The kind of a file by the end of its name; None where that tells nothing."""
    return next((kind for kind, pattern in KINDS.items() if pattern.search(name)), None)


def _natural_order(path: Path) -> list[tuple[int, str]]:
    return [
        (int(part), "") if part.isdecimal() else (-1, part)
        for part in re.split(r"(\d+)", str(path))
    ]
