"""Names in what is printed, logged, drawn and written: text, which nothing obeys."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import json
import logging
import re
import subprocess
import unicodedata
from pathlib import Path
from typing import Any

import extras
import numpy as np
import pytest
import torch

if (reason := extras.why_no_train()) is not None:
    pytest.skip(reason, allow_module_level=True)

import demo
import evaluate
import matplotlib
import prepare_clickme
import reveal_experiment
import train
from clickme_shards import framed, record
from evaluating import figures, report, summary
from evaluating.data import FolderOfMaps, ImageSet
from evaluating.tar_shards import TarShards
from evaluations import network, run, write_folder, write_shards
from hypothesis import given
from hypothesis import strategies as st
from test_clickme_formats import write_tar
from tiny_training import command, values
from training import config, data, panels
from training.evaluation import Panel

from harmonizer_ext.clickme import ClickMe, ClickMeFiles, ClickMeWebDataset
from harmonizer_ext.files.output import write_rows
from harmonizer_ext.files.text import cell, shown

#: What a terminal, a spreadsheet, TeX, matplotlib, HTML or a picture's own text might obey.
NAMES = (
    r"$\frac$",
    "$x_1$ and 5$",
    r"\input{/etc/passwd}",
    "a_b^c%d#e&f~g",
    "\udcff\udc80",
    "\x1b[31mred\x1b]0;title\x07",
    "two\nlines\rand\ttabs",
    "\u202egpj.exe",
    "\x9b2Jcleared",
    "=1+1",
    "+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(1)",
    "\t=1",
    '"quoted", and, commas',
    "<script>alert(1)</script>",
    "</style><b>",
    'id="x" url(#y) href="#z" xmlns="q"',
    "#010101",
    "_hidden",
    "{name}%s$name${name}",
    "\u732b",
)
#: tqdm moves the cursor by itself: these escapes are its own.
CURSOR = re.compile(r"\x1b\[[A-K]")


def is_harmless(text: str) -> bool:
    """Whether a terminal prints it as it is: lines of printed characters."""
    return all(unicodedata.category(c) not in ("Cc", "Cf", "Cs") or c in "\n\r" for c in text)


# ---------------------------------------------------------------------------- one function each


def test_escapes_are_shown() -> None:
    assert shown("\x1b[31m\r\n\t\x00\x9b") == r"\x1b[31m\r\n\t\x00\x9b"
    assert shown("\u202ea\u2066b\u200f\u2028") == r"\u202ea\u2066b\u200f\u2028"
    assert shown(b"caf\xe9\xff.png") == r"caf\xe9\xff.png"
    assert shown(Path("a b-c_\u00e9\u732b.png")) == "a b-c_\u00e9\u732b.png"
    assert shown(ValueError("a\x1bb")) == r"a\x1bb"


@given(st.text())
def test_whatever_is_shown_is_printed(text: str) -> None:
    assert shown(text).isprintable()
    assert shown(shown(text)) == shown(text)
    if text.isprintable():
        assert shown(text) == text


@given(st.text())
def test_no_cell_is_a_formula(text: str) -> None:
    """A cell is none behind spaces either, in which spreadsheets do not see a difference."""
    made = cell(text)
    assert made.lstrip()[:1] not in ("=", "+", "-", "@")
    assert made[:1] not in ("\t", "\r", "\n")
    assert made.isprintable()


def test_cells_that_are_numbers_stay_numbers() -> None:
    same = [-1.5, 3, True, None, "resnet50.a1_in1k", ""]
    assert [cell(value) for value in same] == same


def test_a_table_reads_back(tmp_path: Path) -> None:
    """Quoting is right: as many rows and cells as were written."""
    write_rows(tmp_path / "a.csv", [["name", "value"], *([name, -0.5] for name in NAMES)])
    text = (tmp_path / "a.csv").read_bytes().decode()
    assert is_harmless(text)
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert rows[0] == ["name", "value"]
    assert rows[1:] == [[cell(name), "-0.5"] for name in NAMES]
    assert not any(re.match(r"\s*[=+\-@\t\r]", row[0]) for row in rows)


# ---------------------------------------------------------------------------- an evaluation


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Networks of all these names, two of them a pair, on a folder of such a name."""
    folder = write_folder(tmp_path_factory.mktemp("e") / "$\x1b[31m=1", 6)
    networks = [
        dataclasses.replace(network(size=32, seed=n), name=name, description=name)
        for n, name in enumerate(NAMES)
    ]
    return run(networks, ImageSet(folder), gallery=True, pairs=[(NAMES[0], NAMES[1])])


