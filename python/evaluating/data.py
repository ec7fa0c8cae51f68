"""Images with human maps: ClickMe and Clicktionary files, or a folder of images and maps."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm_networks
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import harmonizer_ext as hx
from evaluating.tar_shards import TarShards
from harmonizer_ext.clickme.kinds import KINDS, find_files
from harmonizer_ext.files.arrays import read_npy
from harmonizer_ext.files.images import finite_map, read_image, read_map, suffixes
from harmonizer_ext.files.listing import walk
from harmonizer_ext.files.reading import MAX_BYTES, UnreadableError
from harmonizer_ext.files.tables import read_lines, read_rows
from harmonizer_ext.files.text import shown

timm_networks.import_torchvision()
from timm.data import ImageNetInfo  # noqa: E402

from harmonizer_ext.data import augmentation, loader  # noqa: E402

#: The side that the released preprocessing gives; other sides are resized to, by ``ImageSet.at``.
RELEASED_SIZE = 224
#: Files of human maps in a folder.
_MAPS = (".npy", ".png")


class ImageSet:
    """Images, human maps and labels to evaluate on, at any size.

    Kinds, told apart by their files:

    - TFRecord shards as the authors release them (ClickMe; Clicktionary in the same form),
      WebDataset shards (``.tar``), or a file per image (``.npz``, ``.pth``). The human maps are
      blurred as released. At 224 pixels images and maps are exactly the released ones; at another
      size both are resized, with antialiasing.
    - A folder with ``images/NAME.jpg`` (or png, webp, bmp, gif, ppm, tif) and ``maps/NAME.png``
      (8 or 16 bit grey) or ``maps/NAME.npy`` (H, W); see ``FolderOfMaps``. Maps are as they are;
      the shorter side is resized, and the square in the middle taken, of image and map alike.

    Several kinds in one place are refused.

    Args:
        paths: a file, a directory, a glob pattern, or several of these, all of one kind.
        name: what the report calls the data; None takes it from the paths.
        max_images: so many of the images, at equal distances; None takes all.
        decoder: of JPEGs in shards, as in ``harmonizer_ext.clickme.ClickMe``: None is that of the
            released pipeline, where it is installed.
        max_bytes: that a record, or an image, may take in memory.

    Raises:
        FileNotFoundError, ValueError: there are no such files, or they are of several kinds.
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        name: str | None = None,
        max_images: int | None = None,
        decoder: Literal["pillow", "simplejpeg", "simplejpeg-fast"] | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        several = not isinstance(paths, str | os.PathLike)
        self.paths = [os.fspath(path) for path in (paths if several else [paths])]
        self.kind, self._files = find_data(self.paths)
        if self.kind == "folder" and len(self._files) > 1:
            raise ValueError(f"data: expected one folder of images and maps, got {self.paths}")
        self.decoder = decoder
        self.max_bytes = max_bytes
        self.name = name or ", ".join(self.paths)
        opened = self.at(RELEASED_SIZE)
        self.total = len(opened)
        self.decoder = getattr(opened, "decoder", None)
        #: Number of classes, where their numbers are nothing but their places in the alphabet.
        self.alphabetical: int | None = getattr(opened, "alphabetical", None)
        self.listed: int | None = getattr(opened, "listed", None)
        #: Whether the labels are numbers of ImageNet-1k's classes, as ClickMe's are.
        self.imagenet: bool = getattr(opened, "imagenet", self.kind != "folder")
        if max_images is not None and max_images < 1:
            raise ValueError(f"max_images: expected 1 or more, got {max_images}")
        count = min(max_images or self.total, self.total)
        #: Numbers of the images that are evaluated on, ascending.
        self.rows = [row * self.total // count for row in range(count)]

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, size: int) -> Dataset[Any]:
        """The whole data set for a network of this input size: ``ClickMeSample`` by number."""
        options: dict[str, Any] = {"max_bytes": self.max_bytes}
        if self.kind == "folder":
            transform = augmentation.evaluation_transform(size)
            return FolderOfMaps(self._files[0], transform, **options)
        options["preprocess"] = "released"
        if size != RELEASED_SIZE:
            options["preprocess"] = "released-heatmap"
            options["transform"] = augmentation.evaluation_transform(size)
        if self.kind == "tfrecords":
            return hx.clickme.ClickMe(self._files, decoder=self.decoder, **options)
        if self.kind == "tar":
            return TarShards(self._files, decoder=self.decoder, **options)
        return hx.clickme.ClickMeFiles(self._files, **options)

    def batches(
        self, size: int, batch_size: int, *, workers: int, pin_memory: bool
    ) -> DataLoader[Any]:
        """The chosen images in their order."""
        starts = range(0, len(self.rows), batch_size)
        chunks = [self.rows[start : start + batch_size] for start in starts]
        return loader.create_loader(self.at(size), chunks, workers=workers, pin_memory=pin_memory)

    @property
    def preprocessing(self) -> str:
        """How images and human maps were prepared, in words."""
        if self.kind == "folder":
            return (
                "images and maps as they are in the folder, the shorter side resized to the "
                "network's input size with antialiasing, and the square in the middle"
            )
        return (
            "prepared as released: images resized to 224×224; human maps reduced to 64×64, blurred "
            "with a 10×10 Gaussian of standard deviation 10, and resized to 224×224. For networks "
            "of another input size: the map blurred alike, then both resized from the stored size "
            "with antialiasing"
        )


