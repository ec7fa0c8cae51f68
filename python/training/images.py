"""Images without human maps: folders of classes, or what timm reads, all through one door."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from typing import Any

import timm_networks
from torch import Tensor
from torch.utils.data import Dataset

from harmonizer_ext.files.images import open_image, read_image, rgb_pixels
from harmonizer_ext.files.listing import walk
from harmonizer_ext.files.reading import UnreadableError, open_file, reading
from harmonizer_ext.files.rehearsal import Rehearsal
from harmonizer_ext.files.tables import read_lines
from harmonizer_ext.files.tar import members
from harmonizer_ext.files.text import shown
from training.config import expect

timm_networks.import_torchvision()
from timm.data import create_dataset  # noqa: E402
from timm.data.readers.img_extensions import get_img_extensions  # noqa: E402
from torchvision.datasets.folder import IMG_EXTENSIONS  # noqa: E402

#: Names of directories that timm takes for the same split.
_SYNONYMS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"))
#: Prefixes of timm's data sets that are streams.
_STREAMS = ("hfids", "tfds", "wds")


def open_images(
    root: str, dataset: str, split: str, *, argument: str, class_map: str, max_bytes: int
) -> Dataset[Any]:
    """A split of images without human maps, by number: (image, label).

    Nothing is ever given in the place of an image that cannot be read; that is an error.

    Args:
        root: folder of all splits, or what timm takes for ``dataset``.
        dataset: timm's name; "" or "folder" for folders.
        split: its name.
        argument: that gave the split, for the texts of errors.
        class_map: file with the classes, as in timm; "" for none.
        max_bytes: of the pixels of an image.

    Raises:
        FileNotFoundError, ValueError: it is not there, or is a stream. (timm would take all of
            DATA_DIR for a split that it does not find.)
    """
    expect(os.path.exists(root), f"data_dir: expected a directory, found none at {shown(root)}",
           FileNotFoundError)  # fmt: skip
    prefix, slash, rest = dataset.partition("/")
    expect(
        not slash or prefix.lower() not in _STREAMS,
        f"dataset: expected one with random access (folders, hfds/NAME), got {dataset!r}; a "
        "stream cannot be resumed to the image; harmonizer_ext.data.streams.MixedStream mixes it "
        "in a loop of your own",
    )
    # From here on a path, whatever its name begins with.
    absolute = os.path.abspath(root)
    torchvisions = prefix.lower() == "torch" and rest.lower() in ("folder", "image_folder")
    if os.path.isdir(root) and (not slash or torchvisions):
        needs_split = dataset in ("", "folder")
        absolute = _split_folder(absolute, split, argument if needs_split else "")
        numbers = read_class_map(class_map, root, absolute) if class_map else None
        return Folders(absolute, numbers, max_bytes=max_bytes, top=torchvisions)
    if class_map:
        class_map = _class_map_path(class_map, root)
    return _read_by_timm(absolute, dataset, split, argument, class_map, max_bytes)


def _split_folder(root: str, split: str, argument: str) -> str:
    """The folder of a split, or ``root`` where there is none and no argument asked for it."""
    names = (split, *next((group for group in _SYNONYMS if split in group), ()))
    there = [name for name in names if os.path.isdir(os.path.join(root, name))]
    hint = "; --val-split '' evaluates on none of these" if argument == "val_split" else ""
    expect(
        bool(there) or not argument,
        f"{argument}: expected a directory {shown(split)}/ in --data-dir {shown(root)}, found "
        f"none{hint}",
        FileNotFoundError,
    )
    return os.path.join(root, *there[:1])


class Folders(Dataset[Any]):
    """Images in a folder for each class, in the order and with the labels that timm gives them.

    Links to folders are followed, but not round in circles.

    Args:
        root: the folder of the classes.
        numbers: of the classes by their names; None numbers them in natural order. Folders of
            other classes are left out, as timm does.
        max_bytes: of the pixels of an image.
        top: as torchvision's ImageFolder has it: a class is a folder in ``root``, whatever lies
            below it, more kinds of files are images, and the order is that of the alphabet.

    Raises:
        ValueError: there are no images; torchvision's way, a class without an image.
    """

    def __init__(
        self, root: str, numbers: dict[str, int] | None, *, max_bytes: int, top: bool = False
    ) -> None:
        self.max_bytes = max_bytes
        self.top = top
        suffixes = tuple(IMG_EXTENSIONS) if top else tuple(get_img_extensions())
        found = list(_by_class(root, suffixes, top))
        expect(
            bool(found),
            f"data_dir: expected a folder of images ({', '.join(suffixes)}) for each class, got "
            f"none in {shown(root)}",
        )
        names = {name for _, name in found}
        if top:
            empty = sorted(_classes(root) - names)
            expect(not empty, f"data_dir: expected images of every class, got none of {empty[:5]}")
        else:
            found.sort(key=lambda item: _natural(item[0]))
        order = sorted(names) if top else sorted(names, key=_natural)
        #: Number of each class by its name.
        self.class_to_idx = numbers or {name: number for number, name in enumerate(order)}
        numbers = self.class_to_idx
        self.samples = [(path, numbers[name]) for path, name in found if name in numbers]
        expect(bool(self.samples), f"class_map: expected classes of the folders in {shown(root)}")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return read_image(path, self.max_bytes), label

    def relabel(self, class_to_idx: dict[str, int]) -> None:
        """Gives the classes other numbers."""
        names = {label: name for name, label in self.class_to_idx.items()}
        self.samples = [(path, class_to_idx[names[label]]) for path, label in self.samples]
        self.class_to_idx = class_to_idx


def _by_class(root: str, suffixes: tuple[str, ...], top: bool) -> Iterator[tuple[str, str]]:
    """Paths with the names of their classes; torchvision takes none outside of any folder."""
    for path in walk(root, suffixes):
        if os.path.splitext(path)[1].lower() in suffixes:
            parts = os.path.relpath(path, root).split(os.sep)[:-1]
            if parts or not top:
                yield path, parts[0 if top else -1] if parts else ""


def _classes(root: str) -> set[str]:
    """Names of the folders in one, without links that lead back to it or above it."""
    own = os.path.realpath(root) + os.sep
    return {
        entry.name
        for entry in os.scandir(root)
        if entry.is_dir() and not own.startswith(os.path.realpath(entry.path) + os.sep)
    }


def _natural(text: str) -> tuple[list[int | str], str]:
    """timm's order, in which names that differ in capitals alone have a place of their own too."""
    parts = re.split(r"(\d+)", text.lower())
    return [int(part) if part.isdecimal() else part for part in parts], text


