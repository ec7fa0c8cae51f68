"""ClickMe from per-image files and from WebDataset shards, in one process, in workers and ranks."""

from __future__ import annotations

import ast
import io
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clickme_shards import PIXEL_TOLERANCE, click_map, framed, jpeg, picture, record

from harmonizer_ext.clickme import (
    ClickMe,
    ClickMeFiles,
    ClickMeSample,
    ClickMeWebDataset,
    released_preprocessing,
)

pytest.importorskip("google_crc32c", reason="google-crc32c (extra: train) checks the records")
pytest.importorskip("webdataset", reason="webdataset (extra: train) reads the tar shards")

import clickme_convert

# ---------------------------------------------------------------------------- per-image files


def save_npz(path: Path, seed: int, **changed: Any) -> None:
    """Saves archives as continualUtils reads them."""
    values = {"image": picture(seed), "heatmap": click_map(seed), "label": np.array(seed)}
    np.savez_compressed(path, **{**values, **changed})


def save_pth(path: Path, seed: int, **changed: Any) -> None:
    """Saves dictionaries as Pseudo_ClickMe reads them."""
    values = {
        "image": torch.tensor(picture(seed)).permute(2, 0, 1),
        "heatmap": torch.tensor(click_map(seed))[None],
        "label": torch.tensor([seed], dtype=torch.int32),
    }
    torch.save({**values, **changed}, path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_pth(tmp_path / "2.pth", 2)
    save_pth(tmp_path / "10.pth", 10)
    save_npz(tmp_path / "1.npz", 1)
    save_npz(tmp_path / "3.npz", 3)
    (tmp_path / "targets.pkl").write_bytes(pickle.dumps([1, 2, 3, 10]))
    return tmp_path


def test_files_of_both_kinds(folder: Path) -> None:
    dataset = ClickMeFiles(folder, preprocess=None)
    assert repr(dataset) == "ClickMeFiles(4 files, preprocess=None)"
    names = ["1.npz", "2.pth", "3.npz", "10.pth"]
    assert [dataset.locate(index) for index in range(4)] == [(folder / n, 0) for n in names]
    for sample, seed in zip(dataset, (1, 2, 3, 10), strict=True):
        assert sample.image.dtype == sample.heatmap.dtype == torch.uint8
        np.testing.assert_array_equal(sample.image.permute(1, 2, 0).numpy(), picture(seed))
        np.testing.assert_array_equal(sample.heatmap[0].numpy(), click_map(seed))
        assert sample.label == seed
        assert sample.token == 1
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[3].image, dataset[3].image)


def test_files_are_preprocessed_and_batched(folder: Path) -> None:
    dataset = ClickMeFiles(folder, preprocess="released")
    batch = next(iter(torch.utils.data.DataLoader(dataset, batch_size=4, num_workers=1)))
    assert isinstance(batch, ClickMeSample)
    images = torch.stack([torch.tensor(picture(n)).permute(2, 0, 1) for n in (1, 2, 3, 10)])
    heatmaps = torch.stack([torch.tensor(click_map(n))[None] for n in (1, 2, 3, 10)])
    expected = released_preprocessing(images, heatmaps)
    torch.testing.assert_close(batch.image, expected[0], rtol=0, atol=PIXEL_TOLERANCE)
    torch.testing.assert_close(batch.heatmap, expected[1], rtol=0, atol=PIXEL_TOLERANCE)
    assert batch.label.tolist() == [1, 2, 3, 10]
    with pytest.raises(TypeError, match="preprocess"):
        ClickMeFiles(folder)  # type: ignore[call-arg]


def test_other_types_become_float32(tmp_path: Path) -> None:
    heatmap = np.linspace(0, 200, 20 * 30).reshape(20, 30)
    image = picture(1)[:20, :30].astype(np.float64)
    save_npz(tmp_path / "a.npz", 1, image=image, heatmap=heatmap)
    sample = ClickMeFiles(tmp_path, preprocess=None)[0]
    assert sample.image.dtype == sample.heatmap.dtype == torch.float32
    np.testing.assert_array_equal(sample.heatmap[0].numpy(), heatmap.astype(np.float32))
    np.testing.assert_array_equal(sample.image.permute(1, 2, 0).numpy(), image)


