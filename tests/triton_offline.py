"""Compiles, without a GPU, what the host side of the Triton backend launches; reads the cubins.

``launches`` runs the host code on meta tensors and records every launch, so that what is compiled
are the kernels, types, constants and tiles that a GPU would be given, and nothing is listed twice.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from harmonizer_ext.backends import triton as backend
from harmonizer_ext.backends.triton_kernels import launch as host

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
_POINTERS[torch.float64] = "*fp64"


@dataclass
class Launch:
    """One launch: the kernel, how often, and what Triton would compile it for."""

    kernel: Any
    programs: int
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: list[str]
    warps: int

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    @property
    def key(self) -> tuple[Any, ...]:
        return (
            self.name,
            self.warps,
            *sorted(self.signature.items()),
            *sorted(self.constants.items()),
            *self.divisible,
        )


def _record(kernel: Any, programs: int, args: tuple[Any, ...], constants: dict[str, Any]) -> Launch:
    """Specializes as Triton does: an integer of 1 is a constant, a multiple of 16 known as such."""
    warps = constants.pop("warps", 4)
    signature: dict[str, str] = {}
    folded: dict[str, Any] = {}
    divisible: list[str] = []
    for parameter, value in zip(kernel.params, args, strict=False):
        name = parameter.name
        if isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                divisible.append(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[name], folded[name] = "constexpr", 1
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                divisible.append(name)
    for name, value in constants.items():
        signature[name], folded[name] = "constexpr", value
    order = [parameter.name for parameter in kernel.params]
    assert sorted(signature) == sorted(order), (
        f"{kernel.fn.__name__}: {set(order) ^ set(signature)}"
    )
    signature = {name: signature[name] for name in order}
    return Launch(kernel, programs, signature, folded, divisible, warps)


def launches(call: Callable[[], object]) -> list[Launch]:
    """The launches that ``call``, on meta tensors, would make."""
    recorded: list[Launch] = []

    def record(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
        recorded.append(_record(kernel, programs, args, constants))

    launch, device = host.launch, host.device_guard
    host.launch = record  # type: ignore[assignment]
    host.device_guard = lambda tensor: torch.no_grad()  # type: ignore[assignment]
    try:
        call()
    finally:
        host.launch, host.device_guard = launch, device
    return recorded


def compile_for(launch: Launch, target: GPUTarget) -> Any:
    order = list(launch.signature)
    source = ASTSource(
        fn=launch.kernel,
        signature=launch.signature,
        constexprs={(order.index(name),): value for name, value in launch.constants.items()},
        attrs={(order.index(name),): [["tt.divisibility", 16]] for name in launch.divisible},
    )
    options = {"num_warps": launch.warps, "num_stages": 1, "enable_fp_fusion": False}
    return triton.compile(source, target=target, options=options)


def _tool(name: str) -> str:
    (path,) = Path(triton.__file__).parent.rglob(f"bin/{name}")
    return str(path)


@dataclass
class Resources:
    registers: int
    stack: int
    shared: int


def resources(compiled: Any) -> Resources:
    """Registers a thread, bytes of stack (spills) a thread and of shared memory a program."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [_tool("cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    assert found is not None, text
    registers, stack, _, local = map(int, found.groups())
    # Triton asks for its shared memory at launch, which the cubin does not know.
    return Resources(registers, max(stack, local), compiled.metadata.shared)


def disassemble(compiled: Any) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [_tool("cuobjdump"), "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def maps(
    height: int, width: int, dtype: torch.dtype, batch: int = 64, channels: int = 3
) -> torch.Tensor:
    """Maps without values, (B, C, H, W)."""
    return torch.empty(batch, channels, height, width, dtype=dtype, device="meta")


def loss_launches(
    formulation: str, dtype: torch.dtype, size: int = 224, batch: int = 64, distance: str = "mse"
) -> list[Launch]:
    """The launches of the whole loss, with its gradient, at five levels."""
    saliency = maps(size, size, dtype, batch)
    weights = torch.empty(batch, device="meta")
    return launches(
        lambda: backend.harmonization(
            saliency, saliency[:, 0].contiguous(), weights, formulation, 5, distance, True
        )
    )


def building_block_launches(dtype: torch.dtype, size: int = 224) -> list[Launch]:
    """The launches of every building block and of its derivative."""
    x = maps(size, size, dtype)
    a = x[:, 0].contiguous()
    rows = torch.empty(a.shape[0], device="meta")

    def call() -> None:
        levels = backend.pyramid(x, 3)
        backend.pyramid_adjoint(levels, size, size)
        backend.standardize_cut(x)
        backend.standardize_cut_backward(x, x)
        backend.positive_part_mse(a, a)
        backend.positive_part_mse_backward(rows, a, a)

    return launches(call)
