"""Layers that let rows of a batch depend on each other, and layers that do not."""

from __future__ import annotations

import copy
import random
import tempfile
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

WIDTH = 4  # of the features in the middle of ``Through``


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


class Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / gradient.norm()


def hooked(_: Any, x: Tensor) -> Tensor:
    x = x * 1
    if x.requires_grad:
        x.register_hook(lambda gradient: gradient / gradient.abs().amax())
    return x


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
    # gradient
    "gradient by the norm of the batch": lambda: Layer(lambda m, x: Normed.apply(x)),
    "hook on a tensor": lambda: Layer(hooked),
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