def find_data(paths: Any, argument: str = "data") -> tuple[str, list[Path]]:
    """Kind of what ``ImageSet`` reads at paths ("folder", "tfrecords", "tar", "files"), and files.

    Raises:
        FileNotFoundError, ValueError: nothing of these, or several kinds.
    """
    return find_files(paths, *KINDS, argument=argument, folders=True)


class FolderOfMaps(Dataset[Any]):
    """A folder of images and human maps of the same names.

    The labels come from ``labels.csv`` (columns ``name,label``; the name is the path under
    ``images/`` without its suffix, the label a class number of the networks). Without that file
    from the folders of the classes: ``images/CLASS/NAME.jpg`` and ``maps/CLASS/NAME.png``. There
    the class number is the line of CLASS in ``classes.txt``, counted from 0; or CLASS itself,
    where all are numbers; or that of ImageNet-1k, where all are WordNet's ("n02086240"); or its
    place in alphabetical order, as torchvision has it, which serves networks of so many classes.

    Links to folders are followed. Images become RGB of 8 bits and are turned as they are displayed
    (EXIF); their maps are those of the displayed images.

    Args:
        folder: with ``images/`` and ``maps/``.
        transform: called with each ``ClickMeSample``: image (3, H, W) uint8, heatmap (1, H, W)
            float32 of the image's size, label, token.
        max_bytes: that an image, or a map, may take in memory.

    Raises:
        ValueError: images without a map or a label, or none at all; two files of one name; a
            folder with a WordNet name that ImageNet-1k does not have; a label that is no number.
            Indexing raises it for an image or a map that cannot be read, and for a map of other
            proportions than its image, naming the files.
    """

    #: Number of classes, where the labels are their places in alphabetical order.
    alphabetical: int | None = None
    #: Number of classes, where the labels are their places in classes.txt.
    listed: int | None = None
    #: Whether the labels are numbers of ImageNet-1k's classes.
    imagenet = False

    def __init__(
        self,
        folder: str | os.PathLike[str],
        transform: Any = None,
        *,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.folder = Path(folder)
        self.transform = transform
        self.max_bytes = max_bytes
        images = _by_name(self.folder / "images", suffixes())
        if not images:
            raise ValueError(f"data: expected images in {shown(self.folder / 'images')}, got none")
        maps = _by_name(self.folder / "maps", _MAPS)
        labels = self._labels(list(images))
        for what, found in (("map", maps), ("label", labels)):
            missing = [name for name in images if name not in found]
            if missing:
                raise ValueError(
                    f"data: expected a {what} for every image of {shown(self.folder)}, got none "
                    f"for {len(missing)}, the first is {missing[0]!r}"
                )
        #: Paths under ``images/``, without suffix, in order.
        self.names = list(images)
        self._files = [(images[name], maps[name], labels[name]) for name in images]

    def _labels(self, names: list[str]) -> dict[str, int]:
        table = self.folder / "labels.csv"
        if table.is_file():
            labels: dict[str, int] = {}
            for row in read_rows(table, ("name", "label"), "data"):
                label = _label(row["label"], table, row["name"])
                if labels.setdefault(row["name"], label) != label:
                    raise ValueError(
                        f"{shown(table)}: expected one label for {shown(row['name'])}, got "
                        f"{labels[row['name']]} and {label}"
                    )
            return labels
        without = [name for name in names if "/" not in name]
        if without:
            raise ValueError(
                f"data: expected {shown(table)} with columns name,label, or images in folders of "
                f"their classes, got {len(without)} images outside of any, the first is "
                f"{without[0]!r}"
            )
        classes = sorted({name.split("/")[0] for name in names})
        listed = self.folder / "classes.txt"
        if listed.is_file():
            numbers = {line: row for row, line in enumerate(read_lines(listed))}
            self.listed = max((row + 1 for line, row in numbers.items() if line), default=0)
        elif all(name.isdecimal() for name in classes):
            numbers = {name: int(name) for name in classes}
        elif all(re.fullmatch(r"n\d{8}", name) for name in classes):
            numbers = {name: row for row, name in enumerate(ImageNetInfo().label_names())}
            self.imagenet = True
            unknown = [name for name in classes if name not in numbers]
            if unknown:
                raise ValueError(
                    f"data: expected folders of ImageNet-1k's classes, got {len(unknown)} others, "
                    f"the first is {unknown[0]}; {shown(listed)}, with a class in each line, "
                    f"numbers them"
                )
        else:
            numbers = {name: row for row, name in enumerate(classes)}
            self.alphabetical = len(classes)
        return {
            name: numbers[name.split("/")[0]] for name in names if name.split("/")[0] in numbers
        }

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Any:
        path, map_path, label = self._files[index]
        pixels = read_image(path, self.max_bytes)
        heatmap = _read_map(map_path, self.max_bytes)
        (height, width), size = heatmap.shape, tuple(pixels.shape[1:])
        if (height, width) != size:
            # To the nearest pixel of the map.
            if abs(width * size[0] / size[1] - height) > 1:
                raise UnreadableError(
                    f"data: expected a map in the proportions of its image, {shown(path)} is "
                    f"{size[0]}x{size[1]}, got {shown(map_path)} of "
                    f"{height}x{width} (height x width, as displayed)"
                )
            heatmap = torch.nn.functional.interpolate(
                heatmap[None, None], size, mode="bilinear", antialias=True
            )[0, 0]
        token = torch.ones((), dtype=torch.float32, device="cpu")
        sample = hx.clickme.ClickMeSample(pixels, heatmap[None], label, token)
        return sample if self.transform is None else self.transform(sample)


def _label(text: str, table: Path, name: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UnreadableError(
            f"{shown(table)}: expected a class number for {shown(name)}, got {shown(text)[:40]!r}"
        ) from None


def _by_name(folder: Path, ends: Sequence[str]) -> dict[str, Path]:
    """Files by their paths in the folder, without suffix."""
    found: dict[str, Path] = {}
    for path in sorted(map(Path, walk(folder, ends))):
        if path.suffix.lower() in ends:
            first = found.setdefault(path.relative_to(folder).with_suffix("").as_posix(), path)
            if first is not path:
                raise ValueError(
                    f"data: expected one file of a name, got {shown(first)} and {shown(path)}"
                )
    return found


def _read_map(path: Path, max_bytes: int) -> Tensor:
    """A map (H, W), float32, with the values that are stored."""
    if path.suffix.lower() != ".npy":
        return read_map(path, max_bytes)
    values = read_npy(path, max_bytes)
    if values.ndim == 3 and values.shape[0] == 1:
        values = values[0]
    if values.ndim != 2 or values.dtype.kind not in "buif" or not values.size:
        raise UnreadableError(
            f"data: expected a map (H, W) of numbers, got {values.dtype} {values.shape} in "
            f"{shown(path)}"
        )
    with np.errstate(over="ignore"):  # told in the next line
        return finite_map(torch.from_numpy(values.astype(np.float32)), path)
