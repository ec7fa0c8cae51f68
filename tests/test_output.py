"""The programs write one at a time, files whole or not at all, and never through a link."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import extras
import pytest
import torch

if (reason := extras.why_no_train()) is not None:
    pytest.skip(reason, allow_module_level=True)

import clickme_convert
import demo
import evaluate
import prepare_clickme
import reveal_experiment
import shortcut_digits
import train
from evaluating import report, summary
from evaluating.data import ImageSet
from evaluations import network, run, write_folder, write_shards
from PIL import Image
from tiny_training import values
from training import checkpoint, config, panels
from training.processes import World

from harmonizer_ext.clickme import ClickMe, write_records
from harmonizer_ext.files import lock, output

# ---------------------------------------------------------------------------- the programs take it


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_shards(folder / "shards", 4)
    write_folder(folder / "folder", 6)
    (folder / "folder/labels.csv").write_text(
        "name,label\n" + "".join(f"{n % 3}/{n},{n * 100}\n" for n in range(6))
    )
    return folder


def programs(data: Path, digits: Path, place: Path) -> dict[str, Callable[[], Any]]:
    """Every program that has an output, told to write to a place."""
    shards, folder = str(data / "shards"), str(data / "folder")
    make = ["make", folder, "--output", str(place), "--levels", "2", "--pixels", "9"]
    return {
        "train": lambda: train.train(config.Config(**values(digits, place))),
        "evaluate": lambda: evaluate.main(
            ["--data", shards, "--model", "test_vit", "--checkpoint", str(data / "vit.pt")]
            + ["--output", str(place), "--device", "cpu", "--quiet", "--max-images", "2"]
        ),
        "convert": lambda: prepare_clickme.main(["convert", shards, "--output", str(place)]),
        "download": lambda: prepare_clickme.main(
            ["download", "--output", str(place), "--url", "http://127.0.0.1:9", "--retries", "1"]
        ),
        "make": lambda: reveal_experiment.main(make),
        "digits": lambda: shortcut_digits.save(
            shortcut_digits.make(train_images=4, test_images=2), place
        ),
        "demo": lambda: demo.run(place, place / "data", seeds=(0,), epochs=1, quiet=True),
    }


@pytest.mark.parametrize(
    "program", ["train", "evaluate", "convert", "download", "make", "digits", "demo"]
)
def test_programs_refuse_a_place_in_use(
    data: Path, digits: Path, tmp_path: Path, program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_vit(data)
    (tmp_path / "kept").write_text("kept")
    with lock.locked(tmp_path / lock.LOCK):
        try:
            code = programs(data, digits, tmp_path)[program]()
            told = capsys.readouterr().err
            assert code == 1
        except OSError as error:
            told = str(error)
        assert f"in use by process {os.getpid()} on host {socket.gethostname()}" in told
        assert sorted(path.name for path in tmp_path.iterdir()) == [lock.LOCK, "kept"]


def save_vit(data: Path) -> None:
    if not (data / "vit.pt").exists():
        import timm

        torch.save(timm.create_model("test_vit").state_dict(), data / "vit.pt")


def test_all_processes_of_a_run_are_told(tmp_path: Path) -> None:
    from training.processes import claim

    class Second(World):
        def gather(self, value: Any) -> list[Any]:
            return ["output: in use by process 1", value]

    second = Second(1, 2, torch.device("cpu"))
    with pytest.raises(lock.LockedError, match="in use by process 1"), claim(str(tmp_path), second):
        pass
    assert not list(tmp_path.iterdir())  # the first process alone makes the lock


def test_what_killed_programs_leave_is_removed(tmp_path: Path) -> None:
    from training.processes import claim

    killed = tmp_path / "last.pt.12345-0123abcd.partial"
    kept = [tmp_path / name for name in ("x.partial", "a.1-0123abcd.partial.txt", "victim")]
    for path in (killed, *kept):
        path.write_text("half")
    (tmp_path / "b.1-0123abcd.partial").symlink_to(kept[-1])
    with claim(str(tmp_path), World(0, 1, torch.device("cpu"))):
        assert not killed.exists()
    assert all(path.read_text() == "half" for path in kept)


# ---------------------------------------------------------------------------- whole files


def save_again(path: Path, number: int) -> None:
    for _ in range(20):
        checkpoint.write({"weight": torch.full((2000,), number)}, path)


def test_writers_at_once_never_mix(tmp_path: Path) -> None:
    """They write without the lock, as processes that do not share one would."""
    path = tmp_path / "last.pt"
    start = multiprocessing.get_context("fork")
    save_again(path, 0)
    writers = [start.Process(target=save_again, args=(path, number)) for number in (1, 2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        content = torch.load(path, weights_only=True)["weight"]
        assert len(content.unique()) == 1
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    output.write_text(path, "old")

    def interrupted() -> None:
        with output.replacing(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


def test_others_may_read_what_is_written(tmp_path: Path) -> None:
    """The file's mode is as the mask of the process says, not for its user alone."""
    before = os.umask(0o022)
    try:
        output.write_text(tmp_path / "a", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


# ---------------------------------------------------------------------------- no links


def with_links(folder: Path, names: list[str], victim: Path) -> Path:
    """A folder in which every name leads to another file, and so does what is written before it."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        for suffix in ("", ".partial", ".part"):
            (folder / f"{name}{suffix}").symlink_to(victim)
    (folder / f"summary.csv.{os.getpid()}.partial").symlink_to(victim)
    (folder / "panel_test.partial.png").symlink_to(victim)
    return folder


def one_result(data: Path) -> Any:
    return run([network(size=32)], ImageSet(data / "folder"))


def panel() -> Any:
    from training.evaluation import Panel

    maps, ones = torch.rand(2, 8, 8), torch.ones(2)
    return Panel(torch.rand(2, 3, 8, 8), maps, maps, ones, ones, ones)


def image_writers(data: Path) -> dict[str, tuple[list[str], Callable[[Path], Any]]]:
    """Names of what is written, and what writes it to a folder."""
    vit = ["results.json", "images.csv", "report.html"]
    shard = data / "shards/val-0.tfrecords"
    return {
        "checkpoint": (
            ["last.pt"], lambda f: checkpoint.write({"a": torch.ones(1)}, f / "last.pt"),
        ),
        "json": (["r.json"], lambda f: summary.write_json({"a": 1.0}, f / "r.json")),
        "csv": (["i.csv"], lambda f: summary.write_images(one_result(data), f / "i.csv")),
        "report": (["r.html"], lambda f: report.write(one_result(data), f / "r.html")),
        "panel": (["panel_test.png"], lambda f: panels.draw(panel(), f / "panel_test.png", "t")),
        "records": (["a.tfrecords"], lambda f: write_records(f / "a.tfrecords", [{"a": 1}])),
        "index": (["i.pt"], lambda f: ClickMe(shard, index_cache=f / "index.pt")),
        "shard": (["val-0.tar"], lambda f: clickme_convert.convert_shard(shard, f)),
        "evaluate": (vit, lambda f: programs(data, data, f)["evaluate"]()),
        "make": (
            ["manifest.json", "0-0_00.png", "1-1_01.png"],
            lambda f: programs(data, data, f)["make"](),
        ),
    }  # fmt: skip


@pytest.mark.parametrize(
    "writer",
    [
        "checkpoint",
        "json",
        "csv",
        "report",
        "panel",
        "records",
        "index",
        "shard",
        "evaluate",
        "make",
    ],
)
def test_no_link_is_followed_where_files_are_written(
    data: Path, tmp_path: Path, writer: str
) -> None:
    save_vit(data)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    names, write = image_writers(data)[writer]
    folder = with_links(tmp_path / "out", names, victim)
    if writer == "index":
        (folder / f"index.pt.{os.getpid()}.partial").symlink_to(victim)
        (folder / "index.pt").symlink_to(tmp_path / "nowhere")
        names = ["index.pt"]
    if writer == "shard":
        (tmp_path / "manifest").write_text('{"version": 1, "shards": {}}')
        (folder / "manifest.json").symlink_to(tmp_path / "manifest")
        (folder / "manifest.json.partial").symlink_to(victim)
    write(folder)
    assert writer != "shard" or '"shards": {}' in (tmp_path / "manifest").read_text()
    assert victim.read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()
    for name in names:
        assert (folder / name).is_file()
        assert not (folder / name).is_symlink()


def test_a_run_follows_no_link(digits: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    names = ["best_accuracy.pt", "best_alignment.pt", "config.json", "summary.csv", "results.json"]
    folder = with_links(tmp_path / "out", names, victim)
    for name in ("last.pt.partial", "panel_test.png"):
        (folder / name).symlink_to(victim)
    # The place itself may be a link: to the disk where there is room.
    (tmp_path / "place").symlink_to(folder)
    train.train(config.Config(**values(digits, tmp_path / "place", panel_images=2)))
    assert victim.read_text() == "precious"
    for name in (*names, "panel_test.png", "last.pt"):
        assert not (folder / name).is_symlink()
    assert (folder / "tensorboard").is_dir()


@pytest.mark.parametrize("program", ["train", "download", "digits"])
def test_folders_in_the_output_are_no_links(
    data: Path, digits: Path, tmp_path: Path, program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = {"train": "tensorboard", "download": "train", "digits": "images"}[program]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(tmp_path / "elsewhere")
    try:
        assert programs(data, digits, tmp_path / "out")[program]() == 1
        told = capsys.readouterr().err
    except ValueError as error:
        told = str(error)
    assert f"output: expected a folder to write to, got the link {tmp_path / 'out' / name}" in told
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "folder"])
def test_parts_that_are_other_files(tmp_path: Path, kind: str) -> None:
    part, victim = tmp_path / "x.part", tmp_path / "victim"
    victim.write_text("precious")
    make: dict[str, Callable[[], Any]] = {
        "link": lambda: part.symlink_to(victim),
        "hard link": lambda: part.hardlink_to(victim),
        "pipe": lambda: os.mkfifo(part),
        "folder": part.mkdir,
    }
    make[kind]()
    for empty in (False, True):
        with pytest.raises((ValueError, OSError), match=r"remove it|directory"):
            output.open_to_append(part, empty=empty)
    assert victim.read_text() == "precious"


def test_a_curve_is_written_beside_its_lock(data: Path, tmp_path: Path) -> None:
    """reveal_experiment run: its output is a name, not a folder."""
    save_vit(data)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    stimuli = tmp_path / "stimuli"
    assert programs(data, data, stimuli)["make"]() == 0
    with_links(tmp_path, ["vit.json", "vit.png"], victim)
    options = argparse.Namespace(
        stimuli=stimuli, model="test_vit", weights=data / "vit.pt", human=None,
        output=tmp_path / "vit", batch_size=4, device="cpu",
    )  # fmt: skip
    reveal_experiment.run_network(options)
    assert victim.read_text() == "precious"
    assert json.loads((tmp_path / "vit.json").read_text())["model"] == "test_vit"
    with Image.open(tmp_path / "vit.png") as drawn:
        assert drawn.format == "PNG"
    held = lock.locked(Path(f"{tmp_path / 'vit'}{lock.LOCK}"))
    with held, pytest.raises(lock.LockedError, match="in use by process"):
        reveal_experiment.run_network(options)
