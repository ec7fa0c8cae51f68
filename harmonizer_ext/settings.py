"""The settings of modules: all that decides on a forward pass, and is no weight and no module.

Attributes of any name, with what is within small containers, functions and plain objects; hooks,
and a forward pass of the instance's own; buffers, by how often they have been written to. It is
read at every call, so that most of it is done by few calls of Python's own functions.
"""

from __future__ import annotations

import enum
import functools
import marshal
import sys
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

#: Types of values that are what they say.
_PLAIN: frozenset[type] = frozenset(
    {bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size}
)

#: What every module has first, in this order, unless somebody set an attribute before that.
_FIRST = tuple(nn.Module().__dict__)
_COUNT, _BUFFERS = len(_FIRST), _FIRST.index("_buffers")
_HOOKS = tuple(
    _FIRST.index(name)
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
)

#: A longer container is data.
_MOST_ITEMS = 64

#: The largest packed values, and modules that have larger ones: tables, vocabularies.
_MOST_BYTES = 4096
_large: weakref.WeakSet[nn.Module] = weakref.WeakSet()

#: How deep a setting lies, and how much is read of them all together.
_DEEPEST, _MOST_READ = 4, 2000


def unpacked(values: Any) -> Any:
    """The values of a module as a tuple, with tuples for whatever contains others."""
    return _tuples(marshal.loads(values) if isinstance(values, bytes) else values)


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple((str(name), _tuples(part)) for name, part in value.items())
    return tuple(map(_tuples, value)) if isinstance(value, (tuple, list)) else value


def slots(thing: Any) -> Iterator[tuple[str, Any]]:
    """The attributes of an object that stand in no dictionary, by name."""
    for kind in type(thing).__mro__:
        names = kind.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if not name.startswith("__") and hasattr(thing, name):
                yield name, getattr(thing, name)


def _in_order(has: dict[str, Any]) -> list[Any]:
    """The attributes of a module, those of every module first; there may be others before them."""
    first = [has.get(name) for name in _FIRST]
    return first + [value for name, value in has.items() if name not in _FIRST]


