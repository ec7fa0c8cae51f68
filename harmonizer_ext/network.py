"""The modules of a network that may come as any callable: ``lambda x: net(x)``, ``net.forward``.

Some things can be said of modules only: which weights are decayed, what is compiled or sharded,
what keeps state. Behind a callable they are found by what happens: which modules run in a forward
pass, and which parameters its logits depend on. What the callable refers to says how they belong
together.
"""

from __future__ import annotations

import contextlib
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from harmonizer_ext import fingerprint
from harmonizer_ext.fingerprint import Fingerprint, Memory
from harmonizer_ext.random_numbers import RandomNumbers
from harmonizer_ext.state import State


@dataclass(frozen=True)
class Behind:
    """The network that stands behind a callable.

    Attributes:
        roots: the modules that together are the network, none of them within another.
        orphans: shapes of the parameters that the logits depend on and no root has.
    """

    roots: tuple[nn.Module, ...]
    orphans: tuple[tuple[int, ...], ...] = ()


class _Weakly:
    """``Behind`` without keeping its modules."""

    def __init__(self, behind: Behind) -> None:
        self._roots = [weakref.ref(module) for module in behind.roots]
        self._orphans = behind.orphans

    def __call__(self) -> Behind:
        found = (ref() for ref in self._roots)
        return Behind(tuple(module for module in found if module is not None), self._orphans)


_known: Memory[_Weakly] = Memory()


def referred(model: object) -> list[nn.Module]:
    """Modules that a callable refers to, wherever it does; none of those within them."""
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    pending = [model]
    for _ in range(10_000):
        if not pending:
            break
        thing = pending.pop()
        if id(thing) in seen or isinstance(thing, fingerprint.SETTINGS):
            continue
        seen.add(id(thing))
        if isinstance(thing, nn.Module):
            found[id(thing)] = thing
        else:
            pending.extend(fingerprint.some_contents(thing))
    return list(found.values())


def refers_by_code(thing: object, module: nn.Module) -> bool:
    """Whether a function, here or within, refers to a module: a copy of it refers to the same."""
    parts = {id(part) for part in fingerprint.walk(module)}
    found = (m for function in functions_within(thing) for m in referred(function))
    return any(id(part) in parts for m in found for part in fingerprint.walk(m))


def functions_within(thing: object) -> Iterator[types.FunctionType]:
    """Functions that a callable is or consists of; a copy of it has the same ones."""
    seen: set[int] = set()
    pending = [thing]
    for _ in range(10_000):
        if not pending:
            return
        part = pending.pop()
        if id(part) in seen or isinstance(part, (*fingerprint.SETTINGS, nn.Module)):
            continue
        seen.add(id(part))
        if isinstance(part, types.FunctionType):
            yield part
        elif not isinstance(part, types.MethodType):  # which are copied with their object
            pending.extend(fingerprint.some_contents(part))


