"""Streams mixed by a ratio: WebDataset's own pipelines and ClickMe's shards, in real workers."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clickme_shards import click_map, jpeg, picture
from torch.utils.data import DataLoader, IterableDataset

from harmonizer_ext.clickme import ClickMeSample, ClickMeWebDataset
from harmonizer_ext.data import MixedStream, collate

webdataset = pytest.importorskip("webdataset", reason="webdataset (extra: train) reads tar shards")
pytest.importorskip("PIL", reason="Pillow (extra: train) decodes")

CLICKME, SHARDS, PER_SHARD = 6, 4, 5


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for key, files in samples.items():
            for name, data in files.items():
                member = tarfile.TarInfo(f"{key}.{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ClickMe in two shards with labels from 0, other images in four with labels from 100."""
    directory = tmp_path_factory.mktemp("shards")
    for shard in range(2):
        write_tar(
            directory / f"clickme-{shard}.tar",
            {
                f"{n:03}": {
                    "jpg": jpeg(picture(n)),
                    "heatmap.jpg": jpeg(click_map(n)),
                    "cls": str(n).encode(),
                }
                for n in range(shard * 3, shard * 3 + 3)
            },
        )
    for shard in range(SHARDS):
        numbers = range(100 + shard * PER_SHARD, 100 + (shard + 1) * PER_SHARD)
        write_tar(
            directory / f"images-{shard}.tar",
            {f"{n}": {"jpg": jpeg(picture(n, 256)), "cls": str(n).encode()} for n in numbers},
        )
    return directory


def streams(shards: Path) -> tuple[ClickMeWebDataset, Any]:
    clickme = ClickMeWebDataset(
        str(shards / "clickme-*.tar"), preprocess="released-heatmap", decoder="pillow"
    )
    urls = [str(path) for path in sorted(shards.glob("images-*.tar"))]
    images = webdataset.WebDataset(
        urls, shardshuffle=False, workersplitter=webdataset.split_by_worker
    )
    return clickme, images.decode("pil").to_tuple("jpg", "cls")


@pytest.mark.parametrize("workers", [0, 2])
def test_webdataset_and_clickme(shards: Path, workers: int) -> None:
    stream = MixedStream(*streams(shards), mapped_share=0.2)
    loader = DataLoader(stream, batch_size=5, num_workers=workers, collate_fn=collate)
    seen: Counter[int] = Counter()
    for batch in loader:
        assert batch.image.shape[1:] == (3, 256, 256)
        assert torch.equal(batch.token, (batch.label < 100).float())
        assert torch.equal(batch.heatmap.flatten(1).any(1), batch.token == 1)
        seen.update(batch.label.tolist())
    # Each image once; for each four of a worker's one with a map, of the worker's own shard.
    assert {label: n for label, n in seen.items() if label >= 100} == dict.fromkeys(
        range(100, 120), 1
    )
    with_map = sum(n for label, n in seen.items() if label < 100)
    assert with_map == (5 if workers == 0 else 4)
    assert set(seen) & set(range(100)) <= set(range(CLICKME))
    if workers == 2:
        assert {label // 3 for label in seen if label < 100} == {0, 1}


def test_pixels_and_order(shards: Path) -> None:
    clickme, images = streams(shards)
    samples = list(MixedStream(clickme, images, mapped_share=0.5))
    stored = list(clickme)
    assert [s.label for s in samples[::2]] == list(range(100, 120))
    # Started again where it ends.
    assert [s.label for s in samples[1::2]] == [n % CLICKME for n in range(20)]
    for got, expected in zip(samples[1::2], stored, strict=False):
        assert torch.equal(got.image, expected.image)
        assert torch.equal(got.heatmap, expected.heatmap)
    from PIL import Image

    decoded = np.asarray(Image.open(io.BytesIO(jpeg(picture(100)))))
    np.testing.assert_array_equal(samples[0].image.permute(1, 2, 0).numpy(), decoded)


class Unmapped(IterableDataset[Any]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in range(self.count):
            yield {"img": torch.full((3, 2, 2), number % 256, dtype=torch.uint8), "y": number}


class Mapped(IterableDataset[Any]):
    def __iter__(self) -> Iterator[ClickMeSample]:
        for number in range(7):
            image = torch.zeros(3, 2, 2, dtype=torch.uint8)
            yield ClickMeSample(image, torch.ones(1, 2, 2), number, torch.ones(()))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 1 / 3, 0.5, 0.75, 0.9])
def test_share(share: float) -> None:
    stream = MixedStream(
        Mapped(), Unmapped(900), mapped_share=share, image_key="img", label_key="y"
    )
    tokens = torch.stack([sample.token for sample in stream])
    unmapped = (tokens == 0).sum()
    assert unmapped == 900
    # After each image without a map, as many with one as belong to it, rounded down.
    assert int((tokens == 1).sum()) == int(900 * share / (1 - share) + 1e-6)
    for batch in tokens.split(20):
        assert abs(float(batch.sum()) - share * len(batch)) <= 1 + 1e-6


def test_transform_and_errors() -> None:
    def brighter(sample: ClickMeSample) -> ClickMeSample:
        return sample._replace(image=sample.image + 1)

    keys = {"image_key": "img", "label_key": "y"}
    stream = MixedStream(Mapped(), Unmapped(4), mapped_share=0.5, transform=brighter, **keys)
    assert [int(s.image.max()) for s in stream] == [1, 1, 2, 1, 3, 1, 4, 1]
    for share in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="mapped_share: expected 0 <= share < 1"):
            MixedStream(Mapped(), Unmapped(4), mapped_share=share)
    with pytest.raises(ValueError, match="no 'image' and no 'label'"):
        list(MixedStream(Mapped(), Unmapped(4)))
    with pytest.raises(ValueError, match=r"mapped: expected samples, the stream is empty$"):
        list(MixedStream([], Unmapped(4), **keys))
    loader = DataLoader(MixedStream([], Unmapped(4), **keys), num_workers=1, collate_fn=collate)
    with pytest.raises(ValueError, match="the stream is empty in worker 0"):
        list(loader)
