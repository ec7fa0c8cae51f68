"""Checkpoints: all that a run needs to go on as if it had never stopped."""

from __future__ import annotations

import dataclasses
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from harmonizer_ext.files.output import replacing
from harmonizer_ext.files.reading import UnreadableError, reading
from harmonizer_ext.files.text import shown
from harmonizer_ext.files.weights import read_weights
from training import config as configuration
from training.config import Config, expect
from training.ema import WeightAverage
from training.networks import InputForm, create
from training.processes import World

VERSION = 1
#: The whole state on the first process, whatever shards it.
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
#: Bytes of a checkpoint that are copied at a time.
_PIECE = 2**24
#: What a checkpoint has for its network, and for its run; "optimizer" and "ema" not all have.
_NETWORK = {"config": dict, "input": dict, "model": dict}
_RUN = _NETWORK | {"images_per_update": int, "sources": tuple, "progress": dict, "random": list}


@dataclasses.dataclass
class Progress:
    """Where a run is; a checkpoint holds it beside weights and optimizer.

    Attributes:
        epoch, batch: epochs done, and updates done in the one that runs.
        update: updates done in all.
        sums: of the logged terms over this epoch's updates.
        seconds: spent in training, this epoch and all.
        history: what each epoch logged.
        measures: what the last evaluation gave, by the name of the set.
        best: best value so far of each measure that a checkpoint is kept for.
    """

    epoch: int = 0
    batch: int = 0
    update: int = 0
    sums: list[float] = dataclasses.field(default_factory=list)
    epoch_seconds: float = 0.0
    seconds: float = 0.0
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    measures: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    best: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Run:
    """What a checkpoint is taken of and put back into.

    Attributes:
        sources: numbers of images with human maps and without, which decide the order of all.
    """

    config: Config
    world: World
    form: InputForm
    images_per_update: int
    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    progress: Progress = dataclasses.field(default_factory=Progress)
    sources: tuple[int, int] = (0, 0)

    def state(self) -> dict[str, Any]:
        """All of it, on the CPU. Every process must ask; the first gets the whole."""
        state: dict[str, Any] = {"version": VERSION, "config": dataclasses.asdict(self.config)}
        state |= {"input": self.form._asdict(), "images_per_update": self.images_per_update}
        state["sources"] = self.sources
        state["progress"] = dataclasses.asdict(self.progress)
        state["random"] = self.world.gather(_random_state(self.world.device))
        state["model"] = get_model_state_dict(self.model, options=_WHOLE)
        # Asked before the first update, PyTorch makes one with gradients of zero.
        if self.progress.update:
            state["optimizer"] = self._optimizer_state()
        if self.average is not None:
            with self.average.swapped_in():
                averaged = get_model_state_dict(self.model, options=_WHOLE)
                # On a CPU they are the network's own tensors, which swap back.
                state["ema"] = {name: tensor.clone() for name, tensor in averaged.items()}
        return state

    def _optimizer_state(self) -> dict[str, Any]:
        if self.config.fsdp:
            return get_optimizer_state_dict(self.model, self.optimizer, options=_WHOLE)
        # The same form, by the optimizer's own means: some hold more than PyTorch's knows of.
        names, state = self._optimized(), self.optimizer.state_dict()
        groups = [group | {"params": [names[i] for i in group["params"]]}
                  for group in state["param_groups"]]  # fmt: skip
        return {"state": {names[i]: v for i, v in state["state"].items()}, "param_groups": groups}

    def _set_optimizer_state(self, state: dict[str, Any]) -> None:
        if self.config.fsdp:
            set_optimizer_state_dict(self.model, self.optimizer, state, options=_WHOLE)
            return
        numbers = {name: number for number, name in enumerate(self._optimized())}
        groups = [group | {"params": [numbers[name] for name in group["params"]]}
                  for group in state["param_groups"]]  # fmt: skip
        values = {numbers[name]: value for name, value in state["state"].items()}
        self.optimizer.load_state_dict({"state": values, "param_groups": groups})

    def _optimized(self) -> list[str]:
        """Names of the optimizer's parameters, in its order."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return [names[p] for group in self.optimizer.param_groups for p in group["params"]]

    def save(self, *others: str) -> None:
        """Writes ``OUTPUT/last.pt``, whole or not at all, and before it ``<other>.pt`` alike.

        What ``last.pt`` says of the others is true: a run that is killed between the two goes on
        from before either.

        Raises:
            FloatingPointError: a weight is not finite; nothing is written.
        """
        state = self.state()
        self._check_finite(state["model"])
        if self.world.main:
            *paths, last = (Path(self.config.output) / f"{n}.pt" for n in (*others, "last"))
            if paths:
                write(state, paths[0])
                for path in (*paths[1:], last):
                    with paths[0].open("rb") as written, replacing(path) as file:
                        shutil.copyfileobj(written, file, _PIECE)
            else:
                write(state, last)
        self.world.wait()

    def _check_finite(self, weights: dict[str, torch.Tensor]) -> None:
        # Under FSDP2 the first process alone has them.
        broken = [n for n, w in weights.items() if w.is_floating_point() and not w.isfinite().all()]
        if self.world.total(torch.tensor(len(broken), device="cpu")):
            raise FloatingPointError(
                f"weights: expected finite values after update {self.progress.update}, got "
                f"{', '.join(broken[:3]) or 'others'}; lower --lr or set --clip-grad. "
                f"{self.config.output}/last.pt is from before"
            )

    def load(self, path: Path) -> None:
        """Goes on from a checkpoint.

        Raises:
            ValueError: it is of a run with another configuration, of another kind of file, or
                damaged.
        """
        content = read(path, _RUN)
        old = configuration.from_dict(content["config"])
        changed = configuration.differences(old, self.config)
        if content["images_per_update"] != self.images_per_update:
            changed.append(
                f"images of an update: {content['images_per_update']} -> {self.images_per_update}"
            )
        if content["sources"] != self.sources:
            changed.append(
                f"images with and without a human map: {content['sources']} -> {self.sources}"
            )
        expect(
            not changed,
            f"resume: {shown(path)} is of a run with another configuration, and its result would "
            f"be of neither ({'; '.join(changed)}). Give the same values, or another --output; "
            f"--initial-checkpoint starts a new run from its weights",
        )
        with reading(f"resume: {shown(path)}", "a checkpoint of this run"):
            self._take(content)

    def _take(self, content: dict[str, Any]) -> None:
        if self.average is not None:
            set_model_state_dict(self.model, content["ema"], options=_WHOLE)
            self.average.take()
        set_model_state_dict(self.model, content["model"], options=_WHOLE)
        if "optimizer" in content:
            self._set_optimizer_state(content["optimizer"])
        self.progress = Progress(**content["progress"])
        if self.world.rank < len(content["random"]):
            _set_random_state(content["random"][self.world.rank], self.world.device)


def read(path: str | Path, fields: dict[str, type] = _NETWORK) -> dict[str, Any]:
    """The content of a checkpoint of train.py, on the CPU.

    Args:
        path: of the checkpoint.
        fields: that it must have, and of what type.

    Raises:
        FileNotFoundError, ValueError: there is none, it is another kind of file, or it is damaged.
    """
    found = Path(path).is_file()
    expect(found, f"checkpoint: expected a file, got {shown(path)}", FileNotFoundError)
    content = read_weights(path, "checkpoint")
    ours = isinstance(content, dict) and content.get("version") == VERSION
    expect(ours, f"checkpoint: {shown(path)} is none of train.py's, version {VERSION}")
    wrong = [key for key, kind in fields.items() if not isinstance(content.get(key), kind)]
    if wrong:
        raise UnreadableError(
            f"checkpoint: {shown(path)} is damaged, expected {', '.join(wrong)} in it as train.py "
            "writes them; take another checkpoint"
        )
    return content


def load_network(path: str | Path) -> tuple[nn.Module, InputForm, Config]:
    """The network of a checkpoint in eval mode on the CPU, what it takes, its configuration.

    Its averaged weights, where it has them.
    """
    content = read(path)
    config = configuration.from_dict(content["config"])
    bare = dataclasses.replace(config, pretrained=False, initial_checkpoint=None)
    weights = content.get("ema", content["model"])
    with reading(f"checkpoint: {shown(path)}", "the network that its configuration says"):
        # Before a network of that size is made.
        heads = {len(weight) for weight in weights.values() if weight.dim()}
        if config.num_classes not in heads:
            raise UnreadableError(
                f"checkpoint: {shown(path)} is damaged, expected weights of {config.num_classes} "
                "classes in it, as its configuration says"
            )
        model, _ = create(bare)
        model.load_state_dict(weights)
        values = content["input"].items()
        form = InputForm(**{k: tuple(v) if isinstance(v, list | tuple) else v for k, v in values})
    return model.eval(), form, config


def write(state: dict[str, Any], path: Path) -> None:
    """``torch.save`` after which there is the old file or the new one, never half of one."""
    with replacing(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # PyTorch complains that its file is too short; behind it is what the disk said.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def _random_state(device: torch.device) -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
