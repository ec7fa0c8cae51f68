"""positive_part_mse, kernel by kernel: pytest bench/bench_positive_part_mse.py --benchmark-only"""

from __future__ import annotations

from typing import Any

import harness  # first of all: it sets what torch reads when it is loaded

# isort: split
import pytest
import torch

import harmonizer_ext as hx
from harmonizer_ext import backends

SHAPE = (32, 224, 224)
WHAT = "positive_part_mse, 32x224x224 float32"


@pytest.mark.benchmark(group=f"{WHAT}: forward")
@pytest.mark.parametrize(("device", "backend"), harness.targets())
def test_positive_part_mse(benchmark: Any, device: str, backend: str) -> None:
    a, b = torch.randn(SHAPE, device=device), torch.randn(SHAPE, device=device)
    kernel = backends.get(backend).positive_part_mse
    benchmark(harness.finished(lambda: kernel(a, b), device))


@pytest.mark.benchmark(group=f"{WHAT}: backward")
@pytest.mark.parametrize(("device", "backend"), harness.targets(reference=False))
def test_positive_part_mse_backward(benchmark: Any, device: str, backend: str) -> None:
    a, b = torch.randn(SHAPE, device=device), torch.randn(SHAPE, device=device)
    upstream = torch.ones(SHAPE[0], device=device)
    kernel = backends.get(backend).positive_part_mse_backward
    benchmark(harness.finished(lambda: kernel(upstream, a, b), device))


@pytest.mark.benchmark(group=f"{WHAT} and its gradients")
@pytest.mark.parametrize(("device", "backend"), harness.targets())
def test_positive_part_mse_and_gradients(benchmark: Any, device: str, backend: str) -> None:
    a = torch.randn(SHAPE, device=device, requires_grad=True)
    b = torch.randn(SHAPE, device=device, requires_grad=True)

    def run() -> object:
        return torch.autograd.grad(hx.positive_part_mse(a, b, backend=backend).sum(), (a, b))

    benchmark(harness.finished(run, device))
