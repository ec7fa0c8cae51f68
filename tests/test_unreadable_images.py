"""Images that cannot be read: named, and the end; or left out and counted; never replaced."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import extras
import numpy as np
import pytest
import torch

if (reason := extras.why_no_train()) is not None:
    pytest.skip(reason, allow_module_level=True)

import train
from clickme_shards import jpeg, picture
from PIL import Image
from test_training_data import damaged, folders
from tiny_training import command, run, values
from torch import Tensor, nn
from training import config, data, evaluation
from training.networks import InputForm
from training.processes import World

from harmonizer_ext.data import Draw, MixedDataset, collate, create_loader

ALONE = World(0, 1, torch.device("cpu"))
WHOLE = jpeg(picture(1)[:64, :64])


def png(size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    return file.getvalue()


DAMAGE: dict[str, bytes] = {
    "zero bytes": b"",
    "cut": WHOLE[: len(WHOLE) // 2],
    "a page": b"<!DOCTYPE html><html>404</html>",
    "zeros": bytes(5000),
    "a header alone": WHOLE[:300],
    "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
    "PNG, cut": png((64, 64))[:60],
    "text": b"no picture",
}


@pytest.fixture
def spoiled(digits: Path, tmp_path: Path) -> Path:
    """Ten classes to train and to evaluate on; the second image of class 3 of each is spoiled."""
    root = folders(digits, tmp_path / "images", train=range(10), val=range(10))
    for split in ("train", "val"):
        victim(root, split).write_bytes(DAMAGE["zero bytes"])
    return root


def victim(root: Path, split: str) -> Path:
    return sorted((root / split / "3").iterdir())[1]


def settings(digits: Path, output: Path, root: Path, **changes: Any) -> config.Config:
    given = {"data_dir": str(root), "class_map": "", "clickme_val": (), "val_split": "val"}
    return config.Config(**values(digits, output, **given | changes))


def restored(root: Path, digits: Path, split: str) -> None:
    path = victim(root, split)
    shutil.copy(digits / "images/train/3" / path.name, path)


# ---------------------------------------------------------------------------- one image


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("reader", ["training", "evaluation"])
def test_the_image_is_named(
    digits: Path, tmp_path: Path, spoiled: Path, damage: str, reader: str
) -> None:
    """The set that is trained on names the image, and so does the one that is evaluated on."""
    split = "train" if reader == "training" else "val"
    victim(spoiled, split).write_bytes(DAMAGE[damage])
    restored(spoiled, digits, "val" if split == "train" else "train")
    asked = settings(digits, tmp_path / "out", spoiled)
    if reader == "training":
        batches = data.open_training(asked, 64, ALONE).batches
    else:
        form = InputForm(64, (0.5,) * 3, (0.25,) * 3)
        batches = data.open_tests(asked, form, ALONE)["images"].batches
    with pytest.raises(
        OSError, match=rf"cannot be read: .*{split}/3/{victim(spoiled, split).name}: "
    ):
        list(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_ends_and_names_it(
    digits: Path, tmp_path: Path, spoiled: Path, monkeypatch: Any, workers: int
) -> None:
    fields = {"data_dir": str(spoiled), "class_map": "", "val_split": "", "workers": workers}
    monkeypatch.setattr(sys, "argv", command(values(digits, tmp_path / "out", **fields))[1:])
    with pytest.raises(SystemExit) as told:
        train.main()
    assert str(told.value).startswith("train.py: error: unmapped: sample ")
    assert f"{victim(spoiled, 'train')}: expected a readable picture" in str(told.value)
    assert "\n" not in str(told.value)


# ---------------------------------------------------------------------------- left out


def rows_of(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The labels of the rows that a run learns from, batch by batch."""
    seen: list[Tensor] = []
    to_device = data.to_device

    def watched(batch: Any, classes: int, device: torch.device) -> data.Batch:
        seen.append(batch.label.clone())
        return to_device(batch, classes, device)

    monkeypatch.setattr(data, "to_device", watched)
    return seen


