"""Half the sum of squares of every weight that is decayed, whatever it is made of and kept in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_networks import Through, make_batch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import harmonizer_ext as hx


def half_square(*parameters: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for p in parameters:
        total = total + (p.detach().abs().double() ** 2).sum() / 2
    return total


def assert_close(penalty: Tensor, want: Tensor) -> None:
    """A sum of up to 90,000 numbers in float32, by parts: some units in the last place."""
    torch.testing.assert_close(penalty.detach().double(), want, rtol=1e-6, atol=0)


def assert_penalty(model: nn.Module, *penalized: nn.Parameter) -> None:
    """Value and gradient: the gradient of 1/2 |p|^2 is p itself, and nothing has another."""
    model.zero_grad()
    penalty = hx.weight_penalty(model)
    assert_close(penalty, half_square(*penalized))
    if penalized:
        penalty.backward()
    chosen = {id(p) for p in penalized}
    for p in model.parameters():
        if id(p) in chosen:
            got = p.grad.to_dense() if p.grad.layout is not torch.strided else p.grad
            want = p.detach().to_dense() if p.layout is not torch.strided else p.detach()
            torch.testing.assert_close(got, want, rtol=1e-3, atol=0)
        else:
            assert p.grad is None


# --- complex numbers ------------------------------------------------------------------------------


class Spectral(nn.Module):
    """A filter in the frequency domain, as Fourier neural operators and GFNet have it."""

    def __init__(self, dtype: torch.dtype = torch.complex64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6, 4, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(x) * self.weight, s=x.shape[-2:])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_weights_count_whole(dtype: torch.dtype) -> None:
    model = Spectral(dtype)
    assert_penalty(model, model.weight)
    assert hx.weight_penalty(model).dtype == (
        torch.float64 if dtype == torch.complex128 else torch.float32
    )
    imaginary = nn.Module()
    imaginary.weight = nn.Parameter(torch.tensor([2j]))
    assert hx.weight_penalty(imaginary) == 2


def test_a_step_with_complex_weights(generator: torch.Generator) -> None:
    torch.manual_seed(0)
    model = Through(Spectral())
    batch = make_batch(generator, 3, 8)
    results = []
    for factor in (0.0, 0.5):
        model.zero_grad()
        out = hx.harmonizer_loss(model, **batch, lambda_weights=factor)
        out.loss.backward()
        results.append([p.grad.clone() for p in model.parameters()])
    for a, b, p in zip(*results, model.parameters(), strict=True):
        torch.testing.assert_close(b, a + 0.5 * p.detach(), rtol=1e-5, atol=1e-6)


# --- networks of which a graph is left ------------------------------------------------------------


class OwnNorm(nn.LayerNorm):
    """A norm by another name than PyTorch's."""


