"""Images with human maps mixed with images without, in every batch, by a given ratio."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from harmonizer_ext.clickme import ClickMeSample
from harmonizer_ext.clickme.dataset import SampleDataset, check_on_error
from harmonizer_ext.clickme.sample import LEFT_OUT, left_out
from harmonizer_ext.data.sources import without_map
from harmonizer_ext.files.images import pillow_errors
from harmonizer_ext.files.reading import MAX_BYTES, UnreadableError, reading

__all__ = ["Draw", "MixedBatchSampler", "MixedDataset"]

_log = logging.getLogger("harmonizer_ext")


class Draw(NamedTuple):
    """One row of a batch: which image, and what its augmentation is drawn from.

    Attributes:
        mapped: whether it comes from the images with human maps.
        item: its number in its source.
        seed: of the augmentation, below 2**63.
    """

    mapped: bool
    item: int
    seed: int


class MixedDataset(Dataset[Any]):
    """Two map-style data sets as one, asked for ``Draw`` by ``Draw``.

    Args:
        mapped: gives ``ClickMeSample`` by number, as ``harmonizer_ext.clickme`` does; or None.
        unmapped: gives images with labels by number, in any of the forms of
            ``harmonizer_ext.data.sources.without_map``: an ImageFolder, a Hugging Face data set, a
            timm data set; or None. Its samples have a map of zeros and the token 0.
        transform: ``ClickMeSample -> ClickMeSample``, such as ``augmentation.training_transform``.
            It runs with PyTorch's random numbers seeded by the draw, and by nothing else: not by
            the worker or process that runs it, nor by what came before.
        image_key, label_key: of an ``unmapped`` that gives dictionaries.
        on_error: of ``unmapped``: ``"raise"``, or ``"mark"`` to give, in the place of an image that
            cannot be read, a sample of zeros with the label -1 and the token 0. It is logged, and
            its number is in ``skipped``; whoever trains or measures leaves rows with a label below
            0 out. (``mapped`` has an ``on_error`` of its own.)
        max_bytes: largest size of an image of ``unmapped`` in memory.

    Raises:
        ValueError: both data sets are None; a sample has an unknown form.
        OSError: an image without a map cannot be read; the text has its number.
    """

    def __init__(
        self,
        mapped: Dataset[Any] | None,
        unmapped: Dataset[Any] | None,
        *,
        transform: Callable[[ClickMeSample], ClickMeSample] | None = None,
        image_key: str = "image",
        label_key: str = "label",
        on_error: Literal["raise", "mark"] = "raise",
        max_bytes: int = MAX_BYTES,
    ) -> None:
        check_on_error(on_error, "raise", "mark")
        if mapped is None and unmapped is None:
            raise ValueError("mapped, unmapped: expected at least one data set, got None twice")
        self.mapped = mapped
        self.unmapped = unmapped
        self.transform = transform
        self.keys = (image_key, label_key)
        self.max_bytes = max_bytes
        # In shared memory: what a worker finds unreadable is known to all workers and the parent.
        self._unreadable: Tensor | None = None
        if on_error == "mark" and unmapped is not None:
            count = len(unmapped)  # type: ignore[arg-type]
            marks = torch.zeros(count, dtype=torch.bool, device="cpu")
            self._unreadable = marks.share_memory_()

    @property
    def skipped(self) -> list[int]:
        """Numbers of the images without a map that could not be read so far, by any worker."""
        return [] if self._unreadable is None else self._unreadable.nonzero().flatten().tolist()

    def __len__(self) -> int:
        parts: list[Any] = [self.mapped, self.unmapped]
        return sum(len(part) for part in parts if part is not None)

    def __getitem__(self, draw: Draw) -> ClickMeSample:
        return self.read(draw)

    def read(self, draw: Draw, into: tuple[Tensor, Tensor] | None = None) -> ClickMeSample:
        """A sample; ``into`` as in ``ClickMe.read``."""
        source = self.mapped if draw.mapped else self.unmapped
        if source is None:
            name = "mapped" if draw.mapped else "unmapped"
            raise IndexError(
                f"{draw}: expected a draw from a data set that is there, {name} is None"
            )
        sample: Any
        if not draw.mapped:
            sample = self._without_map(source, draw.item)
        elif self.transform is None and isinstance(source, SampleDataset):
            sample = source.read(draw.item, into)
        else:
            sample = source[draw.item]
        if self.transform is not None:
            with _seeded(draw.seed):
                sample = self.transform(sample)
        made: ClickMeSample = sample
        return made

    def _without_map(self, source: Dataset[Any], item: int) -> ClickMeSample:
        # Pillow's, which may name no file, and this package's own.
        errors: tuple[type[Exception], ...] = (OSError, SyntaxError, UnreadableError)
        try:
            return self._decoded(source, item)
        except errors + pillow_errors() as error:
            reason = str(error).removeprefix(f"unmapped: sample {item}: ")
            text = (
                f"unmapped: sample {item} cannot be read: {reason.removeprefix('cannot be read: ')}"
            )
            if self._unreadable is None:
                raise OSError(text) from error
        if not self._unreadable[item]:
            self._unreadable[item] = True
            _log.warning("left out: %s", text)
            if bool(self._unreadable.all()):
                raise OSError(f"{text}; nor can any of the {len(self._unreadable)} others")
        marked = left_out()
        return marked._replace(heatmap=marked.heatmap.float())  # as of every image without a map

    def _decoded(self, source: Dataset[Any], item: int) -> ClickMeSample:
        # Errors of a data set's own code are not those of a file, but where files are left out.
        own = contextlib.nullcontext() if self._unreadable is None else reading(f"sample {item}")
        with own:
            found = source[item]
        if isinstance(found, ClickMeSample) and found.label == LEFT_OUT:
            return found  # marked by another data set of this kind
        return without_map(found, item, *self.keys, max_bytes=self.max_bytes)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """PyTorch's random numbers on the CPU from a seed; afterwards they go on as before.

    Not ``torch.manual_seed``, which notes every call for a GPU that a worker never sees.
    """
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


class MixedBatchSampler(Sampler[list[Draw]]):
    """Batches of a fixed mixture, the same for any number of processes.

    Each source is an endless stream: its images in random order, again and again, each time in
    another order. A batch takes the next ones of both; ``mapped_share`` holds over the batches,
    and within a batch up to one image. Batch number, epoch and seed decide everything, so that a
    run goes on in the middle of an epoch as if it had never stopped.

    Args:
        mapped_size: images with human maps; 0 for none.
        unmapped_size: images without; 0 for none.
        batch_size: images of a batch over all processes. Process ``rank`` has its rows
            ``rank::world_size``; the rows with a map come first, so that processes have equally
            many of them, up to one.
        mapped_share: share of rows with a map where both kinds are given. The paper's models were
            trained with 20 % of ClickMe.
        epoch_size: images of an epoch; None is one pass over the images without a map and as many
            with one as belong to them, or one pass over the only source.
        shuffle: False takes each source in its order.
        seed: of order and augmentation.
        rank, world_size: this process among all.

    Raises:
        ValueError: no image, a share or size out of its range, or an epoch without a batch.
    """

    def __init__(
        self,
        mapped_size: int,
        unmapped_size: int,
        batch_size: int,
        *,
        mapped_share: float = 0.2,
        epoch_size: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        sizes = f"got {mapped_size} with and {unmapped_size} without a map"
        if mapped_size < 0 or unmapped_size < 0 or mapped_size + unmapped_size == 0:
            raise ValueError(f"mapped_size, unmapped_size: expected images, {sizes}")
        if not 0 <= mapped_share <= 1:
            raise ValueError(f"mapped_share: expected a number in 0..1, got {mapped_share}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 to {world_size - 1} (world_size - 1), got {rank}")
        if batch_size < world_size or batch_size % world_size:
            raise ValueError(
                f"batch_size: expected a multiple of world_size {world_size}, got {batch_size}"
            )
        if not unmapped_size:
            share = Fraction(1)
        elif not mapped_size:
            share = Fraction(0)
        else:
            share = Fraction(mapped_share).limit_denominator(1_000_000)
        if epoch_size is None:
            whole = mapped_size if share == 1 else int(unmapped_size / (1 - share))
            epoch_size = whole
        self.batches = epoch_size // batch_size
        if self.batches == 0:
            raise ValueError(
                f"batch_size: expected an epoch of at least one batch, got batches of {batch_size} "
                f"and an epoch of {epoch_size} images"
            )
        self.batch_size = batch_size
        self.mapped_share = share
        self.seed = seed
        self.shuffle = shuffle
        self._sizes = {True: mapped_size, False: unmapped_size}
        self._rank, self._world_size = rank, world_size
        self._epoch = self._start = 0
        self._orders: dict[tuple[bool, int], Tensor] = {}

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Sets what the next iteration gives: the batches of an epoch, from ``start_batch`` on."""
        if not 0 <= start_batch <= self.batches:
            raise ValueError(f"start_batch: expected 0 to {self.batches}, got {start_batch}")
        self._epoch, self._start = epoch, start_batch

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self.batches

    def __iter__(self) -> Iterator[list[Draw]]:
        first = self._epoch * self.batches
        for number in range(first + self._start, first + self.batches):
            yield self._batch(number)

    def _batch(self, number: int) -> list[Draw]:
        """This process's rows of a batch, counted from the first batch of all epochs."""
        mapped, unmapped = self._taken(True, number), self._taken(False, number)
        with_map = self._taken(True, number + 1) - mapped
        return [
            self._draw(True, mapped + row)
            if row < with_map
            else self._draw(False, unmapped + row - with_map)
            for row in range(self._rank, self.batch_size, self._world_size)
        ]

    def _taken(self, mapped: bool, batches: int) -> int:
        """Images that so many batches have taken from a stream: the share's, rounded."""
        rows = batches * self.batch_size
        with_map = int(rows * self.mapped_share + Fraction(1, 2))
        return with_map if mapped else rows - with_map

    def _draw(self, mapped: bool, position: int) -> Draw:
        walk, offset = divmod(position, self._sizes[mapped])
        index = int(self._order(mapped, walk)[offset]) if self.shuffle else offset
        return Draw(mapped, index, _mixed(self.seed, mapped, position))

    def _order(self, mapped: bool, walk: int) -> Tensor:
        """The images of a source in the order of one walk through it."""
        if (mapped, walk) not in self._orders:
            # Streams only go forward: one walk each, and the next while a batch has of both.
            self._orders = {
                key: order
                for key, order in self._orders.items()
                if key[0] != mapped or key[1] == walk - 1
            }
            generator = torch.Generator("cpu").manual_seed(_mixed(self.seed, mapped, -1 - walk))
            self._orders[mapped, walk] = torch.randperm(
                self._sizes[mapped], generator=generator, device="cpu"
            )
        return self._orders[mapped, walk]


def _mixed(*numbers: int) -> int:
    """A number below 2**63 that depends on every bit of the arguments (SplitMix64's steps)."""
    state = 0
    for number in numbers:
        state = (state ^ (number & 0xFFFFFFFFFFFFFFFF)) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1
