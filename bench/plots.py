"""Pictures of a record of ``run.py``. Needs matplotlib.

    python bench/plots.py bench/results/RECORD.json docs --format svg

Throughput against the batch, with the copy as the roof; speed-up over each peer; peak memory; what
a harmonized training step costs.
"""

from __future__ import annotations

import argparse
import itertools
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import records
from records import COMPILE, COPY, Row, Rows
from table import BACKENDS, is_ours

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

#: Okabe and Ito's colours, told apart by everybody; ours is the strong one.
BLUE, ORANGE, GREEN, SKY, GREY, BLACK = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#56B4E9",
    "#8C8C8C",
    "#222222",
)
BACKEND_COLOURS = {"cpu": BLUE, "cuda": BLUE, "triton": SKY}

_STYLE = {
    "font.size": 11,
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.labelcolor": BLACK,
    "text.color": BLACK,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "figure.dpi": 100,
    "savefig.dpi": 110,
    # Text stays text: small files, and a reader can search them.
    "svg.fonttype": "none",
    "svg.hashsalt": "harmonizer_ext",
}

_PEERS = {
    "eager_released": "eager PyTorch,\nas released",
    "eager_one_pyramid": "eager PyTorch,\none pyramid",
    "eager_paper": "eager PyTorch",
    "TensorFlow, as released": "authors' TensorFlow",
    "TensorFlow, as released, tf.function": "authors' TensorFlow,\ntf.function",
}


def _finish(figure: Figure, record: dict[str, Any], device: str, below: str) -> Figure:
    """A caption line: what exactly was measured, on what, when."""
    text = f"{below} {records.caption(record, device)}."
    width = int(figure.get_figwidth() * 15.5)
    figure.text(
        0.015, 0.015, textwrap.fill(text, width), fontsize=8.5, color="#555555", va="bottom"
    )
    lines = len(textwrap.wrap(text, width))
    figure.tight_layout(rect=(0, 0.02 + 0.16 * lines / figure.get_figheight(), 1, 1))
    return figure


def _number(value: float) -> str:
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _spread(positions: list[float], gap: float) -> list[float]:
    """Heights of labels, moved apart where they would overlap; from the lowest up."""
    order = sorted(range(len(positions)), key=positions.__getitem__)
    moved = list(positions)
    for below, above in itertools.pairwise(order):
        moved[above] = max(moved[above], moved[below] + gap)
    return moved


# --- throughput -----------------------------------------------------------------------------------


def _lines(rows: Rows) -> list[tuple[str, str, Rows, dict[str, Any]]]:
    """(label, implementation, rows, style) of what the throughput picture shows."""
    found: list[tuple[str, str, Rows, dict[str, Any]]] = []
    for name in dict.fromkeys(row["implementation"] for row in rows):
        mine = records.select(rows, implementation=name)
        backend = name.partition(":")[0]
        if name == COPY:
            style = {"color": GREY, "linewidth": 2, "linestyle": (0, (4, 2))}
            found.append(("copy of the same\nbytes: the roof", name, mine, style))
        elif is_ours(name):
            style = {"color": BACKEND_COLOURS[backend], "linewidth": 2.5, "marker": "o"}
            kernels = BACKENDS[backend]
            label = f"fused {kernels}, from Python\nwith autograd"
            if name.endswith(": op"):
                label = f"fused {kernels},\nthe op alone"
            else:
                style |= {"linewidth": 1.6, "linestyle": (0, (1, 1)), "markersize": 4}
            found.append((label, name, mine, style))
        elif name == "eager_released":
            style = {"color": ORANGE, "linewidth": 2, "marker": "s", "markersize": 5}
            found.append(("eager PyTorch,\nas released", name, mine, style))
    return found


