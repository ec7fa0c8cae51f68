"""Which rows of a batch take the saliency path: those with a human map, where that is exact.

The saliency of a row without a human map weighs nothing in the loss, but costs as much as any
other. Left out before the forward pass it costs nothing. This changes no value and no gradient as
long as no layer lets one row's output depend on other rows; BatchNorm in training mode does.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harmonizer_ext import contract, distributed

CHOICES = ("auto", "mapped", "all")


def coupling_module(model: object) -> str | None:
    """Name of a module through which rows depend on each other, or None.

    Those are modules that use statistics of the batch (BatchNorm and all that keep a running
    variance, in training mode or without running statistics), and any that says so itself with a
    true attribute ``couples_rows``, on the class or on the instance.
    """
    if not isinstance(model, nn.Module):
        return None
    for name, module in model.named_modules():
        uses_batch = isinstance(module, nn.modules.batchnorm._BatchNorm) or (
            "running_var" in module._buffers
            and not isinstance(module, nn.modules.instancenorm._InstanceNorm)
        )
        if uses_batch and (module.training or module._buffers.get("running_var") is None):
            return name or type(module).__name__
        if getattr(module, "couples_rows", False):
            return name or type(module).__name__
    return None


@dataclass(frozen=True)
class Split:
    """A batch in two parts, by rows.

    Attributes:
        chosen: (R,) indices of the rows that take the saliency path.
        others: (B - R,) indices of the rest; or (1,), a row that ``inverse`` leaves out.
        inverse: (B,) that puts ``cat([chosen, others])`` back in order.
    """

    chosen: Tensor
    others: Tensor
    inverse: Tensor


_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _tell_once(model: nn.Module, name: str) -> None:
    if model not in _told:
        _told.add(model)
        contract.warn(
            f'rows="auto": all rows take the saliency path, as released, because {name} lets rows '
            f"depend on each other. Rows without a human map can be left out, at a fraction of the "
            f'cost, where BatchNorm is frozen (.eval()) or absent; rows="mapped" forces it, with '
            f"batch statistics of each part by itself"
        )


def split(
    model: object, tokens: Tensor | None, rows: str, device: torch.device, multiple: int | None
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
    """
    if rows == "all" or tokens is None or tokens.shape[0] == 0:
        return None
    if rows == "auto":
        name = coupling_module(model)
        if name is not None:
            assert isinstance(model, nn.Module)
            _tell_once(model, name)
            return None
    batch = tokens.shape[0]
    mapped = tokens.detach() != 0
    count = int(mapped.sum())
    if multiple is not None:
        count = min(batch, max(1, -(-count // multiple)) * multiple)
    # Every process must run as many passes as the others, whatever rows it has. One without a map
    # sends a row of weight 0 along the saliency path, as long as the others take anyway.
    if count == 0 and distributed.is_wrapped(model):
        count = 1
    # And one with nothing but maps runs a copy of a row as its other rows, and drops the result.
    # DistributedDataParallel needs no such copy: the other rows do not go through the wrapper.
    if count == batch and not distributed.is_wrapped(distributed.unwrapped(model)):
        return None
    order = torch.argsort(mapped, descending=True, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(batch, device=order.device)
    order, inverse = (x.to(device, non_blocking=True) for x in (order, inverse))
    return Split(order[:count], order[count:] if count < batch else order[:1], inverse)
