"""The operations as PyTorch sees them: schemas, fakes, derivatives, one dispatch per call.

The fused loss is one op that returns row losses and the unit gradient together; its derivative
only scales that gradient (MATH.md, "One fused call"). The reference backend never comes here: it
is plain PyTorch, and autograd differentiates it as often as one likes.

The backends are chosen by name before the call, because PyTorch's dispatcher knows devices only
and several backends may serve one device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harmonizer_ext import backends, contract

LIBRARY = torch.library.Library("harmonizer_ext", "DEF")


def define(schema: str) -> None:
    """Declares an op of this package by its schema; its kernels go to ``LIBRARY``."""
    # The outputs never alias the inputs and nothing is mutated, which is what pt2_compliant says.
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


class _DifferentiatedOnce(torch.autograd.Function):
    """Identity on the gradient of a fused op; refuses to be differentiated.

    ``apply(gradient, name, *inputs)``: the edges to the op's inputs make sure that a further
    derivative comes here and is refused, where it would otherwise be dropped in silence.
    """

    @staticmethod
    def forward(gradient: Tensor, name: str, *inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(
            f"{ctx.name}: the fused backends differentiate once (the saliency itself may come from "
            f"a gradient: that is the double backward of the training step). For a further "
            f'derivative use backend="reference"'
        )


def _differentiated_once(name: str, gradient: Tensor, *inputs: Tensor) -> Tensor:
    # A compiled graph has no further derivative anyway, and PyTorch says so itself.
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradient
    out: Tensor = _DifferentiatedOnce.apply(gradient, name, *inputs)
    return out


# --- the fused loss -------------------------------------------------------------------------------

define(
    "harmonization(Tensor saliency, Tensor heatmaps, Tensor weights, str formulation, int levels, "
    "str distance, str backend, bool with_gradient) -> (Tensor, Tensor, Tensor)"
)
define("harmonization_backward(Tensor gradient, Tensor grad_rows, int channels) -> Tensor")


@torch.library.impl(LIBRARY, "harmonization", "CompositeExplicitAutograd")
def _harmonization(
    saliency: Tensor,
    heatmaps: Tensor,
    weights: Tensor,
    formulation: str,
    levels: int,
    distance: str,
    backend: str,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    out: tuple[Tensor, Tensor, Tensor] = backends.get(backend).harmonization(
        saliency, heatmaps, weights, formulation, levels, distance, with_gradient
    )
    return out


@torch.library.register_fake("harmonizer_ext::harmonization", lib=LIBRARY)
def _harmonization_fake(
    saliency: Tensor,
    heatmaps: Tensor,
    weights: Tensor,
    formulation: str,
    levels: int,
    distance: str,
    backend: str,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, height, width = saliency.shape
    gradient = (batch, 1, height, width) if with_gradient else (0,)
    rows = weights.new_empty(batch, dtype=contract.accumulation_dtype(saliency, heatmaps))
    return rows, saliency.new_empty(gradient), torch.empty_like(rows)


@torch.library.impl(LIBRARY, "harmonization_backward", "CompositeExplicitAutograd")
def _harmonization_backward(gradient: Tensor, grad_rows: Tensor, channels: int) -> Tensor:
    # Every channel has the same gradient (MATH.md (5)), so it is stored once: writing it out for
    # each gains nothing in a training step (bench/NOTES.md). The product is of the accumulation
    # dtype, because grad_rows may be far outside the range of a half, and rounded as it is written.
    scaled = torch.empty_like(gradient)
    torch.mul(gradient, grad_rows.detach().view(-1, 1, 1, 1), out=scaled)
    return scaled.expand(-1, channels, -1, -1)


@torch.library.register_fake("harmonizer_ext::harmonization_backward", lib=LIBRARY)
def _harmonization_backward_fake(gradient: Tensor, grad_rows: Tensor, channels: int) -> Tensor:
    return torch.empty_like(gradient).expand(-1, channels, -1, -1)


def _scales_by_one(grad_rows: Tensor) -> bool:
    """Whether the unit gradient is the answer, asked only where looking costs nothing.

    On a GPU a look would stall its queue, while tracing there is no value, and under
    ``create_graph`` the result must carry the graph that refuses a further derivative.
    """
    return (
        type(grad_rows) is Tensor
        and grad_rows.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and all(value == 1 for value in contract.materialized(grad_rows)[0].tolist())
    )


class HarmonizationFunction(torch.autograd.Function):
    """Row losses, unit gradient and saliency standard deviation in one pass; backward scales.

    ``apply(saliency (B, C, H, W), heatmaps (B, H, W), weights (B,), formulation, levels, distance,
    backend, with_gradient)`` returns ``rows (B,)``, ``gradient (B, 1, H, W)`` and ``std (B,)``.
    Only ``rows`` is differentiable, and only with respect to ``saliency``.
    """

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        out: tuple[Tensor, Tensor, Tensor] = torch.ops.harmonizer_ext.harmonization(*inputs)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        saliency, with_gradient = inputs[0], inputs[7]
        _, gradient, std = output
        if ctx.needs_input_grad[0] and not with_gradient:
            raise RuntimeError(
                "with_gradient=False: expected True where saliency requires a gradient; "
                "call the loss under torch.no_grad() for the value alone"
            )
        # The saliency is saved for its shape and for its place in the graph, not for its values.
        ctx.save_for_backward(gradient, saliency)
        ctx.mark_non_differentiable(gradient, std)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient, saliency = ctx.saved_tensors
        grad_rows = grads[0]
        if grad_rows is None:
            return (None,) * 8
        if _scales_by_one(grad_rows) and saliency.shape[1] > 1:
            # Nothing to scale: a pass over the maps less. The view cannot be accumulated into in
            # place, because its channels share their memory.
            return (gradient.expand(saliency.shape),) + (None,) * 7
        grad = torch.ops.harmonizer_ext.harmonization_backward(
            gradient, grad_rows, saliency.shape[1]
        )
        grad = _differentiated_once("harmonization_loss", grad, saliency, grad_rows)
        return (grad,) + (None,) * 7


class _EagerHarmonizationFunction(HarmonizationFunction):
    """The same without what torch.func and torch.compile need, at half the cost of a call."""

    setup_context = staticmethod(torch.autograd.Function.setup_context)

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        # Straight to the kernels: the dispatcher would cost more than a small map.
        out: tuple[Tensor, Tensor, Tensor] = backends.get(inputs[6]).harmonization(
            *inputs[:6], inputs[7]
        )
        HarmonizationFunction.setup_context(ctx, inputs, out)
        return out


def harmonization(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``HarmonizationFunction.apply``, by the shortest way that serves these inputs."""
    traced = (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or any(type(value) is not Tensor for value in inputs[:3])
    )
    if traced and torch.compiler.is_compiling() and not torch.is_grad_enabled():
        # Dynamo mistakes the first input of a Function for its context where no gradient is wanted.
        unrecorded: tuple[Tensor, Tensor, Tensor] = torch.ops.harmonizer_ext.harmonization(*inputs)
        return unrecorded
    function = HarmonizationFunction if traced else _EagerHarmonizationFunction
    out: tuple[Tensor, Tensor, Tensor] = function.apply(*inputs)
    return out


