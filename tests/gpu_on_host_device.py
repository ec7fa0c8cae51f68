"""The device of ``gpu_on_host``: its tensors and memory, and the operations on them."""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

CUDA = torch.device("cuda", 0)

_library: Any = None


class Capture:
    """The launches that are recorded between the begin and the end of one graph."""

    def __init__(self) -> None:
        self.work: list[Callable[[], object]] = []
        self.broken = False


class _State:
    """The state of the one device, for all threads."""

    capture: Capture | None = None
    sync_debug_mode = 0
    streams = itertools.count(1)
    pools = itertools.count(1)
    allocated = 0
    peak = 0
    storages: set[int] = set()  # noqa: RUF012  one device, one state


state = _State()


# --- what CUDA refuses ----------------------------------------------------------------------------


def refuse_in_capture(what: str) -> None:
    if state.capture is not None:
        state.capture.broken = True
        raise torch.AcceleratorError(
            f"CUDA error: operation not permitted when stream is capturing ({what})"
        )


def _wait(what: str) -> None:
    """An operation for which PyTorch makes the host wait."""
    refuse_in_capture(what)
    if state.sync_debug_mode == 2:
        raise RuntimeError("called a synchronizing CUDA operation")
    if state.sync_debug_mode == 1:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=2)


#: Operations whose result's size, or whose value, the host has to know.
_WAITS = {
    *("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2"),
    *("unique_dim", "unique_consecutive", "repeat_interleave", "histc", "bincount"),
}
#: Operations that take tensors of both devices: the host's are copied, or are indices.
_BOTH_DEVICES = {"copy_", "index", "_unsafe_index", "index_put_", "_index_put_impl_"}


def _check(name: str, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    host = [tensor for tensor in tensors if tensor.device.type == "cpu" and tensor.dim()]
    if name == "copy_":
        target, source, *non_blocking = args
        if target.device != source.device:
            pinned = (source if source.device.type == "cpu" else target).is_pinned()
            if not (non_blocking and non_blocking[0]):
                _wait("a copy between host and device for which the host waits")
            elif not pinned:
                refuse_in_capture("a copy between the device and memory that is not pinned")
    elif name in _WAITS or (
        name in ("index", "index_put_", "_index_put_impl_")
        and any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors[1:])
    ):
        _wait(name)
    if name in _BOTH_DEVICES:
        if name != "copy_" and host:
            _wait(f"{name} with indices on the host")
    elif host and len(host) < len(tensors):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"cuda:0 and cpu! (when checking arguments of {name})"
        )


# --- tensors --------------------------------------------------------------------------------------


def _address(thing: Any) -> ctypes.c_void_p:
    return ctypes.c_void_p(thing._cdata)


def host_view(tensor: Tensor) -> Tensor:
    """A tensor of the CPU on the memory of one of the GPU, outside of any graph."""
    view = torch.empty(0, dtype=tensor.dtype)
    _library.gpu_on_host_view(_address(view), _address(tensor))
    return view


def _release(address: int, nbytes: int) -> None:
    state.storages.discard(address)
    state.allocated -= nbytes


def to_device(tensor: Tensor) -> Tensor:
    """The same tensor, from now on the GPU's."""
    storage = tensor.untyped_storage()
    if storage._cdata not in state.storages:
        state.storages.add(storage._cdata)
        state.allocated += storage.nbytes()
        state.peak = max(state.peak, state.allocated)
        weakref.finalize(storage, _release, storage._cdata, storage.nbytes())
    _library.gpu_on_host_move(_address(tensor))
    return tensor