@pytest.mark.parametrize("changes", [{}, {"cache": True}, {"workers": 2}, {"batch_size": 1}])
def test_a_run_leaves_it_out_and_counts_it(
    digits: Path, tmp_path: Path, spoiled: Path, monkeypatch: Any, changes: dict[str, Any]
) -> None:
    """47 of the 48 images are learned from, each once: none takes the place of the spoiled one."""
    only = {"clickme": (), "lambda_harmonization": 0.0, "mapped_share": 0.0, "batch_size": 24}
    asked = settings(
        digits, tmp_path / "out", spoiled, skip_corrupt=True, val_split="", **only | changes
    )
    seen = rows_of(monkeypatch)
    result = train.train(asked)
    assert [row["skipped"] for row in result["history"]] == [1]
    # Of batches of one, the one without an image is a row of zeros, from which nothing is learned.
    labels = torch.cat(seen).tolist()
    count = 48 if changes.get("batch_size") == 1 else 47
    assert len(labels) == count
    expected = sorted(int(path.parent.name) for path in (spoiled / "train").glob("*/*"))
    expected.remove(3)
    if count == 48:
        expected.append(0)
    assert sorted(labels) == sorted(expected)
    with (tmp_path / "out/summary.csv").open() as file:
        assert "skipped" in file.readline()


def test_nothing_is_learned_from_a_batch_without_an_image(
    digits: Path, tmp_path: Path, spoiled: Path
) -> None:
    """The weights are those of a run whose only update had no gradient."""
    for path in (spoiled / "train").glob("*/*"):
        if path.parent.name != "0":
            path.unlink()
    images = sorted((spoiled / "train/0").iterdir())
    for path in images[1:]:
        path.unlink()
    images[0].write_bytes(b"")
    (spoiled / "train/1/good.jpg").write_bytes(WHOLE)
    only = {"clickme": (), "lambda_harmonization": 0.0, "batch_size": 1, "opt": "sgd", "lr": 0.1}
    only |= {"weight_decay": 0.0, "skip_corrupt": True, "val_split": "", "smoothing": 0.0}
    asked = settings(digits, tmp_path / "out", spoiled, **only)
    seen: list[Any] = []
    step = torch.optim.SGD.step

    def watched(self: Any, *arguments: Any) -> Any:
        gradients = [p.grad.abs().max().item() for g in self.param_groups for p in g["params"]]
        seen.append(max(gradients))
        return step(self, *arguments)

    torch.optim.SGD.step = watched  # type: ignore[method-assign]
    try:
        train.train(asked)
    finally:
        torch.optim.SGD.step = step  # type: ignore[method-assign]
    assert len(seen) == 2
    assert sorted(value > 0 for value in seen) == [False, True]


