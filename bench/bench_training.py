"""The training program at full size: images per second, plain and harmonized, and the loader alone.

    python bench/bench_training.py                         ResNet-50 and ViT-S/16 at 224, one GPU
    python bench/bench_training.py --models resnet18 --size 64 --batch 8 --device cpu

Each contender is train.py's own loop (``train_epoch``) on stand-in data of realistic size, written
here: ClickMe shards of 256x256 and a folder of 500x375 photographs' stand-ins, waves and noise as
JPEG. Contenders take turns, an epoch of ``--updates`` each, after one that is not counted. The
loader's ceiling is the same batches, moved to the device and thrown away. Prints a table and writes
a record.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness  # first of all: it sets what torch reads when it is loaded

# isort: split
import numpy as np
import records
import torch
from PIL import Image

sys.path.append(str(harness.ROOT / "python"))
import train
from training import checkpoint, config, data, networks, processes

from harmonizer_ext.clickme import write_records

PLAIN = "cross entropy alone"
#: What differs from the plain network: flags of train.py.
CONTENDERS: dict[str, dict[str, Any]] = {
    PLAIN: {"lambda_harmonization": 0.0},
    "harmonized, rows with a map": {"freeze_norm": True},
    "harmonized, all rows": {"rows": "all"},
    "harmonized, rows with a map, compiled": {"freeze_norm": True, "torchcompile": True},
}


def picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Waves of several scales and some noise: about as many bytes as a photograph."""
    y, x = np.mgrid[:height, :width] / 256
    channels = []
    for _ in range(3):
        waves = rng.uniform(0, 20, (6, 3))
        channels.append(sum(np.sin(2 * np.pi * (a * y + b * x) + c) for a, b, c in waves))
    pixels = 128 + 25 * np.stack(channels, -1) + rng.normal(0, 8, (height, width, 3))
    return pixels.clip(0, 255).astype(np.uint8)


def jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_files(directory: Path, count: int, classes: int) -> None:
    """``clickme/`` with a shard, and ``images/train/<class>/``."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:256, :256]
    disc = (255 * np.exp(-((y - 120) ** 2 + (x - 140) ** 2) / 3000)).astype(np.uint8)
    (directory / "clickme").mkdir()
    write_records(
        directory / "clickme" / "train-0.tfrecords",
        (
            {"image": jpeg(picture(rng, 256, 256)), "heatmap": jpeg(disc), "label": n % classes}
            for n in range(count)
        ),
    )
    for number in range(count):
        path = directory / "images" / "train" / str(number % classes) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(picture(rng, 375, 500)))


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


def measure(model: str, files: Path, args: argparse.Namespace) -> tuple[list[Any], list[str]]:
    """Rows of the record for one network, and what could not be measured and why."""
    size = {"img_size": args.size} if args.size else {}
    common = {
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
    } | size
    contenders: dict[str, Contender] = {}
    left_out = []
    for name, changes in CONTENDERS.items():
        if name.endswith("compiled") and args.device == "cpu":
            continue
        flags = dict(changes)
        if "vit" in model:  # has no BatchNorm to freeze
            flags.pop("freeze_norm", None)
        harness.say(f"{model}: {name}")
        try:
            contender = Contender(config.Config(**common | flags))
            contender.epoch()  # compiles, fills caches, starts workers
        except (RuntimeError, ValueError) as error:
            left_out.append(f"{model}, {name}: {str(error).splitlines()[0]}")
            harness.say(f"  left out: {str(error).splitlines()[0]}")
            continue
        contenders[name] = contender
    if not contenders:
        return [], left_out
    first = next(iter(contenders.values()))
    seconds: dict[str, list[float]] = {name: [] for name in [*contenders, "loader alone"]}
    waits: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(args.rounds):
        harness.say(f"{model}: round {turn + 1} of {args.rounds}")
        for name, contender in contenders.items():
            spent, waited = contender.epoch()
            seconds[name].append(spent)
            waits[name].append(waited)
        seconds["loader alone"].append(first.loader())
    rows = []
    for name, values in seconds.items():
        median = statistics.median(values)
        row = {
            "section": "training",
            "device": first.world.device.type,
            "case": f"{model}, {args.batch}x3x{first.run.form.size}x{first.run.form.size}",
            "implementation": name,
            "quantity": "images per second",
            "unit": "1/s",
            "value": first.images / median,
            "seconds": values,
        }
        if name in waits:
            row["waiting_share"] = statistics.median(waits[name])
        rows.append(row)
    return rows, left_out


def print_table(rows: list[dict[str, Any]]) -> None:
    for case in dict.fromkeys(row["case"] for row in rows):
        print(f"\n{case}")
        print(f"{'':<40}{'images/s':>10}{'of plain':>10}{'waits':>8}")
        here = records.select(rows, case=case)
        plain = {row["implementation"]: row["value"] for row in here}.get(PLAIN)
        for row in here:
            waits = f"{100 * row['waiting_share']:.1f} %" if "waiting_share" in row else "-"
            share = f"{row['value'] / plain:.2f}" if plain else "-"
            print(f"{row['implementation']:<40}{row['value']:>10.1f}{share:>10}{waits:>8}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["resnet50", "vit_small_patch16_224"])
    parser.add_argument("--size", type=int, help="of images; default: the model's")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--updates", type=int, default=20, help="of an epoch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--images", type=int, default=2048, help="files of each kind")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="the record; default: a file in runs/bench")
    args = parser.parse_args()
    if args.images < args.classes:
        parser.error(f"--images: expected one a class, {args.classes} or more, got {args.images}")
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    with tempfile.TemporaryDirectory() as directory:
        files = Path(directory)
        harness.say(f"writing {args.images} files of each kind")
        write_files(files, args.images, args.classes)
        for model in args.models:
            measured, missing = measure(model, files, args)
            rows += measured
            left_out += missing
    record = {
        "format": records.FORMAT,
        "command": sys.argv,
        "machine": harness.machine(args.device),
        "notes": {"timing": "medians of epochs that take turns; the first of each is not counted"},
        "left_out": left_out,
        "goals": [],
        "rows": rows,
    }
    output = args.output or harness.default_output([args.device])
    harness.write_record(output, record)
    print_table(rows)
    for line in left_out:
        print(f"left out: {line}")
    print(f"\n{output}")
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
