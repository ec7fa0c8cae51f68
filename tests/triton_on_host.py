"""Executes what Triton compiled for an NVIDIA GPU on the CPU, through Triton's own launch path.

Triton asks a driver for the GPU to compile for, for loading machine code and for launching it. The
driver here answers for a GPU that is not there, and gives the PTX to the interpreter of
``ptx_on_host``. Specialization, compilation and the order of arguments are Triton's own.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ptx_on_host
import torch
import triton
from triton.backends.compiler import GPUTarget

from harmonizer_ext.backends import triton as backend

#: Bytes of shared memory that a block may have, of every GPU that is stood in for.
SHARED_BYTES = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448}

_SCALARS = {
    "i1": ctypes.c_uint8,
    "i8": ctypes.c_int8,
    "i16": ctypes.c_int16,
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "u8": ctypes.c_uint8,
    "u16": ctypes.c_uint16,
    "u32": ctypes.c_uint32,
    "u64": ctypes.c_uint64,
    "fp32": ctypes.c_float,
    "fp64": ctypes.c_double,
}


@dataclass
class Kernel:
    """One compiled kernel."""

    name: str
    ptx: str
    shared: int
    module: ptx_on_host.Module


class Driver:
    """A driver that does what Triton's driver for NVIDIA GPUs does, without a GPU.

    Attributes:
        options: how kernels are executed.
        edit: changes the PTX of a kernel before it is executed, or None.
        launched: the kernels launched so far, in order.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.options = ptx_on_host.Options()
        self.edit: Callable[[str], str] | None = None
        self.launched: list[Kernel] = []
        self.utils = self
        self._texts: dict[str, str] = {}
        self._edited: dict[str, ptx_on_host.Module] = {}

    # --- asked by Triton --------------------------------------------------------------------------

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(self.target.removeprefix("sm_")), 32)

    def get_current_device(self) -> int:
        # Triton keeps what it compiled by device: each target is one.
        return int(self.target.removeprefix("sm_"))

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES[self.target]}

    def load_started(self, module: Any, function: Any, name: str, files: Any, hash_: str) -> None:
        """Triton says where its cache holds what it made, and then loads the machine code of it."""
        self._texts[name] = Path(files[f"{name}.ptx"]).read_text()

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        text = self._texts[name]
        kernel = Kernel(name, text, shared, ptx_on_host.Module(text))
        registers, spills, most_threads = 0, 0, 1024
        return kernel, kernel, registers, spills, most_threads

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        types = list(source.signature.values())

        def launch(x: int, y: int, z: int, stream: int, kernel: Kernel, *rest: Any) -> None:
            _packed, _metadata, _enter, _exit, *arguments = rest
            # Triton keeps this function with the kernel, for whichever driver comes after this one.
            driver = triton.runtime.driver.active
            driver._launch(kernel, (x, y, z), types, arguments, metadata.num_warps)

        return launch

    # --- executing --------------------------------------------------------------------------------

    def _launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        types: list[str],
        arguments: list[Any],
        warps: int,
    ) -> None:
        self.launched.append(kernel)
        values: list[Any] = []
        tensors: list[torch.Tensor] = []
        for type_, argument in zip(types, arguments, strict=True):
            if type_ == "constexpr":
                continue
            if type_.startswith("*"):
                tensors.append(argument)
                values.append(ctypes.c_uint64(argument.data_ptr()))
            else:
                values.append(_SCALARS[type_](argument))
        module = kernel.module if self.edit is None else self._edit(kernel.ptx)
        # Behind its own, Triton adds pointers to memory for profiling and the like: none is used.
        extra = module.parameters(kernel.name) - len(values)
        values += [ctypes.c_uint64(0) for _ in range(extra)]
        with ptx_on_host.memory(*tensors):
            module.launch(
                kernel.name,
                grid,
                (32 * warps,),
                values,
                shared=kernel.shared,
                options=self.options,
            )

    def _edit(self, text: str) -> ptx_on_host.Module:
        assert self.edit is not None
        edited = self.edit(text)
        if edited not in self._edited:
            self._edited[edited] = ptx_on_host.Module(edited)
        return self._edited[edited]


def without_machine_code(*arguments: Any) -> tuple[str, str] | None:
    """Replaces ptxas, whose machine code nobody would execute; Triton calls it at two places.

    Without arguments it is asked what to put into the keys of Triton's caches, so that a GPU never
    gets what is made here.
    """
    if not arguments:
        return "ptx on host", "ptx on host"
    _backend, stages, *_ = arguments
    stages["cubin"] = lambda ptx, metadata: b"no machine code"
    return None


def install(driver: Driver) -> Callable[[], None]:
    """Makes Triton launch by this driver, until what is returned is called."""
    active, knobs = triton.runtime.driver._active, triton.knobs.runtime
    stages_hook = knobs.add_stages_inspection_hook
    triton.runtime.driver.set_active(driver)
    knobs.kernel_load_start_hook.add(driver.load_started)
    knobs.add_stages_inspection_hook = without_machine_code

    def uninstall() -> None:
        knobs.add_stages_inspection_hook = stages_hook
        knobs.kernel_load_start_hook.remove(driver.load_started)
        triton.runtime.driver._active = active

    return uninstall


@contextlib.contextmanager
def executing(target: str = "sm_90") -> Iterator[Driver]:
    """A context in which ``backend="triton"`` takes the CPU's tensors and executes compiled code.

    What ``torch.empty`` gives begins as NaN, so that what a kernel forgets to write shows.

    Args:
        target: what Triton compiles for, one of ``SHARED_BYTES``.
    """
    driver = Driver(target)
    why_not = backend.why_not
    deterministic = torch.are_deterministic_algorithms_enabled()

    def anywhere(
        device_type: str, dtype: torch.dtype | None = None, index: int | None = None
    ) -> str | None:
        return "it carries sums in float32" if dtype == torch.float64 else None

    backend.why_not = anywhere
    uninstall = install(driver)
    torch.use_deterministic_algorithms(True)  # which fills new memory with NaN
    try:
        yield driver
    finally:
        torch.use_deterministic_algorithms(deterministic)
        uninstall()
        backend.why_not = why_not
