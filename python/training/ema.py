"""The exponential moving average of a network's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


def _own(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: its shard of one that FSDP2 has sharded."""
    return getattr(tensor, "_local_tensor", tensor).detach()


class WeightAverage:
    """An average of a network's weights and of its buffers, as timm's ``ModelEmaV3``.

    Kept as plain tensors beside the network, so that it serves sharded weights too, of which each
    process averages its own part.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._model = model
        self.take()

    def take(self) -> None:
        """The weights as they are become the average."""
        self._average = {name: _own(tensor).clone() for name, tensor in self._state()}

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._model.named_parameters()
        yield from self._model.named_buffers()

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights of one more update."""
        averages, values = [], []
        for name, tensor in self._state():
            if tensor.is_floating_point():
                averages.append(self._average[name])
                values.append(_own(tensor))
            else:  # the number of batches that BatchNorm has seen
                self._average[name].copy_(_own(tensor))
        torch._foreach_lerp_(averages, values, 1 - self.decay)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The network with the average as its weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, tensor in self._state():
            kept = _own(tensor).clone()
            _own(tensor).copy_(self._average[name])
            self._average[name].copy_(kept)
