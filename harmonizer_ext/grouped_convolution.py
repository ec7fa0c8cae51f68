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

from harmonizer_ext import network, ops

_GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups"


def _gradients(
    wanted: tuple[bool, bool], grad: Tensor, x: Tensor, weight: Tensor, geometry: Sequence[Any]
) -> tuple[Tensor, Tensor]:
    """Gradients of ``<grad, convolution(x, weight)>`` with respect to x and to the weight."""
    stride, padding, dilation, groups = geometry
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [*wanted, False]
    )
    return found[:2]


class _Bilinear(torch.autograd.Function):
    """The parts that the three of them share: geometry is (stride, padding, dilation, groups)."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.geometry = inputs[-4:]


class _InputGradient(_Bilinear):
    """``apply(grad, weight, x, *geometry)``, linear in grad and weight; x gives its shape."""

    @staticmethod
    def forward(grad: Tensor, weight: Tensor, x: Tensor, *geometry: Any) -> Tensor:
        return _gradients((True, False), grad, x, weight, geometry)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (direction,), (grad, weight) = grads, ctx.saved_tensors
        of_grad = F.conv2d(direction, weight, None, *ctx.geometry)
        of_weight = _gradients((False, True), grad, direction, weight, ctx.geometry)[1]
        return (of_grad, of_weight) + (None,) * 5  # MATH.md (20)


class _WeightGradient(_Bilinear):
    """``apply(grad, x, weight, *geometry)``, linear in grad and x; the weight gives its shape."""

    @staticmethod
    def forward(grad: Tensor, x: Tensor, weight: Tensor, *geometry: Any) -> Tensor:
        return _gradients((False, True), grad, x, weight, geometry)[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (direction,), (grad, x) = grads, ctx.saved_tensors
        of_grad = F.conv2d(x, direction, None, *ctx.geometry)
        of_x = _gradients((True, False), grad, x, direction, ctx.geometry)[0]
        return (of_grad, of_x) + (None,) * 5  # MATH.md (21)


class _Convolution(_Bilinear):
    """``apply(x (B, C, H, W), weight (D, C / groups, h, w), mode, *geometry)``, without a bias."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, mode: Any, *geometry: Any) -> Tensor:
        return F.conv2d(x, weight, None, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _Bilinear.setup_context(ctx, inputs, output)
        ctx.mode = inputs[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        of_x, of_weight = None, None
        if ctx.needs_input_grad[0]:
            of_x = _InputGradient.apply(grad, weight, x, *ctx.geometry)
        if ctx.needs_input_grad[1] and not ctx.mode.inputs_only:
            of_weight = _WeightGradient.apply(grad, x, weight, *ctx.geometry)
        return (of_x, of_weight) + (None,) * 5


# --- the same as operators: a compiler does not look into a Function's backward for another one ---


def _traced_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    (grad,), (x, weight) = grads, ctx.saved_tensors
    traced = torch.ops.harmonizer_ext
    of_x = traced.convolution_input_gradient(grad, weight, x, *ctx.geometry)
    of_weight = traced.convolution_weight_gradient(grad, x, weight, *ctx.geometry)
    return (of_x, of_weight) + (None,) * 4  # what is not wanted, the compiler drops


def _traced_convolution(x: Tensor, weight: Tensor, *geometry: Any) -> Tensor:
    return F.conv2d(x, weight, None, *geometry)


for _signature, _forward, _backward in (
    ("convolution(Tensor x, Tensor weight", _traced_convolution, _traced_backward),
    (
        "convolution_input_gradient(Tensor grad, Tensor weight, Tensor x",
        _InputGradient.forward,
        _InputGradient.backward,
    ),
    (
        "convolution_weight_gradient(Tensor grad, Tensor x, Tensor weight",
        _WeightGradient.forward,
        _WeightGradient.backward,
    ),
):
    _name = _signature.partition("(")[0]
    ops.define(f"{_signature}, {_GEOMETRY}) -> Tensor")
    ops.LIBRARY.impl(_name, _forward, "CompositeExplicitAutograd")
    torch.library.register_autograd(
        f"harmonizer_ext::{_name}",
        _backward,
        setup_context=_Bilinear.setup_context,
        lib=ops.LIBRARY,
    )


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (value[0], value[-1])


class GroupedConvolutions(TorchFunctionMode):
    """A context in which grouped 2D convolutions take the derivatives of this module.

    Attributes:
        inputs_only: while it is true, backward passes through what ran within leave out the
            gradients of the weights, as ``torch.autograd.grad`` of an input tells PyTorch's own
            convolutions, but no others.
    """

    inputs_only = False

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
        out: Tensor
        if torch.compiler.is_compiling():
            out = torch.ops.harmonizer_ext.convolution(input, weight, *geometry)
        else:
            out = _Convolution.apply(input, weight, self, *geometry)
        return out if bias is None else out + bias.to(out.dtype).view(-1, 1, 1)


def has_grouped_convolutions(model: object) -> bool:
    """Whether a module of the network convolves in groups."""
    return any(
        isinstance(module, nn.Conv2d) and module.groups > 1 for module in network.modules(model)
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
