"""The images of a run: ClickMe mixed with others, batch by batch; and the sets to evaluate on."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import timm_networks
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import harmonizer_ext as hx
from training.config import Config, expect
from training.networks import InputForm
from training.processes import World

timm_networks.import_torchvision()
from timm.data import create_dataset  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

from harmonizer_ext.data import augmentation, loader, memory, mixing  # noqa: E402
from harmonizer_ext.data.mixup import Mixup  # noqa: E402

#: Side of ClickMe's images as published.
_RELEASED = 224
#: Names of directories that timm takes for the same split.
_SYNONYMS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"))


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
        stored: the images with human maps as they are read, or None.
    """

    batches: DataLoader[Any]
    sampler: mixing.MixedBatchSampler
    images_per_update: int
    sources: tuple[int, int]
    folders: dict[str, int]
    stored: Any

    @property
    def updates_per_epoch(self) -> int:
        return len(self.sampler)


class Test(NamedTuple):
    """A set to evaluate on: this process's share of it.

    Attributes:
        batches: of ``count`` rows in all, padded so that all processes have equally many.
        stored: the images with human maps as they are read; None if these have no maps.
    """

    batches: DataLoader[Any]
    count: int
    stored: Any

    @property
    def mapped(self) -> bool:
        """Whether its images have human maps."""
        return self.stored is not None


def open_clickme(
    paths: tuple[str, ...], argument: str, config: Config, preprocess: str, transform: Any
) -> Dataset[Any]:
    """Images with human maps, by the kind of the files that the paths lead to.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or there are files of two kinds.
    """
    kinds = {_kind(path, argument) for path in paths}
    expect(
        len(kinds) == 1, f"{argument}: expected files of one kind, got {', '.join(sorted(kinds))}"
    )
    options: dict[str, Any] = {"preprocess": preprocess, "transform": transform}
    options |= {"decoder": config.decoder, "on_error": "skip" if config.skip_corrupt else "raise"}
    kind = kinds.pop()
    if kind == "tfrecords":
        return hx.clickme.ClickMe(paths, **options)
    expect(
        kind != "tar",
        f"{argument}: expected files with random access, got .tar shards, which are a stream; "
        "train on the .tfrecords they were made of, or mix the stream with "
        "harmonizer_ext.data.MixedStream in a loop of your own",
    )
    del options["decoder"]
    return hx.clickme.ClickMeFiles(paths, **options)


def _kind(path: str, argument: str) -> str:
    """The suffix of the files behind a path: tfrecords, tar, npz or pth."""
    inside = os.path.join(glob.escape(path), "*") if os.path.isdir(path) else path
    names = [path] if os.path.isfile(path) else glob.iglob(inside)
    known = {".tfrecords": "tfrecords", ".tfrecord": "tfrecords", ".tar": "tar"}
    known |= {".npz": "npz", ".pth": "pth"}
    for name in names:
        if Path(name).suffix in known:
            return known[Path(name).suffix]
    raise FileNotFoundError(
        f"{argument}: expected .tfrecords, .tar, .npz or .pth files, found none at {path}; "
        "`python python/prepare_clickme.py download` fetches ClickMe"
    )


def _images(config: Config, split: str, argument: str) -> Dataset[Any]:
    """A split of the images without human maps, as timm reads it: (PIL image, label).

    Raises:
        FileNotFoundError, ValueError: it is not there, or is a stream. (timm would take all of
            DATA_DIR for a split that it does not find.)
    """
    root = config.data_dir
    assert root is not None
    expect(os.path.exists(root), f"data_dir: expected a directory, found none at {root}",
           FileNotFoundError)  # fmt: skip
    if config.class_map:
        found = any(map(os.path.isfile, (config.class_map, os.path.join(root, config.class_map))))
        message = f"class_map: expected a file, found none at {config.class_map}"
        expect(found, message, FileNotFoundError)
    if config.dataset in ("", "folder") and os.path.isdir(root):
        names = (split, *next((group for group in _SYNONYMS if split in group), ()))
        there = [name for name in names if os.path.isdir(os.path.join(root, name))]
        hint = "; --val-split '' evaluates on none of these" if argument == "val_split" else ""
        expect(
            bool(there),
            f"{argument}: expected a directory {split}/ in --data-dir {root}, found none{hint}",
            FileNotFoundError,
        )
        root = os.path.join(root, there[0])
        expect(
            any(name for _, _, files in os.walk(root) for name in files),
            f"{argument}: expected a folder of images for each class, got none in {root}",
        )
    data = create_dataset(
        config.dataset,
        root=root,
        split=split,
        search_split=root == config.data_dir,
        is_training=argument == "train_split",
        class_map=config.class_map,
    )
    expect(
        not isinstance(data, torch.utils.data.IterableDataset),
        f"dataset: expected one with random access (folders, hfds/NAME), got {config.dataset!r}; a "
        "stream cannot be resumed to the image; harmonizer_ext.data.streams.MixedStream mixes it "
        "in a loop of your own",
    )
    return data


