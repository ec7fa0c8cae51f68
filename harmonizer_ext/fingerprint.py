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

from harmonizer_ext.settings import Settings, cells, slots, unpacked

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
    return is_of_a_library_named(function.__module__)


def is_of_a_library_named(module: str | None) -> bool:
    """The same of a class or a function, by the module that it comes from."""
    return module is None or module.partition(".")[0] in _LIBRARIES


def _names(code: types.CodeType) -> Iterator[str]:
    """Names that a function's code, or a function within it, may look up in its globals."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _of_function(function: types.FunctionType) -> Iterator[Any]:
    """The things a function refers to: cells, defaults, attributes, globals that its code names."""
    yield from cells(function)
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
    others = [value for _, value in slots(thing)]
    attributes = getattr(thing, "__dict__", None)
    call = vars(type(thing)).get("__call__")  # of its own class; others' are found by running it
    own = (call,) if isinstance(call, types.FunctionType) else ()
    return (*own, *others) if attributes is None else (attributes, *own, *others)


def some_contents(thing: Any) -> list[Any]:
    """``contents``, of which no more is read than counts."""
    return list(itertools.islice(contents(thing), _MOST_PARTS))


#: A place within a fingerprint.
Place = tuple[Any, ...]


class Fingerprint:
    """Networks, callables and settings, to be compared with those of another call.

    Two calls are of one kind where they differ in values alone: numbers, words and tensors that are
    no weights. The kind is modules, by identity, with modes, parameters and which of them are
    trained; functions, by their code; other objects, by their type.

    Args:
        things: modules and weights; functions, of which counts what they refer to; any other
            object by its type and attributes, so that one made anew with the same settings is the
            same.
        kind: what makes it a call of another kind, such as a flag.
        settings: whether the settings of modules count too: see ``Settings``.
        modules: what ``walk`` gives of the first thing, where that is a module and it is known.
    """

    __slots__ = ("_kind", "_modes", "_seen", "_settings", "_tensors", "_values")
    __hash__ = None  # type: ignore[assignment]

    def __init__(
        self,
        *things: Any,
        kind: tuple[Any, ...] = (),
        settings: bool = False,
        modules: Sequence[nn.Module] = (),
    ) -> None:
        #: Weak references, of which there is one for an object as long as it lives and somebody
        #: holds it: what was never gone has the same one.
        self._kind: list[Any] = []
        self._tensors: list[Any] = []
        self._modes: list[Any] = [kind]
        self._values: list[Any] = []
        self._settings = Settings()
        self._seen: dict[int, int] = {}
        if modules and things[0] is modules[0]:
            self._seen[id(things[0])] = 0
            self._take_modules(modules, settings)
        pending = list(reversed(things))
        for _ in range(_MOST_PARTS):
            if not pending:
                break
            pending.extend(reversed(self._take(pending.pop(), settings)))
        self._seen = {}

    def forget_versions(self) -> None:
        """Leaves out how often buffers were written to, which may differ between processes."""
        self._settings.versions.clear()

    def is_of_the_kind_of(self, other: Fingerprint) -> bool:
        """Whether the two differ in values at most."""
        return _are_the_same(self._kind, other._kind) and self._modes == other._modes

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Fingerprint)
            and self.is_of_the_kind_of(other)
            and self.has_the_values_of(other)
        )

    def has_the_values_of(self, other: Fingerprint) -> bool:
        """Whether two of a kind have the same values."""
        return (
            _are_the_same(self._tensors, other._tensors)
            and self._values == other._values
            and self._settings.values == other._settings.values
            and self._settings.versions == other._settings.versions
            and _are_the_same(self._settings.tensors, other._settings.tensors)
            and _are_the_same(self._settings.references, other._settings.references)
        )

    def differences(self, other: Fingerprint) -> dict[Place, type]:
        """The places where two of a kind differ, and what stands there in both of them.

        That is ``float``, ``int``, ``Tensor``, or ``object`` for anything else: a word, a truth,
        things of two types, and a whole number that a module shows as an attribute.
        """
        mine, others = self._settings, other._settings
        found = dict(_places(tuple(self._values), tuple(other._values), ()))
        for module, (a, b) in enumerate(zip(mine.values, others.values, strict=False)):
            if a != b:
                found.update(_places(unpacked(a), unpacked(b), ("settings", module)))
        for place, what in found.items():
            if what is int and place[0] == "settings" and len(place) == 3:
                found[place] = int if mine.is_private(*place[1:]) else object
        for name, some, more, what in (
            ("tensor", self._tensors, other._tensors, Tensor),
            ("buffer", mine.tensors, others.tensors, Tensor),
            ("version", mine.versions, others.versions, Tensor),
            ("reference", mine.references, others.references, object),
        ):
            if len(some) != len(more):
                found[name,] = object
                continue
            for number, (a, b) in enumerate(zip(some, more, strict=True)):
                if a is not b and (name != "version" or a != b):
                    found[name, number] = what if a is not None and b is not None else object
        return found

    def _take(self, thing: Any, settings: bool) -> Sequence[Any]:
        """Notes one thing; returns what it consists of."""
        if isinstance(thing, SETTINGS):
            # NaN is NaN here, and True is not 1.
            self._values += (type(thing), "NaN" if thing != thing else thing)
            return ()
        if id(thing) in self._seen:
            self._values.append(self._seen[id(thing)])
            return ()
        self._seen[id(thing)] = len(self._seen)
        if isinstance(thing, nn.Module):
            self._take_modules(list(walk(thing)), settings)
            return ()
        if isinstance(thing, Tensor) and not thing.requires_grad:
            self._tensors.append(_reference(thing))
            return ()
        if isinstance(thing, (Tensor, type, types.ModuleType, types.BuiltinFunctionType)):
            self._kind.append(_reference(thing))
            return ()
        # A lambda is made anew wherever it stands in a loop; its code is not.
        kind = thing.__code__ if isinstance(thing, types.FunctionType) else type(thing)
        inside = some_contents(thing)
        self._kind.append(_reference(kind))
        self._values.append(len(inside))
        if not inside and not isinstance(thing, _CONTAINERS):  # nothing else to know it by
            self._kind.append(_reference(thing))
        return inside

    def _take_modules(self, modules: Sequence[nn.Module], settings: bool) -> None:
        """Notes the modules, their modes and parameters, and which of these are trained."""
        things, modes = self._kind, self._modes
        for module in modules:
            things += (weakref.ref(module), weakref.ref(type(module)))
            modes.append(module.training)
            for parameter in module._parameters.values():
                if parameter is not None:
                    things.append(weakref.ref(parameter))
                    modes.append(parameter.requires_grad)
        if settings:
            self._settings.take(modules)


def _are_the_same(some: list[Any], others: list[Any]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _places(now: Any, before: Any, place: Place) -> Iterator[tuple[Place, type]]:
    """Where two values differ, and what they are."""
    if now is before:
        return
    if type(now) is tuple and type(before) is tuple and len(now) == len(before):
        for number, (a, b) in enumerate(zip(now, before, strict=True)):
            yield from _places(a, b, (*place, number))
    elif type(now) is not type(before):
        yield place, object
    elif now != before:
        yield place, type(now) if type(now) in (float, int) else object


def _reference(thing: Any) -> Any:
    try:
        return weakref.ref(thing)
    except TypeError:  # a function of C, which lives as long as its module
        return thing


Found = TypeVar("Found")

#: Findings of one kind that are remembered by their values.
_MOST_VALUES = 32


class _Kind(Generic[Found]):
    """All that is remembered of calls that differ in values alone.

    Attributes:
        call: the latest one.
        found: what was found out, by call; the latest finding is last.
    """

    def __init__(self, call: Fingerprint) -> None:
        self.call = call
        self.found: deque[tuple[Fingerprint, Found]] = deque(maxlen=_MOST_VALUES)
        self._changes: dict[Place, int] = {}
        self._again, self._patience = 0, 1
        self.owed = True

    def note(self, call: Fingerprint) -> bool:
        """Whether a call of unknown values is to be examined."""
        places = call.differences(self.call)
        self.call = call
        if places:
            for place in places:
                self._changes[place] = self._changes.get(place, 1) + 1
            counts = [self._changes[place] for place in places]
            self._again, self._patience = 1, 1 + min(counts)
            # A power of two: the first, second, fourth, eighth ... value at this place.
            due = any(count & (count - 1) == 0 for count in counts)
        else:  # it seems to stay: the longer a place has kept still, the surer
            self._again += 1
            due = self._again >= self._patience
        self.owed = self.owed or due
        if due:
            self._patience = 2 * self._again
        return self.owed


class Memory(Generic[Found]):
    """Findings by fingerprint; the oldest is forgotten first.

    Where values change all the time, a schedule or a counter, most calls are not worth another
    examination: it is due at the first, second, fourth, eighth ... value that stands at a place,
    and where values that are new have stayed for as many calls as they had changed before. So a
    value that changes for the first time is noticed at once, whatever else counts.
    """

    def __init__(self, most: int = 64) -> None:
        self._known: deque[_Kind[Found]] = deque(maxlen=most)

    def _kind(self, call: Fingerprint) -> _Kind[Found] | None:
        return next((k for k in reversed(self._known) if call.is_of_the_kind_of(k.call)), None)

    def get(self, call: Fingerprint) -> Found | None:
        """The finding about a call with just these values, or None."""
        kind = self._kind(call)
        if kind is not None:
            for known, found in reversed(kind.found):
                if known.has_the_values_of(call):
                    return found
        return None

    def latest(self, call: Fingerprint) -> Found | None:
        """The latest finding about a call of this kind, whatever its values were."""
        kind = self._kind(call)
        return kind.found[-1][1] if kind is not None and kind.found else None

    def is_due(self, call: Fingerprint) -> bool:
        """Whether a call that is not known is to be examined, until that is done; ask once a call.

        ``put`` or ``postpone`` says that it is done.
        """
        kind = self._kind(call)
        if kind is None:
            kind = _Kind(call)
            self._known.append(kind)
        return kind.note(call)

    def moved_by_measures(self, call: Fingerprint, whole: bool = True) -> bool:
        """Whether nothing but measures differs from a call that is known.

        A measure is a number that somebody moves, or a tensor: a schedule, a counter, the batch at
        hand. Anything else chooses, and without ``whole`` a whole number does too.
        """
        kind = self._kind(call)
        measures = {float, int, Tensor} if whole else {float, Tensor}
        return kind is not None and any(
            measures.issuperset(call.differences(earlier).values()) for earlier, _ in kind.found
        )

    def recall(self, call: Fingerprint) -> Found | None:
        """The finding about a call, or the latest of its kind; None where it is to be examined."""
        found = self.get(call)
        if found is None and not self.is_due(call):
            found = self.latest(call)
        return found

    def put(self, call: Fingerprint, found: Found) -> None:
        """Remembers it in the place of what was known."""
        kind = self._kind(call)
        if kind is None:
            kind = _Kind(call)
        else:
            self._known.remove(kind)
        self._known.append(kind)
        for entry in list(kind.found):
            if entry[0] == call:
                kind.found.remove(entry)
        kind.found.append((call, found))
        kind.owed = False

    def postpone(self, call: Fingerprint) -> None:
        """Notes that it was examined, and gave nothing that could be remembered."""
        kind = self._kind(call)
        if kind is not None:
            kind.owed = False
