"""Damages what every reader of this project reads, a thousand ways and more, and watches it read.

    python tests/fuzz_readers.py --cases 10000

Each reader has a process of its own with a gigabyte of memory. A case passes where the reader reads
it, or ends with an error of this project. It fails where another error comes, where a process is
started or a connection opened, where a file outside of the case's folder is touched, where a
pickle looks a class up, or where it takes longer than ten seconds. A crash ends the process, and is
told with the case; its file stays in the folder that is named.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import io
import json
import logging
import os
import random
import resource
import shutil
import signal
import site
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
sys.path[:0] = [str(TESTS), str(ROOT / "python"), str(ROOT)]

#: Seconds that a case may take.
MOST_SECONDS = 10

Read = Callable[[], Any]


@dataclasses.dataclass
class Reader:
    """What is fuzzed.

    Attributes:
        make: draws a case and writes it to the folder.
        read: reads the folder.
    """

    make: Callable[[random.Random, Path], None]
    read: Callable[[Path], Any]


# ---------------------------------------------------------------------------- the readers


def readers() -> dict[str, Callable[[Path], Reader]]:
    """By name: what prepares the folder, with files that are whole, and gives the reader."""
    made: dict[str, Callable[[Path], Reader]] = {
        "tfrecord": tfrecord, "record": record, "tar": tar, "npz": npz, "pth": pth, "npy": npy,
        "labels.csv": labels, "classes.txt": classes, "images.csv": table, "accuracy": accuracy,
        "manifest.json": manifest, "stimuli": stimuli, "curve": curve, "config.json": settings,
        "checkpoint": weights, "old checkpoint": old_weights, "index cache": index,
        "class map": class_map, "columns": columns, "tar of images": tar_of_images,
    }  # fmt: skip
    kinds = ("png", "jpeg", "webp", "bmp", "gif", "ppm", "tiff")
    return made | {kind: lambda folder, kind=kind: pictures(folder, kind) for kind in kinds}


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
    """Damaged before its checksums were made: the message and the JPEGs within."""
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
    from mutations import mutated, zip_with

    from harmonizer_ext.clickme import ClickMeFiles

    whole = bombs.npz_of()

    def make(draw: random.Random, folder: Path) -> None:
        if draw.random() < 0.5:
            content = mutated(draw, whole, (b"PK\1\2", b"PK\5\6", b"PK\6\6", b"PK\6\7"))
        else:
            chosen = draw.choice(("image.npy", "heatmap.npy", "label.npy"))
            content = zip_with(
                whole, lambda n, c: mutated(draw, c) if n == chosen else c, draw.random() < 0.5
            )
        (folder / "a.npz").write_bytes(content)

    return Reader(make, lambda f: each(ClickMeFiles(f / "a.npz", **PLAIN)))


#: Operations of pickles, and names in them.
PICKLED = (
    b"ctorch\nFloatTensor\n",
    b"cbuiltins\nbytearray\n",
    b"cos\nsystem\n",
    b"R",
    b"Q",
    b"b",
    b"\x81",
)
PICKLED += (
    b"ctorch._utils\n_rebuild_sparse_tensor\n",
    b"\x8a\x08" + b"\x7f" * 8,
    b"J\xff\xff\xff\x7f",
)
PICKLED += (
    b"2",
    b"0",
    b"(",
    b"t",
    b"\x85",
    b"s",
    b"u",
    b"h\0",
    b"r\xff\xff\xff\x7f",
    b"\x96" + b"\x7f" * 8,
)


def pth(folder: Path) -> Reader:
    import bombs
    from mutations import mutated, zip_with

    from harmonizer_ext.clickme import ClickMeFiles

    whole = bombs.pth_of()

    def make(draw: random.Random, folder: Path) -> None:
        if draw.random() < 0.3:
            content = mutated(draw, whole, (b"PK\1\2", b"PK\5\6", b"PK\6\6", b"PK\6\7"))
        else:
            content = zip_with(
                whole,
                lambda n, c: mutated(draw, c, PICKLED) if n.endswith("data.pkl") else c,
                draw.random() < 0.2,
            )
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
    """As images and as maps, by path and by content."""
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


def text(folder: Path, name: str, whole: list[bytes], read: Callable[[Path], Any]) -> Reader:
    from mutations import mutated

    (folder / name).write_bytes(whole[0])

    def make(draw: random.Random, folder: Path) -> None:
        (folder / name).write_bytes(mutated(draw, draw.choice(whole)))

    return Reader(make, read)


def labels(folder: Path) -> Reader:
    from evaluating.data import FolderOfMaps

    folder_of_maps(folder)
    whole = [b"name,label\n1/a,3\n", b'\xef\xbb\xbfname,label,x\r\n"1/a","3",""\r\n']
    return text(folder, "labels.csv", whole, lambda f: FolderOfMaps(f)[0])


def classes(folder: Path) -> Reader:
    from evaluating.data import FolderOfMaps

    folder_of_maps(folder)
    return text(folder, "classes.txt", [b"0\n1\n2\n"], lambda f: FolderOfMaps(f)[0])


def table(folder: Path) -> Reader:
    import reveal_experiment

    folder_of_maps(folder)
    from PIL import Image

    Image.new("L", (32, 32), 9).save(folder / "maps/1/a.png")
    whole = [b"image,importance,label\nimages/1/a.jpg,maps/1/a.png,3\n"]

    def read(folder: Path) -> None:
        # What a table names is read wherever it is: by whoever wrote the table.
        with outside_is_read():
            list(reveal_experiment.read_pictures(folder / "a.csv"))

    return text(folder, "a.csv", whole, read)


def accuracy(folder: Path) -> Reader:
    import evaluate
    from evaluations import network

    chosen = [network("a")]
    whole = [b"model,top1\na,76.1\nb,3\n"]
    return text(folder, "a.csv", whole, lambda f: evaluate.read_accuracy(str(f / "a.csv"), chosen))


def manifest(folder: Path) -> Reader:
    import bombs
    from clickme_shards import click_map, jpeg, picture

    from harmonizer_ext.clickme import ClickMeWebDataset

    parts = {"jpg": jpeg(picture(1)), "heatmap.jpg": jpeg(click_map(1)), "cls": b"7"}
    content = bombs.tar_of(*((bombs.plain(f"a.{n}"), part) for n, part in parts.items()))
    (folder / "a.tar").write_bytes(content)
    entry = {"source": "a", "size": len(content), "samples": 1, "sha256": "0", "skipped": []}
    whole = json.dumps({"version": 1, "shards": {"a.tar": entry}}, indent=1).encode()

    def read(folder: Path) -> None:
        list(ClickMeWebDataset(folder / "a.tar", on_error="skip", **PLAIN))
        list(ClickMeWebDataset(folder / "a.tar", **PLAIN))

    return text(folder, "manifest.json", [whole], read)


def stimuli(folder: Path) -> Reader:
    import hashlib

    import reveal_experiment

    (folder / "a.png").write_bytes(b"x")
    entry = {"file": "a.png", "image": "a", "label": 1, "animal": True, "level": 0}
    entry |= {"sha256": hashlib.sha256(b"x").hexdigest()}
    whole = json.dumps({"levels": [1.0], "stimuli": [entry]}).encode()
    return text(folder, "manifest.json", [whole], reveal_experiment.read_manifest)


def curve(folder: Path) -> Reader:
    import reveal_experiment

    whole = json.dumps({"levels": [0.1, 1.0], "accuracy": [0.5, 1.0]}).encode()
    return text(
        folder,
        "a.json",
        [whole],
        lambda f: reveal_experiment.read_human_curve(f / "a.json", [0.1, 1]),
    )


def settings(folder: Path) -> Reader:
    from training import config

    whole = json.dumps(dataclasses.asdict(config.Config(clickme=("x",)))).encode()

    def read(folder: Path) -> None:
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                config.parse(["--config", str(folder / "a.json")])
        except SystemExit as ended:
            raise refused(said.getvalue()) from ended

    return text(folder, "a.json", [whole], read)


def refused(message: str) -> ValueError:
    """The end of a program that has said why."""
    assert ": error: " in message, message
    assert message.strip().isprintable() or message.count("\n") < 99, message
    error = ValueError(message)
    error.told = True  # type: ignore[attr-defined]
    return error


def checkpoint_content() -> dict[str, Any]:
    from training import checkpoint, config, networks

    asked = config.Config(model="small", img_size=32, num_classes=10, clickme=("x",))
    model, form = networks.create(asked)
    state = {"version": checkpoint.VERSION, "config": dataclasses.asdict(asked)}
    return state | {"input": form._asdict(), "model": model.state_dict()}


def read_weights(folder: Path) -> None:
    from training import checkpoint, config, networks

    first = None
    model, _ = networks.create(config.Config(model="small", num_classes=10, clickme=("x",)))
    for read in (
        lambda: checkpoint.load_network(folder / "a.pt"),
        lambda: networks.load_weights(model, folder / "a.pt"),
    ):
        try:
            read()
        except ValueError as error:
            first = first or error
    if first is not None:
        raise first


def weights(folder: Path) -> Reader:
    import torch
    from mutations import mutated, zip_with

    file = io.BytesIO()
    torch.save(checkpoint_content(), file)
    whole = file.getvalue()

    def make(draw: random.Random, folder: Path) -> None:
        if draw.random() < 0.3:
            content = mutated(draw, whole, (b"PK\1\2", b"PK\5\6", b"PK\6\6", b"PK\6\7"))
        else:
            content = zip_with(
                whole,
                lambda n, c: mutated(draw, c, PICKLED) if n.endswith("data.pkl") else c,
                False,
            )
        (folder / "a.pt").write_bytes(content)

    return Reader(make, read_weights)


def old_weights(folder: Path) -> Reader:
    """As PyTorch wrote before 1.6."""
    import torch
    from mutations import mutated

    file = io.BytesIO()
    torch.save(checkpoint_content(), file, _use_new_zipfile_serialization=False)
    whole = file.getvalue()

    def make(draw: random.Random, folder: Path) -> None:
        (folder / "a.pt").write_bytes(mutated(draw, whole, PICKLED))

    return Reader(make, read_weights)


def index(folder: Path) -> Reader:
    from mutations import mutated, zip_with

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


def class_map(folder: Path) -> Reader:
    import pickle

    from mutations import mutated
    from training.images import read_class_map

    whole = {"a.txt": b"0\n1\n2\n", "a.pkl": pickle.dumps({"0": 0, "1": 1}, protocol=4)}

    def make(draw: random.Random, folder: Path) -> None:
        for name, content in whole.items():
            (folder / name).write_bytes(mutated(draw, content, PICKLED))

    def read(folder: Path) -> None:
        with contextlib.suppress(ValueError):
            read_class_map(str(folder / "a.txt"))
        read_class_map(str(folder / "a.pkl"))

    return Reader(make, read)


def columns(folder: Path) -> Reader:
    """What Hugging Face's data sets give: contents, paths and labels of any kind."""
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
    """As timm reads one for train.py, after it was looked through."""
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


