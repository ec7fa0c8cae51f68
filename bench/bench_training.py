"""The training program at full size: images per second, plain and harmonized, and the loader alone.

    python bench/bench_training.py                         ResNet-50 and ViT-S/16 at 224, one GPU
    python bench/bench_training.py --models resnet18 --size 64 --batch 8 --device cpu

Each contender is train.py's own loop (``train_epoch``) on stand-in data of realistic size, written
here: ClickMe shards of 256x256 and a folder of 500x375 photographs' stand-ins, waves and noise as
JPEG. Contenders take turns, an epoch of ``--updates`` each, after one that is not counted. The
loader's ceiling is the same batches, moved to the device and thrown away. What is missing is said
before anything is written; each row is in the record as soon as it is measured.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import harness  # first of all: it sets what torch reads when it is loaded

# isort: split
import numpy as np
import program
import records
import torch
from PIL import Image

sys.path.append(str(harness.ROOT / "python"))
import train
from training import checkpoint, config, data, networks, processes

from harmonizer_ext.clickme import write_records

PLAIN = "cross entropy alone"
LOADER = "loader alone"
#: What differs from the plain network: flags of train.py.
CONTENDERS: dict[str, dict[str, Any]] = {
    PLAIN: {"lambda_harmonization": 0.0},
    "harmonized, rows with a map": {"freeze_norm": True},
    "harmonized, all rows": {"rows": "all"},
    "harmonized, rows with a map, compiled": {"freeze_norm": True, "torchcompile": True},
}


def jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def picture(seed: int, height: int, width: int) -> bytes:
    """Waves of several scales and some noise: about as many bytes as a photograph."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 256
    channels = []
    for _ in range(3):
        waves = rng.uniform(0, 20, (6, 3))
        channels.append(sum(np.sin(2 * np.pi * (a * y + b * x) + c) for a, b, c in waves))
    pixels = 128 + 25 * np.stack(channels, -1) + rng.normal(0, 8, (height, width, 3))
    return jpeg(pixels.clip(0, 255).astype(np.uint8))


def write_files(directory: Path, count: int, classes: int) -> None:
    """``clickme/`` with a shard, and ``images/train/<class>/``, by all cores."""
    y, x = np.mgrid[:256, :256]
    disc = jpeg((255 * np.exp(-((y - 120) ** 2 + (x - 140) ** 2) / 3000)).astype(np.uint8))
    (directory / "clickme").mkdir(parents=True)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        # Many at a time: a picture takes less time than to be sent.
        small, large = (
            pool.map(partial(picture, height=height, width=width), range(count), chunksize=16)
            for height, width in ((256, 256), (375, 500))
        )
        write_records(
            directory / "clickme" / "train-0.tfrecords",
            (
                {"image": image, "heatmap": disc, "label": number % classes}
                for number, image in enumerate(small)
            ),
        )
        for number, image in enumerate(large):
            path = directory / "images" / "train" / str(number % classes) / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)


class Silence:
    """A logbook that keeps the share of time spent waiting for data."""

    def __init__(self) -> None:
        self.waiting: list[float] = []

    def update(self, step: int, values: dict[str, float] | None) -> None:
        if values is not None:
            self.waiting.append(values["waiting"])


class Contender:
    """One network with its own data, of which ``epoch`` trains an epoch."""

    def __init__(self, settings: config.Config) -> None:
        self.world = processes.World(0, 1, torch.device(settings.device or "cuda"))
        torch.manual_seed(0)
        model, form = networks.create(settings)
        self.training = data.open_training(settings, form.size, self.world)
        model = networks.prepare(model, settings, self.world)
        networks.training_mode(model, settings)
        self.step = networks.with_loss(model, settings, self.world)
        optimizer, self.rate = train.create_optimizer(model, settings, len(self.training.sampler))
        self.run = checkpoint.Run(
            settings, self.world, form, self.training.images_per_update, model, optimizer, None
        )
        self.images = len(self.training.sampler) * self.training.images_per_update

    def epoch(self) -> tuple[float, float]:
        """Seconds, and the share of them spent waiting for data."""
        book, progress = Silence(), self.run.progress
        progress.batch = 0
        start = time.perf_counter()
        with processes.StopRequest(self.world) as stop:
            train.train_epoch(self.run, self.step, self.training, None, self.rate, stop, book)
        self._wait()
        seconds = time.perf_counter() - start
        progress.epoch += 1
        return seconds, statistics.fmean(book.waiting)

    def loader(self) -> float:
        """Seconds for the batches alone, moved to the device."""
        self.training.sampler.set_epoch(self.run.progress.epoch)
        start = time.perf_counter()
        for batch in self.training.batches:
            data.to_device(batch, self.run.config.num_classes, self.world.device)
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)


