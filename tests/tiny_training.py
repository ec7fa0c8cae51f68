"""A training run of seconds: the miniature of the demo's data, the small network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PROGRAM = Path(__file__).parent.parent / "python" / "train.py"


def values(digits: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Fields of the configuration; 96 images are two updates of 48."""
    fields: dict[str, Any] = {
        "clickme": (str(digits / "clickme/train"),),
        "clickme_val": (f"test={digits / 'clickme/test'}",),
        "data_dir": str(digits / "images"),
        "class_map": str(digits / "classes.txt"),
        "val_split": "",
        "mapped_share": 0.5,
        "num_classes": 10,
        "no_aug": True,
        "workers": 0,
        "model": "small",
        "img_size": 64,
        "batch_size": 48,
        "epochs": 1,
        "warmup_epochs": 0,
        "lr": 2e-3,
        "weight_decay": 1e-4,
        "device": "cpu",
        "quiet": True,
        "panel_images": 0,
        "output": str(output),
    }
    return fields | changes


def command(fields: dict[str, Any], processes: int = 1) -> list[str]:
    """The command line of a run, under torchrun for several processes."""
    line = [sys.executable, str(PROGRAM)]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        line = [
            sys.executable,
            *torchrun,
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            "localhost:0",
        ]
        line.append(str(PROGRAM))
    for name, value in fields.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            line.append(flag)
        elif value is not False and value is not None:
            line += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return line


def environment() -> dict[str, str]:
    """One thread a process: sums in one order, and processes that share two cores."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def run(fields: dict[str, Any], processes: int = 1) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(fields, processes),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def weights(output: str | Path) -> dict[str, Tensor]:
    """The weights of a run's last checkpoint, as stored."""
    content = torch.load(Path(output) / "last.pt", weights_only=True)
    return content["model"]
