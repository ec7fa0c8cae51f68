"""A network may come as any callable: what holds for the module holds for what calls it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_networks import CLASSES, Counting, Through, Transformer, make_batch
from torch import Tensor, nn

import harmonizer_ext as hx
from harmonizer_ext import network

BATCH, SIZE = 6, 8


@pytest.fixture
def batch(generator: torch.Generator) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return make_batch(generator, BATCH, SIZE) | {"tokens": torch.tensor([0.0, 1, 0, 1, 0, 0])}


class Positioned(nn.Module):
    """A parameter of its own, a part that is not used, and names that the penalty goes by."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 4, 3)
        self.position = nn.Parameter(torch.randn(4, 6, 6) / 10)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4)])
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(4, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norms[0](self.patch_embed(x)) + self.position)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


GLOBAL: dict[str, nn.Module] = {}
MODULE: nn.Module = nn.Identity()


def of_the_global(x: Tensor) -> Tensor:
    return MODULE(x)


def through_another(x: Tensor) -> Tensor:
    return of_the_global(x)


class Holder:
    def __init__(self, net: nn.Module) -> None:
        self.parts = {"net": [net]}

    def __call__(self, x: Tensor) -> Tensor:
        return self.parts["net"][0](x)

    def method(self, x: Tensor) -> Tensor:
        return self(x)


class Slotted:
    __slots__ = ("net",)

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def __call__(self, x: Tensor) -> Tensor:
        return self.net(x)


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any) -> Any:
        return function(*args)

    return run


def by_a_global(net: nn.Module) -> Callable[..., Any]:
    global MODULE
    MODULE = net
    return through_another


def by_a_dictionary(net: nn.Module) -> Callable[..., Any]:
    GLOBAL["net"] = net
    return lambda x: GLOBAL["net"](x)


CALLABLES: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "lambda": lambda net: lambda x: net(x),
    "partial": lambda net: functools.partial(net),
    "partial of a function": lambda net: functools.partial(lambda n, x: n(x), net),
    "keyword of a partial": lambda net: functools.partial(lambda x, n: n(x), n=net),
    "forward": lambda net: net.forward,
    "in pieces": lambda net: lambda x: net.head(net.features(x).mean((2, 3))),
    "callable object": Holder,
    "method": lambda net: Holder(net).method,
    "slots": Slotted,
    "closure of a list": lambda net: (lambda parts: lambda x: parts[0]["n"](x))([{"n": net}]),
    "default": lambda net: lambda x, n=net: n(x),
    "decorated": lambda net: decorated(lambda x: net(x)),
    "global": by_a_global,
    "global dictionary": by_a_dictionary,
    "functional": lambda net: (
        lambda x: torch.func.functional_call(net, dict(net.named_parameters()), (x,))
    ),
}


def result_of(model: Any, net: nn.Module, batch: dict[str, Tensor], **options: Any) -> list[Tensor]:
    net.zero_grad()
    options = {"lambda_harmonization": 3.0, "lambda_weights": 0.1} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = hx.harmonizer_loss(model, **batch, **options)
    out.loss.backward()
    gradients = [torch.zeros(()) if p.grad is None else p.grad for p in net.parameters()]
    return [out.loss.detach(), out.weight_penalty, *gradients, *(b.clone() for b in net.buffers())]


def fresh() -> Positioned:
    torch.manual_seed(0)
    return Positioned()


@pytest.mark.parametrize("name", CALLABLES)
def test_a_callable_is_the_network_behind_it(name: str, batch: dict[str, Tensor]) -> None:
    """Loss, penalty, gradients and running statistics, to the bit; and BatchNorm couples rows."""
    net = fresh()
    want = result_of(net, net, batch)
    net = fresh()
    model = CALLABLES[name](net)
    got = result_of(model, net, batch)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert network.behind(model).roots == (net,)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert hx.harmonizer_loss(model, **batch).saliency.shape[0] == BATCH
    assert not caught  # it was told the first time
    net.eval()
    assert hx.harmonizer_loss(model, **batch).saliency.shape[0] == 2


@pytest.mark.parametrize("name", ["lambda", "forward", "partial", "callable object"])
def test_modules_behind_a_callable_are_checked(name: str, batch: dict[str, Tensor]) -> None:
    net = fresh()
    net.norms[0] = nn.Hardsigmoid()
    with pytest.raises(hx.SecondDerivativeError, match="make_twice_differentiable"):
        result_of(CALLABLES[name](net), net, batch)
    net = fresh()
    net.head = torch.compile(net.head, backend="eager")
    with pytest.raises(hx.SecondDerivativeError, match=r"^model\.head: .*not compiled by itself"):
        result_of(CALLABLES[name](net), net, batch)


