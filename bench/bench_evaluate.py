"""The cost of evaluating a network beyond its own forward pass and input gradient, on a CPU.

    python bench/bench_evaluate.py --model resnet50 --images 1000

Blocks of images are evaluated (``evaluating.scoring.evaluate``: decoding, blur, map, Spearman,
Dice, IoU, the centre-bias control and all start-up) and, in turn, the network runs forward and
takes its input gradient on the same batches, which lie in memory ready for it. The report with its
galleries, once for all images, is timed apart and added. Weights are random: the time of no step
depends on them. CPU seconds are those of the process and its workers: what others do on the machine
is not among them, as it is in the elapsed ones.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness  # first of all: it sets what torch reads when it is loaded

# isort: split
import bench_spearman
import numpy as np
import torch
from PIL import Image

import harmonizer_ext as hx
from harmonizer_ext import alignment

sys.path.append(str(harness.ROOT / "python"))
import timm_networks
from evaluating import networks, report, scoring
from evaluating.data import ImageSet


def write_shard(path: Path, images: int) -> None:
    """Pictures of smooth noise at many scales, whose JPEGs are as large as those of photographs."""
    generator = np.random.default_rng(0)

    def jpeg(pixels: np.ndarray) -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=90)
        return file.getvalue()

    def noise(channels: int) -> np.ndarray:
        total = np.zeros((256, 256, channels))
        for size in (4, 16, 64, 256):
            coarse = generator.integers(0, 256, (size, size, channels), dtype=np.uint8)
            parts = [
                Image.fromarray(coarse[..., c]).resize((256, 256), Image.Resampling.BICUBIC)
                for c in range(channels)
            ]
            total += np.stack([np.asarray(part, float) for part in parts], -1) * size**-0.5
        total = (total - total.min()) / (total.max() - total.min())
        return np.uint8(255 * total)

    records = (
        {
            "image": jpeg(noise(3)),
            "heatmap": jpeg(noise(1)[..., 0]),
            "label": int(generator.integers(1000)),
        }
        for _ in range(images)
    )
    hx.clickme.write_records(path, records)


class Stopwatch:
    """Elapsed and CPU seconds since it was made; those of workers count once they have ended."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), sum(os.times()[:4])

    def read(self) -> tuple[float, float]:
        elapsed, cpu = self._now()
        return elapsed - self._start[0], cpu - self._start[1]


def measure(name: str, images: int, block: int, batch_size: int, workers: int) -> dict[str, Any]:
    """Seconds of both, block by block in a new order each time, and of the report."""
    model = timm_networks.import_timm().create_model(name).eval()
    form = networks.InputForm(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    tested = networks.Network(name, model, form)
    options: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "quiet": True}
    with tempfile.TemporaryDirectory() as folder:
        write_shard(Path(folder) / "val-0.tfrecords", images)
        data = ImageSet(folder)

        def evaluate(rows: list[int]) -> None:
            part = ImageSet(folder)
            part.rows = rows
            scoring.evaluate([tested], part, gallery=False, **options)

        def alone(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
            for pixels, labels in batches:
                hx.input_gradient(model, pixels, labels, create_graph=False)

        def ready(rows: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
            part = ImageSet(folder)
            part.rows = rows
            loaded = part.batches(224, batch_size, workers=0, pin_memory=False)
            return [(form(batch.image, False), batch.label) for batch in loaded]

        blocks = [data.rows[start : start + block] for start in range(0, images, block)]
        evaluate(blocks[0][:batch_size])  # code and kernels are loaded
        seconds: dict[str, list[tuple[float, float]]] = {"evaluate": [], "alone": []}
        shuffle = random.Random(0)
        for number, rows in enumerate(blocks):
            batches = ready(rows)
            for which in shuffle.sample(["evaluate", "alone"], 2):
                watch = Stopwatch()
                if which == "evaluate":
                    evaluate(rows)
                else:
                    alone(batches)
                seconds[which].append(watch.read())
            ratios = [
                a / b for a, b in zip(seconds["evaluate"][-1], seconds["alone"][-1], strict=True)
            ]
            harness.say(
                f"{name}, block {number + 1} of {len(blocks)}: {ratios[0]:.3f} elapsed, "
                f"{ratios[1]:.3f} CPU"
            )
        few = ImageSet(folder, max_images=32)
        watch = Stopwatch()
        scoring.evaluate([tested], few, gallery=False, **options)
        without = watch.read()
        watch = Stopwatch()
        result = scoring.evaluate([tested], few, **options)
        report.write(result, Path(folder) / "report.html")
        reporting = [max(a - b, 0.0) for a, b in zip(watch.read(), without, strict=True)]
    row: dict[str, Any] = {
        "network": name,
        "images": images,
        "batch_size": batch_size,
        "workers": workers,
        "threads": torch.get_num_threads(),
    }
    for place, clock in enumerate(("elapsed", "cpu")):
        ours, alone_ = (sum(t[place] for t in seconds[which]) for which in ("evaluate", "alone"))
        row[clock] = {
            "alone_seconds": alone_,
            "evaluate_seconds": ours,
            "report_seconds": reporting[place],
            "ratio": ours / alone_,
            "ratio_with_report": (ours + reporting[place]) / alone_,
            "ratio_median_of_blocks": statistics.median(
                a[place] / b[place]
                for a, b in zip(seconds["evaluate"], seconds["alone"], strict=True)
            ),
        }
    return row


def measure_metrics(batch: int = 32) -> dict[str, Any]:
    """Milliseconds a pair of maps of our metrics and of the usual loops over maps, in turns."""
    a, b = bench_spearman.pair(batch)
    calls: dict[str, harness.Call] = {
        "spearman": lambda _: alignment.spearman(a, b),
        "scipy.stats.spearmanr": lambda _: bench_spearman.scipy_loop(a, b),
        "dice": lambda _: alignment.dice(a, b),
        "dice of NumPy, as released": lambda _: bench_spearman.numpy_loop(a, b),
    }
    timings = harness.interleave(calls, device="cpu", seconds=10.0)
    return {name: timing.median / batch for name, timing in timings.items()}


def print_table(record: dict[str, Any]) -> None:
    print(f"{'':<20}{'forward and gradient':>22}{'evaluation':>12}{'ratio':>8}{'with report':>13}")
    for row in record["rows"]:
        for clock in ("elapsed", "cpu"):
            times = row[clock]
            alone, ours = (
                f"{1e3 * times[f'{which}_seconds'] / row['images']:.1f} ms"
                for which in ("alone", "evaluate")
            )
            print(
                f"{row['network'] + ', ' + clock:<20}{alone:>22}{ours:>12}"
                f"{times['ratio']:>8.3f}{times['ratio_with_report']:>13.3f}"
            )
    for name, milliseconds in record["metrics_ms_a_pair"].items():
        print(f"{name:<42}{milliseconds:.3f} ms a pair")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--block", type=int, default=250, help="images between two turns")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=0, help="default: evaluate.py's on a CPU")
    parser.add_argument("--output", type=Path, help="the record; default: a file in runs/bench")
    options = parser.parse_args()
    record: dict[str, Any] = {"command": sys.argv, "machine": harness.machine("cpu")}
    record["metrics_ms_a_pair"] = measure_metrics()
    record["rows"] = [
        measure(name, options.images, options.block, options.batch_size, options.workers)
        for name in options.model
    ]
    output = options.output or harness.default_output(["cpu"])
    harness.write_record(output, record)
    print_table(record)
    print(f"\n{output}")


if __name__ == "__main__":
    main()
