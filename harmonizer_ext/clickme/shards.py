"""The ClickMe data set from its released TFRecord shards, without TensorFlow.

ClickMe (Linsley et al., ICLR 2019) tells for ImageNet images where people click to let others
recognize the object. The authors of the neural harmonizer release it in shards at
``storage.googleapis.com/serrelab/prj_harmonization/dataset/click-me``: ``train/train-0.tfrecords``
to ``train-317.tfrecords`` and ``val/val-0.tfrecords`` to ``val-16.tfrecords``. A record has an
``image`` and a ``heatmap`` (JPEG, 256x256, three channels and one) and a ``label`` (0 to 999).
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harmonizer_ext.files.output import replacing
from harmonizer_ext.files.reading import MAX_BYTES, UnreadableError
from harmonizer_ext.files.text import shown
from harmonizer_ext.files.weights import read_weights

from . import tfrecord
from .dataset import OnError, SampleDataset, check_on_error
from .jpeg import Decoder, choose_decoder
from .kinds import Paths, find_files
from .released import Preprocess, check_preprocess
from .sample import ClickMeSample, check_label, decode_sample
from .tfrecord import TFRecordError

__all__ = ["ClickMe", "read_features"]

_CACHE_VERSION = 1
_PROGRESS_SECONDS = 5.0

_log = logging.getLogger("harmonizer_ext")


class ClickMe(SampleDataset):
    """ClickMe as a map-style data set: random access into any number of shards.

    The shards are scanned once for the positions of their records (12 bytes read per record); with
    ``index_cache`` later runs skip that. Samples are in the order of the shards and of the records
    in them. No file is kept open, and the index is one tensor, which the workers of a DataLoader
    share. Samplers divide the samples over ranks (``torch.utils.data.DistributedSampler``), and
    the DataLoader divides a rank's over its workers.

    The released pipeline decodes with TensorFlow's default inverse DCT, the fast one; so does
    ``decoder="simplejpeg-fast"``, to the same pixels, bit for bit. The other decoders take the
    exact inverse DCT and give the pixels of
    ``tf.io.decode_jpeg(dct_method="INTEGER_ACCURATE")``, which are about 1 grey level brighter;
    single ones differ by 3 at quality 75, by up to 15 in finely quantized images.

    Args:
        paths: a shard, a directory (its ``*.tfrecords`` files), a glob pattern, or a sequence of
            any of these. Files of a directory or a pattern are taken in natural order:
            ``val-2`` before ``val-10``. A directory with data of other kinds too is refused.
        preprocess: what to do with the decoded JPEGs.

            - ``"released"``: what the authors' ``parse_clickme_prototype`` does (see
              ``released_preprocessing``): image (3, 224, 224) and heatmap (1, 224, 224), float32.
            - ``"released-heatmap"``: image (3, 256, 256) uint8 untouched, heatmap (1, 256, 256)
              float32, reduced to 64x64 and blurred as released, then brought to 256x256. For
              augmentations, which crop both alike. Not uint8: rounding costs up to 4e-3 of the
              heatmap's range, where the released one is met within 1e-3.
            - None: image (3, 256, 256) and heatmap (1, 256, 256), both uint8. For
              ``released_preprocessing`` on whole batches.
        transform: called with each ``ClickMeSample``; what it returns is the sample. The place for
            augmentations, which must move image and heatmap together.
        decoder: ``"pillow"``, or ``"simplejpeg"`` or ``"simplejpeg-fast"`` (libjpeg-turbo through
            the package ``simplejpeg``), which also refuses JPEGs that Pillow repairs. None is
            ``"simplejpeg-fast"``, or, where that is not installed, Pillow with a warning.
        index_cache: file for the positions of the records. Shards whose size or time of
            modification changed since are scanned again, and the file is rewritten.
        verify: whether to check the records' checksums, which costs some microseconds each and
            needs the package ``google-crc32c``.
        on_error: ``"raise"``, or ``"skip"`` to leave out what cannot be read. What lies behind a
            truncation or a corrupt length is left out when the shards are scanned: such records
            are not counted in ``len``. A record that is found out when it is read counts, and
            **the next readable record is returned in its place**. Each is logged once (logger
            ``harmonizer_ext``, as a warning) with file and offset, and listed in ``skipped``.
            ``"mark"`` does the same, but returns in its place a sample of zeros with the label -1
            and the token 0, for whoever leaves such rows out.
        max_bytes: largest size of a record; a longer one counts as unreadable, and is not read.

    Raises:
        FileNotFoundError: a path or pattern matches no file.
        TFRecordError: a shard is truncated or corrupt; the text names file and offset. Indexing
            raises it too, for a corrupt record, a JPEG that cannot be decoded or has another size,
            a missing feature, or a label outside of 0 to 999.
        ImportError: the decoder, or with ``verify`` google-crc32c, is not installed.
        ValueError: ``preprocess``, ``decoder`` or ``on_error`` has an unknown name; there are files
            of several kinds; ``index_cache`` is another kind of file.
    """

    def __init__(
        self,
        paths: Paths,
        *,
        preprocess: Preprocess = "released",
        transform: Callable[[ClickMeSample], Any] | None = None,
        decoder: Decoder | None = None,
        index_cache: str | os.PathLike[str] | None = None,
        verify: bool = True,
        on_error: OnError = "raise",
        max_bytes: int = MAX_BYTES,
    ) -> None:
        # Everything that needs no file first, and here rather than in a worker.
        check_preprocess(preprocess)
        check_on_error(on_error, "raise", "skip", "mark")
        chosen = choose_decoder(decoder)
        self.paths = find_files(paths, "tfrecords")[1]
        self.max_bytes = max_bytes
        self.decoder: Decoder = chosen
        self.verify = verify
        cache = None if index_cache is None else Path(index_cache)
        indices, errors = _index(self.paths, cache, verify)
        if errors and (on_error == "raise" or not any(map(len, indices))):
            raise errors[0]
        for error in errors:
            _log.warning("left out from here to the end of the file: %s", error)
        self._lost = [(error.path, error.offset) for error in errors]
        # Tensors, which workers share; lists of integers would be copied to each of them.
        self._offsets = torch.cat(indices)
        self._ends = torch.tensor([len(index) for index in indices], device="cpu").cumsum(0)
        super().__init__(len(self._offsets), preprocess, transform, on_error)

    def locate(self, index: int) -> tuple[Path, int]:
        """The shard of a sample, and the byte in it where its record begins."""
        index = self._checked(index)
        path = self.paths[int(torch.searchsorted(self._ends, index, right=True))]
        return path, int(self._offsets[index])

    @property
    def skipped(self) -> list[tuple[Path, int]]:
        """Shard and offset of what was left out so far, by this process or its workers.

        A truncation or a corrupt length is one entry, however many records lie behind it.
        """
        return self._lost + super().skipped

    def label(self, index: int) -> int:
        """The label of a sample, without decoding its JPEGs; their checksum is verified.

        Raises:
            TFRecordError: the record is unreadable; also where such records are skipped.
        """
        path, offset = self.locate(index)
        record = tfrecord.read_record(path, offset, verify=self.verify, max_bytes=self.max_bytes)
        try:
            _, _, label = read_features(record)
            check_label(label)
        except ValueError as error:
            raise TFRecordError(path, offset, str(error)) from error
        return label

    def _read(self, index: int, into: tuple[Tensor, Tensor] | None) -> ClickMeSample:
        path, offset = self.locate(index)
        record = tfrecord.read_record(path, offset, verify=self.verify, max_bytes=self.max_bytes)
        try:
            return decode_sample(*read_features(record), self.decoder, into)
        except ValueError as error:
            raise TFRecordError(path, offset, str(error)) from error

    def __repr__(self) -> str:
        return (
            f"ClickMe({len(self)} samples in {len(self.paths)} shards, "
            f"preprocess={self.preprocess!r})"
        )


def read_features(record: bytes) -> tuple[bytes, bytes, int]:
    """The image, the heatmap (both JPEG files) and the label of a record.

    Raises:
        ValueError: the record is no ``tf.train.Example``, or a feature is missing or of another
            type.
    """
    # Two values are enough to know that there is more than one.
    features = tfrecord.parse_example(record, most=2)

    def single(name: str, kind: type) -> Any:
        values = features.get(name)
        if values is None or len(values) != 1 or not isinstance(values[0], kind):
            found = "none" if values is None else f"{len(values)} values"
            raise ValueError(
                f"feature {name!r} must be one value of type {kind.__name__}, found {found}; the "
                f"record has the features {sorted(features)}"
            )
        return values[0]

    return single("image", bytes), single("heatmap", bytes), single("label", int)


def _index(
    paths: list[Path], cache: Path | None, verify: bool
) -> tuple[list[Tensor], list[TFRecordError]]:
    """The records' offsets in each file, from the cache where it holds for the file as it is."""
    known: dict[str, Any] = {} if cache is None else _load_cache(cache)
    indices: list[Tensor] = []
    errors: list[TFRecordError] = []
    changed = False
    last = time.monotonic()
    for done, path in enumerate(paths):
        key = _state(path)
        entry = known.get(key[0])
        if entry is not None and entry["state"] == key:
            indices.append(entry["offsets"])
            continue
        if time.monotonic() - last > _PROGRESS_SECONDS:
            last = time.monotonic()
            print(f"ClickMe: indexing shard {done + 1} of {len(paths)}", file=sys.stderr)
        offsets, error = tfrecord.scan_records(path, verify=verify)
        indices.append(offsets)
        if error is not None:  # not cached: whoever reads it next must hear of it too
            errors.append(error)
            continue
        known[key[0]] = {"state": key, "offsets": offsets}
        changed = True
    if cache is not None and changed:
        # Renamed into place: ranks that start together never read half a file.
        with replacing(cache) as file:
            torch.save({"version": _CACHE_VERSION, "files": known}, file)
    return indices, errors


