"""Samples that only look like images without a map are refused, with the number of the sample.

The forms that are taken are in test_mixing.py.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm_networks
import torch
from clickme_shards import jpeg, picture

from harmonizer_ext.data import Draw, MixedDataset, create_loader
from harmonizer_ext.data.sources import without_map

Image = pytest.importorskip("PIL.Image", reason="Pillow (extra: train) makes the pictures")


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_more_than_sixteen_bits_a_channel(dtype: Any) -> None:
    """Pillow would make them white: convert("RGB") cuts off above 255."""
    image = Image.fromarray(np.full((4, 4), 30_000, dtype))
    with pytest.raises(ValueError, match=r"sample 7: .* 8 or 16 bits a channel, got .* '(I|F)'"):
        without_map((image, 1), 7)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_eight_bits_and_fewer(mode: str) -> None:
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8))
    image = colours.convert(mode)
    pixels = without_map((image, 1)).image
    np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(image.convert("RGB")))


def test_labels_that_are_kept_secret() -> None:
    with pytest.raises(ValueError, match="from 0 on, sample 7 has the label -1"):
        without_map({"image": torch.zeros(3, 4, 4, dtype=torch.uint8), "label": -1}, 7)


@pytest.mark.parametrize("damage", ["cut", "text"])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_file_is_named(tmp_path: Path, damage: str, workers: int) -> None:
    """The file is named by the folder's own loader, and in a worker."""
    timm_networks.import_torchvision()
    from torchvision.datasets import ImageFolder

    whole = jpeg(picture(0))
    (tmp_path / "a").mkdir()
    for number in range(3):
        (tmp_path / "a" / f"{number}.jpeg").write_bytes(whole)
    (tmp_path / "a" / "1.jpeg").write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"no")
    dataset = MixedDataset(None, ImageFolder(str(tmp_path)))
    with pytest.raises(OSError, match="unmapped: sample 1 cannot be read: "):
        list(create_loader(dataset, [[Draw(False, n, 0)] for n in range(3)], workers=workers))


def test_a_file_that_is_read_late() -> None:
    """Pillow decodes when pixels are asked for, which is after the data set gave the image."""
    whole = jpeg(picture(0))

    class Late(torch.utils.data.Dataset[Any]):
        def __getitem__(self, index: int) -> Any:
            return Image.open(io.BytesIO(whole[: len(whole) // 2])), 0

    with pytest.raises(OSError, match="unmapped: sample 5 cannot be read: "):
        MixedDataset(None, Late())[Draw(False, 5, 0)]
