"""second_order="finite_difference": how near it is to exact, where it serves, what it refuses."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from small_networks import Through, Transformer, gradients, make_batch
from torch import Tensor, nn

import harmonizer_ext as hx
from harmonizer_ext import FiniteDifference

BATCH, CLASSES, SIZE = 4, 4, 8


@pytest.fixture
def batch(generator: torch.Generator) -> dict[str, Tensor]:
    return make_batch(generator, BATCH, SIZE)


def alignment_gradient(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> Tensor:
    """Gradient of the alignment alone, all parameters in one vector."""
    both = [
        gradients(model, batch, lambda_weights=0.0, **options),
        gradients(model, {**batch, "tokens": torch.zeros(BATCH)}, lambda_weights=0.0, **options),
    ]
    whole, plain = (torch.cat([g.flatten() for g in grads]) for grads in both)
    return whole - plain


def double(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


@pytest.mark.parametrize("tokens", [None, (1.0, 0.0, 0.0, 0.5)])
def test_error_falls_with_the_square_of_the_step(
    batch: dict[str, Tensor], tokens: tuple[float, ...] | None
) -> None:
    torch.manual_seed(0)
    model = Transformer().double()
    batch = double(batch)
    if tokens is not None:
        batch["tokens"] = torch.tensor(tokens)
    exact = alignment_gradient(model, batch)
    errors = []
    for step in (1e-2, 1e-3):
        near = alignment_gradient(
            model, batch, second_order=FiniteDifference(step=step, compare=False)
        )
        errors.append(float((near - exact).norm() / exact.norm()))
    # Central differences: the error is a third derivative times step^2, here 100 times smaller.
    assert errors[0] < 1e-2
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.1)


def test_default_step_in_float32(batch: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    model = Transformer()
    exact = alignment_gradient(model, batch)
    near = alignment_gradient(model, batch, second_order="finite_difference")
    # Truncation and rounding are both about the square of the step, (2^-24)^(2/3) = 1.5e-5, times
    # ratios of derivatives; the difference is taken of gradients that cross entropy is part of.
    assert (near - exact).norm() < 3e-3 * exact.norm()


def test_value_and_other_terms_are_exact(batch: dict[str, Tensor]) -> None:
    model = Transformer()
    batch["tokens"] = torch.tensor([1, 0, 1, 1])
    exact = hx.harmonizer_loss(model, **batch)
    near = hx.harmonizer_loss(model, **batch, second_order="finite_difference")
    for field in ("loss", "cross_entropy", "harmonization", "logits", "saliency", "saliency_std"):
        # The rows without a map take the same path; those with one the fused attention kernel.
        torch.testing.assert_close(
            getattr(near, field), getattr(exact, field), rtol=1e-5, atol=1e-7, msg=field
        )
    assert not near.saliency.requires_grad


def test_first_batch_is_compared_with_exact(
    batch: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    model = Transformer()
    with caplog.at_level(logging.INFO, "harmonizer_ext"):
        outs = [
            hx.harmonizer_loss(model, **batch, second_order="finite_difference") for _ in range(2)
        ]
    assert outs[0].second_order_gap is not None
    assert float(outs[0].second_order_gap) < 3e-3
    assert outs[1].second_order_gap is None
    assert [r.message for r in caplog.records if "from the exact gradient" in r.message]


def test_a_wide_gap_is_a_warning(batch: dict[str, Tensor]) -> None:
    with pytest.warns(UserWarning, match=r"from the exact one.*FiniteDifference\(step=...\)"):
        hx.harmonizer_loss(Transformer(), **batch, second_order=FiniteDifference(step=3.0))


@pytest.mark.parametrize("how", ["reentrant", "compiled", "once differentiable"])
def test_what_double_backward_refuses_is_served(
    batch: dict[str, Tensor], how: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model: Any = Transformer(reentrant=True if how == "reentrant" else None)
    if how == "once differentiable":
        model = Through(nn.Hardsigmoid())
    plain = Transformer() if how != "once differentiable" else Through(nn.Hardsigmoid())
    plain.load_state_dict(model.state_dict())
    hx.make_twice_differentiable(plain)
    exact = alignment_gradient(plain, batch)
    if how == "compiled":
        model = torch.compile(model, backend="aot_eager")
    # Hardsigmoid has kinks at 3 and -3, which no activation of this network comes near.
    options = FiniteDifference(allow_kinks=how == "once differentiable")
    with caplog.at_level(logging.INFO, "harmonizer_ext"):
        near = alignment_gradient(model, batch, second_order=options)
    assert (near - exact).norm() < 3e-3 * exact.norm()
    assert "which is impossible here" in caplog.text
    for p in model.parameters():
        assert p.requires_grad


def test_dropout_draws_the_same_in_every_pass(batch: dict[str, Tensor]) -> None:
    model = Transformer()
    for block in model.blocks:
        block.dropout.p = 0.5
    results = []
    for second_order in ("exact", FiniteDifference(compare=False)):
        torch.manual_seed(3)
        results.append(gradients(model, batch, second_order=second_order, lambda_weights=0.0))
        after = torch.rand(())
        if second_order == "exact":
            expected = after
    assert after == expected  # the passes in between leave no trace in the random numbers
    for near, exact in zip(*reversed(results), strict=True):
        torch.testing.assert_close(near, exact, rtol=0.01, atol=3e-3 * float(exact.abs().max()))


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (nn.ReLU(), "ReLU"),
        (nn.MaxPool2d(2), "MaxPool2d"),
        (torch.relu, "ReluBackward0"),
        (lambda x: nn.functional.leaky_relu(x), "LeakyReluBackward0"),
        (lambda x: nn.functional.max_pool2d(x, 2), "MaxPool2DWithIndicesBackward0"),
        (lambda x: x.clamp(min=0), "ClampBackward1"),
        (lambda x: x.abs(), "AbsBackward0"),
        (lambda x: torch.maximum(x, -x), "MaximumBackward0"),
        (nn.Hardswish(), "Hardswish"),
        (nn.SELU(), "SELU"),
    ],
)
def test_kinks_are_refused_unless_forced(batch: dict[str, Tensor], layer: Any, named: str) -> None:
    model = Through(layer)
    with pytest.raises(ValueError, match=rf"smooth network.*{named}.*allow_kinks=True"):
        hx.harmonizer_loss(model, **batch, second_order="finite_difference")
    forced = FiniteDifference(allow_kinks=True, compare=False)
    assert hx.harmonizer_loss(model, **batch, second_order=forced).loss.isfinite()


@pytest.mark.parametrize("layer", [nn.GELU(), nn.SiLU(), nn.Softplus(), nn.ELU(), nn.AvgPool2d(2)])
def test_smooth_layers_are_not(batch: dict[str, Tensor], layer: nn.Module) -> None:
    hx.harmonizer_loss(Through(layer), **batch, second_order="finite_difference")


def test_what_else_it_refuses(batch: dict[str, Tensor]) -> None:
    model = Through(nn.BatchNorm2d(4))
    with pytest.raises(
        ValueError, match=r"changes function\.running_mean.*Freeze.*with \.eval\(\)"
    ):
        hx.harmonizer_loss(model, **batch, second_order="finite_difference")
    hx.harmonizer_loss(model.eval(), **batch, second_order="finite_difference")
    with pytest.raises(ValueError, match="explain: expected None"):
        hx.harmonizer_loss(
            model, **batch, second_order="finite_difference", explain=hx.input_gradient
        )
    with pytest.raises(ValueError, match="step: expected a number above 0, got 0"):
        FiniteDifference(step=0.0)


def test_rows_that_nothing_pulls_at(batch: dict[str, Tensor]) -> None:
    """A constant image, a row of token 0 and a constant human map give finite gradients."""
    batch["images"][0] = 0.5
    batch["heatmaps"][1] = 0.0
    batch["tokens"] = torch.tensor([1.0, 1.0, 0.0, 1.0])
    for rows in ("mapped", "all"):
        out = hx.harmonizer_loss(
            Transformer(), **batch, rows=rows, second_order="finite_difference"
        )
        assert float(out.second_order_gap) < 3e-3


def test_values_alone(batch: dict[str, Tensor]) -> None:
    with torch.no_grad():
        out = hx.harmonizer_loss(Transformer(), **batch, second_order="finite_difference")
    assert math.isfinite(out.loss)
