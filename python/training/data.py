"""The images of a run: ClickMe mixed with others, batch by batch; and the sets to evaluate on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import timm_networks
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import harmonizer_ext as hx
from harmonizer_ext.clickme.kinds import KINDS, find_files
from training.config import Config, expect
from training.images import ByReader, Folders, open_images
from training.networks import InputForm
from training.processes import World

timm_networks.import_torchvision()
from torchvision.transforms import v2  # noqa: E402

from harmonizer_ext.data import augmentation, loader, memory, mixing  # noqa: E402
from harmonizer_ext.data.mixup import Mixup  # noqa: E402

#: Side of ClickMe's images as published.
_RELEASED = 224


class Batch(NamedTuple):
    """A batch on the device; ``tokens`` stay on the CPU, where the rows are chosen by them."""

    images: Tensor
    heatmaps: Tensor
    labels: Tensor
    tokens: Tensor


class MicroBatches:
    """The batches of the sampler, each in parts that a process holds at a time.

    Rows are dealt out one by one, so that each part has its share of human maps.
    """

    def __init__(self, sampler: mixing.MixedBatchSampler, parts: int) -> None:
        self.sampler = sampler
        self.parts = parts

    def __iter__(self) -> Iterator[list[mixing.Draw]]:
        for draws in self.sampler:
            for part in range(self.parts):
                yield draws[part :: self.parts]

    def __len__(self) -> int:
        return len(self.sampler) * self.parts


class Training(NamedTuple):
    """The training set, read in the order of its sampler.

    Attributes:
        sources: numbers of images with human maps and without.
        folders: the classes of the folders of those without; empty where they are none.
        stored: what is read, for its ``skipped``.
    """

    batches: DataLoader[Any]
    sampler: mixing.MixedBatchSampler
    images_per_update: int
    sources: tuple[int, int]
    folders: dict[str, int]
    stored: tuple[Any, ...]

    @property
    def updates_per_epoch(self) -> int:
        return len(self.sampler)


class Test(NamedTuple):
    """A set to evaluate on: this process's share of it.

    Attributes:
        batches: of ``count`` rows in all, padded so that all processes have equally many.
        stored: what is read, for its ``skipped``.
        mapped: whether its images have human maps.
    """

    batches: DataLoader[Any]
    count: int
    stored: Any
    mapped: bool = True


def open_clickme(
    paths: tuple[str, ...], argument: str, config: Config, preprocess: str, transform: Any
) -> Dataset[Any]:
    """Images with human maps, by the kind of the files that the paths lead to.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or there are files of two kinds.
    """
    kind, files = find_files(paths, *KINDS, argument=argument)
    options: dict[str, Any] = {"preprocess": preprocess, "transform": transform}
    options |= {"decoder": config.decoder, "on_error": "mark" if config.skip_corrupt else "raise"}
    options |= {"max_bytes": config.max_bytes}
    if kind == "tfrecords":
        return hx.clickme.ClickMe(files, **options)
    expect(
        kind != "tar",
        f"{argument}: expected files with random access, got .tar shards, which are a stream; "
        "train on the .tfrecords they were made of, or mix the stream with "
        "harmonizer_ext.data.MixedStream in a loop of your own",
    )
    del options["decoder"]
    return hx.clickme.ClickMeFiles(files, **options)


def _images(config: Config, split: str, argument: str) -> Any:
    assert config.data_dir is not None
    return open_images(
        config.data_dir,
        config.dataset,
        split,
        argument=argument,
        class_map=config.class_map,
        max_bytes=config.max_bytes,
    )


def _folders(data: Any) -> dict[str, int]:
    """The classes of the folders of a data set as timm reads it; none of other data sets."""
    if (isinstance(data, Folders) and data.top) or not isinstance(data, Folders | ByReader):
        return {}
    return data.class_to_idx


def _check_classes(data: Any, config: Config) -> None:
    """Folders in order are the classes from 0 on, which those of ClickMe must be too."""
    folders = _folders(data)
    expect(
        not (folders and config.clickme) or bool(config.class_map)
        or len(folders) == config.num_classes,
        f"class_map: expected a file that gives the classes of the folders in {config.data_dir}: "
        f"the labels of --clickme are {config.num_classes} classes (--num-classes), and there are "
        f"{len(folders)} folders, whose order says nothing then",
    )  # fmt: skip


def open_training(config: Config, size: int, world: World) -> Training:
    """The training set.

    Raises:
        FileNotFoundError, ValueError: it is missing, empty, or too small for a batch.
    """
    if config.no_aug:
        transform = augmentation.evaluation_transform(size)
    else:
        transform = augmentation.training_transform(
            size,
            scale=config.scale,
            ratio=config.ratio,
            hflip=config.hflip,
            rotation=config.rotation,
        )
    mapped: Any = None
    unmapped: Any = None
    if config.clickme:
        # Image and map of one size, to be cropped together.
        mapped = open_clickme(config.clickme, "clickme", config, "released-heatmap", None)
    if config.data_dir is not None:
        unmapped = _images(config, config.train_split, "train_split")
        _check_classes(unmapped, config)
    folders = _folders(unmapped)
    both = mixing.MixedDataset(mapped, unmapped, transform=transform, **_marking(config))
    stored = (mapped, both)
    if config.cache:
        cached = _cached(both)
        both = mixing.MixedDataset(*cached, transform=None)
    parts = config.accumulation(world.size)
    images_per_update = config.batch_size * parts * world.size
    sources = tuple(0 if part is None else len(part) for part in (mapped, unmapped))
    sampler = mixing.MixedBatchSampler(
        *sources,
        images_per_update,
        mapped_share=config.mapped_share,
        epoch_size=config.epoch_size,
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
    )
    expect(
        len(sampler) > 0,
        f"batch_size: expected an epoch of at least one update of {images_per_update} images",
    )
    batches = loader.create_loader(
        both,
        MicroBatches(sampler, parts),
        workers=config.workers,
        pin_memory=world.device.type == "cuda",
    )
    return Training(batches, sampler, images_per_update, sources, folders, stored)


def _marking(config: Config) -> dict[str, Any]:
    """What becomes of an image without a map that cannot be read."""
    return {
        "on_error": "mark" if config.skip_corrupt else "raise",
        "max_bytes": config.max_bytes,
    }


def _cached(both: mixing.MixedDataset) -> tuple[Any, Any]:
    """Both sources in memory, resized once.

    In one thread: a mixed data set seeds the process's random numbers for each sample.
    """
    parts: list[Any] = [(True, both.mapped), (False, both.unmapped)]
    mapped, unmapped = (
        None if part is None else memory.InMemory(_Part(both, kind, len(part)), threads=1)
        for kind, part in parts
    )
    return mapped, unmapped


class _Part(Dataset[Any]):
    """One of the two sources of a mixed data set, by number."""

    def __init__(self, both: mixing.MixedDataset, mapped: bool, count: int) -> None:
        self.both = both
        self.mapped = mapped
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.both[mixing.Draw(self.mapped, index, 0)]


def open_tests(
    config: Config, form: InputForm, world: World, folders: dict[str, int] | None = None
) -> dict[str, Test]:
    """The sets to evaluate on, by their names.

    Args:
        folders: the classes of the folders that were trained on.

    Raises:
        FileNotFoundError, ValueError: one is missing; a sample of it cannot be read or has a label
            that the network does not.
    """
    tests: dict[str, Test] = {}
    preprocess, transform = "released", None
    if form.size != _RELEASED:
        preprocess = "released-heatmap"
        transform = augmentation.evaluation_transform(form.size)
    for text in config.clickme_val:
        name, equals, path = text.partition("=")
        name, path = (name, path) if equals else ("clickme", text)
        expect(name not in tests, f"clickme_val: expected different names, got {name!r} twice")
        data = open_clickme((path,), "clickme_val", config, preprocess, transform)
        _check_samples(data, name, config, world)
        cached = memory.InMemory(data) if config.cache else data
        tests[name] = _share(cached, Test([], 0, data), config, world)
    if config.data_dir is not None and config.val_split:
        around = round(form.size / form.crop_pct)
        middle = v2.Compose([v2.Resize(around, antialias=True), v2.CenterCrop(form.size)])
        images: Any = _images(config, config.val_split, "val_split")
        own = _folders(images)
        if folders and isinstance(images, Folders) and own != folders:
            unknown = sorted(own.keys() - folders.keys())
            expect(
                not unknown,
                f"val_split: expected classes that are trained on, got {', '.join(unknown[:5])}",
            )
            images.relabel(folders)
        joint = augmentation.JointTransform(middle)
        data = mixing.MixedDataset(None, images, transform=joint, **_marking(config))
        expect("images" not in tests, "clickme_val: expected another name than 'images', which "
               "those without human maps have")  # fmt: skip
        tests["images"] = _share(data, Test([], 0, data, mapped=False), config, world)
    return tests


def _check_samples(data: Any, name: str, config: Config, world: World) -> None:
    """Reads this process's share of a set once, without decoding: an evaluation comes late."""
    for index in range(world.rank, len(data), world.size):
        try:
            label = data.label(index)
        except ValueError:
            if not config.skip_corrupt:
                raise
            continue
        expect(
            label < config.num_classes,
            f"num_classes: expected more than {label}, the label of sample {index} of {name}, got "
            f"{config.num_classes}",
        )


