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
from harmonizer_ext.clickme.dataset import SampleDataset
from harmonizer_ext.data.mixing import MixedDataset

__all__ = ["Sender", "forget"]

#: Fields begin at a multiple of it, where vector instructions want them.
_ALIGNMENT = 64

#: In the parent: the memory that it has mapped, by loader, worker and number.
_mapped: dict[str, dict[tuple[int, int], Tensor]] = {}

#: (offset in bytes, shape, dtype, whether it lies there as (B, H, W, C)) of a (B, C, H, W).
_Layout = tuple[int, tuple[int, ...], torch.dtype, bool]


class Sender:
    """The end of a worker: reads samples to shared memory.

    Args:
        loader: the name of the loader, different from any other's in the parent.
        worker: its number.
        pieces: of memory that are kept. Where the parent holds on to more batches, the others get
            memory of their own.
    """

    def __init__(self, loader: str, worker: int, pieces: int) -> None:
        self._key = loader, worker
        self._pieces: list[Tensor | None] = [None] * pieces

    def send(self, dataset: Any, items: Sequence[Any]) -> _Sent:
        """The message that the parent unpickles as a ``ClickMeSample`` of batches.

        Each sample is written to its place before the next one is read, while the processor has it
        at hand; data sets that can decode to given memory decode to that place.

        Raises:
            ValueError: the samples differ in size or dtype.
        """
        sample = dataset[items[0]]
        layouts, end = _layouts(sample, len(items))
        number, memory, new = self._take(end)
        # With the channels last, as decoders write them.
        images, heatmaps = (_view(memory, layout).movedim(1, -1).unbind() for layout in layouts)
        labels, tokens = [], []
        decodes_to_memory = isinstance(dataset, SampleDataset | MixedDataset)
        for row, (item, image, heatmap) in enumerate(zip(items, images, heatmaps, strict=True)):
            if row:
                sample = (
                    dataset.read(item, (image, heatmap)) if decodes_to_memory else dataset[item]
                )
            _write("image", sample.image, image)
            _write("heatmap", sample.heatmap, heatmap)
            labels.append(int(sample.label))
            tokens.append(float(sample.token))
        memory[-1] = 1
        content = (*self._key, number, memory if new else None, layouts, labels, tokens)
        if new and number is not None:
            self._pieces[number] = memory
        return _Sent(content)

    def _take(self, size: int) -> tuple[int | None, Tensor, bool]:
        """Memory for so many bytes: its number (None for one use), itself, whether it is new."""
        vacant = None
        for number, memory in enumerate(self._pieces):
            if memory is None:
                vacant = number
            elif not memory[-1]:  # the mark: 1 while the parent has it
                if len(memory) > size:
                    return number, memory, False
                vacant = number  # too small: the batches have grown
        storage = torch.UntypedStorage._new_shared(size + 1)
        return vacant, torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage), True


def _write(name: str, tensor: Tensor, place: Tensor) -> None:
    if tensor.data_ptr() == place.data_ptr():
        return  # decoded to it
    place = place.movedim(-1, 0)
    if tensor.shape != place.shape or tensor.dtype != place.dtype:
        raise different_forms(name, [place, tensor])
    place.copy_(tensor)


def _layouts(sample: ClickMeSample, count: int) -> tuple[list[_Layout], int]:
    """The places of image and heatmap of so many samples, and how many bytes they take."""
    layouts: list[_Layout] = []
    end = 0
    for first in (sample.image, sample.heatmap):
        offset = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = offset + count * first.numel() * first.element_size()
        layouts.append((offset, (count, *first.shape), first.dtype, interleaved(first)))
    return layouts, end


def different_forms(name: str, tensors: Sequence[Tensor]) -> ValueError:
    """The error for samples that make no batch."""
    forms = sorted({f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in tensors})
    return ValueError(
        f"samples: expected {name}s of one size and dtype, got {' and '.join(forms)}; a transform "
        "such as augmentation.training_transform makes them so"
    )


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
    return ClickMeSample(image, heatmap, *labels_and_tokens(labels, tokens))


def labels_and_tokens(labels: list[int], tokens: list[float]) -> tuple[Any, Tensor]:
    """(B,) int64 and (B,) float32, whatever the defaults of device and dtype are."""
    return (
        torch.tensor(labels, dtype=torch.int64, device="cpu"),
        torch.tensor(tokens, dtype=torch.float32, device="cpu"),
    )


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
