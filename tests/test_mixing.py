"""Mixed batches: shares, order, processes, resuming, sources of other libraries."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm_networks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from harmonizer_ext.clickme import ClickMeSample
from harmonizer_ext.data import Draw, MixedBatchSampler, MixedDataset, create_loader
from harmonizer_ext.data.sources import without_map

Image = pytest.importorskip("PIL.Image", reason="Pillow (extra: train) makes the pictures")


class Numbers(Dataset[Any]):
    """Samples that say their number."""

    def __init__(self, count: int, mapped: bool) -> None:
        self.count = count
        self.mapped = mapped

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> ClickMeSample:
        image = torch.full((3, 4, 4), index % 256, dtype=torch.uint8)
        return ClickMeSample(image, torch.ones(1, 4, 4), index, torch.tensor(float(self.mapped)))


def epoch(sampler: MixedBatchSampler, number: int, start: int = 0) -> list[list[Draw]]:
    sampler.set_epoch(number, start)
    return list(sampler)


@settings(deadline=None, max_examples=60)
@given(
    mapped=st.integers(1, 40),
    unmapped=st.integers(1, 90),
    per_rank=st.integers(1, 6),
    world=st.integers(1, 4),
    share=st.fractions(0, 1, max_denominator=20),
    seed=st.integers(0, 2**63),
)
def test_share_order_and_ranks(
    mapped: int, unmapped: int, per_rank: int, world: int, share: Fraction, seed: int
) -> None:
    batch = per_rank * world

    def make(rank: int, ranks: int) -> MixedBatchSampler:
        return MixedBatchSampler(
            mapped,
            unmapped,
            batch,
            mapped_share=float(share),
            epoch_size=3 * batch + batch - 1,
            seed=seed,
            rank=rank,
            world_size=ranks,
        )

    whole = [b for number in range(3) for b in epoch(make(0, 1), number)]
    assert len(whole) == 9
    rows = 0
    taken = 0
    for draws in whole:
        assert len(draws) == batch
        here = sum(draw.mapped for draw in draws)
        # Up to one of the share in the batch, up to a half over all batches so far.
        assert abs(here - share * batch) <= 1
        rows, taken = rows + batch, taken + here
        assert abs(taken - share * rows) <= Fraction(1, 2)
        assert [draw.mapped for draw in draws] == sorted((d.mapped for d in draws), reverse=True)
    # The processes have the same batches among them, and equally many maps up to one.
    parts = [[b for n in range(3) for b in epoch(make(rank, world), n)] for rank in range(world)]
    for number, draws in enumerate(whole):
        assert [parts[row % world][number][row // world] for row in range(batch)] == draws
        counts = [sum(draw.mapped for draw in part[number]) for part in parts]
        assert max(counts) - min(counts) <= 1
    # Each source is walked through: between two occurrences of an image lie all the others.
    for kind, size in ((True, mapped), (False, unmapped)):
        items = [draw.item for draws in whole for draw in draws if draw.mapped == kind]
        for start in range(0, len(items), size):
            walk = items[start : start + size]
            assert len(set(walk)) == len(walk)
            assert set(walk) <= set(range(size))
    seeds = [draw.seed for draws in whole for draw in draws]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= value < 2**63 for value in seeds)


@pytest.mark.parametrize("start", [0, 1, 6, 7])
def test_going_on_in_the_middle_of_an_epoch(start: int) -> None:
    uninterrupted = MixedBatchSampler(11, 30, 5, seed=3)
    batches = [epoch(uninterrupted, number) for number in range(4)]
    assert len(uninterrupted) == len(batches[0]) == 7
    resumed = MixedBatchSampler(11, 30, 5, seed=3)
    assert epoch(resumed, 2, start) + epoch(resumed, 3) == batches[2][start:] + batches[3]
    assert batches[0] != batches[1]
    assert epoch(MixedBatchSampler(11, 30, 5, seed=4), 0) != batches[0]


def test_every_image_is_as_likely_at_every_place() -> None:
    """The first of a walk, over seeds: chi squared of 5 degrees of freedom, 1 in 10**6 above 37."""
    counts = Counter(
        next(iter(MixedBatchSampler(0, 6, 1, seed=seed)))[0].item for seed in range(600)
    )
    assert sum((counts[item] - 100) ** 2 / 100 for item in range(6)) < 37


def test_walks_differ_and_are_shuffled() -> None:
    items = [d.item for b in epoch(MixedBatchSampler(0, 50, 10, epoch_size=150), 0) for d in b]
    walks = [items[start : start + 50] for start in (0, 50, 100)]
    assert all(sorted(walk) == list(range(50)) for walk in walks)
    assert walks[0] != walks[1] != walks[2] != walks[0]
    in_order = MixedBatchSampler(0, 50, 10, shuffle=False)
    assert [d.item for b in in_order for d in b] == list(range(50))


def test_sizes_of_an_epoch() -> None:
    # One pass over 80 without a map, with the 20 that belong to them.
    assert len(MixedBatchSampler(7, 80, 10)) == 10
    assert len(MixedBatchSampler(35, 0, 10)) == 3
    assert len(MixedBatchSampler(0, 35, 10)) == 3
    assert len(MixedBatchSampler(35, 80, 10, mapped_share=1)) == 3
    assert len(MixedBatchSampler(35, 80, 10, epoch_size=1000)) == 100


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        ((0, 0, 4), {}, "mapped_size, unmapped_size: expected images"),
        ((-1, 5, 4), {}, "mapped_size, unmapped_size: expected images"),
        ((5, 5, 4), {"mapped_share": 1.5}, r"mapped_share: expected a number in 0\.\.1, got 1\.5"),
        ((5, 5, 4), {"mapped_share": float("nan")}, "mapped_share: expected"),
        ((5, 5, 4), {"rank": 2, "world_size": 2}, r"rank: expected 0 to 1"),
        ((5, 5, 3), {"world_size": 2}, "batch_size: expected a multiple of world_size 2, got 3"),
        ((5, 5, 0), {}, "batch_size: expected"),
        ((5, 5, 64), {}, "batch_size: expected an epoch of at least one batch"),
    ],
)
def test_what_cannot_be_sampled(arguments: Any, options: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        MixedBatchSampler(*arguments, **options)
    with pytest.raises(ValueError, match="start_batch: expected 0 to 1, got 2"):
        MixedBatchSampler(5, 5, 5).set_epoch(0, 2)


# --- augmentation by the draw ---------------------------------------------------------------------


def noisy(sample: ClickMeSample) -> ClickMeSample:
    """An augmentation that tells which random numbers it had."""
    return sample._replace(heatmap=torch.rand(1, 4, 4))


def test_augmentation_depends_on_the_draw_alone() -> None:
    dataset = MixedDataset(Numbers(9, True), Numbers(40, False), transform=noisy)
    sampler = MixedBatchSampler(9, 40, 10)

    def drawn(seed: int) -> torch.Tensor:
        return torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(seed))

    expected = [torch.stack([drawn(draw.seed) for draw in draws]) for draws in sampler]
    for workers in (0, 1, 2):
        torch.manual_seed(workers)
        loader = create_loader(dataset, sampler, workers=workers)
        for _ in range(2):  # what came before does not matter either
            got = list(loader)
            assert len(got) == len(expected)
            for batch, heatmaps in zip(got, expected, strict=True):
                assert torch.equal(batch.heatmap, heatmaps)
    # The other random numbers of the process go on as if there had been none.
    torch.manual_seed(5)
    following = torch.rand(3)
    torch.manual_seed(5)
    dataset[Draw(True, 0, 1)]
    assert torch.equal(torch.rand(3), following)


def test_both_kinds_and_what_is_missing() -> None:
    dataset = MixedDataset(Numbers(3, True), Numbers(5, False))
    assert len(dataset) == 8
    mapped, unmapped = dataset[Draw(True, 2, 0)], dataset[Draw(False, 4, 0)]
    assert (mapped.label, float(mapped.token), float(mapped.heatmap.sum())) == (2, 1, 16)
    # A map that a source without maps gives is none.
    assert (unmapped.label, float(unmapped.token), float(unmapped.heatmap.sum())) == (4, 0, 0)
    with pytest.raises(ValueError, match="mapped, unmapped: expected at least one"):
        MixedDataset(None, None)
    with pytest.raises(IndexError, match="mapped is None"):
        MixedDataset(None, Numbers(5, False))[Draw(True, 0, 0)]
    with pytest.raises(IndexError, match="unmapped is None"):
        MixedDataset(Numbers(5, True), None)[Draw(False, 0, 0)]


# --- images of other libraries --------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes; PNGs of several modes, whose pixels are known."""
    rng = np.random.default_rng(0)
    for number, mode in enumerate(("RGB", "L", "RGBA", "P")):
        path = tmp_path / "train" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(path)
    return tmp_path / "train"


