"""The parts that the backends of the native module share: loading it, tensors in, addresses out.

``cpu`` and ``cuda`` differ in the functions that they call (csrc/bindings.cpp), in what says where
to run, and in where a workspace comes from.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from harmonizer_ext import contract

# The order of csrc/harmonizer.h.
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_FORMULATIONS = {"released": 0, "paper": 1}
_DISTANCES = {"mse": 0, "l2": 1}

OPERATIONS = ("loss", "pyramid", "pyramid_adjoint", "standardize", "positive_part_mse")

REINSTALL = "reinstall with pip install --force-reinstall --no-deps --no-cache-dir"

_MapsArgument = tuple[int, int, tuple[int, ...]]


@functools.cache
def load() -> tuple[ModuleType | None, str | None]:
    """The compiled module and None, or None and the reason."""
    try:
        return importlib.import_module("harmonizer_ext._native"), None
    except ModuleNotFoundError:
        return None, (
            "the native module was not built, because no C++ compiler was found when "
            "harmonizer_ext was installed (or HARMONIZER_NATIVE=0 was set); install one "
            f"(Debian: apt install g++) and {REINSTALL}"
        )
    except ImportError as error:
        return None, f"the native module does not load: {error}"


def address(tensor: Tensor, beside: Tensor, dtype: torch.dtype | None = None) -> int:
    """The address of a tensor's memory, which the kernels read or write without asking again.

    Args:
        tensor: whose memory.
        beside: the tensor on whose device the kernel runs.
        dtype: what the kernel takes it for; None where it is told the tensor's own. A tensor of a
            given dtype must be contiguous too.

    Raises:
        RuntimeError: it lies elsewhere, or is of another dtype or layout.
    """
    if tensor.device != beside.device:
        raise RuntimeError(
            f"native kernel: expected memory on {beside.device}, got a tensor on {tensor.device}"
        )
    if dtype is not None and (tensor.dtype != dtype or not tensor.is_contiguous()):
        raise RuntimeError(
            f"native kernel: expected a contiguous tensor of {dtype}, got {tensor.dtype} with "
            f"strides {tensor.stride()}"
        )
    found = tensor.data_ptr()
    if not found and tensor.numel():
        raise RuntimeError(
            f"maps: expected a tensor with memory of its own, got {type(tensor).__name__} of shape "
            f"{tuple(tensor.shape)} without; write it out with .clone()"
        )
    return found


def maps_argument(tensor: Tensor, beside: Tensor | None = None) -> _MapsArgument:
    """(address, dtype, strides) of (B, C, H, W) or (B, H, W), as csrc/bindings.cpp takes them.

    The tensor must be what ``contract.materialized`` returns.
    """
    strides = tensor.stride()
    if len(strides) == 3:
        strides = (strides[0], 0, strides[1], strides[2])
    where = address(tensor, tensor if beside is None else beside)
    return where, _DTYPES[tensor.dtype], strides


class Kernels:
    """The operations of one device, each one call of the native module.

    Args:
        prefix: of the module's functions: "cpu" or "cuda".
        place: from one of the tensors and the number of samples, what says where to run.
        workspace: from one of the tensors, what allocates a number of bytes beside it.
    """

    def __init__(
        self,
        prefix: str,
        place: Callable[[Tensor, int], Any],
        workspace: Callable[[Tensor], Callable[[int], Tensor]],
    ) -> None:
        self._prefix = prefix
        self._place = place
        self._workspace = workspace

    def native(self) -> ModuleType:
        """The compiled module.

        Raises:
            RuntimeError: it cannot be loaded, with the reason.
        """
        module, reason = load()
        if module is None:
            raise RuntimeError(f"backend {self._prefix!r}: {reason}")
        return module

    @functools.cached_property
    def _functions(self) -> dict[str, Callable[..., None]]:
        module = self.native()
        return {name: getattr(module, f"{self._prefix}_{name}") for name in OPERATIONS}

    def _call(
        self,
        operation: str,
        beside: Tensor,
        samples: int,
        *arguments: Any,
        options: tuple[int, ...] = (),
    ) -> None:
        place = self._place(beside, samples)
        if options:
            place = (*place, *options)
        self._functions[operation](*arguments, place, self._workspace(beside))

    def harmonization(
        self,
        saliency: Tensor,
        heatmaps: Tensor,
        weights: Tensor,
        formulation: str,
        levels: int,
        distance: str,
        with_gradient: bool,
        options: tuple[int, ...] = (),
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Row losses (B,), unit gradient (B, 1, H, W) or (0,), saliency std (B,).

        ``options`` are those of one device; see csrc/bindings.cpp.
        """
        saliency, heatmaps, weights = contract.materialized(saliency, heatmaps, weights)
        batch, channels, height, width = saliency.shape
        dtype = contract.accumulation_dtype(saliency, heatmaps)
        weights = weights.to(dtype).contiguous()
        # The large one first: behind small ones, a later call of the same size would not fit where
        # this one was freed, and touching fresh pages takes as long as the CPU's kernel.
        gradient = saliency.new_empty((batch, 1, height, width) if with_gradient else (0,))
        rows, std = torch.empty_like(weights), torch.empty_like(weights)
        if batch:
            self._call(
                "loss",
                saliency,
                batch,
                (batch, channels, height, width),
                levels,
                _FORMULATIONS[formulation],
                _DISTANCES[distance],
                maps_argument(saliency),
                maps_argument(heatmaps, saliency),
                address(weights, saliency, dtype),
                address(rows, saliency, dtype),
                address(std, saliency, dtype),
                address(gradient, saliency, saliency.dtype) if with_gradient else 0,
                options=options,
            )
        return rows, gradient, std

    def pyramid(self, maps: Tensor, levels: int) -> list[Tensor]:
        """Levels 1 to levels-1 of (B, C, H, W)."""
        (maps,) = contract.materialized(maps)
        batch, channels, height, width = maps.shape
        sizes = contract.level_sizes(height, width, levels)[1:]
        outputs = [maps.new_empty((batch, channels, *size)) for size in sizes]
        if batch * channels:
            self._call(
                "pyramid",
                maps,
                batch * channels,
                (batch, channels, height, width),
                levels,
                maps_argument(maps),
                [address(output, maps, maps.dtype) for output in outputs],
            )
        return outputs

    def pyramid_adjoint(self, gradients: list[Tensor], height: int, width: int) -> Tensor:
        """Adjoint of ``pyramid``: (B, C, H, W) from the gradients of its outputs."""
        gradients = contract.materialized(*gradients)
        batch, channels = gradients[0].shape[:2]
        output = gradients[0].new_empty((batch, channels, height, width))
        if batch * channels:
            self._call(
                "pyramid_adjoint",
                output,
                batch * channels,
                (batch, channels, height, width),
                [maps_argument(gradient, output) for gradient in gradients],
                address(output, output, output.dtype),
            )
        return output

    def _standardize(self, maps: Tensor, grad: Tensor | None) -> Tensor:
        (maps,) = contract.materialized(maps)
        if grad is not None:
            (grad,) = contract.materialized(grad)
        output = maps.new_empty(maps.shape)
        if maps.numel():
            self._call(
                "standardize",
                maps,
                maps.shape[0] * maps.shape[1],
                tuple(maps.shape),
                maps_argument(maps),
                None if grad is None else maps_argument(grad, maps),
                address(output, maps, maps.dtype),
            )
        return output

    def standardize_cut(self, maps: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape and dtype."""
        return self._standardize(maps, None)

    def standardize_cut_backward(self, grad: Tensor, maps: Tensor) -> Tensor:
        """Gradient with respect to ``maps``, in their dtype."""
        return self._standardize(maps, grad)

    def positive_part_mse(self, a: Tensor, b: Tensor) -> Tensor:
        """(B,) from two (B, H, W)."""
        a, b = contract.materialized(a, b)
        dtype = contract.accumulation_dtype(a, b)
        rows = a.new_empty(a.shape[0], dtype=dtype)
        if a.shape[0]:
            self._call(
                "positive_part_mse",
                a,
                a.shape[0],
                tuple(a.shape),
                maps_argument(a),
                maps_argument(b, a),
                0,
                address(rows, a, dtype),
                0,
                0,
            )
        return rows

    def positive_part_mse_backward(
        self, grad: Tensor, a: Tensor, b: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients with respect to ``a`` and ``b``, each in its own dtype."""
        grad, a, b = contract.materialized(grad, a, b)
        dtype = contract.accumulation_dtype(a, b)
        grad = grad.to(dtype).contiguous()
        grad_a, grad_b = a.new_empty(a.shape), b.new_empty(b.shape)
        if a.shape[0]:
            self._call(
                "positive_part_mse",
                a,
                a.shape[0],
                tuple(a.shape),
                maps_argument(a),
                maps_argument(b, a),
                address(grad, a, dtype),
                0,
                address(grad_a, a, a.dtype),
                address(grad_b, a, b.dtype),
            )
        return grad_a, grad_b
