"""The ClickMe reader against shards of an independent writer, whole, damaged and truncated."""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clickme_shards import (
    PIXEL_TOLERANCE,
    Image,
    click_map,
    example,
    framed,
    jpeg,
    picture,
    record,
)

from harmonizer_ext import clickme
from harmonizer_ext.clickme import ClickMe, tfrecord
from harmonizer_ext.clickme.tfrecord import TFRecordError

pytest.importorskip("google_crc32c", reason="google-crc32c (extra: train) checks the records")


@pytest.fixture(scope="module")
def records() -> list[bytes]:
    return [record(seed) for seed in range(7)]


@pytest.fixture(scope="module")
def framed_records(records: list[bytes]) -> list[bytes]:
    return [framed(data) for data in records]  # once: the bitwise checksum is slow


@pytest.fixture
def shards(tmp_path: Path, framed_records: list[bytes]) -> list[Path]:
    """Three shards of 3, 1 and 3 samples, whose natural order is not the alphabetical one."""
    paths = [tmp_path / f"val-{name}.tfrecords" for name in ("0", "2", "10")]
    for path, part in zip(paths, (slice(0, 3), slice(3, 4), slice(4, 7)), strict=True):
        path.write_bytes(b"".join(framed_records[part]))
    return paths


def labels(dataset: ClickMe) -> list[int]:
    return [dataset[index].label for index in range(len(dataset))]


EXPECTED_LABELS = [(seed * 37) % 1000 for seed in range(7)]


# ---------------------------------------------------------------------------- the data set


def test_samples_of_several_shards(shards: list[Path]) -> None:
    dataset = ClickMe(shards)
    assert len(dataset) == 7
    assert labels(dataset) == EXPECTED_LABELS
    assert [dataset[-index].label for index in (1, 7)] == [EXPECTED_LABELS[6], EXPECTED_LABELS[0]]
    for index in (7, -8):
        with pytest.raises(IndexError, match=f"index {index} is out of range for 7 samples"):
            dataset[index]
    assert repr(dataset) == "ClickMe(7 samples in 3 shards, preprocess='released')"
    sample = dataset[3]
    assert sample.image.shape == (3, 224, 224)
    assert sample.image.dtype == torch.float32
    assert sample.heatmap.shape == (1, 224, 224)
    assert sample.heatmap.dtype == torch.float32
    assert sample.token.shape == ()
    assert sample.token == 1
    assert sample.token.dtype == torch.float32
    assert 200 < sample.image.max() <= 255


def test_paths_may_be_a_directory_a_pattern_or_a_mixture(shards: list[Path]) -> None:
    folder = shards[0].parent
    (folder / "notes.txt").write_text("not a shard")
    assert ClickMe(folder).paths == shards
    assert ClickMe(str(folder / "val-*.tfrecords")).paths == shards
    assert labels(ClickMe(str(shards[1]))) == EXPECTED_LABELS[3:4]
    mixed = ClickMe([shards[2], folder / "val-[02].tfrecords"])
    assert labels(mixed) == EXPECTED_LABELS[4:] + EXPECTED_LABELS[:4]


def test_missing_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.tfrecords matches no file"):
        ClickMe(tmp_path / "nowhere.tfrecords")
    with pytest.raises(FileNotFoundError, match=r"\*\.tfrecords matches no file"):
        ClickMe(tmp_path)
    with pytest.raises(FileNotFoundError, match="paths is empty"):
        ClickMe([])


def test_decoded_pixels_without_preprocessing(shards: list[Path]) -> None:
    sample = ClickMe(shards, preprocess=None, decoder="pillow")[0]
    image = np.asarray(Image.open(io.BytesIO(jpeg(picture(0)))))
    heatmap = np.asarray(Image.open(io.BytesIO(jpeg(click_map(0)))))
    assert sample.image.dtype == sample.heatmap.dtype == torch.uint8
    np.testing.assert_array_equal(sample.image.numpy(), image.transpose(2, 0, 1))
    np.testing.assert_array_equal(sample.heatmap.numpy(), heatmap[None])
    with pytest.raises(ValueError, match=r"preprocess must be .* or None, got 'tf'"):
        ClickMe(shards, preprocess="tf")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"decoder must be one of .*, got 'opencv'"):
        ClickMe(shards, decoder="opencv")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r'"skip" or "mark", got .ignore.'):
        ClickMe(shards, on_error="ignore")  # type: ignore[arg-type]