# --- the Gaussian pyramid: linear, so that its derivatives of every order are itself --------------

define("pyramid(Tensor maps, int levels, str backend) -> Tensor[]")
define("pyramid_adjoint(Tensor[] gradients, int height, int width, str backend) -> Tensor")


@torch.library.impl(LIBRARY, "pyramid", "CompositeExplicitAutograd")
def _pyramid(maps: Tensor, levels: int, backend: str) -> list[Tensor]:
    out: list[Tensor] = backends.get(backend).pyramid(maps, levels)
    return out


@torch.library.register_fake("harmonizer_ext::pyramid", lib=LIBRARY)
def _pyramid_fake(maps: Tensor, levels: int, backend: str) -> list[Tensor]:
    sizes = contract.level_sizes(maps.shape[2], maps.shape[3], levels)[1:]
    return [maps.new_empty((*maps.shape[:2], *size)) for size in sizes]


@torch.library.impl(LIBRARY, "pyramid_adjoint", "CompositeExplicitAutograd")
def _pyramid_adjoint(gradients: list[Tensor], height: int, width: int, backend: str) -> Tensor:
    out: Tensor = backends.get(backend).pyramid_adjoint(gradients, height, width)
    return out


@torch.library.register_fake("harmonizer_ext::pyramid_adjoint", lib=LIBRARY)
def _pyramid_adjoint_fake(gradients: list[Tensor], height: int, width: int, backend: str) -> Tensor:
    return gradients[0].new_empty((*gradients[0].shape[:2], height, width))


class PyramidFunction(torch.autograd.Function):
    """``apply(maps (B, C, H, W), levels, backend)`` returns the levels 1 to levels-1."""

    @staticmethod
    def forward(maps: Tensor, levels: int, backend: str) -> tuple[Tensor, ...]:
        return tuple(torch.ops.harmonizer_ext.pyramid(maps, levels, backend))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        maps, _, ctx.backend = inputs
        ctx.height, ctx.width = maps.shape[2:]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        size, backend = (ctx.height, ctx.width), ctx.backend
        # Dynamo cannot trace a function within the backward of another.
        if torch.compiler.is_compiling():
            adjoint = torch.ops.harmonizer_ext.pyramid_adjoint
            return adjoint(list(gradients), *size, backend), None, None
        return PyramidAdjointFunction.apply(*size, backend, *gradients), None, None


