"""The interchangeable backends: which exist, which can run where, and why another cannot.

A backend is a module with the functions of ``ops`` and one predicate, ``why_not(device_type,
dtype, index)``, that returns None or the reason; ``index`` is the device's number, or None for the
current one. The same predicate chooses and explains. A new backend is one module and one line in
``PREFERENCE``.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType

import torch

from harmonizer_ext import contract

#: Best first. ``reference`` serves every device, so that a choice always exists; what follows it is
#: never picked: on the CPU, Triton's interpreter.
PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference", "triton"),
    "cuda": ("cuda", "triton", "reference"),
    "*": ("reference",),
}

#: Overrides ``backend=None``, for one process, without a change of code.
ENVIRONMENT_VARIABLE = "HARMONIZER_BACKEND"

_announced: set[tuple[str, str]] = set()


def names() -> tuple[str, ...]:
    """Every backend this version knows, on any device."""
    return tuple(dict.fromkeys(name for order in PREFERENCE.values() for name in order))


@functools.cache
def get(name: str) -> ModuleType:
    """The module of a backend."""
    contract.check_choice("backend", name, names())
    return importlib.import_module(f"harmonizer_ext.backends.{name}")


def why_not(name: str, device: str | torch.device, dtype: torch.dtype | None = None) -> str | None:
    """None if the backend runs on this device (and dtype), otherwise the reason.

    Args:
        name: of the backend.
        device: such as "cpu", "cuda" (the current GPU) or "cuda:1".
        dtype: as in ``select``.
    """
    device = torch.device(device)
    reason: str | None = get(name).why_not(device.type, dtype, device.index)
    return reason


def available_backends(device: str | torch.device = "cpu") -> tuple[str, ...]:
    """Names of the backends that run on a device, best first.

    Args:
        device: anything ``torch.device`` accepts.

    Returns:
        A tuple such as ``("cpu", "reference")``; the first is what ``backend=None`` picks.
    """
    device = torch.device(device)
    order = PREFERENCE.get(device.type, PREFERENCE["*"])
    return tuple(name for name in order if why_not(name, device) is None)


def select(backend: str | None, device: str | torch.device, dtype: torch.dtype) -> str:
    """The backend that serves tensors of this device and accumulation dtype.

    Args:
        backend: a name, which is obeyed or refused with the reason, never replaced; or None for
            ``$HARMONIZER_BACKEND`` where it is set, else the best one available.
        device: that of the tensors; the GPUs of a machine may differ.
        dtype: ``contract.accumulation_dtype`` of what the operation will read.

    Raises:
        ValueError: no backend has this name.
        RuntimeError: the named backend cannot run here, with the reason.
    """
    device = torch.device(device)
    wanted = backend or os.environ.get(ENVIRONMENT_VARIABLE) or None
    if wanted is not None:
        reason = why_not(wanted, device, dtype)
        if reason is not None:
            origin = "backend" if backend else f"${ENVIRONMENT_VARIABLE}"
            raise RuntimeError(
                f"{origin}={wanted!r} cannot run on a {device.type} tensor: {reason}. "
                f"Available there: {', '.join(available_backends(device))}"
            )
        return wanted
    passed_over: dict[str, str] = {}
    for name in PREFERENCE.get(device.type, PREFERENCE["*"]):
        reason = why_not(name, device, dtype)
        if reason is None:
            for worse, why in passed_over.items():
                _announce(worse, device.type, why, name)
            return name
        passed_over[name] = reason
    raise RuntimeError(f"no backend serves {device.type}")


# The choice depends on device and dtype alone, so that a compiled graph may take it as a constant.
# This is what torch.compiler.assume_constant_result does, which imports all of Dynamo to do it: a
# second of everybody's import. That compilation still works is a test (tests/test_ops.py).
select._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _announce(name: str, device_type: str, reason: str, chosen: str) -> None:
    """Says once per process and device that a faster backend was passed over."""
    if (name, device_type) in _announced:
        return
    _announced.add((name, device_type))
    warnings.warn(
        f"harmonizer_ext: backend {name!r} is passed over on {device_type}: {reason}. {chosen!r} "
        f"computes instead; `python -m harmonizer_ext` shows what runs here.",
        RuntimeWarning,
        stacklevel=4,
    )
