"""Other ways to compare a network's maps with people's: ``harmonizer_loss(alignment=...)``.

In plain PyTorch, for those who come from other code. An alignment is any callable
``(maps, heatmaps, tokens) -> (B,)``, one loss for each row; ``harmonization_loss`` with
``reduction="none"`` is another. Those here bring both maps to 0..1 first, where the published loss
standardizes them. MATH.md, section 8, defines each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from harmonizer_ext import contract
from harmonizer_ext.loss import check_graph

__all__ = [
    "Alignment",
    "BinaryCrossEntropy",
    "CosineDistance",
    "MinMaxError",
    "PixelCrossEntropy",
    "min_max",
]

#: Maps (B, C, H, W) or (B, H, W), human maps, and which rows have one; to a loss for each row.
Alignment = Callable[[Tensor, Tensor, Tensor], Tensor]

#: What probabilities are cut at, from 0 and from 1, which float32 tells from 1; MATH.md (23).
CUT = 1e-6


def min_max(maps: Tensor) -> Tensor:
    """Maps (..., H, W) brought to 0..1, each by itself; MATH.md (22).

    A constant map gives zeros and a zero gradient; one that holds NaN or infinity gives NaN.

    Args:
        maps: of a float dtype.

    Returns:
        The same shape and dtype.

    Example:
        >>> min_max(torch.tensor([[1.0, 3.0], [2.0, 5.0]]))
        tensor([[0.0000, 0.5000],
                [0.2500, 1.0000]])
    """
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    extent = high - low
    constant = extent == 0
    # The inner where keeps the infinite slope of the quotient out of the graph.
    scaled = (maps - low) / torch.where(constant, torch.ones_like(extent), extent)
    return torch.where(constant, torch.zeros_like(maps), scaled)


def _compared(
    maps: Tensor,
    heatmaps: Tensor,
    tokens: Tensor | None,
    distance: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Row losses (B,) of maps in 0..1, times the tokens; a row without a map is not read."""
    saliency = contract.canonical_saliency(maps)
    human = contract.canonical_heatmaps(heatmaps, saliency)
    dtype = contract.accumulation_dtype(saliency, human)
    weights = contract.canonical_tokens(tokens, saliency, dtype)
    check_graph(saliency)
    with torch.autocast(saliency.device.type, enabled=False):
        active = (weights != 0)[:, None, None]
        zero = torch.zeros((), dtype=dtype, device=saliency.device)
        m = torch.where(active, saliency.to(dtype).mean(1), zero)
        h = torch.where(active, human.to(dtype), zero)
        rows = distance(min_max(m), min_max(h))
        return torch.where(active[:, 0, 0], weights * rows, zero)


@dataclass(frozen=True)
class MinMaxError:
    """Mean squared error of both maps in 0..1; MATH.md (24)."""

    def __call__(self, maps: Tensor, heatmaps: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Row losses (B,), weighted by the tokens; arguments as in ``harmonization_loss``."""
        return _compared(maps, heatmaps, tokens, lambda m, h: (m - h).square().mean((-2, -1)))


@dataclass(frozen=True)
class CosineDistance:
    """One minus the cosine between both maps in 0..1; MATH.md (25).

    1 where one of them is constant, with a zero gradient.
    """

    def __call__(self, maps: Tensor, heatmaps: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Row losses (B,), weighted by the tokens; arguments as in ``harmonization_loss``."""
        return _compared(maps, heatmaps, tokens, self._distance)

    @staticmethod
    def _distance(m: Tensor, h: Tensor) -> Tensor:
        m, h = m.flatten(1), h.flatten(1)
        # A map in 0..1 that is not constant has a pixel of 1: its length is at least that.
        constant = (m.detach().amax(1) == 0) | (h.detach().amax(1) == 0)
        m = torch.where(constant[:, None], torch.ones_like(m), m)
        h = torch.where(constant[:, None], torch.ones_like(h), h)
        cosine = (m * h).sum(1) / (m.norm(dim=1) * h.norm(dim=1))
        return torch.where(constant, torch.ones_like(cosine), 1 - cosine)


@dataclass(frozen=True)
class BinaryCrossEntropy:
    """Cross entropy of each pixel, both maps in 0..1 taken for probabilities; MATH.md (26).

    Attributes:
        masked: True for the mean over the pixels where the human map in 0..1 is above 0 alone: what
            the network does elsewhere is free. 0 where there is no such pixel.
    """

    masked: bool = False

    def __call__(self, maps: Tensor, heatmaps: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Row losses (B,), weighted by the tokens; arguments as in ``harmonization_loss``."""
        return _compared(maps, heatmaps, tokens, self._distance)

    def _distance(self, m: Tensor, h: Tensor) -> Tensor:
        p = m.clamp(CUT, 1 - CUT)
        pixels = -(h * p.log() + (1 - h) * torch.log1p(-p))
        if not self.masked:
            return pixels.mean((-2, -1))
        mask = h > 0
        # NaN is no pixel above 0, and must not vanish from a row for that.
        counted = torch.where(mask | h.isnan() | m.isnan(), pixels, torch.zeros_like(pixels))
        return counted.sum((-2, -1)) / mask.sum((-2, -1)).clamp(min=1)


@dataclass(frozen=True)
class PixelCrossEntropy:
    """Cross entropy of where people look, a class among pixels, by the map as logits; MATH.md (27).

    Attributes:
        temperature: of the softmax over the pixels of the network's map in 0..1, above 0. At 1 it
            is nearly uniform whatever the map shows.
        hard: True for one pixel as the class, that of the human map's (first) maximum; False for
            all of them, each by its part of the human map's sum.

    Raises:
        ValueError: the temperature is not above 0.
    """

    temperature: float = 0.1
    hard: bool = False

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected a number above 0, got {self.temperature!r}")

    def __call__(self, maps: Tensor, heatmaps: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Row losses (B,), weighted by the tokens; arguments as in ``harmonization_loss``."""
        return _compared(maps, heatmaps, tokens, self._distance)

    def _distance(self, m: Tensor, h: Tensor) -> Tensor:
        logs, h = F.log_softmax(m.flatten(1) / self.temperature, 1), h.flatten(1)
        if self.hard:
            picked = logs.gather(1, h.argmax(1, keepdim=True)).squeeze(1)
            # A NaN is a maximum for argmax; its row is NaN here, and so is its gradient.
            one = torch.ones_like(picked)
            return -picked * torch.where(h.isnan().any(1), torch.nan * one, one)
        total = h.sum(1, keepdim=True)
        # A constant human map says nothing of where: every pixel is as good.
        uniform = torch.full_like(h, 1 / h.shape[1])
        parts = torch.where(total == 0, uniform, h / torch.where(total == 0, 1, total))
        return -(parts * logs).sum(1)
