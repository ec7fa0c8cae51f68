"""The state of a network that lasts from one forward pass to the next: taken, compared, put back.

A module may keep state anywhere: in buffers and parameters, in plain tensors, numbers and lists
that are its attributes, in generators of random numbers. Values are looked at here, not classes.
"""

from __future__ import annotations

import array
import os
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harmonizer_ext import fingerprint
from harmonizer_ext.random_numbers import generator_state, same_state
from harmonizer_ext.settings import slots

#: What is looked through beside modules, so that no attribute leads through a whole program.
_MOST_OBJECTS = 20_000

#: A larger tensor that is no parameter may be data that somebody keeps at hand, and is not read to
#: be compared: 256 MiB in float32.
_MOST_ELEMENTS = 1 << 26

#: Values that classes and the globals of functions may keep.
_KEPT_BY_CLASSES = (*fingerprint.SETTINGS, Tensor, list, dict, set, deque, bytearray, array.array)

#: Attributes of every module that hold others by name.
_HOLDERS = ("_modules", "_parameters", "_buffers")

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)
_OPAQUE = (type, types.ModuleType, types.BuiltinFunctionType, torch.device, torch.dtype)
_LOCKS = (type(threading.Lock()), type(threading.RLock()))


# --- tensors --------------------------------------------------------------------------------------


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: its shard of one that FSDP2 has sharded."""
    found: Tensor = getattr(tensor, "_local_tensor", tensor)
    return found


def _readable(tensor: Tensor) -> bool:
    return (
        tensor.layout is torch.strided
        and tensor.device.type != "meta"
        and not tensor.is_quantized
        and not nn.parameter.is_lazy(tensor)
    )


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same, NaN in the same places included."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    if torch.equal(a, b):
        return True
    # Only NaN differs from itself.
    return bool((a != a).any()) and bool(((a == b) | ((a != a) & (b != b))).all())


def _free_bytes(device: torch.device) -> int:
    """Memory that is free on a device, as far as that can be asked."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0


@dataclass
class _Kept:
    """A tensor as it was: the object, how often it had been written to, and its values."""

    tensor: Tensor
    version: int
    values: Tensor | None

    @classmethod
    def of(cls, tensor: Tensor, before: _Kept | None) -> _Kept:
        version = -1 if tensor.is_inference() else tensor._version
        if not _readable(tensor):
            return cls(tensor, version, None)
        now = local(tensor).detach()
        if before is not None and before.values is not None and same_values(now, before.values):
            return cls(tensor, version, before.values)  # no second copy of what did not change
        return cls(tensor, version, now.clone())

    @classmethod
    def large(cls, tensor: Tensor, before: _Kept | None) -> _Kept:
        """One that is compared by how often it was written to, and copied where there is memory."""
        version = -1 if tensor.is_inference() else tensor._version
        if before is not None and before.tensor is tensor and before.version == version:
            return before
        fits = _readable(tensor) and 4 * tensor.nbytes < _free_bytes(tensor.device)
        return cls(tensor, version, local(tensor).detach().clone() if fits else None)

    def differs(self, later: _Kept) -> bool:
        # A layer that writes what was there before still writes: an observer whose range holds.
        if self.tensor is later.tensor and self.version != later.version:
            return True
        if self.values is None or later.values is None or self is later:
            return self.tensor is not later.tensor
        return self.values is not later.values and not same_values(self.values, later.values)

    def put_back(self) -> None:
        if self.values is None or self.tensor.is_inference():
            return
        if self.values.numel() > _MOST_ELEMENTS and self.tensor._version == self.version:
            return
        now = local(self.tensor).detach()
        if now.shape != self.values.shape or now.dtype != self.values.dtype:
            self.tensor.data = self.values.clone()
        elif not same_values(now, self.values):
            # Through .data: a graph that was recorded with these values is not spoilt by them.
            now.data.copy_(self.values)


# --- everything else ------------------------------------------------------------------------------


def _shallow(thing: Any) -> Callable[[], None] | None:
    """A function that restores a container's items or an object's attributes; None without any."""
    if isinstance(thing, dict):
        items = dict(thing.items())

        def refill() -> None:
            if len(thing) != len(items) or any(
                key not in items or items[key] is not value for key, value in thing.items()
            ):
                thing.clear()
                thing.update(items)

        return refill
    if isinstance(thing, (list, deque)):
        values = list(thing)

        def restore() -> None:
            now = list(thing)
            if len(now) != len(values) or any(a is not b for a, b in zip(now, values, strict=True)):
                thing.clear()
                thing.extend(values)

        return restore
    if isinstance(thing, set):
        members = set(thing)

        def replace() -> None:
            if set(thing) != members:
                thing.clear()
                thing.update(members)

        return replace
    return None


