"""What a run tells: a live progress display, summary.csv, TensorBoard, Weights & Biases."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import types
import typing
from pathlib import Path
from typing import Any

from tqdm import tqdm

from harmonizer_ext.files.output import make_folder, write_rows, write_text
from harmonizer_ext.files.text import shown
from training.config import Config, expect
from training.processes import World

if typing.TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter


class Logbook:
    """Writes on the first process; on the others every method does nothing."""

    def __init__(self, config: Config, world: World, updates: int, done: int) -> None:
        """Opens everything, so that what cannot be opened is known before the first step.

        Args:
            updates: of the whole run.
            done: of them, before this start.

        Raises:
            ImportError: TensorBoard is not installed, or Weights & Biases, if it is wanted.
            ValueError: Weights & Biases has no key.
        """
        self._output = Path(config.output)
        self._silent = config.quiet or not world.main
        self._board: SummaryWriter | None = None
        self._wandb: Any = None
        self._bar = tqdm(
            total=updates,
            initial=done,
            unit="update",
            desc=shown(self._output.name),
            disable=self._silent,
            dynamic_ncols=True,
        )
        if not world.main:
            return
        text = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
        write_text(self._output / "config.json", text)
        # What a run that was killed had written beyond its last checkpoint is taken back.
        folder = make_folder(self._output / "tensorboard", below=self._output)
        self._board = _board(folder.resolve(), purge_step=done)
        if config.log_wandb:
            self._wandb = _start_wandb(config)

    def update(self, step: int, values: dict[str, float] | None) -> None:
        """One more update is done; ``values`` of the log, at times."""
        self._bar.update()
        if values is None:
            return
        keys = ("loss", "images_per_second", "saliency_std")
        self._bar.set_postfix_str("  ".join(f"{k} {values[k]:.4g}" for k in keys), refresh=False)
        self._write("train", values, step)

    def epoch(
        self, step: int, row: dict[str, Any], history: list[dict[str, Any]], told: bool
    ) -> None:
        """An epoch is done: ``row`` is its line of the summary, the last of ``history``."""
        if told and not self._silent:
            tqdm.write("  ".join(f"{shown(k)} {v:.4g}" for k, v in row.items()))
        self._write("epoch", row, step)
        if self._board is None:
            return
        head = list(dict.fromkeys(key for line in history for key in line))
        rows = [[line.get(key, "") for key in head] for line in history]
        write_rows(self._output / "summary.csv", [head, *rows])

    def picture(self, step: int, name: str, figure: Figure) -> None:
        """A panel."""
        if self._board is not None:
            self._board.add_figure(shown(name), figure, step)
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(figure)}, step=step)

    def note(self, text: str) -> None:
        """A line for people."""
        if not self._silent:
            tqdm.write(text)

    def close(self) -> None:
        self._bar.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _write(self, group: str, values: dict[str, Any], step: int) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{group}/{shown(name)}", value, step)
        if self._wandb is not None:
            self._wandb.log({f"{group}/{k}": v for k, v in values.items()}, step=step)


def _board(directory: Path, purge_step: int) -> SummaryWriter:
    # TensorBoard loads TensorFlow where it is installed, to write to other places than a directory:
    # three seconds and a page of messages. This module's presence tells it not to.
    sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(f"tensorboard: {error}; pip install harmonizer-ext[train]") from error
    return SummaryWriter(str(directory), purge_step=purge_step)


def _start_wandb(config: Config) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ImportError(
            "log_wandb: Weights & Biases is not installed; pip install wandb"
        ) from error
    offline = os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")
    expect(
        offline or "WANDB_API_KEY" in os.environ,
        "log_wandb: expected the environment variable WANDB_API_KEY, or WANDB_MODE=offline",
    )
    return wandb.init(
        project=config.wandb_project,
        name=Path(config.output).name,
        dir=config.output,
        config=dataclasses.asdict(config),
        resume="allow",
        id=Path(config.output).resolve().as_posix().strip("/").replace("/", "-")[-64:],
    )
