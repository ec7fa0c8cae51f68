"""The report: whole HTML that loads nothing, whose numbers are those of the JSON."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import extras
import pytest
import torch

if (reason := extras.why_no_train()) is not None:
    pytest.skip(reason, allow_module_level=True)

import numpy as np
from evaluating import figures, pictures, report, scoring, summary
from evaluating.data import ImageSet
from evaluations import Blind, network, write_shards
from PIL import Image

IMAGES = 10
#: Names that would break a page which does not escape them.
NAMES = ("<b>base & line</b>", 'harmonized "1"', "third")


class Page(HTMLParser):
    """Checks that tags are closed in their order, and collects what the tests look at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: dict[str, list[list[str]]] = {}
        self.headings: list[str] = []
        self._table: str | None = None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag == "meta" or tag == "img":
            return
        self.open.append(tag)
        if tag == "table":
            self._table = attributes.get("id") or f"table {len(self.cells)}"
            self.cells[self._table] = []
        if tag == "tr":
            self.cells[self._table].append([])
        if tag in ("td", "th"):
            self.cells[self._table][-1].append("")
        if tag in ("h1", "h2"):
            self.headings.append("")

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        if {"td", "th"} & {*self.open} and "span" not in self.open:
            self.cells[self._table][-1][-1] += text
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings[-1] += text


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> scoring.Evaluation:
    shards = write_shards(tmp_path_factory.mktemp("clickme"), IMAGES)
    chosen = [network(name, seed=seed) for seed, name in enumerate(NAMES)]
    chosen.append(network("blind", kind=Blind))
    return scoring.evaluate(
        chosen,
        ImageSet(shards, name="ClickMe <test>"),
        pairs=[(NAMES[0], NAMES[1])],
        reducers=(1, 4),
        batch_size=4,
        workers=0,
        quiet=True,
    )


@pytest.fixture(scope="module")
def written(
    evaluation: scoring.Evaluation, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Any]]:
    """The text of the page, and the JSON as it is read back."""
    folder = tmp_path_factory.mktemp("report")
    numbers = report.write(evaluation, folder / "report.html", command="evaluate <them> --all")
    summary.write_json(numbers, folder / "results.json")
    text = (folder / "report.html").read_text(encoding="utf-8")
    return text, json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def page(written: tuple[str, dict[str, Any]]) -> Page:
    return Page(written[0])


def test_the_page_is_whole(page: Page, written: tuple[str, dict[str, Any]]) -> None:
    text, _ = written
    assert page.headings == [
        "Where networks and people look",
        "Results",
        "Alignment against accuracy",
        "Image by image",
        "Maps",
        "How the numbers were made",
        "What was run",
        "How to cite",
    ]
    identifiers = [a["id"] for _, a in page.tags if "id" in a]
    assert len(identifiers) == len(set(identifiers))
    references = [a["href"] for tag, a in page.tags if "href" in a]
    references += re.findall(r"url\((#[^)]*)\)", text)
    assert references
    assert {reference[1:] for reference in references} <= set(identifiers)


def test_the_page_loads_nothing(page: Page, written: tuple[str, dict[str, Any]]) -> None:
    text, _ = written
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "poster", "data"):
            assert (attributes.get(name) or "#").startswith(("data:image/jpeg;base64,", "#"))
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert not re.search(r"https?://", text)


def test_numbers_of_the_table_are_those_of_the_json(
    page: Page, written: tuple[str, dict[str, Any]]
) -> None:
    _, numbers = written
    header, *rows = page.cells["table"]
    assert header[:6] == [
        "network", "top-1 (%)", "Spearman ρ", "alignment (% of ceiling)", "Dice", "IoU",
    ]  # fmt: skip
    expected = numbers["networks"] + numbers["controls"]
    assert [row[0] for row in rows] == [*NAMES, "blind", "Centre-bias control"]
    for row, stored in zip(rows, expected, strict=True):
        keys = (("top1", 100), ("spearman", 1), ("alignment", 100), ("dice", 1), ("iou", 1))
        for text, (key, factor) in zip(row[1:6], keys, strict=True):
            if stored.get(key) is None or stored[key]["mean"] is None:
                assert text == "–"
                continue
            mean, error = text.replace("\N{MINUS SIGN}", "-").split(" ± ")
            half = 0.5 * 10.0 ** -len(mean.partition(".")[2]) + 1e-9  # of the last digit
            assert float(mean) == pytest.approx(factor * stored[key]["mean"], abs=half)
            assert float(error) == pytest.approx(factor * stored[key]["standard_error"], abs=half)
        assert row[6] == str(stored["excluded"])
    assert [row[6] for row in rows] == ["0", "0", "0", str(IMAGES), "0"]


