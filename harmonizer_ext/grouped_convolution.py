"""Grouped convolutions whose second derivative is a convolution, not one for each group.

PyTorch differentiates a grouped convolution's backward pass by a loop over the groups: hundreds of
small convolutions for each depthwise layer of a ConvNeXt, an EfficientNet or a MobileNet, most of a
harmonized step. The derivative is a grouped convolution like the others (MATH.md (20)).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

#: stride, padding and dilation, each of two numbers, and the number of groups.
Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], int]


def _convolution(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    stride, padding, dilation, groups = geometry
    return F.conv2d(x, weight, None, stride, padding, dilation, groups)


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of ``<grad, convolution(x, weight)>`` with respect to x and to the weight."""
    stride, padding, dilation, groups = geometry
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [*wanted, False]
    )
    return found[:2]


class _InputGradient(torch.autograd.Function):
    """``apply(grad, weight, x, geometry)``: bilinear in grad and weight; of x the shape matters."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, weight: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(grad, weight)
        ctx.geometry = geometry
        return _gradients(grad, x, weight, geometry, (True, False))[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (direction,), (grad, weight) = grads, ctx.saved_tensors
        _, of_weight = _gradients(grad, direction, weight, ctx.geometry, (False, True))
        return _convolution(direction, weight, ctx.geometry), of_weight, None, None


class _WeightGradient(torch.autograd.Function):
    """``apply(grad, x, weight, geometry)``: bilinear in grad and x; of weight the shape matters."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(grad, x)
        ctx.geometry = geometry
        return _gradients(grad, x, weight, geometry, (False, True))[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (direction,), (grad, x) = grads, ctx.saved_tensors
        of_x, _ = _gradients(grad, x, direction, ctx.geometry, (True, False))
        return _convolution(x, direction, ctx.geometry), of_x, None, None


class _Convolution(torch.autograd.Function):
    """``apply(x (B, C, H, W), weight (D, C / groups, h, w), geometry, mode)``, without a bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, geometry: Geometry, mode: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.mode = geometry, mode
        return _convolution(x, weight, geometry)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        of_x, of_weight = None, None
        if ctx.needs_input_grad[0]:
            of_x = _InputGradient.apply(grad, weight, x, ctx.geometry)
        if ctx.needs_input_grad[1] and not ctx.mode.inputs_only:
            of_weight = _WeightGradient.apply(grad, x, weight, ctx.geometry)
        return of_x, of_weight, None, None


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (value[0], value[-1])


class GroupedConvolutions(TorchFunctionMode):
    """Within it, grouped two-dimensional convolutions take the derivatives of this module.

    Attributes:
        inputs_only: while it is true, backward passes through what ran within leave out the
            gradients of the weights, as ``torch.autograd.grad`` of an input tells PyTorch's own
            convolutions, but no others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inputs_only = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.conv2d:  # which is torch.nn.functional.conv2d
            return self._conv2d(*args, **kwargs)
        return func(*args, **kwargs)

    def _conv2d(
        self,
        input: Tensor,  # noqa: A002 - PyTorch's names
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor:
        if groups == 1 or isinstance(padding, str) or input.ndim != 4:
            return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
        device = input.device.type
        if torch.is_autocast_enabled(device):  # which casts what F.conv2d is given, not what we are
            dtype = torch.get_autocast_dtype(device)
            input, weight = input.to(dtype), weight.to(dtype)  # noqa: A001
        geometry = (_pair(stride), _pair(padding), _pair(dilation), groups)
        out: Tensor = _Convolution.apply(input, weight, geometry, self)
        return out if bias is None else out + bias.to(out.dtype).view(-1, 1, 1)


def has_grouped_convolutions(model: object) -> bool:
    """Whether a module of the network convolves in groups."""
    return isinstance(model, nn.Module) and any(
        isinstance(module, nn.Conv2d) and module.groups > 1 for module in model.modules()
    )


@contextlib.contextmanager
def inputs_only(mode: GroupedConvolutions | None) -> Iterator[None]:
    """Backward passes inside want no gradient of a weight from what ran within the mode."""
    if mode is None:
        yield
        return
    mode.inputs_only = True
    try:
        yield
    finally:
        mode.inputs_only = False
