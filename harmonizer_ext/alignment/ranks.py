"""Rank correlation of batches of maps: the native kernel where it runs, PyTorch anywhere else."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from harmonizer_ext import backends

# The kernel sorts these; what fits into them without loss is converted.
_SORTED = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bool: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.uint8: torch.float32,
    torch.int8: torch.float32,
    torch.int16: torch.float32,
    torch.int32: torch.float64,
}


def widest(device: torch.device) -> torch.dtype:
    """The floating point type to sum in: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's correlation of each pair of maps, ties sharing their mean rank.

    Args:
        a: (B, H, W), any real dtype.
        b: the same shape on the same device.

    Returns:
        (B,) float64 (float32 on devices without it). NaN where a map is constant or holds a NaN.
    """
    dtypes = _SORTED.get(a.dtype), _SORTED.get(b.dtype)
    if None not in dtypes:
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        a, b = a.to(dtype), b.to(dtype)
        # Those that the variable may name besides have no kernel for this.
        wanted = os.environ.get(backends.ENVIRONMENT_VARIABLE) or "cpu"
        if a.is_cpu and wanted == "cpu" and backends.why_not("cpu", "cpu") is None:
            correlation: Tensor = backends.get("cpu").spearman(a, b)
            return correlation
    ranks_a, ranks_b = centred_midranks(a.flatten(1)), centred_midranks(b.flatten(1))
    scale = ranks_a.square().sum(1).sqrt() * ranks_b.square().sum(1).sqrt()
    return ((ranks_a * ranks_b).sum(1) / scale).clamp(-1, 1)


def centred_midranks(flat: Tensor) -> Tensor:
    """Twice the midranks of each row minus their mean, (B, N) whole numbers.

    A value's midrank is the mean of the positions it could take in the sorted row. Doubled and
    centred it is the number of values below minus the number above. All zero in a row that is
    constant or holds a NaN.
    """
    count = flat.shape[1]
    ordered, order = flat.sort(1)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    torch.ne(ordered[:, 1:], ordered[:, :-1], out=starts[:, 1:])
    ends = starts.roll(-1, 1)  # the last value ends a run as the first starts one
    place = torch.arange(count, device=flat.device)
    # Where its run of equal values starts and ends: the latest start before, the first end behind.
    below = torch.where(starts, place, 0).cummax(1).values
    not_above = torch.where(ends, place + 1, count).flip(1).cummin(1).values.flip(1)
    ranks = torch.empty_like(order).scatter_(1, order, below + not_above - count)
    # A NaN is sorted to the end.
    return ranks.masked_fill_(ordered[:, -1:].isnan(), 0).to(widest(flat.device))


def in_chunks(a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Both batches in pieces of 16 million pixels, for which sorting takes about 1 GiB."""
    rows = max(1, (1 << 24) // math.prod(a.shape[1:]))
    return list(zip(a.split(rows), b.split(rows), strict=True))