def _state(path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns


def _load_cache(cache: Path) -> dict[str, Any]:
    if not cache.exists():
        return {}
    try:
        content = read_weights(cache, "index_cache")
    except UnreadableError:
        content = None
    if not isinstance(content, dict) or content.get("version") != _CACHE_VERSION:
        raise _no_index(cache)
    files = content.get("files")
    if not isinstance(files, dict) or not all(map(_is_entry, files.values())):
        raise _no_index(cache)
    return files


def _is_entry(entry: Any) -> bool:
    """Whether the offsets may be those of a file of the size that the entry says."""
    if not isinstance(entry, dict) or entry.keys() != {"state", "offsets"}:
        return False
    state, offsets = entry["state"], entry["offsets"]
    if not isinstance(state, tuple) or len(state) != 3 or not isinstance(state[1], int):
        return False
    if not isinstance(offsets, Tensor) or offsets.dtype != torch.int64 or offsets.dim() != 1:
        return False
    # A record takes 16 bytes or more; the tensor may claim more numbers than it has.
    if offsets.layout != torch.strided or len(offsets) > state[1] // 16:
        return False
    return not len(offsets) or bool(offsets.min() >= 0 and offsets.max() < state[1])


def _no_index(cache: Path) -> ValueError:
    return ValueError(
        f"index_cache: {shown(cache)} is no ClickMe index of version {_CACHE_VERSION}; delete it, "
        "or name another file"
    )
