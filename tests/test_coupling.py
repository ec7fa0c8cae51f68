"""The coupling of a batch's rows is found by trying, and the trial leaves no trace."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from row_networks import (
    COUPLING,
    INDEPENDENT,
    WIDTH,
    Buffered,
    Layer,
    OwnGenerator,
    batch_mean,
    frozen_batch_norm,
)
from small_networks import Counting, Through, gradients, make_batch
from torch import Tensor, nn

import harmonizer_ext as hx
from harmonizer_ext import coupling

BATCH, SIZE = 6, 8


@pytest.fixture
def batch(generator: torch.Generator) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return make_batch(generator, BATCH, SIZE) | {"tokens": torch.tensor([0.0, 1, 0, 1, 0, 0])}


def network_with(layer: Any, mode: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = Through(layer)
    model.train(mode)
    return model


def kept(model: nn.Module) -> dict[str, Any]:
    """A copy of everything that a network and the random numbers are, to be compared."""
    shown = {name: repr(vars(module)) for name, module in model.named_modules()}
    generators = [m for m in model.modules() if isinstance(m, OwnGenerator)]
    return {
        "attributes": shown,
        "tensors": [t.detach().clone() for t in (*model.parameters(), *model.buffers())],
        "random": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": repr(np.random.get_state()),
        "own": [m.generator.get_state() for m in generators],
        "own of others": [(m.numbers.getstate(), m.more.bit_generator.state) for m in generators],
    }


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def layer_of(make: Callable[[], Any]) -> tuple[Any, bool]:
    layer = make()
    return layer, getattr(layer, "training", True)


@pytest.mark.parametrize("name", COUPLING)
def test_what_couples_rows_is_found_and_left_as_it_was(name: str, batch: dict[str, Tensor]) -> None:
    layer, training = layer_of(COUPLING[name])
    model = network_with(layer)
    if isinstance(layer, nn.Module):
        layer.train(training)
    before = kept(model)
    found = coupling.of(model, batch["images"])
    assert found.reason is not None
    assert found.certain
    assert_same(kept(model), before)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = hx.harmonizer_loss(model, **batch)
    assert out.saliency.shape[0] == BATCH
    assert sum('rows="auto"' in str(w.message) for w in caught) == 1


@pytest.mark.parametrize("name", INDEPENDENT)
def test_what_does_not_is_found_and_left_as_it_was(name: str, batch: dict[str, Tensor]) -> None:
    layer, training = layer_of(INDEPENDENT[name])
    model = network_with(layer)
    layer.train(training)
    before = kept(model)
    assert coupling.of(model, batch["images"]).reason is None
    assert_same(kept(model), before)
    assert hx.harmonizer_loss(model, **batch).saliency.shape[0] == 2


def test_frozen_batch_norm_of_torchvision(batch: dict[str, Tensor]) -> None:
    timm_networks = pytest.importorskip("timm_networks")
    pytest.importorskip("PIL", reason="Pillow (extra: train), which torchvision needs")
    timm_networks.import_torchvision()
    assert coupling.of(network_with(frozen_batch_norm()), batch["images"]).reason is None


# --- what it is worth -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["instance norm", "spectral norm", "fake quantization", "batch mean", "counter"]
)
def test_the_step_is_that_of_all_rows(name: str, batch: dict[str, Tensor]) -> None:
    """Gradients and state: as if the rows had never been looked at one by one."""
    models = [network_with(COUPLING[name]()) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = gradients(models[0], batch, rows="auto")
    want = gradients(models[1], batch, rows="all")
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert_same(kept(models[0])["tensors"], kept(models[1])["tensors"])
    if name == "counter":
        assert models[0].function.calls == 1


def test_a_head_of_zeros_hides_nothing(batch: dict[str, Tensor]) -> None:
    for layer, couples in ((Layer(batch_mean), True), (nn.Tanh(), False)):
        model = network_with(layer)
        nn.init.zeros_(model.last.weight)
        nn.init.zeros_(model.last.bias)
        before = kept(model)
        assert (coupling.of(model, batch["images"]).reason is not None) == couples
        assert_same(kept(model), before)


def test_layers_that_start_with_their_first_batch(batch: dict[str, Tensor]) -> None:
    """A layer as in Glow: the first pass sets the scale by the batch, which it then scales."""

    def run(m: Any, x: Tensor) -> Tensor:
        if not m.ready:
            m.offset.data.copy_(x.detach().mean((0, 2, 3)))
            m.ready = True
        return x - m.offset[:, None, None]

    model = network_with(Layer(run, ready=False, offset=nn.Parameter(torch.zeros(WIDTH))))
    assert coupling.of(model, batch["images"]).reason == "function lets rows depend on each other"
    assert not model.function.ready


def test_lazy_layers_stay_lazy(batch: dict[str, Tensor]) -> None:
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(4))
    found = coupling.of(model, batch["images"])
    assert found.reason is not None
    assert not found.certain
    out = hx.harmonizer_loss(model, **batch, lambda_weights=0.0)
    assert out.saliency.shape[0] == BATCH
    assert hx.harmonizer_loss(model, **batch, lambda_weights=0.0).saliency.shape[0] == 2


def test_the_culprit_is_named(batch: dict[str, Tensor]) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, WIDTH, 1), nn.Sequential(nn.Tanh(), Layer(batch_mean)), nn.Flatten(),
        nn.Linear(WIDTH * SIZE * SIZE, 4),
    )  # fmt: skip
    assert coupling.of(model, batch["images"]).reason == "1.1 lets rows depend on each other"
    with pytest.warns(UserWarning, match=r"because 1\.1 lets rows depend on each other") as told:
        hx.harmonizer_loss(model, **batch)
    assert told[0].filename == __file__
    buffered = network_with(Buffered())
    reason = coupling.of(buffered, batch["images"]).reason
    assert reason == "every forward pass changes function.mean"


@pytest.mark.parametrize("mapped", [1, 2, BATCH - 1, BATCH])
@pytest.mark.parametrize("ending", [torch.squeeze, lambda y: y.squeeze(0)])
def test_where_one_row_is_none_it_is_never_alone(
    mapped: int, ending: Callable[[Tensor], Tensor], batch: dict[str, Tensor]
) -> None:
    """The logits of one row are (classes,) there; those of any other number are as ever."""

    class Squeezed(Through):
        def forward(self, x: Tensor) -> Tensor:
            return ending(super().forward(x))

    torch.manual_seed(0)
    model = Squeezed(nn.Tanh())
    batch["tokens"] = (torch.arange(BATCH) < mapped).float()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for got, want in zip(
            gradients(model, batch), gradients(model, batch, rows="all"), strict=True
        ):
            # The same sums in another order.
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    rows = hx.harmonizer_loss(model, **batch).saliency.shape[0]
    assert rows == {1: 2, 2: 2}.get(mapped, BATCH)
    other = Squeezed(nn.Tanh())
    few = {name: part[:2] for name, part in batch.items()} | {"tokens": torch.tensor([1.0, 0])}
    assert hx.harmonizer_loss(other, **few).saliency.shape[0] == 2
    assert hx.harmonizer_loss(other, **batch).saliency.shape[0] == rows


# --- once -----------------------------------------------------------------------------------------


def test_it_is_tried_once_for_a_network_in_a_mode(batch: dict[str, Tensor]) -> None:
    model = Counting()

    def passes() -> int:
        Counting.passes()
        assert hx.harmonizer_loss(model, **batch).saliency.shape[0] == 2
        return Counting.passes()

    # Eight for the rows, and nine in which the maps of two rows are looked at for noise.
    assert [passes() for _ in range(3)] == [2 + 8 + 9, 2, 2]
    model.eval()
    assert [passes() for _ in range(2)] == [2 + 8 + 9, 2]
    model.train()
    assert passes() == 2
    model.head.requires_grad_(False)
    assert [passes() for _ in range(2)] == [2 + 8 + 9, 2]


def test_what_is_gone_is_not_taken_for_what_has_come(batch: dict[str, Tensor]) -> None:
    """Numbers of objects are given out again."""
    for number in range(40):
        couples = number % 2 == 0
        model = Through(Layer(batch_mean) if couples else nn.Tanh())
        assert (coupling.of(model, batch["images"]).reason is not None) == couples
        del model


def test_settings_that_change_are_tried_again(batch: dict[str, Tensor]) -> None:
    layer = Layer(lambda m, x: x - x.mean(0) if m.on else x, on=False)
    model = network_with(layer)
    for on in (False, True, False, True):
        layer.on = on
        found = coupling.of(model, batch["images"])
        # One that couples was found to, and its settings may be what a pass changes.
        assert (found.reason is not None) or not on
    replaced = network_with(nn.Tanh())
    assert coupling.of(replaced, batch["images"]).reason is None
    replaced.function = Layer(batch_mean)
    assert coupling.of(replaced, batch["images"]).reason is not None


def test_settings_that_change_with_every_call_are_not_tried_every_time(
    batch: dict[str, Tensor],
) -> None:
    layer = Layer(lambda m, x: x, step=0)
    model = network_with(layer)
    tried = []
    for step in range(1, 17):
        layer.step = step
        found = coupling.of(model, batch["images"])
        tried.append(found.reason is None)
    assert [n for n, t in enumerate(tried, 1) if t] == [1, 2, 4, 8, 16]


def test_under_autocast_no_weight_of_the_trial_is_left(batch: dict[str, Tensor]) -> None:
    """PyTorch keeps half-precision copies of weights as long as autocast is on."""
    results = []
    for first in (False, True):
        model = network_with(nn.Tanh())
        nn.init.zeros_(model.last.weight)  # which the trial scatters
        with torch.autocast("cpu", torch.bfloat16):
            if first:
                assert coupling.of(model, batch["images"]).reason is None
            out = hx.harmonizer_loss(model, **batch, rows="mapped")
        out.loss.backward()
        results.append([out.logits, *(p.grad for p in model.parameters())])
    assert_same(results[0], results[1])
