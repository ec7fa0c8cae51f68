"""Runs as people start them: killed and resumed, told to stop, in one process and in two."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import timm_networks
import torch
from tiny_training import command, environment, run, values, weights
from training.processes import SAME_REQUEST, StopRequest, World

pytestmark = pytest.mark.skipif(
    timm_networks.why_no_timm() is not None, reason=timm_networks.why_no_timm() or ""
)


def long_run(digits: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Six epochs of four updates, with augmentation, Mixup and an average of the weights."""
    fields = {"epochs": 6, "batch_size": 24, "no_aug": False, "mixup": 0.2, "rotation": 10.0}
    fields |= {"model_ema": True, "model_ema_decay": 0.9, "checkpoint_interval": 1}
    return values(
        digits, output, **fields | {"val_interval": 3, "opt": "momentum", "lr": 0.02} | changes
    )


def assert_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Compares to the bit."""
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def interrupt(line: list[str], output: Path, number: signal.Signals) -> tuple[int, str]:
    """Starts a run, and sends it a signal in the middle of an epoch."""
    process = subprocess.Popen(
        line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    # One of the rehearsal, then one an update or two. Looked at, not loaded: a run does not wait.
    checkpoints: set[int] = set()
    deadline = time.monotonic() + 120
    while len(checkpoints) < 4 and process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            checkpoints.add((output / "last.pt").stat().st_mtime_ns)
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()[0]
    # torchrun puts its processes into sessions of their own: they would outlive it.
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    for child in children if number == signal.SIGKILL else ():
        child.send_signal(number)
    text, _ = process.communicate(timeout=120)
    return process.returncode, text


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"workers": 1}, id="one"),
        pytest.param({"processes": 2}, id="two"),
        # Dropped paths are drawn from each process's own random numbers.
        pytest.param(
            {"processes": 2, "fsdp": True, "model": "vit_tiny_patch16_224", "img_size": 32}
            | {"drop_path": 0.1, "epochs": 3},
            id="two-sharded",
        ),
    ],
)
def test_killed_and_resumed_to_the_bit(digits: Path, tmp_path: Path, changes: dict[str, Any]):
    """kill -9 in the middle of an epoch: the same weights as without."""
    processes = changes.pop("processes", 1)
    changes["batch_size"] = 24 // processes
    whole = run(long_run(digits, tmp_path / "whole", **changes), processes)
    assert whole.returncode == 0, whole.stderr

    fields = long_run(digits, tmp_path / "killed", **changes)
    line = command(fields, processes)
    code, text = interrupt(line, tmp_path / "killed", signal.SIGKILL)
    assert code == -signal.SIGKILL, text
    stopped = torch.load(tmp_path / "killed/last.pt", weights_only=True)["progress"]
    assert 2 <= stopped["update"] < 4 * fields["epochs"]
    resumed = run(fields, processes)
    assert resumed.returncode == 0, resumed.stderr

    a, b = (torch.load(tmp_path / n / "last.pt", weights_only=True) for n in ("whole", "killed"))
    assert_equal(a["model"], b["model"])
    assert_equal(a["ema"], b["ema"])
    for one, other in zip(a["progress"]["history"], b["progress"]["history"], strict=True):
        timed = ("seconds", "images_per_second")
        for key in one:
            # The log's sums pass through float64 where a run is resumed.
            if key not in timed:
                assert one[key] == pytest.approx(other[key], rel=1e-6), key


@pytest.mark.parametrize("processes", [1, 2])
def test_told_to_stop_saves_and_exits(digits: Path, tmp_path: Path, processes: int):
    """SIGTERM to one process, or to torchrun, which passes it on to each when it likes."""
    changes = {"batch_size": 24 // processes, "checkpoint_interval": 2, "quiet": False}
    fields = long_run(digits, tmp_path, **changes)
    code, text = interrupt(command(fields, processes), tmp_path, signal.SIGTERM)
    assert code == (128 + signal.SIGTERM if processes == 1 else 1), text
    assert "stopped by SIGTERM; the same command goes on" in text
    stopped = torch.load(tmp_path / "last.pt", weights_only=True)["progress"]
    assert 2 <= stopped["update"] < 24
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["stopped_by"] == signal.SIGTERM


def test_told_twice_at_once_is_told_once(monkeypatch: pytest.MonkeyPatch):
    """A batch system tells torchrun and its processes, and torchrun tells them again."""
    alone = World(0, 1, torch.device("cpu"))
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with StopRequest(alone) as stop:
        assert stop.after_update() == 0
        signal.raise_signal(signal.SIGINT)
        now += 1
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.after_update() == signal.SIGINT
        now += SAME_REQUEST
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_two_processes_are_one_with_the_same_global_batch(digits: Path, tmp_path: Path):
    """The batch may be held in two parts; none of the network's layers couples rows."""
    common = {"epochs": 3, "opt": "momentum", "lr": 0.02, "no_aug": False}
    ways = {"one": (48, 1, 1), "two": (24, 1, 2), "parts": (24, 2, 1)}
    for name, (batch_size, parts, processes) in ways.items():
        fields = values(
            digits, tmp_path / name, **common, batch_size=batch_size, grad_accum_steps=parts
        )
        done = run(fields, processes)
        assert done.returncode == 0, done.stderr
    one = weights(tmp_path / "one")
    start = torch.load(tmp_path / "one/last.pt", weights_only=True)
    assert start["progress"]["update"] == 6
    for name in ("two", "parts"):
        other = weights(tmp_path / name)
        for key, tensor in one.items():
            # Sums of 48 float32 terms in another order, over six updates.
            torch.testing.assert_close(other[key], tensor, rtol=1e-4, atol=2e-6)


def test_sharded_weights_train_the_same_network(digits: Path, tmp_path: Path):
    """FSDP2 on two processes, saved and resumed, against DDP."""
    common = {"epochs": 2, "batch_size": 24, "opt": "momentum", "lr": 0.02, "model_ema": True}
    vit = {"model": "vit_tiny_patch16_224", "img_size": 32, "val_interval": 2, "panel_images": 2}
    vit |= {"channels_last": True}
    for name, fsdp in (("copied", False), ("sharded", True)):
        done = run(values(digits, tmp_path / name, **common, **vit, fsdp=fsdp), 2)
        assert done.returncode == 0, done.stderr
    a, b = (torch.load(tmp_path / n / "last.pt", weights_only=True) for n in ("copied", "sharded"))
    for kind in ("model", "ema"):
        assert a[kind].keys() == b[kind].keys()
        for key, tensor in a[kind].items():
            torch.testing.assert_close(b[kind][key], tensor, rtol=1e-3, atol=1e-5)
