"""Budgets of what the compiled kernels of the loss execute: a change that costs is seen.

Counts of PTX, with the gradient, three channels, float32, five levels; bench/count_gpu.py says what
each is, and docs/benchmark.md has them all. A change that passes a budget is either a mistake or a
decision: then the table changes with it.
"""

from __future__ import annotations

import functools
from typing import Any

import count_gpu
import cuda_paths
import cuda_ptx_on_host
import pytest

pytestmark = pytest.mark.skipif(
    cuda_ptx_on_host.why_not_here() is not None,
    reason=f"cuda ptx on host: {cuda_ptx_on_host.why_not_here()}",
)

#: Another release of nvcc or Triton may take another instruction here and there.
ROOM = 1.03
#: (path, size, formulation): issue slots and bytes of global memory a pixel, and wavefronts of
#: shared memory over the ideal.
BUDGETS = {
    ("cuda 112/2x4, sm_90", 112, "released"): (98.9, 20.1, 1.55),
    ("cuda 224/4x2, sm_90", 224, "released"): (94.7, 20.1, 1.44),
    ("cuda 112/2x3, sm_90", 112, "paper"): (227.1, 20.1, 1.67),
    ("cuda 224/8x3, sm_90", 224, "paper"): (318.4, 20.1, 1.64),
    ("cuda general, sm_80", 224, "released"): (217.4, 60.8, 1.78),
    ("cuda general, sm_80", 224, "paper"): (281.6, 59.8, 1.71),
    ("triton, sm_90", 224, "released"): (268.6, 110.0, 1.0),
    ("triton, sm_90", 224, "paper"): (310.1, 124.6, 1.0),
}
#: Sectors of global memory over the ideal: every byte that the clusters read is read once.
MOST_SECTORS = {"cuda 1": 1.01, "cuda 2": 1.01, "cuda general": 1.1, "triton": 1.5}


@functools.cache
def _triton(size: int) -> dict[str, dict[str, Any]]:
    pytest.importorskip("triton", reason="triton is not installed")
    rows = count_gpu.triton_rows((size,), ("sm_90",))
    return {row["formulation"]: row for row in rows}


def _counted(path: str, size: int, formulation: str) -> dict[str, Any]:
    if path.startswith("triton"):
        return _triton(size)[formulation]
    number, device = -1, "ampere"
    if "general" not in path:
        name = path.removeprefix("cuda ").partition(",")[0]
        (number,) = (
            variant.number
            for variant in cuda_paths.variants(cuda_ptx_on_host.run)
            if (variant.name, variant.size, variant.formulation) == (name, size, formulation)
        )
        device = "hopper"
    case = count_gpu.loss_case(size, formulation, number)
    return count_gpu.per_pixel(count_gpu.cuda_counts(case, device), size**2)


@pytest.mark.parametrize(("path", "size", "formulation"), BUDGETS)
def test_budgets(path: str, size: int, formulation: str) -> None:
    slots, size_in_bytes, wavefronts = BUDGETS[path, size, formulation]
    counted = _counted(path, size, formulation)
    assert counted["issue slots"] <= slots * ROOM
    moved = counted["global bytes read"] + counted["global bytes written"]
    assert moved <= size_in_bytes * ROOM
    assert counted["wavefronts over ideal"] <= wavefronts * ROOM
    (most,) = (value for start, value in MOST_SECTORS.items() if path.startswith(start))
    assert counted["sectors over ideal"] <= most
