"""The machine that runs CUDA kernels on the CPU: what it computes, and what it must notice."""

from __future__ import annotations

import cuda_on_host as host
import pytest

pytestmark = pytest.mark.skipif(
    host.why_not_here() is not None, reason=f"cuda on host: {host.why_not_here()}"
)


def _check(sanitizer: str, *arguments: str, **environment: str) -> tuple[int, str]:
    program = host.programs().program("harness_check.cu", sanitizer, kernels=False)
    result = host.execute([program, *arguments], environment=environment)
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize("sanitizer", host.SANITIZERS)
def test_machine(sanitizer: str) -> None:
    assert _check(sanitizer) == (0, "")
    if not sanitizer:
        assert _check(sanitizer, HARMONIZER_REVERSE="1") == (0, "")


@pytest.mark.parametrize(
    ("mistake", "sanitizer", "report"),
    [
        ("unwritten_shared", "", ""),
        ("misaligned", "", "is not aligned to the 16 bytes accessed at once"),
        ("two_places", "", "but others who must take part are at"),
        ("missing_lanes", "", "names lanes that do not exist, the warp has 00000001"),
        ("exited_lane", "", "lanes 00000008 have exited"),
        ("deadlock", "", "deadlock:\n  1 threads wait in __syncthreads at"),
        ("mbarrier_uninitialized", "", "what is used as an mbarrier was not initialized"),
        ("mbarrier_overrun", "", "more arrivals at an mbarrier than the 1 that it is for"),
        ("mbarrier_deadlock", "", "deadlock:\n  64 threads wait in mbarrier_wait at"),
        ("threads", "", "threads: invalid configuration argument (1025 threads in a block)"),
        ("grid", "", "grid: invalid configuration argument (grid of 1 by 65536 by 1)"),
        ("shared", "", "shared: invalid argument (232449 bytes of shared memory"),
        ("cluster", "", "cluster: invalid configuration argument (3 blocks in clusters of 2)"),
        ("behind_shared", "address,undefined", "heap-buffer-overflow"),
        ("late_neighbour", "address,undefined", "heap-use-after-free"),
    ],
)
def test_machine_notices(mistake: str, sanitizer: str, report: str) -> None:
    status, output = _check(sanitizer, mistake)
    assert status != 0
    assert report in output
