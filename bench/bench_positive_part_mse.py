"""positive_part_mse with its gradients: pytest bench/bench_positive_part_mse.py --benchmark-only"""

from __future__ import annotations

import os
from typing import Any

# Threads that wait by spinning take the cores from whoever is measured next.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

import harmonizer_ext as hx


@pytest.mark.benchmark(group="positive_part_mse and its gradients, 32x224x224 float32")
@pytest.mark.parametrize("backend", hx.available_backends("cpu"))
def test_positive_part_mse(benchmark: Any, backend: str) -> None:
    a = torch.randn(32, 224, 224, requires_grad=True)
    b = torch.randn(32, 224, 224, requires_grad=True)

    def run() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(hx.positive_part_mse(a, b, backend=backend).sum(), (a, b))

    benchmark(run)