def throughput(record: dict[str, Any], device: str) -> Figure | None:
    """Gigabytes a second on the byte model against the batch."""
    rows = records.select(
        record["rows"], device=device, section="sweep", varied="batch", formulation="released"
    )
    if len({row["saliency"][0] for row in rows}) < 3:
        return None
    figure, axes = plt.subplots(figsize=(8.6, 4.9))
    ends: list[tuple[str, float, float, str]] = []
    top = 0.0
    for label, _, mine, style in _lines(rows):
        mine = sorted(mine, key=lambda row: row["saliency"][0])
        x = [row["saliency"][0] for row in mine]
        y = [row["gigabytes_per_second"] for row in mine]
        axes.plot(x, y, **style)
        top = max(top, *y)
        ends.append((label, x[-1], y[-1], style["color"]))
    compiled = _best_compiled(record, device)
    if compiled is not None:
        x, y = compiled["saliency"][0], compiled["gigabytes_per_second"]
        axes.plot([x], [y], marker="D", color=GREEN, markersize=7)
        axes.annotate(
            "best torch.compile",
            (x, y),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            fontsize=10,
            color=GREEN,
        )
    axes.set_xscale("log", base=2)
    ticks = sorted({row["saliency"][0] for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_ylim(0, 1.08 * top)
    heights = _spread([max(y, 0.04 * top) for _, _, y, _ in ends], 0.115 * top)
    for (label, x, _, colour), height in zip(ends, heights, strict=True):
        axes.annotate(
            label,
            (x, height),
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=10,
            linespacing=1.05,
            annotation_clip=False,
        )
    first = rows[0]
    size = f"{first['saliency'][1]}x{first['saliency'][2]}x{first['saliency'][3]}"
    axes.set_xlabel(f"batch (maps of {size}, float32)")
    axes.set_ylabel("GB/s on the byte model")
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title("Throughput of loss and gradient")
    below = (
        f"Higher is better. {first['bytes_per_pixel']} bytes a pixel: what has to be read and "
        "written once. Medians, interleaved; inputs from memory, not from cache."
    )
    return _finish(figure, record, device, below)


def _best_compiled(record: dict[str, Any], device: str) -> Row | None:
    rows = records.select(
        record["rows"], device=device, section="loss", case="released", quantity="time"
    )
    compiled = [row for row in rows if row["implementation"].startswith(COMPILE)]
    return min(compiled, key=lambda row: float(row["value"]), default=None)


# --- bars -----------------------------------------------------------------------------------------


def _peers(rows: Rows, of_compiled: str) -> list[tuple[str, Row]]:
    """(label, row) of the peers of one case: the most first, of compiled ones the least."""
    times = {row["implementation"]: row for row in rows}
    found = [(label, times[name]) for name, label in _PEERS.items() if name in times]
    compiled = [row for name, row in times.items() if name.startswith(COMPILE)]
    if compiled:
        least = min(compiled, key=lambda row: float(row["value"]))
        found.append((f"{of_compiled} torch.compile", least))
    return sorted(found, key=lambda pair: -float(pair[1]["value"]))


def _ours(rows: Rows, form: str = ": harmonization_loss") -> Row | None:
    return next(
        (r for r in rows if is_ours(r["implementation"]) and r["implementation"].endswith(form)),
        None,
    )


def _bars(
    axes: Axes, labels: list[str], values: list[float], colours: list[str], words: list[str]
) -> None:
    """Horizontal bars with their values written at their ends; no axis is needed then."""
    positions = range(len(values))[::-1]
    axes.barh(list(positions), values, color=colours, height=0.68)
    axes.set_yticks(list(positions), labels)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.set_xlim(0, 1.22 * max(values))
    for position, value, word in zip(positions, values, words, strict=True):
        axes.annotate(
            word, (value, position), xytext=(5, 0), textcoords="offset points", va="center"
        )


def _bar_panels(
    record: dict[str, Any],
    device: str,
    panel: Callable[[Axes, str], int],
    title: str,
    below: str,
) -> Figure | None:
    """One panel for each formulation; ``panel`` draws it and says how many bars it has."""
    figure, axes = plt.subplots(1, 2, figsize=(10.2, 4.3), width_ratios=(1, 1))
    drawn = 0
    for axis, formulation in zip(axes, ("released", "paper"), strict=True):
        bars = panel(axis, formulation)
        drawn += bars
        axis.set_title(f"formulation={formulation!r}", fontsize=11, weight="normal", pad=6)
        if not bars:
            axis.set_visible(False)
    if not drawn:
        plt.close(figure)
        return None
    # The same thickness of bars and the same scale in both panels.
    most = max(len(axis.get_yticks()) for axis in axes)
    right = max(axis.get_xlim()[1] for axis in axes)
    for axis in axes:
        axis.set_xlim(0, right)
        count = len(axis.get_yticks())
        axis.set_ylim(count - 0.5 - most, count - 0.5)
    figure.suptitle(title, x=0.015, ha="left", fontsize=13, weight="bold")
    return _finish(figure, record, device, below)


def _headline(record: dict[str, Any], device: str, case: str, section: str) -> Rows:
    return records.select(record["rows"], device=device, case=case, section=section)


def _what(rows: Rows) -> str:
    first = rows[0]
    return f"{records.shape(first)} {first['dtype']}, {first['computed']}"


def speed_up(record: dict[str, Any], device: str) -> Figure | None:
    """How many times faster than each peer, by what a user calls."""

    def panel(axes: Axes, formulation: str) -> int:
        rows = records.select(_headline(record, device, formulation, "loss"), quantity="time")
        ours, others = _ours(rows), _peers(rows, "best")
        if ours is None or not others:
            return 0
        values = [row["value"] / ours["value"] for _, row in others]
        colours = [GREEN if "compile" in label else ORANGE for label, _ in others]
        words = [f"{_number(v)}x" for v in values]
        labels = [label for label, _ in others] + ["ours"]
        _bars(axes, labels, [*values, 1.0], [*colours, BLUE], [*words, "1"])
        return len(labels)

    rows = _headline(record, device, "released", "loss")
    if not rows:
        return None
    below = (
        f"{_what(rows)}; harmonization_loss with autograd against each peer with autograd, time "
        "over time. Medians, interleaved; TensorFlow in a process of its own."
    )
    title = "How many times longer the same loss and gradient take elsewhere"
    return _bar_panels(record, device, panel, title, below)


def memory(record: dict[str, Any], device: str) -> Figure | None:
    """Peak memory beyond the inputs."""

    def panel(axes: Axes, formulation: str) -> int:
        rows = _headline(record, device, formulation, "memory")
        ours, others = _ours(rows), _peers(rows, "leanest")
        if ours is None or not others:
            return 0
        colours = [GREEN if "compile" in label else ORANGE for label, _ in others]
        values = [row["value"] for _, row in others]
        labels = [label for label, _ in others] + ["ours"]
        values.append(ours["value"])
        words = [f"{_number(value)} MB" for value in values]
        _bars(axes, labels, values, [*colours, BLUE], words)
        return len(labels)

    rows = _headline(record, device, "released", "memory")
    if not rows:
        return None
    first = rows[0]
    gradient = records.pixels(first) * 4 / 1e6
    below = (
        f"{_what(rows)}; peak of one call beyond what was in use before it, the gradient of "
        f"{_number(gradient)} MB included. Each in a process of its own."
    )
    title = "Memory that loss and gradient need beside the maps"
    return _bar_panels(record, device, panel, title, below)


# --- the step -------------------------------------------------------------------------------------

_STEPS = {
    "cross entropy alone": ("cross entropy alone", GREY),
    "harmonized, rows with a map": ("harmonized, the rows with a map", SKY),
    "harmonized, all rows": ("harmonized, all rows", BLUE),
    "harmonized, all rows, eager loss": ("the same, loss on maps in eager PyTorch", ORANGE),
}


def step_cost(record: dict[str, Any], device: str) -> Figure | None:
    """Time and memory of a harmonized step in units of a plain one."""
    rows = records.select(record["rows"], device=device, section="step")
    cases = list(dict.fromkeys(row["case"] for row in rows))
    if not cases:
        return None
    figure, panels = plt.subplots(1, 2, figsize=(10.2, 1.9 + 1.25 * len(cases)), sharey=True)
    for axes, quantity, title in zip(
        panels,
        ("time", "peak extra memory"),
        ("Time of a step", "Peak memory of a step"),
        strict=True,
    ):
        most = 1.0
        for group, case in enumerate(cases):
            mine = {
                row["implementation"]: row
                for row in records.select(rows, case=case, quantity=quantity)
            }
            for place, (name, (_, colour)) in enumerate(_STEPS.items()):
                if name not in mine:
                    continue
                row = mine[name]
                y = -(group + 0.19 * place)
                axes.barh(y, row["times_plain"], color=colour, height=0.17)
                plain = name == "cross entropy alone"
                absolute = f"{_number(row['value'])} {row['unit']}"
                words = absolute if plain else f"{row['times_plain']:.2f}x"
                words += "*" if "note" in row else ""
                axes.annotate(
                    words,
                    (row["times_plain"], y),
                    xytext=(5, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=9.5,
                )
                most = max(most, row["times_plain"])
        axes.set_title(title)
        axes.set_xlim(0, 1.2 * most)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="y", length=0)
    networks = []
    for case in cases:
        row = next(row for row in rows if row["case"] == case)
        shape = f"{row['batch']}x3x{row['size']}x{row['size']}"
        networks.append(f"{row['network']}\n{shape}\n{row['mapped_rows']} with a map")
    panels[0].set_yticks([-(group + 0.285) for group in range(len(cases))], networks)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for _, colour in _STEPS.values()]
    figure.legend(
        handles,
        [label for label, _ in _STEPS.values()],
        loc="upper left",
        ncols=2,
        frameon=False,
        bbox_to_anchor=(0.005, 1.0),
        fontsize=10,
        columnspacing=2,
    )
    below = "Random weights, float32, forward, backward and SGD. Lower is better."
    if any("note" in row for row in rows):
        below += " *BatchNorm normalizes the two parts of the batch apart: another loss."
    _finish(figure, record, device, below)
    bottom = figure.subplotpars.bottom
    figure.subplots_adjust(top=1 - 0.95 / figure.get_figheight(), bottom=bottom)
    return figure


# --- files ----------------------------------------------------------------------------------------

PICTURES = {
    "throughput": throughput,
    "speed_up": speed_up,
    "memory": memory,
    "step": step_cost,
}


def draw_all(record: dict[str, Any], folder: Path, suffix: str = "png") -> list[Path]:
    """Draws what the record has rows for.

    Args:
        record: of ``run.py``.
        folder: made where it is missing; files are bench_<picture>_<device>.<suffix>.
        suffix: "png" or "svg".

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with plt.rc_context(_STYLE):
        for device in record["machine"]["devices"]:
            for name, draw in PICTURES.items():
                figure = draw(record, device)
                if figure is None:
                    continue
                path = folder / f"bench_{name}_{device.replace(':', '')}.{suffix}"
                metadata = {"Date": None} if suffix == "svg" else {}
                figure.savefig(path, facecolor="white", metadata=metadata)
                plt.close(figure)
                written.append(path)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--format", choices=["png", "svg"], default="png")
    args = parser.parse_args()
    for path in draw_all(records.load(args.record), args.folder, args.format):
        print(path)


if __name__ == "__main__":
    main()
