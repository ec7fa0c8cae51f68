"""Whether an explanation can be trained through: its maps must carry a whole graph.

Maps whose graph is broken off have the same values and teach the network something else, or
nothing. Looked at are the maps that the loss is given, whatever made them: which parameters their
graph reaches, whether they change with a parameter that it does not reach, and whether what reaches
the parameters is a gradient at all. (How right it is, ``check_gradients(..., explain=)`` shows.)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from harmonizer_ext import contract, distributed, double_backward, network, vanishing
from harmonizer_ext.double_backward import SecondDerivativeError
from harmonizer_ext.fingerprint import Fingerprint, Memory
from harmonizer_ext.loss import NoGraphError
from harmonizer_ext.saliency import Explain, Targets, input_gradient
from harmonizer_ext.trial import Trial

#: By how much a parameter is moved, relative to its size; and what of the maps' size is rounding.
_MOVE, _ROUNDING = 0.01, 1e-5

#: Nodes of the graph, from the maps down, that tell one explanation's setting from another's.
_TOP = 16

_checked: Memory[bool] = Memory()


def _top(tensor: Tensor) -> tuple[str, ...]:
    """Kinds of the operations that a tensor was last computed by."""
    nodes = itertools.islice(network.graph_nodes(tensor.grad_fn), _TOP)
    return tuple(type(node).__name__ for node in nodes)


def checked(result: Any, images: Tensor, create_graph: bool) -> tuple[Tensor, Tensor]:
    """Returns what an explanation returned, where it has the form of the protocol.

    Raises:
        TypeError, ValueError: it has another.
        NoGraphError: logits or maps carry no graph, and were to.
    """
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        pair = isinstance(result, (tuple, list))
        got = f"{len(result)} values" if pair else type(result).__name__
        raise TypeError(f"explain: expected a tuple (logits, maps), got {got}")
    logits, maps = result
    if not isinstance(maps, Tensor):
        raise TypeError(f"explain: expected maps in a torch.Tensor, got {type(maps).__name__}")
    if create_graph and not maps.requires_grad:
        raise NoGraphError(
            "explain: expected maps that carry a graph to the parameters (create_graph=True), "
            "got maps without one, so that the alignment would teach the network nothing"
        )
    if isinstance(logits, Tensor) and logits.shape[:1] != images.shape[:1]:
        raise ValueError(
            f"explain: expected logits ({images.shape[0]}, classes), one row for each image, got "
            f"{tuple(logits.shape)}"
        )
    if create_graph and isinstance(logits, Tensor) and not logits.requires_grad:
        raise NoGraphError(
            "explain: expected logits that carry a graph to the parameters, got logits without "
            "one, so that the cross entropy would teach the network nothing; return what the model "
            "gave, computed with gradients enabled and not detached"
        )
    return logits, maps


def check_once(
    explain: Explain,
    model: Callable[..., Tensor],
    images: Tensor,
    targets: Targets,
    logits: Tensor,
    maps: Tensor,
) -> None:
    """Looks at the graph of the maps, once for a model in a mode and an explanation as it is set.

    Where values of the two change all the time, ever less often: see ``Memory``.

    Args:
        explain, model, images, targets: what was called.
        logits, maps: what it returned, with create_graph=True.

    Raises:
        SecondDerivativeError: an operation on the way has no second derivative, or the graph leads
            past parameters that the maps depend on.
        NoGraphError: the logits do not depend on the parameters.
        ValueError: the maps are zero, or rounding alone, for any images.
    """
    roots = network.behind(model).roots
    call = Fingerprint(model, *roots, explain, kind=(_top(maps), _top(logits)))
    if _checked.recall(call):
        return
    double_backward.check_graph(maps, model)
    if not distributed.is_sharded(model):
        trained = network.trained(model)
        hanging = {id(leaf): leaf for leaf in network.leaves(logits)}
        if trained and not any(id(p) in hanging for p in trained):
            raise NoGraphError(
                "explain: expected logits that depend on the parameters of the model, got logits "
                "whose graph reaches none of them (those of a copy?), so that the cross entropy "
                "would teach it nothing"
            )
        if not getattr(explain, "partial_graph", False):
            _check_whole(explain, model, images, targets, hanging, maps)
            _check_gradient(explain, model, images, targets, maps)
    vanishing.check(model, images, targets, logits, _maps_by(explain), explain)
    _checked.put(call, True)


def _check_whole(
    explain: Explain,
    model: Callable[..., Tensor],
    images: Tensor,
    targets: Targets,
    hanging: dict[int, Tensor],
    maps: Tensor,
) -> None:
    """Refuses maps that change with a parameter which their graph does not reach."""
    reached = {id(leaf) for leaf in network.leaves(maps)}
    missed = [p for key, p in hanging.items() if key not in reached and isinstance(p, nn.Parameter)]
    if not missed:
        return
    runs = _Runs(explain, distributed.unwrapped(model), images, targets)
    missed = runs.reached_by_the_gradient(missed)
    if not missed or not runs.depends_on(missed):
        return
    names = {id(p): n for root in network.behind(model).roots for n, p in root.named_parameters()}
    shown = ", ".join(names.get(id(p), f"{tuple(p.shape)}") for p in missed[:4])
    raise SecondDerivativeError(
        f"explain: expected maps with a whole graph, got maps that change with {shown}"
        f"{', ...' if missed[4:] else ''}, which their graph does not reach: the gradient of the "
        f"alignment would take {'it' if len(missed) == 1 else 'them'} for a constant. Look for "
        f".detach(), torch.no_grad() or a gradient without create_graph=True within the "
        f"explanation (Captum's are made so; the explanations of harmonizer_ext are whole). Where "
        f"that is meant, say so by an attribute: explain.partial_graph = True"
    )


def _check_gradient(
    explain: Explain,
    model: Callable[..., Tensor],
    images: Tensor,
    targets: Targets,
    maps: Tensor,
) -> None:
    """Refuses maps whose graph reaches the parameters and has a gradient of zero for all of them.

    But for maps that do not depend on the parameters at all.
    """
    parameters = network.trained(model)
    if not parameters:
        return
    generator = torch.Generator("cpu").manual_seed(0)
    some = torch.randn(maps.shape, generator=generator, dtype=torch.float32, device="cpu")
    gradients = torch.autograd.grad(
        maps, parameters, some.to(maps), retain_graph=True, allow_unused=True
    )
    if any(g is not None and bool(g.any()) for g in gradients):
        return
    runs = _Runs(explain, distributed.unwrapped(model), images, targets)
    if not runs.depends_on(parameters):
        return
    raise SecondDerivativeError(
        "explain: expected maps whose gradient says how they change with the parameters, got maps "
        "that change and whose gradient is zero for all parameters: their values were detached, "
        "rounded or made by another network, so that the alignment would teach the network "
        "nothing. Return the maps as they were computed. Where that is meant, say so by an "
        "attribute: explain.partial_graph = True"
    )


def check_before_compiling(
    explain: Explain | None, model: Callable[..., Tensor], images: Tensor, targets: Targets
) -> None:
    """``check_once`` of an explanation that will be compiled, whose graph is then seen no more.

    It is run once more by itself, and what that changes is put back. The input gradient, which is
    None here, has a graph that the compiler knows: it is looked at for noise alone.

    Raises:
        SecondDerivativeError, NoGraphError, TypeError, ValueError: as ``checked``, ``check_once``.
    """
    call = Fingerprint(model, *network.behind(model).roots, explain)
    if images.shape[0] == 0 or _checked.recall(call):
        return
    if explain is None:
        runs = _Runs(input_gradient, model, images, targets)
        logits, _ = runs.run(input_gradient, create_graph=False)
        vanishing.check(model, images, targets, logits, _maps_by(input_gradient))
    else:
        runs = _Runs(explain, model, images, targets)
        logits, maps = checked(runs.run(explain), images, True)
        check_once(explain, model, runs.images, targets, logits, maps)
    _checked.put(call, True)


def _maps_by(explain: Explain) -> vanishing.Again:
    """The maps again. One's own explanation may know no other way than the step's, with a graph."""

    def again(model: Any, images: Tensor, targets: Targets) -> Tensor:
        if explain is input_gradient:
            return input_gradient(model, images, targets, create_graph=False)[1]
        with torch.enable_grad():
            return explain(model, images, targets, create_graph=True)[1].detach()

    return again


class _Runs:
    """An explanation that is run again; what that changes is put back."""

    def __init__(
        self, explain: Explain, model: Callable[..., Tensor], images: Tensor, targets: Targets
    ) -> None:
        self._explain = explain
        self._model = model
        self.images = images.detach()
        self._targets = targets
        self._trial = Trial(model, images.device, explain)

    def run(self, explain: Explain, create_graph: bool = True) -> tuple[Tensor, Tensor]:
        try:
            return explain(self._model, self.images, self._targets, create_graph=create_graph)
        finally:
            self._trial.put_back()

    def _maps(self, explain: Explain) -> Tensor:
        return self.run(explain)[1]

    def reached_by_the_gradient(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """The parameters that the input gradient has in its graph; it has no last bias, for one."""
        try:
            reached = {id(leaf) for leaf in network.leaves(self._maps(input_gradient))}
        except SecondDerivativeError:  # the explanation need not be one that has it
            return parameters
        return [p for p in parameters if id(p) in reached]

    def depends_on(self, parameters: list[nn.Parameter]) -> bool:
        """Whether the maps change when the parameters are moved a little."""
        base, again = (self._maps(self._explain).detach() for _ in range(2))
        generator = torch.Generator("cpu").manual_seed(0)
        for p in parameters:
            values = p.detach()
            size = values.square().mean().sqrt().to(contract.accumulation_dtype(values))
            noise = torch.randn(
                values.shape, generator=generator, dtype=torch.float32, device="cpu"
            )
            step = _MOVE * torch.where(size > 0, size, 1) * noise.to(values.device)
            values.data.add_(step.to(values.dtype))
        moved = self._maps(self._explain).detach()
        noise = (base - again).abs().amax()
        return bool((moved - base).abs().amax() > 10 * noise + _ROUNDING * base.abs().amax())
