"""Which rows of a batch take the saliency path: those with a human map, where that is exact.

The saliency of a row without a human map weighs nothing in the loss, but costs as much as any
other. Left out before the forward pass it costs nothing. This changes no value and no gradient as
long as no layer lets one row's output depend on other rows; BatchNorm in training mode does.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harmonizer_ext import contract, coupling, distributed, network

CHOICES = ("auto", "mapped", "all")


@dataclass(frozen=True)
class Split:
    """A batch in two parts, by rows.

    Attributes:
        chosen: (R,) indices of the rows that take the saliency path.
        others: (B - R,) indices of the rest; or a row or two that ``inverse`` leaves out.
        inverse: (B,) that puts ``cat([chosen, others])`` back in order.
    """

    chosen: Tensor
    others: Tensor
    inverse: Tensor


_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_told_of_callables: set[str] = set()


def _tell_once(model: object, reason: str) -> None:
    roots = network.behind(model).roots
    if (roots and roots[0] in _told) or (not roots and reason in _told_of_callables):
        return
    if roots:
        _told.add(roots[0])
    else:
        _told_of_callables.add(reason)
    contract.warn(
        f'rows="auto": all rows take the saliency path, as released, because {reason}. Rows '
        f"without a human map can be left out, at a fraction of the cost, where no row depends on "
        f"others and no forward pass leaves anything behind: with BatchNorm that is frozen "
        f'(.eval()) or absent. rows="mapped" forces it, with batch statistics of each part alone'
    )


def _least(model: Any, images: Tensor | None) -> int | None:
    """The number of rows that a part must have; None where all must stay together."""
    if images is None:
        return None
    found = coupling.of(model, images)
    if found.reason is not None and found.certain:
        _tell_once(model, found.reason)
    return found.least if found.reason is None else None


def split(
    model: object,
    tokens: Tensor | None,
    rows: str,
    device: torch.device,
    multiple: int | None,
    images: Tensor | None = None,
) -> Split | None:
    """The split of a batch, or None where all rows take the saliency path.

    Args:
        model: what will be run, in its present mode.
        tokens: (B,), 0 where a row has no human map, on the CPU or on the device. On the CPU
            nothing waits for the device.
        rows: one of ``CHOICES``.
        device: where the images are.
        multiple: None for exactly the rows with a map; or the number of rows is rounded up to a
            multiple (at least one), with rows without a map, which count 0. A compiled step then
            sees few different shapes.
        images: (B, C, H, W), on which "auto" tries the model; without them all rows stay together.
    """
    if rows == "all" or tokens is None or tokens.shape[0] == 0:
        return None
    batch = tokens.shape[0]
    mapped = tokens.detach() != 0
    count = int(mapped.sum())
    # Without other rows there is nothing to try; but where a pass waits for other processes, all
    # try it in the same step.
    least: int | None = 1
    if rows == "auto" and (count < batch or distributed.runs_together(model)):
        least = _least(model, images)
    if least is None:
        return None
    if multiple is not None:
        count = min(batch, max(1, -(-count // multiple)) * multiple)
    # Every process must run as many passes as the others, whatever rows it has. One without a map
    # sends a row of weight 0 along the saliency path, as long as the others take anyway.
    if count == 0 and distributed.is_wrapped(model):
        count = 1
    # Where one row by itself is none to the network, one without a map joins it, or all do.
    if 0 < count < least:
        count = min(batch, least)
    if batch - count < least:
        count = batch
    # And one with nothing but maps runs a copy of a row as its other rows, and drops the result.
    # DistributedDataParallel needs no such copy: the other rows do not go through the wrapper.
    if count == batch and not distributed.is_wrapped(distributed.unwrapped(model)):
        return None
    order = torch.argsort(mapped, descending=True, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(batch, device=order.device)
    order, inverse = (x.to(device, non_blocking=True) for x in (order, inverse))
    return Split(order[:count], order[count:] if count < batch else order[:least], inverse)
