"""The ClickMe data set from its released TFRecord shards, without TensorFlow.

ClickMe (Linsley et al., ICLR 2019) tells for ImageNet images where people click to let others
recognize the object. The authors of the neural harmonizer release it in shards at
``storage.googleapis.com/serrelab/prj_harmonization/dataset/click-me``: ``train/train-0.tfrecords``
to ``train-317.tfrecords`` and ``val/val-0.tfrecords`` to ``val-16.tfrecords``. A record has an
``image`` and a ``heatmap`` (JPEG, 256x256, three channels and one) and a ``label`` (0 to 999).
"""

from __future__ import annotations

import glob
import io
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
from .released import released_preprocessing
from .sample import ClickMeSample
from .tfrecord import TFRecordError

__all__ = ["ClickMe"]

_STORED_SIZE = 256
_CLASSES = 1000
_CACHE_VERSION = 1
_PROGRESS_SECONDS = 5.0


class ClickMe(Dataset[Any]):
    """ClickMe as a map-style data set: random access into any number of shards.

    The shards are scanned once for the positions of their records (12 bytes read per record); with
    ``index_cache`` later runs skip that. Samples are in the order of the shards and of the records
    in them. No file is kept open, so that the data set can be pickled to DataLoader workers.

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
            (1, 256, 256), both uint8.
        transform: called with each ``ClickMeSample``; what it returns is the sample. The place for
            augmentations, which must move image and heatmap together.
        index_cache: file for the positions of the records. Shards whose size or time of
            modification changed since are scanned again, and the file is rewritten.
        verify: whether to check the records' checksums, which costs some microseconds each and
            needs the package ``google-crc32c``.

    Raises:
        FileNotFoundError: a path or pattern matches no file.
        TFRecordError: a shard is truncated or corrupt; the text names file and offset. Indexing
            raises it too, for a corrupt record, a JPEG that cannot be decoded or has another size,
            a missing feature, or a label outside of 0 to 999.
        ImportError: Pillow, or with ``verify`` google-crc32c, is not installed.
        ValueError: ``preprocess`` has an unknown name.
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        preprocess: Literal["released"] | None = "released",
        transform: Callable[[ClickMeSample], Any] | None = None,
        index_cache: str | os.PathLike[str] | None = None,
        verify: bool = True,
    ) -> None:
        if preprocess not in ("released", None):
            raise ValueError(f'preprocess must be "released" or None, got {preprocess!r}')
        _pillow_image()  # fail here rather than in a worker
        self.paths = _resolve(paths)
        self.preprocess = preprocess
        self.transform = transform
        self.verify = verify
        indices = _index(self.paths, None if index_cache is None else Path(index_cache), verify)
        # Tensors, which workers share; lists of integers would be copied to each of them.
        self._offsets = torch.cat(indices)
        self._ends = torch.tensor([len(index) for index in indices]).cumsum(0)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} samples")
        index %= len(self)
        path = self.paths[int(torch.searchsorted(self._ends, index, right=True))]
        offset = int(self._offsets[index])
        record = tfrecord.read_record(path, offset, verify=self.verify)
        try:
            sample = _decode(record)
        except ValueError as error:
            raise TFRecordError(path, offset, str(error)) from error
        if self.preprocess == "released":
            image, heatmap = released_preprocessing(sample.image, sample.heatmap)
            sample = sample._replace(image=image, heatmap=heatmap)
        return sample if self.transform is None else self.transform(sample)

    def __repr__(self) -> str:
        return (
            f"ClickMe({len(self)} samples in {len(self.paths)} shards, "
            f"preprocess={self.preprocess!r})"
        )


def _decode(record: bytes) -> ClickMeSample:
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
    if not 0 <= label < _CLASSES:
        raise ValueError(f"label must lie between 0 and {_CLASSES - 1}, got {label}")
    return ClickMeSample(
        _decode_jpeg("image", image, "RGB"),
        _decode_jpeg("heatmap", heatmap, "L"),
        label,
        torch.ones(()),
    )


def _decode_jpeg(name: str, data: bytes, mode: str) -> Tensor:
    """Decodes to (channels, 256, 256) uint8."""
    try:
        # Pillow's exceptions for bad data are OSError (UnidentifiedImageError among them) and
        # SyntaxError.
        with _pillow_image().open(io.BytesIO(data), formats=["JPEG"]) as image:
            image.load()
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{name} is no readable JPEG: {error}") from error
    if image.mode != mode or image.size != (_STORED_SIZE, _STORED_SIZE):
        width, height = image.size
        raise ValueError(
            f"{name} must be a JPEG of mode {mode} and {_STORED_SIZE}x{_STORED_SIZE} pixels, got "
            f"mode {image.mode} and {height}x{width}"
        )
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.reshape(_STORED_SIZE, _STORED_SIZE, -1).permute(2, 0, 1).contiguous()


def _pillow_image() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "ClickMe decodes JPEGs with Pillow: pip install harmonizer-ext[train]"
        ) from error
    return Image


def _resolve(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
) -> list[Path]:
    """Expands directories and patterns to files."""
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    files: list[Path] = []
    for path in paths:
        if os.path.isfile(path):
            files.append(Path(path))
            continue
        pattern = os.fspath(path)
        if os.path.isdir(path):
            pattern = os.path.join(glob.escape(pattern), "*.tfrecords")
        found = sorted((Path(file) for file in glob.glob(pattern)), key=_natural_order)
        if not found:
            raise FileNotFoundError(f"no ClickMe shard found: {pattern} matches no file")
        files += found
    if not files:
        raise FileNotFoundError("no ClickMe shard found: paths is empty")
    return files


def _natural_order(path: Path) -> list[tuple[int, str]]:
    return [
        (int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))
    ]


def _index(paths: list[Path], cache: Path | None, verify: bool) -> list[Tensor]:
    """The records' offsets in each file, from the cache where it holds for the file as it is."""
    keys = [_state(path) for path in paths]
    known: dict[str, Any] = _load_cache(cache) if cache is not None else {}
    indices = []
    scanned = 0
    last = time.monotonic()
    for done, (path, key) in enumerate(zip(paths, keys, strict=True)):
        entry = known.get(key[0])
        if entry is not None and entry["state"] == key:
            indices.append(entry["offsets"])
            continue
        if time.monotonic() - last > _PROGRESS_SECONDS:
            last = time.monotonic()
            print(f"ClickMe: indexing shard {done + 1} of {len(paths)}", file=sys.stderr)
        indices.append(tfrecord.index_records(path, verify=verify))
        known[key[0]] = {"state": key, "offsets": indices[-1]}
        scanned += 1
    if cache is not None and scanned:
        # Renamed into place: ranks that start together never read half a file.
        partial = cache.with_name(f"{cache.name}.{os.getpid()}.partial")
        torch.save({"version": _CACHE_VERSION, "files": known}, partial)
        os.replace(partial, cache)
    return indices


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
