"""The demo: does a network that is told where people look stop relying on a shortcut?

Prepares the shortcut digits as ClickMe shards and a folder of images, trains a baseline (lambda 0)
and a harmonized network for each seed with train.py, evaluates all of them as evaluate.py does,
prints a table, and writes ``report.html``, ``panel.png`` and ``results.json``. Nothing is selected:
the last epoch's network is measured, every seed counts, and the panel shows the first test images.

    python python/demo.py --output runs/demo
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import statistics
import time
from pathlib import Path

import numpy as np
import shortcut_digits
import torch
import train
from evaluating import report, scoring
from evaluating.data import ImageSet
from evaluating.networks import load as load_network
from training import data as training_data
from training import evaluation, processes

import harmonizer_ext as hx
from harmonizer_ext.files.lock import LOCK, locked
from harmonizer_ext.files.output import remove_partial, replacing, write_text

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError(f"demo.py: {error}; pip install harmonizer-ext[train]") from error

#: The splits that both are measured on.
TESTS = ("test", "test_shortcut")
#: The networks compared, by the factor of the alignment in their loss.
NETWORKS = {"baseline": 0.0, "harmonized": 1.0}
#: Rows of the table.
MEASURES = {
    "accuracy": "accuracy, shortcut broken",
    "accuracy_where_the_shortcut_holds": "accuracy, shortcut holds",
    "alignment": "alignment of |gradient|",
    "alignment_signed": "alignment of signed gradient",
}
#: Maps are shown from 0 (black) to this percentile of their own values.
PERCENTILE = 99


def run(
    output: str | os.PathLike[str] = "runs/demo",
    data_dir: str | os.PathLike[str] = "data/shortcut_digits",
    *,
    seeds: tuple[int, ...] = (0, 1, 2),
    epochs: int = 30,
    train_images: int = shortcut_digits.TRAIN_DIGITS,
    test_images: int | None = None,
    panel_images: int = 10,
    quiet: bool = False,
) -> dict:
    """Runs the demo; see the module.

    Args:
        output: directory of ``report.html``, ``panel.png``, ``results.json`` and a directory for
            each network and seed.
        data_dir: directory that the data are written to.
        seeds: one baseline and one harmonized network each; the data are the same for all.
        epochs: of each training.
        train_images, test_images: as in ``shortcut_digits.make``.
        panel_images: how many of the first test images the panel shows.
        quiet: no progress bar.

    Returns:
        What ``results.json`` holds. "baseline" and "harmonized" have the mean over seeds of each of
        ``MEASURES``, its sample standard deviation under "spread", and the values under "seeds".
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    with locked(output / LOCK):
        remove_partial(output)
        return _run(
            output,
            data_dir,
            seeds,
            epochs,
            train_images,
            test_images,
            panel_images,
            quiet,
        )


def _run(
    output: Path,
    data_dir: str | os.PathLike[str],
    seeds: tuple[int, ...],
    epochs: int,
    train_images: int,
    test_images: int | None,
    panel_images: int,
    quiet: bool,
) -> dict:
    start = time.perf_counter()
    splits = shortcut_digits.make(train_images=train_images, test_images=test_images)
    shortcut_digits.save(splits, data_dir)
    prepared = time.perf_counter() - start

    config = configuration(Path(data_dir), epochs, train_images, panel_images, quiet)
    runs: dict[str, list[dict]] = {name: [] for name in NETWORKS}
    for seed in seeds:
        for name, factor in NETWORKS.items():
            directory = str(output / f"{name}-seed{seed}")
            chosen = dataclasses.replace(
                config, lambda_harmonization=factor, seed=seed, output=directory
            )
            shutil.rmtree(directory, ignore_errors=True)
            runs[name].append(train.train(chosen))

    evaluated = evaluate(runs, seeds, Path(data_dir), quiet)
    results: dict = {name: summarize(name, runs[name], seeds, evaluated) for name in NETWORKS}
    shared = json.loads(json.dumps(dataclasses.asdict(config)))  # as the file will have it
    for name in ("output", "seed", "lambda_harmonization", "quiet"):
        del shared[name]
    results |= {
        "lambda_harmonization": NETWORKS,
        "config": shared,
        "data": {
            "train_images": train_images,
            "test_images": len(splits["test"].labels),
            "share_with_human_map": float(splits["train"].tokens.mean()),
            "shortcut_agrees_with_class": {
                name: float((split.shortcuts == split.labels).mean())
                for name, split in splits.items()
            },
        },
        "seconds": {"data": prepared, "total": time.perf_counter() - start},
        "backend": runs["harmonized"][0]["backend"],
        "hardware": hardware(),
        "versions": {
            "harmonizer_ext": hx.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": np.__version__,
        },
    }
    write_text(output / "results.json", json.dumps(results, indent=2) + "\n")
    # Pictures last: nothing is lost with one that fails.
    title = "Shortcut digits: where networks and people look"
    report.write(evaluated, output / "report.html", command="python python/demo.py", title=title)
    draw_panel(output / "panel.png", runs, results, panel_images)
    return results


