"""Which files there are: links followed once, everywhere; one answer on what kind they are."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import extras
import numpy as np
import pytest

if (reason := extras.why_no_train()) is not None:
    pytest.skip(reason, allow_module_level=True)

import prepare_clickme
import reveal_experiment
import torch
from clickme_shards import click_map, framed, jpeg, picture, record
from evaluating.data import FolderOfMaps, ImageSet
from test_clickme_formats import save_npz, save_pth, write_tar
from training import config, data

from harmonizer_ext.clickme import ClickMe, ClickMeFiles, ClickMeWebDataset
from harmonizer_ext.files.listing import walk

JPEG = jpeg(picture(1)[:16, :16])


def trained_on(root: Path, dataset: str = "") -> list[tuple[str, int]]:
    """Names and labels of what train.py takes from a folder with ``train/``."""
    asked = config.Config(
        model="small", clickme=("x",), data_dir=str(root), dataset=dataset, num_classes=10
    )
    images = data._images(asked, "train", "train_split")
    samples = images.samples if hasattr(images, "samples") else images.reader.samples
    return [
        (str(Path(path).relative_to(root.absolute() / "train")), label) for path, label in samples
    ]


def evaluated_on(folder: Path) -> list[str]:
    return FolderOfMaps(folder).names


# ---------------------------------------------------------------------------- links


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Three classes of two images, with maps, kept elsewhere."""
    for part in ("images", "maps"):
        for name in ("0", "1", "2"):
            (tmp_path / "store" / part / name).mkdir(parents=True)
            for number in range(2):
                place = tmp_path / "store" / part / name / f"{number}"
                if part == "images":
                    place.with_suffix(".jpg").write_bytes(JPEG)
                else:
                    np.save(place.with_suffix(".npy"), np.ones((16, 16)))
    return tmp_path / "store"


def linked(store: Path, place: Path, names: str = "012") -> Path:
    """``train/``, and ``images/`` with ``maps/``, whose folders of these names are links."""
    for part, kind in (("train", "images"), ("images", "images"), ("maps", "maps")):
        (place / part).mkdir(parents=True)
        for name in "012":
            target = store / kind / name
            if name in names:
                (place / part / name).symlink_to(target)
                continue
            (place / part / name).mkdir()
            for file in target.iterdir():
                (place / part / name / file.name).write_bytes(file.read_bytes())
    return place


EVERYTHING = [f"{name}/{number}" for name in "012" for number in range(2)]


@pytest.mark.parametrize("names", ["012", "1", "02", ""])
def test_folders_of_classes_may_be_links(store: Path, tmp_path: Path, names: str) -> None:
    folder = linked(store, tmp_path / "place", names)
    expected = [(f"{name}.jpg", int(name[0])) for name in EVERYTHING]
    assert trained_on(folder) == expected
    assert trained_on(folder, "torch/folder") == expected
    assert evaluated_on(folder) == EVERYTHING
    assert len(list(reveal_experiment.read_pictures(folder))) == 6
    assert len(ImageSet(folder)) == 6


@pytest.mark.parametrize("what", ["split", "root", "file"])
def test_other_links(store: Path, tmp_path: Path, what: str) -> None:
    """Links to a whole split, to all of it, and to single images."""
    place = tmp_path / "place"
    if what == "file":
        linked(store, place, "")
        for part, suffix in (("train", "jpg"), ("images", "jpg"), ("maps", "npy")):
            file = place / part / f"1/0.{suffix}"
            moved = tmp_path / f"{part}-{file.name}"
            file.rename(moved)
            file.symlink_to(moved)
    elif what == "split":
        place.mkdir()
        for part, kind in (("train", "images"), ("images", "images"), ("maps", "maps")):
            (place / part).symlink_to(store / kind)
    else:
        place.symlink_to(linked(store, tmp_path / "real"))
    assert [name for name, _ in trained_on(place)] == [f"{name}.jpg" for name in EVERYTHING]
    assert evaluated_on(place) == EVERYTHING


