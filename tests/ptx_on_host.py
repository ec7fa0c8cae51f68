"""Executes PTX, as compilers made it, on the CPU: builds tests/native/ptx_on_host and speaks to it.

The interpreter takes one instruction after another of one thread after another, so that it shows
what the compiled code computes, and reports what no kernel may do: an access outside of memory that
was registered, a misaligned one, one that no barrier orders with another, a barrier that not all
reach. It knows nothing of time, of the machine code that ptxas makes of PTX, and of the orders in
which a GPU may make memory accesses visible.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import native_build
import torch

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "tests" / "native" / "ptx_on_host"

# Neither may the compiler contract what PTX rounds twice, nor call an overflow undefined.
FLAGS = (
    *("-std=c++20", "-O2", "-fwrapv", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC"),
    *("-Wall", "-Wextra"),
)

ORDERS = ("ascending", "descending", "shuffled", "interleaved")


class KernelError(RuntimeError):
    """A kernel did what no kernel may, or PTX has what the interpreter does not know."""


@dataclass(frozen=True)
class Options:
    """How kernels are executed.

    Attributes:
        order: of threads and blocks, one of ``ORDERS``; the last two are drawn from ``seed``.
        races: whether two accesses that no barrier orders are an error.
        count: whether to count instructions and accesses; ``counts`` returns them.
        clusters: how many clusters (or blocks) of a grid are executed; 0 is all of them.
    """

    order: str = "ascending"
    seed: int = 1
    races: bool = True
    count: bool = False
    clusters: int = 0


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32),
        ("dynamic_shared_bytes", ctypes.c_uint64),
    )


class _Options(ctypes.Structure):
    _fields_ = (
        ("order", ctypes.c_int32),
        ("races", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("seed", ctypes.c_uint64),
        ("clusters", ctypes.c_uint64),
    )


def why_not_here() -> str | None:
    """None if the interpreter can be built on this machine, otherwise the reason."""
    if platform.system() != "Linux":
        return "tests/native/ptx_on_host is built on Linux"
    if shutil.which(native_build.compiler()) is None:
        return f"no C++ compiler ({native_build.compiler()}); install one (Debian: apt install g++)"
    return None


@functools.cache
def _objects() -> native_build.Objects:
    """Objects of this process; they are kept in a folder of the user's."""
    folder = Path(tempfile.gettempdir()) / f"harmonizer-ptx-on-host-{os.getuid()}"
    return native_build.Objects(folder, SOURCES.glob("*.h"))


def interpreter_objects() -> list[Any]:
    """The interpreter's objects, being compiled."""
    command = [native_build.compiler(), *FLAGS, *native_build.fused_multiply_add(), "-c"]
    return [_objects().start(source, command) for source in sorted(SOURCES.glob("*.cpp"))]


@functools.cache
def _library() -> ctypes.CDLL:
    path = _objects().link(
        "ptx_on_host.so", [native_build.compiler(), "-shared"], interpreter_objects()
    )
    library = ctypes.CDLL(str(path))
    library.ptx_load.restype = library.ptx_parameters.restype = ctypes.c_int64
    library.ptx_parameters.argtypes = (ctypes.c_int64, ctypes.c_char_p)
    library.ptx_error.restype = library.ptx_counts.restype = ctypes.c_char_p
    library.ptx_launch.argtypes = (
        ctypes.c_int64,
        ctypes.c_char_p,
        ctypes.POINTER(_Launch),
        ctypes.POINTER(_Options),
        ctypes.POINTER(ctypes.c_void_p),
    )
    library.ptx_register_memory.argtypes = (ctypes.c_void_p, ctypes.c_uint64)
    library.ptx_forget_memory.argtypes = (ctypes.c_void_p,)
    return library


def _checked(result: int) -> int:
    if result < 0:
        raise KernelError(_library().ptx_error().decode(errors="replace"))
    return result


def three(numbers: Sequence[int]) -> tuple[int, int, int]:
    """A grid or a block of up to three dimensions, as three."""
    x, y, z = (*numbers, 1, 1)[:3]
    return x, y, z


