"""The ClickMe data set from its released TFRecord shards, without TensorFlow.

ClickMe (Linsley et al., ICLR 2019) tells for ImageNet images where people click to let others
recognize the object. The authors of the neural harmonizer release it in shards at
``storage.googleapis.com/serrelab/prj_harmonization/dataset/click-me``: ``train/train-0.tfrecords``
to ``train-317.tfrecords`` and ``val/val-0.tfrecords`` to ``val-16.tfrecords``. A record has an
``image`` and a ``heatmap`` (JPEG, 256x256, three channels and one) and a ``label`` (0 to 999).
``python/prepare_clickme.py`` downloads and verifies them; ``clickme_formats`` reads what others
have made of them.
"""

from __future__ import annotations

import glob
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from . import tfrecord
from .clickme_sample import (
    ClickMeSample,
    Decoder,
    EncodedSample,
    Preprocess,
    check_options,
    decode,
    preprocessed,
    released_heatmap,
    released_preprocessing,
)
from .tfrecord import TFRecordError

__all__ = [
    "ClickMe",
    "ClickMeSample",
    "EncodedSample",
    "SkippingDataset",
    "encoded_sample",
    "released_heatmap",
    "released_preprocessing",
]

OnError = Literal["raise", "skip"]

_CACHE_VERSION = 2
_PROGRESS_SECONDS = 5.0

_log = logging.getLogger(__name__)


class SkippingDataset(Dataset[Any]):
    """A map-style data set that can go on without the samples that cannot be read.

    Subclasses say how many samples there are and read one, with a ``ValueError`` for a bad one. An
    error of the transform is never skipped.

    With ``on_error="skip"`` the next readable sample stands in for a bad one, so that the length of
    the data set, the size of batches and the shares of ranks stay what they are. Each bad sample is
    logged once per process that meets it, and counted once for all of them.

    Args:
        on_error: what a sample that cannot be read does: ``"raise"`` or ``"skip"``.
        transform: called with each ``ClickMeSample``; what it returns is the sample.
    """

    def __init__(
        self, on_error: OnError, transform: Callable[[ClickMeSample], Any] | None
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f'on_error must be "raise" or "skip", got {on_error!r}')
        self.on_error = on_error
        self.transform = transform
        self._breaks = 0
        self._bad: Tensor | None = None

    def _read(self, index: int) -> ClickMeSample:
        raise NotImplementedError

    def _count_from_here(self, breaks: int = 0) -> None:
        """To be called when the length is known."""
        self._breaks = breaks
        if self.on_error == "skip":
            # A flag a sample, shared with the workers: setting one twice counts once, whoever does.
            self._bad = torch.zeros(len(self), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def skipped(self) -> int:
        """How much was skipped so far, by this process and by the workers of its loaders.

        The samples found bad, and one for each shard that cannot be read to its end: how many
        records are lost there is not known.
        """
        return self._breaks + (0 if self._bad is None else int(self._bad.sum()))

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} samples")
        index %= len(self)
        sample = self._read(index) if self._bad is None else self._read_from(index, self._bad)
        return sample if self.transform is None else self.transform(sample)

    def _read_from(self, index: int, bad: Tensor) -> ClickMeSample:
        error = None
        for candidate in (*range(index, len(self)), *range(index)):
            if bad[candidate]:
                continue
            try:
                return self._read(candidate)
            except ValueError as failure:
                error = failure
                bad[candidate] = 1
                _log.warning("skipped sample %d: %s", candidate, failure)
        raise ValueError(f"none of the {len(self)} samples can be read") from error


