"""An oracle for the gradient of the alignment through any explanation.

The maps of an explanation are a function of the parameters, ``m(theta)``. With the loss's gradient
at the maps, ``v``, held fixed, the gradient of the alignment is that of ``<v, m(theta)>``. Along
random directions it is compared with central differences of the maps, which take no derivative of
the explanation. (Forward-mode differentiation would not do: it takes what is detached for constant,
as double backward does.)
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

Gradients = dict[str, Tensor]

#: A run of the explanation on the copy in float64, always from the same state.
Run = Callable[[], Tensor]

#: Steps of the differences, relative to the parameters' size; two that agree have met no kink.
STEPS = (1e-5, 1e-6, 1e-7)

_DIRECTIONS = 2


@contextlib.contextmanager
def _in_place_of(model: nn.Module, values: Gradients) -> Iterator[None]:
    """The module's parameters replaced by tensors, wherever they are used from."""
    kept: list[tuple[nn.Module, str, nn.Parameter | None]] = []
    tensors = {id(p): values[name] for name, p in model.named_parameters() if name in values}
    try:
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if id(parameter) in tensors:
                    kept.append((module, name, parameter))
                    module._parameters[name] = tensors[id(parameter)]  # type: ignore[assignment]
        yield
    finally:
        for module, name, parameter in kept:
            module._parameters[name] = parameter


def _directions(parameters: Gradients, seed: int) -> Gradients:
    """A random direction for each parameter, of the parameter's own size."""
    generator = torch.Generator("cpu").manual_seed(seed)
    sizes = {name: float(p.square().mean().sqrt()) for name, p in parameters.items() if p.numel()}
    usual = max(sizes.values(), default=1.0) or 1.0
    return {
        name: (sizes.get(name) or 0.1 * usual)
        * torch.randn(p.shape, generator=generator, dtype=torch.float64, device="cpu").to(p)
        for name, p in parameters.items()
    }


def _along(gradients: Gradients, directions: Gradients) -> float:
    return float(sum((gradients[n] * d).sum() for n, d in directions.items()))


def _size(gradients: Gradients, directions: Gradients) -> float:
    """The expected size of a derivative along a random direction, without its sign."""
    total = float(sum((gradients[n] * d).square().sum() for n, d in directions.items()))
    return math.sqrt(total)


Derivative = Callable[[Gradients], float]


class Oracle:
    """Derivatives of the maps along directions in the space of parameters.

    Args:
        model: the copy in float64.
        run: its explanation's maps, without a graph.
        parameters: by name, the trained ones.
        pull: ``v``, the loss's gradient at the maps.
    """

    def __init__(self, model: nn.Module, run: Run, parameters: Gradients, pull: Tensor) -> None:
        self._model = model
        self._run = run
        self.parameters = parameters
        self._pull = pull

    def _value(self, directions: Gradients, step: float) -> Tensor:
        moved = {n: self.parameters[n] + step * d for n, d in directions.items()}
        # They want a gradient, as parameters do: an explanation may ask for that of a layer.
        with _in_place_of(self._model, {n: p.requires_grad_() for n, p in moved.items()}):
            return self._run().detach()

    def by_difference(self, directions: Gradients, step: float) -> float:
        """``(m(theta + step d) - m(theta - step d)) / 2 step``, and ``v`` times it."""
        apart = self._value(directions, step) - self._value(directions, -step)
        return float((apart * self._pull).sum() / (2 * step))


def _worst(
    derivative: Derivative, exact: Gradients, directions: Gradients, allowed: float
) -> tuple[float, str]:
    """Largest relative error and its parameter: of all at once, of each where they do not agree."""
    whole = max(_size(exact, directions), abs(derivative(directions)))
    if whole == 0:
        return 0.0, next(iter(exact))
    wrong = abs(derivative(directions) - _along(exact, directions)) / whole
    found = wrong, max(exact, key=lambda n: float((exact[n] * directions[n]).square().sum()))
    if wrong <= allowed:
        return found
    alone = {n: derivative({n: d}) - _along(exact, {n: d}) for n, d in directions.items()}
    name = max(alone, key=lambda n: abs(alone[n]))
    return max(found[0], abs(alone[name]) / whole), name


def compare(
    oracle: Oracle, exact: Gradients, allowed: float, seed: int
) -> tuple[tuple[float, str] | str, float]:
    """The differences against the gradient of double backward.

    Returns:
        The largest error relative to the derivative's size, with the parameter that it is largest
        in, or why there is none; and how well the differences are known.
    """
    found: list[tuple[float, str]] = []
    known = 0.0
    for number in range(_DIRECTIONS):
        directions = _directions(oracle.parameters, seed + number)
        step, apart = _smooth_step(oracle, directions)
        if step is None:
            reason = f"not defined: no two steps agree, the closest to {apart:.0e}; the explanation"
            return reason + " has kinks or is too steep", apart
        known = max(known, apart)
        derivative = functools.partial(oracle.by_difference, step=step)
        found.append(_worst(derivative, exact, directions, max(allowed, 10 * apart)))
    return max(found), known


def _smooth_step(oracle: Oracle, directions: Gradients) -> tuple[float | None, float]:
    """The first step that agrees with one ten times as long to 1e-5, and to what they agree."""
    closest = float("inf")
    long = oracle.by_difference(directions, STEPS[0])
    for step in STEPS[1:]:
        short = oracle.by_difference(directions, step)
        size = max(abs(long), abs(short))
        apart = abs(long - short) / size if size else 0.0
        if apart <= 1e-5:
            return step, apart
        closest, long = min(closest, apart), short
    return None, closest
