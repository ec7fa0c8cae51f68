"""Checkpoints of others, and malicious ones: this project's error with the way out, and no code."""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import extras
import numpy as np
import pytest
import torch

if (reason := extras.why_no_train()) is not None:
    pytest.skip(reason, allow_module_level=True)

import bombs
import evaluate
import limited
import train
from evaluating import networks as evaluated
from evaluations import write_shards
from tiny_training import values
from torch import nn
from training import checkpoint, config, networks

from harmonizer_ext.clickme import ClickMe


class Runs:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.mark}'",)


def saved(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


OLD = {"_use_new_zipfile_serialization": False}


def scripted() -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), file)
    return file.getvalue()


def without_pickle() -> bytes:
    return bombs.zip_of({"archive/version": b"3\n"})


def nested(depth: int) -> Any:
    """A small file, and a text of itself that fills the memory."""
    value: Any = ("x",)
    for _ in range(depth):
        value = (value, value)
    return value


#: Content by its name; each is no checkpoint, or one that would do harm.
FOREIGN: dict[str, Callable[[Path], bytes]] = {
    "command": lambda mark: saved({"state_dict": Runs(mark)}),
    "command, old": lambda mark: saved({"state_dict": Runs(mark)}, **OLD),
    "command, bare pickle": lambda mark: pickle.dumps(Runs(mark)),
    "command, protocol 5": lambda mark: saved({"a": Runs(mark)}, pickle_protocol=5),
    "command as a key": lambda mark: saved({"version": 1, "config": {}, "x": [Runs(mark)]}),
    "model": lambda _: saved(nn.Linear(2, 2)),
    "model, old": lambda _: saved(nn.Linear(2, 2), **OLD),
    "dataclass": lambda _: saved({"config": argparse.ArgumentParser}),
    "numpy": lambda _: saved({"state_dict": np.zeros(3)}),
    "TorchScript": lambda _: scripted(),
    "no pickle": lambda _: without_pickle(),
    "npz": lambda _: bombs.npz_of(),
    "page": lambda _: b"<!DOCTYPE html><html><body>log in</body></html>",
    "pointer": lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "text": lambda _: b"weights: none\n",
    "empty": lambda _: b"",
    "gzip": lambda _: b"\x1f\x8b" + bytes(99),
    "cut": lambda _: saved({"a": torch.zeros(999)})[:2000],
    "cut, old": lambda _: saved({"a": torch.zeros(999)}, **OLD)[:300],
    "list": lambda _: saved([1, 2]),
    "number": lambda _: saved(3),
    "tensor": lambda _: saved(torch.zeros(3)),
    "other weights": lambda _: saved({"x.\x1b[31m\nred": torch.zeros(3)}),
    "no texts": lambda _: saved({1: torch.zeros(3), 2: "x"}),
    "doubled": lambda _: saved({"version": 1, "config": nested(60), "input": {}, "model": {}}),
    "doubled, wrong": lambda _: saved(nested(60)),
    "deep": lambda _: saved_deep(),
    "stride 0": lambda _: saved({"w": torch.zeros(1).expand(10**6, 10**6)}),
    "meta": lambda _: saved({"w": torch.zeros(3, device="meta")}),
    "bytearray": lambda _: saved({"w": bombs.Calls(bytearray, 2**40)}),
    "ours, without weights": lambda _: saved(ours(model=None)),
    "ours, damaged": lambda _: saved(ours(config={"model": ["x"]})),
    "ours, other fields": lambda _: saved(ours(config={1: 2, "a": 3})),
    "ours, another network": lambda _: saved(ours(input={"x": 1})),
    "ours, many classes": lambda _: saved(ours(classes=10**9)),
    "ours, texts for weights": lambda _: saved(ours(model={"0.weight": "x"})),
}


def ours(classes: int = 10, **changed: Any) -> dict[str, Any]:
    asked = config.Config(model="small", num_classes=10, clickme=("x",))
    model, form = networks.create(asked)
    asked = dataclasses.replace(asked, num_classes=classes)
    content = {"version": checkpoint.VERSION, "config": dataclasses.asdict(asked)}
    content |= {"input": form._asdict(), "model": model.state_dict()}
    return content | changed


def saved_deep() -> bytes:
    """Lists in lists, deeper than Python goes."""
    content = bombs.unzipped(saved({"a": torch.zeros(1)}))
    name = next(name for name in content if name.endswith("data.pkl"))
    content[name] = b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."
    return bombs.zip_of(content)


@pytest.fixture(params=FOREIGN)
def foreign(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, Path]:
    """Its kind, the file, and what its code would leave."""
    path, mark = tmp_path / "a.pt", tmp_path / "ran"
    path.write_bytes(FOREIGN[request.param](mark))
    return request.param, path, mark


def check(error: BaseException, path: Path) -> None:
    """A line that names the file and that no terminal obeys, without pickle's own traceback."""
    text = str(error)
    assert str(path) in text
    assert text.isprintable()
    assert len(text) < 1000
    assert "weights_only=True" not in text
    causes = [error.__cause__, error.__context__ if not error.__suppress_context__ else None]
    assert not any(isinstance(cause, pickle.UnpicklingError) for cause in causes)


