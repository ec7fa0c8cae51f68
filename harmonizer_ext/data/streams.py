"""Streams of images, such as WebDataset shards, mixed with ClickMe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset

from harmonizer_ext.clickme import ClickMeSample
from harmonizer_ext.data.sources import without_map

__all__ = ["MixedStream"]


class MixedStream(IterableDataset[Any]):
    """Two streams as one, by a given ratio.

    For sources without random access: pipelines of WebDataset, streamed Hugging Face data sets. A
    stream cannot go on in the middle of an epoch after an interruption; with random access take
    ``MixedDataset``.

    Args:
        mapped: an iterable of ``ClickMeSample``, endless or not, such as a ``ClickMeWebDataset``;
            started again where it ends.
        unmapped: an iterable of images with labels, in the forms of ``sources.without_map``. The
            stream ends where it ends. Both must themselves divide their samples over processes and
            workers, as WebDataset (``nodesplitter``, ``workersplitter``) and ``datasets``
            (``split_dataset_by_node``) do.
        mapped_share: share of samples with a map. They come evenly spread: each batch has its
            share up to one.
        transform: as in ``MixedDataset``; it draws from the worker's own random numbers.
        image_key, label_key: of an ``unmapped`` that gives dictionaries.

    Raises:
        ValueError: the share is not within 0..1 (1 excluded); while iterating: ``mapped`` is empty.
    """

    def __init__(
        self,
        mapped: Iterable[ClickMeSample],
        unmapped: Iterable[Any],
        *,
        mapped_share: float = 0.2,
        transform: Callable[[ClickMeSample], ClickMeSample] | None = None,
        image_key: str = "image",
        label_key: str = "label",
    ) -> None:
        if not 0 <= mapped_share < 1:
            raise ValueError(f"mapped_share: expected 0 <= share < 1, got {mapped_share}")
        self.mapped = mapped
        self.unmapped = unmapped
        self.mapped_share = mapped_share
        self.transform = transform
        self.keys = (image_key, label_key)

    def __iter__(self) -> Iterator[ClickMeSample]:
        with_map = self._again(self.mapped)
        debt = 0.0
        for item in self.unmapped:
            sample = without_map(item, None, *self.keys)
            yield sample if self.transform is None else self.transform(sample)
            # For each sample without a map come share / (1 - share) with one.
            debt += self.mapped_share / (1 - self.mapped_share)
            while debt >= 1 - 1e-9:
                debt -= 1
                sample = next(with_map)
                yield sample if self.transform is None else self.transform(sample)

    @staticmethod
    def _again(source: Iterable[ClickMeSample]) -> Iterator[ClickMeSample]:
        while True:
            some = False
            for sample in source:
                some = True
                yield sample
            if not some:
                worker = torch.utils.data.get_worker_info()
                where = "" if worker is None else f" in worker {worker.id}"
                raise ValueError(f"mapped: expected samples, the stream is empty{where}")