# ---------------------------------------------------------------------------- watching


class Watch:
    """What a reader does besides reading, by the events of Python's audit."""

    NEVER = (
        *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty"),
        *("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"),
        "pickle.find_class",
    )
    CHANGES = (
        *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate"),
        *("os.chmod", "os.utime", "shutil.rmtree", "shutil.copyfile"),
    )

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.on = False
        self.may_read_outside = False
        self.found: list[str] = []
        places = (sys.prefix, sys.base_prefix, ROOT, *site.getsitepackages())
        self.code = tuple(str(Path(place).resolve()) for place in places)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in self.NEVER:
            self.found.append(f"{event}{arguments!r:.150}")
        elif event == "open":
            path, _, flags = arguments
            if isinstance(path, str | bytes) and not self._inside(path):
                self._outside(os.fsdecode(path), flags)
        elif event in self.CHANGES:
            for path in arguments[:2]:
                if isinstance(path, str | bytes | os.PathLike) and not self._inside(path):
                    self.found.append(f"{event}: {path!r}")

    def _inside(self, path: Any) -> bool:
        return os.path.abspath(os.fsdecode(path)).startswith(self.folder + os.sep)

    def _outside(self, path: str, flags: int) -> None:
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        imported = os.path.abspath(path).startswith(self.code)
        if writes or not (imported or self.may_read_outside):
            self.found.append(f"open: {path!r}")