def _array(thing: Any) -> Any:
    numpy = sys.modules.get("numpy")
    return thing if numpy is not None and isinstance(thing, numpy.ndarray) else None


def _buffer(thing: Any) -> tuple[bytes, Callable[[], None]] | None:
    """The bytes of an array of Python's own, and what puts them back; None for anything else."""
    if not isinstance(thing, (bytearray, array.array)):
        return None
    kept = thing[:]

    def rewrite() -> None:
        if thing != kept:
            thing[:] = kept  # type: ignore[assignment]

    return bytes(kept), rewrite


def _slots(thing: Any) -> tuple[dict[str, Any], Callable[[], None]] | None:
    """The attributes of an object that stand in no dictionary, and what puts them back."""
    kept = dict(slots(thing))
    if not kept:
        return None

    def refill() -> None:
        for name, value in kept.items():
            if getattr(thing, name, None) is not value:
                object.__setattr__(thing, name, value)  # frozen ones refuse their own

    return kept, refill


def _of_classes(kinds: Iterable[type]) -> Iterator[tuple[type, str, Any]]:
    """Values that somebody keeps on classes: counters, tables, tensors."""
    for kind in kinds:
        if fingerprint.is_of_a_library_named(kind.__module__):
            continue
        for name, value in list(vars(kind).items()):
            if name[:2] != "__" and isinstance(value, _KEPT_BY_CLASSES):
                yield kind, name, value