def test_compiled_functions_are_refused_by_name(batch: dict[str, Tensor]) -> None:
    net = fresh()
    compiled = torch.compile(lambda x: net(x), backend="eager")
    with pytest.raises(hx.SecondDerivativeError, match=r"HarmonizerLoss\(model, compile=True\)"):
        result_of(compiled, net, batch)


@pytest.mark.parametrize("mixed", [False, True])
def test_several_networks_behind_one_callable(mixed: bool, batch: dict[str, Tensor]) -> None:
    """An ensemble in a closure; one of them may be unused, and then has no part in the penalty."""
    nets = [Transformer(), Through(nn.GroupNorm(2, 4)), Through(nn.Tanh())]

    def model(x: Tensor) -> Tensor:
        return nets[0](x) + (nets[1](x) if mixed else 0)

    out = hx.harmonizer_loss(model, **batch, gradient_norms=True)
    want = sum(hx.weight_penalty(net) for net in nets[: 1 + mixed])
    torch.testing.assert_close(out.weight_penalty, want.detach())
    assert out.gradient_norms is not None
    assert out.gradient_norms["harmonization"] > 0
    assert out.saliency.shape[0] == 2


def test_the_student_alone_is_penalized(batch: dict[str, Tensor]) -> None:
    both = nn.ModuleDict({"student": Transformer(), "teacher": Transformer()})
    out = hx.harmonizer_loss(lambda x: both["student"](x), **batch)
    torch.testing.assert_close(out.weight_penalty, hx.weight_penalty(both["student"]).detach())


def test_what_cannot_be_penalized_is_refused(batch: dict[str, Tensor]) -> None:
    net = Through(nn.Tanh())
    loose = torch.randn(3, CLASSES, requires_grad=True)

    def model(x: Tensor) -> Tensor:
        return net(x) + x.mean((2, 3)) @ loose

    with pytest.raises(ValueError, match=r"lambda_weights: expected 0, or .*\(3, 4\) that no mod"):
        hx.harmonizer_loss(model, **batch)
    out = hx.harmonizer_loss(model, **batch, lambda_weights=0.0)
    assert out.saliency.shape[0] == BATCH  # what else it remembers cannot be seen
    out.loss.backward()
    assert loose.grad is not None
    assert loose.grad.abs().sum() > 0
    assert out.weight_penalty == 0


def test_a_function_without_any_module(batch: dict[str, Tensor]) -> None:
    weight = torch.randn(CLASSES, 3 * SIZE * SIZE, requires_grad=True)

    def model(x: Tensor) -> Tensor:
        return F.linear(torch.tanh(x.flatten(1)), weight)

    with pytest.warns(UserWarning, match=r'rows="auto": .* what it remembers cannot be seen'):
        out = hx.harmonizer_loss(model, **batch, lambda_weights=0.0)
    assert out.saliency.shape[0] == BATCH
    with pytest.raises(ValueError, match=r"tensors of shape \(4, 192\) that no module has"):
        hx.harmonizer_loss(model, **batch)


def test_what_is_no_callable_is_refused(batch: dict[str, Tensor]) -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module or another callable"):
        hx.harmonizer_loss({"net": fresh()}, **batch)


def test_the_module_twin_takes_callables(batch: dict[str, Tensor]) -> None:
    net = fresh()
    want = result_of(net, net, batch)
    net = fresh()
    step = hx.HarmonizerLoss(lambda x: net(x), lambda_harmonization=3.0, lambda_weights=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = step(*(batch[k] for k in ("images", "labels", "heatmaps", "tokens")))
    out.loss.backward()
    assert torch.equal(out.loss.detach(), want[0])


def test_looking_leaves_no_trace(batch: dict[str, Tensor]) -> None:
    net = fresh()
    net.register_buffer("calls", torch.zeros(()))
    seen: list[int] = []
    net.register_forward_hook(lambda module, args, out: seen.append(module.calls.add_(1).item()))
    before = [t.clone() for t in (*net.parameters(), *net.buffers())], torch.get_rng_state()
    network.discover(lambda x: net(x + 0 * torch.rand(())), batch["images"])
    after = [*net.parameters(), *net.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(before[0], after, strict=True))
    assert torch.equal(before[1], torch.get_rng_state())
    assert seen == []


def test_a_callable_is_looked_at_once_wherever_it_is_made(batch: dict[str, Tensor]) -> None:
    net, other = Counting(), Counting()
    passes: list[int] = []
    for current in (net, net, net, other, other, net):
        Counting.passes()
        hx.harmonizer_loss(lambda x: current(x), **batch, rows="mapped")  # noqa: B023 - as in a loop
        passes.append(Counting.passes())
    # One to find the modules, and nine in which the maps of two rows are looked at for noise.
    assert passes == [2 + 1 + 9, 2, 2, 2 + 1 + 9, 2, 2]
