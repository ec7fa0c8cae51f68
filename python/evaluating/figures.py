"""The report's plots, as SVG that takes its text colour from the page."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from evaluating.scoring import Evaluation
from evaluating.summary import names_of_pairs
from harmonizer_ext.files.text import shown

#: Each role's stand-in for a colour and its marker. What the colours are, is the page's choice.
STYLE = {
    "baseline": ("#010101", "o"),
    "harmonized": ("#020202", "D"),
    "other": ("#030303", "o"),
    "control": ("#040404", ""),
}
_INK, _LINES, _SHADE = "#050505", "#060606", "#070707"
_BY_THE_PAGE = {color: f"var(--{role})" for role, (color, _) in STYLE.items()}
_BY_THE_PAGE |= {_INK: "currentColor", _LINES: "var(--line)", _SHADE: "var(--front)"}
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "harmonizer_ext",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _LINES,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    # Names are text: no mathematics between dollars, no TeX.
    "text.parse_math": False,
    "text.usetex": False,
}


#: Width of a picture in inches on a screen, and on a telephone, where it would be cut or too small.
WIDE, NARROW = 8.0, 4.4


def scatter(evaluation: Evaluation, summary: dict[str, Any], width: float = WIDE) -> str:
    """Alignment against accuracy: the paper's figure 3. SVG."""
    rows = [row for row in summary["networks"] if not np.isnan(row["alignment"]["mean"])]
    if not rows:
        return ""
    roles = names_of_pairs(evaluation)
    points = {r["name"]: (100 * r["accuracy"], 100 * r["alignment"]["mean"]) for r in rows}
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(width, 4.7), layout="constrained")
        axes = figure.subplots()
        for row in rows:
            color, marker = STYLE[roles.get(row["name"], "other")]
            x, y = points[row["name"]]
            error = 100 * row["alignment"]["standard_error"]
            axes.errorbar(
                x, y, None if np.isnan(error) else error, color=color, marker=marker,
                markersize=7, elinewidth=1.4, capsize=3, zorder=3,
            )  # fmt: skip
        axes.margins(_room(axes, points), 0.18)
        axes.autoscale_view()
        for control in summary["controls"][:1]:
            axes.axhline(
                100 * control["alignment"]["mean"], color=STYLE["control"][0], linestyle="--",
                linewidth=1.2, zorder=1,
            )  # fmt: skip
        left, right, bottom, top = *axes.get_xlim(), *axes.get_ylim()
        axes.set(xlim=(left, right), ylim=(bottom, top))
        front = [points[name] for name in reversed(summary["pareto_front"])]  # by rising accuracy
        xs, ys = [left], [front[0][1]]
        for x, y in front:
            xs += [xs[-1], x]
            ys += [y, y]
        xs, ys = [*xs, xs[-1]], [*ys, bottom]
        axes.fill_between(xs, ys, bottom, color=_SHADE, linewidth=0, zorder=0)
        axes.plot(xs, ys, color=_LINES, linewidth=1, zorder=1)
        arrows = [pair for pair in evaluation.pairs if {*pair} <= {*points}]
        for first, second in arrows:
            axes.add_patch(
                    FancyArrowPatch(
                        points[first], points[second], arrowstyle="-|>", mutation_scale=13,
                        shrinkA=6, shrinkB=6, color=STYLE["harmonized"][0], linewidth=1.3,
                        zorder=2,
                    )
                )  # fmt: skip
        where = "ImageNet" if evaluation.accuracy else "these images"
        axes.set_xlabel(f"top-1 accuracy on {where} (%)")
        axes.set_ylabel("human alignment (% of the human ceiling)")
        figure.draw_without_rendering()
        control_text = []
        if summary["controls"]:
            control_text.append(
                axes.annotate(
                    "centre-bias control", (1, 100 * summary["controls"][0]["alignment"]["mean"]),
                    xycoords=axes.get_yaxis_transform(), xytext=(-2, 3),
                    textcoords="offset points", ha="right", color=STYLE["control"][0], fontsize=9,
                )
            )  # fmt: skip
        errors = {row["name"]: 100 * row["alignment"]["standard_error"] for row in rows}
        front_line = list(zip(xs, ys, strict=True))
        _label(axes, points, roles, arrows, control_text, front_line, errors)
        prefix = "scatter" if width == WIDE else "scatter-narrow"
        return _svg(figure, prefix, "Human alignment against top-1 accuracy of the networks")


def _room(axes: Any, names: Iterable[str]) -> float:
    """Margin on the left and right, of the range of the points, in which any name fits."""
    renderer = FigureCanvasAgg(axes.figure).get_renderer()
    texts = [axes.text(0, 0, shown(name), fontsize=_font(axes)) for name in names]
    widest = max(text.get_window_extent(renderer).width for text in texts) + 12
    for text in texts:
        text.remove()
    # The axes take most of the figure's width. Not more than a quarter of them on either side.
    part = min(widest / (0.88 * axes.figure.bbox.width), 0.25)
    return float(part / (1 - 2 * part))


def _font(axes: Any) -> int:
    """Size of the networks' names in points."""
    return 8 if axes.figure.get_figwidth() <= NARROW else 9


