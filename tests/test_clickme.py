"""The ClickMe reader against shards of an independent writer, and against the released pipeline."""

from __future__ import annotations

import functools
import io
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import released
import torch
from clickme_shards import Image, click_map, example, framed, jpeg, picture, record

from harmonizer_ext import clickme
from harmonizer_ext.clickme import ClickMe, released_preprocessing, tfrecord
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
    assert sample.image.is_contiguous()
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
    sample = ClickMe(shards, preprocess=None)[0]
    image = np.asarray(Image.open(io.BytesIO(jpeg(picture(0)))))
    heatmap = np.asarray(Image.open(io.BytesIO(jpeg(click_map(0)))))
    assert sample.image.dtype == sample.heatmap.dtype == torch.uint8
    np.testing.assert_array_equal(sample.image.numpy(), image.transpose(2, 0, 1))
    np.testing.assert_array_equal(sample.heatmap.numpy(), heatmap[None])
    with pytest.raises(ValueError, match="preprocess must be \"released\" or None, got 'tf'"):
        ClickMe(shards, preprocess="tf")  # type: ignore[arg-type]


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

    def counting(
        path: Path, *, verify: bool
    ) -> tuple[torch.Tensor, TFRecordError | None]:
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


def test_without_pillow_the_extra_is_named(
    shards: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"pip install harmonizer-ext\[train\]"):
        ClickMe(shards)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (lambda: record(1, image=b"GIF89a"), "image is no readable JPEG"),
        (lambda: record(1, heatmap=jpeg(click_map(1))[:2000]), "heatmap is no readable JPEG"),
        (lambda: record(1, image=jpeg(click_map(1))), "image must be .* mode L and 256x256"),
        (lambda: record(1, heatmap=jpeg(picture(1))), "heatmap must be .* mode RGB and 256x256"),
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
        ClickMe(path)[1]
    assert f"{path}, record at byte 21:" in str(error.value)


# ---------------------------------------------------------------------------- preprocessing


def bilinear(size_in: int, size_out: int) -> np.ndarray:
    """Resizing as a matrix (out, in): pixel centres at half-integers, two taps, no antialiasing."""
    matrix = np.zeros((size_out, size_in))
    for row in range(size_out):
        centre = max((row + 0.5) * size_in / size_out - 0.5, 0)
        low = min(int(centre), size_in - 1)
        high = min(low + 1, size_in - 1)
        matrix[row, low] += 1 - (centre - low)
        matrix[row, high] += centre - low
    return matrix


def blurred(heatmap: np.ndarray) -> np.ndarray:
    """The released blur, tap by tap."""
    taps = [(y, x) for y in range(10) for x in range(10)]
    weights = {(y, x): np.exp(-((x - 5) ** 2 + (4 - y) ** 2) / 200) for y, x in taps}
    total = sum(weights.values())
    padded = np.pad(heatmap, (4, 5))
    size = len(heatmap)
    shifted = [weights[y, x] / total * padded[y : y + size, x : x + size] for y, x in taps]
    return np.asarray(np.sum(shifted, axis=0))


# Both libraries compute source coordinates (up to 256) in float32, where neighbours lie 1.5e-5
# apart: two roundings, in two directions, each times a difference of at most 255 grey levels.
PIXEL_TOLERANCE = 2 * 2 * 1.5e-5 * 255


def test_preprocessing_equals_its_definition() -> None:
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (3, 256, 256)).astype(np.uint8)
    heatmap = rng.integers(0, 256, (1, 256, 256)).astype(np.uint8)
    ours_image, ours_heatmap = released_preprocessing(torch.tensor(image), torch.tensor(heatmap))
    down, small, up = bilinear(256, 224), bilinear(256, 64), bilinear(64, 224)
    np.testing.assert_allclose(
        ours_image.numpy(), down @ image.astype(float) @ down.T, rtol=0, atol=PIXEL_TOLERANCE
    )
    expected = up @ blurred(small @ heatmap[0].astype(float) @ small.T) @ up.T
    np.testing.assert_allclose(ours_heatmap[0].numpy(), expected, rtol=0, atol=PIXEL_TOLERANCE)