def assert_same(sample: ClickMeSample, path: Path, label: int) -> None:
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert sample.image.dtype == torch.uint8
    np.testing.assert_array_equal(sample.image.permute(1, 2, 0).numpy(), pixels)
    assert sample.heatmap.shape == (1, 6, 5)
    assert sample.heatmap.dtype == torch.float32
    assert not sample.heatmap.any()
    assert (sample.label, float(sample.token)) == (label, 0)


def test_image_folder_and_timm(folder: Path) -> None:
    timm_networks.import_torchvision()
    from timm.data import create_dataset
    from torchvision.datasets import ImageFolder

    images: Any = ImageFolder(str(folder))
    by_timm: Any = create_dataset("", root=str(folder.parent), split="train")
    assert len(images) == len(by_timm) == 4
    paths = sorted(folder.rglob("*.png"))
    for source in (images, by_timm):
        dataset = MixedDataset(None, source)
        for item, path in enumerate(paths):
            assert_same(dataset[Draw(False, item, 0)], path, "ab".index(path.parent.name))


def test_hugging_face(folder: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets (extra: test)")
    paths = sorted(folder.rglob("*.png"))
    table = {"picture": [str(path) for path in paths], "class": [0, 0, 1, 1]}
    features = {"picture": datasets.Image(), "class": datasets.ClassLabel(names=["a", "b"])}
    source = datasets.Dataset.from_dict(table, features=datasets.Features(features))
    dataset = MixedDataset(None, source, image_key="picture", label_key="class")
    for item, path in enumerate(paths):
        assert_same(dataset[Draw(False, item, 0)], path, table["class"][item])
    with pytest.raises(
        ValueError, match=r"sample 1 has no 'image' and no 'label', only \['class', 'picture'\]"
    ):
        MixedDataset(None, source)[Draw(False, 1, 0)]


@pytest.mark.parametrize(
    ("item", "error", "text"),
    [
        (torch.zeros(3, 4, 4), TypeError, "sample 7 is Tensor"),
        (("x.jpeg", 1), TypeError, "expected a PIL image or a tensor, sample 7 has str"),
        ((torch.zeros(1, 4, 4, dtype=torch.uint8), 1), ValueError, r"sample 7 is \(1, 4, 4\)"),
        ((torch.zeros(3, 4, 4), 1), ValueError, r"torch\.float32"),
        ((torch.zeros(3, 4, 4, dtype=torch.uint8), "cat"), TypeError, "sample 7 has str"),
    ],
)
def test_unknown_forms(item: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        without_map(item, 7)


@pytest.mark.parametrize("label", [3, np.int64(3), torch.tensor(3)])
def test_kinds_of_labels(label: Any) -> None:
    sample = without_map((torch.zeros(3, 4, 4, dtype=torch.uint8), label))
    assert type(sample.label) is int
    assert sample.label == 3
