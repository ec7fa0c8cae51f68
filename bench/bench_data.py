"""The data loader against what the cores can decode, and how long training waits for it.

    python bench/bench_data.py                       ten minutes on two cores
    python bench/bench_data.py --only train          the waiting alone

A bare loop reads records and decodes both JPEGs in as many processes as there are cores, and does
nothing else. The loader has as many workers; the main process only takes its batches. Where workers
do more than decode, a second bare loop does the same work without collating and without sending.
All take turns, in a new order every round, on the same files: photographs of scikit-image and
scikit-learn, cut and scaled, 256x256 with a map as ClickMe has them, and 500x375 as is usual in
ImageNet. Prints tables and writes a record.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness  # first of all: it sets what torch reads when it is loaded

# isort: split
import records
import torch
import torch.multiprocessing as mp

sys.path.append(str(harness.ROOT / "python"))
import timm_networks

import harmonizer_ext as hx
from harmonizer_ext.clickme import ClickMe, shards, tfrecord, write_records
from harmonizer_ext.data import MixedBatchSampler, MixedDataset, create_loader

SHARE = 0.2
TRAINING_BATCH = 32
DECODERS = ("pillow", "simplejpeg", "simplejpeg-fast")
PREPROCESSING = (None, "released-heatmap", "released")
SECTIONS = ("clickme", "mixed", "train")
#: Of the record.
DECODE, WORK, LOADER = "bare loop", "bare loop with the same work", "loader"
#: Of a row: of a turn when they are measured, of a batch in the record.
TIMES = ("value", "median", "quantile_20", "quantile_80", "lower_quartile", "minimum")

Work = Callable[[Any], object]


# --- the files ------------------------------------------------------------------------------------


def photographs() -> list[Any]:
    """PIL images of 300x451 to 512x512 pixels."""
    from PIL import Image
    from skimage import data
    from sklearn.datasets import load_sample_images

    pixels = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket()]
    return [Image.fromarray(array) for array in [*pixels, *load_sample_images().images]]


def jpeg(image: Any, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def click_map(generator: torch.Generator) -> Any:
    """Clicks as ClickMe has them: bright discs on black, blurred."""
    from PIL import Image

    y, x = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="ij")
    centres = 128 + 40 * torch.randn(12, 2, 1, 1, generator=generator)
    discs = torch.exp(-((y - centres[:, 0]) ** 2 + (x - centres[:, 1]) ** 2) / 300).amax(0)
    return Image.fromarray((255 * discs).byte().numpy(), "L")


def pieces(width: int, height: int, count: int) -> Iterator[Any]:
    """Random parts of the photographs, scaled."""
    generator = torch.Generator().manual_seed(0)
    images = photographs()
    for number in range(count):
        image = images[number % len(images)]
        scale = min(image.width / width, image.height / height)
        scale *= 0.6 + 0.4 * float(torch.rand((), generator=generator))
        w, h = scale * width, scale * height
        left, top = torch.rand(2, generator=generator).tolist()
        left, top = left * (image.width - w), top * (image.height - h)
        yield image.resize((width, height), box=(left, top, left + w, top + h))


def write_files(directory: Path, count: int) -> tuple[Path, Path]:
    """A shard of ClickMe and an ImageFolder of ten classes."""
    generator = torch.Generator().manual_seed(1)
    shard, folder = directory / "train-0.tfrecords", directory / "images"
    write_records(
        shard,
        (
            {"image": jpeg(image, 90), "heatmap": jpeg(click_map(generator), 90), "label": n % 1000}
            for n, image in enumerate(pieces(256, 256, count))
        ),
    )
    for number, image in enumerate(pieces(500, 375, count)):
        path = folder / str(number % 10) / f"{number}.jpeg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(image, 95))
    return shard, folder


# --- the contenders -------------------------------------------------------------------------------


class BareLoop:
    """Processes that call ``work`` for the items of batches, and send nothing."""

    def __init__(self, work: Work, batches: list[list[Any]], processes: int) -> None:
        context = mp.get_context("fork")
        self._pipes = []
        for number in range(processes):
            here, there = context.Pipe()
            items = [item for batch in batches[number::processes] for item in batch]
            context.Process(target=_loop, args=(work, items, there), daemon=True).start()
            self._pipes.append(here)

    def milliseconds(self, index: int) -> float:
        """Milliseconds of all batches."""
        start = time.perf_counter()
        for pipe in self._pipes:
            pipe.send(True)
        for pipe in self._pipes:
            pipe.recv()
        return (time.perf_counter() - start) * 1e3

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(False)


def _loop(work: Work, items: list[Any], pipe: Any) -> None:
    torch.set_num_threads(1)
    parent = os.getppid()
    while os.getppid() == parent:  # others hold the other end too: it is never seen to close
        if not pipe.poll(1):
            continue
        if not pipe.recv():
            return
        for item in items:
            work(item)
        pipe.send(True)


class Loader:
    """An epoch, of which the main process only takes the batches."""

    def __init__(self, dataset: Any, batches: list[list[Any]], processes: int) -> None:
        self._loader = create_loader(dataset, batches, workers=processes)

    def milliseconds(self, index: int) -> float:
        """Milliseconds of all batches."""
        start = time.perf_counter()
        for _ in self._loader:
            pass
        return (time.perf_counter() - start) * 1e3

    def close(self) -> None:
        del self._loader


def bare_clickme(dataset: ClickMe) -> Work:
    """Reads a record and decodes it, with the library itself."""
    import simplejpeg
    from PIL import Image

    def work(draw: Any) -> None:
        record = tfrecord.read_record(*dataset.locate(draw.item), verify=dataset.verify)
        image, heatmap, _ = shards.read_features(record)
        if dataset.decoder == "pillow":
            for data in (image, heatmap):
                Image.open(io.BytesIO(data)).load()
        else:
            fast = dataset.decoder == "simplejpeg-fast"
            simplejpeg.decode_jpeg(image, "RGB", fastdct=fast)
            simplejpeg.decode_jpeg(heatmap, "GRAY", fastdct=fast)

    return work


def measure(
    case: str, loops: dict[str, Any], batches: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of the record: the time of a batch, and the share of the bare loop's speed."""
    harness.say(f"  {case}")
    try:
        timings = harness.interleave(
            loops, device="cpu", seconds=args.seconds, minimum_rounds=args.rounds
        )
    finally:
        for loop in loops.values():
            loop.close()
    rows = []
    for name, timing in timings.items():
        of_bare = timings[DECODE].lower_quartile / timing.lower_quartile
        times = harness.timing_row(timing)
        times |= {key: times[key] / batches for key in TIMES}
        rows.append(
            {"section": "data", "device": "cpu", "case": case, "implementation": name}
            | times
            | {"batch": args.batch, "images_per_second": args.batch / times["lower_quartile"] * 1e3}
            | {"speed_of_bare_loop": of_bare}
        )
    return rows