class Always(nn.Module):
    """A network that takes every image for one of class 3."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.one_hot(torch.full((len(images),), 3), 10).float() + images.mean() * 0


@pytest.mark.parametrize("workers", [0, 2])
def test_an_evaluation_measures_the_others(
    digits: Path, tmp_path: Path, spoiled: Path, workers: int
) -> None:
    asked = settings(
        digits, tmp_path / "out", spoiled, skip_corrupt=True, batch_size=7, workers=workers
    )
    form = InputForm(64, (0.5,) * 3, (0.25,) * 3)
    test = data.open_tests(asked, form, ALONE)["images"]
    measures, _ = evaluation.evaluate(Always(), test, form, ALONE, classes=10)
    images = list((spoiled / "val").glob("*/*"))
    threes = sum(path.parent.name == "3" for path in images)
    assert measures["accuracy"] == pytest.approx((threes - 1) / (len(images) - 1))
    assert len(test.stored.skipped) == 1


def test_an_evaluation_of_maps_measures_the_others(digits: Path, tmp_path: Path) -> None:
    """A record that cannot be read has no part; its neighbour has no second one."""
    shard = digits / "clickme/test/test-0.tfrecords"
    bad = damaged(shard, tmp_path / "bad", 20)
    form = InputForm(64, (0.5,) * 3, (0.25,) * 3)
    results = []
    for path, skip in ((digits / "clickme/test", False), (bad, True)):
        asked = config.Config(
            **values(digits, tmp_path / "out", clickme_val=(str(path),), skip_corrupt=skip)
        )
        test = data.open_tests(asked, form, ALONE)["clickme"]
        results.append(evaluation.evaluate(Always(), test, form, ALONE, classes=10)[0])
        assert len(test.stored.skipped) == skip
    labels = [train.hx.clickme.ClickMe(shard, preprocess=None)[n].label for n in range(24)]
    expected = [label == 3 for label in labels]
    assert results[0]["accuracy"] == pytest.approx(np.mean(expected))
    del expected[20]
    assert results[1]["accuracy"] == pytest.approx(np.mean(expected))


def test_a_run_and_its_evaluation_count_apart(digits: Path, tmp_path: Path, spoiled: Path) -> None:
    """Two processes have their parts counted together."""
    fields = {"data_dir": str(spoiled), "class_map": "", "val_split": "val", "skip_corrupt": True}
    bad = damaged(digits / "clickme/train/train-0.tfrecords", tmp_path / "bad", 20)
    fields |= {"batch_size": 24, "clickme": (str(bad),)}
    done = run(values(digits, tmp_path / "out", **fields), 2)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [row["skipped"] for row in results["history"]] == [2]  # a record and an image
    assert results["final"]["images"]["skipped"] == 1
    assert "left out: unmapped: sample" in done.stderr


# ---------------------------------------------------------------------------- in another loop


class Source(torch.utils.data.Dataset[Any]):
    """Three images, the second of which is read by a function that fails."""

    def __init__(self, fail: Callable[[], Any]) -> None:
        self.fail = fail

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        return (self.fail() if index == 1 else Image.new("RGB", (256, 256))), index


def raising(error: Exception) -> Callable[[], Any]:
    def fail() -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    "fail",
    [
        raising(OSError("image file is truncated")),
        raising(FileNotFoundError(2, "No such file", "x.jpg")),
        raising(MemoryError()),
        raising(RuntimeError("DefaultCPUAllocator: can't allocate memory")),
        raising(ValueError("bad")),
        raising(SyntaxError("broken PNG file")),
        raising(Image.DecompressionBombError("too large")),
        lambda: Image.open(io.BytesIO(WHOLE[: len(WHOLE) // 2])),
        lambda: Image.new("F", (4, 4)),
        lambda: {"bytes": b"", "path": None},
        lambda: {"bytes": None, "path": "http://127.0.0.1:9/x.jpg"},
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_rows_are_marked(fail: Callable[[], Any], workers: int) -> None:
    mixed = MixedDataset(None, Source(fail), on_error="mark")
    draws = [[Draw(False, n, 0) for n in range(3)]]
    (batch,) = create_loader(mixed, draws, workers=workers)
    assert batch.label.tolist() == [0, -1, 2]
    assert batch.token.tolist() == [0, 0, 0]
    assert mixed.skipped == [1]
    kept, some = data.readable(batch)
    assert (kept.label.tolist(), some) == ([0, 2], True)
    with pytest.raises((OSError, MemoryError, RuntimeError, ValueError)):
        MixedDataset(None, Source(fail))[Draw(False, 1, 0)]


def test_all_rows_cannot_be_read() -> None:
    mixed = MixedDataset(None, [({"bytes": b"", "path": None}, 0)] * 2, on_error="mark")  # type: ignore[arg-type]
    assert mixed[Draw(False, 0, 0)].label == -1
    with pytest.raises(OSError, match=r"sample 1 cannot be read: .*nor can any of the 2 others"):
        mixed[Draw(False, 1, 0)]


def test_a_batch_without_an_image_keeps_a_row() -> None:
    mixed = MixedDataset(None, Source(raising(OSError("bad"))), on_error="mark")
    batch, some = data.readable(collate([mixed[Draw(False, 1, 0)]] * 3))
    assert not some
    assert batch.label.tolist() == [0]
    assert not batch.image.any()
    with pytest.raises(ValueError, match='on_error must be "raise" or "mark", got'):
        MixedDataset(None, Source(raising(OSError("bad"))), on_error="skip")  # type: ignore[arg-type]
