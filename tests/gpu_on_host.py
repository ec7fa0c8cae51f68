"""A stand-in for a GPU: PyTorch's device "cuda" on the CPU, for programs and tests made for a GPU.

    python tests/gpu_on_host.py bench/bench_gpu.py --quick --output /tmp/rows.json
    python tests/gpu_on_host.py -m pytest tests/test_gpu.py -k graph

The program runs unchanged. Its tensors say ``cuda:0`` and hold values: operations of PyTorch are
executed by the CPU's kernels on the same memory, those of this package by an interpreter of the
PTX that nvcc and Triton make (``cuda_ptx_on_host``, ``triton_on_host``). Streams and events are
numbers, because everything is executed at once and in order. While a CUDA graph is captured nothing
is executed, what is computed is not a number until the graph is replayed, and what CUDA refuses is
refused: waiting for the device, reading a value, copying from memory that is not pinned. Two
devices in one operation are an error.

It stands for no GPU in two respects: its times mean nothing, and ``torch.compile`` compiles
nothing. Nothing chooses it by itself; whoever wants it starts a program with it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import platform
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

import native_build

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "tests" / "native" / "gpu_on_host.cpp"

#: Whether a process runs on the stand-in; its records say so and keep no figures.
VARIABLE = "HARMONIZER_STAND_IN"


def why_not_here() -> str | None:
    """None if the stand-in can be built and started on this machine, otherwise the reason."""
    if platform.system() != "Linux":
        return f"it is for Linux, this is {platform.system()}"
    if shutil.which(native_build.compiler()) is None:
        return f"no C++ compiler ({native_build.compiler()}); install one (Debian: apt install g++)"
    missing = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]
    return f"pip install {' '.join(missing)}" if missing else None


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _build() -> Path:
    """The library of ``SOURCE`` for the PyTorch of this interpreter, built once."""
    torch = _torch_folder()
    folder = Path(tempfile.gettempdir()) / f"harmonizer-gpu-on-host-{os.getuid()}"
    objects = native_build.Objects(folder, [torch / "version.py"])
    command = [native_build.compiler(), "-std=c++20", "-O1", "-fPIC", "-Wall", "-Wextra"]
    compiled = objects.start(SOURCE, [*command, "-isystem", str(torch / "include"), "-c"])
    # PyTorch's own libraries are in the process already when it is loaded.
    return objects.link("gpu_on_host.so", [native_build.compiler(), "-shared"], [compiled])


@functools.cache
def install() -> None:
    """Makes the device "cuda" of this process the stand-in.

    Raises:
        RuntimeError: PyTorch is imported already and may have been asked for a GPU, or something is
            missing, which the message names.
    """
    reason = why_not_here()
    if reason is None and "torch" in sys.modules:
        reason = "PyTorch is imported already; start the program with tests/gpu_on_host.py"
    if reason is not None:
        raise RuntimeError(f"the stand-in for a GPU: {reason}")
    os.environ[VARIABLE] = "1"
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as bench/harness.py wants it
    ctypes.CDLL(str(_torch_folder() / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(_build()))
    library.gpu_on_host_hooks()
    import gpu_on_host_runtime

    library.gpu_on_host_guard()
    gpu_on_host_runtime.install(library)
    import gpu_on_host_kernels

    gpu_on_host_kernels.install()


def main() -> None:
    """Runs ``PROGRAM ARGUMENTS`` or ``-m MODULE ARGUMENTS`` as Python would, on the stand-in."""
    if len(sys.argv) < 2 or sys.argv[1:] == ["-m"]:
        sys.exit("usage: python tests/gpu_on_host.py (PROGRAM | -m MODULE) [ARGUMENTS]")
    install()
    del sys.argv[0]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        sys.path.insert(0, "")
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    # A second copy of this module, under its own name, is what others would import.
    sys.modules["gpu_on_host"] = sys.modules["__main__"]
    main()