def settings_of(model: str, files: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Flags of train.py that all contenders of a network share."""
    return {
        "clickme": (str(files / "clickme"),),
        "data_dir": str(files / "images"),
        "val_split": "",
        "model": model,
        "batch_size": args.batch,
        "epoch_size": args.updates * args.batch,
        "workers": args.workers,
        "log_interval": args.updates,
        "checkpoint_interval": 0,
        "amp": args.device != "cpu",
        "channels_last": args.device != "cpu" and "vit" not in model,
        "num_classes": args.classes,
        "device": args.device,
    } | ({"img_size": args.size} if args.size else {})


def measure(model: str, files: Path, args: argparse.Namespace, journal: records.Journal) -> None:
    """Rows of one network, of every contender that runs."""
    common = settings_of(model, files, args)
    base = {"section": "training", "device": torch.device(args.device).type}
    base |= {"case": f"{model}, batches of {args.batch}"}

    def failed(name: str, why: str) -> None:
        harness.say(f"  left out: {name}: {why}")
        journal.row(**base, implementation=name, failed=why)

    def ready(name: str) -> Contender:
        flags = dict(CONTENDERS[name])
        if "vit" in model:  # has no BatchNorm to freeze
            flags.pop("freeze_norm", None)
        harness.say(f"{model}: {name}")
        contender = Contender(config.Config(**common | flags))
        contender.epoch()  # compiles, fills caches, starts workers
        return contender

    names = [n for n in CONTENDERS if not (n.endswith("compiled") and args.device == "cpu")]
    contenders = harness.each(names, ready, failed)
    if not contenders:
        return
    first = next(iter(contenders.values()))
    seconds: dict[str, list[float]] = {name: [] for name in [*contenders, LOADER]}
    waits: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(args.rounds):
        harness.say(f"{model}: round {turn + 1} of {args.rounds}")
        turns = harness.each(list(contenders), lambda name, of=contenders: of[name].epoch(), failed)
        for name, (spent, waited) in turns.items():
            seconds[name].append(spent)
            waits[name].append(waited)
        contenders = {name: contenders[name] for name in turns}
        seconds[LOADER] += harness.each([LOADER], lambda _: first.loader(), failed).values()
    size = first.run.form.size
    for name, values in seconds.items():
        if len(values) == args.rounds:
            of = {"images": [args.batch, 3, size, size], "implementation": name}
            of |= {"quantity": "images per second", "unit": "1/s", "seconds": values}
            share = {"waiting_share": statistics.median(waits[name])} if name in waits else {}
            rate = first.images / statistics.median(values)
            journal.row(**base, **of, value=rate, **share)


def rehearse(files: Path, args: argparse.Namespace) -> None:
    """Trains one update of the first network on four images, with all that a run imports."""
    few = argparse.Namespace(**vars(args) | {"batch": 4, "updates": 1, "workers": 1, "classes": 2})
    write_files(files, 8, few.classes)
    Contender(config.Config(**settings_of(args.models[0], files, few))).epoch()


def print_table(rows: list[dict[str, Any]]) -> None:
    for case in dict.fromkeys(row["case"] for row in rows):
        print(f"\n{case}\n{'':<40}{'images/s':>10}{'of plain':>10}{'waits':>8}")
        here = [row for row in records.select(rows, case=case) if "value" in row]
        plain = {row["implementation"]: row["value"] for row in here}.get(PLAIN)
        for row in here:
            waits = f"{100 * row['waiting_share']:.1f} %" if "waiting_share" in row else "-"
            share = f"{row['value'] / plain:.2f}" if plain else "-"
            print(f"{row['implementation']:<40}{row['value']:>10.1f}{share:>10}{waits:>8}")
    for row in rows:
        if "failed" in row:
            print(f"left out: {row['case']}, {row.get('implementation', 'all')}: {row['failed']}")


def main() -> int:
    parser = program.arguments(__doc__, rounds=3)
    add = parser.add_argument
    add("--models", nargs="+", default=["resnet50", "vit_small_patch16_224"])
    add("--size", type=int, help="of images; default: the model's")
    add("--batch", type=int, default=256)
    add("--updates", type=int, default=20, help="of an epoch")
    add("--workers", type=int, default=14)
    add("--images", type=int, default=2048, help="files of each kind")
    add("--classes", type=int, default=1000)
    parser.set_defaults(device="cuda" if torch.cuda.is_available() else "cpu", budget=3600.0)
    args = parser.parse_args()
    if args.images < args.classes:
        parser.error(f"--images: expected one a class, {args.classes} or more, got {args.images}")
    with tempfile.TemporaryDirectory() as directory:
        files = Path(directory)
        harness.say("an update of a few images: is everything there?")
        harness.attempt(lambda: rehearse(files / "few", args), sys.exit)
        harness.say(f"writing {args.images} files of each kind")
        write_files(files, args.images, args.classes)
        work = {model: partial(measure, model, files, args) for model in args.models}
        return program.work_through(work, args, print_table, format=records.FORMAT, goals=[])


if __name__ == "__main__":
    sys.exit(main())