class ClickMe(SkippingDataset):
    """ClickMe as a map-style data set: random access into any number of shards.

    The shards are scanned once for the positions of their records (12 bytes read per record); with
    ``index_cache`` later runs skip that. Samples are in the order of the shards and of the records
    in them. No file is kept open, so that the data set can be pickled to DataLoader workers.

    Ranks and workers: every process sees all samples, and the sampler divides them. A
    ``torch.utils.data.DistributedSampler`` (or ``mixing.MixedBatchSampler``) gives each rank its
    part, without regard to the borders of shards, and a DataLoader hands whole batches of that part
    to its workers in turn. Where storage is too slow for random access (about 40 kB a sample), take
    ``clickme_formats.ClickMeWebDataset``, which reads whole shards in sequence.

    Pillow decodes the JPEGs with libjpeg's exact inverse DCT. The released pipeline takes
    TensorFlow's default, the fast one, whose pixels are about 1 grey level darker, single ones up
    to 15 off in finely quantized images. With ``tf.io.decode_jpeg(dct_method="INTEGER_ACCURATE")``
    it gives the samples that this class gives.

    Args:
        paths: a shard, a directory (its ``*.tfrecords`` files), a glob pattern, or a sequence of
            any of these. Files of a directory or a pattern are taken in natural order:
            ``val-2`` before ``val-10``.
        preprocess: ``"released"`` for what the authors' ``parse_clickme_prototype`` does (see
            ``released_preprocessing``), None for the decoded JPEGs: image (3, 256, 256) and heatmap
            (1, 256, 256), both uint8. ``"released-heatmap"`` is for augmentation, which wants the
            image as it is stored: image (3, 256, 256) uint8, and the heatmap blurred as released
            but (1, 256, 256) float32.
        transform: called with each ``ClickMeSample``; what it returns is the sample. The place for
            augmentations, which must move image and heatmap together (see ``augment``).
        index_cache: file for the positions of the records. Shards whose size or time of
            modification changed since are scanned again, and the file is rewritten.
        verify: whether to check the records' checksums, which costs some microseconds each and
            needs the package ``google-crc32c``.
        on_error: ``"raise"``, or ``"skip"`` to go on without records that are truncated or corrupt:
            a shard that breaks off is indexed up to the break, and the next readable sample stands
            in for one that cannot be read. Each is logged with its file and offset (logger
            ``harmonizer_ext.clickme``) and counted in ``skipped``. Not for evaluation, where a
            sample that stands in for another counts twice.
        decoder: ``"pillow"``, or ``"simplejpeg"`` for the same pixels in half the time where that
            package is installed.

    Raises:
        FileNotFoundError: a path or pattern matches no file.
        TFRecordError: a shard is truncated or corrupt; the text names file and offset. Indexing
            raises it too, for a corrupt record, a JPEG that cannot be decoded or has another size,
            a missing feature, or a label outside of 0 to 999. With ``on_error="skip"``: no shard
            has a record that can be read.
        ImportError: the decoder, or with ``verify`` google-crc32c, is not installed.
        ValueError: an option has an unknown name.
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        preprocess: Preprocess = "released",
        transform: Callable[[ClickMeSample], Any] | None = None,
        index_cache: str | os.PathLike[str] | None = None,
        verify: bool = True,
        on_error: OnError = "raise",
        decoder: Decoder = "pillow",
    ) -> None:
        super().__init__(on_error, transform)
        check_options(preprocess, decoder)
        self.paths = resolve(paths, ("tfrecords",))
        self.preprocess = preprocess
        self.verify = verify
        self.decoder = decoder
        cache = None if index_cache is None else Path(index_cache)
        scans = _index(self.paths, cache, verify, on_error)
        # Tensors, which workers share; lists of integers would be copied to each of them.
        self._offsets = torch.cat([scan.offsets for scan in scans])
        self._ends = torch.tensor([len(scan.offsets) for scan in scans]).cumsum(0)
        broken = [scan.error for scan in scans if scan.error is not None]
        for error in broken:
            _log.warning("skipped the rest of a shard: %s", error)
        if not len(self):
            raise broken[0]
        self._count_from_here(len(broken))

    def __len__(self) -> int:
        return len(self._offsets)

    def _read(self, index: int) -> ClickMeSample:
        path, offset = self.locate(index)
        record = tfrecord.read_record(path, offset, verify=self.verify)
        try:
            sample = decode(encoded_sample(record), self.decoder)
        except ValueError as error:
            raise TFRecordError(path, offset, str(error)) from error
        return preprocessed(sample, self.preprocess)

    def locate(self, index: int) -> tuple[Path, int]:
        """The shard of a sample, and the byte offset of its record."""
        shard = int(torch.searchsorted(self._ends, index, right=True))
        return self.paths[shard], int(self._offsets[index])

    def __repr__(self) -> str:
        return (
            f"ClickMe({len(self)} samples in {len(self.paths)} shards, "
            f"preprocess={self.preprocess!r})"
        )


def encoded_sample(record: bytes) -> EncodedSample:
    """The JPEG files and the class in a record of a shard.

    Raises:
        ValueError: the record is malformed or lacks a feature.
    """
    features = tfrecord.parse_example(record)
    for name, kind in (("image", bytes), ("heatmap", bytes), ("label", int)):
        values = features.get(name)
        if values is None or len(values) != 1 or not isinstance(values[0], kind):
            found = "none" if values is None else f"{len(values)} values"
            raise ValueError(
                f"feature {name!r} must be one value of type {kind.__name__}, found {found}; the "
                f"record has the features {sorted(features)}"
            )
    image, heatmap, label = (features[name][0] for name in ("image", "heatmap", "label"))
    assert isinstance(image, bytes)
    assert isinstance(heatmap, bytes)
    assert isinstance(label, int)
    return EncodedSample(image, heatmap, label)


def resolve(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], suffixes: Sequence[str]
) -> list[Path]:
    """Expands directories, to their files with one of these suffixes, and patterns to files."""
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    files: list[Path] = []
    for path in paths:
        if os.path.isfile(path):
            files.append(Path(path))
            continue
        if os.path.isdir(path):
            folder = os.path.join(glob.escape(os.fspath(path)), "*.")
            patterns = [folder + suffix for suffix in suffixes]
        else:
            patterns = [os.fspath(path)]
        found = [Path(file) for pattern in patterns for file in glob.glob(pattern)]
        if not found:
            raise FileNotFoundError(
                f"no ClickMe file found: {' or '.join(patterns)} matches no file"
            )
        files += sorted(found, key=natural_order)
    if not files:
        raise FileNotFoundError("no ClickMe file found: paths is empty")
    return files


def natural_order(path: Path) -> list[tuple[int, str]]:
    return [
        (int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))
    ]


def _index(
    paths: list[Path], cache: Path | None, verify: bool, on_error: OnError
) -> list[tfrecord.Scan]:
    """The records' offsets in each file, from the cache where it holds for the file as it is."""
    keys = [_state(path) for path in paths]
    known: dict[str, Any] = _load_cache(cache) if cache is not None else {}
    scans = []
    scanned = 0
    last = time.monotonic()
    for done, (path, key) in enumerate(zip(paths, keys, strict=True)):
        entry = known.get(key[0])
        if entry is not None and entry["state"] == key:
            error = entry["error"]
            scan = tfrecord.Scan(
                entry["offsets"], None if error is None else TFRecordError(path, *error)
            )
        else:
            if time.monotonic() - last > _PROGRESS_SECONDS:
                last = time.monotonic()
                print(f"ClickMe: indexing shard {done + 1} of {len(paths)}", file=sys.stderr)
            scan = tfrecord.scan_records(path, verify=verify)
            error = None if scan.error is None else (scan.error.offset, scan.error.reason)
            known[key[0]] = {"state": key, "offsets": scan.offsets, "error": error}
            scanned += 1
        if scan.error is not None and on_error == "raise":
            raise scan.error
        scans.append(scan)
    if cache is not None and scanned:
        # Renamed into place: ranks that start together never read half a file.
        partial = cache.with_name(f"{cache.name}.{os.getpid()}.partial")
        torch.save({"version": _CACHE_VERSION, "files": known}, partial)
        os.replace(partial, cache)
    return scans


def _state(path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns


def _load_cache(cache: Path) -> dict[str, Any]:
    if not cache.exists():
        return {}
    content = torch.load(cache, weights_only=True)
    if not isinstance(content, dict) or content.get("version") != _CACHE_VERSION:
        raise ValueError(
            f"index_cache: {cache} is no ClickMe index of version {_CACHE_VERSION}; delete it, or "
            "name another file"
        )
    files: dict[str, Any] = content["files"]
    return files
