"""The fused C++ kernels: tensors in, addresses out to csrc/cpu, one thread per sample."""

from __future__ import annotations

import functools
import importlib
import threading
from types import ModuleType

import torch
from torch import Tensor

from harmonizer_ext import contract

# The order of csrc/harmonizer.h.
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_FORMULATIONS = {"released": 0, "paper": 1}
_DISTANCES = {"mse": 0, "l2": 1}

_MapsArgument = tuple[int, int, tuple[int, ...]]


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("harmonizer_ext._native"), None
    except ModuleNotFoundError:
        return None, (
            "the native module was not built, because no C++ compiler was found when "
            "harmonizer_ext was installed (or HARMONIZER_NATIVE=0 was set); install one "
            "(Debian: apt install g++) and reinstall with "
            "pip install --force-reinstall --no-deps --no-cache-dir"
        )
    except ImportError as error:
        return None, f"the native module does not load: {error}"


def native() -> ModuleType:
    """The compiled module.

    Raises:
        RuntimeError: it cannot be loaded, with the reason.
    """
    module, reason = _load()
    if module is None:
        raise RuntimeError(f"backend 'cpu': {reason}")
    return module


def why_not(device_type: str, dtype: torch.dtype | None = None) -> str | None:
    """None if the kernels run on this device, otherwise the reason."""
    if device_type != "cpu":
        return "it reads host memory; move the tensors with .cpu()"
    return _load()[1]


class _Workspace(threading.local):
    """One buffer per Python thread, grown when needed: fresh pages cost more than the work."""

    buffer: Tensor | None = None

    def __call__(self, nbytes: int) -> Tensor:
        if self.buffer is None or self.buffer.numel() < nbytes:
            self.buffer = torch.empty(max(nbytes, 1), dtype=torch.uint8)
        return self.buffer


_workspace = _Workspace()


def _maps(tensor: Tensor) -> _MapsArgument:
    """(address, dtype, strides) of (B, C, H, W) or (B, H, W)."""
    strides = tensor.stride()
    if len(strides) == 3:
        strides = (strides[0], 0, strides[1], strides[2])
    return tensor.data_ptr(), _DTYPES[tensor.dtype], strides


def _threads(samples: int) -> int:
    return max(1, min(torch.get_num_threads(), samples))


def harmonization(
    saliency: Tensor,
    heatmaps: Tensor,
    weights: Tensor,
    formulation: str,
    levels: int,
    distance: str,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row losses (B,), unit gradient (B, 1, H, W) or (0,), saliency std (B,)."""
    batch, channels, height, width = saliency.shape
    weights = weights.to(contract.accumulation_dtype(saliency, heatmaps)).contiguous()
    # The large one first: behind small ones, a later call of the same size would not fit where this
    # one was freed, and touching fresh pages takes as long as the kernel.
    gradient = saliency.new_empty((batch, 1, height, width) if with_gradient else (0,))
    rows, std = torch.empty_like(weights), torch.empty_like(weights)
    if batch:
        native().cpu_loss(
            (batch, channels, height, width),
            levels,
            _FORMULATIONS[formulation],
            _DISTANCES[distance],
            _maps(saliency),
            _maps(heatmaps),
            weights.data_ptr(),
            rows.data_ptr(),
            std.data_ptr(),
            gradient.data_ptr() if with_gradient else 0,
            _threads(batch),
            _workspace,
        )
    return rows, gradient, std


def pyramid(maps: Tensor, levels: int) -> list[Tensor]:
    """Levels 1 to levels-1 of (B, C, H, W)."""
    batch, channels, height, width = maps.shape
    sizes = contract.level_sizes(height, width, levels)[1:]
    outputs = [maps.new_empty((batch, channels, *size)) for size in sizes]
    if batch * channels:
        native().cpu_pyramid(
            (batch, channels, height, width),
            levels,
            _maps(maps),
            [output.data_ptr() for output in outputs],
            _threads(batch * channels),
            _workspace,
        )
    return outputs


def pyramid_adjoint(gradients: list[Tensor], height: int, width: int) -> Tensor:
    """Adjoint of ``pyramid``: (B, C, H, W) from the gradients of its outputs."""
    batch, channels = gradients[0].shape[:2]
    output = gradients[0].new_empty((batch, channels, height, width))
    if batch * channels:
        native().cpu_pyramid_adjoint(
            (batch, channels, height, width),
            [_maps(gradient) for gradient in gradients],
            output.data_ptr(),
            _threads(batch * channels),
            _workspace,
        )
    return output


def _standardize(maps: Tensor, grad: Tensor | None) -> Tensor:
    output = maps.new_empty(maps.shape)
    if maps.numel():
        native().cpu_standardize(
            tuple(maps.shape),
            _maps(maps),
            None if grad is None else _maps(grad),
            output.data_ptr(),
            _threads(maps.shape[0] * maps.shape[1]),
            _workspace,
        )
    return output


def standardize_cut(maps: Tensor) -> Tensor:
    """(B, C, H, W) to the same shape and dtype."""
    return _standardize(maps, None)


def standardize_cut_backward(grad: Tensor, maps: Tensor) -> Tensor:
    """Gradient with respect to ``maps``, in their dtype."""
    return _standardize(maps, grad)


def positive_part_mse(a: Tensor, b: Tensor) -> Tensor:
    """(B,) from two (B, H, W)."""
    rows = a.new_empty(a.shape[0], dtype=contract.accumulation_dtype(a, b))
    if a.shape[0]:
        native().cpu_positive_part_mse(
            tuple(a.shape),
            _maps(a),
            _maps(b),
            0,
            rows.data_ptr(),
            0,
            0,
            _threads(a.shape[0]),
            _workspace,
        )
    return rows


def positive_part_mse_backward(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients with respect to ``a`` and ``b``, each in its own dtype."""
    grad = grad.to(contract.accumulation_dtype(a, b)).contiguous()
    grad_a, grad_b = a.new_empty(a.shape), b.new_empty(b.shape)
    if a.shape[0]:
        native().cpu_positive_part_mse(
            tuple(a.shape),
            _maps(a),
            _maps(b),
            grad.data_ptr(),
            0,
            grad_a.data_ptr(),
            grad_b.data_ptr(),
            _threads(a.shape[0]),
            _workspace,
        )
    return grad_a, grad_b
