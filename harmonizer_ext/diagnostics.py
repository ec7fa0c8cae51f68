"""Diagnostics that a harmonized run should be watched by; nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from harmonizer_ext import contract
from harmonizer_ext.backends.reference import STANDARDIZE_EPSILON


def epsilon_ratio(std: Tensor, read: Tensor) -> Tensor:
    """The epsilon over the standard deviation of each row's map.

    NaN where the row was not read; infinite where its map is constant.
    """
    return torch.where(read, STANDARDIZE_EPSILON / std, torch.nan)


class EpsilonWatch:
    """Warns once in a process where the epsilon of the formula outweighs most maps.

    A standard deviation below the epsilon leaves the standardized map far smaller than one: the
    loss is small without any alignment, and falls as the network's gradients shrink. On a GPU the
    number is copied in the background and looked at in a later call.
    """

    def __init__(self) -> None:
        self.warned = False
        self._pending: tuple[Tensor, Any] | None = None

    def __call__(self, ratio: Tensor) -> None:
        """Looks at the maps of one step by their ``epsilon_ratio`` (R,)."""
        if self.warned or ratio.numel() == 0:
            return
        if ratio.device.type == "cuda":
            self._look_later(ratio)
        else:
            self._look(self._share(ratio))

    @staticmethod
    def _share(ratio: Tensor) -> Tensor:
        below = (ratio > 1).sum().float()
        return below / (~ratio.isnan()).sum().clamp(min=1)

    def _look_later(self, ratio: Tensor) -> None:
        if torch.cuda.is_current_stream_capturing():
            return
        if self._pending is not None:
            share, copied = self._pending
            if not copied.query():
                return
            self._pending = None
            self._look(share)
        else:
            share = torch.empty((), dtype=torch.float32, device="cpu", pin_memory=True)
            share.copy_(self._share(ratio), non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            self._pending = share, copied

    def _look(self, share: Tensor) -> None:
        if share.item() <= 0.5:
            return
        self.warned = True
        contract.warn(
            f"saliency: the standard deviation of most maps is below {STANDARDIZE_EPSILON:g}, the "
            f"epsilon of the standardization, so that the alignment is small whatever the maps "
            f"show, and falls as the network's gradients shrink. The usual causes: images in "
            f"0..255 instead of standardized ones; a head initialized with zeros; saturated "
            f"logits. Watch HarmonizerOutput.saliency_std"
        )


watch_epsilon = EpsilonWatch()


def gradient_norm(term: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """Norm of a term's gradient with respect to all parameters together; keeps the graph."""
    wanted = [p for p in parameters if p.requires_grad]
    if not term.requires_grad or not wanted:
        return term.detach().new_zeros(())
    grads = torch.autograd.grad(term, wanted, retain_graph=True, allow_unused=True)
    return torch.nn.utils.get_total_norm([g for g in grads if g is not None])