def _label(
    axes: Any,
    points: dict[str, tuple[float, float]],
    roles: dict[str, str],
    arrows: list[tuple[str, str]],
    taken: list[Any],
    front: Sequence[tuple[float, float]] = (),
    errors: Mapping[str, float] | None = None,
) -> None:
    """A name at each point, where it covers least of names, points, error bars and lines."""
    renderer = FigureCanvasAgg(axes.figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in taken]
    inside = axes.get_window_extent(renderer)
    pixels = {name: axes.transData.transform(point) for name, point in points.items()}
    marks = [(x - 5, y - 8, x + 5, y + 8) for x, y in pixels.values()]
    for name, error in (errors or {}).items():
        (x, y), high = points[name], 0.0 if np.isnan(error) else error
        (x, low), (_, top) = axes.transData.transform([(x, y - high), (x, y + high)])
        marks.append((x - 4, low - 2, x + 4, top + 2))
    lines = [(pixels[first], pixels[second]) for first, second in arrows]
    corners = [axes.transData.transform(corner) for corner in front]
    lines += list(itertools.pairwise(corners))
    for start, end in lines:
        length = float(np.hypot(*(end - start)))
        for part in np.linspace(0, 1, 2 + int(length / 6)):
            x, y = (1 - part) * start + part * end
            marks.append((x - 3, y - 3, x + 3, y + 3))
    places = [(9, 0, "left", "center"), (-9, 0, "right", "center")]
    places += [
        (dx, dy, horizontal, vertical)
        for far in (14, 24)
        for dy, vertical in ((far, "bottom"), (-far, "top"))
        for dx, horizontal in ((0, "center"), (6, "left"), (-6, "right"))
    ]
    for name, point in points.items():
        best = None
        for place, (dx, dy, horizontal, vertical) in enumerate(places):
            text = axes.annotate(
                shown(name), point, (dx, dy), textcoords="offset points", ha=horizontal,
                va=vertical, fontsize=_font(axes), color=STYLE[roles.get(name, "other")][0],
                zorder=4,
            )  # fmt: skip
            box = text.get_window_extent(renderer)
            cost = sum(_overlap(box.extents, other.extents) for other in boxes)
            cost += 3 * sum(_overlap(box.extents, mark) for mark in marks)
            cost += sum(500 for other in pixels.values() if _nearer(box, other, pixels[name]))
            cost += 2 * (box.width * box.height - _overlap(box.extents, inside.extents)) + place
            if best is None or cost < best[0]:
                if best is not None:
                    best[1].remove()
                best = (cost, text, box)
            else:
                text.remove()
        assert best is not None
        boxes.append(best[2])


def _nearer(box: Any, other: np.ndarray, own: np.ndarray) -> bool:
    """Whether a name in this box could be taken for that of another point."""

    def distance(point: np.ndarray) -> float:
        return float(np.hypot(*(point - point.clip((box.x0, box.y0), (box.x1, box.y1)))))

    return distance(other) < distance(own) + 4 and not np.array_equal(other, own)


def _overlap(a: Any, b: Any) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


def distributions(evaluation: Evaluation, width: float = WIDE) -> str:
    """How the correlations of single images are distributed, a row for each network. SVG."""
    roles = names_of_pairs(evaluation)
    results = [*evaluation.results, *evaluation.controls]
    values = [result.values.values["spearman"].numpy() for result in results]
    values = [row[~np.isnan(row)] for row in values]
    filled = np.concatenate(values)
    if not len(filled):
        return ""
    low, high = np.floor(10 * filled.min()) / 10, np.ceil(10 * filled.max()) / 10
    edges = np.linspace(low, max(high, low + 0.1), 61)
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(width, 0.9 + 0.55 * len(results)), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color=_LINES, linewidth=1, zorder=0)
        for row, (result, correlations) in enumerate(zip(results, values, strict=True)):
            base = -row
            control = result.correct is None
            color, _ = STYLE["control" if control else roles.get(result.name, "other")]
            axes.plot(edges[[0, -1]], [base, base], color=_LINES, linewidth=0.8)
            if not len(correlations):
                continue
            counts, _ = np.histogram(correlations, edges)
            axes.stairs(
                base + 0.8 * counts / counts.max(), edges, baseline=base, fill=True, color=color,
                alpha=0.55, linewidth=0,
            )  # fmt: skip
            mean = correlations.mean()
            axes.plot([mean, mean], [base, base + 0.84], color=color, linewidth=2)
            axes.text(
                1.01, base + 0.3, f"{mean:.3f}".replace("-", "\N{MINUS SIGN}"), fontsize=9,
                transform=axes.get_yaxis_transform(),
            )  # fmt: skip
        axes.set_yticks(
            [-row + 0.3 for row in range(len(results))], [shown(r.name) for r in results]
        )
        axes.tick_params(left=False)
        axes.spines["left"].set_visible(False)
        axes.set(xlim=(edges[0], edges[-1]), ylim=(-len(results) + 0.9, 1))
        axes.set_xlabel("Spearman correlation ρ of an image's two maps")
        prefix = "rho" if width == WIDE else "rho-narrow"
        return _svg(figure, prefix, "Histograms of the correlations of single images by network")


def _svg(figure: Figure, prefix: str, title: str) -> str:
    """The picture to be part of a page: no header, names of its own, colours of the page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # In tags and styles alone: what stands between them are names.
    text = re.sub(
        r"<style.*?</style>|<[^>]*>", lambda part: _own(part[0], prefix), text, flags=re.DOTALL
    )
    # One size for all screens: the page scales it.
    head, body = text.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{title}">{body}'.strip()


def _own(tag: str, prefix: str) -> str:
    """A tag with names of its own and the colours of the page."""
    tag = re.sub(r'xmlns(:\w+)?="[^"]*"', "", tag)
    tag = re.sub(r'\bid="', f'id="{prefix}-', tag)
    tag = re.sub(r"url\(#", f"url(#{prefix}-", tag)
    tag = re.sub(r'(?:xlink:)?href="#', f'href="#{prefix}-', tag)
    for stand_in, color in _BY_THE_PAGE.items():
        tag = tag.replace(stand_in, color)
    return tag