@pytest.mark.parametrize(
    ("link", "target"),
    [("1/again", "."), ("1/up", ".."), ("again", "."), ("1/far", "../../.."), ("1/self", "self")],
)
def test_circles_are_walked_once(store: Path, tmp_path: Path, link: str, target: str) -> None:
    folder = linked(store, tmp_path / "place", "")
    for part in ("train", "images", "maps"):
        (folder / part / link).symlink_to(target)
    listed = [str(Path(path).relative_to(folder / "images")) for path in walk(folder / "images")]
    files = [name for name in listed if name.endswith(".jpg")]
    if link == "1/far":  # to where the other folders are, which are read once more, and no more
        assert len(set(files)) == len(files) == 6 + 12
    else:
        assert files == [f"{name}.jpg" for name in EVERYTHING]
        assert [name for name, _ in trained_on(folder)] == [f"{name}.jpg" for name in EVERYTHING]
        assert [name for name, _ in trained_on(folder, "torch/folder")] == files
        assert evaluated_on(folder) == EVERYTHING


def test_two_links_to_one_folder_are_both_read(store: Path, tmp_path: Path) -> None:
    """They are read as the names say; it is the circle that is not followed."""
    folder = linked(store, tmp_path / "place", "")
    (folder / "train/3").symlink_to(store / "images/1")
    assert [name for name, label in trained_on(folder) if label == 3] == ["3/0.jpg", "3/1.jpg"]


def test_a_maze_of_links_ends(tmp_path: Path) -> None:
    """Twenty folders with links to one another: 20! ways."""
    for part in ("train", "images"):
        for one in range(20):
            (tmp_path / part / f"{one}").mkdir(parents=True)
            (tmp_path / part / f"{one}/a.jpg").write_bytes(JPEG)
            for other in range(20):
                (tmp_path / part / f"{one}/to{other}").symlink_to(tmp_path / part / f"{other}")
    (tmp_path / "maps").mkdir()
    start = time.monotonic()
    for read in (trained_on, evaluated_on):
        with pytest.raises(ValueError, match=r"links that lead to .* by more than 64 ways"):
            read(tmp_path)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("kind", ["nowhere", "itself", "pipe", "device", "folder"])
def test_what_is_no_file_is_named(store: Path, tmp_path: Path, kind: str) -> None:
    """It is not left out in silence, and not waited for."""
    import os

    folder = linked(store, tmp_path / "place", "")
    for part in ("train", "images"):
        path = folder / part / "1/0.jpg"
        path.unlink()
        {
            "nowhere": lambda path=path: path.symlink_to(tmp_path / "nowhere"),
            "itself": lambda path=path: path.symlink_to(path),
            "pipe": lambda path=path: os.mkfifo(path),
            "device": lambda path=path: path.symlink_to("/dev/zero"),
            "folder": lambda path=path: path.mkdir(),
        }[kind]()
    if kind == "folder":  # empty, whatever its name
        assert len(trained_on(folder)) == 5
        return
    asked = config.Config(model="small", clickme=("x",), data_dir=str(folder), num_classes=10)
    images = data._images(asked, "train", "train_split")
    with pytest.raises(ValueError, match=r"train/1/0\.jpg: "):
        images[2]
    with pytest.raises(ValueError, match=r"images/1/0\.jpg: "):
        FolderOfMaps(folder)[2]


def test_capitals_alone_make_two_classes(tmp_path: Path) -> None:
    """They come in one order, whatever the hashes of this process."""
    for name in ("cat", "Cat", "dog", "DOG"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "a.jpg").write_bytes(JPEG)
    assert trained_on(tmp_path) == [
        ("Cat/a.jpg", 0), ("cat/a.jpg", 1), ("DOG/a.jpg", 2), ("dog/a.jpg", 3),
    ]  # fmt: skip


# ---------------------------------------------------------------------------- kinds


KINDS: dict[str, Callable[[Path], Any]] = {
    "tfrecords": lambda f: (f / "a.tfrecords").write_bytes(framed(record(0))),
    "tar": lambda f: write_tar(
        f / "a.tar", {"a.jpg": jpeg(picture(1)), "a.heatmap.jpg": jpeg(click_map(1)), "a.cls": b"1"}
    ),
    "npz": lambda f: save_npz(f / "a.npz", 1),
    "pth": lambda f: save_pth(f / "b.pth", 1),
    "folder": lambda f: [(f / part).mkdir() for part in ("images", "maps")],
}


def open_for_training(path: Path) -> Any:
    asked = config.Config(model="small", clickme=("x",))
    return data.open_clickme((str(path),), "clickme", asked, "released", None)


def convert(path: Path) -> Any:
    prepare_clickme._convert(
        prepare_clickme._parser().parse_args(["convert", str(path), "--output", str(path / "out")])
    )


