"""The Triton backend without a GPU: refused by name, and usable in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import harmonizer_ext as hx
from harmonizer_ext import backends

WORKER = Path(__file__).parent / "triton_worker.py"

#: What NumPy 2.4 says to the interpreter of Triton 3.6, at every loop of a length not known before.
NUMPY_TOO_NEW = "only 0-dimensional arrays can be converted to Python scalars"


def _interpreter(*command: str) -> subprocess.CompletedProcess[str]:
    # Triton reads the variable where a kernel is defined: it has to be there before any import.
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=WORKER.parent,
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="this process is an interpreter itself"
)
def test_refused_on_the_cpu_with_the_reason() -> None:
    assert "triton" not in hx.available_backends("cpu")
    with pytest.raises(
        RuntimeError, match=r"backend='triton' cannot run on a cpu tensor: it runs on GPUs; move"
    ):
        hx.standardize_cut(torch.ones(2, 2), backend="triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_no_gpu_is_a_reason() -> None:
    reason = backends.why_not("triton", "cuda")
    assert reason is not None
    assert reason.startswith(("PyTorch sees no cuda device", "triton is not installed"))


def test_float64_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed, which is the first reason")
    assert backends.why_not("triton", "cuda", torch.float32) is None
    reason = backends.why_not("triton", "cuda", torch.float64)
    assert reason is not None
    assert "float64" in reason


def test_importing_the_package_needs_no_triton() -> None:
    # None in sys.modules is how Python spells a module that cannot be imported.
    program = (
        "import sys; sys.modules['triton'] = None; import harmonizer_ext as hx; "
        "from harmonizer_ext import backends; hx.available_backends('cuda'); "
        "assert 'pip install triton' in backends.why_not('triton', 'cuda'); "
        "assert 'harmonizer_ext.backends.triton_kernels.statistics' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_interpreted_kernels_agree_with_reference() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    pytest.importorskip("numpy", reason="Triton's interpreter runs on NumPy")
    probe = _interpreter(str(WORKER))
    if NUMPY_TOO_NEW in probe.stderr:
        pytest.skip("Triton's interpreter cannot run with this NumPy (3.6 needs one below 2.4)")
    assert probe.returncode == 0, probe.stderr
    result = _interpreter(
        "-m", "pytest", str(WORKER), "-q", "--tb=short", "-p", "no:cacheprovider", "--durations=8"
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-4_000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    # No case may be lost in silence.
    assert passed is not None
    assert int(passed[1]) == 5, result.stdout
    assert "skipped" not in result.stdout
