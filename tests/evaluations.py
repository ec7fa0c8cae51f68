"""Helpers of the evaluation program's tests: shards, small networks, a folder of maps, a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import clickme_shards
import numpy as np
import torch
from evaluating import scoring
from evaluating.data import ImageSet
from evaluating.networks import Network
from PIL import Image
from torch import Tensor, nn
from training.networks import InputForm

#: ImageNet's, as timm's networks have it.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Small(nn.Module):
    """A smooth network whose saliency depends on the image."""

    def __init__(self, classes: int = 1000, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Conv2d(3, 8, 9, stride=8), nn.Tanh(), nn.Conv2d(8, 8, 3), nn.Tanh()
            )
            self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean((2, 3)))


class Blind(Small):
    """Its logits, and so its maps, do not depend on the image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0


def network(name: str = "small", seed: int = 0, size: int = 224, kind: type = Small) -> Network:
    return Network(name, kind(seed=seed).eval(), InputForm(size, MEAN, STD), f"{name} of the tests")


def write_shards(folder: Path, images: int) -> Path:
    """Shards of ClickMe, two of them, as the released ones are framed."""
    folder.mkdir(parents=True, exist_ok=True)
    records = [clickme_shards.framed(clickme_shards.record(seed)) for seed in range(images)]
    half = images // 2
    (folder / "val-0.tfrecords").write_bytes(b"".join(records[:half]))
    (folder / "val-1.tfrecords").write_bytes(b"".join(records[half:]))
    return folder


def write_folder(folder: Path, images: int, *, size: tuple[int, int] = (50, 40)) -> Path:
    """Images and maps in folders of their classes, "0" to "2"; PNG and NumPy maps in turn."""
    generator = np.random.default_rng(0)
    for number in range(images):
        group = str(number % 3)
        for part in ("images", "maps"):
            (folder / part / group).mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"images/{group}/{number}.png")
        heat = generator.integers(0, 256, size, dtype=np.uint8)
        if number % 2:
            np.save(folder / f"maps/{group}/{number}.npy", heat.astype(np.float64))
        else:
            Image.fromarray(heat).save(folder / f"maps/{group}/{number}.png")
    return folder


def run(chosen: list[Network], images: ImageSet, **options: Any) -> scoring.Evaluation:
    """An evaluation in this process, without pictures."""
    defaults = {"batch_size": 4, "workers": 0, "quiet": True, "gallery": False}
    return scoring.evaluate(chosen, images, **{**defaults, **options})


def rho(evaluation: scoring.Evaluation, name: str) -> Tensor:
    """The correlation of each image."""
    return evaluation.by_name(name).values.values["spearman"]
