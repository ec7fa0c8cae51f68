"""standardize_cut, kernel by kernel: pytest bench/bench_standardize.py --benchmark-only"""

from __future__ import annotations

from typing import Any

import harness  # first of all: it sets what torch reads when it is loaded

# isort: split
import pytest
import torch

import harmonizer_ext as hx
from harmonizer_ext import backends

SHAPE = (32, 1, 224, 224)
WHAT = "standardize_cut, 32x224x224 float32"


@pytest.mark.benchmark(group=f"{WHAT}: forward")
@pytest.mark.parametrize(("device", "backend"), harness.targets())
def test_standardize_cut(benchmark: Any, device: str, backend: str) -> None:
    maps = torch.randn(SHAPE, device=device)
    kernel = backends.get(backend).standardize_cut
    benchmark(harness.finished(lambda: kernel(maps), device))


@pytest.mark.benchmark(group=f"{WHAT}: backward")
@pytest.mark.parametrize(("device", "backend"), harness.targets(reference=False))
def test_standardize_cut_backward(benchmark: Any, device: str, backend: str) -> None:
    maps, upstream = torch.randn(SHAPE, device=device), torch.rand(SHAPE, device=device)
    kernel = backends.get(backend).standardize_cut_backward
    benchmark(harness.finished(lambda: kernel(upstream, maps), device))


@pytest.mark.benchmark(group=f"{WHAT} and its gradient")
@pytest.mark.parametrize(("device", "backend"), harness.targets())
def test_standardize_cut_and_gradient(benchmark: Any, device: str, backend: str) -> None:
    maps = torch.randn(SHAPE, device=device, requires_grad=True)
    upstream = torch.rand(SHAPE, device=device)

    def run() -> object:
        return torch.autograd.grad(hx.standardize_cut(maps, backend=backend), maps, upstream)

    benchmark(harness.finished(run, device))