def test_an_evaluation_is_written_whole(
    evaluation: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "python evaluate.py \udcff \x1b[31m '$'"
    numbers = evaluate.write(evaluation, tmp_path, command=line, title="<i>\udcff$x$</i>")
    said = capsys.readouterr()
    assert is_harmless(said.out + said.err)
    assert "could not be drawn" not in said.err
    # JSON has the names themselves.
    stored = json.loads((tmp_path / "results.json").read_text(encoding="ascii"))
    assert [row["name"] for row in stored["networks"]] == list(NAMES)
    assert numbers["networks"][0]["name"] == NAMES[0]
    # CSV has them escaped.
    text = (tmp_path / "images.csv").read_bytes().decode()
    assert is_harmless(text)
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert len(rows) == 6 * (len(NAMES) + 1)
    assert {row["network"] for row in rows} == {*map(cell, NAMES), "Centre-bias control"}
    assert all(abs(float(row["spearman"])) <= 1 for row in rows)
    # The page has them as text, in tables and pictures.
    page = (tmp_path / "report.html").read_bytes().decode()
    assert "<script>alert" not in page
    assert "</style><b>" not in page
    assert page.count("<svg") == 4


def texts_of(svg: str) -> list[str]:
    """The texts between the tags of a picture."""
    found = re.findall(r"<text[^>]*>(.*?)</text>", svg, flags=re.DOTALL)
    return [html.unescape(text) for text in found]


def test_pictures_show_names_as_they_are(evaluation: Any) -> None:
    """No mathematics, and nothing that is put in for the page's colours and references."""
    numbers = summary.summarize(evaluation)
    for svg in (figures.distributions(evaluation), figures.scatter(evaluation, numbers)):
        texts = texts_of(svg)
        for name in NAMES:
            assert shown(name) in texts, name
    assert '<g id="rho-' in figures.distributions(evaluation)


def test_no_tex_is_run(evaluation: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """TeX is not run though a person's settings ask for it: names would be its source."""

    def started(*arguments: Any, **_: Any) -> None:
        raise AssertionError(f"a process was started: {arguments}")

    monkeypatch.setattr(subprocess, "Popen", started)
    with matplotlib.rc_context({"text.usetex": True}):
        assert texts_of(figures.distributions(evaluation))
    maps, ones = torch.rand(1, 8, 8), torch.ones(1)
    panel = Panel(torch.rand(1, 3, 8, 8), maps, maps, ones, ones, ones)
    for title in (r"$\frac$", "\udcff$", "\x1b[31m"):
        panels.draw(panel, tmp_path / "panel.png", title)


@pytest.mark.parametrize("picture", ["scatter", "distributions", "_galleries"])
def test_a_picture_that_fails_loses_nothing(
    evaluation: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    picture: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Numbers are there before it, other pictures beside it; the page says why it is not."""

    def fails(*_: Any, **__: Any) -> str:
        assert (tmp_path / "results.json").stat().st_size > 1000
        assert (tmp_path / "images.csv").stat().st_size > 1000
        raise RuntimeError("no \x1bfont")

    where: Any = report if picture.startswith("_") else figures
    monkeypatch.setattr(where, picture, fails)
    evaluate.write(evaluation, tmp_path, command="", title="t")
    page = (tmp_path / "report.html").read_bytes().decode()
    name = picture.strip("_")
    told = f"{name} could not be drawn: RuntimeError: no \\x1bfont"
    assert f"The {told}" in page
    assert page.count("<svg") == (4 if name == "galleries" else 2)
    assert 'id="results"' in page
    assert f"report: the {told}" in capsys.readouterr().err


def test_the_page_that_fails_comes_last(
    evaluation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError("no room")

    monkeypatch.setattr(report, "write", fails)
    with pytest.raises(OSError, match="no room"):
        evaluate.write(evaluation, tmp_path, command="", title="t")
    assert len(json.loads((tmp_path / "results.json").read_text())["networks"]) == len(NAMES)
    assert (tmp_path / "images.csv").stat().st_size > 1000


# ---------------------------------------------------------------------------- other programs


def test_a_run_with_sets_of_such_names(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [name for name in NAMES if "=" not in name]
    sets = tuple(f"{name}={digits / 'clickme/test'}" for name in names)
    fields = values(digits, tmp_path, clickme_val=sets, panel_images=1, quiet=False)
    result = train.train(config.Config(**fields, log_interval=1))
    said = capsys.readouterr()
    assert is_harmless(CURSOR.sub("", said.out + said.err))
    assert list(result["final"]) == names
    text = (tmp_path / "summary.csv").read_bytes().decode()
    assert is_harmless(text)
    head = next(csv.reader(io.StringIO(text, newline="")))
    assert not any(re.match(r"\s*[=+\-@\t\r]", name) for name in head)
    assert len(head) == len(set(head))
    assert json.loads((tmp_path / "results.json").read_text())["final"] == result["final"]


def test_a_picture_that_fails_ends_no_run(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The first picture alone ends one, before the first update: that is what it is drawn for."""
    drawn: list[str] = []
    draw = panels.draw

    def fails(panel: Any, path: Path, title: str) -> Any:
        drawn.append(title)
        if "untrained" not in title:
            raise RuntimeError("no \x1bfont")
        return draw(panel, path, title)

    monkeypatch.setattr(panels, "draw", fails)
    asked = config.Config(**values(digits, tmp_path, panel_images=1, quiet=False) | {"epochs": 2})
    assert len(train.train(asked)["history"]) == 2
    assert drawn == ["test, untrained", "test, epoch 1", "test, epoch 2"]
    assert r"the picture of test could not be drawn: no \x1bfont" in capsys.readouterr().out

    def always(*_: Any) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr(panels, "draw", always)
    with pytest.raises(RuntimeError, match="no font"):
        train.train(dataclasses.replace(asked, output=str(tmp_path / "other")))


@pytest.mark.parametrize("picture", ["report", "panel"])
def test_results_of_the_demo_are_there_before_its_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, picture: str
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        assert json.loads((tmp_path / "out/results.json").read_text())["baseline"]
        raise RuntimeError("no font")

    where: Any = (report, "write") if picture == "report" else (demo, "draw_panel")
    monkeypatch.setattr(*where, fails)
    with pytest.raises(RuntimeError, match="no font"):
        demo.run(
            tmp_path / "out", tmp_path / "data", seeds=(0,), epochs=1, train_images=96,
            test_images=24, panel_images=1, quiet=True,
        )  # fmt: skip


@pytest.mark.parametrize("name", [r"$\frac$", "_hidden", "\udcff\x1b[31m", "$x$"])
def test_a_curve_of_such_a_network(name: str) -> None:
    curve: dict[str, Any] = {"model": name, "levels": [0.1, 1.0], "accuracy": [0.5, 0.9]}
    curve |= {"standard_error": [0.1, 0.1], "human": {"spearman": 1.0}}
    for human in (None, torch.tensor([0.5, 1.0])):
        figure = reveal_experiment.draw(curve, human)
        figure.savefig(io.BytesIO(), format="png")
        (legend,) = [axes.get_legend() for axes in figure.axes]
        assert shown(name) in [text.get_text() for text in legend.get_texts()]


# ---------------------------------------------------------------------------- errors and logs

EVIL = "\x1b[31mred\u202e\n=1"
SHOWN = r"\x1b[31mred\u202e\n=1"


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Files of such a name, none of which can be read."""
    folder = tmp_path / EVIL
    for part in ("tar", "files", "tfrecords", "images/1", "maps/1", "data/train/1"):
        (folder / part).mkdir(parents=True)
    (folder / f"tfrecords/{EVIL}.tfrecords").write_bytes(framed(record(0))[:-9] + b"x" * 9)
    (folder / f"files/{EVIL}.npz").write_bytes(b"PK")
    (folder / f"files/{EVIL}.pth").write_bytes(b"PK")
    write_tar(folder / f"tar/{EVIL}.tar", {f"{EVIL}.jpg": b"x"})
    for part in ("images/1", "data/train/1"):
        (folder / part / f"{EVIL}.jpg").write_bytes(b"x")
    np.save(folder / f"maps/1/{EVIL}.npy", np.ones((4, 4)))
    return folder


def errors(folder: Path) -> list[str]:
    plain: dict[str, Any] = {"preprocess": None}
    asked = config.Config(model="small", clickme=("x",), data_dir=str(folder / "data"))
    bad = folder / f"images/1/{EVIL}.jpg"
    found = []
    for read in (
        lambda: list(ClickMe(folder / "tfrecords", **plain)),
        lambda: list(ClickMeFiles(folder / "files", **plain)),
        lambda: ClickMeFiles(folder / "files", **plain)[1],
        lambda: list(ClickMeWebDataset(folder / "tar", **plain)),
        lambda: list(TarShards(folder / "tar", **plain)),
        lambda: FolderOfMaps(folder)[0],
        lambda: data._images(asked, "train", "train_split")[0],
        lambda: ImageSet(folder / "nowhere"),
        lambda: ImageSet([folder / "tar", folder / "files"]),
        lambda: data._images(asked, "val", "val_split"),
        lambda: train.load_network(folder / "nowhere.pt"),
        lambda: train.load_network(bad),
        lambda: ClickMe(folder / "tfrecords", index_cache=bad),
        lambda: evaluate.read_accuracy(str(bad), [network("a")]),
        lambda: reveal_experiment.read_human_curve(bad, [1.0]),
    ):
        with pytest.raises((ValueError, OSError)) as told:
            read()
        found.append(str(told.value))
    return found


def test_errors_have_names_that_are_harmless(damaged: Path) -> None:
    for text in errors(damaged):
        assert text.isprintable(), text
        assert SHOWN in text


def test_logs_have_names_that_are_harmless(damaged: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    plain: dict[str, Any] = {"preprocess": None, "on_error": "skip"}
    for read in (
        lambda: list(ClickMe(damaged / "tfrecords", **plain)),
        lambda: list(ClickMeFiles(damaged / "files", **plain)),
        lambda: list(ClickMeWebDataset(damaged / "tar", **plain)),
    ):
        try:
            read()
        except ValueError as error:
            assert str(error).isprintable()  # noqa: PT017 - an error is allowed, not required
    assert len(caplog.messages) >= 4
    assert all(message.isprintable() for message in caplog.messages)


def test_programs_print_names_that_are_harmless(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    assert prepare_clickme.main(["verify", str(damaged / "tfrecords")]) == 1
    assert prepare_clickme.main(["verify", str(damaged / "tar")]) == 1
    out = ["--output", str(tmp_path / "out")]
    assert prepare_clickme.main(["convert", str(damaged / "tfrecords"), *out]) == 1
    skip = ["--on-error", "skip"]
    assert prepare_clickme.main(["convert", str(damaged / "tfrecords"), *out, *skip]) == 0
    assert reveal_experiment.main(["make", str(damaged), *out]) == 1
    write_shards(tmp_path / "shards", 2)
    for arguments in (
        ["--data", str(damaged / "tfrecords"), "--model", "test_vit"],
        ["--data", str(tmp_path / "shards"), "--model", str(damaged / f"images/1/{EVIL}.jpg")],
        ["--data", str(tmp_path / "shards"), "--model", f"{EVIL}=nowhere"],
    ):
        monkeypatch.setattr("sys.argv", ["evaluate.py", *arguments, *out])
        with pytest.raises(SystemExit) as ended:
            evaluate.run()
        assert str(ended.value).isprintable()
    fields = {"clickme": (str(damaged / "tfrecords"),), "output": str(tmp_path / "t")}
    monkeypatch.setattr("sys.argv", [*command(fields)[1:], "--model", "small"])
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert str(ended.value).isprintable()
    said = capsys.readouterr()
    printed = CURSOR.sub("", said.out + said.err)
    assert r"\x1b[31mred" in printed
    assert is_harmless(printed)