watch: Watch | None = None


@contextlib.contextmanager
def outside_is_read() -> Any:
    """For paths that whoever made a table wrote into it."""
    if watch is not None:
        watch.may_read_outside = True
    try:
        yield
    finally:
        if watch is not None:
            watch.may_read_outside = False


def is_ours(error: BaseException) -> bool:
    """Whether an error was raised by this project, for the user."""
    if getattr(error, "told", False):
        return True
    if not isinstance(error, ValueError | TypeError | OSError):
        return False
    place = traceback.extract_tb(error.__traceback__)[-1].filename
    return place.startswith((str(ROOT / "harmonizer_ext"), str(ROOT / "python")))


def prepare() -> None:
    """Once for a process: what the readers import, and the limit on its memory."""
    import limited
    import timm_networks

    timm_networks.import_timm()
    import PIL.Image

    PIL.Image.init()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    limited.limit()


def run_cases(name: str, cases: int, seed: int, folder: Path) -> dict[str, Any]:
    """Runs the cases of one reader in this process."""
    global watch
    place = folder / name
    place.mkdir()
    reader = readers()[name](place)
    watch = Watch(place.resolve())
    sys.addaudithook(watch)
    counts: collections.Counter[str] = collections.Counter()
    slowest, bad = 0.0, []
    progress = os.open(folder / "progress", os.O_CREAT | os.O_WRONLY, 0o600)
    for number in range(cases):
        reader.make(random.Random(f"{seed} {name} {number}"), place)
        os.pwrite(progress, f"{name}, case {number:<12}".encode(), 0)
        start = time.perf_counter()
        signal.alarm(MOST_SECONDS)
        watch.on = number >= 3  # what is imported at first is
        try:
            reader.read(place)
            counts["read"] += 1
        except Exception as error:  # noqa: BLE001 - whatever it is, it is looked at
            counts["refused"] += 1
            if not is_ours(error):
                bad.append(f"case {number}: {type(error).__name__}: {error}"[:300])
        watch.on = False
        signal.alarm(0)
        slowest = max(slowest, time.perf_counter() - start)
        if watch.found:
            bad.append(f"case {number}: {watch.found}"[:400])
            watch.found.clear()
    os.close(progress)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"bad": bad, "slowest": slowest, "peak": peak, **counts}