def released_code() -> Any:
    reason = released.why_not()
    if reason is not None:
        pytest.skip(reason)
    return released.load()


def test_preprocessing_equals_the_released_on_equal_pixels() -> None:
    """``parse_clickme_prototype`` after its decoding, with its own resizing, blur and kernel."""
    code = released_code()
    tf = code.tensorflow
    image, heatmap = picture(5), click_map(5)[:, :, None]
    their_image = tf.image.resize(tf.cast(image, tf.float32), (224, 224), method="bilinear")
    small = tf.image.resize(tf.cast(heatmap, tf.float32), (64, 64), method="bilinear")
    soft = code.gaussian_blur(small, code.clickme.GAUSSIAN_KERNEL)
    their_heatmap = tf.image.resize(soft, (224, 224), method="bilinear")
    ours = released_preprocessing(
        torch.tensor(image.transpose(2, 0, 1)), torch.tensor(heatmap.transpose(2, 0, 1))
    )
    for mine, theirs in zip(ours, (their_image, their_heatmap), strict=True):
        np.testing.assert_allclose(
            mine.permute(1, 2, 0).numpy(), theirs.numpy(), rtol=0, atol=PIXEL_TOLERANCE
        )


@pytest.mark.parametrize("quality", [75, 95])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
def test_samples_equal_the_released_pipeline(
    tmp_path: Path, quality: int, subsampling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards of TensorFlow's own writer, read by both from the files on."""
    code = released_code()
    tf = code.tensorflow
    paths = [str(tmp_path / f"train-{shard}.tfrecords") for shard in range(2)]
    for shard, path in enumerate(paths):
        with tf.io.TFRecordWriter(path) as writer:
            for seed in (2 * shard, 2 * shard + 1):
                image = jpeg(picture(seed), quality=quality, subsampling=subsampling)
                heatmap = jpeg(click_map(seed), quality=quality)
                values = {
                    "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[image])),
                    "heatmap": tf.train.Feature(bytes_list=tf.train.BytesList(value=[heatmap])),
                    "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[seed * 250])),
                }
                message = tf.train.Example(features=tf.train.Features(feature=values))
                writer.write(message.SerializeToString())
    ours = ClickMe(paths)
    assert len(ours) == 4

    def differences() -> tuple[np.ndarray, np.ndarray]:
        images, heatmaps = [], []
        for path, first in zip(paths, (0, 2), strict=True):
            their_images, their_heatmaps, one_hot = next(iter(code.load_clickme([path], 2)))
            for row in range(2):
                sample = ours[first + row]
                assert sample.label == int(one_hot[row].numpy().argmax())
                images.append(sample.image.permute(1, 2, 0).numpy() - their_images[row].numpy())
                their_map = their_heatmaps[row].numpy()
                difference = sample.heatmap.permute(1, 2, 0).numpy() - their_map
                heatmaps.append(difference / np.ptp(their_map))
        return np.abs(images), np.abs(heatmaps)

    # As it is, with the fast inverse DCT, which truncates: about 1 grey level too dark, and in
    # single pixels wrong by up to 10 at quality 95 (measured, TensorFlow 2.21). The blur averages
    # the heatmap's errors down to that 1, of a range of at least 140.
    image_error, heatmap_error = differences()
    assert image_error.mean() < 2
    assert image_error.max() < 16
    assert heatmap_error.max() < 1 / 140
    # With the exact inverse DCT everything is equal up to float32.
    exact = functools.partial(tf.io.decode_jpeg, dct_method="INTEGER_ACCURATE")
    view = released.TensorFlowView(tf, io=released.TensorFlowView(tf.io, decode_jpeg=exact))
    monkeypatch.setitem(vars(code.clickme), "tf", view)
    image_error, heatmap_error = differences()
    assert image_error.max() < PIXEL_TOLERANCE
    assert heatmap_error.max() < PIXEL_TOLERANCE / 140