class Mixed(nn.Module):
    """Normalizes in a function, with weights of its own beside one that is no norm's."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((4,), 1.5))
        self.scale = nn.Parameter(torch.full((4,), 2.5))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, [4], self.gain) * self.scale


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4), OwnNorm(4), nn.GroupNorm(2, 4), nn.RMSNorm(4),
        nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), nn.Linear(4, 3),
    )  # fmt: skip
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3)
    return made


GRAPHS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "as it is": lambda model, x: model,
    "scripted": lambda model, x: torch.jit.script(model),
    "traced": lambda model, x: torch.jit.trace(model, x),
    "torch.fx": lambda model, x: torch.fx.symbolic_trace(model),
    "exported": lambda model, x: torch.export.export(model, (x,)).module(),
    "decomposed": lambda model, x: torch.export.export(model, (x,)).run_decompositions().module(),
    "unflattened": lambda model, x: torch.export.unflatten(torch.export.export(model, (x,))),
    "within another": lambda model, x: nn.ModuleDict({"net": torch.jit.script(model)}),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", GRAPHS)
def test_scripted_and_exported_networks(name: str, train: bool) -> None:
    """Normalization is known by its operations where its layer is gone."""
    model = layers().train(train)
    want = half_square(*model[0].parameters(), *model[5][0].parameters(), *model[6].parameters())
    made = GRAPHS[name](model, torch.randn(3, 4))
    assert_close(hx.weight_penalty(made), want)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["scripted", "traced", "exported", "decomposed"])
def test_a_weight_that_a_function_normalizes_with(name: str) -> None:
    model = Mixed()
    made = GRAPHS[name](model, torch.randn(3, 4))
    torch.testing.assert_close(hx.weight_penalty(made).detach().double(), half_square(model.scale))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_embeddings_of_scripted_networks() -> None:
    model = torch.jit.script(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2)))
    assert_close(hx.weight_penalty(model), half_square(*model[1].parameters()))


class Layered(nn.Module):
    """Normalizations of images, of which one has its operation in a method of its own, and a scale
    behind them, as those of LayerScale."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3)
        self.instance = nn.InstanceNorm2d(8, affine=True)
        self.group = nn.GroupNorm(2, 8)
        self.rms = nn.RMSNorm(8)
        self.scale = nn.Parameter(torch.full((8,), 2.5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.group(torch.tanh(self.instance(self.convolution(x))))
        return self.scale * self.rms(x.mean((2, 3)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["as it is", "scripted", "traced", "exported", "decomposed"])
def test_normalizations_of_images(name: str) -> None:
    model = Layered().eval()
    made = GRAPHS[name](model, torch.randn(2, 3, 8, 8))
    want = half_square(*model.convolution.parameters(), model.scale)
    torch.testing.assert_close(hx.weight_penalty(made).detach().double(), want)


# --- parametrized, shared, lazy, sparse, small and empty ones -------------------------------------


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_parametrized_weights_belong_to_their_layer() -> None:
    conv = parametrizations.weight_norm(nn.Linear(3, 4))
    assert_penalty(conv, *conv.parameters())
    norm = nn.BatchNorm1d(4)
    parametrize.register_parametrization(norm, "weight", Doubled())
    table = nn.Embedding(5, 4)
    parametrize.register_parametrization(table, "weight", Doubled())
    assert_penalty(nn.Sequential(norm, table))
    inner = nn.Sequential(nn.Linear(2, 2), norm)
    assert_penalty(inner, *inner[0].parameters())


def test_shared_weights_count_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    model["c"] = model["a"]
    assert_penalty(model, *model["a"].parameters())


def test_lazy_weights_are_named(generator: torch.Generator) -> None:
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(4))
    with pytest.raises(ValueError, match=r"expected weights that have been made, got lazy ones"):
        hx.weight_penalty(model)
    batch = make_batch(generator, 3, 8)
    out = hx.harmonizer_loss(model, **batch, lambda_weights=1.0)  # which makes them
    assert_close(out.weight_penalty, half_square(*model.parameters()))


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", ["coo", "coo twice", "csr"])
def test_sparse_weights(layout: str) -> None:
    model = nn.Module()
    dense = torch.tensor([[0.0, 3.0], [4.0, 0.0]])
    values = {
        "coo": lambda: dense.to_sparse(),
        "coo twice": lambda: torch.sparse_coo_tensor(
            torch.tensor([[0, 0, 1], [1, 1, 0]]), torch.tensor([1.0, 2.0, 4.0]), (2, 2)
        ),
        "csr": lambda: dense.to_sparse_csr(),
    }[layout]()
    model.weight = nn.Parameter(values)
    penalty = hx.weight_penalty(model)
    assert penalty == 12.5
    penalty.backward()
    assert torch.equal(model.weight.grad.to_dense(), dense)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_that_half_precision_cannot_hold(dtype: torch.dtype) -> None:
    model = nn.Linear(300, 300).to(dtype)
    with torch.no_grad():
        model.weight.fill_(100.0)  # squares to 10,000, and float16 ends at 65,504
    assert_penalty(model, *model.parameters())
    assert hx.weight_penalty(model).dtype == torch.float32


def test_empty_weights_and_none() -> None:
    model = nn.Sequential(nn.Linear(3, 0), nn.Linear(3, 2))
    assert_penalty(model, *model.parameters())
    assert_penalty(nn.Sequential(nn.Linear(3, 0)), *())
    assert_penalty(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)))


def test_weights_without_values() -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 4)
    assert hx.weight_penalty(model).device.type == "meta"
    with pytest.raises(ValueError, match=r"some on the device meta.*to_empty"):
        hx.weight_penalty(nn.Sequential(nn.Linear(2, 2), model))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_quantized_weights_are_not_trained() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    kept = copy.deepcopy(model[2])
    model[0] = torch.ao.nn.quantized.dynamic.Linear(4, 4)
    assert_penalty(model, *model[2].parameters())
    assert torch.equal(kept.weight, model[2].weight)


# --- chosen once ----------------------------------------------------------------------------------


def test_what_is_trained_may_change() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    assert_penalty(model, *model[0].parameters(), *model[2].parameters())
    model[0].requires_grad_(False)
    assert_penalty(model, *model[2].parameters())
    model[0].requires_grad_(True)
    model[0].weight = nn.Parameter(torch.ones(2, 2))
    assert_penalty(model, *model[0].parameters(), *model[2].parameters())
    model.append(nn.Linear(2, 3))
    assert_penalty(model, *model[0].parameters(), *model[2].parameters(), *model[3].parameters())


def test_networks_that_are_gone() -> None:
    for number in range(30):
        width = 2 + number % 3
        model = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        assert_penalty(model, *model[0].parameters())
        del model
