"""A small data set decoded once and kept in memory."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from harmonizer_ext.clickme import ClickMeSample
from harmonizer_ext.data.loader import collate

__all__ = ["InMemory"]


class InMemory(Dataset[Any]):
    """The samples of a data set, decoded when this is made.

    They are shared with the workers of a DataLoader.

    Args:
        dataset: map-style, of ``ClickMeSample`` of one size, without random augmentation.
        threads: that decode; None is one for each core. 1 for a ``MixedDataset`` with a transform:
            it seeds the random numbers of the whole process for each sample.

    Raises:
        ValueError: the data set is empty, or its samples differ in size.
        MemoryError: they would take more than the memory that is free.
    """

    def __init__(self, dataset: Dataset[Any], *, threads: int | None = None) -> None:
        count = len(dataset)  # type: ignore[arg-type]
        if count == 0:
            raise ValueError("dataset: expected samples, got an empty data set")
        first = dataset[0]
        size = count * sum(t.numel() * t.element_size() for t in (first.image, first.heatmap))
        free = _available()
        # Samples and the tensors that they become are there at the same time.
        if free is not None and 2 * size > free:
            raise MemoryError(
                f"dataset: expected samples that fit in {free / 2**30:.1f} GiB of free memory, "
                f"{count} of them take {2 * size / 2**30:.1f} GiB to load; leave them on disk"
            )
        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            samples = list(pool.map(dataset.__getitem__, range(count)))
        batch = collate(samples)
        self._tensors = [tensor.share_memory_() for tensor in batch]  # type: ignore[union-attr]

    def __len__(self) -> int:
        return len(self._tensors[0])

    def __getitem__(self, index: int) -> ClickMeSample:
        image, heatmap, label, token = (tensor[index] for tensor in self._tensors)
        return ClickMeSample(image, heatmap, int(label), token)


def _available() -> int | None:
    """Bytes that can be had without swapping; None where the system does not tell."""
    path = Path("/proc/meminfo")
    if not path.is_file():
        return None
    lines = (line.split() for line in path.read_text().splitlines())
    return next((int(line[1]) * 1024 for line in lines if line[0] == "MemAvailable:"), None)