def test_transform_gets_the_preprocessed_sample(shards: list[Path]) -> None:
    plain = ClickMe(shards)[2]
    dataset = ClickMe(shards, transform=lambda sample: (sample.image.flip(-1), sample.heatmap))
    image, heatmap = dataset[2]
    assert torch.equal(image, plain.image.flip(-1))
    assert torch.equal(heatmap, plain.heatmap)


def test_loader_with_workers(shards: list[Path]) -> None:
    dataset = ClickMe(shards)
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, num_workers=2)
    batches = list(loader)
    assert [type(batch) for batch in batches] == [clickme.ClickMeSample] * 2
    assert torch.cat([batch.label for batch in batches]).tolist() == EXPECTED_LABELS
    first = batches[0]
    assert first.image.shape == (4, 3, 224, 224)
    assert first.heatmap.shape == (4, 1, 224, 224)
    assert first.label.dtype == torch.int64
    assert first.token.dtype == torch.float32
    assert first.token.tolist() == [1] * 4
    # A worker runs on one thread, for which the resizing has another kernel.
    torch.testing.assert_close(first.image[3], dataset[3].image, rtol=0, atol=PIXEL_TOLERANCE)


def test_pickled_copies_read_the_same(shards: list[Path]) -> None:
    dataset = ClickMe(shards)
    dataset[0]
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[5].heatmap, dataset[5].heatmap)
    assert len(pickle.dumps(dataset)) < 5000


# ---------------------------------------------------------------------------- the index


