"""Generators of random numbers, shared or a network's own: their states taken and put back."""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _accelerator(device: torch.device) -> Any:
    """The module of PyTorch that has the random numbers of a device, where it has any there."""
    module = getattr(torch, device.type, None)
    return module if device.type != "cpu" and hasattr(module, "get_rng_state") else None


_NOTHING = torch.empty(0, device="cpu")


def _array_equal(a: Any, b: Any) -> bool:
    return a is b or bool((a == b).all())


class RandomNumbers:
    """The generators that everybody shares: of PyTorch on CPU and device, of Python, of NumPy.

    Args:
        device: where a network runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._torch = torch.get_rng_state()
        accelerator = _accelerator(device)
        self._accelerator = _NOTHING if accelerator is None else accelerator.get_rng_state(device)
        self._python = random.getstate()
        numpy = sys.modules.get("numpy")
        self._numpy: Any = (None, None) if numpy is None else numpy.random.get_state()

    def again(self) -> RandomNumbers:
        """The states of now, of the same generators."""
        return RandomNumbers(self._device)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RandomNumbers):
            return NotImplemented
        return (
            torch.equal(self._torch, other._torch)
            and torch.equal(self._accelerator, other._accelerator)
            and self._python == other._python
            and self._numpy[2:] == other._numpy[2:]
            and _array_equal(self._numpy[1], other._numpy[1])
        )

    __hash__ = None  # type: ignore[assignment]

    def put_back(self) -> None:
        """The next numbers are those that came next when this was made."""
        torch.set_rng_state(self._torch)
        accelerator = _accelerator(self._device)
        if accelerator is not None:
            accelerator.set_rng_state(self._accelerator, self._device)
        random.setstate(self._python)
        if self._numpy[0] is not None:
            sys.modules["numpy"].random.set_state(self._numpy)


def generator_state(thing: Any) -> tuple[Any, Callable[[], object]] | None:
    """State of a generator of random numbers, and what puts it back; None for anything else."""
    if isinstance(thing, torch.Generator):
        state = thing.get_state()
        return state, functools.partial(thing.set_state, state)
    if isinstance(thing, random.Random):
        words = thing.getstate()
        return words, lambda: thing.setstate(words)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(
        thing, (numpy.random.Generator, numpy.random.RandomState, numpy.random.BitGenerator)
    ):
        bits = getattr(thing, "bit_generator", getattr(thing, "_bit_generator", thing))
        kept = bits.state
        return kept, lambda: setattr(bits, "state", kept)
    return None


def same_state(a: Any, b: Any) -> bool:
    """Whether two states of one generator are the same."""
    return torch.equal(a, b) if isinstance(a, Tensor) else repr(a) == repr(b)
