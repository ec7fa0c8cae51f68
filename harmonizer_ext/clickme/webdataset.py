"""ClickMe from WebDataset shards, as ``python/prepare_clickme.py convert`` writes them."""

from __future__ import annotations

import importlib
import logging
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset, get_worker_info

from harmonizer_ext.files.reading import MAX_BYTES, UnreadableError, open_file
from harmonizer_ext.files.tables import read_json
from harmonizer_ext.files.text import shown

from .dataset import OnError, check_on_error
from .jpeg import Decoder, choose_decoder
from .kinds import Paths, find_files
from .released import Preprocess, check_preprocess, preprocess_sample
from .sample import ClickMeSample, decode_sample
from .tar import HEATMAP, IMAGE, LABEL, label_of, read_parts, stored_samples

__all__ = ["HEATMAP", "IMAGE", "LABEL", "MANIFEST", "ClickMeWebDataset", "read_manifest"]

#: Beside the shards: what each must hold.
MANIFEST = "manifest.json"

_MOST_WORKERS = 1024

_log = logging.getLogger("harmonizer_ext")


class ClickMeWebDataset(IterableDataset[Any]):
    """ClickMe as a stream from tar shards, which suits network and object storage.

    Shards are divided over ranks, and a rank's shards over its workers. Ranks get equal numbers of
    shards to within one, and thus unequal numbers of samples: end an epoch after a number of steps,
    not at the end of the stream. A worker without a shard yields nothing. For random access, or
    for the same number of samples on each rank, take ``ClickMe``.

    Where a shard's directory has the converter's ``manifest.json``, the shard must have the size
    and the number of samples that it says: a tar file that is cut between two of its members looks
    like a shorter one. Without a manifest that goes unnoticed.

    Shards are files: their names are opened as they are, and no scheme in them (``pipe:``,
    ``http:``) is obeyed, as webdataset would. They are plain tar archives, not compressed.

    Args:
        paths: a shard, a directory (its ``*.tar`` files), a glob pattern, or a sequence of any of
            these. A directory with data of other kinds too is refused.
        preprocess: as in ``ClickMe``.
        transform: called with each ``ClickMeSample``; what it returns is the sample.
        decoder: as in ``ClickMe``.
        shuffle: how many samples to hold to draw the next one from; with 1 or more the order of
            the shards is drawn as well. 0 reads in order.
        seed: of ``shuffle``. The order also depends on the epoch: call ``set_epoch`` before each,
            as with ``DistributedSampler``.
        on_error: ``"raise"``, or ``"skip"`` to leave out what cannot be read; each is logged
            (logger ``harmonizer_ext``) and counted in ``skipped``.
        max_bytes: largest size of a sample in a shard; a larger one is unreadable.

    Raises:
        FileNotFoundError: a path or pattern matches no file.
        ValueError: an argument has an unknown name, or a shard is not what the manifest says.
            Iterating raises it for an unreadable shard or sample, which the text names, and where
            there are fewer shards than ranks.
        ImportError: ``webdataset`` or the decoder is not installed.
    """

    def __init__(
        self,
        paths: Paths,
        *,
        preprocess: Preprocess = "released",
        transform: Callable[[ClickMeSample], Any] | None = None,
        decoder: Decoder | None = None,
        shuffle: int = 0,
        seed: int = 0,
        on_error: OnError = "raise",
        max_bytes: int = MAX_BYTES,
    ) -> None:
        check_preprocess(preprocess)
        check_on_error(on_error, "raise", "skip")
        chosen = choose_decoder(decoder)
        _webdataset()
        self.paths = find_files(paths, "tar")[1]
        self.max_bytes = max_bytes
        self.preprocess = preprocess
        self.transform = transform
        self.decoder: Decoder = chosen
        self.shuffle = shuffle
        self.seed = seed
        self.on_error = on_error
        self._sent_rank = (0, 1)
        # Shared with workers, persistent ones included.
        self._epoch = torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()
        # A count for each worker, so that none overwrites another's.
        counts = torch.zeros(_MOST_WORKERS + 1, dtype=torch.int64, device="cpu")
        self._skipped = counts.share_memory_()
        manifests = {path.parent: read_manifest(path.parent) for path in self.paths}
        self._expected = {
            os.fspath(path): manifests[path.parent].get(path.name) for path in self.paths
        }
        for name, entry in self._expected.items():
            size = os.path.getsize(name)
            if entry is not None and size != entry["size"]:
                self._unreadable(
                    f"{shown(name)} has {size} bytes, {MANIFEST} says {entry['size']}: convert it "
                    "again"
                )

    @property
    def samples(self) -> int | None:
        """Number of samples by the manifests; None where a shard is in none."""
        counts = [entry["samples"] for entry in self._expected.values() if entry is not None]
        return sum(counts) if len(counts) == len(self.paths) else None

    @property
    def skipped(self) -> int:
        """How many unreadable shards and samples were met so far, by this process or its workers.

        A sample that is met in each epoch counts each time.
        """
        return int(self._skipped.sum())

    def set_epoch(self, epoch: int) -> None:
        """Another order of shards and samples; the same one for the same epoch and seed."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[Any]:
        rank, ranks = self._rank_and_ranks()
        if len(self.paths) < ranks:
            raise ValueError(
                f"{len(self.paths)} shards cannot be divided over {ranks} ranks: convert into more "
                "shards, or read with ClickMe"
            )
        urls = [os.fspath(path) for path in self.paths]
        order = random.Random(f"{self.seed} {int(self._epoch)}")
        if self.shuffle:
            order.shuffle(urls)  # on all ranks and workers alike, before they are divided
        worker = get_worker_info()
        urls = urls[rank::ranks]
        urls = urls if worker is None else urls[worker.id :: worker.num_workers]
        samples = self._samples(urls)
        if self.shuffle:
            samples = _webdataset().shuffle(self.shuffle, initial=self.shuffle, rng=order)(samples)
        return self._decoded(samples)

    def _rank_and_ranks(self) -> tuple[int, int]:
        if dist.is_available() and dist.is_initialized():
            return dist.get_rank(), dist.get_world_size()
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        return self._sent_rank

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker has no process group to ask.
        return {**self.__dict__, "_sent_rank": self._rank_and_ranks()}

    def _samples(self, names: Sequence[str]) -> Iterator[tuple[str, list[bytes]]]:
        """Name and parts of each sample; decoded behind the shuffling, which holds many."""
        for name in names:
            count = 0
            try:
                with open_file(name) as file:
                    for key, places in stored_samples(file, name):
                        sample = f"{shown(name)}, sample {shown(key)}"
                        count += 1
                        try:
                            parts = read_parts(file, places, sample, self.max_bytes)
                        except UnreadableError as error:
                            self._unreadable(str(error))
                            continue
                        yield sample, parts
            except UnreadableError as error:
                reason = str(error).removeprefix(f"{shown(name)}: ")
                self._unreadable(f"{shown(name)}, after {count} samples: {reason}")
                continue
            entry = self._expected[name]
            if entry is not None and count != entry["samples"]:
                self._unreadable(
                    f"{shown(name)} gave {count} samples, {MANIFEST} says {entry['samples']}: it "
                    "is damaged, convert it again"
                )

    def _decoded(self, stored: Iterator[tuple[str, list[bytes]]]) -> Iterator[Any]:
        for name, (image, heatmap, label) in stored:
            try:
                number = label_of(label, name)
                sample = decode_sample(image, heatmap, number, self.decoder)
            except ValueError as error:
                reason = shown(error).removeprefix(f"{name}: ")
                self._unreadable(f"{name}: {reason}")
                continue
            sample = preprocess_sample(sample, self.preprocess)
            yield sample if self.transform is None else self.transform(sample)

    def _unreadable(self, reason: str) -> None:
        if self.on_error == "raise":
            raise UnreadableError(reason)
        worker = get_worker_info()
        self._skipped[0 if worker is None else worker.id + 1] += 1
        _log.warning("left out: %s", reason)

    def __repr__(self) -> str:
        return (
            f"ClickMeWebDataset({len(self.paths)} shards, "
            f"{'unknown' if self.samples is None else self.samples} samples, "
            f"preprocess={self.preprocess!r})"
        )


def read_manifest(directory: Path) -> dict[str, dict[str, Any]]:
    """The entries of a directory's manifest by the shard's file name; none without a manifest.

    Raises:
        ValueError: the file is not what the converter writes.
    """
    path = directory / MANIFEST
    if not path.exists():
        return {}
    try:
        shards: dict[str, dict[str, Any]] = read_json(path)["shards"]
        counts = [entry[key] for entry in shards.values() for key in ("size", "samples")]
        if not all(isinstance(count, int) for count in counts):
            raise ValueError("size and samples must be integers")
        return shards
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UnreadableError(
            f"{shown(path)} is no manifest of ClickMe shards: {shown(error)}"
        ) from error


def _webdataset() -> Any:
    try:
        return importlib.import_module("webdataset")
    except ImportError as error:
        raise ImportError(
            "ClickMeWebDataset reads with webdataset: pip install harmonizer-ext[train]"
        ) from error
