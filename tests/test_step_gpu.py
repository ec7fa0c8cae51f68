"""The training step on a GPU: the same gradients as on the CPU, no wait, compiled, in float16."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from small_networks import Through, Transformer, make_batch
from torch import Tensor, nn

import harmonizer_ext as hx
from harmonizer_ext import diagnostics

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU that PyTorch can use on this machine"
)

BATCH, CLASSES, SIZE = 8, 4, 32


@pytest.fixture
def batch(generator: torch.Generator) -> dict[str, Tensor]:
    return make_batch(generator, BATCH, SIZE) | {
        "tokens": torch.tensor([1.0, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 1.0])
    }


def on_gpu(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """All but the tokens, which stay where reading them waits for nothing."""
    return {k: v if k == "tokens" else v.cuda() for k, v in batch.items()}


def run(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> list[Tensor]:
    model.zero_grad()
    hx.harmonizer_loss(model, **batch, lambda_harmonization=5.0, **options).loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def assert_near(got: list[Tensor], want: list[Tensor], rtol: float) -> None:
    for a, b in zip(got, want, strict=True):
        assert (a.cpu().double() - b.cpu().double()).norm() <= rtol * b.double().norm() + 1e-9


@pytest.fixture(autouse=True)
def exact_matrix_products() -> Any:
    """TF32 has ten bits; what is compared here has 24."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("reentrant", [None, False])
def test_gradients_equal_the_cpu(batch: dict[str, Tensor], reentrant: bool | None) -> None:
    """Rows without a map go through CUDA's own attention kernels, the others through MATH."""
    torch.manual_seed(0)
    model = Transformer(reentrant=reentrant)
    gpu = copy.deepcopy(model).cuda()
    assert_near(run(gpu, on_gpu(batch)), run(model, batch), 1e-4)


def test_a_step_does_not_wait_for_the_device(batch: dict[str, Tensor]) -> None:
    model = Transformer().cuda()
    moved = on_gpu(batch)
    for _ in range(2):  # what happens once, such as building kernels, may wait
        run(model, moved)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(model, moved)
        run(model, moved, reduction="mean_valid")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_epsilon_warning_without_a_wait(batch: dict[str, Tensor]) -> None:
    watch = diagnostics.EpsilonWatch()
    std = torch.full((4,), 1e-7, device="cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch(std)  # copied in the background
    torch.cuda.synchronize()
    with pytest.warns(UserWarning, match="epsilon"):
        watch(std)


@pytest.mark.parametrize("model", [Transformer, lambda: Through(nn.BatchNorm2d(4))])
def test_compiled_step(batch: dict[str, Tensor], model: Any) -> None:
    torch.manual_seed(0)
    eager = hx.HarmonizerLoss(model().cuda(), lambda_harmonization=5.0)
    compiled = hx.HarmonizerLoss(copy.deepcopy(eager.model), lambda_harmonization=5.0, compile=True)
    results = []
    for step in (eager, compiled):
        out = step(*on_gpu(batch).values())
        out.loss.backward()
        results.append(torch.cat([p.grad.flatten() for p in step.parameters()]))
    assert_near([results[1]], [results[0]], 1e-3)


def test_half_precision_with_a_scaler(batch: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    model = Through(nn.GELU()).cuda()
    want = run(model, on_gpu(batch))
    scaler = torch.amp.GradScaler("cuda")
    model.zero_grad()
    with torch.autocast("cuda", torch.float16):
        out = hx.harmonizer_loss(model, **on_gpu(batch), lambda_harmonization=5.0, scaler=scaler)
    scaler.scale(out.loss).backward()
    got = [p.grad / scaler.get_scale() for p in model.parameters() if p.grad is not None]
    # float16 has 11 bits, and the double backward multiplies its rounding.
    assert_near(got, want, 0.05)
