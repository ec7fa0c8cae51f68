"""Whether two calls are of the same things, set in the same way.

What was found out about a network or an explanation is remembered, and must not be taken for
another one's: numbers of objects (``id``) are given out again, a callable may be made anew for
every call, and the same object may be set differently. A fingerprint holds objects that have an
identity by weak references, and everything else by value.
"""

from __future__ import annotations

import enum
import functools
import itertools
import operator
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

#: Values that are what they say.
SETTINGS = (bool, int, float, complex, str, bytes, type(None), enum.Enum, torch.dtype, torch.device)

#: More parts than a callable has that somebody wrote; less than it takes a millisecond to walk.
_MOST_PARTS = 2000

_CONTAINERS = (list, tuple, set, frozenset, deque, Mapping)

#: Functions of these packages are taken as they are: their globals are no settings of anybody.
_LIBRARIES = ("builtins", "functools", "numpy", "torch", "torchvision")


def walk(*roots: nn.Module) -> Iterator[nn.Module]:
    """Every module once, as ``modules()`` of each; without names, which take most of its time."""
    seen: set[int] = set()
    pending: list[nn.Module | None] = [*reversed(roots)]
    while pending:
        module = pending.pop()
        if module is not None and id(module) not in seen:
            seen.add(id(module))
            yield module
            if module._modules:
                pending.extend(reversed(module._modules.values()))


def is_of_a_library(function: types.FunctionType) -> bool:
    """Whether nobody's settings are among the globals of a function."""
    return function.__module__ is None or function.__module__.partition(".")[0] in _LIBRARIES


def _names(code: types.CodeType) -> Iterator[str]:
    """Names that a function's code, or a function within it, may look up in its globals."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _of_function(function: types.FunctionType) -> Iterator[Any]:
    """The things a function refers to: cells, defaults, attributes, globals that its code names."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue
    yield function.__defaults__
    yield function.__kwdefaults__
    yield function.__dict__  # what decorators leave: __wrapped__, torch.compile's original
    if is_of_a_library(function):
        return
    names = set(_names(function.__code__))
    for name in sorted(names):
        value = function.__globals__.get(name)
        if isinstance(value, types.ModuleType):  # ``networks.best(z)``
            yield [v for k, v in vars(value).items() if k in names and isinstance(v, nn.Module)]
        elif isinstance(value, (nn.Module, Callable, *SETTINGS, list, tuple, dict)):  # type: ignore[arg-type]
            yield value


def contents(thing: Any) -> Iterable[Any]:
    """The parts of a callable or a container, one level down."""
    if isinstance(thing, types.FunctionType):
        return _of_function(thing)
    if isinstance(thing, types.MethodType):
        return (thing.__self__, thing.__func__)
    if isinstance(thing, functools.partial):
        return (thing.func, thing.args, thing.keywords)
    if isinstance(thing, Mapping):
        return (part for item in thing.items() for part in item)
    if isinstance(thing, _CONTAINERS):
        return thing
    if isinstance(thing, (type, types.ModuleType, types.BuiltinFunctionType, Tensor)):
        return ()
    slots = (
        getattr(thing, name)
        for kind in type(thing).__mro__
        for name in _slots(kind)
        if hasattr(thing, name)
    )
    attributes = getattr(thing, "__dict__", None)
    call = vars(type(thing)).get("__call__")  # of its own class; others' are found by running it
    own = (call,) if isinstance(call, types.FunctionType) else ()
    return (*own, *slots) if attributes is None else (attributes, *own, *slots)


def some_contents(thing: Any) -> list[Any]:
    """``contents``, of which no more is read than counts."""
    return list(itertools.islice(contents(thing), _MOST_PARTS))


def _slots(kind: type) -> Iterable[str]:
    slots = kind.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else (s for s in slots if not s.startswith("__"))


class Fingerprint:
    """Networks, callables and settings, to be compared with those of another call.

    Args:
        things: modules, by identity, with modes, parameters and which of them are trained;
            functions, by their code and what it refers to; any other object by its type and
            attributes, so that one made anew with the same settings is the same.
        settings: whether attributes of modules that are true or false, whole numbers or words
            count too.
    """

    __slots__ = ("_seen", "_things", "_values")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, *things: Any, settings: bool = False) -> None:
        #: Weak references, of which there is one for an object as long as it lives and somebody
        #: holds it: what was never gone has the same one.
        self._things: list[Any] = []
        self._values: list[Any] = []
        self._seen: dict[int, int] = {}
        pending = list(reversed(things))
        for _ in range(_MOST_PARTS):
            if not pending:
                break
            pending.extend(reversed(self._take(pending.pop(), settings)))
        self._seen = {}

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Fingerprint)
            and len(self._things) == len(other._things)
            and all(map(operator.is_, self._things, other._things))
            and self._values == other._values
        )

    def _take(self, thing: Any, settings: bool) -> Sequence[Any]:
        """Notes one thing; returns what it consists of."""
        if isinstance(thing, SETTINGS):
            # NaN is NaN here, and True is not 1.
            self._values.append((type(thing), repr(thing) if isinstance(thing, float) else thing))
            return ()
        if id(thing) in self._seen:
            self._values.append(self._seen[id(thing)])
            return ()
        self._seen[id(thing)] = len(self._seen)
        if isinstance(thing, nn.Module):
            self._take_modules(thing, settings)
            return ()
        if isinstance(thing, (Tensor, type, types.ModuleType, types.BuiltinFunctionType)):
            self._things.append(_reference(thing))
            return ()
        # A lambda is made anew wherever it stands in a loop; its code is not.
        kind = thing.__code__ if isinstance(thing, types.FunctionType) else type(thing)
        inside = some_contents(thing)
        self._things.append(_reference(kind))
        self._values.append(len(inside))
        if not inside and not isinstance(thing, _CONTAINERS):  # nothing else to know it by
            self._things.append(_reference(thing))
        return inside

    def _take_modules(self, root: nn.Module, settings: bool) -> None:
        """Which modules, in which mode, with which parameters, and which of them are trained."""
        things, values = self._things, self._values
        for module in walk(root):
            things.append(weakref.ref(module))
            values.append(module.training)
            for parameter in module._parameters.values():
                if parameter is not None:
                    things.append(weakref.ref(parameter))
                    values.append(parameter.requires_grad)
            # Those of PyTorch's own layers are set when they are made.
            if settings and not type(module).__module__.startswith("torch.nn"):
                values += [
                    item
                    for item in module.__dict__.items()
                    if isinstance(item[1], (bool, int, str)) and item[0][0] != "_"
                ]


def _reference(thing: Any) -> Any:
    try:
        return weakref.ref(thing)
    except TypeError:  # a function of C, which lives as long as its module
        return thing


Found = TypeVar("Found")


class Memory(Generic[Found]):
    """Findings by fingerprint; the oldest is forgotten first."""

    def __init__(self, most: int = 64) -> None:
        self._known: deque[tuple[Fingerprint, Found]] = deque(maxlen=most)

    def get(self, fingerprint: Fingerprint) -> Found | None:
        """The finding about it, or None."""
        for known, found in reversed(self._known):
            if known == fingerprint:
                return found
        return None

    def put(self, fingerprint: Fingerprint, found: Found) -> None:
        """Remembers it in the place of what was known."""
        for entry in list(self._known):
            if entry[0] == fingerprint:
                self._known.remove(entry)
        self._known.append((fingerprint, found))