@pytest.mark.parametrize(
    ("save", "reason"),
    [
        (lambda p: np.savez(p, image=picture(1)), r"no array \['heatmap', 'label'\], only \['ima"),
        (lambda p: save_npz(p, 1, heatmap=click_map(1)[:9]), r"got \(3, 256, 256\) and \(1, 9, 25"),
        (lambda p: save_npz(p, 1, image=picture(1)[0, 0]), r"image must have two or three axes"),
        (lambda p: save_npz(p, 1, image=click_map(1)), r"got \(1, 256, 256\) and"),
        (lambda p: save_npz(p, 1, label=np.array([1, 2])), "label must be one integer"),
        (lambda p: save_npz(p, 1, label=np.array(0.5)), "label must be one integer"),
        (lambda p: save_npz(p, 1000), "label must lie between 0 and 999, got 1000"),
        (lambda p: save_npz(p, 1, heatmap=np.full((256, 256), np.nan)), "must be finite"),
        (lambda p: save_npz(p, 1, label=np.array("dog")), "an array of numbers, got the type <U3"),
        (lambda p: save_npz(p, 1, label=np.array({"a": 1})), "of numbers, got the type object"),
        (lambda p: p.write_bytes(b"PK"), "expected a readable archive, got"),
        (lambda p: save_pth(p.with_suffix(".pth"), 1, label=Path("x")), "of tensors, got pathlib"),
        (lambda p: torch.save([1], p.with_suffix(".pth")), "expected a dictionary .* got list"),
    ],
)
def test_files_that_are_no_samples(
    tmp_path: Path, save: Callable[[Path], Any], reason: str
) -> None:
    save(tmp_path / "bad.npz")
    (path,) = tmp_path.iterdir()
    with pytest.raises(ValueError, match=reason) as error:
        ClickMeFiles(path, preprocess=None)[0]
    assert str(error.value).startswith(f"{path}: ")


def test_paths_of_files(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"targets\.pkl is neither a \.npz nor a \.pth file"):
        ClickMeFiles(folder / "targets.pkl", preprocess=None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"\*\.npz or .*\*\.pth matches no file"):
        ClickMeFiles(tmp_path / "empty", preprocess=None)
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(ImportError, match=r"pip install harmonizer-ext\[train\]"):
        ClickMeFiles(folder, preprocess=None)


def test_unreadable_files_are_skipped(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "2.pth").write_bytes(b"broken")
    dataset = ClickMeFiles(folder, preprocess=None, on_error="skip")
    assert [sample.label for sample in dataset] == [1, 3, 3, 10]
    assert dataset.skipped == [(folder / "2.pth", 0)]
    assert f"{folder / '2.pth'}: expected a readable archive" in caplog.text


# ---------------------------------------------------------------------------- WebDataset


