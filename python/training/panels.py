"""A picture of where people and network look, image by image."""

from __future__ import annotations

import re
import typing
from pathlib import Path

import numpy as np

from harmonizer_ext.files.output import replacing
from harmonizer_ext.files.text import shown
from training.evaluation import Panel

if typing.TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Maps are shown from 0 (black) to this percentile of their own values.
PERCENTILE = 99


def draw(panel: Panel, path: Path, title: str) -> Figure:
    """Image, human map and network map in a column each, with their correlation.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    count = len(panel.images)
    side = 1.5
    figure = Figure(figsize=(side * count + 0.9, side * 3 + 0.5), dpi=120, facecolor="white")
    cells = figure.subplots(3, count, squeeze=False)
    figure.subplots_adjust(
        left=0.8 / figure.get_figwidth(),
        right=1 - 0.1 / figure.get_figwidth(),
        top=1 - 0.4 / figure.get_figheight(),
        bottom=0.1 / figure.get_figheight(),
        wspace=0.04,
        hspace=0.04,
    )
    for index in range(count):
        cells[0, index].imshow(panel.images[index].permute(1, 2, 0).byte().numpy())
        for row, maps in ((1, panel.human), (2, panel.network)):
            values = maps[index].numpy()
            cells[row, index].imshow(
                values, cmap="inferno", vmin=0, vmax=np.percentile(values, PERCENTILE)
            )
        right = panel.labels[index] == panel.predictions[index]
        box = {"facecolor": "black", "alpha": 0.55, "pad": 1.5, "edgecolor": "none"}
        text = {"fontsize": 7, "color": "white", "va": "bottom", "bbox": box}
        cells[2, index].text(
            0.04,
            0.04,
            f"ρ {panel.correlations[index]:.2f}",
            transform=cells[2, index].transAxes,
            **text,
        )
        cells[0, index].text(
            0.04,
            0.04,
            f"{int(panel.predictions[index])} {'✓' if right else '✗'}",
            transform=cells[0, index].transAxes,
            **text,
        )
    for row, name in enumerate(("image", "people", "network")):
        cells[row, 0].set_ylabel(name, fontsize=9)
    for cell in cells.flat:
        cell.set_xticks([])
        cell.set_yticks([])
        for spine in cell.spines.values():
            spine.set_visible(False)
    figure.suptitle(shown(title), fontsize=10, parse_math=False, usetex=False)
    with replacing(path) as file:
        figure.savefig(file, format="png")
    return figure


def file_name(name: str) -> str:
    """The name of a set as a part of a file's name."""
    return re.sub(r"[^\w.-]", "_", shown(name))[:100]
