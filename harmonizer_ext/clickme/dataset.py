"""Map-style reading: preprocessing, transform, and what happens to a record that is unreadable."""

from __future__ import annotations

import abc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .released import Preprocess, check_preprocess, preprocess_sample
from .sample import ClickMeSample, left_out

__all__ = ["OnError", "SampleDataset", "check_on_error"]

OnError = Literal["raise", "skip", "mark"]

_log = logging.getLogger("harmonizer_ext")


def check_on_error(on_error: OnError, *allowed: str) -> None:
    if on_error not in allowed:
        *others, last = map('"{}"'.format, allowed)
        raise ValueError(f"on_error must be {', '.join(others)} or {last}, got {on_error!r}")


class SampleDataset(Dataset[Any], abc.ABC):
    """Samples by number. Subclasses read one, and say where it lies."""

    def __init__(
        self,
        length: int,
        preprocess: Preprocess,
        transform: Callable[[ClickMeSample], Any] | None,
        on_error: OnError,
    ) -> None:
        check_preprocess(preprocess)
        check_on_error(on_error, "raise", "skip", "mark")
        self.preprocess = preprocess
        self.transform = transform
        self._length = length
        self._marks = on_error == "mark"
        # In shared memory: what a worker finds unreadable is known to all workers and the parent.
        self._unreadable = (
            torch.zeros(length, dtype=torch.bool, device="cpu").share_memory_()
            if on_error != "raise"
            else None
        )

    @abc.abstractmethod
    def locate(self, index: int) -> tuple[Path, int]:
        """The file of a sample, and the byte in it where its record begins."""

    @abc.abstractmethod
    def _read(self, index: int, into: tuple[Tensor, Tensor] | None) -> ClickMeSample:
        """The stored sample; ValueError, with file and offset, where it is unreadable."""

    def label(self, index: int) -> int:
        """The label of a sample, of which no more is read and checked than it takes.

        Raises:
            ValueError: it is unreadable; also where such samples are skipped.
        """
        return self._read(self._checked(index), None).label

    @property
    def skipped(self) -> list[tuple[Path, int]]:
        """The records left out so far, by this process or its workers: file and offset."""
        if self._unreadable is None:
            return []
        return [self.locate(index) for index in self._unreadable.nonzero().flatten().tolist()]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        return self.read(index)

    def read(self, index: int, into: tuple[Tensor, Tensor] | None = None) -> Any:
        """A sample.

        Args:
            index: its number.
            into: memory for image and heatmap, each with the channels last, as decoders write
                them. What is returned as it is decoded, and has the form of this memory, is decoded
                to it; the rest is elsewhere, as without it.
        """
        if self.transform is not None:
            into = None  # what it is given may not be what it returns
        sample = preprocess_sample(self._load(self._checked(index), into), self.preprocess)
        return sample if self.transform is None else self.transform(sample)

    def _checked(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} samples")
        return index % len(self)

    def _load(self, index: int, into: tuple[Tensor, Tensor] | None) -> ClickMeSample:
        if self._unreadable is None:
            return self._read(index, into)
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            if self._unreadable[candidate]:
                if self._marks:
                    return left_out()
                continue
            try:
                return self._read(candidate, into)
            except ValueError as error:
                self._unreadable[candidate] = True
                way = "" if self._marks else ", the next readable record takes its place"
                _log.warning("left out%s: %s", way, error)
                if self._marks:
                    return left_out()
        raise ValueError(f"none of the {len(self)} samples is readable; see the log for each")