@pytest.fixture(scope="module")
def tfrecords(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four shards of two samples."""
    folder = tmp_path_factory.mktemp("tfrecords")
    paths = [folder / f"train-{shard}.tfrecords" for shard in range(4)]
    for shard, path in enumerate(paths):
        path.write_bytes(framed(record(2 * shard)) + framed(record(2 * shard + 1)))
    return paths


@pytest.fixture
def converted(tfrecords: list[Path], tmp_path: Path) -> Path:
    for path in tfrecords:
        clickme_convert.convert_shard(path, tmp_path)
    return tmp_path


def test_stream_equals_random_access(tfrecords: list[Path], converted: Path) -> None:
    for preprocess in ("released", "released-heatmap", None):
        stream = ClickMeWebDataset(converted, preprocess=preprocess)
        expected = list(ClickMe(tfrecords, preprocess=preprocess))
        for got, wanted in zip(stream, expected, strict=True):
            assert isinstance(got, ClickMeSample)
            assert torch.equal(got.image, wanted.image)
            assert torch.equal(got.heatmap, wanted.heatmap)
            assert (got.label, got.token) == (wanted.label, wanted.token)
    assert stream.samples == 8
    assert repr(stream) == "ClickMeWebDataset(4 shards, 8 samples, preprocess=None)"
    flipped = ClickMeWebDataset(converted, transform=lambda sample: sample.label + 1)
    assert list(flipped) == [sample.label + 1 for sample in expected]


def stream_labels(dataset: ClickMeWebDataset, workers: int = 0) -> list[int]:
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers)
    return [sample.label for sample in loader]


LABELS = [seed * 37 for seed in range(8)]


def test_workers_divide_the_shards(converted: Path) -> None:
    for workers in (0, 1, 2):
        assert sorted(stream_labels(ClickMeWebDataset(converted), workers)) == LABELS


def test_order_follows_seed_and_epoch(converted: Path) -> None:
    dataset = ClickMeWebDataset(converted, shuffle=8)
    orders = []
    for epoch in range(4):
        dataset.set_epoch(epoch)
        orders.append(stream_labels(dataset))
        assert sorted(orders[-1]) == LABELS
        assert stream_labels(dataset) == orders[-1]
    assert len({tuple(order) for order in orders}) == 4
    other = ClickMeWebDataset(converted, shuffle=8, seed=1)
    other.set_epoch(3)
    assert stream_labels(other) != orders[-1]
    # Workers that stay hear of the epoch too.
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=1, persistent_workers=True
    )
    for epoch in range(4):
        dataset.set_epoch(epoch)
        assert [sample.label for sample in loader] == orders[epoch]


RANK = """
import os, sys, torch, torch.distributed as dist
from harmonizer_ext.clickme import ClickMeWebDataset

def labels(paths, workers, start):
    loader = torch.utils.data.DataLoader(
        ClickMeWebDataset(paths, preprocess=None), batch_size=None, num_workers=workers,
        multiprocessing_context=start,
    )
    return [sample.label for sample in loader]

if __name__ == "__main__":
    dist.init_process_group("gloo")
    found = [labels(sys.argv[1], 2, "fork")]
    for name in ("RANK", "WORLD_SIZE"):  # as where torchrun did not start the ranks
        del os.environ[name]
    found += [labels(sys.argv[1], *way) for way in ((2, "fork"), (2, "spawn"), (0, None))]
    try:
        labels(sys.argv[2], 0, None)
    except ValueError as error:
        found.append(str(error))
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    if dist.get_rank() == 0:
        print(repr(gathered))
    dist.destroy_process_group()
"""


def test_ranks_divide_the_shards(converted: Path, tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    paths = [str(converted), str(converted / "train-0.tar")]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node=2", str(script), *paths],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    *ways, refused = zip(*ast.literal_eval(done.stdout), strict=True)
    assert len(ways) == 4
    for first, second in ways:
        assert len(first) == len(second) == 4
        assert sorted(first + second) == LABELS
    assert all("1 shards cannot be divided over 2 ranks" in text for text in refused)


def test_damaged_shards_are_not_taken_for_short_ones(
    converted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shard = converted / "train-2.tar"
    content = bytearray(shard.read_bytes())
    # The header of the second sample's first file: to tarfile, the end of the archive.
    with tarfile.open(shard) as archive:
        second = archive.getmembers()[3].offset
    content[second : second + 512] = os.urandom(512)
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-2\.tar, after 1 samples: .* it is damaged there"):
        list(ClickMeWebDataset(converted))
    shard.write_bytes(content[:second])
    with pytest.raises(ValueError, match=rf"has {second} bytes, manifest\.json says"):
        ClickMeWebDataset(converted)
    dataset = ClickMeWebDataset(converted, on_error="skip")
    assert sorted(stream_labels(dataset, 2)) == LABELS[:5] + LABELS[6:]
    assert dataset.skipped == 2  # when it was opened, and when it was read
    assert "train-2.tar" in caplog.text


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"a.jpg": b"GIF89a"}, "sample a: image: expected a readable JPEG"),
        ({"a.cls": b"dog"}, "sample a: invalid literal for int"),
        ({"a.cls": b"1000"}, "sample a: label must lie between 0 and 999"),
        ({"a.heatmap.jpg": None}, r"sample a: no file \['heatmap\.jpg'\] in the shard"),
    ],
)
def test_samples_of_other_content(
    tmp_path: Path, changed: dict[str, bytes | None], reason: str
) -> None:
    good = {"heatmap.jpg": jpeg(click_map(1)), "jpg": jpeg(picture(1)), "cls": b"7"}
    files = {f"{key}.{name}": content for key in "ab" for name, content in good.items()}
    write_tar(
        tmp_path / "x.tar",
        {name: data for name, data in {**files, **changed}.items() if data is not None},
    )
    dataset = ClickMeWebDataset(tmp_path, preprocess=None)
    assert dataset.samples is None  # nobody says how many
    with pytest.raises(ValueError, match=rf"x\.tar, {reason}"):
        list(dataset)
    skipping = ClickMeWebDataset(tmp_path, preprocess=None, on_error="skip")
    assert stream_labels(skipping, 1) == [7]
    assert skipping.skipped == 1


def test_a_name_that_occurs_twice(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("a.cls"), io.BytesIO())
    with pytest.raises(ValueError, match=r"x\.tar, after 0 samples: a\.cls: duplicate file name"):
        list(ClickMeWebDataset(tmp_path))


def test_a_foreign_manifest_is_refused(converted: Path) -> None:
    for content in ("", "[]", '{"shards": {"a.tar": 3}}', '{"shards": {"a.tar": {"size": "1"}}}'):
        (converted / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match=r"manifest\.json is no manifest of ClickMe shards"):
            ClickMeWebDataset(converted)


def test_without_webdataset_the_extra_is_named(
    converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ImportError, match=r"pip install harmonizer-ext\[train\]"):
        ClickMeWebDataset(converted)
