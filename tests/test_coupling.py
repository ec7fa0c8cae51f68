"""The coupling of a batch's rows is found by trying, and the trial leaves no trace."""

from __future__ import annotations

import copy
import random
import tempfile
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_networks import Counting, Through, gradients, make_batch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import harmonizer_ext as hx
from harmonizer_ext import coupling

BATCH, SIZE, WIDTH = 6, 8, 4  # the width of the features in the middle of ``Through``


@pytest.fixture
def batch(generator: torch.Generator) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return make_batch(generator, BATCH, SIZE) | {"tokens": torch.tensor([0.0, 1, 0, 1, 0, 0])}


class Layer(nn.Module):
    """A layer whose forward pass is a function of itself and its input."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **attributes: Any) -> None:
        super().__init__()
        self._run = forward
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(self, x)


def keeps(update: Callable[[Any, Tensor], Any], **attributes: Any) -> nn.Module:
    """A layer that changes something of its own and nothing of its input."""

    def run(layer: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            update(layer, x)
        return x

    return Layer(run, **attributes)


class Buffered(nn.Module):
    """A running mean that nobody reads."""

    def __init__(self, persistent: bool = True) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.detach().mean((0, 2, 3)), 0.1)
        return x


class Momentum(nn.Module):
    """A convolution and the average of its weights, which every forward pass goes on with."""

    def __init__(self) -> None:
        super().__init__()
        self.now = nn.Conv2d(WIDTH, WIDTH, 1)
        self.average = copy.deepcopy(self.now).requires_grad_(False)
        with torch.no_grad():
            self.average.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for a, b in zip(self.average.parameters(), self.now.parameters(), strict=True):
                a.data.lerp_(b.data, 0.1)  # which no version counter sees
        return self.now(x)


def batch_mean(_: Any, x: Tensor) -> Tensor:
    return x - x.mean(0)


def over_the_batch(_: Any, x: Tensor) -> Tensor:
    """Attention whose tokens are the rows."""
    flat = x.flatten(1)[None]
    return F.scaled_dot_product_attention(flat, flat, flat)[0].view_as(x)


def by_place(_: Any, x: Tensor) -> Tensor:
    return x * torch.where(torch.arange(len(x)) % 2 == 0, 1.0, 0.9)[:, None, None, None]


def limited(_: Any, x: Tensor) -> Tensor:
    """An expert that takes the first two rows that come to it; the others pass by."""
    wanted = x.detach().isfinite().all(-1).all(-1).all(-1)  # by each row alone
    taken = wanted & (wanted.cumsum(0) <= 2)
    return torch.where(taken[:, None, None, None], x, x * 0.5)


class Bank(nn.Module):
    """Compares with the rows that it has seen last."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: deque[Tensor] = deque([torch.zeros(WIDTH)] * 3, maxlen=3)

    def forward(self, x: Tensor) -> Tensor:
        x = x - torch.stack(list(self.rows)).mean(0)[:, None, None]
        self.rows.extend(x.detach().mean((2, 3)))
        return x


class Zeroed(nn.Module):
    """A branch whose scale starts at zero, so that at first nothing is seen of it."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.scale = nn.Parameter(torch.zeros(WIDTH, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.branch(x)


def fake_quantize() -> nn.Module:
    from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver

    return FakeQuantize(MovingAverageMinMaxObserver, quant_min=0, quant_max=255)


def observer() -> nn.Module:
    from torch.ao.quantization import MinMaxObserver

    made = MinMaxObserver()
    made(torch.tensor([-1e9, 1e9]))  # a range that nothing leaves
    return made


def counted(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    calls = torch.zeros(())

    def run(x: Tensor) -> Tensor:
        calls.add_(1)
        return function(x)

    return run


COUPLING: dict[str, Callable[[], Any]] = {
    # state
    "instance norm": lambda: nn.InstanceNorm2d(WIDTH, track_running_stats=True),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Conv2d(WIDTH, WIDTH, 1)),
    "spectral norm of old": lambda: nn.utils.spectral_norm(nn.Conv2d(WIDTH, WIDTH, 1)),
    "fake quantization": fake_quantize,
    "observer whose range holds": observer,
    "buffer": Buffered,
    "buffer that is not saved": lambda: Buffered(persistent=False),
    "average of weights": Momentum,
    "counter": lambda: keeps(lambda m, x: setattr(m, "calls", m.calls + 1), calls=0),
    "tensor in place": lambda: keeps(lambda m, x: m.seen.add_(len(x)), seen=torch.zeros(())),
    "tensor replaced": lambda: keeps(lambda m, x: setattr(m, "last", x.mean())),
    "list": lambda: keeps(lambda m, x: m.means.append(float(x.mean())), means=[]),
    "dictionary": lambda: keeps(lambda m, x: m.seen.update(n=m.seen["n"] + 1), seen={"n": 0}),
    "array": lambda: keeps(lambda m, x: m.total.__iadd__(1), total=np.zeros(3)),
    "object": lambda: keeps(
        lambda m, x: setattr(m.o, "n", m.o.n + 1),
        o=type("Tracker", (), {"n": 0, "__init__": (lambda self: setattr(self, "n", 0))})(),
    ),
    "modules in a list": lambda: keeps(lambda m, x: m.hidden[0](x), hidden=[nn.BatchNorm2d(WIDTH)]),
    "function with a closure": lambda: counted(torch.tanh),
    "mode": lambda: keeps(lambda m, x: m.inner.train(not m.inner.training), inner=nn.Identity()),
    # content
    "batch norm": lambda: nn.BatchNorm2d(WIDTH),
    "batch norm without statistics": lambda: nn.BatchNorm2d(
        WIDTH, track_running_stats=False
    ).eval(),
    "batch mean": lambda: Layer(batch_mean),
    "detached batch mean": lambda: Layer(lambda m, x: x - x.detach().mean(0)),
    "softmax over rows": lambda: nn.Softmax(dim=0),
    "attention over rows": lambda: Layer(over_the_batch),
    "neighbours": lambda: Layer(lambda m, x: x + 0.1 * x.roll(1, 0)),
    "pairs": lambda: Layer(lambda m, x: x + 0.1 * x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)),
    "the first row": lambda: Layer(lambda m, x: x + 0.01 * x[:1].detach()),
    "largest of the batch": lambda: Layer(lambda m, x: x / x.detach().abs().amax()),
    "bank of rows": Bank,
    # size
    "number of rows": lambda: Layer(lambda m, x: x / len(x)),
    "number of rows, dropout": lambda: nn.Sequential(
        nn.Dropout(0.5), Layer(lambda m, x: x / len(x))
    ),
    "even numbers of rows": lambda: Layer(lambda m, x: x.unflatten(0, (2, -1)).flatten(0, 1)),
    # place
    "sign by place": lambda: Layer(by_place),
    "experts that are full": lambda: Layer(limited),
    # hidden at first
    "zero branch": lambda: Zeroed(Layer(batch_mean)),
    "dropout before it": lambda: nn.Sequential(nn.Dropout(0.2), Layer(batch_mean)),
}


class Cached(nn.Module):
    """A grid that the first pass makes and later ones find."""

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "grid"):
            self.grid = torch.linspace(0, 1, x.shape[-1])
        self.size = tuple(x.shape[1:])
        return x + self.grid


class MaxNorm(nn.Conv2d):
    """A layer as EEGNet has it: every pass cuts the weights, and finds them cut after the first."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.1)
        return super().forward(x)