READERS: dict[str, Callable[[Path], Any]] = {
    "ClickMe": ClickMe,
    "ClickMeFiles": lambda path: ClickMeFiles(path, preprocess=None),
    "ClickMeWebDataset": ClickMeWebDataset,
    "evaluation": ImageSet,
    "training": open_for_training,
    "reveal": lambda path: list(reveal_experiment.read_pictures(path)),
    "convert": convert,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "kinds",
    [
        ("tfrecords", "npz"),
        ("tfrecords", "tar"),
        ("npz", "tar", "pth"),
        ("tar", "tfrecords", "npz"),
    ],
)
def test_several_kinds_are_refused_with_their_counts(
    tmp_path: Path, reader: str, kinds: tuple[str, ...]
) -> None:
    for kind in kinds:
        KINDS[kind](tmp_path)
    (tmp_path / "c.npz" if "npz" in kinds else tmp_path / "c.tar").write_bytes(b"x")
    (tmp_path / ".hidden.npz").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("not data")
    counts = {
        ("tfrecords", "npz"): "2 files and 1 tfrecords",
        ("tfrecords", "tar"): "2 tar and 1 tfrecords",
        ("npz", "tar", "pth"): "3 files and 1 tar",
        ("tar", "tfrecords", "npz"): "2 files and 1 tar and 1 tfrecords",
    }[kinds]
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        READERS[reader](tmp_path)
    if isinstance(error.value, FileNotFoundError):  # none of the kind that this reader reads
        assert {"ClickMe": "tfrecords", "convert": "tfrecords"}.get(reader, "x") not in kinds
    else:
        assert f"expected files of one kind, got {counts} in {tmp_path}" in str(error.value)


def test_a_folder_of_maps_beside_shards(tmp_path: Path) -> None:
    for kind in ("folder", "tfrecords"):
        KINDS[kind](tmp_path)
    for reader in ("evaluation", "reveal"):
        with pytest.raises(ValueError, match="got 1 folder and 1 tfrecords in"):
            READERS[reader](tmp_path)


def test_kinds_from_several_places(tmp_path: Path) -> None:
    for kind in ("tfrecords", "npz"):
        (tmp_path / kind).mkdir()
        KINDS[kind](tmp_path / kind)
    both: Any = [tmp_path / "tfrecords", tmp_path / "npz"]
    pattern = str(tmp_path / "*/a.*")
    for paths in (both, pattern):
        with pytest.raises(ValueError, match="got 1 files and 1 tfrecords in"):
            ImageSet(paths)
    for read in (ClickMe, lambda p: ClickMeFiles(p, preprocess=None)):
        with pytest.raises(ValueError, match="got 1 files and 1 tfrecords in"):
            read(pattern)
        with pytest.raises(FileNotFoundError, match="files, found none at"):
            read(both)


def test_one_kind_is_read_by_all_alike(tmp_path: Path) -> None:
    """Archives and dictionaries are one kind; shards may be named as TFDS and the authors do."""
    for name, kinds in (("shards", ("tfrecords",)), ("files", ("npz", "pth")), ("tar", ("tar",))):
        (tmp_path / name).mkdir()
        for kind in kinds:
            KINDS[kind](tmp_path / name)
    content = (tmp_path / "shards/a.tfrecords").read_bytes()
    for name in ("b.tfrecord", "c.tfrecord-00000-of-00001", "d.tfrecords-00001-of-00002"):
        (tmp_path / "shards" / name).write_bytes(content)
    for read in (ClickMe, ImageSet, open_for_training):
        assert len(read(tmp_path / "shards")) == 4
    for read in (lambda p: ClickMeFiles(p, preprocess=None), ImageSet):
        assert len(read(tmp_path / "files")) == 2
    assert ImageSet(tmp_path / "tar").kind == "tar"
    assert prepare_clickme.main(["verify", str(tmp_path / "shards")]) == 0
    # The cache of the authors' own package has no suffix.
    (tmp_path / "clickme_val_17").write_bytes(content)
    for path in (tmp_path / "clickme_val_17", str(tmp_path / "clickme_val_*")):
        for read in (ClickMe, ImageSet, open_for_training):
            assert len(read(path)) == 1


def test_names_that_look_like_patterns(tmp_path: Path) -> None:
    """A path that exists is that file; one that does not is a pattern."""
    for name in ("a[1].tfrecords", "a1.tfrecords", "*.tfrecords"):
        (tmp_path / name).write_bytes(framed(record(0)))
    assert ClickMe(tmp_path / "a[1].tfrecords").paths == [tmp_path / "a[1].tfrecords"]
    assert ClickMe(tmp_path / "*.tfrecords").paths == [tmp_path / "*.tfrecords"]
    assert ClickMe(str(tmp_path / "a?.tfrecords")).paths == [tmp_path / "a1.tfrecords"]
    assert len(ClickMe(tmp_path).paths) == 3