def _share(data: Any, test: Test, config: Config, world: World) -> Test:
    """Every ``world.size``-th row from this process's own on."""
    rows: list[Any] = list(range(world.rank, len(data), world.size))
    count = len(rows)
    # Under FSDP2 a forward pass is an affair of all processes: all have equally many.
    rows += [0] * (-(-len(data) // world.size) - count)
    if isinstance(data, mixing.MixedDataset):
        rows = [mixing.Draw(False, row, 0) for row in rows]
    chunks = [rows[i : i + config.batch_size] for i in range(0, len(rows), config.batch_size)]
    batches = loader.create_loader(
        data, chunks, workers=config.workers, pin_memory=world.device.type == "cuda"
    )
    return test._replace(batches=batches, count=count)


def to_device(batch: Any, classes: int, device: torch.device) -> Batch:
    """A collated batch, its labels checked while they are on the CPU."""
    highest = int(batch.label.max())
    expect(
        highest < classes,
        f"num_classes: expected more than {highest}, the highest label of a batch, got {classes}",
    )
    images, heatmaps, labels = (
        tensor.to(device, non_blocking=True) for tensor in (batch.image, batch.heatmap, batch.label)
    )
    return Batch(images, heatmaps.float(), labels, batch.token)


def readable(batch: Any) -> tuple[Any, bool]:
    """The rows of a collated batch that could be read, and whether there are any.

    Where there are none, one row of zeros stays, for the processes to stay in step; nothing is to
    be learned from it.
    """
    keep = batch.label >= 0
    if bool(keep.all()):
        return batch, True
    if not bool(keep.any()):
        rows = type(batch)(*(tensor[:1] for tensor in batch))
        return rows._replace(label=torch.zeros_like(rows.label)), False
    return type(batch)(*(tensor[keep] for tensor in batch)), True


def create_mixup(config: Config) -> Mixup | None:
    """Mixup of the configuration, or None."""
    if not config.mixup:
        return None
    return Mixup(config.mixup, config.num_classes, prob=config.mixup_prob, seed=config.seed)
