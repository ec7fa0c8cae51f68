"""Batches from several processes, with as few copies as PyTorch's DataLoader allows."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from harmonizer_ext.clickme import ClickMeSample

__all__ = ["collate", "create_loader"]


def collate(samples: Sequence[ClickMeSample]) -> ClickMeSample:
    """Samples of one size as a batch.

    Images that lie in memory as (H, W, 3), as decoders write them, stay so: the batch then is
    channels_last, and nothing is transposed. In a worker it is written to shared memory at once.

    Returns:
        image (B, 3, H, W), heatmap (B, 1, H, W), label (B,) int64, token (B,) float32.

    Raises:
        ValueError: the samples differ in size or dtype.
    """
    for name in ("image", "heatmap"):
        forms = {(tuple(t.shape), t.dtype) for t in (getattr(s, name) for s in samples)}
        if len(forms) > 1:
            raise ValueError(
                f"samples: expected {name}s of one size and dtype, got "
                f"{' and '.join(f'{shape} {dtype}' for shape, dtype in sorted(forms, key=str))}; a "
                "transform such as augmentation.training_transform makes them so"
            )
    images = [sample.image for sample in samples]
    interleaved = images[0].stride(0) == 1 and images[0].shape[0] > 1
    if interleaved:
        images = [image.permute(1, 2, 0) for image in images]
    stacked = _stack(images)
    return ClickMeSample(
        stacked.permute(0, 3, 1, 2) if interleaved else stacked,
        _stack([sample.heatmap for sample in samples]),
        torch.tensor([sample.label for sample in samples]),  # type: ignore[arg-type]
        torch.tensor([float(sample.token) for sample in samples]),
    )


def _stack(tensors: list[Tensor]) -> Tensor:
    """``torch.stack``, in shared memory where a worker calls it."""
    if get_worker_info() is None:
        return torch.stack(tensors)
    first = tensors[0]
    size = len(tensors) * first.numel() * first.element_size()
    storage = torch.UntypedStorage._new_shared(size)
    out = torch.empty(0, dtype=first.dtype).set_(storage, 0, (len(tensors), *first.shape))
    return torch.stack(tensors, out=out)


def create_loader(
    dataset: Dataset[Any],
    batches: Iterable[list[Any]],
    *,
    workers: int,
    pin_memory: bool = False,
    prefetch_factor: int = 2,
) -> DataLoader[Any]:
    """A DataLoader of ``ClickMeSample`` batches.

    Args:
        dataset: map-style.
        batches: what to ask it for, batch by batch, such as a ``MixedBatchSampler``. It is
            iterated anew for each epoch, in this process.
        workers: processes that decode; 0 decodes here. They live on from epoch to epoch, use a
            thread each, and leave SIGINT and SIGTERM to this process.
        pin_memory: for copies to a GPU that nothing waits for.
        prefetch_factor: batches that each worker prepares ahead.
    """
    return DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        prefetch_factor=prefetch_factor if workers else None,
        worker_init_fn=_start_worker,
    )


def _start_worker(number: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _outlive)


def _outlive(number: int, frame: Any) -> None:
    """Whoever stops a run tells all of its processes; the second time it is the parent's exit."""
    signal.signal(number, signal.SIG_DFL)