def test_index_cache_saves_the_scan(
    shards: list[Path],
    framed_records: list[bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scanned: list[Path] = []
    scan = tfrecord.scan_records

    def counting(path: Path, *, verify: bool) -> tuple[torch.Tensor, TFRecordError | None]:
        scanned.append(path)
        return scan(path, verify=verify)

    monkeypatch.setattr(tfrecord, "scan_records", counting)
    cache = tmp_path / "index.pt"
    assert labels(ClickMe(shards, index_cache=cache)) == EXPECTED_LABELS
    assert scanned == shards
    assert labels(ClickMe(shards, index_cache=cache)) == EXPECTED_LABELS
    assert scanned == shards
    # A shard that changed is scanned again, alone; so is one that was not there before.
    shards[1].write_bytes(framed_records[6] + framed_records[5])
    swapped = [EXPECTED_LABELS[6], EXPECTED_LABELS[5]]
    expected = [*EXPECTED_LABELS[:3], *swapped, *EXPECTED_LABELS[4:]]
    assert labels(ClickMe(shards, index_cache=cache)) == expected
    assert scanned == [*shards, shards[1]]
    # Other shards do not evict those in the cache.
    ClickMe(shards[:1], index_cache=cache)
    ClickMe(shards, index_cache=cache)
    assert scanned == [*shards, shards[1]]
    assert not list(tmp_path.glob("*.partial"))


def test_a_foreign_cache_file_is_refused(shards: list[Path], tmp_path: Path) -> None:
    cache = tmp_path / "index.pt"
    torch.save({"weights": torch.zeros(3)}, cache)
    for content in (None, b"", b"no index"):
        if content is not None:
            cache.write_bytes(content)
        with pytest.raises(ValueError, match="is no ClickMe index of version 1; delete it"):
            ClickMe(shards, index_cache=cache)


def test_long_scans_show_progress(
    shards: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ClickMe(shards)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(clickme.shards, "_PROGRESS_SECONDS", -1.0)
    ClickMe(shards)
    assert "ClickMe: indexing shard 3 of 3" in capsys.readouterr().err


# ---------------------------------------------------------------------------- bad files


def spoil(path: Path, change: Callable[[bytearray], Any]) -> None:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


@pytest.mark.parametrize("cut", [1, 4, 5, 1000])
def test_truncated_shard(shards: list[Path], framed_records: list[bytes], cut: int) -> None:
    spoil(shards[2], lambda content: content.__delitem__(slice(len(content) - cut, None)))
    offset = len(framed_records[4]) + len(framed_records[5])
    with pytest.raises(TFRecordError, match="truncated, or no TFRecord file") as error:
        ClickMe(shards)
    assert f"{shards[2]}, record at byte {offset}:" in str(error.value)
    assert error.value.path == shards[2]
    assert error.value.offset == offset


@pytest.mark.parametrize("verify", [True, False])
def test_shard_that_ends_within_a_header(
    shards: list[Path], framed_records: list[bytes], verify: bool
) -> None:
    spoil(shards[1], lambda content: content.extend(b"\x05" * 11))
    reason = f"record at byte {len(framed_records[3])}: the file ends within the header, 11 of 12"
    with pytest.raises(TFRecordError, match=reason):
        ClickMe(shards, verify=verify)


def test_empty_shard(shards: list[Path]) -> None:
    shards[1].write_bytes(b"")
    with pytest.raises(TFRecordError, match="the file is empty"):
        ClickMe(shards)


@pytest.mark.parametrize("verify", [True, False])
def test_file_of_another_kind(tmp_path: Path, verify: bool) -> None:
    path = tmp_path / "page.tfrecords"
    path.write_text("<html>404: no such bucket</html>")
    with pytest.raises(TFRecordError, match=r"record at byte 0: .*no TFRecord file"):
        ClickMe(path, verify=verify)


@pytest.mark.parametrize("position", [0, 9])
def test_corrupt_length(shards: list[Path], framed_records: list[bytes], position: int) -> None:
    offset = len(framed_records[0])
    spoil(shards[0], lambda content: content.__setitem__(offset + position, 0xEE))
    with pytest.raises(TFRecordError, match="length does not match its checksum") as error:
        ClickMe(shards)
    assert error.value.path == shards[0]
    assert error.value.offset == offset


@pytest.mark.parametrize("position", [12, 5000, -1])
def test_corrupt_data(shards: list[Path], framed_records: list[bytes], position: int) -> None:
    offset = len(framed_records[0])
    at = position % len(framed_records[1]) + offset
    spoil(shards[0], lambda content: content.__setitem__(at, content[at] ^ 1))
    dataset = ClickMe(shards)
    assert dataset[0].label == EXPECTED_LABELS[0]
    assert dataset[2].label == EXPECTED_LABELS[2]
    with pytest.raises(TFRecordError, match="data does not match its checksum") as error:
        dataset[1]
    assert f"{shards[0]}, record at byte {offset}:" in str(error.value)
    restored: TFRecordError = pickle.loads(pickle.dumps(error.value))  # as from a worker
    assert str(restored) == str(error.value)
    assert restored.offset == offset


def test_shard_that_shrinks_after_indexing(shards: list[Path]) -> None:
    dataset = ClickMe(shards)
    spoil(shards[1], lambda content: content.__delitem__(slice(100, None)))
    with pytest.raises(TFRecordError, match=r"record at byte 0: .*the file ends \d+ early"):
        dataset[3]
    shards[1].write_bytes(b"12345")
    with pytest.raises(TFRecordError, match="5 of 12 bytes"):
        dataset[3]


def test_without_verification_checksums_are_not_read(
    shards: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(shards[0], lambda content: content.__setitem__(8, content[8] ^ 1))
    monkeypatch.setitem(sys.modules, "google_crc32c", None)
    assert labels(ClickMe(shards, verify=False)) == EXPECTED_LABELS
    with pytest.raises(ImportError, match=r"harmonizer-ext\[train\], or pass verify=False"):
        ClickMe(shards)


def test_without_a_decoder_the_extra_is_named(
    shards: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    with pytest.raises(ImportError, match='"simplejpeg-fast" needs the package simplejpeg'):
        ClickMe(shards, decoder="simplejpeg-fast")
    with pytest.warns(UserWarning, match="decoder: Pillow decodes, .* pip install simplejpeg"):
        assert ClickMe(shards).decoder == "pillow"
    monkeypatch.setitem(sys.modules, "PIL.JpegImagePlugin", None)
    with pytest.raises(ImportError, match=r'"pillow" needs .*pip install harmonizer-ext\[train\]'):
        ClickMe(shards)


def test_the_decoder_is_that_of_the_released_pipeline(shards: list[Path]) -> None:
    pytest.importorskip("simplejpeg", reason="simplejpeg (extra: train) is the decoder")
    assert ClickMe(shards).decoder == "simplejpeg-fast"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (lambda: record(1, image=b"GIF89a"), "image: expected a readable picture .JPEG., got"),
        (
            lambda: record(1, heatmap=jpeg(click_map(1))[:2000]),
            "heatmap: expected a readable picture .JPEG., got",
        ),
        (lambda: record(1, image=jpeg(click_map(1))), "image must be .* got mode L and 256x256"),
        (
            lambda: record(1, heatmap=jpeg(picture(1))),
            "heatmap must be .* mode RGB and 256x256",
        ),
        (lambda: record(1, image=jpeg(picture(1)[:, :224])), "mode RGB and 256x224"),
        (lambda: record(1, label=1000), "label must lie between 0 and 999, got 1000"),
        (lambda: record(1, label=-1), "label must lie between 0 and 999, got -1"),
        (lambda: record(1, label=b"7"), "feature 'label' must be one value of type int"),
        (lambda: example(label=7), r"'image' must be one value .* features \['label'\]"),
        (lambda: b"\x0a\x7f", "malformed message"),
    ],
)
def test_records_that_are_no_clickme_samples(
    tmp_path: Path, data: Callable[[], bytes], reason: str
) -> None:
    path = tmp_path / "bad.tfrecords"
    path.write_bytes(framed(b"first") + framed(data()))
    with pytest.raises(TFRecordError, match=reason) as error:
        ClickMe(path, decoder="pillow")[1]
    assert f"{path}, record at byte 21:" in str(error.value)


# ---------------------------------------------------------------------------- skipping


def test_locate(shards: list[Path], framed_records: list[bytes]) -> None:
    dataset = ClickMe(shards)
    expected = []
    for path, part in zip(shards, (range(3), range(3, 4), range(4, 7)), strict=True):
        starts = [sum(len(framed_records[n]) for n in part[:i]) for i in range(len(part))]
        expected += [(path, start) for start in starts]
    assert [dataset.locate(index) for index in range(7)] == expected
    assert dataset.locate(-1) == expected[-1]
    with pytest.raises(IndexError, match="index 7 is out of range"):
        dataset.locate(7)


def test_skipping_a_truncated_tail(
    shards: list[Path],
    framed_records: list[bytes],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    spoil(shards[0], lambda content: content.__delitem__(slice(len(content) - 9, None)))
    spoil(shards[1], lambda content: content.clear())
    cache = tmp_path / "index.pt"
    dataset = ClickMe(shards, on_error="skip", index_cache=cache)
    assert labels(dataset) == EXPECTED_LABELS[:2] + EXPECTED_LABELS[4:]
    offset = len(framed_records[0]) + len(framed_records[1])
    assert dataset.skipped == [(shards[0], offset), (shards[1], 0)]
    assert [entry.levelname for entry in caplog.records] == ["WARNING"] * 2
    assert {entry.name for entry in caplog.records} == {"harmonizer_ext"}
    assert f"{shards[0]}, record at byte {offset}: its length is" in caplog.text
    # Nobody takes a damaged shard for a whole one because it was indexed before.
    with pytest.raises(TFRecordError, match="truncated"):
        ClickMe(shards, index_cache=cache)
    with pytest.raises(TFRecordError, match="the file is empty"):
        ClickMe(shards[1], on_error="skip")


def test_skipping_corrupt_records(
    shards: list[Path], framed_records: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    offset = len(framed_records[4])
    for at in (offset + 5000, offset + len(framed_records[5]) + 5000):  # the last two of all
        spoil(shards[2], lambda content, at=at: content.__setitem__(at, content[at] ^ 1))
    dataset = ClickMe(shards, on_error="skip")
    assert len(dataset) == 7
    expected = [*EXPECTED_LABELS[:5], EXPECTED_LABELS[0], EXPECTED_LABELS[0]]
    assert dataset[6].label == expected[6]
    assert labels(dataset) == expected
    places = [(shards[2], offset), (shards[2], offset + len(framed_records[5]))]
    assert dataset.skipped == places
    # Once each, although they were asked for twice.
    assert len(caplog.records) == 2
    for _, place in places:
        assert f"{shards[2]}, record at byte {place}: the data does not match" in caplog.text
    assert ClickMe(shards).skipped == []


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_tell_what_they_skipped(
    shards: list[Path], framed_records: list[bytes], context: str
) -> None:
    spoil(shards[2], lambda content: content.__setitem__(5000, content[5000] ^ 1))
    dataset = ClickMe(shards, on_error="skip", preprocess=None)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=4, num_workers=2, multiprocessing_context=context
    )
    found = torch.cat([batch.label for batch in loader]).tolist()
    assert found == [*EXPECTED_LABELS[:4], EXPECTED_LABELS[5], *EXPECTED_LABELS[5:]]
    assert dataset.skipped == [(shards[2], 0)]


def test_nothing_readable_ends(tmp_path: Path) -> None:
    path = tmp_path / "bad.tfrecords"
    path.write_bytes(framed(b"one") + framed(b"two"))
    dataset = ClickMe(path, on_error="skip")
    with pytest.raises(ValueError, match="none of the 2 samples is readable"):
        dataset[1]
    assert len(dataset.skipped) == 2


def test_workers_do_not_copy_the_index(shards: list[Path]) -> None:
    """The index is sent as multiprocessing's pickler sends it to a spawned worker: by handle."""
    few, many = ClickMe(shards[0]), ClickMe([shards[0]] * 200)
    sent = [len(bytes(ForkingPickler.dumps(dataset._offsets))) for dataset in (few, many)]
    assert sent[1] - sent[0] < 50
