"""The floor of the suite: a copy of what the fused loss reads and writes.

    pytest bench --benchmark-only

The suite times the kernels of every backend, one by one, for developers. A saved run is what later
ones are compared with; more than a quarter slower by the median is then an error:

    pytest bench --benchmark-only --benchmark-save=before
    pytest bench --benchmark-only --benchmark-compare=0001 --benchmark-compare-fail=median:25%

The runs are in .benchmarks, which git ignores: figures of one machine at one time. Where this copy
has become slower too, it is the machine. What users compare is ``run.py``.
"""

from __future__ import annotations

from typing import Any

import bench_loss  # first of all: through harness it sets what torch reads when it is loaded

# isort: split
import harness
import pytest
import torch


@pytest.mark.benchmark(group="copy_ of what harmonization_loss moves, 32x3x224x224 float32")
@pytest.mark.parametrize("device", sorted({device for device, _ in harness.targets()}))
def test_copy(benchmark: Any, device: str) -> None:
    case = bench_loss.Case("", 32, 224, 224, torch.float32)
    copy = bench_loss.copy_call(case, device)
    benchmark(harness.finished(lambda: copy(0), device))
