"""Alignment over a whole data set, batch by batch and on any number of processes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from .metrics import checked_pair, overlap, pearson, reduce_resolution, spearman
from .scores import AlignmentValues

METRICS = ("spearman", "pearson", "dice", "iou")


class AlignmentMeter:
    """Collects metrics over batches and processes; keeps a few numbers per image, and no map.

    ::

        meter = AlignmentMeter(reducers=(1, 4, 16))
        for number, images, human, labels in loader:
            meter.update(explain(images, labels), human, indices=number)
        result = meter.compute()            # on every process, the same
        result.score().score                # relative to the human ceiling
        result.summaries()["dice/4"].mean   # at a quarter of the resolution

    Undefined numbers, of a pair with a constant map or a NaN, are NaN here and excluded from every
    mean, and counted there. (Dice and IoU of a constant map are 0, as released.)

    The chance level is what the maps of other images reach:
    ``meter.update(model_maps, human_maps.roll(1, 0))``.

    Args:
        metrics: which of ``"spearman"``, ``"pearson"``, ``"dice"``, ``"iou"``.
        reducers: at which resolutions: ``reduce_resolution`` of both maps by each of these. The
            evaluation of the paper has 1, 4 and 16.
        percentile: of Dice and IoU.
        process_group: whose processes ``compute`` gathers from; None is the default group, where
            there is one.

    Raises:
        ValueError: there is no such metric; ``metrics`` or ``reducers`` is empty or says something
            twice.
    """

    def __init__(
        self,
        *,
        metrics: Sequence[str] = ("spearman", "dice", "iou"),
        reducers: Sequence[int] = (1,),
        percentile: float = 10,
        process_group: Any = None,
    ) -> None:
        for name, chosen in (("metrics", metrics), ("reducers", reducers)):
            if isinstance(chosen, str) or not chosen or len(set(chosen)) != len(chosen):
                raise ValueError(f"{name} must be a sequence of different values, got {chosen!r}")
        unknown = set(metrics) - set(METRICS)
        if unknown:
            raise ValueError(f"metrics: expected some of {METRICS}, got {tuple(metrics)}")
        self.metrics = tuple(metrics)
        self.reducers = tuple(reducers)
        self.percentile = percentile
        self.process_group = process_group
        self.reset()

    def __deepcopy__(self, memo: dict[int, Any]) -> AlignmentMeter:
        """A meter of its own, of the same processes."""
        if self.process_group is not None:
            memo[id(self.process_group)] = self.process_group
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __copy__(self) -> AlignmentMeter:
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        # Batches that one takes from now on are not the other's.
        twin._values, twin._indices = list(self._values), list(self._indices)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group is not None:
            raise TypeError(
                "process_group: expected None in an AlignmentMeter that is saved, got one, which "
                "lives in this process alone; save the result of compute()"
            )
        return self.__dict__.copy()

    def reset(self) -> None:
        """Forgets every image."""
        self._values: list[Tensor] = []
        self._indices: list[Tensor] = []

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the values: ``"spearman"`` at full size, ``"spearman/4"`` and so on."""
        return tuple(
            metric if reducer == 1 else f"{metric}/{reducer}"
            for reducer in self.reducers
            for metric in self.metrics
        )

    @torch.no_grad()
    def update(
        self, model_maps: Tensor, human_maps: Tensor, *, indices: Tensor | None = None
    ) -> None:
        """Adds a batch. Nothing waits for the device.

        Args:
            model_maps: (B, H, W) or (B, 1, H, W), any real dtype.
            human_maps: the same B, H and W, in either form, on the same device.
            indices: (B,) whole numbers, which images of the data set these are. An image that
                comes twice then counts once, such as those that ``DistributedSampler`` repeats to
                give all processes as many, and the result does not depend on how images were
                shared out. With every batch or with none.

        Raises:
            TypeError: a map is no real tensor, or ``indices`` no tensor of integers.
            ValueError: the shapes or devices do not fit, or ``indices`` came with an earlier batch
                and not with this one, or the other way around.
        """
        model_maps, human_maps = checked_pair(
            model_maps, human_maps, names=("model_maps", "human_maps")
        )
        if self._values and (indices is None) is bool(self._indices):
            raise ValueError(
                "indices must be given with every batch or with none, got "
                f"{'none' if indices is None else 'some'} after {len(self._values)} batches "
                f"{'without' if indices is not None else 'with'}; reset() starts anew"
            )
        if indices is not None:
            _check_indices(indices, len(model_maps))
        values = []
        for reducer in self.reducers:
            pair = reduce_resolution(model_maps, reducer), reduce_resolution(human_maps, reducer)
            values += self._measure(*pair)
        self._values.append(torch.stack(values))
        if indices is not None:
            self._indices.append(indices.detach())

    def _measure(self, a: Tensor, b: Tensor) -> list[Tensor]:
        results = {}
        if "spearman" in self.metrics:
            results["spearman"] = spearman(a, b)
        if "pearson" in self.metrics:
            results["pearson"] = pearson(a, b)
        if "dice" in self.metrics or "iou" in self.metrics:
            counts = overlap(a, b, self.percentile)
            results |= {"dice": counts.dice(), "iou": counts.iou()}
        return [results[metric] for metric in self.metrics]

    def compute(self, *, gather: bool = True) -> AlignmentValues:
        """Every metric of every image so far. More batches may follow.

        Args:
            gather: from all processes of the group, which must all call this, with different
                numbers of images or none. False: of this process alone.

        Raises:
            RuntimeError: the processes have meters of different settings, or some were given
                indices and others not.
        """
        values = (
            torch.cat([v.cpu().double() for v in self._values], 1)
            if self._values
            else torch.empty(len(self.names), 0, dtype=torch.float64, device="cpu")
        )
        indices = torch.cat([i.cpu().long() for i in self._indices]) if self._indices else None
        if gather and torch.distributed.is_available() and torch.distributed.is_initialized():
            values, indices = self._gather(values, indices)
        if indices is not None:
            indices, first = _first_of_each(indices)
            values = values[:, first]
        return AlignmentValues(dict(zip(self.names, values, strict=True)), indices)

    def _gather(self, values: Tensor, indices: Tensor | None) -> tuple[Tensor, Tensor | None]:
        parts: list[Any] = [None] * torch.distributed.get_world_size(self.process_group)
        settings = (self.names, self.percentile)
        torch.distributed.all_gather_object(
            parts, (settings, values, indices), group=self.process_group
        )
        if any(part[0] != settings for part in parts):
            raise RuntimeError(
                "AlignmentMeter: expected the same metrics, reducers and percentile on every "
                f"process, got {[part[0] for part in parts]}"
            )
        filled = [(v, i) for _, v, i in parts if v.shape[1]]
        numbered = [i for _, i in filled if i is not None]
        if len(numbered) not in (0, len(filled)):
            raise RuntimeError(
                "AlignmentMeter: expected indices on every process or on none, got them on "
                f"{len(numbered)} of {len(filled)} processes with images"
            )
        if filled:
            values = torch.cat([v for v, _ in filled], 1)
        return values, torch.cat(numbered) if numbered else None


def _check_indices(indices: Tensor, batch: int) -> None:
    whole = isinstance(indices, Tensor) and not (
        indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool
    )
    if not whole:
        got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"indices must be a tensor of integers, got {got}")
    if indices.shape != (batch,):
        raise ValueError(
            f"indices must have the shape ({batch},), one for each map, got {tuple(indices.shape)}"
        )


def _first_of_each(indices: Tensor) -> tuple[Tensor, Tensor]:
    """The different indices, ascending, and where each comes first."""
    ordered, order = indices.sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return ordered[first], order[first]
