"""gaussian_pyramid with its gradient: pytest bench/bench_pyramid.py --benchmark-only"""

from __future__ import annotations

import os
from typing import Any

# Threads that wait by spinning take the cores from whoever is measured next.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

import harmonizer_ext as hx


@pytest.mark.benchmark(group="gaussian_pyramid, 5 levels and the gradient, 32x224x224 float32")
@pytest.mark.parametrize("backend", hx.available_backends("cpu"))
def test_gaussian_pyramid(benchmark: Any, backend: str) -> None:
    maps = torch.rand(32, 224, 224, requires_grad=True)
    levels = hx.gaussian_pyramid(maps, 5, backend=backend)[1:]
    upstream = [torch.ones_like(level) for level in levels]

    def run() -> tuple[torch.Tensor, ...]:
        levels = hx.gaussian_pyramid(maps, 5, backend=backend)[1:]
        return torch.autograd.grad(levels, maps, upstream)

    benchmark(run)