def read_class_map(class_map: str, *folders: str) -> dict[str, int]:
    """Numbers of classes: the lines of a text file, or a pickled dictionary, as timm has them.

    Args:
        class_map: path of the file, as it is or in one of the folders.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another kind of file; a pickle that holds anything but texts and numbers.
    """
    path = _class_map_path(class_map, *folders)
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".txt":
        lines = read_lines(path)
        return {
            line.strip(): number
            for number, line in enumerate(lines)
            if line or number < len(lines) - 1
        }
    expect(suffix == ".pkl", f"class_map: expected a .txt or .pkl file, got {shown(path)}")
    with open_file(path) as file, reading(f"class_map: {shown(path)}", "a pickled dictionary"):
        # Names in it are noted, nothing is made of them.
        pickled = Rehearsal(file, os.fstat(file.fileno()).st_size)
        content = pickled.load()
    plain = isinstance(content, dict) and all(isinstance(n, int) for n in content.values())
    if pickled.names or not plain:
        raise UnreadableError(f"class_map: expected names and numbers alone, got {shown(path)}")
    return dict(content)


def _class_map_path(class_map: str, *folders: str) -> str:
    places = [class_map, *(os.path.join(folder, class_map) for folder in folders)]
    found = next(filter(os.path.isfile, places), None)
    if found is None:
        raise FileNotFoundError(f"class_map: expected a file, found none at {shown(class_map)}")
    return os.path.abspath(found)


def _read_by_timm(
    root: str, dataset: str, split: str, argument: str, class_map: str, max_bytes: int
) -> Dataset[Any]:
    options: dict[str, Any] = {}
    if os.path.isfile(root):
        check_archive(root)
        options["cache_tarinfo"] = False  # which would be a pickle beside the archive
    data = create_dataset(
        dataset,
        root=root,
        split=split,
        search_split=False,
        is_training=argument == "train_split",
        class_map=class_map,
        **options,
    )
    if hasattr(data, "reader"):
        return ByReader(data.reader, max_bytes)
    if hasattr(data, "loader"):  # torchvision's
        data.loader = functools.partial(read_image, max_bytes=max_bytes)
    return data


def check_archive(path: str) -> None:
    """Whether a tar archive of images, and those within it, is one that tarfile may read.

    Raises:
        UnreadableError: it is compressed, damaged, or has sparse files.
    """
    with open_file(path) as file:
        for _ in members(file, path):
            pass


class ByReader(Dataset[Any]):
    """What a reader of timm's finds, its pictures opened here.

    Args:
        reader: gives by number a file and a label.
        max_bytes: of the pixels of an image.
    """

    def __init__(self, reader: Any, max_bytes: int) -> None:
        self.reader = reader
        self.max_bytes = max_bytes
        self.class_to_idx = dict(getattr(reader, "class_to_idx", {}))

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        source, label = self._found(index)
        name = f"image {index}"
        if isinstance(source, str):
            name = f"{name}, {shown(source)}"
        with open_image(source, name, max_bytes=self.max_bytes) as image:
            return rgb_pixels(image, name, self.max_bytes), -1 if label is None else label

    def _found(self, index: int) -> tuple[Any, Any]:
        reader = self.reader
        if not hasattr(reader, "dataset"):
            file, label, *_ = reader[index]
            return file, label
        # Of Hugging Face's data sets: the content of the file, or the path of one.
        item = reader.dataset[index]
        stored = item[reader.image_key]
        source = stored["bytes"] or stored["path"]
        if source is None:
            raise UnreadableError(f"image {index}: expected a picture or its path, got neither")
        if hasattr(reader, "_get_target"):
            return source, reader._get_target(item)
        label = item[reader.label_key]
        return source, reader.class_to_idx[label] if reader.remap_class else label
