"""The "how" experiment: animal or not, from the most important pixels alone (paper, figure 5).

    python python/reveal_experiment.py make data/clickme/val --output stimuli
    python python/reveal_experiment.py run stimuli --model resnet50 --output curves/resnet50
    python python/reveal_experiment.py run stimuli --model resnet50 --human human.json ...

make writes PNG files and manifest.json, from ClickMe shards (*.tfrecords or *.tar); from a folder
of images and maps, as evaluate.py takes them; or from a table images.csv with the columns image,
importance (both image files of one size) and label (an ImageNet class). run writes <output>.json
and <output>.png. A human curve is JSON: {"levels": [...], "accuracy": [...]}, with the levels of
the manifest and accuracies from 0 to 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import reprlib
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

try:
    import numpy as np
    from matplotlib.figure import Figure
    from PIL import Image
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(
        f"reveal_experiment.py: {error}; pip install harmonizer-ext[train]"
    ) from error

import command_line
from evaluating.data import FolderOfMaps, find_data
from evaluating.networks import Network
from evaluating.networks import load as load_network
from evaluating.tar_shards import TarShards

from harmonizer_ext import revealed_stimuli as stimuli
from harmonizer_ext.clickme import ClickMe
from harmonizer_ext.clickme.sample import check_label
from harmonizer_ext.files.images import read_image, read_map
from harmonizer_ext.files.lock import LOCK, locked
from harmonizer_ext.files.output import remove_partial, replacing, write_text
from harmonizer_ext.files.reading import MAX_BYTES, UnreadableError, read_file, reading
from harmonizer_ext.files.tables import read_json, read_rows
from harmonizer_ext.files.text import shown

MANIFEST = "manifest.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand; 0 if all is well, 1 for a problem, which is said in a line."""
    options = parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError) as problem:
        print(f"{options.command}: {command_line.message(problem)}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    make = commands.add_parser("make", help="make stimuli")
    make.add_argument(
        "source",
        type=Path,
        help="ClickMe shards or their folder, a folder of images and maps, or a .csv table",
    )
    make.add_argument("--output", type=Path, required=True, metavar="DIR")
    make.add_argument("--levels", type=int, default=10, help="from --lowest to 1 (default: 10)")
    make.add_argument("--lowest", type=float, default=0.01, help="share of pixels (default: 0.01)")
    make.add_argument(
        "--pixels",
        type=int,
        help="revealed at the highest level; images in which fewer are important are left out "
        "(default: as many as are important in every image)",
    )
    make.add_argument("--images", type=int, help="use so many, half of them animals")
    make.add_argument("--seed", type=int, default=0)
    make.add_argument(
        "--max-bytes",
        type=int,
        default=MAX_BYTES,
        help="that a record or an image may take in memory (default: %(default)s)",
    )
    make.set_defaults(run=make_stimuli)

    run = commands.add_parser("run", help="let a network decide")
    run.add_argument("stimuli", type=Path, help="what make has written")
    run.add_argument(
        "--model", required=True, help="name of a timm network, or a checkpoint of train.py"
    )
    run.add_argument(
        "--weights", type=Path, help="of the timm network (default: timm's pretrained ones)"
    )
    run.add_argument("--human", type=Path, help="JSON with levels and accuracy of people")
    run.add_argument("--output", type=Path, required=True, metavar="NAME")
    run.add_argument("--batch-size", type=int, default=64)
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run.set_defaults(run=run_network)
    return made


# --- stimuli --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image (3, H, W) and its importance (H, W), both 0 to 255; name and ImageNet class."""

    name: str
    image: Tensor
    importance: Tensor
    label: int

    @property
    def animal(self) -> bool:
        return self.label < stimuli.ANIMAL_CLASSES


def read_pictures(source: Path, max_bytes: int = MAX_BYTES) -> Iterator[Picture]:
    """The images of a table, of a folder of images and maps, or of ClickMe shards.

    Raises:
        ValueError, OSError: a column is missing, a label is none, or a file cannot be read.
    """
    if source.suffix != ".csv":
        yield from _read_samples(source, max_bytes)
        return
    for row in read_rows(source, ("image", "importance", "label"), "source"):
        image, importance = (source.parent / row[name] for name in ("image", "importance"))
        yield Picture(
            Path(row["image"]).stem,
            read_image(image, max_bytes),
            read_map(importance, max_bytes),
            _label(row, source),
        )


def _label(row: dict[str, str], source: Path) -> int:
    try:
        label = int(row["label"])
        check_label(label)
    except ValueError as error:
        raise UnreadableError(f"{shown(source)}: {shown(row['image'])}: {shown(error)}") from error
    return label


def _read_samples(source: Path, max_bytes: int) -> Iterator[Picture]:
    """From what evaluate.py takes, as stored: the maps are not blurred."""
    kind, files = find_data(source, "source")
    if kind == "folder":
        folder = FolderOfMaps(source, max_bytes=max_bytes)
        if folder.alphabetical is not None:
            raise ValueError(
                f"{source}: expected ImageNet's class numbers, got folders of other names; "
                f"labels.csv or classes.txt beside images/ gives them"
            )
        for name, sample in zip(folder.names, folder, strict=True):
            check_label(sample.label)
            yield Picture(name.replace("/", "-"), sample.image, sample.heatmap[0], sample.label)
        return
    if kind not in ("tfrecords", "tar"):
        raise ValueError(f"{source}: expected shards, a folder of images and maps, or a .csv table")
    shards = (ClickMe if kind == "tfrecords" else TarShards)(
        files, preprocess=None, max_bytes=max_bytes
    )
    for number, sample in enumerate(shards):
        yield Picture(f"clickme-{number:06d}", sample.image, sample.heatmap[0], sample.label)


def with_enough(pictures: Iterator[Picture], pixels: int) -> Iterator[Picture]:
    """Those in which so many pixels are important; says which others are left out."""
    for picture in pictures:
        available = stimuli.important_pixels(picture.importance)
        if available >= pixels:
            yield picture
        else:
            print(
                f"{shown(picture.name)} is left out: {available} important pixels", file=sys.stderr
            )


def choose(pictures: Iterator[Picture], count: int | None) -> list[Picture]:
    """All pictures, or the first ``count / 2`` animals and as many others."""
    if count is None:
        return list(pictures)
    chosen: dict[bool, list[Picture]] = {True: [], False: []}
    for picture in pictures:
        if len(chosen[picture.animal]) < count // 2:
            chosen[picture.animal].append(picture)
        if sum(map(len, chosen.values())) == count // 2 * 2:
            return chosen[True] + chosen[False]
    raise ValueError(
        f"--images: expected {count // 2} animals and {count // 2} others, the source has "
        f"{len(chosen[True])} and {len(chosen[False])}"
    )


def make_stimuli(options: argparse.Namespace) -> None:
    levels = stimuli.reveal_levels(options.levels, options.lowest)
    if options.pixels is not None and options.pixels < 1:
        raise ValueError(f"--pixels: expected 1 or more, got {options.pixels}")
    usable = with_enough(read_pictures(options.source, options.max_bytes), options.pixels or 1)
    pictures = choose(usable, options.images)
    names = [picture.name for picture in pictures]
    if len(pictures) < 2 or len(set(names)) != len(names):
        raise ValueError(
            f"{options.source}: expected two usable images or more of different names, got "
            f"{len(names)} with {len(set(names))} names"
        )
    common = min(stimuli.important_pixels(picture.importance) for picture in pictures)
    pixels = [max(1, round(level * (options.pixels or common))) for level in levels]
    options.output.mkdir(parents=True, exist_ok=True)
    with locked(options.output / LOCK):
        remove_partial(options.output)
        count = write_stimuli(options, pictures, levels, pixels)
    print(f"{count} stimuli of {len(pictures)} images, {pixels[0]} to {pixels[-1]} pixels")


def write_stimuli(
    options: argparse.Namespace,
    pictures: list[Picture],
    levels: Sequence[float],
    pixels: list[int],
) -> int:
    """Writes the stimuli and their manifest; returns their number."""
    entries = []
    for picture in tqdm(pictures, unit="image", disable=not sys.stderr.isatty()):
        # Its own seed: the same stimuli, whatever other images there are.
        seed = zlib.crc32(os.fsencode(f"{options.seed} {picture.name}"))
        revealed = stimuli.revealed_stimuli(picture.image, picture.importance, pixels, seed=seed)
        for level, stimulus in enumerate(revealed):
            path = options.output / f"{picture.name}_{level:02d}.png"
            with replacing(path) as file:
                Image.fromarray(stimulus.image.permute(1, 2, 0).numpy()).save(file, "PNG")
            entries.append(
                {
                    "file": path.name,
                    "image": picture.name,
                    "label": picture.label,
                    "animal": picture.animal,
                    "level": level,
                    "shift": stimulus.shift,
                    "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                }
            )
    manifest = {"seed": options.seed, "levels": levels, "pixels": pixels, "stimuli": entries}
    write_text(options.output / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return len(entries)


# --- decisions ------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of stimuli, whose files are as they were written.

    Raises:
        ValueError, OSError: a file is missing or has changed.
    """
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or not all(map(_is_entry, manifest.get("stimuli") or [None])):
        raise UnreadableError(
            f"{shown(folder / MANIFEST)}: expected stimuli as make writes them; make them again"
        )
    levels = manifest.get("levels")
    if not isinstance(levels, list) or not levels or len(manifest["stimuli"]) % len(levels):
        raise UnreadableError(
            f"{shown(folder / MANIFEST)}: expected every image at every level; make them again"
        )
    for entry in manifest["stimuli"]:
        if hashlib.sha256(read_file(folder / entry["file"])).hexdigest() != entry["sha256"]:
            raise ValueError(
                f"{shown(folder / entry['file'])} is not the file that {MANIFEST} describes; "
                "make the stimuli again"
            )
    return manifest


def _is_entry(entry: Any) -> bool:
    """Whether it describes a stimulus: one in the folder itself."""
    if not isinstance(entry, dict) or not {"file", "image", "animal", "sha256"} <= entry.keys():
        return False
    file = entry["file"]
    inside = isinstance(file, str) and file == os.path.basename(file) and file not in ("", "..")
    return inside and isinstance(entry["image"], str) and isinstance(entry["animal"], bool)


def read_human_curve(path: Path, levels: Sequence[float]) -> Tensor:
    """Accuracy of people at the levels of the stimuli.

    Raises:
        ValueError, OSError: it cannot be read, or is of other levels.
    """
    curve = read_json(path)
    if not isinstance(curve, dict):
        raise ValueError(
            f'{shown(path)}: expected {{"levels": [...], "accuracy": [...]}}, got '
            f"{reprlib.repr(curve)}"
        )
    theirs, accuracy = _numbers(curve, "levels", path), _numbers(curve, "accuracy", path)
    # A level written with two decimals of a percent is the level.
    if len(theirs) != len(levels) or not np.allclose(theirs, levels, rtol=0.01):
        raise ValueError(f"{shown(path)}: expected levels {list(levels)}, got {theirs}")
    if len(accuracy) != len(levels):
        raise ValueError(f"{shown(path)}: expected an accuracy for each of {len(levels)} levels")
    if not all(0 <= value <= 1 for value in accuracy):
        raise ValueError(f"{shown(path)}: expected accuracies from 0 to 1, got {accuracy}")
    return torch.tensor(accuracy, dtype=torch.float64)


def _numbers(curve: dict[str, Any], key: str, path: Path) -> list[float]:
    values = curve.get(key, [])
    with reading(path, f"numbers for {key}"):
        numbers = [value for value in values if math.isfinite(value)]
    if not isinstance(values, list) or len(numbers) != len(values):
        raise UnreadableError(f"{shown(path)}: expected a list of finite numbers for {key}")
    return numbers


@torch.no_grad()
def decide(network: Network, files: Sequence[Path], batch: int, device: str) -> Tensor:
    """Probability of an animal for each file, (n,) float64."""
    model, size = network.model.to(device), network.form.size
    results = []
    for start in tqdm(range(0, len(files), batch), disable=not sys.stderr.isatty()):
        images = torch.stack([read_image(file) for file in files[start : start + batch]]).to(device)
        images = images.float()
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
        pixels = network.form(images.clamp(0, 255), channels_last=False)
        results.append(stimuli.animal_probability(model(pixels)).cpu())
    return torch.cat(results)


def run_network(options: argparse.Namespace) -> None:
    manifest = read_manifest(options.stimuli)
    levels, entries = manifest["levels"], manifest["stimuli"]
    human = None if options.human is None else read_human_curve(options.human, levels)
    network = load_network(options.model, checkpoint_path=options.weights)
    files = [options.stimuli / entry["file"] for entry in entries]
    probability = decide(network, files, options.batch_size, options.device)
    probability = probability.view(-1, len(levels))  # an image's levels follow one another
    animal = torch.tensor([entry["animal"] for entry in entries]).view(-1, len(levels))
    correct = ((probability > 0.5) == animal).double()
    curve = stimuli.decision_curve(correct)
    record = {
        "model": options.model,
        "network": network.description,
        "levels": levels,
        "accuracy": [point.mean for point in curve],
        "standard_error": [point.standard_error for point in curve],
        "images": len(correct),
        "animal_probability": {
            entries[i * len(levels)]["image"]: row.tolist() for i, row in enumerate(probability)
        },
    }
    if human is not None:
        correlation = dataclasses.asdict(stimuli.correlate_curves(correct, human))
        # JSON has no NaN, which that of a flat curve is.
        record["human"] = {k: None if math.isnan(v) else v for k, v in correlation.items()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    # Behind the whole name: timm's have dots in them, resnet50.a1_in1k.
    output = str(options.output)
    with locked(Path(output + LOCK)):
        write_text(output + ".json", json.dumps(record, indent=1) + "\n")
        with replacing(output + ".png") as file:
            draw(record, human).savefig(file, format="png")
    print(f"{shown(options.model)}: {record['accuracy'][0]:.3f} to {record['accuracy'][-1]:.3f}")


def draw(record: dict[str, Any], human: Tensor | None) -> Figure:
    """Accuracy by revealed share of the important pixels."""
    figure = Figure(figsize=(5, 3.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    percent = [100 * level for level in record["levels"]]
    axes.errorbar(
        percent, record["accuracy"], record["standard_error"], marker="o", label="network"
    )
    if human is not None:
        axes.plot(percent, human.tolist(), color="black", marker="s", label="people")
        correlation = record["human"]["spearman"]
        axes.set_title("a flat curve" if correlation is None else f"ρ = {correlation:.2f}")
    axes.axhline(0.5, color="gray", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_xlabel("revealed important pixels (%)")
    axes.set_ylabel("right decisions")
    axes.set_ylim(0, 1.02)
    # A name is text, not mathematics, nor one of the labels that matplotlib leaves out.
    texts = axes.legend(frameon=False).get_texts()
    name = next(text for text in texts if text.get_text() == "network")
    name.set(text=shown(record["model"]), parse_math=False, usetex=False)
    return figure


if __name__ == "__main__":
    sys.exit(main())