def fuzz(names: list[str], cases: int, seed: int) -> dict[str, dict[str, Any]]:
    """Runs the cases of readers in a process of their own.

    Returns:
        By reader: numbers "read" and "refused", seconds of the slowest case, "peak" memory in MB,
        and "bad", what is wrong, a text for each. Where the process has ended, only that.
    """
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    line = [sys.executable, __file__, "--cases", str(cases), "--seed", str(seed)]
    done = subprocess.run(
        [*line, "--folder", str(folder), "--reader", *names],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode == 0:
        told: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
        if not any(one["bad"] for one in told.values()):
            shutil.rmtree(folder)
        return told
    at = (folder / "progress").read_text() if (folder / "progress").exists() else "none"
    reason = done.stderr.strip()[-1500:]
    if done.returncode < 0:
        reason = f"{signal.Signals(-done.returncode).name} {reason[-200:]}"
    return {names[0]: {"bad": [f"{at.strip()} ended the process, see {folder}: {reason}"]}}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10000, help="of each reader (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all (%(default)s)")
    parser.add_argument("--reader", nargs="+", choices=list(readers()), help="default: all")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.reader or list(readers())
    if options.folder:  # this is the process of the readers
        prepare()
        told = {n: run_cases(n, options.cases, options.seed, options.folder) for n in names}
        print(json.dumps(told))
        return 0
    return table_of(names, options.cases, options.seed)


def table_of(names: list[str], cases: int, seed: int) -> int:
    wrong = 0
    heads = ("cases", "read", "refused", "slowest ms", "peak MB", "bad")
    print(f"{'reader':<16}", *(f"{head:>10}" for head in heads))
    for name in names:
        told = fuzz([name], cases, seed)[name]
        cells = [cases, told.get("read", 0), told.get("refused", 0)]
        cells += [round(1000 * told.get("slowest", 0)), round(told.get("peak", 0))]
        print(f"{name:<16}", *(f"{n:>10}" for n in (*cells, len(told["bad"]))), flush=True)
        for text in told["bad"][:10]:
            print(f"    {text}")
        wrong += len(told["bad"])
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
