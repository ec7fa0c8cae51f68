"""The CUDA kernels as nvcc compiled them, without a GPU: their PTX, run by the project's host code.

nvcc compiles csrc/cuda as for a GPU; tests/native/ptx_runtime.cpp stands in for the CUDA runtime
library and hands every launch to the interpreter in tests/native/ptx_on_host. ``backend`` is a
backend of the package, so that the tests of every backend can take it as their target.
"""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import cuda_cases
import native_build
import ptx_on_host
from cuda_cases import Backend, Case

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "tests" / "native"

#: What the interpreter is given PTX for: Ampere, and Hopper where a source has code for its
#: clusters. All else is the same for both.
AMPERE, HOPPER = "80", "90"


def nvcc() -> str | None:
    """Path of the CUDA compiler, found as setup.py finds it, or None."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), f"{home}/bin"))
    return shutil.which(os.environ.get("CUDACXX", "nvcc"), path=path)


def why_not_here() -> str | None:
    """None if the kernels can be compiled and run on this machine, otherwise the reason."""
    if os.environ.get("HARMONIZER_CUDA") == "0":
        return "HARMONIZER_CUDA=0 asks for a build without CUDA"
    if nvcc() is None:
        return "nvcc is not installed (in the CUDA toolkit)"
    return ptx_on_host.why_not_here()


def _compile_command(source: Path) -> list[str]:
    compiler = nvcc()
    assert compiler is not None, why_not_here()
    if source.stem.startswith("loss_cluster"):
        wanted = [HOPPER]  # as CMakeLists.txt has it
    else:
        wanted = [AMPERE, HOPPER] if "__CUDA_ARCH__" in source.read_text() else [AMPERE]
    codes = [f"-gencode=arch=compute_{a},code=compute_{a}" for a in wanted]
    # As CMakeLists.txt compiles them, but that PTX is left as it is, and as text.
    return [
        *(compiler, "-std=c++17", "-O3", "-DNDEBUG", "-lineinfo", "-DHARMONIZER_CUDA_CLUSTERS"),
        *("-Xcompiler=-fPIC", "-no-compress", *codes, "-c"),
    ]


@functools.cache
def _objects() -> native_build.Objects:
    """Objects of the kernels and of what calls them; they are kept in a folder of the user's."""
    folder = Path(tempfile.gettempdir()) / f"harmonizer-cuda-ptx-{os.getuid()}"
    headers = (ROOT / "csrc").rglob("*.h"), (ROOT / "csrc").rglob("*.cuh"), NATIVE.rglob("*.h")
    return native_build.Objects(folder, itertools.chain(*headers))


@functools.cache
def program() -> Path:
    """run_cuda with nvcc's host code and PTX, built once and remembered between sessions."""
    compiler = native_build.compiler()
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    objects = [_objects().start(each, _compile_command(each)) for each in sources]
    # By nvcc, which knows where its headers are; run_cuda includes code of the kernels.
    host = [nvcc() or "", "-std=c++20", "-O2", "-Xcompiler=-fPIC,-Wall,-Wextra", "-c"]
    for name, flags in (
        ("run_cuda.cpp", [*host, "-arch=compute_90", "-x", "cu"]),
        ("ptx_runtime.cpp", host),
        ("host_device.cpp", host),
    ):
        objects.append(_objects().start(NATIVE / name, flags))
    objects += ptx_on_host.interpreter_objects()
    return _objects().link("run_cuda_ptx", [compiler], objects)


def run(
    cases: Sequence[Case],
    *,
    environment: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> list[Case]:
    """Runs cases in one process; see ``cuda_cases.run`` and tests/native/ptx_runtime.cpp."""

    def execute(
        command: Sequence[str], settings: Mapping[str, str], seconds: float
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
        )

    return cuda_cases.run(program(), cases, execute, environment=environment, timeout=timeout)


backend = Backend(lambda cases, device: run(cases, environment=device), why_not_here)
