"""Diagnostics to watch a run by: standard deviations, the epsilon's share, gradient norms."""

from __future__ import annotations

import warnings

import pytest
import torch
from small_networks import Through, Transformer, gradients, make_batch
from torch import Tensor, nn

import harmonizer_ext as hx
from harmonizer_ext import diagnostics


@pytest.fixture
def batch(generator: torch.Generator) -> dict[str, Tensor]:
    return make_batch(generator, 5, 8) | {"tokens": torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0])}


@pytest.mark.parametrize("rows", ["mapped", "all"])
def test_row_statistics(batch: dict[str, Tensor], rows: str) -> None:
    out = hx.harmonizer_loss(Transformer(), **batch, rows=rows)
    maps = out.saliency.double().mean(1)
    mapped = batch["tokens"][out.saliency_rows] > 0
    want = torch.where(mapped, maps.std((1, 2), correction=0), 0)
    torch.testing.assert_close(out.row_saliency_std.double(), want, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.saliency_std.double(), want.sum() / 3, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        out.epsilon_ratio[mapped].double(), 1e-5 / want[mapped], rtol=1e-5, atol=0
    )
    assert out.epsilon_ratio[~mapped].isnan().all()
    assert out.mapped_rows == 3
    assert out.gradient_norms is None
    tensors = [v for v in vars(out).values() if isinstance(v, Tensor)]
    assert [t.requires_grad for t in tensors] == [True] + [False] * (len(tensors) - 1)


def test_gradient_norms(batch: dict[str, Tensor]) -> None:
    model = Transformer()
    out = hx.harmonizer_loss(model, **batch, lambda_weights=0.0, gradient_norms=True)
    out.loss.backward()
    assert out.gradient_norms is not None
    together = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    apart = {}
    for name, options in {
        "cross_entropy": {"lambda_harmonization": 0.0},
        "harmonization": {"criterion": lambda logits, labels: logits.sum() * 0},
    }.items():
        model.zero_grad()
        hx.harmonizer_loss(model, **batch, lambda_weights=0.0, **options).loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        apart[name] = torch.cat([g.flatten() for g in grads])
        # The same passes, summed by PyTorch's norm of norms.
        torch.testing.assert_close(
            out.gradient_norms[name], apart[name].norm(), rtol=1e-4, atol=0, msg=name
        )
    torch.testing.assert_close(
        together, apart["cross_entropy"] + apart["harmonization"], rtol=1e-4, atol=1e-6
    )


def test_epsilon_warning_once(batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnostics, "watch_epsilon", diagnostics.EpsilonWatch())
    model = Transformer()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hx.harmonizer_loss(model, **batch)
        assert not [w for w in caught if "epsilon" in str(w.message)]
        with torch.no_grad():
            model.head.weight.mul_(1e-5)
        for _ in range(2):
            out = hx.harmonizer_loss(model, **batch)
        assert (out.epsilon_ratio.nan_to_num(2) > 1).all()
    told = [str(w.message) for w in caught if "epsilon" in str(w.message)]
    assert len(told) == 1
    assert "images in 0..255" in told[0]


def test_epsilon_watch_counts_rows_that_were_read() -> None:
    watch = diagnostics.EpsilonWatch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch(torch.tensor([]))
        watch(torch.tensor([0.01, torch.nan, torch.nan]))  # the others were not read
        watch(torch.tensor([0.01, 0.01, 10.0, torch.inf]))  # half of them is not most
    with pytest.warns(UserWarning, match="epsilon"):
        watch(torch.tensor([0.01, torch.inf, 10.0, torch.nan]))


def test_maps_that_become_zero_are_said(
    batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some updates after the first, at which maps are looked at for themselves."""
    monkeypatch.setattr(diagnostics, "watch_epsilon", diagnostics.EpsilonWatch())
    model = Transformer()
    hx.harmonizer_loss(model, **batch)
    with torch.no_grad():
        model.head.weight.zero_()
    with pytest.warns(UserWarning, match="the standard deviation of most maps is below"):
        out = hx.harmonizer_loss(model, **batch)
    read = batch["tokens"][out.saliency_rows] != 0
    assert out.epsilon_ratio[read].isposinf().all()
    assert out.epsilon_ratio[~read].isnan().all()


def test_weight_penalty_of_halves_and_its_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2).to(torch.bfloat16))
    hx.weight_penalty(model).mul(3).backward()
    for parameter in model.parameters():
        want = (3 * parameter.detach().float()).to(parameter.dtype)
        torch.testing.assert_close(parameter.grad, want)
    double = nn.Linear(3, 4).double()
    inputs = list(double.parameters())
    assert torch.autograd.gradcheck(lambda *_: hx.weight_penalty(double), inputs)
    assert torch.autograd.gradgradcheck(lambda *_: hx.weight_penalty(double), inputs)


def test_penalty_is_in_the_gradient_of_the_step(batch: dict[str, Tensor]) -> None:
    model = Through(nn.Identity())
    with_penalty = gradients(model, batch, lambda_weights=0.5)
    without = gradients(model, batch, lambda_weights=0.0)
    for a, b, p in zip(with_penalty, without, model.parameters(), strict=True):
        torch.testing.assert_close(a, b + 0.5 * p.detach(), rtol=1e-5, atol=1e-7)
