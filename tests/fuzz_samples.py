"""The fuzzed readers of images and human maps: how files are damaged, and how they are read."""

from __future__ import annotations

import dataclasses
import io
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz_guard import is_ours, outside_is_read


@dataclasses.dataclass
class Reader:
    """A reader that is fuzzed.

    Attributes:
        make: draws a case and writes it to the folder.
        read: reads the folder.
    """

    make: Callable[[random.Random, Path], None]
    read: Callable[[Path], Any]


PLAIN: dict[str, Any] = {"preprocess": None}


def samples() -> list[bytes]:
    import clickme_shards

    return [clickme_shards.record(seed) for seed in range(2)]


def framed(data: bytes, length: int | None = None) -> bytes:
    """A record with right checksums, whatever length it claims."""
    from harmonizer_ext.clickme import tfrecord as reader

    size = (len(data) if length is None else length).to_bytes(8, "little")
    pack = struct.Struct("<I").pack
    return size + pack(reader._masked_checksum(size)) + data + pack(reader._masked_checksum(data))


def tfrecord(folder: Path) -> Reader:
    from mutations import NUMBERS, mutated

    from harmonizer_ext.clickme import ClickMe

    whole = b"".join(map(framed, samples()))

    def make(draw: random.Random, folder: Path) -> None:
        content = mutated(draw, whole)
        if draw.random() < 0.2:
            content = framed(samples_once[0], draw.choice(NUMBERS)) + whole
        (folder / "a.tfrecords").write_bytes(content)

    samples_once = samples()
    return Reader(make, lambda f: each(ClickMe(f / "a.tfrecords", verify=False, **PLAIN)))


def record(folder: Path) -> Reader:
    """Records damaged before their checksums were made: the message and the JPEGs within."""
    from mutations import mutated

    from harmonizer_ext.clickme import ClickMe

    whole = samples()
    decoders = ("pillow", "simplejpeg", "simplejpeg-fast")

    def make(draw: random.Random, folder: Path) -> None:
        content = framed(mutated(draw, draw.choice(whole))) + framed(whole[0])
        (folder / "a.tfrecords").write_bytes(content)
        state["decoder"] = draw.choice(decoders)

    state: dict[str, Any] = {"decoder": "pillow"}
    return Reader(
        make, lambda f: each(ClickMe(f / "a.tfrecords", decoder=state["decoder"], **PLAIN))
    )


def each(dataset: Any) -> None:
    """Every sample; the first error after all were tried."""
    first = None
    for number in range(len(dataset)):
        try:
            sample = dataset[number]
        except ValueError as error:
            first = first or error
        else:
            assert sample.image.shape[0] == 3
            assert sample.image.shape[1:] == sample.heatmap.shape[1:]
    if first is not None:
        raise first


def index(folder: Path) -> Reader:
    from mutations import PICKLED, mutated, zip_with

    from harmonizer_ext.clickme import ClickMe

    (folder / "a.tfrecords").write_bytes(b"".join(map(framed, samples())))
    ClickMe(folder / "a.tfrecords", index_cache=folder / "index.pt")
    whole = (folder / "index.pt").read_bytes()

    def make(draw: random.Random, folder: Path) -> None:
        content = zip_with(
            whole, lambda n, c: mutated(draw, c, PICKLED) if draw.random() < 0.4 else c, False
        )
        (folder / "index.pt").write_bytes(content)

    return Reader(
        make, lambda f: each(ClickMe(f / "a.tfrecords", index_cache=f / "index.pt", **PLAIN))
    )


def tar(folder: Path) -> Reader:
    import bombs
    from clickme_shards import click_map, jpeg, picture
    from evaluating.tar_shards import TarShards
    from mutations import mutated, tar_checksums

    from harmonizer_ext.clickme import ClickMeWebDataset

    parts = {"jpg": jpeg(picture(1)), "heatmap.jpg": jpeg(click_map(1)), "cls": b"7"}
    whole = bombs.tar_of(
        *((bombs.plain(f"{key}.{name}"), part) for key in "ab" for name, part in parts.items())
    )
    sparse = [bombs.sparse_pax(), bombs.sparse_old(), bombs.tar_loop()[:5120]]

    def make(draw: random.Random, folder: Path) -> None:
        content = whole if draw.random() < 0.9 else draw.choice(sparse) + whole
        content = mutated(draw, content, (b"ustar", b"ustar  \0", b"17 path=a.jpg\n", b"x" * 156))
        (folder / "a.tar").write_bytes(tar_checksums(content) if draw.random() < 0.7 else content)

    def read(folder: Path) -> None:
        first = None
        for reader in (ClickMeWebDataset, TarShards):
            try:
                list(reader(folder / "a.tar", decoder="simplejpeg", **PLAIN))
            except ValueError as error:
                first = first or error
        list(ClickMeWebDataset(folder / "a.tar", decoder="pillow", on_error="skip", **PLAIN))
        if first is not None:
            raise first

    return Reader(make, read)


def npz(folder: Path) -> Reader:
    import bombs
    from mutations import mutated_zip

    from harmonizer_ext.clickme import ClickMeFiles

    whole = bombs.npz_of()

    def make(draw: random.Random, folder: Path) -> None:
        def one() -> Callable[[str], bool]:
            chosen = draw.choice(("image.npy", "heatmap.npy", "label.npy"))
            return lambda name: name == chosen

        (folder / "a.npz").write_bytes(mutated_zip(draw, whole, 0.5, one, compressed=0.5))

    return Reader(make, lambda f: each(ClickMeFiles(f / "a.npz", **PLAIN)))


