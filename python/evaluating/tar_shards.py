"""WebDataset shards of ClickMe by number: an evaluation reads them in order and again in part."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from harmonizer_ext.clickme import ClickMeSample
from harmonizer_ext.clickme.dataset import SampleDataset
from harmonizer_ext.clickme.jpeg import Decoder, choose_decoder
from harmonizer_ext.clickme.released import Preprocess
from harmonizer_ext.clickme.sample import decode_sample
from harmonizer_ext.clickme.shards import resolve_paths
from harmonizer_ext.clickme.webdataset import HEATMAP, IMAGE, LABEL, MANIFEST, read_manifest

_PARTS = (IMAGE, HEATMAP, LABEL)


class TarShards(SampleDataset):
    """What ``ClickMeWebDataset`` streams, in the same order, with a length and random access.

    The headers of all files are read once; a sample is then read from where it lies.

    Args:
        paths: as of ``ClickMeWebDataset``, and so are the others.

    Raises:
        FileNotFoundError: a path or pattern matches no file.
        ValueError: a shard is no whole tar file, lacks a part of a sample, or is not what its
            manifest says. Indexing raises it for a sample that cannot be decoded.
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        preprocess: Preprocess = "released",
        transform: Callable[[ClickMeSample], Any] | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        self.decoder: Decoder = choose_decoder(decoder)
        self.paths = resolve_paths(paths, "*.tar")
        #: Shard, and where its parts lie and how long they are, for each sample.
        self._places: list[tuple[int, tuple[tuple[int, int], ...]]] = []
        for number, path in enumerate(self.paths):
            samples = _samples(path)
            entry = read_manifest(path.parent).get(path.name)
            if entry is not None and len(samples) != entry["samples"]:
                raise ValueError(
                    f"{path} has {len(samples)} samples, {MANIFEST} says {entry['samples']}: it is "
                    "damaged, convert it again"
                )
            self._places += [(number, parts) for parts in samples]
        super().__init__(len(self._places), preprocess, transform, "raise")

    def locate(self, index: int) -> tuple[Path, int]:
        """The shard of a sample, and where its image begins in it."""
        number, parts = self._places[self._checked(index)]
        return self.paths[number], parts[0][0]

    def _read(self, index: int, into: tuple[Tensor, Tensor] | None) -> ClickMeSample:
        number, places = self._places[index]
        path = self.paths[number]
        with path.open("rb") as file:
            parts = []
            for offset, size in places:
                file.seek(offset)
                parts.append(file.read(size))
        image, heatmap, label = parts
        try:
            return decode_sample(image, heatmap, int(label), self.decoder, into)
        except ValueError as error:
            raise ValueError(f"{path}, at byte {places[0][0]}: {error}") from error


def _samples(path: Path) -> list[tuple[tuple[int, int], ...]]:
    """Offset and size of image, heatmap and label of each sample, in the order of the file.

    A sample is the files of one name up to the first dot behind the last slash.
    """
    found: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, slash, name = member.name.rpartition("/")
                key, _, part = name.partition(".")
                if not member.isfile() or part not in _PARTS:
                    continue
                parts = found.setdefault(folder + slash + key, {})
                if part in parts:
                    raise ValueError(f"{path}: {member.name} occurs twice")
                parts[part] = member.offset_data, member.size
    except tarfile.TarError as error:
        raise ValueError(f"{path} is no whole tar file: {error}") from error
    for key, parts in found.items():
        missing = [part for part in _PARTS if part not in parts]
        if missing:
            raise ValueError(f"{path}, sample {key}: no file {missing} in the shard")
    end = path.stat().st_size
    if any(offset + size > end for parts in found.values() for offset, size in parts.values()):
        raise ValueError(f"{path} is no whole tar file: it ends within a file")
    return [tuple(parts[part] for part in _PARTS) for parts in found.values()]
