"""The state of a network, wherever it is kept: a trial sees it, and leaves it as it was."""

from __future__ import annotations

import array
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_networks import Through, make_batch
from torch import Tensor, nn

import harmonizer_ext as hx
from harmonizer_ext import coupling, state

BATCH, SIZE = 6, 8


@pytest.fixture
def batch(generator: torch.Generator) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return make_batch(generator, BATCH, SIZE) | {"tokens": torch.tensor([0.0, 1, 0, 1, 0, 0])}


@dataclasses.dataclass(slots=True)
class Slotted:
    calls: int = 0


class InSlots(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kept = Slotted()

    def forward(self, x: Tensor) -> Tensor:
        self.kept.calls += 1
        return x

    def calls(self) -> int:
        return self.kept.calls


class InArray(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kept = array.array("d", [0.0])

    def forward(self, x: Tensor) -> Tensor:
        self.kept[0] += 1
        return x

    def calls(self) -> int:
        return int(self.kept[0])


class InBytes(InArray):
    def __init__(self) -> None:
        super().__init__()
        self.kept = bytearray(1)


class OnTheClass(nn.Module):
    number = 0

    def __init__(self) -> None:
        super().__init__()
        OnTheClass.number = 0

    def forward(self, x: Tensor) -> Tensor:
        OnTheClass.number += 1
        return x

    def calls(self) -> int:
        return OnTheClass.number


class OnAnAncestor(OnTheClass):
    pass


STATISTICS: dict[str, int] = {}
NUMBER = 0


class InAGlobalDictionary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        STATISTICS["calls"] = 0

    def forward(self, x: Tensor) -> Tensor:
        STATISTICS["calls"] += 1
        return x

    def calls(self) -> int:
        return STATISTICS["calls"]


class InAGlobalNumber(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        global NUMBER
        NUMBER = 0

    def forward(self, x: Tensor) -> Tensor:
        global NUMBER
        NUMBER += 1
        return x

    def calls(self) -> int:
        return NUMBER


class InALargeBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(64))

    def forward(self, x: Tensor) -> Tensor:
        self.kept[0] += 1
        return x

    def calls(self) -> int:
        return int(self.kept[0])


KEPT: list[Callable[[], Any]] = [
    InSlots, InArray, InBytes, OnTheClass, OnAnAncestor, InAGlobalDictionary, InAGlobalNumber,
    InALargeBuffer,
]  # fmt: skip


@pytest.mark.parametrize("make", KEPT)
def test_state_is_found_and_put_back(
    make: Callable[[], Any], batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "_MOST_ELEMENTS", 63)
    model = Through(make())
    found = coupling.of(model, batch["images"])
    assert model.function.calls() == 0
    assert found.reason is not None
    assert "every forward pass changes function." in found.reason
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(1, 4):
            assert hx.harmonizer_loss(model, **batch).saliency.shape[0] == BATCH
            assert model.function.calls() == step


class Watching:
    """A hook that looks on, and remembers how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self.calls += 1


def test_hooks_remember_no_trial(batch: dict[str, Tensor]) -> None:
    """And what they remember is no state of the network: the rows without a map are left out."""
    model, hook = Through(nn.Tanh()), Watching()
    model.function.register_forward_hook(hook)
    assert coupling.of(model, batch["images"]).reason is None
    assert hook.calls == 0
    assert hx.harmonizer_loss(model, **batch).saliency.shape[0] == 2
    assert hook.calls == 2


def test_a_large_buffer_that_does_not_fit_is_seen(
    batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "_MOST_ELEMENTS", 63)
    monkeypatch.setattr(state, "_free_bytes", lambda device: 0)
    found = coupling.of(Through(InALargeBuffer()), batch["images"])
    assert found.reason == "every forward pass changes function.kept"
