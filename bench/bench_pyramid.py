"""gaussian_pyramid, kernel by kernel: pytest bench/bench_pyramid.py --benchmark-only"""

from __future__ import annotations

from typing import Any

import harness  # first of all: it sets what torch reads when it is loaded

# isort: split
import pytest
import torch

import harmonizer_ext as hx
from harmonizer_ext import backends

LEVELS = 5
SHAPE = (32, 1, 224, 224)
WHAT = f"pyramid of {LEVELS} levels, 32x224x224 float32"


@pytest.mark.benchmark(group=f"{WHAT}: forward")
@pytest.mark.parametrize(("device", "backend"), harness.targets())
def test_pyramid(benchmark: Any, device: str, backend: str) -> None:
    maps = torch.rand(SHAPE, device=device)
    kernel = backends.get(backend).pyramid
    benchmark(harness.finished(lambda: kernel(maps, LEVELS), device))


@pytest.mark.benchmark(group=f"{WHAT}: adjoint")
@pytest.mark.parametrize(("device", "backend"), harness.targets(reference=False))
def test_pyramid_adjoint(benchmark: Any, device: str, backend: str) -> None:
    module = backends.get(backend)
    upstream = module.pyramid(torch.rand(SHAPE, device=device), LEVELS)
    run = harness.finished(lambda: module.pyramid_adjoint(upstream, *SHAPE[2:]), device)
    benchmark(run)


@pytest.mark.benchmark(group=f"{WHAT}: gaussian_pyramid and its gradient")
@pytest.mark.parametrize(("device", "backend"), harness.targets())
def test_gaussian_pyramid(benchmark: Any, device: str, backend: str) -> None:
    maps = torch.rand(SHAPE, device=device, requires_grad=True)
    levels = hx.gaussian_pyramid(maps, LEVELS, backend=backend)[1:]
    upstream = [torch.ones_like(level) for level in levels]

    def run() -> object:
        levels = hx.gaussian_pyramid(maps, LEVELS, backend=backend)[1:]
        return torch.autograd.grad(levels, maps, upstream)

    benchmark(harness.finished(run, device))