def draws(mapped: int, unmapped: int, batch: int, batches: int) -> list[list[Any]]:
    sampler = MixedBatchSampler(
        mapped, unmapped, batch, mapped_share=SHARE, epoch_size=batches * batch
    )
    return list(sampler)


def measure_clickme(shard: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Each decoder with each preprocessing, ClickMe alone."""
    rows = []
    for decoder in args.decoders:
        for preprocess in PREPROCESSING:
            clickme = ClickMe(shard, preprocess=preprocess, decoder=decoder)
            batches = draws(len(clickme), 0, args.batch, args.batches)
            dataset = MixedDataset(clickme, None)
            loops = {
                DECODE: BareLoop(bare_clickme(clickme), batches, args.processes),
                LOADER: Loader(dataset, batches, args.processes),
            }
            if preprocess is not None:
                loops[WORK] = BareLoop(dataset.__getitem__, batches, args.processes)
            case = f"ClickMe, {decoder}, {preprocess or 'stored'}"
            rows += measure(case, loops, len(batches), args)
    return rows


def measure_mixed(shard: Path, folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """ClickMe and an ImageFolder, cut and flipped for a network of 224x224."""
    from harmonizer_ext.data.augmentation import training_transform

    images = image_folder(folder)
    rows = []
    for decoder in args.decoders:
        clickme = ClickMe(shard, preprocess="released-heatmap", decoder=decoder)
        batches = draws(len(clickme), len(images), args.batch, max(args.batches // 2, 1))
        dataset = MixedDataset(clickme, images, transform=training_transform(224))
        mapped = bare_clickme(clickme)

        def work(draw: Any, mapped: Work = mapped) -> None:
            if draw.mapped:
                mapped(draw)
            else:
                images[draw.item]

        loops = {
            DECODE: BareLoop(work, batches, args.processes),
            LOADER: Loader(dataset, batches, args.processes),
            WORK: BareLoop(dataset.__getitem__, batches, args.processes),
        }
        case = f"20 % ClickMe ({decoder}), 80 % ImageFolder, training_transform(224)"
        rows += measure(case, loops, len(batches), args)
    return rows


def image_folder(folder: Path) -> Any:
    from torchvision.datasets import ImageFolder

    return ImageFolder(os.fspath(folder))


# --- training -------------------------------------------------------------------------------------


def measure_training(shard: Path, folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """How long the main process waits for a batch, of the step, on a small ViT."""
    from harmonizer_ext.data.augmentation import training_transform

    timm = timm_networks.import_timm()
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=1000)
    step = hx.HarmonizerLoss(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((123.7, 116.3, 103.5), (58.4, 57.1, 57.4)))
    clickme = ClickMe(shard, preprocess="released-heatmap", decoder="simplejpeg-fast")
    images = image_folder(folder)
    batches = draws(len(clickme), len(images), TRAINING_BATCH, args.steps + 2)
    dataset = MixedDataset(clickme, images, transform=training_transform(224))
    waits, steps = [], []
    before = time.perf_counter()
    for batch in create_loader(dataset, batches, workers=args.processes):
        got = time.perf_counter()
        out = step((batch.image - mean) / std, batch.label, batch.heatmap, batch.token)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after = time.perf_counter()
        waits.append((got - before) * 1e3)
        steps.append((after - before) * 1e3)
        harness.say(f"  step {steps[-1]:.0f} ms, of which waiting {waits[-1]:.2f} ms")
        before = after
    # The first waits for the workers to start, the second may still find the queue short.
    waits, steps = waits[2:], steps[2:]
    row = {
        "section": "data",
        "device": "cpu",
        "case": f"train vit_tiny_patch16_224, {TRAINING_BATCH}x3x224x224",
    }
    return [
        row | {"implementation": name} | harness.timing_row(harness.Timing.of(times)) | more
        for name, times, more in (
            ("step, waiting included", steps, {}),
            ("waiting", waits, {"share_of_steps": sum(waits) / sum(steps)}),
        )
    ]


# --- the program ----------------------------------------------------------------------------------


def print_table(rows: list[dict[str, Any]]) -> None:
    """Prints the rows for reading, and as a table of Markdown."""
    print("| | images/s | of the bare loop | of the same work |")
    print("|---|---:|---:|---:|")
    for row in records.select(rows, implementation=LOADER):
        speed = {
            other["implementation"]: other["images_per_second"]
            for other in records.select(rows, case=row["case"])
        }
        same = f"{100 * speed[LOADER] / speed[WORK]:.1f} %" if WORK in speed else ""
        print(
            f"| {row['case']} | {speed[LOADER]:.0f} | "
            f"{100 * speed[LOADER] / speed[DECODE]:.1f} % | {same} |"
        )
    for row in records.select(rows, implementation="waiting"):
        print(
            f"\n{row['case']}: waits {row['median']:.2f} ms of a step (median), "
            f"{100 * row['share_of_steps']:.2f} % of all steps"
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=SECTIONS, help="may be repeated")
    parser.add_argument("--decoders", nargs="+", choices=DECODERS, default=DECODERS)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: the cores")
    parser.add_argument("--images", type=int, default=512, help="files of each kind")
    parser.add_argument("--batches", type=int, default=16, help="in a turn")
    parser.add_argument("--batch", type=int, default=128, help="images of a batch")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each, at least")
    parser.add_argument("--seconds", type=float, default=15, help="for a case, about")
    parser.add_argument("--steps", type=int, default=20, help="of training")
    parser.add_argument("--output", type=Path, help="the record; default: a file in runs/bench")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    timm_networks.import_torchvision()
    machine = harness.machine("cpu")
    for package in ("pillow", "simplejpeg", "torchvision"):
        machine["versions"][package] = importlib.metadata.version(package)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        harness.say(f"writing {args.images} files of each kind")
        shard, folder = write_files(Path(directory), args.images)
        sections = args.only or SECTIONS
        if "clickme" in sections:
            rows += measure_clickme(shard, args)
        if "mixed" in sections:
            rows += measure_mixed(shard, folder, args)
        if "train" in sections:
            rows += measure_training(shard, folder, args)
    record = {
        "format": records.FORMAT,
        "command": sys.argv,
        "machine": machine,
        "notes": {
            "timing": f"milliseconds of a batch of {args.batch}, over an epoch of the loader and "
            "the same batches in the bare loops; they take turns, in a new order every round",
            "speeds": "images_per_second and speed_of_bare_loop are of the lower quartiles: "
            "others use the machine, and noise only adds",
        },
        "left_out": [],
        "goals": [],
        "rows": rows,
    }
    output = args.output or harness.default_output(["cpu"])
    harness.write_record(output, record)
    print_table(rows)
    print(f"\n{output}")


if __name__ == "__main__":
    main()
