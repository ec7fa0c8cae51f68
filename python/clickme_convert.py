"""Converts TFRecord shards of ClickMe to WebDataset shards, and verifies either."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harmonizer_ext.clickme import tfrecord
from harmonizer_ext.clickme.sample import decode_sample
from harmonizer_ext.clickme.shards import read_features
from harmonizer_ext.clickme.tar import HEATMAP, IMAGE, LABEL, label_of
from harmonizer_ext.clickme.tfrecord import TFRecordError
from harmonizer_ext.clickme.webdataset import MANIFEST, read_manifest
from harmonizer_ext.files.output import replacing, write_text
from harmonizer_ext.files.reading import MAX_BYTES, UnreadableError, check_size, open_file
from harmonizer_ext.files.tar import members
from harmonizer_ext.files.text import shown

try:
    import webdataset
except ImportError as error:
    raise ImportError(f"clickme_convert.py: {error}; pip install harmonizer-ext[train]") from error

VERSION = 1


@dataclass
class Entry:
    """What the manifest says of a shard.

    Attributes:
        source: name of the TFRecord shard.
        source_size: its size in bytes.
        source_time: its time of modification, in nanoseconds.
        samples: number of samples.
        skipped: byte offsets in the source of the records that were left out.
        size: of the tar file in bytes.
        sha256: of the tar file.
    """

    source: str
    source_size: int
    source_time: int
    samples: int
    skipped: list[int]
    size: int
    sha256: str


def convert_shard(
    source: Path,
    directory: Path,
    *,
    on_error: str = "raise",
    warn: Callable[[str], Any] = lambda text: None,
    progress: Callable[[int], Any] = lambda count: None,
) -> Entry | None:
    """Copies a TFRecord shard into ``<name>.tar``, byte for byte, and notes it in the manifest.

    The tar file is read back and compared with the source before it gets its name. Its bytes depend
    on those of the source alone.

    Args:
        source: the TFRecord shard.
        directory: where the tar file and the manifest go.
        on_error: ``"raise"``, or ``"skip"`` to leave out records that cannot be read or decoded.
        warn: called with a line about each record that is left out.
        progress: called with the number of bytes of the source that are done since the last call.

    Returns:
        The manifest's entry, or None where the manifest has the shard as it is already.

    Raises:
        TFRecordError: a record cannot be read, with ``on_error="raise"``.
        OSError: the tar file does not read back as it was written.
    """
    target = directory / f"{source.stem}.tar"
    stat = source.stat()
    known = read_manifest(directory).get(target.name)
    if (
        known is not None
        and (known["source"], known["source_size"], known["source_time"])
        == (source.name, stat.st_size, stat.st_mtime_ns)
        and not (known["skipped"] and on_error == "raise")
        and target.is_file()
        and target.stat().st_size == known["size"]
        and _digest(target) == known["sha256"]
    ):
        progress(stat.st_size)
        return None

    skipped: list[int] = []

    def leave_out(error: TFRecordError) -> None:
        if on_error == "raise":
            raise error
        skipped.append(error.offset)
        warn(f"left out: {error}")

    offsets, damage = tfrecord.scan_records(source)
    if damage is not None:
        leave_out(damage)
    copied: list[tuple[int, int]] = []
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(target) as file:
        # Equal bytes for equal samples: no time of writing in the headers. (As a float it would
        # take a header of its own.)
        with webdataset.TarWriter(file, encoder=False, mtime=0) as writer:
            done = 0
            for number, offset in enumerate(offsets.tolist()):
                try:
                    writer.write(_decodable(source, number, offset))
                    copied.append((number, offset))
                except TFRecordError as error:
                    leave_out(error)
                progress(offset - done)
                done = offset
            progress(stat.st_size - done)
        file.flush()
        os.fsync(file.fileno())
        _compare(file, target, (_stored(source, number, offset) for number, offset in copied))
        size = file.seek(0, 2)
        digest = _sha256(file)
    entry = Entry(source.name, stat.st_size, stat.st_mtime_ns, len(copied), skipped, size, digest)
    _note(directory, target.name, entry)
    return entry


def _stored(source: Path, number: int, offset: int) -> dict[str, Any]:
    """A record as the files of a sample."""
    image, heatmap, label = read_features(tfrecord.read_record(source, offset))
    return {
        "__key__": f"{source.stem.replace('.', '-')}-{number:06d}",
        HEATMAP: heatmap,
        IMAGE: image,
        LABEL: str(label).encode(),
    }


def _decodable(source: Path, number: int, offset: int) -> dict[str, Any]:
    try:
        sample = _stored(source, number, offset)
        decode_sample(sample[IMAGE], sample[HEATMAP], int(sample[LABEL]), "pillow")
    except TFRecordError:
        raise
    except ValueError as error:
        raise TFRecordError(source, offset, str(error)) from error
    return sample


def _compare(file: Any, path: Path, samples: Iterator[dict[str, Any]]) -> None:
    """Reads a tar file back and compares it with what was to be written."""
    expected = (
        (f"{sample['__key__']}.{name}", content)
        for sample in samples
        for name, content in sorted(sample.items())  # as TarWriter orders them
        if name != "__key__"
    )
    file.seek(0)
    found = ((member.name, _content(file, member)) for member in members(file, path))
    for got, wanted in itertools.zip_longest(found, expected):
        if got != wanted:
            name, _ = wanted or got
            raise OSError(
                f"{shown(path)} does not read back as it was written, at {name}: is the disk sound?"
            )


def _content(file: Any, member: Any) -> bytes:
    check_size(member.name, member.size, MAX_BYTES)
    file.seek(member.offset)
    return file.read(member.size)


def _digest(path: Path) -> str:
    with open_file(path) as file:
        return _sha256(file)


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()


def _note(directory: Path, name: str, entry: Entry) -> None:
    """Adds a shard to the manifest, which is replaced as a whole."""
    shards = {**read_manifest(directory), name: asdict(entry)}
    text = json.dumps({"version": VERSION, "shards": shards}, indent=1) + "\n"
    write_text(directory / MANIFEST, text)


@dataclass
class Findings:
    """What ``verify`` found in a file.

    Attributes:
        samples: number of samples that are as they should be.
        classes: their labels.
        problems: a line for each problem.
    """

    samples: int
    classes: set[int]
    problems: list[str]


def verify_tfrecord(path: Path) -> Findings:
    """Reads every record of a TFRecord shard: checksums, features, JPEGs."""
    offsets, damage = tfrecord.scan_records(path)
    findings = Findings(0, set(), [] if damage is None else [str(damage)])
    for number, offset in enumerate(offsets.tolist()):
        try:
            findings.classes.add(int(_decodable(path, number, offset)[LABEL]))
            findings.samples += 1
        except TFRecordError as error:
            findings.problems.append(str(error))
    return findings


def verify_tar(path: Path) -> Findings:
    """Compares a tar shard with its manifest: size and checksum."""
    try:
        entry = read_manifest(path.parent).get(path.name)
        if entry is None:
            return Findings(0, set(), [f"{shown(path)}: not in {shown(path.parent / MANIFEST)}"])
        if path.stat().st_size != entry["size"] or _digest(path) != entry.get("sha256"):
            problem = f"{shown(path)}: size or checksum is not that of {MANIFEST}"
            return Findings(0, set(), [problem])
        with open_file(path) as file:
            labels = (m for m in members(file, path) if m.name.endswith(f".{LABEL}"))
            classes = {label_of(_content(file, member), path) for member in labels}
    except UnreadableError as error:
        return Findings(0, set(), [str(error)])
    return Findings(entry["samples"], classes, [])