def _folders(data: Any) -> dict[str, int]:
    """The classes of the folders of a data set of timm; none of other data sets."""
    return dict(getattr(getattr(data, "reader", None), "class_to_idx", {}))


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
    folders, stored = _folders(unmapped), mapped
    if config.cache:
        mapped, unmapped = _cached(mapped, unmapped, transform)
        transform = None
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
        mixing.MixedDataset(mapped, unmapped, transform=transform),
        MicroBatches(sampler, parts),
        workers=config.workers,
        pin_memory=world.device.type == "cuda",
    )
    return Training(batches, sampler, images_per_update, sources, folders, stored)


def _cached(mapped: Any, unmapped: Any, transform: Any) -> tuple[Any, Any]:
    """Both sources in memory, resized once.

    In one thread: a mixed data set seeds the process's random numbers for each sample.
    """
    both = mixing.MixedDataset(mapped, unmapped, transform=transform)
    sizes = [(True, mapped), (False, unmapped)]
    return tuple(
        None if part is None else memory.InMemory(_Part(both, kind, len(part)), threads=1)
        for kind, part in sizes
    )


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
        tests[name] = _share(cached, data, config, world)
    if config.data_dir is not None and config.val_split:
        around = round(form.size / form.crop_pct)
        middle = v2.Compose([v2.Resize(around, antialias=True), v2.CenterCrop(form.size)])
        images: Any = _images(config, config.val_split, "val_split")
        own = _folders(images)
        if folders and own != folders:
            unknown = sorted(own.keys() - folders.keys())
            expect(
                not unknown,
                f"val_split: expected classes that are trained on, got {', '.join(unknown[:5])}",
            )
            images.reader = _relabelled(images.reader, folders)
        data = mixing.MixedDataset(None, images, transform=augmentation.JointTransform(middle))
        expect("images" not in tests, "clickme_val: expected another name than 'images', which "
               "those without human maps have")  # fmt: skip
        tests["images"] = _share(data, None, config, world)
    return tests


def _relabelled(reader: Any, folders: dict[str, int]) -> Any:
    """A reader of folders, some of which are missing, with the labels that all of them give."""
    names = {label: name for name, label in reader.class_to_idx.items()}
    reader.samples = [(path, folders[names[label]]) for path, label in reader.samples]
    reader.class_to_idx = folders
    return reader


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


def _share(data: Any, stored: Any, config: Config, world: World) -> Test:
    """Every ``world.size``-th row from this process's own on."""
    rows = list(range(world.rank, len(data), world.size))
    count = len(rows)
    # Under FSDP2 a forward pass is an affair of all processes: all have equally many.
    rows += [0] * (-(-len(data) // world.size) - count)
    if isinstance(data, mixing.MixedDataset):
        rows = [mixing.Draw(False, row, 0) for row in rows]
    chunks = [rows[i : i + config.batch_size] for i in range(0, len(rows), config.batch_size)]
    batches = loader.create_loader(
        data, chunks, workers=config.workers, pin_memory=world.device.type == "cuda"
    )
    return Test(batches, count, stored)


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


def create_mixup(config: Config) -> Mixup | None:
    """Mixup of the configuration, or None."""
    if not config.mixup:
        return None
    return Mixup(config.mixup, config.num_classes, prob=config.mixup_prob, seed=config.seed)