def small() -> nn.Module:
    return networks.create(config.Config(model="small", num_classes=10, clickme=("x",)))[0]


def test_foreign_checkpoints_of_the_training_program(foreign: tuple[str, Path, Path]) -> None:
    _, path, mark = foreign
    for read in (checkpoint.read, checkpoint.load_network, lambda p: evaluated.load(str(p))):
        if read is checkpoint.read and foreign[0] in (
            "doubled", "ours, damaged", "ours, other fields", "ours, another network",
            "ours, many classes", "ours, texts for weights",
        ):  # fmt: skip
            continue  # a checkpoint, as far as its fields tell
        with pytest.raises(ValueError, match=r"checkpoint|config|model") as told:
            read(path)
        if "config: " not in str(told.value) and "model: " not in str(told.value):
            check(told.value, path)
    assert not mark.exists()


def test_foreign_weights(foreign: tuple[str, Path, Path]) -> None:
    kind, path, mark = foreign
    if kind in ("ours, damaged", "ours, other fields", "ours, another network") or "many" in kind:
        return  # the weights in it are those of this network
    with pytest.raises(ValueError, match="initial_checkpoint: ") as told:
        networks.load_weights(small(), path)
    check(told.value, path)
    assert not mark.exists()


def test_foreign_indices(foreign: tuple[str, Path, Path], tmp_path: Path) -> None:
    _, path, mark = foreign
    write_shards(tmp_path / "shards", 2)
    with pytest.raises(ValueError, match=r"is no ClickMe index of version 1; delete it"):
        ClickMe(tmp_path / "shards", index_cache=path)
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["command", "command, old", "model", "page", "ours, damaged"])
def test_programs_end_with_a_line(digits: Path, tmp_path: Path, kind: str) -> None:
    """The line of every argument that takes a checkpoint, as a person sees it."""
    path, mark = tmp_path / "a.pt", tmp_path / "ran"
    path.write_bytes(FOREIGN[kind](mark))
    for line in (
        ("train.py", "--resume", str(path)),
        ("train.py", "--initial-checkpoint", str(path)),
        ("evaluate.py", "--model", str(path)),
        ("evaluate.py", "--model", "test_vit", "--checkpoint", str(path)),
    ):
        if kind == "ours, damaged" and "checkpoint" in line[-2]:
            continue
        told = program(digits, tmp_path, *line)
        assert f"{line[0]}: error: " in told
        assert "Traceback" not in told


def program(digits: Path, output: Path, name: str, *line: str) -> str:
    """Returns what a program says, run in this process as from a shell."""
    import contextlib
    import sys
    from unittest import mock

    if name == "train.py":
        from tiny_training import command

        asked = values(digits, output / "out")
        arguments = command(asked)[2:]
        start: Any = train.main
    else:
        arguments = ["--data", str(digits / "clickme/test"), "--output", str(output / "out")]
        arguments += ["--device", "cpu", "--quiet"]
        start = evaluate.run
    said = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [name, *arguments, *line]),
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(said),
        pytest.raises(SystemExit) as ended,
    ):
        start()
    return said.getvalue() + str(ended.value)


def test_the_command_line_shows_no_traceback(tmp_path: Path) -> None:
    """A process of its own shows nothing but the line."""
    mark = tmp_path / "ran"
    (tmp_path / "a.pt").write_bytes(FOREIGN["command"](mark))
    write_shards(tmp_path / "shards", 2)
    done = limited.run(
        "../python/evaluate.py", "--model", str(tmp_path / "a.pt"), "--data",
        str(tmp_path / "shards"), "--output", str(tmp_path / "out"),
    )  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"evaluate.py: error: checkpoint: {tmp_path / 'a.pt'}: expected weights")
    assert "posix.system" in last
    assert "torch.load(FILE, weights_only=False) and save its state_dict" in last
    assert "Traceback" not in done.stderr
    assert not mark.exists()


def test_what_timm_saves_is_read(tmp_path: Path) -> None:
    """Arguments of its run stand beside the weights; they are a plain Namespace."""
    state = small().state_dict()
    arguments = argparse.Namespace(model="resnet50", lr=0.1)
    torch.save({"state_dict": state, "args": arguments, "epoch": 3}, tmp_path / "best.pth.tar")
    model = small()
    networks.load_weights(model, tmp_path / "best.pth.tar")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])


@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "old"])
def test_other_forms_of_weights_are_read(tmp_path: Path, options: dict[str, Any]) -> None:
    """Forms as before: of PyTorch before 1.6, compressed archives, shared and expanded tensors."""
    state = small().state_dict()
    wide = torch.zeros(1).expand(3, 4)
    content = {"state_dict": state, "shared": [state, state], "wide": wide, "half": wide.half()}
    content |= {"complex": torch.zeros(2, dtype=torch.complex64), "bytes": bytearray(b"abc")}
    content |= {"sparse": torch.eye(3).to_sparse(), "parameter": nn.Parameter(torch.ones(2))}
    data = saved(content, **options)
    if not options:
        data = bombs.zip_of(bombs.unzipped(data), zipfile.ZIP_DEFLATED)
    (tmp_path / "a.pt").write_bytes(data)
    networks.load_weights(small(), tmp_path / "a.pt")
