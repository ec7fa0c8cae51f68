"""Sizes that headers announce are checked before memory is taken; one limit, for all readers."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import extras
import numpy as np
import pytest

if (reason := extras.why_no_train()) is not None:
    pytest.skip(reason, allow_module_level=True)

import bombs
import limited
import torch
from clickme_shards import click_map, example, framed, jpeg, picture
from evaluating.data import FolderOfMaps, ImageSet
from evaluating.tar_shards import TarShards
from test_clickme_formats import write_tar

from harmonizer_ext.clickme import ClickMe, ClickMeFiles, ClickMeWebDataset
from harmonizer_ext.data import Draw, MixedDataset

JPEGS = {"image": jpeg(picture(1)), "heatmap": jpeg(click_map(1))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each bomb in a folder, before something that can be read."""
    root = tmp_path_factory.mktemp("bombs")
    small = io.BytesIO()
    write_tar(
        root / "good.tar",
        {"b.jpg": JPEGS["image"], "b.heatmap.jpg": JPEGS["heatmap"], "b.cls": b"7"},
    )
    np.save(small, click_map(1)[:8, :8])
    good = bombs.unchecked(example(**JPEGS, label=7))
    for name, make in bombs.TAR.items():
        place = root / "tar" / name
        place.mkdir(parents=True)
        bombs.put(place / "x.tar", make())
        shutil.copy(root / "good.tar", place / "y.tar")
    for name, (suffix, make) in bombs.FILES.items():
        place = root / "files" / name
        place.mkdir(parents=True)
        bombs.put(place / f"a.{suffix}", make())
        (place / "b.npz").write_bytes(bombs.npz_of())
    for name, make in bombs.RECORDS.items():
        place = root / "records" / name
        place.mkdir(parents=True)
        bombs.put(place / "a.tfrecords", make())
        (place / "b.tfrecords").write_bytes(good)
    for name, make in bombs.PICTURES.items():
        content = make()
        for part in ("folder/images/0", "folder/maps/0", "data/train/0"):
            (root / "pictures" / name / part).mkdir(parents=True)
        (root / "pictures" / name / "folder/images/0/a.png").write_bytes(content)
        (root / "pictures" / name / "folder/maps/0/a.npy").write_bytes(small.getvalue())
        (root / "pictures" / name / "data/train/0/a.png").write_bytes(content)
        (root / "pictures" / name / "data/train/0/b.jpg").write_bytes(JPEGS["image"])
    (root / "good.tar").unlink()
    return root


