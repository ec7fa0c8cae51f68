"""The CUDA kernels without a GPU: builds tests/native/run_cuda.cpp with their source, and runs it.

The source is compiled unchanged by the host's compiler; tests/native/cuda_on_host stands in for the
CUDA headers. There is one program for values and one for each sanitizer. As a module this is also a
backend of the package, so that the tests of every backend can take it as their target.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import io
import itertools
import os
import platform
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from harmonizer_ext import contract

ROOT = Path(__file__).resolve().parent.parent
HEADERS = ROOT / "tests" / "native" / "cuda_on_host"

#: For values; for indices; for races and barriers.
SANITIZERS = ("", "address,undefined", "thread")

# nvcc contracts products and sums and knows no strict aliasing; so must the compiler here.
FLAGS = (
    *("-std=c++20", "-O1", "-g1", "-fno-strict-aliasing", "-ffp-contract=fast"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DHARMONIZER_CUDA_CLUSTERS"),
)

# Frames of a kernel do not leak; a thread of the GPU needs little history to report a race.
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=0",
    "TSAN_OPTIONS": "halt_on_error=1 history_size=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}

# The order of csrc/harmonizer.h.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FORMULATIONS = ("released", "paper")
DISTANCES = ("mse", "l2")


def why_not_here() -> str | None:
    """None if the kernels can be built and run on this machine, otherwise the reason."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        return "tests/native/cuda_on_host switches stacks on Linux, x86-64 or aarch64"
    if shutil.which(_compiler()) is None:
        return f"no C++ compiler ({_compiler()}); install one (Debian: apt install g++)"
    return None


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


@functools.cache
def _flags(sanitizer: str) -> tuple[str, ...]:
    flags = [*FLAGS, f"-I{HEADERS}"]
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine() == "x86_64" and " fma " in cpuinfo.read_text():
        flags.append("-mfma")
    if sanitizer:
        flags += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    if "address" in sanitizer:
        # What takes half of the time to compile: null pointers, which end a program anyway, checks
        # in line, and variables that live on behind their scope.
        flags += ["-fno-sanitize=null,object-size", "-fno-sanitize-address-use-after-scope"]
        flags += ["--param", "asan-instrumentation-with-call-threshold=0"]
    return tuple(flags)


@functools.cache
def _launcher() -> tuple[str, ...]:
    # ThreadSanitizer of older compilers does not know where newer kernels put things.
    setarch = shutil.which("setarch")
    if setarch is None:
        return ()
    command = (setarch, platform.machine(), "-R")
    allowed = subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if allowed else ()


class Programs:
    """Builds each program once, all in the background, and remembers objects between sessions.

    Args:
        cache: folder for objects and programs, named by what went into them.
        workers: compilers that run at once.
    """

    def __init__(self, cache: Path, workers: int = 2) -> None:
        self.cache = cache
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in cache.iterdir():  # of sources that have changed since
            if time.time() - path.stat().st_mtime > 7 * 24 * 3600:
                path.unlink(missing_ok=True)
        self._pool = ThreadPoolExecutor(workers)
        self._objects: dict[tuple[Path, str], Future[Path]] = {}
        sources = [ROOT / "csrc", ROOT / "tests" / "native"]
        headers = itertools.chain(
            *(folder.rglob(pattern) for folder in sources for pattern in ("*.h", "*.cuh"))
        )
        self._headers = b"".join(path.read_bytes() for path in sorted(headers))
        self.kernels = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
        self.machine = sorted(HEADERS.glob("*.cpp"))

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
        if (source, sanitizer) not in self._objects:
            self._objects[source, sanitizer] = self._pool.submit(self._compile, source, sanitizer)
        return self._objects[source, sanitizer]

    def _compile(self, source: Path, sanitizer: str) -> Path:
        flags = _flags(sanitizer)
        compiler = subprocess.run([_compiler(), "--version"], capture_output=True).stdout
        name = hashlib.sha256(
            repr(flags).encode() + compiler + self._headers + source.read_bytes()
        ).hexdigest()[:24]
        target = self.cache / f"{source.stem}-{name}.o"
        if not target.exists():
            self._make([*flags, "-x", "c++", "-c", str(source)], target)
        return target

    def _make(self, arguments: list[str], target: Path) -> None:
        # Whole or not at all: another process may build the same.
        with tempfile.TemporaryDirectory(dir=self.cache) as folder:
            made = Path(folder) / target.name
            command = [_compiler(), *arguments, "-o", str(made)]
            result = subprocess.run(command, capture_output=True, text=True)
            assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr[:4000]}"
            made.replace(target)

    def program(self, main: str, sanitizer: str = "", *, kernels: bool = True) -> Path:
        """The program of one source in tests/native, with the kernels or the launcher alone."""
        mine = self.kernels if kernels else [ROOT / "csrc" / "cuda" / "launch.cu"]
        sources = [ROOT / "tests" / "native" / main, *mine, *self.machine]
        objects = [self._object(source, sanitizer) for source in sources]
        paths = [str(future.result()) for future in objects]
        name = hashlib.sha256("".join(paths).encode()).hexdigest()[:24]
        target = self.cache / f"{Path(main).stem}-{name}"
        if not target.exists():
            self._make([*_flags(sanitizer), *paths], target)
        return target


def execute(
    command: Sequence[str | Path],
    *,
    environment: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Runs a built program; what it reports is in ``stderr``."""
    return subprocess.run(
        [*_launcher(), *map(str, command)],
        env={**os.environ, **ENVIRONMENT, **(environment or {})},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
    )


@dataclass
class Case:
    """One call of an operation of ``harmonizer::cuda``."""

    operation: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    options: dict[str, int] = field(default_factory=dict)


def _write_text(file: io.BytesIO, text: str) -> None:
    data = text.encode()
    file.write(struct.pack("<q", len(data)) + data)


def _write_case(file: io.BytesIO, case: Case) -> None:
    _write_text(file, case.operation)
    file.write(struct.pack("<q", len(case.options)))
    for name, number in case.options.items():
        _write_text(file, name)
        file.write(struct.pack("<q", number))
    file.write(struct.pack("<q", len(case.tensors)))
    for name, tensor in case.tensors.items():
        _write_text(file, name)
        tensor = tensor.detach()
        sizes, strides = tensor.shape, tensor.stride()
        last = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        count = last + 1 if tensor.numel() else 0
        # All that the strides reach and nothing else, as far from an aligned address as it was.
        data = ctypes.string_at(tensor.data_ptr(), count * tensor.element_size())
        offset = tensor.data_ptr() % 256
        numbers = (DTYPES.index(tensor.dtype), len(sizes), *sizes, *strides, offset, len(data))
        file.write(struct.pack(f"<{len(numbers)}q", *numbers) + data)


def _read_number(file: io.BufferedIOBase) -> int:
    return int(struct.unpack("<q", file.read(8))[0])


def _read_text(file: io.BufferedIOBase) -> str:
    return file.read(_read_number(file)).decode()


def _read_case(file: io.BufferedIOBase) -> Case:
    case = Case(_read_text(file))
    for _ in range(_read_number(file)):
        name = _read_text(file)
        case.options[name] = _read_number(file)
    for _ in range(_read_number(file)):
        name = _read_text(file)
        dtype = DTYPES[_read_number(file)]
        dimensions = _read_number(file)
        sizes = [_read_number(file) for _ in range(dimensions)]
        for _ in range(dimensions + 1):  # strides and offset: outputs are dense
            _read_number(file)
        data = bytearray(file.read(_read_number(file)))
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        case.tensors[name] = flat.reshape(sizes)
    return case


@functools.cache
def programs() -> Programs:
    """Those of this process; objects are kept in a folder of the user's."""
    folder = Path(tempfile.gettempdir()) / f"harmonizer-cuda-on-host-{os.getuid()}"
    return Programs(folder)


def run(
    cases: Sequence[Case],
    sanitizer: str = "",
    *,
    environment: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> list[Case]:
    """Runs cases in one process.

    Args:
        cases: what to run; the strides of the tensors are part of it.
        sanitizer: one of ``SANITIZERS``.
        environment: settings of tests/native/cuda_on_host.
        timeout: seconds.

    Returns:
        For each case its outputs, by name.

    Raises:
        AssertionError: a kernel could not be launched, did something that CUDA leaves undefined, or
            a sanitizer reported something.
    """
    file = io.BytesIO()
    file.write(struct.pack("<q", len(cases)))
    for case in cases:
        _write_case(file, case)
    program = programs().program("run_cuda.cpp", sanitizer)
    with tempfile.TemporaryDirectory() as folder:
        given, results = Path(folder) / "cases", Path(folder) / "results"
        given.write_bytes(file.getvalue())
        result = execute([program, given, results], environment=environment, timeout=timeout)
        assert result.returncode == 0, (
            f"[{sanitizer or 'no sanitizer'}] exit status {result.returncode}\n"
            f"{result.stderr[:6000]}"
        )
        with results.open("rb") as answers:
            outputs = [_read_case(answers) for _ in range(_read_number(answers))]
    for output in outputs:
        assert not output.operation, output.operation
    return outputs


def same_bits(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Whether two cases have the same outputs to the bit."""
    return got.keys() == expected.keys() and all(
        torch.equal(got[name].view(torch.uint8), expected[name].view(torch.uint8)) for name in got
    )


# --- as a backend of the package -----------------------------------------------------------------

#: Number of the loss' specialization; 0 lets it choose, -1 is the general path.
variant = 0
#: The device, as settings of tests/native/cuda_on_host; see ``DEVICES``.
device: Mapping[str, str] = {}

#: Devices that take other paths through the kernels than an H200, the default. No GPU has as little
#: shared memory and cache as the last: it takes at small sizes the paths that are there for large
#: ones.
DEVICES: dict[str, dict[str, str]] = {
    "hopper": {},
    "turing": {
        "HARMONIZER_HOST_ARCH": "75",
        "HARMONIZER_HOST_MULTIPROCESSORS": "40",
        "HARMONIZER_HOST_SHARED": "65536",
        "HARMONIZER_HOST_L2": "4194304",
    },
    "tiny": {
        "HARMONIZER_HOST_ARCH": "80",
        "HARMONIZER_HOST_MULTIPROCESSORS": "2",
        "HARMONIZER_HOST_SHARED": "6144",
        "HARMONIZER_HOST_L2": "65536",
    },
}


def _run_one(case: Case) -> dict[str, Tensor]:
    (result,) = run([case], environment=device)
    return result.tensors


def why_not(
    device_type: str, dtype: torch.dtype | None = None, index: int | None = None
) -> str | None:
    """None if the kernels run on this device (and dtype), otherwise the reason."""
    if device_type != "cpu":
        return "it runs CUDA kernels on the CPU"
    if dtype == torch.float64:
        return "the kernels compute in float32"
    return why_not_here()


def loss_case(
    saliency: Tensor,
    heatmaps: Tensor,
    weights: Tensor,
    formulation: str = "released",
    levels: int = 5,
    distance: str = "mse",
    with_gradient: bool = True,
    variant: int = 0,
    prefetch: int = 0,
) -> Case:
    """A call of the loss: (B, C, H, W), (B, H, W) and (B,)."""
    weights = weights.to(contract.accumulation_dtype(saliency, heatmaps)).contiguous()
    options = {
        "levels": levels,
        "formulation": FORMULATIONS.index(formulation),
        "distance": DISTANCES.index(distance),
        "with_gradient": int(with_gradient),
        "variant": variant,
        "prefetch": prefetch,
    }
    return Case("loss", {"saliency": saliency, "heatmaps": heatmaps, "weights": weights}, options)


def harmonization(
    saliency: Tensor,
    heatmaps: Tensor,
    weights: Tensor,
    formulation: str,
    levels: int,
    distance: str,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row losses (B,), unit gradient (B, 1, H, W) or (0,), saliency std (B,)."""
    maps = (saliency, heatmaps, weights)
    case = loss_case(*maps, formulation, levels, distance, with_gradient, variant)
    outputs = _run_one(case)
    return outputs["rows"], outputs.get("gradient", saliency.new_empty(0)), outputs["saliency_std"]


def pyramid(maps: Tensor, levels: int) -> list[Tensor]:
    """Levels 1 to levels-1 of (B, C, H, W)."""
    outputs = _run_one(Case("pyramid", {"maps": maps}, {"levels": levels}))
    return [outputs[f"level{level}"] for level in range(1, levels)]


def pyramid_adjoint(gradients: list[Tensor], height: int, width: int) -> Tensor:
    """Adjoint of ``pyramid``: (B, C, H, W) from the gradients of its outputs."""
    named = {f"gradient{level}": gradient for level, gradient in enumerate(gradients, 1)}
    return _run_one(Case("pyramid_adjoint", named, {"height": height, "width": width}))["output"]


def standardize_cut(maps: Tensor) -> Tensor:
    """(B, C, H, W) to the same shape and dtype."""
    return _run_one(Case("standardize", {"maps": maps}))["output"]


def standardize_cut_backward(grad: Tensor, maps: Tensor) -> Tensor:
    """Gradient with respect to ``maps``, in their dtype."""
    return _run_one(Case("standardize", {"maps": maps, "grad": grad}))["output"]


def positive_part_mse(a: Tensor, b: Tensor) -> Tensor:
    """(B,) from two (B, H, W)."""
    return _run_one(Case("positive_part_mse", {"a": a, "b": b}))["rows"]


def positive_part_mse_backward(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients with respect to ``a`` and ``b``, each in its own dtype."""
    grad = grad.to(contract.accumulation_dtype(a, b)).contiguous()
    outputs = _run_one(Case("positive_part_mse", {"a": a, "b": b, "grad": grad}))
    return outputs["grad_a"], outputs["grad_b"]