def configuration(
    data: Path, epochs: int, train_images: int, panel_images: int, quiet: bool
) -> train.Config:
    """The training of both networks: what ``train.py`` would be told on the command line."""
    return train.Config(
        clickme=(str(data / "clickme/train"),),
        clickme_val=tuple(f"{split}={data / 'clickme' / split}" for split in TESTS),
        data_dir=str(data / "images"),
        class_map=str(data / "classes.txt"),
        val_split="",
        mapped_share=0.5,
        num_classes=shortcut_digits.CLASSES,
        no_aug=True,
        cache=True,
        workers=0,
        model="small",
        img_size=shortcut_digits.SIZE,
        batch_size=min(64, train_images),
        opt="adamw",
        lr=2e-3,
        weight_decay=1e-4,
        epochs=epochs,
        warmup_epochs=min(2, epochs),
        val_interval=epochs,
        checkpoint_interval=0,
        panel_images=panel_images,
        quiet=quiet,
    )


def evaluate(
    runs: dict[str, list[dict]], seeds: tuple[int, ...], data: Path, quiet: bool
) -> scoring.Evaluation:
    """All networks on the test set whose shortcut is broken."""
    networks = [
        load_network(f"{name}-seed{seed}={run['checkpoint']}")
        for name in NETWORKS
        for seed, run in zip(seeds, runs[name], strict=True)
    ]
    tests = ImageSet([str(data / "clickme/test")], name="shortcut digits, shortcut broken")
    pairs = [(f"baseline-seed{seed}", f"harmonized-seed{seed}") for seed in seeds]
    # These maps are not people's, who would agree with each other less than fully.
    return scoring.evaluate(networks, tests, pairs=pairs, ceiling=1.0, quiet=quiet)


def summarize(
    name: str, runs: list[dict], seeds: tuple[int, ...], evaluated: scoring.Evaluation
) -> dict:
    """Mean, spread and values over seeds of ``MEASURES``, and what the training cost."""
    found = [evaluated.by_name(f"{name}-seed{seed}") for seed in seeds]
    values = {
        "accuracy": [result.correct.mean().item() for result in found],
        "accuracy_where_the_shortcut_holds": [
            run["final"]["test_shortcut"]["accuracy"] for run in runs
        ],
        "alignment": [result.values.score(ceiling=1.0).spearman for result in found],
        "alignment_signed": [run["final"]["test"]["alignment_signed"] for run in runs],
    }
    values |= {key: [run[key] for run in runs] for key in ("seconds", "images_per_second")}
    values["saliency_std"] = [run["final"]["test"]["saliency_std"] for run in runs]
    summary: dict = {key: statistics.fmean(numbers) for key, numbers in values.items()}
    summary["spread"] = {
        key: statistics.stdev(numbers) if len(numbers) > 1 else None
        for key, numbers in values.items()
    }
    summary["seeds"] = [
        {"seed": seed} | {key: numbers[index] for key, numbers in values.items()}
        for index, seed in enumerate(seeds)
    ]
    return summary


def hardware() -> dict[str, object]:
    """Names of the processor and of the GPU, if there is one, and the threads in use."""
    cpu, path = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if path.is_file():
        lines = (line.partition(":") for line in path.read_text().splitlines())
        cpu = next((value.strip() for key, _, value in lines if "model name" in key), cpu)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def table(results: dict) -> str:
    """The results as text: mean and sample standard deviation over seeds."""
    seeds = [row["seed"] for row in results["baseline"]["seeds"]]
    lines = [f"{'test set, mean ± spread over seeds':<36}" + "".join(f"{n:>16}" for n in NETWORKS)]
    lines.append("-" * len(lines[0]))
    for key, text in MEASURES.items():
        cells = ""
        for name in NETWORKS:
            spread = results[name]["spread"][key]
            cell = f"{results[name][key]:.3f}" + ("" if spread is None else f" ± {spread:.3f}")
            cells += f"{cell:>16}"
        lines.append(f"{text:<36}{cells}")
    share, total = results["data"]["share_with_human_map"], results["seconds"]["total"]
    lines.append(
        f"seeds {seeds}, {share:.0%} of the training images have a human map, {total:.0f} s"
    )
    return "\n".join(lines)