class Module:
    """PTX that has been read.

    Args:
        text: a module's text.

    Raises:
        KernelError: it has something that the interpreter does not know, which is named.
    """

    def __init__(self, text: str) -> None:
        self._number = _checked(_library().ptx_load(text.encode()))

    def parameters(self, kernel: str) -> int:
        """How many parameters a kernel has."""
        return _checked(_library().ptx_parameters(self._number, kernel.encode()))

    def launch(
        self,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[Any],
        *,
        shared: int = 0,
        cluster: int = 1,
        options: Options = Options(),
    ) -> None:
        """Executes a grid.

        Args:
            kernel: its name in the PTX.
            grid, block: up to three sizes each.
            arguments: values of ctypes, one for every parameter.
            shared: bytes of dynamic shared memory of a block.
            cluster: blocks of a cluster.
            options: how to execute it.

        Raises:
            KernelError: the kernel did what no kernel may.
        """
        wanted = self.parameters(kernel)
        if len(arguments) != wanted:
            raise ValueError(f"{kernel}: expected {wanted} arguments, got {len(arguments)}")
        launch = _Launch(three(grid), three(block), cluster, shared)
        chosen = _Options(
            ORDERS.index(options.order),
            options.races,
            options.count,
            options.seed,
            options.clusters,
        )
        pointers = (ctypes.c_void_p * max(len(arguments), 1))(
            *(ctypes.addressof(argument) for argument in arguments)
        )
        result = _library().ptx_launch(
            self._number, kernel.encode(), ctypes.byref(launch), ctypes.byref(chosen), pointers
        )
        _checked(result)


@contextlib.contextmanager
def memory(*tensors: torch.Tensor) -> Iterator[None]:
    """Lets kernels access the whole storages of some tensors, and nothing else beside others'."""
    storages = {
        storage.data_ptr(): storage.nbytes() for t in tensors if (storage := t.untyped_storage())
    }
    for address, size in storages.items():
        _library().ptx_register_memory(address, size)
    try:
        yield
    finally:
        for address in storages:
            _library().ptx_forget_memory(address)


def counts() -> dict[str, Any]:
    """Counts since the last call, by kernel; csrc of the interpreter's count.h says of what.

    ``instructions`` are pairs for each category: executed by threads, and issued by warps.
    """
    found: dict[str, Any] = json.loads(_library().ptx_counts())
    return found


# --- changing PTX --------------------------------------------------------------------------------

#: What makes threads wait for each other, or lets them go on.
_BARRIER = re.compile(
    r"(?:@!?%p\d+\s+)?(?:bar|barrier)(?:\.\w+)*\.(?:sync|arrive|wait)(?:\.\w+)*[^;]*;"
    r"|(?:@!?%p\d+\s+)?mbarrier\.(?:arrive|test_wait|try_wait)[^;]*;"
)


def kernel_text(text: str, kernel: str) -> str:
    """A module with one of its kernels alone, so that it is read in no time."""
    starts = [match.start() for match in re.finditer(r"^[^\n]*\.entry ", text, re.MULTILINE)]
    (start,) = (at for at in starts if re.match(rf"[^\n]*\.entry {kernel}\(", text[at:]))
    later = [at for at in starts if at > start]
    end = later[0] if later else len(text)
    tables = re.search(r"^\s*\.(file|section)\b", text[start:end], re.MULTILINE)
    if tables is not None:
        end = start + tables.start()
    files = "\n".join(re.findall(r"^\s*\.file[^\n]*", text, re.MULTILINE))
    return f"{text[: starts[0]]}{text[start:end]}\n{files}\n"


def without_each_barrier(text: str) -> Iterator[tuple[str, str]]:
    """(description, text) for every barrier, which the text then lacks.

    The two halves of a split barrier are taken out together: one alone is an error by itself. Who
    no longer waits at an mbarrier goes on as if all had arrived.
    """
    found = list(_BARRIER.finditer(text))
    for i, match in enumerate(found):
        line = text.count("\n", 0, match.start()) + 1
        what = match[0]
        cut = [match.span()]
        if "barrier.cluster.wait" in what:
            continue  # with its arrival
        if "barrier.cluster.arrive" in what:
            waits = [m for m in found[i:] if "barrier.cluster.wait" in m[0]]
            cut.append(waits[0].span())
        instead = ""
        if "try_wait" in what or "test_wait" in what:
            predicate = re.search(r"\s(\S+?),", what)
            assert predicate is not None
            instead = f"setp.eq.u32 {predicate[1]}, 0, 0;"
        edited = text
        for begin, end in reversed(cut):
            edited = edited[:begin] + instead + edited[end:]
        yield f"line {line}: {what}", edited