class Settings:
    """The settings of some modules, in lists that are compared with those of another call.

    Attributes:
        values: the values of each module that has any, to be compared by value: see ``unpacked``.
        owners: weak references to these modules.
        references: weak references, to be compared by identity: codes, types, hidden modules.
        tensors: the same of tensors and buffers.
        versions: how often each of these has been written to.
    """

    __slots__ = ("_left", "owners", "references", "tensors", "values", "versions")

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.owners: list[weakref.ref[nn.Module]] = []
        self.references: list[Any] = []
        self.tensors: list[Any] = []
        self.versions: list[int] = []
        self._left = _MOST_READ

    def is_private(self, module: int, value: int) -> bool:
        """Whether a value, by its number, is that of an attribute whose name says it is private."""
        owner = self.owners[module]()
        names = [] if owner is None else [name for name in vars(owner) if name not in _FIRST]
        return value < len(names) and names[value].startswith("_")

    def take(self, modules: Iterable[nn.Module]) -> None:
        """Adds those of modules, without their parts."""
        values, tensors, versions = self.values, self.tensors, self.versions
        owners = self.owners
        mixed: set[type] = set()  # whose values are not all plain
        for module in modules:
            has = module.__dict__
            every = [*has.values()]
            if every[_COUNT - 1] is not has[_FIRST[-1]]:
                every = _in_order(has)
            if len(every) > _COUNT:
                own = every[_COUNT:]
                owners.append(weakref.ref(module))
                kind = type(module)
                if kind not in mixed and _PLAIN.issuperset(map(type, own)):
                    values.append(own)
                else:
                    mixed.add(kind)
                    values.append(self._packed(module, own))
            if every[_BUFFERS]:
                for buffer in every[_BUFFERS].values():
                    if buffer is None:
                        tensors.append(None)
                        continue
                    tensors.append(weakref.ref(buffer))
                    try:
                        versions.append(buffer._version)
                    except RuntimeError:  # an inference tensor counts nothing
                        versions.append(0)
            if every[_HOOKS[0]] or every[_HOOKS[1]] or every[_HOOKS[2]] or every[_HOOKS[3]]:
                self._take_hooks(every)

    def _packed(self, module: nn.Module, own: list[Any]) -> Any:
        """The values of a module, of which some are no numbers or words."""
        if not _large or module not in _large:
            try:
                # Without references, which depend on who else holds a value.
                packed = marshal.dumps(own, 0)
            except ValueError:  # a function, an object
                pass
            else:
                if len(packed) < _MOST_BYTES:
                    return packed
                _large.add(module)
        return tuple([v if type(v) in _PLAIN else self._form(v, _DEEPEST) for v in own])

    def _take_hooks(self, every: list[Any]) -> None:
        """Notes which ones there are. What they remember is no setting: most of them look on."""
        for name in _HOOKS:
            for hook in every[name].values():
                function = getattr(hook, "__func__", hook)
                self._refer(getattr(function, "__code__", function))
            self.references.append(None)

    def _take_tensor(self, tensor: Tensor) -> None:
        self.tensors.append(weakref.ref(tensor))
        try:
            self.versions.append(tensor._version)
        except RuntimeError:  # an inference tensor counts nothing
            self.versions.append(0)

    def _refer(self, thing: Any) -> Any:
        """Notes which thing it is; returns the value that stands for it."""
        try:
            self.references.append(weakref.ref(thing))
        except TypeError:  # not to be kept alive
            return ("thing", str(id(thing)))
        return None

    def _form(self, thing: Any, depth: int) -> Any:
        """A value that is equal to another one's where the two say the same."""
        kind = type(thing)
        if kind in _PLAIN or isinstance(thing, enum.Enum):
            return thing
        self._left -= 1
        if depth == 0 or self._left < 0:
            return None
        if isinstance(thing, Tensor):
            if isinstance(thing, nn.Parameter) or thing.requires_grad:
                return self._refer(thing)
            self._take_tensor(thing)
            return None
        if isinstance(thing, nn.Module):
            self._refer(thing)
            return thing.training
        if isinstance(thing, (tuple, list, deque, set, frozenset, Mapping)):
            return self._of_container(thing, depth - 1)
        if isinstance(thing, (type, types.ModuleType, types.BuiltinFunctionType)):
            return self._refer(thing)
        if isinstance(thing, types.FunctionType):
            self._refer(thing.__code__)
            return tuple(self._form(part, depth - 1) for part in cells(thing))
        if isinstance(thing, types.MethodType):
            self._refer(thing.__self__)
            return self._form(thing.__func__, depth)
        if isinstance(thing, functools.partial):
            return self._form((thing.func, thing.args, thing.keywords), depth)
        return self._of_object(thing, depth - 1)

    def _of_container(self, thing: Any, depth: int) -> Any:
        if len(thing) > _MOST_ITEMS:
            return ("many",)
        if isinstance(thing, Mapping):
            return tuple((str(name), self._form(part, depth)) for name, part in thing.items())
        if isinstance(thing, (set, frozenset)):
            return tuple(sorted(map(repr, thing)))
        if _PLAIN.issuperset(map(type, thing)):
            return tuple(thing)
        return tuple(self._form(part, depth) for part in thing)

    def _of_object(self, thing: Any, depth: int) -> Any:
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(thing, (numpy.ndarray, numpy.generic)):
            return thing.tobytes() if thing.size <= _MOST_ITEMS else self._refer(thing)
        attributes = dict(slots(thing))
        attributes.update(getattr(thing, "__dict__", {}))
        if not attributes or type(thing).__module__.partition(".")[0] == "torch":
            return self._refer(thing)
        self._refer(type(thing))
        # Not what lies behind it: a trainer, a logger, a whole program.
        plain: tuple[type, ...] = (*_PLAIN, tuple, list, dict, set, Tensor)
        return tuple(
            (name, self._form(part, depth))
            for name, part in islice(attributes.items(), _MOST_ITEMS)
            if isinstance(part, plain)
        )


def cells(function: types.FunctionType) -> Iterator[Any]:
    """The values that a function has of those around it."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue
