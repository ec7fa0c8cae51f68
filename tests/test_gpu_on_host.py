"""The stand-in for a GPU, in a process of its own: PyTorch asks for a GPU once in a process."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import gpu_on_host
import pytest

TESTS = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    gpu_on_host.why_not_here() is not None, reason=f"stand-in: {gpu_on_host.why_not_here()}"
)


def test_the_stand_in_computes_and_refuses_as_a_gpu() -> None:
    import cuda_ptx_on_host

    if cuda_ptx_on_host.why_not_here() is None:
        cuda_ptx_on_host.program()  # minutes, the first time
    command = [sys.executable, str(TESTS / "gpu_on_host.py"), "-m", "pytest", "-q", "--tb=short"]
    result = subprocess.run(
        [*command, "-p", "no:cacheprovider", str(TESTS / "gpu_on_host_worker.py")],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-4_000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    # No case may be lost in silence.
    assert passed is not None
    assert int(passed[1]) >= 40, result.stdout
    assert "skipped" not in result.stdout


def test_it_is_not_put_into_a_process_that_has_pytorch() -> None:
    with pytest.raises(RuntimeError, match="PyTorch is imported already; start the program with"):
        gpu_on_host.install()
