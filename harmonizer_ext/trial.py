"""Trials, run only to find something out: on other images, with weights moved, and put back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from harmonizer_ext import distributed, network
from harmonizer_ext.random_numbers import RandomNumbers
from harmonizer_ext.state import State

#: A pass on images that nobody took may fail in the network's own way.
FAILURES = (RuntimeError, ValueError, IndexError, AssertionError, TypeError, ArithmeticError)


class Trial:
    """The state of a network and of what is run with it, to be put back as often as one likes.

    Args:
        model: maps images to logits.
        device: of the images.
        things: callables that may keep something too.
    """

    def __init__(self, model: Any, device: torch.device, *things: Any) -> None:
        self._things = [*things, model, *network.behind(model).roots]
        #: Whether the weights may be moved: those of FSDP come and go.
        self.whole = not distributed.is_sharded(model) and not distributed.has_fsdp1(model)
        self.random = RandomNumbers(device)
        self.state = State(self._things, parameters=self.whole)

    def now(self, before: State) -> State:
        """The state as it is now; ``before`` lends the copies that still hold."""
        return State(self._things, before, parameters=self.whole)

    def put_back(self) -> None:
        self.state.put_back()
        self.random.put_back()
        torch.clear_autocast_cache()  # half-precision copies of weights that were moved


def scatter(parameters: list[nn.Parameter]) -> None:
    """Spreads what starts at one value around it: a branch that starts at zero hides its layers.

    A head of zeros gives the same logits whatever goes on before it, a scale of zero the same sum.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    for parameter in parameters:
        values = parameter.detach()
        if (
            not values.is_floating_point()
            or values.numel() == 0
            or values.layout is not torch.strided
            or not bool((values == values.flatten()[0]).all())
        ):
            continue
        spread = torch.empty(values.shape, device="cpu", dtype=torch.float32)
        spread.uniform_(0.05, 0.15, generator=generator)
        if values.numel() > 1:
            spread.mul_(torch.empty_like(spread).bernoulli_(generator=generator).mul_(2).sub_(1))
        values.data.add_(spread.to(values))


def other_images(images: Tensor) -> Tensor:
    """Other images within the same range of values: inverted, and of half the contrast."""
    low, high = images.amin(), images.amax()
    return torch.where(high > low, high - (images - low) / 2, images + 1)


def coarsest(images: Tensor, logits: Tensor) -> torch.dtype:
    """The least precise dtype that takes part, as far as that can be seen."""
    dtypes = [images.dtype, logits.dtype]
    if torch.is_autocast_enabled(images.device.type):
        dtypes.append(torch.get_autocast_dtype(images.device.type))
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
