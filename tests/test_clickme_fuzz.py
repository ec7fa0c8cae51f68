"""Damaged ClickMe files of every kind: a located error or a correct sample, never anything else."""

# ruff: noqa: PT017 (errors are allowed here, not required)

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from clickme_shards import click_map, framed, jpeg, picture, record
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from harmonizer_ext.clickme import ClickMe, ClickMeFiles, ClickMeSample, TFRecordError, tfrecord
from harmonizer_ext.clickme.jpeg import Decoder
from harmonizer_ext.clickme.webdataset import ClickMeWebDataset

pytest.importorskip("google_crc32c", reason="google-crc32c (extra: train) checks the records")
pytest.importorskip("simplejpeg", reason="simplejpeg (extra: train) is one of the decoders")
pytest.importorskip("webdataset", reason="webdataset (extra: train) reads the tar shards")

RECORDS = [record(seed) for seed in range(3)]
FRAMED = [framed(data) for data in RECORDS]
SHARD = b"".join(FRAMED)
#: A file that ends between two records is no damaged file.
WHOLE_RECORDS = [b"".join(FRAMED[:count]) for count in range(1, 4)]

fuzzed = settings(
    max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

# Where, relative to the file's length, and the bytes put there; and the part that is kept of it.
changes = st.lists(
    st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=12)), min_size=0, max_size=3
)
kept = st.one_of(st.just(1.0), st.floats(0, 1))


def damaged(content: bytes, changes: list[tuple[float, bytes]], kept: float) -> bytes:
    out = bytearray(content[: round(kept * len(content))])
    for where, replacement in changes:
        at = round(where * len(out))
        out[at : at + len(replacement)] = replacement
    return bytes(out)


def same(one: ClickMeSample, other: ClickMeSample) -> bool:
    return (
        torch.equal(one.image, other.image)
        and torch.equal(one.heatmap, other.heatmap)
        and one.label == other.label
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[ClickMeSample]:
    path = tmp_path_factory.mktemp("whole") / "whole.tfrecords"
    path.write_bytes(SHARD)
    return list(ClickMe(path, preprocess=None))


@fuzzed
@given(changes=changes, kept=kept)
@example(changes=[(0.0, b"\xff" * 8)], kept=1.0)  # a length of 2**64 - 1
@example(changes=[(0.0, b"\x00" * 7 + b"\x40")], kept=1.0)  # of 2**62
@example(changes=[], kept=0.0)
def test_verified_shards_give_correct_samples_or_an_error(
    tmp_path: Path, whole: list[ClickMeSample], changes: list[tuple[float, bytes]], kept: float
) -> None:
    path = tmp_path / "shard.tfrecords"
    content = damaged(SHARD, changes, kept)
    path.write_bytes(content)
    correct = 0
    try:
        dataset = ClickMe(path, preprocess=None)
    except TFRecordError as error:
        assert error.path == path
        assert 0 <= error.offset <= len(content)
        assert content != SHARD
    else:
        for index in range(len(dataset)):
            try:
                assert same(dataset[index], whole[index])
                correct += 1
            except TFRecordError as error:
                assert (error.path, error.offset) == dataset.locate(index)
        if content == SHARD:
            assert correct == 3
    # Skipping, what comes is among the correct samples, and what does not come is listed.
    try:
        dataset = ClickMe(path, preprocess=None, on_error="skip")
        samples = list(dataset)
    except ValueError:
        assert correct == 0
    else:
        assert all(any(same(sample, one) for one in whole) for sample in samples)
        assert bool(dataset.skipped) == (content not in WHOLE_RECORDS)


@fuzzed
@given(
    changes=changes,
    kept=kept,
    which=st.integers(0, 2),
    decoder=st.sampled_from(["pillow", "simplejpeg", "simplejpeg-fast"]),
)
def test_damage_that_no_checksum_tells(
    tmp_path: Path, changes: list[tuple[float, bytes]], kept: float, which: int, decoder: Decoder
) -> None:
    """Records damaged before they were framed: the message's and the JPEGs' own checks are left."""
    path = tmp_path / "shard.tfrecords"
    data = damaged(RECORDS[which], changes, kept)
    path.write_bytes(len(data).to_bytes(8, "little") + bytes(4) + data + bytes(4))
    dataset = ClickMe(path, preprocess=None, verify=False, decoder=decoder)
    try:
        sample = dataset[0]
    except TFRecordError as error:
        assert (error.path, error.offset) == (path, 0)
    else:
        assert sample.image.shape == (3, 256, 256)
        assert sample.heatmap.shape == (1, 256, 256)
        assert 0 <= sample.label < 1000


@fuzzed
@given(content=st.binary(max_size=300))
def test_garbage(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "garbage.tfrecords"
    path.write_bytes(content)
    for verify in (True, False):
        try:
            dataset = ClickMe(path, verify=verify)
            for index in range(len(dataset)):
                with pytest.raises(TFRecordError):
                    dataset[index]
        except TFRecordError:
            pass
    try:
        tfrecord.parse_example(content)
    except ValueError as error:
        assert str(error)


def npz() -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, image=picture(1), heatmap=click_map(1), label=np.array(7))
    return file.getvalue()


def pth() -> bytes:
    file = io.BytesIO()
    image, heatmap = torch.tensor(picture(1)).permute(2, 0, 1), torch.tensor(click_map(1))[None]
    torch.save({"image": image, "heatmap": heatmap, "label": torch.tensor([[7]])}, file)
    return file.getvalue()


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for seed in range(2):
            for name, content in (
                ("heatmap.jpg", jpeg(click_map(seed))),
                ("jpg", jpeg(picture(seed))),
                ("cls", str(seed).encode()),
            ):
                member = tarfile.TarInfo(f"{seed}.{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


@pytest.mark.parametrize("kind", [npz, pth])
def test_damaged_files(tmp_path: Path, kind: Callable[[], bytes]) -> None:
    path = tmp_path / f"sample.{kind.__name__}"
    content = kind()
    path.write_bytes(content)
    expected = ClickMeFiles(path, preprocess=None)[0]

    @fuzzed
    @given(changes=changes, kept=kept)
    @example(changes=[], kept=0.0)
    def check(changes: list[tuple[float, bytes]], kept: float) -> None:
        path.write_bytes(damaged(content, changes, kept))
        dataset = ClickMeFiles(path, preprocess=None)
        try:
            sample = dataset[0]
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert same(sample, expected)  # both kinds have checksums of their own

    check()


def test_damaged_tar_shards(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    content = tar()

    @fuzzed
    @given(changes=changes, kept=kept)
    @example(changes=[], kept=0.0)
    def check(changes: list[tuple[float, bytes]], kept: float) -> None:
        path.write_bytes(damaged(content, changes, kept))
        for on_error in ("raise", "skip"):
            dataset = ClickMeWebDataset(path, preprocess=None, on_error=on_error)
            try:
                for sample in dataset:
                    assert sample.image.shape == (3, 256, 256)
                    assert sample.heatmap.shape == (1, 256, 256)
            except ValueError as error:
                assert on_error == "raise"
                assert str(path) in str(error)

    check()
