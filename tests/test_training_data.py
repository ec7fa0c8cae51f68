"""The training program's data: what is missing, mislabelled or damaged, and when that is told."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import timm_networks
import torch
from tiny_training import command, values

if timm_networks.why_no_timm() is not None:
    pytest.skip(timm_networks.why_no_timm() or "", allow_module_level=True)

import train
from training import config, data
from training.networks import InputForm
from training.processes import World

from harmonizer_ext.clickme import tfrecord
from harmonizer_ext.clickme.shards import read_features

ALONE = World(0, 1, torch.device("cpu"))


def settings(digits: Path, output: Path, **changes: Any) -> config.Config:
    return config.Config(**values(digits, output, **changes))


def folders(digits: Path, root: Path, **splits: range) -> Path:
    """Images in folders, ``split=classes``; the same ones in each split."""
    for split, classes in splits.items():
        for number in classes:
            shutil.copytree(digits / f"images/train/{number}", root / f"{split}/{number}")
    return root


def test_folders_and_what_is_missing(digits: Path, tmp_path: Path):
    def asked(name: str, **splits: range) -> config.Config:
        root = folders(digits, tmp_path / name, **splits)
        return settings(digits, tmp_path / "out", data_dir=str(root), class_map="",
                        val_split="validation")  # fmt: skip

    everything = range(10)
    refused = {
        r"val_split: expected a directory validation/ in .*; --val-split ''": {"train": everything},
        r"train_split: expected a directory train/ in": {"val": everything},
        r"val_split: expected classes that are trained on, got 0": {
            "train": range(1, 10), "val": everything,
        },
        r"class_map: expected a file .* are 10 classes .* there are 9 folders": {
            "train": range(9), "val": range(9),
        },
    }  # fmt: skip
    for number, (message, splits) in enumerate(refused.items()):
        changes = {"clickme": (), "lambda_harmonization": 0.0, "batch_size": 24}
        changes = changes if "trained on" in message else {}
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            train.train(dataclasses.replace(asked(str(number), **splits), **changes))
    for changes, message in (
        ({"data_dir": "nowhere"}, "data_dir: expected a directory, found none at nowhere"),
        ({"class_map": "nowhere"}, "class_map: expected a file, found none at nowhere"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            train.train(settings(digits, tmp_path / "out", **changes))
    assert not (tmp_path / "out/last.pt").exists()


def test_a_class_that_is_not_evaluated(digits: Path, tmp_path: Path):
    """The labels of the others are those that were trained on."""
    root = folders(digits, tmp_path, train=range(10), val=range(3, 10))
    asked = settings(digits, tmp_path / "out", data_dir=str(root), class_map="",
                     val_split="validation")  # fmt: skip
    form = InputForm(64, (0.5,) * 3, (0.25,) * 3)
    training = data.open_training(asked, form.size, ALONE)
    test = data.open_tests(asked, form, ALONE, training.folders)["images"]
    labels = torch.cat([batch.label for batch in test.batches])
    images = sorted((root / "val").glob("*/*.jpg"), key=lambda path: int(path.parent.name))
    assert labels.tolist() == [int(path.parent.name) for path in images]


def damaged(shard: Path, target: Path, record: int, label: int | None = None) -> Path:
    """A copy with a damaged record, or one with another label."""
    target.mkdir()
    offsets = tfrecord.index_records(shard).tolist()
    if label is None:
        content = bytearray(shard.read_bytes())
        content[offsets[record] + 100] ^= 1
        (target / "0.tfrecords").write_bytes(content)
        return target
    examples = [
        dict(zip(("image", "heatmap", "label"), read_features(tfrecord.read_record(shard, offset)),
                 strict=True)) for offset in offsets
    ]  # fmt: skip
    examples[record]["label"] = label
    tfrecord.write_records(target / "0.tfrecords", examples)
    return target


def test_what_is_evaluated_is_read_before_the_first_update(digits: Path, tmp_path: Path):
    """The images behind the batch that is rehearsed are read, too."""
    shard = digits / "clickme/test/test-0.tfrecords"
    small = {"batch_size": 8, "grad_accum_steps": 6}
    bad = damaged(shard, tmp_path / "bad", 20)
    with pytest.raises(ValueError, match=r"0.tfrecords, record at byte \d+: the data does not"):
        train.train(settings(digits, tmp_path / "out", clickme_val=(str(bad),), **small))
    wrong = damaged(shard, tmp_path / "wrong", 20, label=10)
    with pytest.raises(
        ValueError, match=r"num_classes: expected more than 10, the label of sample 20 of clickme"
    ):
        train.train(settings(digits, tmp_path / "out", clickme_val=(str(wrong),), **small))
    assert not (tmp_path / "out/last.pt").exists()
    run = train.train(
        settings(digits, tmp_path / "out", clickme_val=(str(bad),), skip_corrupt=True, **small)
    )
    assert run["final"]["clickme"]["skipped"] == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_record_ends_a_run_and_is_skipped(
    digits: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, workers: int
):
    """The run goes on once it is told to leave such records out, and counts them."""
    shards = damaged(digits / "clickme/train/train-0.tfrecords", tmp_path / "bad", 20)
    changes = {"clickme": (str(shards),), "workers": workers, "batch_size": 12}
    line = command(values(digits, tmp_path / "out", **changes))[1:]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as told:
        train.main()
    assert str(told.value).startswith(f"train.py: error: {shards}/0.tfrecords, record at byte ")
    assert "\n" not in str(told.value)
    monkeypatch.setattr(sys, "argv", [*line, "--skip-corrupt"])
    train.main()
    rows = json.loads((tmp_path / "out/results.json").read_text())["history"]
    assert [row["skipped"] for row in rows] == [1]