def frozen_batch_norm() -> nn.Module:
    from torchvision.ops import FrozenBatchNorm2d

    return FrozenBatchNorm2d(WIDTH)


class OwnGenerator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)
        self.numbers = random.Random(0)
        self.more = np.random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.rand(x.shape, generator=self.generator) > 0.5
        return x * mask * (1 + self.numbers.random() + self.more.random())


def closed(array: Any) -> Any:
    array.flags.writeable = False
    return array


def file_in_memory() -> Any:
    with tempfile.TemporaryFile() as file:
        file.write(bytes(32))
        file.flush()
        return np.memmap(file, np.float32, "r")


def table(make: Callable[[], Any]) -> Callable[[], nn.Module]:
    """A layer that has an array at hand."""
    return lambda: Layer(lambda m, x: x + float(m.table.ravel()[0]), table=make())


INDEPENDENT: dict[str, Callable[[], Any]] = {
    "identity": nn.Identity,
    "array": table(lambda: np.zeros(3)),
    "array that is closed to writing": table(lambda: closed(np.zeros(3))),
    "array of bytes": table(lambda: np.frombuffer(bytes(4), np.uint8)),
    "one number seen as many": table(lambda: np.broadcast_to(np.zeros(1), (3,))),
    "file in memory": table(file_in_memory),
    "tensor seen as many": lambda: Layer(
        lambda m, x: x + m.table[0], table=torch.zeros(1).expand(3)
    ),
    "batch norm in eval mode": lambda: nn.BatchNorm2d(WIDTH).eval(),
    "instance norm in eval mode": lambda: nn.InstanceNorm2d(WIDTH, track_running_stats=True).eval(),
    "instance norm without statistics": lambda: nn.InstanceNorm2d(WIDTH),
    "group norm": lambda: nn.GroupNorm(2, WIDTH),
    "weight norm": lambda: parametrizations.weight_norm(nn.Conv2d(WIDTH, WIDTH, 1)),
    "weight norm of old": lambda: nn.utils.weight_norm(nn.Conv2d(WIDTH, WIDTH, 1)),
    "softmax over channels": lambda: nn.Softmax(dim=1),
    "dropout": lambda: nn.Dropout(0.5),
    "dropout by Python": lambda: Layer(lambda m, x: x * (0.5 + random.random())),
    "generators of its own": OwnGenerator,
    "cache": Cached,
    "largest norm": lambda: MaxNorm(WIDTH, WIDTH, 1),
    "zero branch": lambda: Zeroed(nn.Conv2d(WIDTH, WIDTH, 1)),
    "half precision": lambda: Layer(lambda m, x: x.bfloat16().float()),
}


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

    # Seven for the rows, and nine in which the maps of two rows are looked at for noise.
    assert [passes() for _ in range(3)] == [2 + 7 + 9, 2, 2]
    model.eval()
    assert [passes() for _ in range(2)] == [2 + 7 + 9, 2]
    model.train()
    assert passes() == 2
    model.head.requires_grad_(False)
    assert [passes() for _ in range(2)] == [2 + 7 + 9, 2]


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