def test_headers_do_not_take_memory(folder: Path) -> None:
    """A process with a gigabyte refuses each as unreadable, so that it is skipped and counted."""
    done = limited.run("sizes_worker.py", str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    said = told["told"]
    kinds = (len(bombs.TAR), len(bombs.FILES), len(bombs.RECORDS), len(bombs.PICTURES))
    assert len(said) == sum(a * b for a, b in zip(kinds, (3, 2, 2, 4), strict=True))
    errors = (
        "UnreadableError: ",
        "TFRecordError: ",
        "OSError: unmapped: sample 0 cannot be read: ",
    )
    wrong = {
        key: text
        for key, text in said.items()
        if not (text == 1 if key.endswith("skipped") else str(text).startswith(errors))
    }
    assert not wrong
    # What the readable ones beside them take, and the largest file that may be read.
    assert told["megabytes"] < 700


@pytest.mark.parametrize("kind", ["labels", "classes", "manifest", "accuracy", "map"])
def test_large_tables_and_maps(tmp_path: Path, kind: str) -> None:
    """Files that take no room on the disk, and three gigabytes in memory."""
    for part in ("images/0", "maps/0"):
        (tmp_path / part).mkdir(parents=True)
    (tmp_path / "images/0/a.jpg").write_bytes(JPEGS["image"])
    np.save(tmp_path / "maps/0/a.npy", click_map(1))
    read: dict[str, tuple[str, Callable[[], Any]]] = {
        "labels": ("labels.csv", lambda: FolderOfMaps(tmp_path)),
        "classes": ("classes.txt", lambda: FolderOfMaps(tmp_path)),
        "manifest": ("manifest.json", lambda: ClickMeWebDataset(tmp_path / "x.tar")),
        "accuracy": ("a.csv", lambda: __import__("evaluate").read_accuracy(tmp_path / "a.csv", [])),
        "map": ("maps/0/a.npy", lambda: FolderOfMaps(tmp_path)[0]),
    }
    write_tar(tmp_path / "x.tar", {"a.jpg": b"x"})
    name, run = read[kind]
    content = bombs.npy_header(f"({bombs.BIG - 128},)") if kind == "map" else b"name,label\n"
    bombs.put(tmp_path / name, (content, bombs.BIG))
    with pytest.raises(ValueError, match=r"expected at most \d+ bytes, its header says \d+"):
        run()


def test_json_that_is_too_deep(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {"a.jpg": b"x"})
    (tmp_path / "manifest.json").write_text("[" * 10**5)
    with pytest.raises(ValueError, match=r"manifest\.json is no manifest of ClickMe shards"):
        ClickMeWebDataset(tmp_path / "x.tar")


def test_an_index_that_claims_many_records(tmp_path: Path) -> None:
    shard, cache = tmp_path / "a.tfrecords", tmp_path / "index.pt"
    shard.write_bytes(framed(example(**JPEGS, label=7)))
    assert ClickMe(shard, index_cache=cache)[0].label == 7
    known = torch.load(cache, weights_only=True)
    (name,) = known["files"]
    for offsets in (
        torch.zeros(1, dtype=torch.int64).expand(10**8),
        torch.zeros(1, dtype=torch.int64).expand(10**12),
        torch.zeros(1, 1, dtype=torch.int64),
        torch.tensor([10**9]),
        torch.tensor([-1]),
        torch.tensor([0.0]),
        [0],
    ):
        known["files"][name]["offsets"] = offsets
        torch.save(known, cache)
        with pytest.raises(ValueError, match="is no ClickMe index of version 1; delete it"):
            ClickMe(shard, index_cache=cache)


def test_one_limit_for_all_readers(tmp_path: Path) -> None:
    """An argument of each: what fits is read, what does not is named with the way out."""
    side, room = 256, 3 * 256 * 256
    parts = {"a.jpg": JPEGS["image"], "a.heatmap.jpg": JPEGS["heatmap"], "a.cls": b"7"}
    stored = sum(map(len, parts.values()))
    write_tar(tmp_path / "x.tar", parts)
    (tmp_path / "x.npz").write_bytes(bombs.npz_of())
    (tmp_path / "x.pth").write_bytes(bombs.pth_of())
    record = example(**JPEGS, label=7)
    (tmp_path / "x.tfrecords").write_bytes(framed(record))
    for part in ("images/0", "maps/0"):
        (tmp_path / "folder" / part).mkdir(parents=True)
    (tmp_path / "folder/images/0/a.jpg").write_bytes(JPEGS["image"])
    np.save(tmp_path / "folder/maps/0/a.npy", np.zeros((side, side), np.uint8))
    file = max((tmp_path / f"x.{kind}").stat().st_size for kind in ("npz", "pth"))
    plain: dict[str, Any] = {"preprocess": None}

    def unmapped(limit: int) -> Any:
        source: Any = [{"image": {"bytes": JPEGS["image"], "path": None}, "label": 1}]
        return MixedDataset(None, source, max_bytes=limit)[Draw(False, 0, 0)]

    readers: dict[str, tuple[int, Callable[[int], Any]]] = {
        "tfrecords": (
            len(record), lambda n: ClickMe(tmp_path / "x.tfrecords", max_bytes=n, **plain)[0],
        ),
        "stream": (
            stored, lambda n: list(ClickMeWebDataset(tmp_path / "x.tar", max_bytes=n, **plain)),
        ),
        "tar": (stored, lambda n: TarShards(tmp_path / "x.tar", max_bytes=n, **plain)[0]),
        "npz": (
            max(file, 4 * room),
            lambda n: ClickMeFiles(tmp_path / "x.npz", max_bytes=n, **plain)[0],
        ),
        "pth": (
            max(file, 4 * room),
            lambda n: ClickMeFiles(tmp_path / "x.pth", max_bytes=n, **plain)[0],
        ),
        "folder": (room, lambda n: FolderOfMaps(tmp_path / "folder", max_bytes=n)[0]),
        "images": (room, lambda n: ImageSet(tmp_path / "folder", max_bytes=n).at(32)[0]),
        "unmapped": (room, unmapped),
    }  # fmt: skip
    for name, (size, read) in readers.items():
        read(size)
        too_small = size - 1 if name not in ("npz", "pth") else room - 1
        with pytest.raises((ValueError, OSError), match="max_bytes"):
            read(too_small)
