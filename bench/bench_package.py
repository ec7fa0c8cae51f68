"""The package's cost before the first loss: import, first call, build. A section of run.py."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness

_IMPORT = """
import json, time
started = time.perf_counter()
import torch
torch_done = time.perf_counter()
import harmonizer_ext as hx
package_done = time.perf_counter()
maps = torch.rand(1, 3, 16, 16, requires_grad=True)
hx.harmonization_loss(maps, torch.rand(1, 16, 16)).backward()
call_done = time.perf_counter()
print(json.dumps([torch_done - started, package_done - torch_done, call_done - package_done]))
"""

IMPORTS = (
    "import torch",
    "import harmonizer_ext, after torch",
    "the first loss and gradient, 1x3x16x16",
)


def measure_import(processes: int) -> list[dict[str, Any]]:
    """Rows of the record: medians over new processes, with every file in the system's cache."""
    samples = [harness.in_child(["-c", _IMPORT], exact_memory=False) for _ in range(processes + 1)][
        1:
    ]
    return [
        {"case": "import", "implementation": name}
        | harness.timing_row(harness.Timing.of([1e3 * sample[n] for sample in samples]))
        for n, name in enumerate(IMPORTS)
    ]


#: What ``pip install`` fetches for the build; where all of it is installed nothing is fetched.
_BUILD_REQUIREMENTS = ("cmake", "ninja", "pybind11", "setuptools")


def has_nvcc() -> bool:
    """Whether an installation here builds the CUDA kernels too."""
    return shutil.which("nvcc", path=f"{os.environ['PATH']}:/usr/local/cuda/bin") is not None


def measure_build(cuda: bool) -> list[dict[str, Any]]:
    """A row of the record: ``pip wheel`` of a copy of the sources, native module included.

    Args:
        cuda: with the CUDA kernels, for every GPU or those of HARMONIZER_CUDA_ARCHS.
    """
    isolated = any(importlib.util.find_spec(name) is None for name in _BUILD_REQUIREMENTS)
    with tempfile.TemporaryDirectory(prefix="harmonizer-build-") as folder:
        source = Path(folder, "source")
        ignored = shutil.ignore_patterns(
            ".*", "runs", "data", "build", "dist", "tests", "bench", "*.so", "*.egg-info"
        )
        shutil.copytree(harness.ROOT, source, ignore=ignored)
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder]
        command += [] if isolated else ["--no-build-isolation"]
        start = time.perf_counter()
        done = subprocess.run(
            [*command, str(source)],
            # Without a compiler this is an error: a wheel without kernels is not what is timed.
            env={**os.environ, "HARMONIZER_NATIVE": "1", "HARMONIZER_CUDA": str(int(cuda))},
            capture_output=True,
            text=True,
        )
        elapsed = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"the package does not build:\n{(done.stdout + done.stderr)[-4000:]}")
    tools = "its tools fetched" if isolated else "its tools installed"
    kernels = "CPU and CUDA kernels" if cuda else "CPU kernels"
    row = {"case": "build", "implementation": f"pip wheel, {kernels}, {tools}"}
    return [{**row, "quantity": "time", "unit": "s", "value": elapsed}]
