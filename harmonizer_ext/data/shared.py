"""Batches that go from a worker to its parent in shared memory, which is used again and again.

New shared memory costs a page fault for every 4 KiB that is written to it, and to hand it over a
connection for each tensor: together half as long as the decoding of the JPEGs takes. So a worker
keeps a few pieces of it. The parent maps each once, and marks it as free when the last tensor of a
batch is gone.
"""

from __future__ import annotations

import ctypes
import math
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from harmonizer_ext.clickme import ClickMeSample

__all__ = ["Sender", "forget"]

#: Fields begin at a multiple of it, where vector instructions want them.
_ALIGNMENT = 64

#: In the parent: the memory that it has mapped, by loader, worker and number.
_mapped: dict[str, dict[tuple[int, int], Tensor]] = {}

#: (offset in bytes, shape, dtype, whether it lies there as (B, H, W, C)) of a (B, C, H, W).
_Layout = tuple[int, tuple[int, ...], torch.dtype, bool]


class Sender:
    """The end of a worker: stacks samples in shared memory.

    Args:
        loader: the name of the loader, different from any other's in the parent.
        worker: its number.
        pieces: of memory that are kept. Where the parent holds on to more batches, the others get
            memory of their own.
    """

    def __init__(self, loader: str, worker: int, pieces: int) -> None:
        self._key = loader, worker
        self._pieces: list[Tensor | None] = [None] * pieces

    def send(self, images: Sequence[Tensor], heatmaps: Sequence[Tensor], *rest: Any) -> _Sent:
        """What the parent unpickles as a ``ClickMeSample`` of batches.

        Args:
            images, heatmaps: each of one shape and dtype.
            rest: labels and tokens as lists, sent with the message.
        """
        layouts, end = [], 0
        for tensors in (images, heatmaps):
            first = tensors[0]
            offset = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = offset + len(tensors) * first.numel() * first.element_size()
            shape = (len(tensors), *first.shape)
            layouts.append((offset, shape, first.dtype, interleaved(first)))
        number, memory, new = self._take(end)
        for layout, tensors in zip(layouts, (images, heatmaps), strict=True):
            torch.stack(tuple(tensors), out=_view(memory, layout))
        return _Sent((*self._key, number, memory if new else None, layouts, *rest))

    def _take(self, size: int) -> tuple[int | None, Tensor, bool]:
        """Memory for so many bytes: its number (None for one use), itself, whether it is new."""
        vacant = None
        for number, memory in enumerate(self._pieces):
            if memory is None:
                vacant = number
            elif not memory[-1]:  # the mark: 1 while the parent has it
                if len(memory) > size:
                    memory[-1] = 1
                    return number, memory, False
                vacant = number  # too small: the batches have grown
        storage = torch.UntypedStorage._new_shared(size + 1)
        memory = torch.empty(0, dtype=torch.uint8).set_(storage)
        memory[-1] = 1
        if vacant is not None:
            self._pieces[vacant] = memory
        return vacant, memory, True


def interleaved(image: Tensor) -> bool:
    """Whether a (C, H, W) lies in memory as (H, W, C), as decoders write it."""
    return image.shape[0] > 1 and image.stride(0) == 1


def forget(loader: str) -> None:
    """Lets go of a loader's memory; what its batches still use is freed with them."""
    _mapped.pop(loader, None)


class _Sent:
    """Pickled in the worker, a ``ClickMeSample`` when it is unpickled."""

    def __init__(self, content: tuple[Any, ...]) -> None:
        self._content = content

    def __reduce__(self) -> tuple[Callable[..., ClickMeSample], tuple[Any, ...]]:
        return _received, self._content


def _received(
    loader: str,
    worker: int,
    number: int | None,
    memory: Tensor | None,
    layouts: list[_Layout],
    labels: list[int],
    tokens: list[float],
) -> ClickMeSample:
    if number is None:
        assert memory is not None
    elif memory is None:
        memory = _mapped[loader][worker, number]
    else:
        _mapped.setdefault(loader, {})[worker, number] = memory
    lent = _lent(memory)
    image, heatmap = (_view(lent, layout) for layout in layouts)
    return ClickMeSample(image, heatmap, torch.tensor(labels), torch.tensor(tokens))  # type: ignore[arg-type]


def _lent(memory: Tensor) -> Tensor:
    """The memory as another tensor; when nothing refers to its storage, the memory is free."""
    address = memory.data_ptr()
    bytes_ = (ctypes.c_ubyte * len(memory)).from_address(address)
    mark = ctypes.c_ubyte.from_address(address + len(memory) - 1)
    # frombuffer's storage holds the buffer; the finalizer holds the memory for it.
    weakref.finalize(bytes_, _free, mark, memory, os.getpid()).atexit = False
    return torch.frombuffer(bytes_, dtype=torch.uint8)


def _free(mark: ctypes.c_ubyte, memory: Tensor, process: int) -> None:
    # A process forked from the parent lets go of its copy while the parent may still use its own.
    if os.getpid() == process:
        mark.value = 0


def _view(memory: Tensor, layout: _Layout) -> Tensor:
    offset, shape, dtype, is_interleaved = layout
    size = math.prod(shape) * dtype.itemsize
    flat = memory[offset : offset + size].view(dtype)
    if is_interleaved:
        batch, channels, height, width = shape
        return flat.view(batch, height, width, channels).permute(0, 3, 1, 2)
    return flat.view(shape)
