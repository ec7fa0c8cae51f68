"""HarmonizerLoss: the module twin, and the whole step as one compiled function."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_networks import Through, Transformer, make_batch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import harmonizer_ext as hx

BATCH, CLASSES, SIZE = 8, 4, 16


@pytest.fixture
def batch(generator: torch.Generator) -> dict[str, Tensor]:
    return make_batch(generator, BATCH, SIZE)


def residual() -> nn.Module:
    """A small residual network with BatchNorm, as timm's ResNets have it."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1))
            self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
            self.head = nn.Linear(8, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norms[0](self.first(x)).relu()
            x = x + self.norms[1](self.second(x)).relu()
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    return Residual()


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return Transformer()


def run(step: nn.Module, batch: dict[str, Tensor]) -> tuple[hx.HarmonizerOutput, list[Tensor]]:
    step.zero_grad()
    out = step(*batch.values())
    out.loss.backward()
    return out, [p.grad for p in step.parameters()]


@pytest.mark.parametrize("model", [residual, transformer])
def test_compiled_step_equals_eager(model: Any, batch: dict[str, Tensor]) -> None:
    """The step, traced, differentiated and functionalized, runs the same kernels: the same bits."""
    eager = hx.HarmonizerLoss(model(), lambda_harmonization=5.0)
    compiled = hx.HarmonizerLoss(
        model(), lambda_harmonization=5.0, compile={"backend": "aot_eager"}
    )
    for _ in range(2):
        (want, want_grads), (got, got_grads) = run(eager, batch), run(compiled, batch)
        for field in ("loss", "harmonization", "logits", "saliency", "saliency_std"):
            torch.testing.assert_close(
                getattr(got, field), getattr(want, field), rtol=1e-6, atol=1e-8, msg=field
            )
        for a, b in zip(got_grads, want_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))
    for a, b in zip(compiled.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b)  # running statistics, updated once a step


def test_inductor(batch: dict[str, Tensor]) -> None:
    """A transformer; tests/test_training.py has convolutions."""
    eager = hx.HarmonizerLoss(transformer(), lambda_harmonization=5.0)
    compiled = hx.HarmonizerLoss(transformer(), lambda_harmonization=5.0, compile=True)
    (want, want_grads), (got, got_grads) = run(eager, batch), run(compiled, batch)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=0)
    # Other orders of summation in float32, amplified by the double backward; a bias of keys has a
    # gradient of rounding alone, so that the scale is the network's.
    scale = max(float(g.abs().max()) for g in want_grads)
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * scale)


def test_mapped_rows_compile_few_shapes(batch: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    model = Through(nn.Identity())
    eager = hx.HarmonizerLoss(copy.deepcopy(model))
    compiled = hx.HarmonizerLoss(model, compile={"backend": "aot_eager"}, row_multiple=4)
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for mapped in (1, 2, 4, 3, 0, 7, 6, 8, 1):
        batch["tokens"] = (torch.arange(BATCH) < mapped).float()
        want, want_grads = run(eager, batch)
        got, got_grads = run(compiled, batch)
        assert got.mapped_rows == mapped
        assert got.saliency.shape[0] == (4 if mapped <= 4 else 8)
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(got.logits, want.logits, rtol=1e-5, atol=1e-7)
        for a, b in zip(got_grads, want_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * float(b.abs().max()))
    # Four and eight rows; the saliency path of all rows is the second.
    assert graphs["unique_graphs"] - before == 2


def test_autocast_and_no_grad(batch: dict[str, Tensor]) -> None:
    eager = hx.HarmonizerLoss(transformer())
    compiled = hx.HarmonizerLoss(transformer(), compile={"backend": "aot_eager"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(*batch.values()).loss, eager(*batch.values()).loss)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = compiled(*batch.values()), eager(*batch.values())
    got.loss.backward()
    assert got.logits.dtype == want.logits.dtype
    # bfloat16 has 8 bits, and a traced graph may round in other places.
    torch.testing.assert_close(got.loss, want.loss, rtol=0.02, atol=0)


def test_settings_of_the_tracer_are_left_as_they_were(batch: dict[str, Tensor]) -> None:
    before = torch._dynamo.config.trace_autograd_ops, torch._dynamo.config.recompile_limit
    hx.HarmonizerLoss(transformer(), compile={"backend": "aot_eager"})(*batch.values())
    after = torch._dynamo.config.trace_autograd_ops, torch._dynamo.config.recompile_limit
    assert after == before


def test_options_arrive(batch: dict[str, Tensor]) -> None:
    model = transformer()
    options = {"formulation": "paper", "levels": 3, "lambda_weights": 0.5, "rows": "all"}
    step = hx.HarmonizerLoss(model, **options)
    want = hx.harmonizer_loss(model, **batch, **options)
    torch.testing.assert_close(step(*batch.values()).loss, want.loss, rtol=0, atol=0)
    assert "levels=3" in repr(step)
    assert list(step.parameters()) == list(model.parameters())


def test_what_it_refuses(batch: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="rows: expected one of"):
        hx.HarmonizerLoss(transformer(), rows="some")
    with pytest.raises(ValueError, match="row_multiple: expected at least 1, got 0"):
        hx.HarmonizerLoss(transformer(), compile=True, row_multiple=0)
    for option in ({"second_order": "finite_difference"}, {"gradient_norms": True}):
        with pytest.raises(ValueError, match=f"compile: expected {next(iter(option))} to be left"):
            hx.HarmonizerLoss(transformer(), compile=True, **option)
    # Without processes to talk to it cannot be built; its class is what is looked at.
    wrapped = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapped)
    with pytest.raises(ValueError, match=r"DistributedDataParallel\(HarmonizerLoss\(network, comp"):
        hx.HarmonizerLoss(wrapped, compile=True)
    compiled = torch.compile(transformer(), backend="eager")
    with pytest.raises(hx.SecondDerivativeError, match="not compiled by itself"):
        hx.HarmonizerLoss(compiled, compile={"backend": "eager"})(*batch.values())


def test_what_has_no_second_derivative_is_named_as_in_eager(batch: dict[str, Tensor]) -> None:
    step = hx.HarmonizerLoss(Through(nn.Hardsigmoid()), compile={"backend": "aot_eager"})
    with pytest.raises(hx.SecondDerivativeError, match=r"make_twice_differentiable\(model\)"):
        step(*batch.values())
    hx.make_twice_differentiable(step.model)
    run(step, batch)
