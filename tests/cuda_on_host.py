"""The CUDA kernels without a GPU: builds tests/native/run_cuda.cpp with their source, and runs it.

The source is compiled unchanged by the host's compiler; tests/native/cuda_on_host stands in for the
CUDA headers. There is one program for values and one for each sanitizer. ``backend`` is a backend
of the package, so that the tests of every backend can take it as their target.
"""

from __future__ import annotations

import functools
import itertools
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

import cuda_cases
import native_build
from cuda_cases import Backend, Case

ROOT = Path(__file__).resolve().parent.parent
HEADERS = ROOT / "tests" / "native" / "cuda_on_host"

#: For values; for indices.
SANITIZERS = ("", "address,undefined")

# nvcc contracts products and sums and knows no strict aliasing; so must the compiler here.
FLAGS = (
    *("-std=c++20", "-O1", "-g1", "-fno-strict-aliasing", "-ffp-contract=fast"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DHARMONIZER_CUDA_CLUSTERS"),
)

# Frames of a kernel do not leak.
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def why_not_here() -> str | None:
    """None if the kernels can be built and run on this machine, otherwise the reason."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        return "tests/native/cuda_on_host switches stacks on Linux, x86-64 or aarch64"
    if shutil.which(native_build.compiler()) is None:
        return f"no C++ compiler ({native_build.compiler()}); install one (Debian: apt install g++)"
    return None


@functools.cache
def _flags(sanitizer: str) -> tuple[str, ...]:
    flags = [*FLAGS, f"-I{HEADERS}", *native_build.fused_multiply_add()]
    if sanitizer:
        flags += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    if "address" in sanitizer:
        # What takes half of the time to compile: null pointers, which end a program anyway, checks
        # in line, and variables that live on behind their scope.
        flags += ["-fno-sanitize=null,object-size", "-fno-sanitize-address-use-after-scope"]
        flags += ["--param", "asan-instrumentation-with-call-threshold=0"]
    return tuple(flags)


class Programs:
    """Builds each program once, all in the background, and remembers objects between sessions.

    Args:
        cache: folder for objects and programs, named by what went into them.
        workers: compilers that run at once.
    """

    def __init__(self, cache: Path, workers: int = 2) -> None:
        sources = [ROOT / "csrc", ROOT / "tests" / "native"]
        headers = itertools.chain(
            *(folder.rglob(pattern) for folder in sources for pattern in ("*.h", "*.cuh"))
        )
        self._objects = native_build.Objects(cache, headers, workers)
        self.kernels = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
        self.machine = [*sorted(HEADERS.glob("*.cpp")), HEADERS.parent / "host_device.cpp"]

    def start(self) -> None:
        """Begins to build everything, the program for values first."""
        mains = [ROOT / "tests" / "native" / name for name in ("run_cuda.cpp", "harness_check.cu")]
        for sanitizer in SANITIZERS:
            for source in (*self.kernels, *mains, *self.machine):
                self._object(source, sanitizer)

    def _object(self, source: Path, sanitizer: str) -> Future[Path]:
        # Of the machine only what switches stacks has to know of a sanitizer.
        if source.suffix == ".cpp" and source.stem != "fiber":
            sanitizer = ""
        compiler = native_build.compiler()
        return self._objects.start(source, [compiler, *_flags(sanitizer), "-x", "c++", "-c"])

    def program(self, main: str, sanitizer: str = "", *, kernels: bool = True) -> Path:
        """The program of one source in tests/native, with the kernels or the launcher alone."""
        mine = self.kernels if kernels else [ROOT / "csrc" / "cuda" / "launch.cu"]
        sources = [ROOT / "tests" / "native" / main, *mine, *self.machine]
        command = [native_build.compiler(), *_flags(sanitizer)]
        objects = [self._object(source, sanitizer) for source in sources]
        return self._objects.link(Path(main).stem, command, objects)


def execute(
    command: Sequence[str | Path],
    *,
    environment: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Runs a built program; what it reports is in ``stderr``."""
    return subprocess.run(
        list(map(str, command)),
        env={**os.environ, **ENVIRONMENT, **(environment or {})},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
    )


@functools.cache
def programs() -> Programs:
    """Programs of this process; objects are kept in a folder of the user's."""
    folder = Path(tempfile.gettempdir()) / f"harmonizer-cuda-on-host-{os.getuid()}"
    return Programs(folder)


def run(
    cases: Sequence[Case],
    sanitizer: str = "",
    *,
    environment: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> list[Case]:
    """Runs cases in one process, with one of ``SANITIZERS``; see ``cuda_cases.run``."""
    return cuda_cases.run(
        programs().program("run_cuda.cpp", sanitizer),
        cases,
        lambda command, settings, seconds: execute(command, environment=settings, timeout=seconds),
        environment=environment,
        timeout=timeout,
    )


backend = Backend(lambda cases, device: run(cases, environment=device), why_not_here)
