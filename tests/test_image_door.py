"""Pictures come through one door: no other program is started, one rule for depth and turning."""

from __future__ import annotations

import ast
import io
import os
import stat
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import extras
import numpy as np
import pytest

if (reason := extras.why_no_train()) is not None:
    pytest.skip(reason, allow_module_level=True)

import reveal_experiment
import torch
from clickme_shards import example, framed, picture
from evaluating.data import FolderOfMaps
from evaluating.tar_shards import TarShards
from PIL import Image, ImageOps
from test_clickme_formats import write_tar
from training import config, data

from harmonizer_ext.clickme import ClickMe, ClickMeWebDataset
from harmonizer_ext.data import Draw, MixedDataset
from harmonizer_ext.data.sources import without_map

ROOT = Path(__file__).parent.parent
#: The module that opens pictures, and what makes it the only one.
DOOR = ROOT / "harmonizer_ext/files/images.py"
OPENERS = {
    *("imread", "read_image", "decode_image", "decode_png", "decode_webp", "decode_jpeg"),
    *("default_loader", "pil_loader", "accimage_loader", "JpegImageFile", "PngImageFile"),
    *("jpeg_factory", "ImageFile", "open_pil"),
}


# ---------------------------------------------------------------------------- there is one door


def foreign_openers(source: str) -> Iterator[str]:
    """Openers of pictures from other packages, where they are imported or called."""
    tree = ast.parse(source)
    pillow: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            pillow |= {a.asname or "PIL" for a in node.names if a.name.partition(".")[0] == "PIL"}
            yield from (
                a.name for a in node.names if a.name.partition(".")[0] in ("cv2", "imageio")
            )
        elif isinstance(node, ast.ImportFrom) and not node.level:
            package = (node.module or "").partition(".")[0]
            if package == "PIL":
                pillow |= {alias.asname or alias.name for alias in node.names}
            if package not in ("harmonizer_ext", "training", "evaluating"):
                yield from (a.name for a in node.names if a.name in OPENERS)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            base = node.value
            names = {part.id for part in ast.walk(base) if isinstance(part, ast.Name)}
            if node.attr == "open" and names & pillow:
                yield ast.unparse(node)
            # simplejpeg has a decoder and no files, formats or delegates.
            if node.attr in OPENERS and names != {"simplejpeg"}:
                yield ast.unparse(node)


def test_nothing_else_opens_pictures() -> None:
    files = [*(ROOT / "harmonizer_ext").rglob("*.py"), *(ROOT / "python").rglob("*.py")]
    assert len(files) > 60
    assert list(foreign_openers(DOOR.read_text())) == []  # it gets Pillow from a function
    assert "pillow.open(file, formats=formats)" in DOOR.read_text()
    assert DOOR.read_text().count(".open(") == 1
    for path in files:
        assert list(foreign_openers(path.read_text())) == [], path


@pytest.mark.parametrize(
    "source",
    [
        "from PIL import Image\nImage.open('x')",
        "import PIL.Image\nPIL.Image.open('x')",
        "import PIL.Image as I\nopened = I.open",
        "from torchvision.io import read_image",
        "import torchvision\ntorchvision.io.decode_image(b'')",
        "from torchvision.datasets.folder import default_loader",
        "import matplotlib.pyplot as plt\nplt.imread('x')",
        "from skimage import io\nio.imread('x')",
        "import cv2",
    ],
)
def test_another_opener_would_be_found(source: str) -> None:
    assert list(foreign_openers(source))


