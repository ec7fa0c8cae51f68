"""An evaluation as numbers: what results.json, images.csv and the report's tables hold."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision

import harmonizer_ext as hx
from evaluating.scoring import Evaluation, Result
from harmonizer_ext import alignment
from harmonizer_ext.files.output import write_rows, write_text
from harmonizer_ext.files.text import shown


def summarize(evaluation: Evaluation, command: str | None = None) -> dict[str, Any]:
    """All that the report says in numbers, for JSON.

    Scores and accuracies are parts of 1; each has its bootstrap standard error over images.

    Args:
        command: the command line that made it.
    """
    data, seed = evaluation.data, evaluation.settings["seed"]
    networks = [_row(result, evaluation) for result in evaluation.results]
    return {
        "data": {
            "name": data.name,
            "paths": data.paths,
            "kind": data.kind,
            "images": len(data),
            "images_available": data.total,
            "preprocessing": data.preprocessing,
            "decoder": data.decoder,
        },
        "ceiling": evaluation.ceiling,
        "reducers": list(evaluation.reducers),
        "settings": evaluation.settings,
        "networks": networks,
        "controls": [_row(control, evaluation) for control in evaluation.controls],
        "pairs": [_pair(*pair, evaluation, seed) for pair in evaluation.pairs],
        "pareto_front": pareto_front(evaluation, networks),
        "provenance": {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": command,
            "commit": _commit(),
            "harmonizer_ext": hx.__version__,
            "torch": str(torch.__version__),
            "torchvision": torchvision.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
            "device": _device(evaluation.settings["device"]),
        },
    }


def _row(result: Result, evaluation: Evaluation) -> dict[str, Any]:
    seed = evaluation.settings["seed"]
    row: dict[str, Any] = {
        "name": result.name,
        "description": result.description,
        "explanation": result.explanation,
        "input_size": result.size,
        "parameters": result.parameters,
        "images": len(evaluation.data),
        "seconds": result.seconds,
    }
    if result.correct is not None:
        row["top1"] = _mean(alignment.summarize(result.correct, seed=seed))
        row["accuracy"] = evaluation.accuracy.get(result.name, row["top1"]["mean"])
    for reducer in evaluation.reducers:
        suffix = "" if reducer == 1 else f"/{reducer}"
        spearman = "spearman" + suffix
        score = result.values.score(ceiling=evaluation.ceiling, name=spearman, seed=seed)
        row["alignment" + suffix] = {"mean": score.score, "standard_error": score.standard_error}
        for metric in ("spearman", "dice", "iou"):
            values = result.values.values[metric + suffix]
            # The same images for all metrics: Dice and IoU of a constant map are 0, not undefined.
            defined = values.masked_fill(result.values.values[spearman].isnan(), torch.nan)
            row[metric + suffix] = _mean(alignment.summarize(defined, seed=seed))
        row["excluded" + suffix] = int(result.values.values[spearman].isnan().sum())
    return row


def _mean(summary: alignment.MetricSummary) -> dict[str, float]:
    return {"mean": summary.mean, "standard_error": summary.standard_error}


def _pair(first: str, second: str, evaluation: Evaluation, seed: int) -> dict[str, Any]:
    """What harmonization changed, with the errors of paired differences."""
    baseline, harmonized = evaluation.by_name(first), evaluation.by_name(second)
    spearman = alignment.compare(harmonized.values, baseline.values, seed=seed)
    assert baseline.correct is not None
    assert harmonized.correct is not None
    top1 = alignment.summarize(harmonized.correct - baseline.correct, seed=seed)
    return {
        "baseline": first,
        "harmonized": second,
        "top1": _mean(top1),
        "spearman": _mean(spearman),
        "alignment": {
            "mean": spearman.mean / evaluation.ceiling,
            "standard_error": spearman.standard_error / evaluation.ceiling,
        },
    }


def pareto_front(evaluation: Evaluation, networks: list[dict[str, Any]]) -> list[str]:
    """Names of the networks, harmonized ones aside, that no other beats in both respects.

    By falling accuracy, so by rising alignment.
    """
    harmonized = {name for _, name in evaluation.pairs}
    points = [
        (row["accuracy"], row["alignment"]["mean"], row["name"])
        for row in networks
        if row["name"] not in harmonized and row["alignment"]["mean"] == row["alignment"]["mean"]
    ]
    front: list[str] = []
    highest = float("-inf")
    for _, score, name in sorted(points, reverse=True):
        if score > highest:
            front.append(name)
            highest = score
    return front


def write_json(summary: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Numbers that are undefined become null."""
    write_text(path, json.dumps(_without_nan(summary), indent=2) + "\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and value != value else value


def write_images(evaluation: Evaluation, path: str | os.PathLike[str]) -> None:
    """A row for each image and network: for statistics of your own.

    Names that a terminal or a spreadsheet would obey are escaped (``files.text.cell``).
    """
    metrics = list(evaluation.results[0].values.values)
    rows: list[list[Any]] = [["image", "network", "correct", *metrics]]
    for result in [*evaluation.results, *evaluation.controls]:
        columns = [result.values.values[name].tolist() for name in metrics]
        correct: list[Any] = [""] * len(evaluation.data)
        if result.correct is not None:
            correct = [int(value) for value in result.correct.tolist()]
        for place, row in enumerate(evaluation.data.rows):
            values = [float(f"{column[place]:.6g}") for column in columns]
            rows.append([row, result.name, correct[place], *values])
    write_rows(path, rows)


def table(summary: dict[str, Any]) -> str:
    """The main table as text for a terminal."""
    rows = [["network", "top-1 %", "Spearman", "alignment %", "Dice", "IoU", "left out"]]
    for row in summary["networks"] + summary["controls"]:
        rows.append(
            [
                shown(row["name"]),
                cell(row["top1"], percent=True) if "top1" in row else "",
                cell(row["spearman"]),
                cell(row["alignment"], percent=True),
                cell(row["dice"]),
                cell(row["iou"]),
                str(row["excluded"]),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def cell(value: dict[str, float], *, percent: bool = False, signed: bool = False) -> str:
    """A number with its standard error: ``28.7 ± 0.4`` in percent, else ``0.189 ± 0.003``."""
    mean, error = value["mean"], value["standard_error"]
    if mean != mean:
        return "–"
    factor, digits = (100, 1) if percent else (1, 3)
    text = f"{mean * factor:{'+' if signed else ''}.{digits}f}".replace("-", "\N{MINUS SIGN}")
    return text if error != error else f"{text} ± {error * factor:.{digits}f}"


def _device(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _commit() -> str | None:
    """Of the checkout that this file is in, with a plus where it was changed; None outside one."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            # A repository may name programs that run when it is looked at.
            ["git", "-C", str(here), "-c", "core.fsmonitor=false", *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def names_of_pairs(evaluation: Evaluation) -> dict[str, str]:
    """ "baseline" or "harmonized" by the name of a network that is one."""
    roles = {first: "baseline" for first, _ in evaluation.pairs}
    return roles | {second: "harmonized" for _, second in evaluation.pairs}