def first_images(checkpoint: str, count: int) -> evaluation.Panel:
    """The first test images with the maps of a network."""
    model, form, config = train.load_network(checkpoint)
    world = processes.World(0, 1, torch.device("cpu"))
    test = training_data.open_tests(config, form, world)["test"]
    _, panel = evaluation.evaluate(
        model, test, form, world, classes=config.num_classes, panel_images=count, batches=1
    )
    assert panel is not None
    return panel


def draw_panel(path: Path, runs: dict[str, list[dict]], results: dict, count: int) -> None:
    """Draws image, human map and the maps of the first seed's networks, for the first images."""
    shown = {name: first_images(runs[name][0]["checkpoint"], count) for name in NETWORKS}
    first = shown["baseline"]
    count = len(first.images)

    columns = ["image", "human map", *(f"{name}\n|gradient|" for name in NETWORKS)]
    blocks = 2 if count > 1 else 1
    rows = -(-count // blocks)
    width, height = 1.45 * (len(columns) * blocks + 0.35 * (blocks - 1)) + 0.4, 1.45 * rows + 1.8
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    gap = [0.3] if blocks == 2 else []
    grid = figure.add_gridspec(
        rows,
        len(columns) * blocks + len(gap),
        width_ratios=[1] * len(columns) + gap + [1] * len(columns) * (blocks - 1),
        left=0.2 / width,
        right=1 - 0.2 / width,
        top=1 - 1.25 / height,
        bottom=0.55 / height,
        wspace=0.05,
        hspace=0.05,
    )
    text = {"fontsize": 8, "color": "white", "va": "bottom"}
    for index in range(count):
        block, row = divmod(index, rows)
        cells = [
            figure.add_subplot(grid[row, block * (len(columns) + 1) + column])
            for column in range(len(columns))
        ]
        maps = [first.human[index], *(shown[name].network[index] for name in NETWORKS)]
        cells[0].imshow(first.images[index].permute(1, 2, 0).byte().numpy())
        for cell, values in zip(cells[1:], maps, strict=True):
            top = np.percentile(values, PERCENTILE)
            cell.imshow(values, cmap="inferno", vmin=0, vmax=top, interpolation="nearest")
        for cell, name in zip(cells[2:], NETWORKS, strict=True):
            answer, label = int(shown[name].predictions[index]), int(first.labels[index])
            box = {"facecolor": "black", "alpha": 0.55, "pad": 1.5, "edgecolor": "none"}
            cell.text(
                2, 61, f"ρ {shown[name].correlations[index]:.2f}", ha="left", bbox=box, **text
            )
            told = f"{answer} {'✓' if answer == label else '✗'}"
            cell.text(61, 61, told, ha="right", bbox=box, **text)
        for cell, title in zip(cells, columns, strict=True):
            cell.set_axis_off()
            if row == 0:
                cell.set_title(title, fontsize=10)
    figure.suptitle(
        "Where the networks look when the background no longer tells the class",
        fontsize=14,
        fontweight="bold",
        y=1 - 0.2 / height,
        va="top",
    )
    before, after = (results[name] for name in NETWORKS)
    figure.text(
        0.5,
        1 - 0.52 / height,
        f"accuracy {before['accuracy']:.2f} → {after['accuracy']:.2f}, alignment "
        f"{before['alignment']:.2f} → {after['alignment']:.2f} "
        f"(whole test set, baseline → harmonized, mean of {len(before['seeds'])} seeds)",
        ha="center",
        va="top",
        fontsize=10.5,
        color="0.3",
    )
    figure.text(
        0.5,
        0.12 / height,
        f"The first {count} test images, networks of seed {runs['baseline'][0]['config']['seed']}. "
        f"|gradient| of the true class's logit, largest over channels. Each map runs from 0 to its "
        f"own {PERCENTILE}th percentile.\nρ: Spearman correlation with the human map. "
        f"Lower right: the network's answer.",
        ha="center",
        va="bottom",
        fontsize=8.5,
        color="0.3",
    )
    with replacing(path) as file:
        figure.savefig(file, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs the demo (see the module).")
    parser.add_argument("--output", default="runs/demo")
    parser.add_argument("--data-dir", default="data/shortcut_digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=30)
    arguments = parser.parse_args()
    results = run(
        arguments.output,
        arguments.data_dir,
        seeds=tuple(arguments.seeds),
        epochs=arguments.epochs,
    )
    print(f"\n{table(results)}\n{arguments.output}: report.html, panel.png, results.json")


if __name__ == "__main__":
    main()
