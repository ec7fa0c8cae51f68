"""Samples of WebDataset shards: which members of the archive make one, and where they lie."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO

from harmonizer_ext.files.reading import UnreadableError, check_size
from harmonizer_ext.files.tar import members
from harmonizer_ext.files.text import shown

__all__ = [
    "HEATMAP",
    "IMAGE",
    "LABEL",
    "PARTS",
    "Places",
    "add_part",
    "label_of",
    "read_parts",
    "stored_parts",
    "stored_samples",
]

#: Extensions of a sample's files in a shard. Other readers of WebDataset find image and label under
#: the names that they expect.
IMAGE, HEATMAP, LABEL = "jpg", "heatmap.jpg", "cls"
PARTS = (IMAGE, HEATMAP, LABEL)

#: As webdataset tells them: a key up to the first dot behind the last slash, and a part.
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
#: Members that webdataset keeps for itself.
_META = re.compile(r"__[^/]*__($|/)")

#: Offset and size of each part that a sample has.
Places = dict[str, tuple[int, int]]


def stored_samples(file: BinaryIO, name: object) -> Iterator[tuple[str, Places]]:
    """The samples of a shard in their order: key, and where the parts lie that there are.

    A sample is the members of one key that follow one another, as in webdataset.

    Raises:
        UnreadableError: it is no whole tar archive, or a name occurs twice in a sample.
    """
    key, places, damage = None, Places(), None
    parts = stored_parts(file, name)
    while True:
        try:
            found, part, place = next(parts)
        except StopIteration:
            break
        except UnreadableError as error:
            damage = error  # what lies before it is whole
            break
        if found != key:
            if key is not None:
                yield key, places
            key, places = found, {}
        add_part(places, part, place, found)
    if key is not None:
        yield key, places
    if damage is not None:
        raise damage


def stored_parts(file: BinaryIO, name: object) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """Key, part and place of each member of a shard that has both.

    Raises:
        UnreadableError: it is no whole tar archive.
    """
    for member in members(file, name):
        found = _NAME.fullmatch(member.name)
        if found is not None and not _META.match(member.name):
            yield found[1], found[2].lower(), (member.offset, member.size)


def add_part(places: Places, part: str, place: tuple[int, int], key: str) -> None:
    """Notes a part of a sample.

    Raises:
        UnreadableError: the sample has it already.
    """
    if part in places:
        raise UnreadableError(f"{shown(key)}.{shown(part)}: duplicate file name")
    places[part] = place


def read_parts(file: BinaryIO, places: Places, name: object, max_bytes: int) -> list[bytes]:
    """Image, heatmap and label of a sample, as they are stored.

    Raises:
        UnreadableError: one is missing, or together they are larger than ``max_bytes``.
    """
    missing = [part for part in PARTS if part not in places]
    if missing:
        raise UnreadableError(f"{shown(name)}: no file {missing} in the shard")
    check_size(name, sum(places[part][1] for part in PARTS), max_bytes)
    contents = []
    for part in PARTS:
        offset, size = places[part]
        file.seek(offset)
        contents.append(file.read(size))
        if len(contents[-1]) != size:
            raise UnreadableError(f"{shown(name)}: the file ends within {part}")
    return contents


def label_of(content: bytes, name: object) -> int:
    """The number in a label's file.

    Raises:
        UnreadableError: it is none.
    """
    try:
        return int(content)
    except ValueError as error:
        raise UnreadableError(f"{shown(name)}: {shown(error)}") from error