class State:
    """All that a network remembers, as it is now.

    Attributes and containers are followed, those of plain objects and of functions too. What hooks
    remember is put back as well, but is no state of the modules that they are registered with.

    Args:
        things: modules, and callables that may keep something; what is within them is included.
        before: an earlier state of the same, whose copies of tensors are used again.
        parameters: False to leave them alone: those of FSDP, which come and go.
    """

    def __init__(
        self, things: Iterable[Any], before: State | None = None, *, parameters: bool = True
    ) -> None:
        self.tensors: dict[str, _Kept] = {}
        self.values: dict[str, Any] = {}
        self._put_back: list[Callable[[], object]] = []
        self._classes: set[type] = set()
        self._generators: list[tuple[Any, Any]] = []
        self._seen: dict[int, Any] = {}  # holds what it has seen, so that numbers stay theirs
        self._before = before
        self._parameters = parameters
        self._budget = _MOST_OBJECTS
        pending: deque[tuple[str, Any, bool]] = deque(
            (str(number) if number else "", thing, True) for number, thing in enumerate(things)
        )
        while pending:
            path, thing, counts = pending.popleft()
            pending.extend(self._take(path, thing, counts))
        self._before = None

    def _take(self, path: str, thing: Any, counts: bool) -> Iterator[tuple[str, Any, bool]]:
        """Notes one thing; yields what it consists of."""
        if isinstance(thing, fingerprint.SETTINGS):
            if counts:
                self.values[path] = repr(thing) if isinstance(thing, float) else thing
            return
        if id(thing) in self._seen:
            return
        self._seen[id(thing)] = thing
        if isinstance(thing, Tensor):
            large = not isinstance(thing, nn.Parameter) and thing.numel() > _MOST_ELEMENTS
            old = self._before.tensors.get(path) if self._before is not None else None
            kept = _Kept.large(thing, old) if large else _Kept.of(thing, old)
            if counts:
                self.tensors[path] = kept
            self._put_back.append(kept.put_back)
            return
        if isinstance(thing, (*_OPAQUE, *_LOCKS)):
            return
        if not isinstance(thing, nn.Module):
            self._budget -= 1
            if self._budget < 0:
                return
        generator = generator_state(thing)
        if generator is not None:  # a draw is no state: see rows.py
            self._generators.append((thing, generator[0]))
            self._put_back.append(generator[1])
            return
        numbers = _array(thing)
        if numbers is not None:
            self._take_array(path, numbers, counts)
            return
        own = _buffer(thing)
        if own is not None:
            if counts:
                self.values[path] = own[0]
            self._put_back.append(own[1])
            return
        yield from self._look_into(path, thing, counts)

    def _take_array(self, path: str, numbers: Any, counts: bool) -> None:
        if not numbers.flags.writeable:  # a file in memory, bytes, one number seen as many
            return
        copied = numbers.copy()
        values = copied.tobytes()
        if counts:
            self.values[path] = (copied.shape, values)

        def rewrite() -> None:
            # Elsewhere somebody may have closed it to writing meanwhile.
            if numbers.tobytes() != values:
                numbers[...] = copied

        self._put_back.append(rewrite)

    def _look_into(self, path: str, thing: Any, counts: bool) -> Iterator[tuple[str, Any, bool]]:
        refill = _shallow(thing)
        if refill is not None:
            self._put_back.append(refill)
        if isinstance(thing, types.MethodType):
            yield (path, thing.__self__, counts)
        elif isinstance(thing, types.FunctionType):
            yield from self._of_function(path, thing, counts)
        elif isinstance(thing, (set, frozenset)):
            if counts:
                self.values[path] = sorted(map(repr, thing))
        elif isinstance(thing, (dict, list, tuple, deque)):
            pairs = thing.items() if isinstance(thing, dict) else enumerate(thing)
            items: list[tuple[Any, Any]] = list(pairs)
            if counts:
                self.values[f"{path} items"] = [str(name) for name, _ in items]
            for name, value in items:
                yield (_joined(path, str(name)), value, counts)
        else:
            yield from self._of_object(path, thing, counts)

    def _of_object(self, path: str, thing: Any, counts: bool) -> Iterator[tuple[str, Any, bool]]:
        slotted = _slots(thing)
        if slotted is not None:
            self._put_back.append(slotted[1])
            for name, value in slotted[0].items():
                yield (_joined(path, name), value, counts)
        if isinstance(thing, nn.Module):
            yield from self._of_module(path, thing, counts)
        attributes = getattr(thing, "__dict__", None)
        if not isinstance(attributes, dict):
            return
        origin = type(thing).__module__
        if isinstance(thing, _WRAPPERS) or (
            not isinstance(thing, nn.Module) and origin[:6] == "torch."
        ):
            # What PyTorch keeps for itself: reducers, gathered weights, optimizers.
            attributes = {name: attributes[name] for name in _HOLDERS if name in attributes}
        else:
            refill = _shallow(attributes)
            assert refill is not None
            self._put_back.append(refill)
        for name, value in list(attributes.items()):
            if name == "_parameters" and not self._parameters:
                continue
            hooks = name.endswith("_hooks")  # whoever looks on is no part of the network
            if not ((hooks or name in _HOLDERS) and len(value) == 0):
                yield (_joined(path, name), value, counts and not hooks)

    def _of_module(
        self, path: str, module: nn.Module, counts: bool
    ) -> Iterator[tuple[str, Any, bool]]:
        """Where a module may keep something beside itself: its classes, what its code names."""
        new = [kind for kind in type(module).__mro__ if kind not in self._classes]
        self._classes.update(new)
        for kind, name, value in _of_classes(new):

            def again(kind: type = kind, name: str = name, value: Any = value) -> None:
                if vars(kind).get(name) is not value:
                    setattr(kind, name, value)

            self._put_back.append(again)
            yield (_joined(path, name), value, counts)
        for kind in new:
            function = vars(kind).get("forward")
            if isinstance(function, types.FunctionType):
                yield from self._of_function(path, function, counts)

    def _of_function(
        self, path: str, function: types.FunctionType, counts: bool
    ) -> Iterator[tuple[str, Any, bool]]:
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            try:
                content = cell.cell_contents
            except ValueError:  # not filled yet
                continue

            def refill(cell: Any = cell, content: Any = content) -> None:
                if cell.cell_contents is not content:
                    cell.cell_contents = content

            self._put_back.append(refill)
            yield (_joined(path, name), content, counts)
        if fingerprint.is_of_a_library(function):
            return
        space = function.__globals__
        for name in function.__code__.co_names:
            value = space.get(name)
            if isinstance(value, fingerprint.SETTINGS):
                if name in space:
                    self._put_back.append(lambda n=name, v=value: space.__setitem__(n, v))  # type: ignore[misc]
                    yield (_joined(path, name), value, counts)
            elif isinstance(value, _KEPT_BY_CLASSES):
                yield (_joined(path, name), value, counts)

    def changed_to(self, later: State) -> list[str]:
        """Paths where the later state differs, or was written to: ``"blocks.0.running_mean"``."""
        found = [
            path
            for path in {**self.tensors, **later.tensors}
            if path not in self.tensors
            or path not in later.tensors
            or self.tensors[path].differs(later.tensors[path])
        ]
        found += [
            path.removesuffix(" items")
            for path in {**self.values, **later.values}
            if path not in self.values
            or path not in later.values
            or self.values[path] != later.values[path]
        ]
        return list(dict.fromkeys(found))

    def has_drawn(self) -> bool:
        """Whether numbers were drawn from a generator of the network's own since this was made."""
        for thing, before in self._generators:
            now = generator_state(thing)
            if now is not None and not same_state(now[0], before):
                return True
        return False

    def put_back(self) -> None:
        """Everything is again as it was when this was made."""
        with torch.no_grad():
            for again in self._put_back:
                again()


def _joined(path: str, name: str) -> str:
    if name in _HOLDERS:
        return path
    return f"{path}.{name}" if path else name
