"""The code of docs/data.md, run as it is printed there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm_networks
import torch
from clickme_shards import click_map, jpeg, picture

from harmonizer_ext.clickme import write_records

for package in ("PIL", "simplejpeg", "google_crc32c", "torchvision"):
    if package == "torchvision":
        timm_networks.import_torchvision()
    pytest.importorskip(package, reason="the page needs pip install harmonizer-ext[train]")

PAGE = Path(__file__).parent.parent / "docs" / "data.md"


def test_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python loader\n(.*?)```", PAGE.read_text(), re.DOTALL)
    clickme = tmp_path / "data/clickme/train/train-0.tfrecords"
    clickme.parent.mkdir(parents=True)
    write_records(
        clickme,
        ({"image": jpeg(picture(n)), "heatmap": jpeg(click_map(n)), "label": n} for n in range(3)),
    )
    for number in range(16):
        path = tmp_path / "data/imagenet/train" / str(number % 4) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(picture(number, 64)))
    monkeypatch.chdir(tmp_path)

    def batches(rank: int, world_size: int) -> list[Any]:
        seen: list[Any] = []
        names = {"rank": rank, "world_size": world_size, "batch_size": 10, "epochs": 2}
        exec(
            compile(code, "docs/data.md", "exec"),
            {**names, "train": lambda *batch: seen.append([part.clone() for part in batch])},
        )
        return seen

    whole = batches(0, 1)
    assert len(whole) == 4
    for images, labels, heatmaps, tokens in whole:
        assert images.shape == (10, 3, 224, 224)
        assert labels.shape == (10, 1000)
        assert heatmaps.shape == (10, 1, 224, 224)
        assert tokens.tolist() == [1] * 2 + [0] * 8
        assert torch.equal(heatmaps.flatten(1).any(1), tokens == 1)
        assert 0 <= images.min() < 50 < 200 < images.max() <= 255
    # Two epochs of the 16 images without a map, each 8 of a batch.
    assert not np.array_equal(whole[0][0], whole[2][0])
    parts = [batches(rank, 2) for rank in range(2)]
    for number, batch in enumerate(whole):
        assert [len(part[number][3]) for part in parts] == [5, 5]
        assert [float(part[number][3].sum()) for part in parts] == [1, 1]
        assert len(batch[3]) == 10
