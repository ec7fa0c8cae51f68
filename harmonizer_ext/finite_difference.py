"""The alignment's gradient without a second derivative: two forward passes to either side.

The gradient of the alignment is the derivative of the scores' gradient along ``v``, the gradient of
the loss with respect to the maps (MATH.md (18)). Here it is a central difference of two ordinary
gradients (MATH.md (19)): it needs first derivatives only, and is as good as the network is smooth.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harmonizer_ext import (
    contract,
    coupling,
    distributed,
    double_backward,
    network,
    vanishing,
)
from harmonizer_ext.fingerprint import Fingerprint, Memory
from harmonizer_ext.random_numbers import RandomNumbers
from harmonizer_ext.saliency import Targets, checked_logits, input_gradient, target_scores

_log = logging.getLogger("harmonizer_ext")


@dataclass(frozen=True)
class FiniteDifference:
    """``second_order=FiniteDifference(...)``: the options of ``second_order="finite_difference"``.

    Attributes:
        step: root mean square of the displacement of each image, in standard deviations of the
            batch's pixels; None is the cube root of the rounding unit of the dtype that the network
            computes in (0.004 in float32), where truncation and rounding balance.
        allow_kinks: True to run on a network with ReLU or max pooling, whose derivative jumps. The
            result is then noise in part: each kink between the two images adds its jump over twice
            the step, and a smaller step makes that worse.
        compare: at the first batch of a model, also compute the exact gradient where that is
            possible, and log how far apart the two are.
    """

    step: float | None = None
    allow_kinks: bool = False
    compare: bool = True

    def __post_init__(self) -> None:
        if self.step is not None and not self.step > 0:
            raise ValueError(f"step: expected a number above 0, got {self.step!r}")


# --- kinks ----------------------------------------------------------------------------------------

_KINKED_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.SELU, nn.Threshold,
    nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardshrink, nn.Softshrink,
    nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd, nn.FractionalMaxPool2d,
)  # fmt: skip
_KINKED_NODES = re.compile(
    r"^(Relu|LeakyRelu|PreluKernel|RreluWithNoise|Threshold|Hardtanh|Hardswish|Hardsigmoid|"
    r"Hardshrink|Softshrink|Clamp|ClampMin|ClampMax|Abs|Max|Amax|Maximum|Minimum|"
    r"(Adaptive|Fractional)?MaxPool\dD(WithIndices)?)Backward\d"
)


def kinks(model: object, logits: Tensor) -> list[str]:
    """Kinds of modules and operations whose derivative jumps, as far as they can be seen."""
    found: dict[str, None] = {}
    for module in network.modules(model):
        if isinstance(module, _KINKED_MODULES):
            found[type(module).__name__] = None
    for node in network.graph_nodes(logits.grad_fn):
        if _KINKED_NODES.match(type(node).__name__):
            found[type(node).__name__] = None
    return list(found)


# --- the same random numbers in every pass --------------------------------------------------------


@contextlib.contextmanager
def _replayed(numbers: RandomNumbers) -> Iterator[None]:
    """Dropout and drop-path draw what they drew when the numbers were taken."""
    now = numbers.again()
    numbers.put_back()
    try:
        yield
    finally:
        now.put_back()


# --- maps by one backward pass --------------------------------------------------------------------

#: Models whose first backward pass must be its own: it cannot keep the graph for the second.
_separate: Memory[bool] = Memory()


@contextlib.contextmanager
def _frozen(model: object) -> Iterator[None]:
    trained = network.trained(model)
    try:
        for p in trained:
            p.requires_grad_(False)
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


def _maps_by_themselves(model: Any, images: Tensor, targets: Targets) -> Tensor:
    """The saliency by .backward() on the images alone, which reentrant checkpoints allow."""
    alone = distributed.unwrapped(model)
    with torch.enable_grad(), _frozen(alone):
        pixels = images.detach().requires_grad_()
        target_scores(checked_logits(alone(pixels)), targets).sum().backward()
    assert pixels.grad is not None
    return pixels.grad


def _logits_and_maps(model: Any, images: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """Logits with a graph to the parameters, and the saliency without one."""
    if not _separate.latest(Fingerprint(model)):
        pixels = images.detach().requires_grad_()
        logits = checked_logits(model(pixels))
        try:
            total = target_scores(logits, targets).sum()
            (maps,) = torch.autograd.grad(total, pixels, retain_graph=True)
        except RuntimeError as error:
            # What cannot be asked before: reentrant checkpoints and compiled models say so here.
            if not re.search("use_reentrant=True|donated buffers", str(error)):
                raise
            _separate.put(Fingerprint(model), True)
            del logits
        else:
            return logits, maps
    states = RandomNumbers(images.device)
    maps = _maps_by_themselves(model, images, targets)
    with _replayed(states):
        # Reentrant checkpoints record nothing unless an input of theirs wants a gradient.
        logits = checked_logits(model(images.detach().requires_grad_()))
    return logits, maps


# --- the difference -------------------------------------------------------------------------------


def _default_step(images: Tensor, logits: Tensor) -> float:
    dtype = images.dtype
    if logits.is_floating_point() and torch.finfo(logits.dtype).eps > torch.finfo(dtype).eps:
        dtype = logits.dtype
    return float((torch.finfo(dtype).eps / 2) ** (1 / 3))


def _pull(
    model: Any,
    images: Tensor,
    targets: Targets,
    direction: Tensor,
    step: float,
    states: RandomNumbers,
) -> Tensor:
    """The scalar of MATH.md (19), whose gradient is that of the alignment; direction is v."""
    pixels = images.detach()
    spread = pixels.std(correction=0)
    spread = torch.where(spread > 0, spread, 1)
    length = direction.flatten(1).square().mean(1).sqrt()
    # Rows that nothing pulls at stay where they are.
    t = torch.where(length > 0, step * spread / length, 0)
    weight = torch.where(t > 0, 0.5 / t, 0)
    move = torch.where(length > 0, t, 0).view(-1, 1, 1, 1) * direction
    sides, apart = [], bool(_separate.latest(Fingerprint(model)))
    for sign in (1, -1):
        with _replayed(states):
            moved = pixels + sign * move.to(pixels.dtype)
            # As in _logits_and_maps; elsewhere nobody wants the gradient of these pixels.
            logits = model(moved.requires_grad_(apart))
        scores = target_scores(logits, targets)
        sides.append(sign * (scores.to(weight.dtype) * weight).sum())
    return sides[0] + sides[1]


def _check_smooth(model: Any, images: Tensor, logits: Tensor, options: FiniteDifference) -> None:
    rows = coupling.of(model, images)
    if rows.reason is not None and rows.certain:
        raise ValueError(
            f'second_order="finite_difference": expected rows that do not depend on each other, '
            f"and forward passes that leave nothing behind, of which a step has three; but "
            f"{rows.reason}. Freeze BatchNorm and its like with .eval(), or use "
            f'second_order="exact"'
        )
    found = [] if options.allow_kinks else kinks(model, logits)
    if found:
        raise ValueError(
            f'second_order="finite_difference": expected a smooth network (GELU, SiLU, softmax, '
            f"average pooling), got {', '.join(found[:6])}, whose derivative jumps, so that the "
            f'difference is noise. Use second_order="exact", or force it with '
            f"second_order=harmonizer_ext.FiniteDifference(allow_kinks=True)"
        )


LossOfMaps = Callable[[Tensor], tuple[Tensor, Tensor]]


def _gap_to_exact(
    model: Any,
    images: Tensor,
    targets: Targets,
    loss_of_maps: LossOfMaps,
    pull: Callable[[], Tensor],
    states: RandomNumbers,
) -> Tensor | None:
    """Relative distance of the two gradients of the alignment; None where exact is impossible."""
    if distributed.is_sharded(model):
        _log.info("finite_difference: not compared with exact, because FSDP2 shards the model")
        return None
    parameters = network.trained(model)
    try:
        with _replayed(states):
            _, maps = input_gradient(model, images, targets, create_graph=True)
        exact = torch.autograd.grad(loss_of_maps(maps)[0].sum(), parameters, allow_unused=True)
    except double_backward.SecondDerivativeError as error:
        _log.info("finite_difference: not compared with exact, which is impossible here: %s", error)
        return None
    near = torch.autograd.grad(pull(), parameters, allow_unused=True)
    apart, size = images.new_zeros(()), images.new_zeros(())
    for a, b in zip(near, exact, strict=True):
        if a is not None or b is not None:
            a, b = (torch.zeros_like(c) if d is None else d for c, d in ((b, a), (a, b)))
            apart, size = apart + (a - b).square().sum(), size + b.square().sum()
    return (apart / size).sqrt()


_compared: Memory[bool] = Memory()
_smooth: Memory[bool] = Memory()


@dataclass(frozen=True)
class Pulled:
    """The results of the rows of the saliency path.

    Attributes:
        logits: (R, classes) with a graph.
        maps: (R, C, H, W) without one.
        harmonization: scalar: its value is the loss, its gradient the finite difference.
        std: (R,) standard deviations of the maps.
        gap: scalar at the first batch that was compared with exact, else None.
    """

    logits: Tensor
    maps: Tensor
    harmonization: Tensor
    std: Tensor
    gap: Tensor | None


def harmonize(
    model: Any,
    images: Tensor,
    targets: Targets,
    loss_of_maps: LossOfMaps,
    options: FiniteDifference,
) -> Pulled:
    """Logits, maps and the alignment, whose gradient is a central difference.

    Args:
        model, images, targets: as in ``input_gradient``.
        loss_of_maps: gives weighted row losses (R,) and standard deviations (R,) of maps.
        options: see ``FiniteDifference``.

    Raises:
        ValueError: the network is not smooth, or couples rows.
    """
    states = RandomNumbers(images.device)
    logits, maps = _logits_and_maps(model, images, targets)
    mode = Fingerprint(model, *network.behind(model).roots, kind=(options.allow_kinks,))
    if not _smooth.recall(mode):
        _check_smooth(model, images, logits, options)
        vanishing.check(model, images, targets, logits, lambda *again: _logits_and_maps(*again)[1])
        _smooth.put(mode, True)
    leaf = maps.detach().requires_grad_()
    row_losses, std = loss_of_maps(leaf)
    # An alignment may have weights of its own, whose gradient is an ordinary one.
    own = any(part is not leaf for part in network.leaves(row_losses))
    (direction,) = torch.autograd.grad(row_losses.sum(), leaf, retain_graph=own)
    step = options.step or _default_step(images, logits)

    def pull(of: Any = model) -> Tensor:
        return _pull(of, images, targets, direction, step, states)

    gap = None
    if options.compare and not _compared.recall(mode):
        _compared.put(mode, True)
        alone = distributed.unwrapped(model)
        gap = _gap_to_exact(alone, images, targets, loss_of_maps, lambda: pull(alone), states)
        if gap is not None:
            _log.info("finite_difference: %.2g from the exact gradient of the alignment", gap)
            if not gap < 0.1:
                contract.warn(
                    f"second_order='finite_difference': its gradient of the alignment is "
                    f"{float(gap):.2g} (relative) from the exact one at this first batch. Compute "
                    f"in float32, try another FiniteDifference(step=...) than {step:.2g}, or use "
                    f'second_order="exact"'
                )
    value = pull()
    total = row_losses.sum()
    harmonization = (total if own else total.detach()) + (value - value.detach())
    return Pulled(logits, maps.detach(), harmonization, std, gap)
