"""How the host side cuts up work and launches it; nothing here imports Triton until a launch does.

Sizes of tiles are decided here, so that Triton's interpreter (``TRITON_INTERPRET=1``, for tests
without a GPU) can run one large program where a GPU runs many.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Float32 elements; keeps every piece of the workspace aligned for the widest load.
_ALIGNMENT = 32
#: Sizes and positions within one map are 32-bit.
_MAX_PIXELS = 2**31 - 1


@dataclass(frozen=True)
class Tuning:
    """How the work is cut up. Pixels of a tile and warps of a program, stage by stage."""

    moments: int = 2048
    moments_warps: int = 4
    #: Coarse rows times fine columns.
    columns: int = 512
    columns_warps: int = 2
    #: Pixels of level 1.
    rows: int = 256
    rows_warps: int = 2
    #: Pixels of level 1, each of which is four of level 0.
    gradient: int = 256
    gradient_warps: int = 2
    #: One program walks a whole sample here.
    coarse: int = 1024
    coarse_warps: int = 16
    #: Tiles or levels whose numbers are added at a time.
    merge: int = 64
    #: Levels of at most so many pixels are walked by one program, larger ones by many.
    coarse_pixels: int = 2**16
    #: Kernels of one program a map.
    whole_map: int = 2048
    whole_map_warps: int = 8
    #: Bytes of workspace from which on a batch is worked on in parts.
    workspace_bytes: int = 128 * 2**20


#: Each interpreted program costs some 70 ms whatever its size.
INTERPRETER = Tuning(
    moments=2**17,
    columns=2**17,
    rows=2**16,
    gradient=2**16,
    coarse=2**16,
    merge=1024,
    whole_map=2**17,
)

#: Replaced by tests and by whoever tunes; None picks by where the kernels run.
tuning: Tuning | None = None


def interpreted() -> bool:
    """Whether this process interprets its kernels, as Triton decides it."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def kernels(stem: str) -> ModuleType:
    return importlib.import_module(f"harmonizer_ext.backends.triton_kernels.{stem}")


def current() -> Tuning:
    if tuning is not None:
        return tuning
    return INTERPRETER if interpreted() else Tuning()


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device and its current stream."""
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    guard: contextlib.AbstractContextManager[Any] = torch.get_device_module(
        tensor.device.type
    ).device(tensor.device)
    return guard


def launch(kernel: Any, programs: int, *args: Any, warps: int = 4, **constants: Any) -> None:
    """Launches as many programs of a kernel."""
    # A contracted multiply-add would give the first pixel of a constant map, which every other is
    # shifted by, another last bit; kernels fuse where they say so. One stage: no load may be moved
    # ahead of a barrier.
    kernel[(programs,)](*args, **constants, num_warps=warps, num_stages=1, enable_fp_fusion=False)


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


class Tiling(NamedTuple):
    """A map cut into tiles."""

    height: int
    block_y: int
    block_x: int
    #: Tiles beside each other, and all tiles.
    tiles_x: int
    tiles: int


def tiling(height: int, width: int, pixels: int) -> Tiling:
    """Tiles of at most so many pixels that reach least beyond the map, the wider if equal.

    At least 16 columns, which are one 64-byte piece of memory, and 8 rows, because the rows above
    and below a tile are read twice. (The interpreter's tiles are whole maps, or whole rows.)
    """

    def cut(block_y: int, block_x: int) -> Tiling:
        tiles_x = ceil(width, block_x)
        return Tiling(height, block_y, block_x, tiles_x, ceil(height, block_y) * tiles_x)

    whole_y, whole_x = power_of_two(height), power_of_two(width)
    if whole_y * whole_x <= pixels:
        return cut(whole_y, whole_x)
    widths = [c for c in (256, 128, 64, 32, 16) if pixels // c >= 8 or c == 16]
    if interpreted() and whole_x <= pixels:
        widths = [whole_x]
    return min((cut(max(1, pixels // c), c) for c in widths), key=lambda t: t.tiles)


def check_pixels(name: str, height: int, width: int) -> int:
    if height * width > _MAX_PIXELS:
        raise ValueError(
            f"{name}: expected maps of at most {_MAX_PIXELS} pixels, got {height}x{width}; "
            f'take backend="reference"'
        )
    return height * width


def flat(height: int, width: int, stride_y: int, stride_x: int) -> bool:
    """Whether pixel i of a map lies at i times the stride of its columns."""
    return height == 1 or stride_y == width * stride_x


def layout(maps: Tensor) -> tuple[int, int, bool]:
    """Strides of rows and columns, columns' 1 where there is one column, and whether flat."""
    height, width = maps.shape[-2:]
    stride_y, stride_x = maps.stride()[-2:]
    if width == 1:
        stride_x = 1 if height == 1 else stride_y
    return stride_y, stride_x, flat(height, width, stride_y, stride_x)


def wide(*tensors: Tensor) -> bool:
    """Whether an offset within a plane of one of them needs 64 bits."""
    return any(
        (t.shape[-2] - 1) * t.stride(-2) + (t.shape[-1] - 1) * t.stride(-1) > _MAX_PIXELS
        for t in tensors
    )


def pieces(device: torch.device, sizes: list[int]) -> tuple[Tensor, ...]:
    """Float32 buffers out of one allocation."""
    padded = [ceil(size, _ALIGNMENT) * _ALIGNMENT for size in sizes]
    workspace = torch.empty(sum(padded), dtype=torch.float32, device=device)
    return tuple(workspace.split(padded))