def test_what_is_left_out_at_lower_resolutions_is_counted(
    page: Page, written: tuple[str, dict[str, Any]]
) -> None:
    _, numbers = written
    header, *rows = page.cells["table 1"]
    assert header[-1] == "left out, 1/4"
    assert [row[-1] for row in rows] == ["0", "0", "0", str(IMAGES), "0"]
    assert [row["excluded/4"] for row in numbers["networks"]] == [0, 0, 0, IMAGES]


def test_scores_above_the_ceiling_are_called_so(
    evaluation: scoring.Evaluation, written: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    assert "Above 100 %" not in written[0]
    low = dataclasses.replace(evaluation, ceiling=0.001, galleries=[])
    report.write(low, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "closer to people's maps than the ceiling (0.001) says" in text


def test_every_picture_is_there_and_described(page: Page, evaluation: scoring.Evaluation) -> None:
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    count = len(evaluation.results)
    # Nine random images, and nine of each network that has correlations.
    assert len(images) == 9 * (1 + 3) * (2 + count)
    for attributes in images:
        assert attributes["alt"]
        content = base64.b64decode(attributes["src"].partition(",")[2])
        with Image.open(io.BytesIO(content)) as picture:
            assert picture.size == (pictures.SIDE, pictures.SIDE)
    drawings = [attributes for tag, attributes in page.tags if tag == "svg"]
    # Two, each for screens and for telephones.
    assert len(drawings) == 4
    assert all(a["role"] == "img" and a["aria-label"] and a["viewbox"] for a in drawings)


def test_correlations_below_the_maps(page: Page, evaluation: scoring.Evaluation) -> None:
    table = page.cells["table 3"]  # after the main table, resolutions and pairs
    names = [row[0] for row in table]
    assert names == ["image", "people", *NAMES, "blind"]
    (panels,) = evaluation.galleries[0].groups.values()
    for name in NAMES:
        values = evaluation.by_name(name).values.values["spearman"]
        for text, panel in zip(table[names.index(name)][1:], panels, strict=True):
            shown = float(text.replace("\N{MINUS SIGN}", "-").removeprefix("ρ = "))
            assert shown == pytest.approx(values[panel.row].item(), abs=0.0051)
    assert set(table[-1][1:]) == {"no ρ"}


def test_what_was_run_is_told(written: tuple[str, dict[str, Any]]) -> None:
    text, numbers = written
    for part in (
        "evaluate &lt;them&gt; --all",
        "ClickMe &lt;test&gt;",
        "InputGradient(reduce=&#x27;abs_max&#x27;)",
        "0.65753",
        numbers["provenance"]["torch"],
        numbers["provenance"]["date"][:10],
    ):
        assert part in text
    for name in NAMES:
        assert name not in text or name == "third" or "<" not in name


def test_the_scatter_shows_every_network_pair_and_front(
    evaluation: scoring.Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The marks that are drawn, from the picture's own objects."""
    drawn: list[Any] = []
    monkeypatch.setattr(figures, "_svg", lambda figure, *rest: drawn.append(figure) or "")
    numbers = summary.summarize(evaluation)
    figures.scatter(evaluation, numbers)
    (axes,) = drawn[0].axes
    places = {
        (container.lines[0].get_xdata()[0], container.lines[0].get_ydata()[0])
        for container in axes.containers
    }
    rows = [row for row in numbers["networks"] if row["name"] in NAMES]
    expected = {(100 * row["accuracy"], 100 * row["alignment"]["mean"]) for row in rows}
    assert places == expected
    errors = sorted(
        np.ptp(bar.get_segments()[0][:, 1]) / 2
        for container in axes.containers
        for bar in container.lines[2]
    )
    expected_errors = sorted(100 * row["alignment"]["standard_error"] for row in rows)
    np.testing.assert_allclose(errors, expected_errors, rtol=1e-9)
    (arrow,) = axes.patches
    ends = [numbers["networks"][i] for i in (0, 1)]
    assert list(arrow._posA_posB) == [
        (100 * row["accuracy"], 100 * row["alignment"]["mean"]) for row in ends
    ]
    texts = {text.get_text() for text in axes.texts}
    assert texts == {*NAMES, "centre-bias control"}


def _labelled(points: dict[str, tuple[float, float]]) -> dict[str, tuple[Any, np.ndarray]]:
    """The box of each name and the place of its point, in pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.6, 4.3))
    axes = figure.subplots()
    axes.set(xlim=(-20, 120), ylim=(-20, 120))
    figures._label(axes, points, {}, [(next(iter(points)), list(points)[1])], [])
    renderer = FigureCanvasAgg(figure).get_renderer()
    return {
        text.get_text(): (
            text.get_window_extent(renderer),
            axes.transData.transform(points[text.get_text()]),
        )
        for text in axes.texts
    }


def test_names_do_not_cover_one_another() -> None:
    generator = np.random.default_rng(1)
    points = {f"network {i}": tuple(generator.uniform(0, 100, 2)) for i in range(20)}
    labelled = _labelled(points)
    assert labelled.keys() == points.keys()
    for name, (box, _) in labelled.items():
        for other, (another, _) in labelled.items():
            shared = figures._overlap(box.extents, another.extents)
            assert other == name or shared < 0.5 * box.width * box.height


@pytest.mark.parametrize("angle", range(0, 360, 15))
def test_names_stand_beside_their_own_points(angle: int) -> None:
    """Two neighbours, in any direction from one another: neither name is the nearer to the other's
    point."""
    away = (8 * np.cos(np.radians(angle)), 8 * np.sin(np.radians(angle)))
    labelled = _labelled({"here": (50, 50), "there": (50 + away[0], 50 + away[1])})
    for name, other in (("here", "there"), ("there", "here")):
        box, point = labelled[name]
        corners = (box.x0, box.y0), (box.x1, box.y1)
        own, wrong = (np.hypot(*(p - p.clip(*corners))) for p in (point, labelled[other][1]))
        assert own < wrong


@pytest.mark.parametrize("angle", range(0, 360, 15))
def test_names_do_not_lie_on_arrows(angle: int) -> None:
    x, y = 40 * np.cos(np.radians(angle)), 40 * np.sin(np.radians(angle))
    labelled = _labelled({"baseline": (50 - x, 50 - y), "harmonized": (50 + x, 50 + y)})
    start, end = (labelled[name][1] for name in ("baseline", "harmonized"))
    for part in np.linspace(0, 1, 200):
        place = (1 - part) * start + part * end
        for box, _ in labelled.values():
            assert not box.contains(*place)


def test_names_have_room_beside_the_outermost_points(
    evaluation: scoring.Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(figures, "_svg", lambda figure, *rest: drawn.append(figure) or "")
    numbers = summary.summarize(evaluation)
    for width in (figures.WIDE, figures.NARROW):
        figures.scatter(evaluation, numbers, width)
        (axes,) = drawn[-1].axes
        drawn[-1].draw_without_rendering()
        inside = axes.get_window_extent()
        for text in axes.texts:
            box = text.get_window_extent()
            assert inside.x0 - 1 <= box.x0
            assert box.x1 <= inside.x1 + 1


def test_maps_are_shown_from_zero_or_around_it() -> None:
    ramp = torch.linspace(0, 1, 100).view(10, 10)

    def pixels(url: str) -> np.ndarray:
        content = base64.b64decode(url.partition(",")[2])
        return np.array(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)

    positive = pixels(pictures.heat(ramp)).sum(2)
    assert positive[2, 2] < 60  # dark at 0
    assert positive[-3, -3] > 600
    signed = pixels(pictures.heat(ramp - 0.5))
    middle = signed[signed.shape[0] // 2, signed.shape[1] // 2]
    assert middle.min() > 200  # white at 0
    assert (signed[2, 2] - signed[-3, -3])[2] > 40  # purple below, orange above
    assert (pixels(pictures.heat(torch.zeros(10, 10))) < 30).all()


def test_a_single_network_without_maps_of_its_own(tmp_path: Path) -> None:
    """Nothing is defined, nothing can be drawn, and the page is still whole."""
    shards = write_shards(tmp_path / "clickme", 2)
    evaluation = scoring.evaluate(
        [network("blind", kind=Blind)],
        ImageSet(shards, max_images=1),
        workers=0,
        gallery=False,
        quiet=True,
    )
    report.write(evaluation, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.cells["table"][1][2:6] == ["–"] * 4
    assert "Alignment against accuracy" not in page.headings