def test_a_class_map_is_text(tmp_path: Path) -> None:
    """A pickle of timm's form is read, one that would run code is not."""
    import os
    import pickle

    from training.images import read_class_map

    class Runs:
        def __reduce__(self) -> Any:
            return os.system, (f"touch '{tmp_path}/ran'",)

    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"b": 0, "a": 1}))
    assert read_class_map("a.pkl", str(tmp_path)) == {"b": 0, "a": 1}
    (tmp_path / "a.txt").write_text("b\na\n")
    assert read_class_map("a.txt", "nowhere", str(tmp_path)) == {"b": 0, "a": 1}
    for content in (Runs(), {"a": Runs()}, {"a": torch.nn.Linear(1, 1)}, ["a"], {"a": "b"}):
        (tmp_path / "b.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match="class_map: "):
            read_class_map(str(tmp_path / "b.pkl"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["b", "b.v2"])
def test_a_link_to_a_folder_that_is_not_there(tmp_path: Path, name: str) -> None:
    """A class less would give all that follow it other numbers."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_bytes(b"")
    for hidden in (".lock", "2.jpg"):  # whoever reads the latter is told
        (tmp_path / "a" / hidden).symlink_to("/not/mounted/lock")
    assert len(list(walk(tmp_path, (".jpg",)))) == 3
    (tmp_path / name).symlink_to("/not/mounted/b")
    with pytest.raises(ValueError, match=rf"{name}: .* link to /not/mounted/b.* mount it") as error:
        list(walk(tmp_path, (".jpg",)))
    assert str(tmp_path) in str(error.value)


# ---------------------------------------------------------------------------- none left out


def test_pictures_of_all_kinds_that_are_opened(tmp_path: Path) -> None:
    import PIL.Image

    ends = ("tif", "gif", "jpe", "jfif", "ppm", "JPG", "png", "webp")
    for part in ("images/0", "maps/0"):
        (tmp_path / part).mkdir(parents=True)
    for number, end in enumerate(ends):
        PIL.Image.new("RGB", (16, 16)).save(tmp_path / f"images/0/{number}.{end}")
        np.save(tmp_path / f"maps/0/{number}.npy", np.ones((16, 16), np.float32))
    found = FolderOfMaps(tmp_path)
    assert len(found) == len(ends)
    assert all(found[row].image.shape == (3, 16, 16) for row in range(len(ends)))


@pytest.mark.parametrize(
    "other", ["a.tfrecords.gz", "a.tar.gz", "a.tgz", "a.zip", "b.npz.xz", "A.TGZ", "more/b.npz"]
)
def test_files_that_would_be_left_out_are_named(tmp_path: Path, other: str) -> None:
    save_npz(tmp_path / "0.npz", 0)
    for harmless in ("README.md", "index.json", "labels.csv", "log.txt.gz", ".hidden.gz"):
        (tmp_path / harmless).write_bytes(b"")
    assert len(ImageSet(tmp_path)) == 1
    (tmp_path / other).parent.mkdir(exist_ok=True)
    (tmp_path / other).write_bytes(b"")
    with pytest.raises(ValueError, match=r"data: expected all files .*, got 1 (packed|in the fo)"):
        ImageSet(tmp_path)
    assert len(ImageSet(tmp_path / "*.npz")) == 1


def test_names_in_capitals_and_files_named_twice(tmp_path: Path) -> None:
    for number in range(2):
        save_npz(tmp_path / f"{number}.npz", number)
    (tmp_path / "1.npz").rename(tmp_path / "1.NPZ")
    assert ImageSet(tmp_path).at(224)[1].label == 1
    assert len(ImageSet(tmp_path)) == 2
    (tmp_path / "TRAIN.TFRECORDS").write_bytes(b"")
    with pytest.raises(ValueError, match="got 2 files and 1 tfrecords"):
        ImageSet(tmp_path)
    # The same name as often as one likes, not two names.
    assert len(ImageSet([tmp_path / "0.npz"] * 2)) == 2
    for twice in (tmp_path / "?.npz", f"{tmp_path}/../{tmp_path.name}/0.npz"):
        with pytest.raises(ValueError, match=r"expected every file once, got .*0\.npz 2 times"):
            ImageSet([tmp_path / "0.npz", twice])
