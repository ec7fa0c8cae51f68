"""standardize_cut with its gradient: pytest bench/bench_standardize.py --benchmark-only"""

from __future__ import annotations

import os
from typing import Any

# Threads that wait by spinning take the cores from whoever is measured next.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

import harmonizer_ext as hx


@pytest.mark.benchmark(group="standardize_cut and its gradient, 32x224x224 float32")
@pytest.mark.parametrize("backend", hx.available_backends("cpu"))
def test_standardize_cut(benchmark: Any, backend: str) -> None:
    maps = torch.randn(32, 224, 224, requires_grad=True)
    upstream = torch.rand(32, 224, 224)

    def run() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(hx.standardize_cut(maps, backend=backend), maps, upstream)

    benchmark(run)