@pytest.fixture
def doors(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Formats of the pictures that Pillow opens; another way to open one fails the test."""
    found: list[str] = []
    open_ = Image.open

    def watched(file: Any, mode: str = "r", formats: Any = None) -> Any:
        assert formats is not None, "Image.open without formats"
        assert sys._getframe(1).f_code.co_filename == str(DOOR)
        opened = open_(file, mode, formats)
        found.append(opened.format)
        return opened

    monkeypatch.setattr(Image, "open", watched)
    return found


# ---------------------------------------------------------------------------- readers of pictures


def write(folder: Path, content: bytes, map_: bytes | None = None, name: str = "0.png") -> Path:
    """A folder of one image and its map, a table of them, and a folder for training."""
    map_ = png(np.full((30, 40), 9, np.uint8)) if map_ is None else map_
    for part in ("images/1", "maps/1", "data/train/1", "data/validation/1"):
        (folder / part).mkdir(parents=True)
    for part in ("images/1", "data/train/1", "data/validation/1"):
        (folder / part / name).write_bytes(content)
    (folder / "maps/1/0.png").write_bytes(map_)
    (folder / "table.csv").write_text(f"image,importance,label\nimages/1/{name},maps/1/0.png,1\n")
    return folder


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def training_images(folder: Path, dataset: str = "") -> Any:
    asked = config.Config(
        model="small",
        clickme=("x",),
        data_dir=str(folder / "data"),
        dataset=dataset,
        num_classes=10,
    )
    return data._images(asked, "train", "train_split")


def trained(folder: Path, dataset: str = "") -> torch.Tensor:
    return MixedDataset(None, training_images(folder, dataset))[Draw(False, 0, 0)].image


#: (3, H, W) by the reader, of a folder that ``write`` has made.
READERS: dict[str, Callable[[Path], torch.Tensor]] = {
    "evaluation": lambda folder: FolderOfMaps(folder)[0].image,
    "training": trained,
    "training, torchvision": lambda folder: trained(folder, "torch/folder"),
    "reveal": lambda folder: next(
        reveal_experiment.read_pictures(folder / "table.csv")
    ).image,
    "content": lambda folder: without_map(
        {"image": {"bytes": next((folder / "images/1").iterdir()).read_bytes(), "path": None}}
        | {"label": 1}
    ).image,
    "path": lambda folder: without_map(
        {"image": {"bytes": None, "path": str(next((folder / "images/1").iterdir()))}, "label": 1}
    ).image,
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF"])
def test_pictures_are_opened_by_the_door(
    tmp_path: Path, doors: list[str], reader: str, kind: str
) -> None:
    """The door opens them whatever their names say."""
    file = io.BytesIO()
    pixels = picture(1)[:30, :40]
    image = Image.fromarray(pixels)
    image.save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    write(tmp_path, file.getvalue())
    doors.clear()
    got = READERS[reader](tmp_path).permute(1, 2, 0).numpy()
    assert kind in doors
    if kind not in ("JPEG", "GIF"):
        np.testing.assert_array_equal(got, pixels)


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 40 30
%%EndComments
showpage
%%EOF
"""
#: The same behind the header that DOS puts before it.
DOS_EPS = struct.pack("<IIIIIIIH", 0xC6D3D0C5, 30, len(EPS), 0, 0, 0, 0, 0xFFFF) + EPS


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of its name, which leaves a file when it is started."""
    from PIL import EpsImagePlugin

    ran = tmp_path / "ran"
    program = tmp_path / "bin/gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch '{ran}'\nexit 1\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return ran


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("content", [EPS, DOS_EPS], ids=["eps", "dos"])
def test_postscript_is_no_picture(
    tmp_path: Path, ghostscript: Path, reader: str, content: bytes
) -> None:
    write(tmp_path / "a", content, name="0.jpg")
    with pytest.raises((ValueError, OSError), match="got PostScript"):
        READERS[reader](tmp_path / "a")
    write(tmp_path / "b", png(picture(1)[:30, :40]), map_=content)
    if reader in ("evaluation", "reveal"):
        with pytest.raises(ValueError, match=r"maps/1/0\.png: .*got PostScript"):
            READERS[reader](tmp_path / "b")
    assert not ghostscript.exists()


def test_postscript_in_shards(tmp_path: Path, ghostscript: Path) -> None:
    shard = tmp_path / "x.tfrecords"
    shard.write_bytes(framed(example(image=EPS, heatmap=EPS, label=1)))
    for decoder in ("pillow", "simplejpeg"):
        with pytest.raises(ValueError, match=r"record at byte 0: image: expected a readable"):
            ClickMe(shard, decoder=decoder)[0]
    write_tar(tmp_path / "x.tar", {"a.jpg": EPS, "a.heatmap.jpg": EPS, "a.cls": b"1"})
    for reader in (ClickMeWebDataset, TarShards):
        with pytest.raises(ValueError, match="image: expected a readable"):
            list(reader(tmp_path / "x.tar", decoder="pillow"))
    assert not ghostscript.exists()


# ---------------------------------------------------------------------------- depth and channels


def png16(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, (H, W) or (H, W, 3), which Pillow cannot write."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, 0 if pixels.ndim == 2 else 2, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def saved(image: Any, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


SIXTEEN = np.linspace(0, 65535, 30 * 40).round().astype(np.uint16).reshape(30, 40)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["grey", "RGB", "tiff", "big-endian tiff"])
def test_sixteen_bits_become_eight(tmp_path: Path, reader: str, kind: str) -> None:
    """The upper half of each number, of one channel as of three."""
    colour = np.stack([SIXTEEN, SIXTEEN[::-1], SIXTEEN[:, ::-1]], -1)
    mode = "I;16B" if kind == "big-endian tiff" else "I;16"
    stored = SIXTEEN.astype(">u2") if mode == "I;16B" else SIXTEEN
    content = {
        "grey": lambda: png16(SIXTEEN),
        "RGB": lambda: png16(colour),
    }.get(kind, lambda: saved(Image.frombytes(mode, (40, 30), stored.tobytes()), "TIFF"))()
    got = READERS[reader](write(tmp_path, content)).permute(1, 2, 0).numpy()
    expected = colour if kind == "RGB" else SIXTEEN[..., None].repeat(3, 2)
    np.testing.assert_array_equal(got, expected >> 8)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_thirty_two_bits_are_refused(tmp_path: Path, reader: str, dtype: Any) -> None:
    """Nobody says what is white in them."""
    content = saved(Image.fromarray(SIXTEEN.astype(dtype)), "TIFF")
    with pytest.raises((ValueError, OSError), match="expected a picture with 8 or 16 bits"):
        READERS[reader](write(tmp_path, content))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_other_channels_become_rgb(tmp_path: Path, reader: str, mode: str) -> None:
    colours = Image.fromarray(picture(2)[:30, :40])
    colours.putalpha(Image.fromarray((SIXTEEN >> 8).astype(np.uint8)))
    image = colours.convert("RGB").convert(mode) if mode in ("P", "CMYK") else colours.convert(mode)
    content = saved(image, "TIFF" if mode == "CMYK" else "PNG")
    got = READERS[reader](write(tmp_path, content)).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(got, np.asarray(image.convert("RGB")))


def map_of(folder: Path, reader: str) -> np.ndarray:
    if reader == "evaluation":
        return FolderOfMaps(folder)[0].heatmap[0].numpy()
    return next(reveal_experiment.read_pictures(folder / "table.csv")).importance.numpy()


@pytest.mark.parametrize("reader", ["evaluation", "reveal"])
def test_maps_keep_their_numbers(tmp_path: Path, reader: str) -> None:
    """Maps of any depth; in colours where they are grey."""
    eight = (SIXTEEN >> 8).astype(np.uint8)
    image = png(picture(1)[:30, :40])
    grey = Image.fromarray(eight)
    kinds = {
        "16": (png16(SIXTEEN), SIXTEEN),
        "float": (saved(Image.fromarray(SIXTEEN / np.float32(7)), "TIFF"), SIXTEEN / np.float32(7)),
        "RGB": (saved(grey.convert("RGB"), "PNG"), eight),
        "RGBA": (saved(grey.convert("RGBA"), "PNG"), eight),
        "LA": (saved(grey.convert("LA"), "PNG"), eight),
        "P": (saved(grey.convert("P"), "PNG"), eight),
        "1": (saved(grey.convert("1"), "PNG"), np.asarray(grey.convert("1"))),
    }
    for name, (content, expected) in kinds.items():
        got = map_of(write(tmp_path / name, image, content), reader)
        np.testing.assert_array_equal(got, expected.astype(np.float32), err_msg=name)


@pytest.mark.parametrize("reader", ["evaluation", "reveal"])
def test_maps_that_are_none(tmp_path: Path, reader: str) -> None:
    image = png(picture(1)[:30, :40])
    transparent = Image.fromarray((SIXTEEN >> 8).astype(np.uint8)).convert("LA")
    transparent.putalpha(128)
    palette = Image.fromarray(picture(3)[:30, :40]).convert("P")
    wrong = {
        "colours": (png(picture(3)[:30, :40]), "got colours or transparency"),
        "transparent": (saved(transparent, "PNG"), "got colours or transparency"),
        "palette": (saved(palette, "PNG"), "got colours or transparency"),
        "nan": (saved(Image.fromarray(np.full((30, 40), np.nan, np.float32)), "TIFF"), "finite"),
    }
    for name, (content, message) in wrong.items():
        with pytest.raises(ValueError, match=rf"maps/1/0\.png: .*{message}"):
            map_of(write(tmp_path / name, image, content), reader)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((30, 40), np.nan), "finite"),
        (np.full((30, 40), np.inf), "finite"),
        (np.full((30, 40), 1e300), "finite"),
        (np.zeros((30, 40), complex), r"a map \(H, W\) of numbers"),
        (np.full((30, 40), None), "an array of numbers, got the type object"),
        (np.full((30, 40), "dog"), "an array of numbers, got the type <U3"),
        (np.zeros((0, 40)), r"a map \(H, W\) of numbers"),
    ],
)
def test_arrays_that_are_no_maps(tmp_path: Path, values: np.ndarray, message: str) -> None:
    folder = write(tmp_path, png(picture(1)[:30, :40]))
    (folder / "maps/1/0.png").unlink()
    np.save(folder / "maps/1/0.npy", values, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        FolderOfMaps(folder)[0]


# ---------------------------------------------------------------------------- turning


def turned(pixels: np.ndarray, number: int, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = number
    file = io.BytesIO()
    options = {"quality": 95} if kind == "JPEG" else {}
    Image.fromarray(pixels).save(file, kind, exif=exif, **options)
    return file.getvalue()


def displayed(content: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_are_turned_as_they_are_displayed(tmp_path: Path, reader: str, kind: str) -> None:
    for number in range(1, 9):
        content = turned(picture(1)[:30, :40], number, kind)
        expected = displayed(content)
        map_ = png(np.full(expected.shape[:2], 7, np.uint8))
        folder = write(tmp_path / str(number), content, map_)
        got = READERS[reader](folder).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(got, expected, err_msg=str(number))


def test_a_pillow_image_is_turned_once() -> None:
    """The image as torchvision's folders and Hugging Face's data sets give it."""
    content = turned(picture(1)[:30, :40], 6)
    expected = displayed(content)
    for image in (
        Image.open(io.BytesIO(content)),
        Image.open(io.BytesIO(content)).convert("RGB"),
        ImageOps.exif_transpose(Image.open(io.BytesIO(content))),
    ):
        got = without_map((image, 1)).image.permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("number", range(1, 9))
def test_a_map_of_the_displayed_image_stays_aligned(tmp_path: Path, number: int) -> None:
    """A white spot in the image lies where the map says, after the preparation of both."""
    stored = np.zeros((48, 64, 3), np.uint8)
    stored[4:12, 40:48] = 255
    content = turned(stored, number, "PNG")
    spot = (displayed(content).mean(-1) > 128).astype(np.uint8) * 255
    sample = FolderOfMaps(write(tmp_path, content, png(spot)))[0]
    np.testing.assert_array_equal(sample.image.float().mean(0) > 128, sample.heatmap[0] > 128)
    assert (sample.heatmap[0] > 128).sum() == 64


@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
def test_shards_are_turned_too(tmp_path: Path, decoder: Any) -> None:
    for number in range(1, 9):
        image = turned(picture(1), number)
        spot = np.zeros((256, 256), np.uint8)
        spot[:40, :80] = 255
        heatmap = turned(spot, number)
        record = example(image=image, heatmap=heatmap, label=1)
        (tmp_path / "x.tfrecords").write_bytes(framed(record))
        write_tar(tmp_path / "x.tar", {"a.jpg": image, "a.heatmap.jpg": heatmap, "a.cls": b"1"})
        read = {"preprocess": None, "decoder": decoder}
        for sample in (
            ClickMe(tmp_path / "x.tfrecords", **read)[0],
            TarShards(tmp_path / "x.tar", **read)[0],
            next(iter(ClickMeWebDataset(tmp_path / "x.tar", **read))),
        ):
            np.testing.assert_array_equal(sample.image.permute(1, 2, 0), displayed(image))
            np.testing.assert_array_equal(sample.heatmap[0], displayed(heatmap))


def test_metadata_that_cannot_be_read_turn_nothing(tmp_path: Path) -> None:
    content = turned(picture(1)[:30, :40], 6)
    at = content.index(b"Exif\0\0") + 6
    broken = content[:at] + b"\xff" * 8 + content[at + 8 :]
    got = FolderOfMaps(write(tmp_path, broken, png(np.ones((30, 40), np.uint8))))[0].image
    assert got.shape == (3, 30, 40)
