"""Settings that decide on a forward pass: changed later, they are noticed, and at a low cost."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from row_networks import WIDTH, Layer
from small_networks import make_batch
from test_coupling import BATCH, SIZE, network_with
from torch import Tensor, nn

from harmonizer_ext import coupling


@pytest.fixture
def batch(generator: torch.Generator) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return make_batch(generator, BATCH, SIZE)


@dataclasses.dataclass
class Config:
    center: bool = False
    scale: float = 0.0


@dataclasses.dataclass(slots=True)
class SlottedConfig:
    center: bool = False


def centered(on: Callable[[Any], Any]) -> Callable[[Any, Tensor], Tensor]:
    """A forward pass that takes the mean of the batch off, as far as something says."""
    return lambda m, x: x - float(on(m)) * x.mean(0)


def replace(module: Any) -> None:
    module.forward = lambda x: x - x.mean(0)


def add_hook(module: Any) -> None:
    module.register_forward_hook(lambda m, args, out: out - out.mean(0))


def drop_statistics(module: Any) -> None:
    module.running_mean = module.running_var = None


def fill(module: Any) -> None:
    module.alpha.fill_(0.5)


class WithBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("alpha", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.alpha * x.mean(0)


def cell() -> tuple[nn.Module, Callable[[Any], None]]:
    state = {"on": False}
    return Layer(centered(lambda m: state["on"])), lambda module: state.update(on=True)


def layer(on: Callable[[Any], Any], **attributes: Any) -> Callable[[], nn.Module]:
    return lambda: Layer(centered(on), **attributes)


LATER: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Any]]] = {
    "real number": (layer(lambda m: m.a, a=0.0), lambda m: setattr(m, "a", 0.5)),
    "private flag": (layer(lambda m: m._on, _on=False), lambda m: setattr(m, "_on", True)),
    "private number": (layer(lambda m: m._n, _n=0), lambda m: setattr(m, "_n", 1)),
    "entry": (layer(lambda m: m.c["on"], c={"on": 0}), lambda m: m.c.update(on=1)),
    "new entry": (layer(lambda m: len(m.c), c={}), lambda m: m.c.update(on=1)),
    "deep entry": (
        layer(lambda m: m.c["a"][0]["on"], c={"a": [{"on": 0}]}),
        lambda m: m.c["a"][0].update(on=1),
    ),
    "entry beside a function": (
        layer(lambda m: m.c["on"], c={"on": 0, "f": torch.tanh}),
        lambda m: m.c.update(on=1),
    ),
    "namespace": (
        lambda: Layer(centered(lambda m: m.c.on), c=types.SimpleNamespace(on=False)),
        lambda m: setattr(m.c, "on", True),
    ),
    "dataclass": (
        lambda: Layer(centered(lambda m: m.c.scale), c=Config()),
        lambda m: setattr(m.c, "scale", 0.5),
    ),
    "dataclass with slots": (
        lambda: Layer(centered(lambda m: m.c.center), c=SlottedConfig()),
        lambda m: setattr(m.c, "center", True),
    ),
    "another dataclass": (
        lambda: Layer(centered(lambda m: m.c.center), c=Config()),
        lambda m: setattr(m, "c", Config(center=True)),
    ),
    "partial": (
        lambda: Layer(lambda m, x: m.f(x), f=functools.partial(centered(lambda a: a), 0.0)),
        lambda m: setattr(m, "f", functools.partial(centered(lambda a: a), 0.5)),
    ),
    "tensor": (layer(lambda m: m.t, t=torch.zeros(())), lambda m: m.t.fill_(0.5)),
    "array": (layer(lambda m: m.t[0], t=np.zeros(1)), lambda m: m.t.fill(0.5)),
    "buffer": (WithBuffer, fill),
    "hook": (nn.Identity, add_hook),
    "hook on a layer of PyTorch": (lambda: nn.GroupNorm(2, WIDTH), add_hook),
    "hook before": (
        nn.Identity,
        lambda m: m.register_forward_pre_hook(lambda m, args: (args[0] - args[0].mean(0),)),
    ),
    "forward pass": (nn.Identity, replace),
    "statistics": (lambda: nn.BatchNorm2d(WIDTH).eval(), drop_statistics),
    "class": (nn.Identity, lambda m: setattr(m, "__class__", Centered)),
}


class Centered(nn.Identity):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


@pytest.mark.parametrize("name", LATER)
def test_what_is_set_later_is_noticed(name: str, batch: dict[str, Tensor]) -> None:
    """At the next call, though it comes beside a number that is another one at every call."""
    make, change = LATER[name]
    model, part = network_with(nn.Identity()), make()
    model.function = part
    model.learning_rate = 0.0
    for step in range(8):  # the ninth of these numbers is worth no trial
        model.learning_rate = 0.1 * step
        assert coupling.of(model, batch["images"]).reason is None
    change(part)
    model.learning_rate = 0.8
    assert coupling.of(model, batch["images"]).reason is not None


SCHEDULED: dict[str, Callable[[Any, int], Any]] = {
    "real number": lambda m, n: setattr(m, "temperature", 0.1 * n),
    "private number": lambda m, n: setattr(m, "_step", n),
    "entry": lambda m, n: m.log.update(step=n),
    "list that grows": lambda m, n: m.log.setdefault("losses", []).append(0.1 * n),
    "buffer": lambda m, n: m.alpha.fill_(0),
    "tensor": lambda m, n: setattr(m, "latest", torch.zeros(())),
    "hook": lambda m, n: m.register_forward_hook(lambda m, args, out: None).remove(),
}


@pytest.mark.parametrize("name", SCHEDULED)
def test_what_others_keep_on_a_module_costs_little(name: str, batch: dict[str, Tensor]) -> None:
    """Few trials, and the rows are left out all the while."""
    tries = iter(range(10**6))

    class Tried(nn.Tanh):
        def forward(self, x: Tensor) -> Tensor:
            next(tries)
            return super().forward(x)

    model = network_with(Tried())
    model.log, model._step = {}, 0
    model.register_buffer("alpha", torch.zeros(()))
    tried = 0
    independent = []
    for step in range(16):
        SCHEDULED[name](model, step)
        before = next(tries)
        independent.append(coupling.of(model, batch["images"]).reason is None)
        tried += next(tries) > before + 1
    assert tried <= 5
    assert all(independent) or (name == "list that grows" and independent.count(True) >= 5)