def _owns_its_forward(model: object) -> nn.Module | None:
    """The module of which a callable is a method."""
    owner = getattr(model, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def behind(model: object) -> Behind:
    """The network behind a callable, as far as that is known without running it."""
    if isinstance(model, nn.Module):
        return Behind((model,))
    known = _remembered(model, Fingerprint(model))
    return Behind(_outermost(referred(model))) if known is None else known


def _remembered(model: object, call: Fingerprint) -> Behind | None:
    """The network behind a callable, where a pass has shown it and its values choose no other."""
    exact = _known.get(call)
    if exact is not None:
        return exact()
    latest = _known.latest(call)
    if latest is None:
        return None
    found = latest()
    alone = len(found.roots) == 1 and not found.orphans
    # A number chooses between networks, as in nets[i](x), where there are several, or parts of one.
    if _known.moved_by_measures(call, whole=False):
        return found
    if alone and _outermost(referred(model)) == found.roots:
        return found
    return None


def modules(model: object) -> Iterator[nn.Module]:
    """Every module of a network once."""
    if torch.compiler.is_compiling() and isinstance(model, nn.Module):
        return model.modules()  # which the compiler knows
    return fingerprint.walk(*behind(model).roots)


def parameters(model: object) -> list[nn.Parameter]:
    """Every parameter of a network once."""
    found = {id(p): p for m in modules(model) for p in m._parameters.values() if p is not None}
    return list(found.values())


def trained(model: object) -> list[nn.Parameter]:
    """The parameters of a network that want a gradient."""
    return [p for p in parameters(model) if p.requires_grad]


def named_modules(model: object) -> Iterator[tuple[str, nn.Module]]:
    """Names as of ``named_modules()``; where there are several roots, their numbers in front."""
    roots = behind(model).roots
    for number, root in enumerate(roots):
        prefix = "" if len(roots) == 1 else str(number)
        yield from root.named_modules(prefix=prefix)


def _outermost(found: Iterable[nn.Module]) -> tuple[nn.Module, ...]:
    unique = list({id(module): module for module in found}.values())
    within = {
        id(part) for module in unique for part in fingerprint.walk(module) if part is not module
    }
    return tuple(module for module in unique if id(module) not in within)


# --- found by running -----------------------------------------------------------------------------


@contextlib.contextmanager
def watched(
    before: Callable[[nn.Module], None], after: Callable[[nn.Module, Any], None]
) -> Iterator[None]:
    """Tells of every module that runs in this thread: before it does, and with its output after."""
    handles = [
        register_module_forward_pre_hook(lambda module, args: before(module)),
        register_module_forward_hook(
            lambda module, args, output: after(module, output), always_call=False
        ),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def graph_nodes(root: Any) -> Iterator[Any]:
    """Every node of an autograd graph, from ``tensor.grad_fn`` down, the nearest first."""
    if root is None:  # a leaf
        return
    seen, pending = {root}, deque([root])
    while pending:
        node = pending.popleft()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                pending.append(following)


def leaves(output: Tensor) -> list[Tensor]:
    """The leaves of an autograd graph that a tensor hangs by."""
    if output.grad_fn is None:
        return [output] if output.requires_grad else []
    variables = (getattr(node, "variable", None) for node in graph_nodes(output.grad_fn))
    return [variable for variable in variables if variable is not None]


def _run(
    model: Callable[..., Any], images: Tensor, graph: bool
) -> tuple[list[nn.Module], list[Tensor]]:
    """Modules that ran outermost, and leaves of the logits; everything is as it was afterwards."""
    random = RandomNumbers(images.device)
    states = [State([model, *referred(model)])]
    known = {id(module) for module in fingerprint.walk(*referred(model))}
    outermost: dict[int, nn.Module] = {}
    depth = 0

    def before(module: nn.Module) -> None:
        nonlocal depth
        depth += 1
        if depth == 1:
            outermost[id(module)] = module
        if id(module) not in known:
            states.append(State([module]))
            known.update(id(part) for part in fingerprint.walk(module))

    def after(module: nn.Module, output: Any) -> None:
        nonlocal depth
        depth -= 1

    try:
        with torch.set_grad_enabled(graph), watched(before, after):
            output = model(images.detach())
    finally:
        for state in reversed(states):
            state.put_back()
        random.put_back()
        torch.clear_autocast_cache()
    found = leaves(output) if isinstance(output, Tensor) else []
    return list(outermost.values()), found


def _common(root: nn.Module, parts: list[nn.Module]) -> nn.Module:
    """The smallest module of a tree that has all of these."""
    wanted = {id(part) for part in parts}
    best = root
    while True:
        for child in best._modules.values():
            if child is not None and wanted <= {id(part) for part in fingerprint.walk(child)}:
                best = child
                break
        else:
            return best


def discover(model: Callable[..., Any], images: Tensor, graph: bool = True) -> Behind:
    """Finds the network behind a callable; the first time it runs it on images, and puts all back.

    Args:
        model: maps images to logits. A module is its own network.
        images: (B, C, H, W).
        graph: whether its forward pass may record a graph that no backward pass follows, of which
            wrappers for several processes would ask where it is.
    """
    if isinstance(model, nn.Module):
        return Behind((model,))
    call = Fingerprint(model)
    known = _remembered(model, call)
    if _known.get(call) is None and _known.is_due(call):
        known = None
    if known is not None:
        return known
    ran, hanging = _run(model, images, graph)
    candidates = _outermost([*referred(model), *ran])
    owner = _owns_its_forward(model)
    parts = [*ran, *([] if owner is None else [owner])]
    owned = {id(p) for m in parts for p in m.parameters()}
    loose = {id(p): p for p in hanging if id(p) not in owned}
    for module in fingerprint.walk(*candidates):
        for parameter in module._parameters.values():
            if parameter is not None and loose.pop(id(parameter), None) is not None:
                parts.append(module)
    roots = []
    for candidate in candidates:
        inside = {id(part) for part in fingerprint.walk(candidate)}
        mine = [part for part in parts if id(part) in inside]
        if mine:
            roots.append(_common(candidate, mine))
    found = Behind(_outermost(roots), tuple(tuple(p.shape) for p in loose.values()))
    _known.put(call, _Weakly(found))
    return found
