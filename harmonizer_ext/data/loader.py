"""Batches from several processes, at nearly the speed at which they decode."""

from __future__ import annotations

import atexit
import functools
import signal
import time
import uuid
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from harmonizer_ext import defaults
from harmonizer_ext.clickme import ClickMeSample
from harmonizer_ext.data import shared

__all__ = ["collate", "create_loader"]

#: Of this process, when it is a worker.
_sender: shared.Sender | None = None

#: Of this process, when it is a worker: when it was first told to end.
_told_at: float | None = None

#: Seconds within which a worker that is told to end once more takes it for the same request; fewer
#: than the five that DataLoader waits for its workers before it ends them.
_SAME_REQUEST = 4.0

#: Of this process, with workers that run.
_iterators: weakref.WeakSet[Any] = weakref.WeakSet()


def collate(samples: Sequence[ClickMeSample]) -> ClickMeSample:
    """Samples of one size as a batch.

    Images that lie in memory as (H, W, 3), as decoders write them, stay so: the batch then is
    channels_last, and nothing is transposed.

    Returns:
        image (B, 3, H, W), heatmap (B, 1, H, W), label (B,) int64, token (B,) float32.

    Raises:
        ValueError: the samples differ in size or dtype.
    """
    images, heatmaps = ([getattr(s, name) for s in samples] for name in ("image", "heatmap"))
    for name, tensors in (("image", images), ("heatmap", heatmaps)):
        if len({(tensor.shape, tensor.dtype) for tensor in tensors}) > 1:
            raise shared.different_forms(name, tensors)
    if shared.interleaved(images[0]):
        image = torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
    else:
        image = torch.stack(images)
    return ClickMeSample(
        image,
        torch.stack(heatmaps),
        *shared.labels_and_tokens(
            [int(sample.label) for sample in samples], [float(sample.token) for sample in samples]
        ),
    )


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
            thread each, and leave it to this process to act on SIGINT and SIGTERM. Their batches
            lie in shared memory, which is used again when a batch is no longer referred to.
        pin_memory: for copies to a GPU that nothing waits for.
        prefetch_factor: batches that each worker prepares ahead.
    """
    # Of the workers' seeds, which nothing here uses: the program's own random numbers must not
    # depend on how often its loaders were started.
    generator = torch.Generator("cpu")
    if not workers:
        return _OrdinaryLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=collate,
            pin_memory=pin_memory,
            generator=generator,
        )
    loader = _Loader(
        _Requests(dataset),
        batch_sampler=batches,
        collate_fn=_send,
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=True,
        prefetch_factor=prefetch_factor,
        generator=generator,
    )
    # Beside those that it prepares, one that is on its way and one that the training step has.
    loader.worker_init_fn = functools.partial(_start_worker, loader.name, prefetch_factor + 2)
    return loader


class _OrdinaryLoader(DataLoader[Any]):
    """Draws the seed of its workers on the CPU, wherever tensors are made by default."""

    def __iter__(self) -> Any:
        with defaults.ordinary():
            return super().__iter__()


class _Loader(_OrdinaryLoader):
    """Its workers, and its memory in this process, last as long as its iterator."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.name = uuid.uuid4().hex

    def __iter__(self) -> Any:
        iterator = super().__iter__()
        if iterator not in _iterators:
            _iterators.add(iterator)
            weakref.finalize(iterator, shared.forget, self.name).atexit = False
        return iterator


class _Requests(Dataset[Any]):
    """A data set whose batches are read when they are written to shared memory."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, item: Any) -> Any:
        return self.dataset[item]

    def __getitems__(self, items: list[Any]) -> tuple[Dataset[Any], list[Any]]:
        return self.dataset, items


def _send(request: tuple[Dataset[Any], list[Any]]) -> Any:
    assert _sender is not None
    return _sender.send(*request)


def _start_worker(loader: str, pieces: int, number: int) -> None:
    global _sender
    _sender = shared.Sender(loader, number, pieces)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _outlive)


def _outlive(number: int, frame: Any) -> None:
    """Whoever stops a run tells all of its processes; later it is the parent's exit.

    They may be told twice at once: a batch system tells all, and torchrun passes it on.
    """
    global _told_at
    if _told_at is None:
        _told_at = time.monotonic()
    elif time.monotonic() - _told_at > _SAME_REQUEST:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


@atexit.register
def _close() -> None:
    """Workers would outlive the SIGTERM with which multiprocessing ends them at the exit."""
    for iterator in list(_iterators):
        iterator._shutdown_workers()
