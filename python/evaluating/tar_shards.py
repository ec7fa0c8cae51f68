"""WebDataset shards of ClickMe by number: an evaluation reads them in order and again in part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from harmonizer_ext.clickme import ClickMeSample
from harmonizer_ext.clickme.dataset import SampleDataset
from harmonizer_ext.clickme.jpeg import Decoder, choose_decoder
from harmonizer_ext.clickme.kinds import Paths, find_files
from harmonizer_ext.clickme.released import Preprocess
from harmonizer_ext.clickme.sample import decode_sample
from harmonizer_ext.clickme.tar import PARTS, Places, add_part, label_of, read_parts, stored_parts
from harmonizer_ext.clickme.webdataset import MANIFEST, read_manifest
from harmonizer_ext.files.reading import MAX_BYTES, UnreadableError, open_file
from harmonizer_ext.files.text import shown


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
        paths: Paths,
        *,
        preprocess: Preprocess = "released",
        transform: Callable[[ClickMeSample], Any] | None = None,
        decoder: Decoder | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.decoder: Decoder = choose_decoder(decoder)
        self.paths = find_files(paths, "tar")[1]
        self.max_bytes = max_bytes
        #: Shard, and where its parts lie and how long they are, for each sample.
        self._places: list[tuple[int, tuple[tuple[int, int], ...]]] = []
        for number, path in enumerate(self.paths):
            samples = _samples(path)
            entry = read_manifest(path.parent).get(path.name)
            if entry is not None and len(samples) != entry["samples"]:
                raise ValueError(
                    f"{shown(path)} has {len(samples)} samples, {MANIFEST} says "
                    f"{entry['samples']}: it is damaged, convert it again"
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
        name = f"{shown(path)}, at byte {places[0][0]}"
        with open_file(path) as file:
            parts = read_parts(file, dict(zip(PARTS, places, strict=True)), name, self.max_bytes)
        image, heatmap, label = parts
        number = label_of(label, name)
        try:
            return decode_sample(image, heatmap, number, self.decoder, into)
        except ValueError as error:
            raise UnreadableError(f"{name}: {shown(error)}") from error


def _samples(path: Path) -> list[tuple[tuple[int, int], ...]]:
    """Offset and size of image, heatmap and label of each sample, in the order of the file.

    A sample is the files of one name up to the first dot behind the last slash.
    """
    found: dict[str, Places] = {}
    with open_file(path) as file:
        for key, part, place in stored_parts(file, path):
            if part in PARTS:
                add_part(found.setdefault(key, {}), part, place, f"{shown(path)}: {key}")
    for key, parts in found.items():
        missing = [part for part in PARTS if part not in parts]
        if missing:
            raise UnreadableError(
                f"{shown(path)}, sample {shown(key)}: no file {missing} in the shard"
            )
    return [tuple(parts[part] for part in PARTS) for parts in found.values()]
