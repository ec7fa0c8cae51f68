"""What is remembered of calls: when values change, it is examined again, and ever less often."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from small_networks import Counting, Transformer, make_batch
from torch import Tensor, nn

import harmonizer_ext as hx
from harmonizer_ext import network
from harmonizer_ext.fingerprint import Fingerprint, Memory

BATCH, SIZE = 6, 8
#: The calls at which a value that is another one at every call is examined.
EXAMINED = [1, 2, 4, 8, 16]


@pytest.fixture
def batch(generator: torch.Generator) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return make_batch(generator, BATCH, SIZE) | {"tokens": torch.tensor([0.0, 1, 0, 1, 0, 0])}


def examined(memory: Memory[bool], calls: Iterator[Fingerprint]) -> list[int]:
    """The numbers of the calls, from 1, at which something is to be examined; and it is."""
    found = []
    for number, call in enumerate(calls, 1):
        if memory.recall(call) is None:
            found.append(number)
            memory.put(call, True)
    return found


def function_of(*values: Any) -> Callable[[], Any]:
    return lambda: values


CHANGING: dict[str, Callable[[int], Any]] = {
    "number": lambda n: function_of(n),
    "real number": lambda n: function_of(0.1 * n),
    "word": lambda n: function_of(f"phase {n}"),
    "tensor": lambda n: function_of(torch.full((2,), n)),
    "list that grows": lambda n: function_of([0.5] * n),
    "dictionary": lambda n: function_of({"step": n}),
    "object": lambda n: function_of(types.SimpleNamespace(step=n)),
}


@pytest.mark.parametrize("name", CHANGING)
def test_what_changes_with_every_call_is_examined_ever_less_often(name: str) -> None:
    calls = (Fingerprint(CHANGING[name](n)) for n in range(16))
    assert examined(Memory(), calls) == EXAMINED


def test_what_changes_for_the_first_time_is_examined_at_once() -> None:
    """A switch that is turned beside a counter, just before and long after the counter is known."""
    for turned in (3, 11):
        calls = (Fingerprint(function_of(n, n >= turned)) for n in range(1, 17))
        assert examined(Memory(), calls) == sorted({*EXAMINED, turned})


def test_what_changes_and_stays_is_examined_while_it_stays() -> None:
    """The number of an epoch: each is examined in its course, all of them in less than a tenth."""
    epochs, steps = 20, 100
    calls = (Fingerprint(function_of(n // steps)) for n in range(epochs * steps))
    found = examined(Memory(), calls)
    assert {(n - 1) // steps for n in found} == set(range(epochs))
    assert len(found) <= 2 * epochs


def test_values_that_come_again_are_known() -> None:
    calls = (Fingerprint(function_of(n % 3)) for n in range(30))
    assert len(examined(Memory(), calls)) <= 4


def test_other_weights_and_modules_are_another_kind() -> None:
    layers = [nn.Linear(2, 2) for _ in range(5)]
    assert len(examined(Memory(), (Fingerprint(function_of(m)) for m in layers))) == 5
    weights = [nn.Parameter(torch.zeros(2)) for _ in range(5)]
    assert len(examined(Memory(), (Fingerprint(function_of(w)) for w in weights))) == 5
    modes = (Fingerprint(layers[0].train(n % 2 == 0)) for n in range(6))
    assert examined(Memory(), modes) == [1, 2]


def test_an_examination_that_failed_is_owed() -> None:
    memory: Memory[bool] = Memory()
    first = Fingerprint(function_of(1))
    assert memory.recall(first) is None
    memory.put(first, True)
    for value in (2, 2, 2, 3, 4, 4):  # it raised an error every time
        assert memory.recall(Fingerprint(function_of(value))) is None


def test_nothing_is_kept_alive() -> None:
    memory: Memory[bool] = Memory()
    layer, tensor = nn.Linear(2, 2), torch.zeros(2)
    assert examined(memory, iter([Fingerprint(function_of(layer, tensor))])) == [1]
    gone = [False, False]
    for number, thing in enumerate((layer, tensor)):
        weakref.finalize(thing, gone.__setitem__, number, True)
    del layer, tensor, thing
    assert gone == [True, True]


# --- what it is worth to a step -------------------------------------------------------------------


def passes_of(step: Callable[[int], Any], calls: int = 16) -> list[int]:
    found = []
    for number in range(calls):
        Counting.passes()
        step(number)
        found.append(Counting.passes())
    return found


MODELS: dict[str, Callable[[Any, int], Callable[..., Any]]] = {
    "schedule": lambda net, n: lambda x: net(x) / (1 + 0.1 * n),
    "schedule in a cell": lambda net, n: (lambda t: lambda x: net(x) / t)(1 + 0.1 * n),
    "default": lambda net, n: lambda x, t=1 + 0.1 * n: net(x) / t,
    "tensor": lambda net, n: (lambda t: lambda x: net(x) / t)(torch.tensor(1 + 0.1 * n)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_schedule_in_a_callable_costs_little(name: str, batch: dict[str, Tensor]) -> None:
    net, rows = Counting(), []

    def step(n: int) -> None:
        rows.append(hx.harmonizer_loss(MODELS[name](net, n), **batch).saliency.shape[0])

    passes = passes_of(step)
    assert [n for n, p in enumerate(passes, 1) if p > 2] == EXAMINED
    assert set(rows) == {2}


class Explanation:
    """The input gradient with something that changes: a count of its own, or what others set."""

    def __init__(self) -> None:
        self.calls, self.weight = 0, 1.0

    def __call__(self, model: Any, images: Tensor, targets: Any, *, create_graph: bool) -> Any:
        self.calls += 1
        logits, maps = hx.input_gradient(model, images, targets, create_graph=create_graph)
        return logits, maps * self.weight


def test_a_counter_and_a_schedule_in_an_explanation_cost_little(batch: dict[str, Tensor]) -> None:
    net, explain = Counting(), Explanation()

    def step(n: int) -> None:
        explain.weight = 1 + 0.1 * n
        hx.harmonizer_loss(net, **batch, explain=explain)

    passes = passes_of(step)
    assert [n for n, p in enumerate(passes, 1) if p > 2] == EXAMINED
    assert explain.calls >= 16  # a look at it puts back what it counted


def test_a_number_that_chooses_a_network(batch: dict[str, Tensor]) -> None:
    """Each has the penalty of its own weights and its own checks, however many there are."""
    nets = [Transformer() for _ in range(5)]
    for number in (0, 1, 2, 3, 4, 2, 0):
        model = (lambda n: lambda x: nets[n](x))(number)
        out = hx.harmonizer_loss(model, **batch)
        torch.testing.assert_close(out.weight_penalty, hx.weight_penalty(nets[number]).detach())
        assert network.behind(model).roots == (nets[number],)
    parts = nn.ModuleList(nets)
    for number in (0, 1, 2, 3, 4):
        out = hx.harmonizer_loss((lambda n: lambda x: parts[n](x))(number), **batch)
        torch.testing.assert_close(out.weight_penalty, hx.weight_penalty(nets[number]).detach())
