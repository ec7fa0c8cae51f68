"""Measures whether networks look where people look, and writes a table, a JSON and a report.

    python python/evaluate.py --data data/clickme/val --model resnet50 vit_small_patch16_224

    python python/evaluate.py --data data/clickme/val --device cuda \
        --model baseline=resnet50 harmonized=runs/train/best_alignment.pt \
        --pair baseline:harmonized

Of every network: top-1 accuracy; Spearman's correlation, Dice and IoU of its feature importance map
(by default the input gradient of the true class's logit) with the human map; the alignment score,
which is the mean correlation relative to the agreement between people. Beside them what the mean
map of all other images reaches, the control for centre bias. The defaults are those of the authors'
released ``evaluate_clickme``; flags have timm's names where timm has them.

The data are TFRecord shards of ClickMe or Clicktionary, WebDataset shards, ``.npz`` or ``.pth``
files, or a folder of images and maps: ``images/NAME.jpg``, ``maps/NAME.png`` or ``.npy``, and
labels from ``labels.csv`` (columns ``name,label``) or from a folder for each class
(``evaluating/data.py`` has the details).

The directory ``--output`` gets ``report.html``, one page with all pictures in it; ``results.json``;
and ``images.csv``, each image's numbers. ``evaluating.scoring.evaluate`` and
``evaluating.report.write`` do the same from Python.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path

import command_line
import timm_networks
import torch

from harmonizer_ext import alignment
from harmonizer_ext.files.lock import LOCK, locked
from harmonizer_ext.files.output import remove_partial
from harmonizer_ext.files.reading import MAX_BYTES
from harmonizer_ext.files.tables import read_rows
from harmonizer_ext.files.text import shown

try:
    timm_networks.import_timm()
    from evaluating import networks, report, scoring, summary
    from evaluating.data import ImageSet
    from timm.data import ImageNetInfo
except ImportError as error:
    raise ImportError(f"evaluate.py: {error}; pip install harmonizer-ext[train]") from error


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    group = made.add_argument_group("networks")
    group.add_argument(
        "--model", nargs="+", required=True, metavar="[NAME=]MODEL",
        help="names of timm, or checkpoints of train.py (.pt); NAME= names it in the table",
    )  # fmt: skip
    group.add_argument(
        "--checkpoint", nargs="+", metavar="FILE",
        help="weights (of timm, torch or train.py) for the timm models, one each; - takes timm's "
        "pretrained ones, which is the default",
    )  # fmt: skip
    group.add_argument("--num-classes", type=int, help="of the timm models; default: their own")
    group.add_argument("--img-size", type=int, help="side of the images; default: each network's")
    group.add_argument(
        "--pair", nargs="+", default=[], metavar="BASELINE:HARMONIZED",
        help="names of networks between which the report draws an arrow",
    )  # fmt: skip
    group.add_argument(
        "--accuracy", metavar="CSV",
        help="top-1 in percent from a file with columns model and top1, such as timm's "
        "results-imagenet.csv, for the scatter; default: on the data themselves",
    )  # fmt: skip
    group = made.add_argument_group("data")
    group.add_argument(
        "--data", nargs="+", required=True, metavar="PATH",
        help="shards, directories, glob patterns, or one folder of images and maps",
    )  # fmt: skip
    group.add_argument("--data-name", help="what the report calls them; default: the paths")
    group.add_argument("--max-images", type=int, help="so many, at equal distances; default: all")
    group.add_argument(
        "--decoder", choices=("pillow", "simplejpeg", "simplejpeg-fast"),
        help="of JPEGs in shards; default: simplejpeg-fast, which gives the pixels of the released "
        "pipeline to the bit, where simplejpeg is installed",
    )  # fmt: skip
    group.add_argument(
        "--max-bytes", type=int, default=MAX_BYTES,
        help="that a record or an image may take in memory; default: %(default)s",
    )  # fmt: skip
    group = made.add_argument_group("explanation")
    group.add_argument(
        "--explanation", default="gradient", metavar="NAME",
        help=f"{', '.join(networks.EXPLANATIONS)}; or MODULE:NAME, called with the network for an "
        f"attribution like Captum's (captum.attr:DeepLift) or a function of images and labels; "
        f"default: %(default)s",
    )  # fmt: skip
    group.add_argument(
        "--reduce", default="abs_max", choices=("abs_max", "mean", "l2"),
        help="colour channels to one number; default: %(default)s",
    )  # fmt: skip
    group.add_argument("--samples", type=int, default=50, help="of smoothgrad; default: 50")
    group.add_argument(
        "--noise", type=float, default=0.15,
        help="of smoothgrad, as a part of the image's range; default: 0.15",
    )  # fmt: skip
    group.add_argument("--steps", type=int, default=50, help="of integrated-gradients; default: 50")
    group.add_argument(
        "--layer", nargs="+", metavar="NAME",
        help="of grad-cam: one for all networks, or one for each",
    )  # fmt: skip
    group = made.add_argument_group("score")
    group.add_argument(
        "--ceiling", type=float, default=alignment.CLICKME_CEILING,
        help="correlation between people; default: %(default)s, that of ImageNet ClickMe",
    )  # fmt: skip
    group.add_argument(
        "--reducers",
        type=int,
        nargs="+",
        default=[1],
        help="compare at these divisions of the size too; the paper's code has 1 4 16; default: 1",
    )
    group.add_argument(
        "--no-center-bias", action="store_true",
        help="without the control, which keeps all human maps in memory, 200 KB each",
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=0, help="of the bootstrap and random images")
    group = made.add_argument_group("hardware")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.add_argument("-b", "--batch-size", type=int, default=64)
    group.add_argument(
        "-j", "--workers", type=int,
        help="processes that decode; default: 2, on a CPU 0, where the network wants every core",
    )  # fmt: skip
    group.add_argument("--channels-last", action="store_true")
    group = made.add_argument_group("output")
    group.add_argument("--output", default="runs/evaluate", help="directory; default: %(default)s")
    group.add_argument("--title", default="Where networks and people look", help="of the report")
    group.add_argument("--no-gallery", action="store_true", help="a report without images")
    group.add_argument("--quiet", action="store_true", help="no progress bars")
    return made


def main(arguments: list[str] | None = None) -> dict:
    """Runs the program; returns what ``results.json`` holds."""
    made = parser()
    options = made.parse_args(arguments)
    data = ImageSet(
        options.data,
        name=options.data_name,
        max_images=options.max_images,
        decoder=options.decoder,
        max_bytes=options.max_bytes,
    )
    pairs = [_pair(made, text) for text in options.pair]
    chosen = _networks(made, options)
    # What can be wrong with them is said before hours of work.
    accuracy = read_accuracy(options.accuracy, chosen) if options.accuracy else {}
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    with locked(output / LOCK):
        remove_partial(output)
        evaluation = scoring.evaluate(
            chosen,
            data,
            pairs=pairs,
            ceiling=options.ceiling,
            reducers=options.reducers,
            batch_size=options.batch_size,
            workers=options.workers,
            device=options.device,
            channels_last=options.channels_last,
            center_bias=not options.no_center_bias,
            gallery=not options.no_gallery,
            seed=options.seed,
            quiet=options.quiet,
        )
        evaluation.accuracy = accuracy
        given = sys.argv[1:] if arguments is None else arguments
        command = shlex.join(["python", "python/evaluate.py", *given])
        return write(evaluation, output, command=command, title=options.title)


def write(evaluation: scoring.Evaluation, output: Path, *, command: str, title: str) -> dict:
    """Writes numbers first, pictures afterwards; returns what ``results.json`` holds."""
    numbers = summary.summarize(evaluation, command)
    summary.write_json(numbers, output / "results.json")
    summary.write_images(evaluation, output / "images.csv")
    print(summary.table(numbers))
    report.write(
        evaluation,
        output / "report.html",
        command=command,
        title=title,
        class_names=_class_names(evaluation),
        numbers=numbers,
    )
    print(f"{shown(output)}: report.html, results.json, images.csv")
    return numbers


def _networks(made: argparse.ArgumentParser, options: argparse.Namespace) -> list[networks.Network]:
    count = len(options.model)
    checkpoints = options.checkpoint or ["-"] * count
    if len(checkpoints) != count:
        made.error(f"--checkpoint: expected one for each of {count} models, got {len(checkpoints)}")
    layers = options.layer or [None]
    layers = layers * count if len(layers) == 1 else layers
    if len(layers) != count:
        made.error(f"--layer: expected one, or one for each of {count} models, got {len(layers)}")
    loaded = []
    for spec, checkpoint, layer in zip(options.model, checkpoints, layers, strict=True):
        network = networks.load(
            spec,
            checkpoint_path=None if checkpoint == "-" else checkpoint,
            num_classes=options.num_classes,
            img_size=options.img_size,
        )
        explain = networks.explanation(
            options.explanation,
            network.model,
            reduce=options.reduce,
            samples=options.samples,
            noise=options.noise,
            steps=options.steps,
            layer=layer,
        )
        loaded.append(dataclasses.replace(network, explain=explain))
    return loaded


def _pair(made: argparse.ArgumentParser, text: str) -> tuple[str, str]:
    first, colon, second = text.partition(":")
    if not (first and colon and second):
        made.error(f"--pair: expected BASELINE:HARMONIZED, got {text!r}")
    return first, second


def read_accuracy(path: str, chosen: list[networks.Network]) -> dict[str, float]:
    """Top-1 by the names of the networks, or of what timm calls them, as parts of 1.

    Raises:
        ValueError: the file has other columns, or lacks a network.
    """
    rows = read_rows(path, ("model", "top1"), "accuracy")
    try:
        known = {row["model"]: float(row["top1"]) / 100 for row in rows}
    except ValueError as error:
        raise ValueError(f"accuracy: expected percentages in {shown(path)}: {error}") from error
    accuracy = {}
    for network in chosen:
        keys = (network.name, network.description.partition(",")[0])
        found = next((key for key in keys if key in known), None)
        if found is None:
            raise ValueError(
                f"accuracy: expected a row for {network.name!r} in {shown(path)}, got none"
            )
        accuracy[network.name] = known[found]
    return accuracy


def _class_names(evaluation: scoring.Evaluation) -> list[str] | None:
    """ImageNet's, where all networks have as many classes."""
    if any(result.classes != 1000 for result in evaluation.results):
        return None
    info = ImageNetInfo()
    return [info.index_to_description(index) for index in range(1000)]


def run() -> None:
    """``main``, with what is wrong in a line."""
    try:
        main()
    except command_line.EXPECTED as error:
        raise SystemExit(f"evaluate.py: error: {command_line.message(error)}") from error


if __name__ == "__main__":
    run()