def each_tensor(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Arguments or results of an operation with each of its tensors replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(each_tensor(part, function) for part in value)
    return value


def tensors_of(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    each_tensor(value, found.append)
    return found


# --- operations -----------------------------------------------------------------------------------


class _Schema:
    """All that has to be known of an operation before it is executed."""

    def __init__(self, operator: Any) -> None:
        arguments = operator._schema.arguments
        self.name: str = operator._schema.name.partition("::")[2]
        self.draws = any(argument.name == "generator" for argument in arguments)
        self.device = any(argument.name == "device" for argument in arguments)
        self.written = {
            argument.name
            for argument in arguments
            if argument.alias_info is not None and argument.alias_info.is_write
        }
        self.positions = [argument.name for argument in arguments if not argument.kwarg_only]
        self.views = not self.written and any(
            returned.alias_info is not None for returned in operator._schema.returns
        )


_schema = functools.cache(_Schema)


#: Operations that the CPU has no kernel for, or must not choose one for.
def _set(
    tensor: Tensor, source: Any, offset: int = 0, sizes: Any = None, strides: Any = ()
) -> Tensor:
    """``Tensor.set_``, from a tensor or from a storage."""
    if isinstance(source, Tensor):
        offset, sizes, strides = source.storage_offset(), source.shape, source.stride()
        source = source.untyped_storage()
    if sizes is None:
        sizes = (source.nbytes() // tensor.itemsize,)
    if not strides:
        strides = torch.empty(sizes, device="meta").stride()
    numbers = [(ctypes.c_int64 * len(sizes))(*values) for values in (sizes, strides)]
    where = (ctypes.c_int64(offset), ctypes.c_int64(len(sizes)))
    _library.gpu_on_host_set(_address(tensor), _address(source), *where, *numbers)
    return tensor


def _clone_storage(storage: Any) -> Any:
    """``UntypedStorage.clone``, as copies of modules are made."""
    if storage.device.type != "cuda":
        return type(storage)(storage.nbytes(), device=storage.device).copy_(storage)
    whole = torch.empty(0, dtype=torch.uint8, device=CUDA).set_(storage)
    return whole.clone().untyped_storage()


_OTHERWISE: dict[str, Callable[..., Any]] = {
    "set_": _set,
    "record_stream": lambda tensor, stream: None,
    "_fused_sdp_choice": lambda *args, **kwargs: int(torch.nn.attention.SDPBackend.MATH.value),
}


def execute(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation with a tensor of the GPU among its arguments, or for its result."""
    schema = _schema(operator)
    if schema.name in _OTHERWISE:
        return _OTHERWISE[schema.name](*args, **kwargs)
    if schema.draws:
        if kwargs.get("generator") is not None:
            refuse_in_capture("a generator that is not registered with the graph")
        else:
            kwargs["generator"] = torch.cuda.default_generators[0]
    if schema.device and kwargs.get("device") is not None:
        kwargs["device"] = torch.device("cpu")
    values = tuple(kwargs.values())
    _check(schema.name, args, tensors_of((args, values)))
    originals: dict[int, Tensor] = {}
    views: list[Tensor] = []

    def view(tensor: Tensor) -> Tensor:
        on_host = host_view(tensor) if tensor.device.type == "cuda" else tensor
        originals[id(on_host)] = tensor
        views.append(on_host)
        return on_host

    args = each_tensor(args, view)
    kwargs = dict(zip(kwargs, each_tensor(values, view), strict=True))
    result = _record(operator, schema, args, kwargs) if state.capture else operator(*args, **kwargs)
    if schema.name.startswith("empty"):
        # So that what reads memory that nobody wrote is seen to. An index is one that exists.
        result.fill_(math.nan if result.is_floating_point() else 0)
    memory: dict[int, Tensor] = {}
    for leaf in views:
        whole = originals[id(leaf)]
        if whole is not leaf:
            layout = (leaf.shape, leaf.stride(), leaf.data_ptr())
            if schema.written and layout != (whole.shape, whole.stride(), whole.data_ptr()):
                _library.gpu_on_host_adopt(_address(whole), _address(leaf))
            memory[leaf.untyped_storage()._cdata] = whole

    def given(made: Tensor) -> Tensor:
        if id(made) in originals:
            return originals[id(made)]
        whole = memory.get(made.untyped_storage()._cdata)
        if whole is None:
            return to_device(made)
        _library.gpu_on_host_rebase(_address(made), _address(whole))
        return made

    return each_tensor(result, given)


def _record(operator: Any, schema: _Schema, args: Any, kwargs: Any) -> Any:
    """The operation's results without its values, which a replay of the graph fills in."""
    assert state.capture is not None
    if schema.views:
        return operator(*args, **kwargs)
    if schema.written:
        # On a copy of what it writes: refused where it would be refused, and without effect.
        def copies(name: str, value: Any) -> Any:
            return each_tensor(value, torch.clone) if name in schema.written else value

        operator(
            *(copies(name, value) for name, value in zip(schema.positions, args, strict=False)),
            **{name: copies(name, value) for name, value in kwargs.items()},
        )
        state.capture.work.append(lambda: operator(*args, **kwargs))
        named = dict(zip(schema.positions, args, strict=False)) | kwargs
        written = [named[name] for name in named if name in schema.written]
        returns = len(operator._schema.returns)
        return None if not returns else written[0] if returns == 1 else tuple(written)
    result = operator(*args, **kwargs)
    record(result, lambda: operator(*args, **kwargs))
    return result


def record(result: Any, again: Callable[[], Any]) -> None:
    """Notes that a replay is to fill the tensors of ``result`` with those of ``again()``."""
    assert state.capture is not None
    # Names of their own for the same memory: what follows may make the others part of a graph.
    made = [tensor.detach() for tensor in tensors_of(result)]

    def replay() -> None:
        for old, new in zip(made, tensors_of(again()), strict=True):
            old.copy_(new)

    state.capture.work.append(replay)
    for tensor in made:
        if tensor.is_floating_point():
            tensor.fill_(math.nan)


# --- in the place of PyTorch's own ----------------------------------------------------------------


def _operations() -> Iterable[str]:
    """Names of the operations that must not be left to what PyTorch has registered for "cuda"."""

    def registered(key: str) -> list[str]:
        names = torch._C._dispatch_get_registrations_for_dispatch_key(key)
        return [name.removeprefix("aten::") for name in names if name.startswith("aten::")]

    if torch.backends.cuda.is_built():
        yield from registered("CUDA")
    # They have one kernel for every device, which looks for the device's own half in a table.
    yield from ("copy_", "convolution", "convolution_backward")


def _operator(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


_libraries: list[torch.library.Library] = []


def _install_operations() -> None:
    aten = torch.library.Library("aten", "IMPL", "CUDA")
    others = torch.library.Library("_", "IMPL", "CUDA")
    _libraries.extend((aten, others))
    others.fallback(execute)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it overrides kernels of CUDA: that is what it is for
        for name in dict.fromkeys(_operations()):
            aten.impl(name, functools.partial(execute, _operator(name)), allow_override=True)


def install(library: ctypes.CDLL) -> None:
    """Gives PyTorch the operations of the device."""
    global _library
    _library = library
    for kind in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{kind}_sdp")(False)  # their kernels are not the CPU's
    torch.UntypedStorage.clone = _clone_storage
    _install_operations()