class PyramidAdjointFunction(torch.autograd.Function):
    """``apply(height, width, backend, *gradients)`` returns (B, C, height, width)."""

    @staticmethod
    def forward(height: int, width: int, backend: str, *gradients: Tensor) -> Tensor:
        out: Tensor = torch.ops.harmonizer_ext.pyramid_adjoint(
            list(gradients), height, width, backend
        )
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.backend = inputs[2]
        ctx.levels = len(inputs) - 3 + 1

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, None, *PyramidFunction.apply(gradients[0], ctx.levels, ctx.backend))


# --- standardize and cut --------------------------------------------------------------------------

define("standardize_cut(Tensor maps, str backend) -> Tensor")
define("standardize_cut_backward(Tensor grad, Tensor maps, str backend) -> Tensor")


@torch.library.impl(LIBRARY, "standardize_cut", "CompositeExplicitAutograd")
def _standardize_cut(maps: Tensor, backend: str) -> Tensor:
    out: Tensor = backends.get(backend).standardize_cut(maps)
    return out


@torch.library.register_fake("harmonizer_ext::standardize_cut", lib=LIBRARY)
def _standardize_cut_fake(maps: Tensor, backend: str) -> Tensor:
    return maps.new_empty(maps.shape)


@torch.library.impl(LIBRARY, "standardize_cut_backward", "CompositeExplicitAutograd")
def _standardize_cut_backward(grad: Tensor, maps: Tensor, backend: str) -> Tensor:
    out: Tensor = backends.get(backend).standardize_cut_backward(grad, maps)
    return out


@torch.library.register_fake("harmonizer_ext::standardize_cut_backward", lib=LIBRARY)
def _standardize_cut_backward_fake(grad: Tensor, maps: Tensor, backend: str) -> Tensor:
    return maps.new_empty(maps.shape)


class StandardizeCutFunction(torch.autograd.Function):
    """``apply(maps (B, C, H, W), backend)`` returns the same shape and dtype."""

    @staticmethod
    def forward(maps: Tensor, backend: str) -> Tensor:
        out: Tensor = torch.ops.harmonizer_ext.standardize_cut(maps, backend)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        maps, ctx.backend = inputs
        ctx.save_for_backward(maps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (maps,) = ctx.saved_tensors
        grad = torch.ops.harmonizer_ext.standardize_cut_backward(grads[0], maps, ctx.backend)
        return _differentiated_once("standardize_cut", grad, maps, grads[0]), None


# --- mean squared error of positive parts ---------------------------------------------------------

define("positive_part_mse(Tensor a, Tensor b, str backend) -> Tensor")
define(
    "positive_part_mse_backward(Tensor grad, Tensor a, Tensor b, str backend) -> (Tensor, Tensor)"
)


@torch.library.impl(LIBRARY, "positive_part_mse", "CompositeExplicitAutograd")
def _positive_part_mse(a: Tensor, b: Tensor, backend: str) -> Tensor:
    out: Tensor = backends.get(backend).positive_part_mse(a, b)
    return out


@torch.library.register_fake("harmonizer_ext::positive_part_mse", lib=LIBRARY)
def _positive_part_mse_fake(a: Tensor, b: Tensor, backend: str) -> Tensor:
    return a.new_empty(a.shape[0], dtype=contract.accumulation_dtype(a, b))


@torch.library.impl(LIBRARY, "positive_part_mse_backward", "CompositeExplicitAutograd")
def _positive_part_mse_backward(
    grad: Tensor, a: Tensor, b: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    out: tuple[Tensor, Tensor] = backends.get(backend).positive_part_mse_backward(grad, a, b)
    return out


@torch.library.register_fake("harmonizer_ext::positive_part_mse_backward", lib=LIBRARY)
def _positive_part_mse_backward_fake(
    grad: Tensor, a: Tensor, b: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape), b.new_empty(b.shape)


class PositivePartMseFunction(torch.autograd.Function):
    """``apply(a (B, H, W), b (B, H, W), backend)`` returns (B,) in the accumulation dtype."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, backend: str) -> Tensor:
        out: Tensor = torch.ops.harmonizer_ext.positive_part_mse(a, b, backend)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, b, ctx.backend = inputs
        ctx.save_for_backward(a, b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b = ctx.saved_tensors
        grad_a, grad_b = torch.ops.harmonizer_ext.positive_part_mse_backward(
            grads[0], a, b, ctx.backend
        )
        name = "positive_part_mse"
        return (
            _differentiated_once(name, grad_a, a, b, grads[0]),
            _differentiated_once(name, grad_b, a, b, grads[0]),
            None,
        )


# Whoever calls an op by its name gets the derivative of the function above. The pyramid's ops take
# or return lists, which autograd.Function has not: they are differentiable through it only.
for _op, _function in {
    "harmonization": HarmonizationFunction,
    "standardize_cut": StandardizeCutFunction,
    "positive_part_mse": PositivePartMseFunction,
}.items():
    torch.library.register_autograd(
        f"harmonizer_ext::{_op}",
        _function.backward,
        setup_context=_function.setup_context,
        lib=LIBRARY,
    )