def pth(folder: Path) -> Reader:
    import bombs
    from mutations import PICKLED, is_pickle, mutated_zip

    from harmonizer_ext.clickme import ClickMeFiles

    whole = bombs.pth_of()

    def make(draw: random.Random, folder: Path) -> None:
        content = mutated_zip(draw, whole, 0.3, lambda: is_pickle, PICKLED, compressed=0.2)
        (folder / "a.pth").write_bytes(content)

    return Reader(make, lambda f: each(ClickMeFiles(f / "a.pth", **PLAIN)))


def folder_of_maps(folder: Path) -> None:
    """A folder of one image and map that are whole."""
    import numpy as np
    from clickme_shards import jpeg, picture

    for part in ("images/1", "maps/1"):
        (folder / part).mkdir(parents=True)
    (folder / "images/1/a.jpg").write_bytes(jpeg(picture(1)[:32, :32]))
    np.save(folder / "maps/1/a.npy", np.ones((32, 32)))


def pictures(folder: Path, kind: str) -> Reader:
    """Pictures as images and as maps, by path and by content."""
    from clickme_shards import click_map, picture
    from evaluating.data import FolderOfMaps
    from mutations import mutated, png_checksums
    from PIL import Image

    from harmonizer_ext.data import Draw, MixedDataset
    from harmonizer_ext.files.images import read_map

    folder_of_maps(folder)
    (folder / "images/1/a.jpg").rename(folder / "images/1/a.png")
    whole = []
    exif = Image.Exif()
    exif[0x0112] = 6
    for pixels in (picture(1)[:32, :32], click_map(1)[:32, :32], picture(2)[:32, :32] > 99):
        for options in ({}, {"exif": exif} if kind in ("png", "jpeg", "webp", "tiff") else {}):
            file = io.BytesIO()
            image = Image.fromarray(pixels if pixels.dtype != bool else pixels[..., 0])
            if kind == "jpeg":
                image = image.convert("CMYK" if pixels.dtype == bool else image.mode)
            more: dict[str, Any] = {"tiff": {"compression": "tiff_lzw"}}.get(kind, {})
            image.save(file, kind, **options, **(more if options else {}))
            whole.append(file.getvalue())

    def make(draw: random.Random, folder: Path) -> None:
        content = mutated(draw, draw.choice(whole))
        if kind == "png" and draw.random() < 0.8:
            content = png_checksums(content)
        (folder / "images/1/a.png").write_bytes(content)

    def read(folder: Path) -> None:
        path = folder / "images/1/a.png"
        column: Any = [{"image": {"bytes": path.read_bytes(), "path": None}, "label": 1}]
        for one in (
            lambda: read_map(path),
            lambda: MixedDataset(None, column)[Draw(False, 0, 0)],
        ):
            try:
                one()
            except (ValueError, OSError) as error:
                if not is_ours(error):
                    raise
        data[0]

    data = FolderOfMaps(folder)
    return Reader(make, read)


def npy(folder: Path) -> Reader:
    import bombs
    import numpy as np
    from evaluating.data import FolderOfMaps
    from mutations import mutated

    folder_of_maps(folder)
    whole = [bombs.npy(np.ones((32, 32), kind)) for kind in ("u1", ">u2", "f4", "f8", "?")]
    data = FolderOfMaps(folder)

    def make(draw: random.Random, folder: Path) -> None:
        tokens = (b"'|O'", b"'<U9'", b"(32, 32, 1)", b"()", b"True", b"[('a', '<f8')]", b"'<M8[s]'")
        content = mutated(draw, draw.choice(whole), tokens)
        (folder / "maps/1/a.npy").write_bytes(content)

    return Reader(make, lambda _: data[0])


def columns(folder: Path) -> Reader:
    """Columns as Hugging Face's data sets give them: contents, paths and labels of any kind."""
    from clickme_shards import jpeg, picture
    from mutations import TEXTS, mutated

    from harmonizer_ext.data import Draw, MixedDataset

    whole = jpeg(picture(1)[:32, :32])
    state: dict[str, Any] = {}

    def make(draw: random.Random, folder: Path) -> None:
        path = draw.choice((None, str(folder / "a.jpg"), "x", os.fsdecode(draw.choice(TEXTS))))
        image = draw.choice((whole, mutated(draw, whole), None, b"", "text", 3))
        label = draw.choice((1, 0, -1, 10**30, "1", None, 0.5, [1], True))
        (folder / "a.jpg").write_bytes(mutated(draw, whole))
        state["row"] = {"image": {"bytes": image, "path": path}, "label": label}

    def read(folder: Path) -> None:
        with outside_is_read():
            MixedDataset(None, [state["row"]])[Draw(False, 0, 0)]  # type: ignore[arg-type]

    return Reader(make, read)


def tar_of_images(folder: Path) -> Reader:
    """A tar as timm reads one for train.py, after it was looked through."""
    import bombs
    from clickme_shards import jpeg, picture
    from mutations import mutated, tar_checksums
    from training.images import open_images

    whole = bombs.tar_of(
        *((bombs.plain(f"{c}/{n}.jpg"), jpeg(picture(n)[:32, :32])) for c in "ab" for n in range(2))
    )

    def make(draw: random.Random, folder: Path) -> None:
        content = mutated(draw, whole)
        (folder / "a.tar").write_bytes(tar_checksums(content) if draw.random() < 0.8 else content)

    def read(folder: Path) -> None:
        data: Any = open_images(
            str(folder / "a.tar"), "", "train", argument="train_split", class_map="",
            max_bytes=2**28,
        )  # fmt: skip
        for number in range(len(data)):
            data[number]

    return Reader(make, read)
