"""Feature importance maps that can be trained through: the explain protocol and its default.

The protocol: any callable ``explain(model, images, targets, *, create_graph) -> (logits, maps)``
whose maps carry a graph to the parameters where ``create_graph`` is True.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.nn.attention import SDPBackend, sdpa_kernel

from harmonizer_ext import (
    contract,
    distributed,
    double_backward,
    grouped_convolution,
    twice_differentiable,
    vanishing,
)

#: Class indices (B,), soft labels (B, classes), or a function of the logits that gives (B,).
Targets = Tensor | Callable[[Tensor], Tensor]


class Explain(Protocol):
    """An explanation that ``harmonizer_loss(explain=...)`` accepts.

    Its maps must carry a whole graph: what they depend on, the graph must reach. An explanation
    that stops a gradient on purpose (weights of Grad-CAM taken for constants) says so by a true
    attribute ``partial_graph``.
    """

    def __call__(
        self, model: Callable[..., Tensor], images: Tensor, targets: Targets, *, create_graph: bool
    ) -> tuple[Tensor, Tensor]: ...


def target_scores(logits: Tensor, targets: Targets) -> Tensor:
    """The scalar of each row whose gradient is the map: (B,) from logits (B, classes).

    For class indices the logit of the class; for soft labels the sum of logits weighted by them, as
    in ``harmonizer_loss`` of the authors' package (``reduce_sum(y_pred * labels, -1)``).

    Raises:
        TypeError, ValueError: the targets fit neither form.
    """
    if callable(targets):
        scores = targets(logits)
        if scores.shape != logits.shape[:1]:
            raise ValueError(
                f"targets: expected a function that gives ({logits.shape[0]},), one score per row "
                f"of the logits {tuple(logits.shape)}, got shape {tuple(scores.shape)}"
            )
        return scores
    if not isinstance(targets, Tensor):
        raise TypeError(
            f"targets: expected a torch.Tensor or a function of the logits, got "
            f"{type(targets).__name__}"
        )
    if targets.is_floating_point():
        if targets.shape != logits.shape:
            raise ValueError(
                f"targets: expected soft labels of the logits' shape {tuple(logits.shape)}, got "
                f"{tuple(targets.shape)}; class indices must have an integer dtype"
            )
        return (logits * targets).sum(-1)
    if targets.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"targets: expected integer or float dtype, got {targets.dtype}")
    if targets.shape != logits.shape[:1]:
        raise ValueError(
            f"targets: expected class indices of shape ({logits.shape[0]},), one per row of the "
            f"logits {tuple(logits.shape)}, got shape {tuple(targets.shape)}"
        )
    return logits.gather(1, targets.long()[:, None]).squeeze(1)


def checked_logits(logits: Any) -> Tensor:
    """The model's output, where it is logits that depend on the images."""
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"model: expected logits (B, classes) from model(images), got {got}")
    if not logits.requires_grad:
        raise RuntimeError(
            "model: expected logits that depend on the images, got logits without a graph; "
            "the model detaches them or runs under torch.no_grad() inside"
        )
    return logits


def _gradient(
    model: Callable[..., Tensor],
    pixels: Tensor,
    targets: Targets,
    create_graph: bool,
    scaler: GradScaler | None,
) -> tuple[Tensor, Tensor]:
    logits = checked_logits(model(pixels))
    total = target_scores(logits, targets).sum()
    if scaler is None:
        (maps,) = torch.autograd.grad(total, pixels, create_graph=create_graph)
        return logits, maps
    # The factor as a tensor: get_scale() would wait for the device. The gradient of the logits is
    # as large, and 2**16, where scalers begin, is no number of float16.
    total = total.to(contract.accumulation_dtype(total))
    factor = scaler.scale(torch.ones((), device=total.device)).clamp(max=2.0**15)
    (maps,) = torch.autograd.grad(total * factor, pixels, create_graph=create_graph)
    return logits, maps.to(contract.accumulation_dtype(maps)) / factor


def input_gradient(
    model: Callable[..., Tensor],
    images: Tensor,
    targets: Targets,
    *,
    create_graph: bool,
    scaler: GradScaler | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradient of each image's target score with respect to the image: the published saliency.

    Works under ``torch.no_grad()`` too, for evaluation. Where a graph is asked for, attention runs
    through PyTorch's MATH kernel (``exact_attention``), FSDP2 keeps the weights until the second
    backward pass, and the first call for a model looks for operations that have no second
    derivative.

    Args:
        model: maps images (B, C, H, W) to logits (B, classes).
        images: (B, C, H, W), floating point.
        targets: class indices (B,), soft labels (B, classes), or a function of the logits that
            gives (B,).
        create_graph: True to train through the maps; False for maps alone, at a lower cost.
        scaler: the GradScaler of float16 training: the scores are scaled before this gradient and
            the maps scaled back after it, or they would vanish in float16.

    Returns:
        logits (B, classes) and maps (B, C, H, W), signed, in the dtype of ``images`` (with a
        scaler in float32 or wider).

    Raises:
        TypeError, ValueError: images or targets of the wrong type or shape; targets whose gradient
            vanishes, so that the maps are zero or rounding alone (tried once, with a graph).
        SecondDerivativeError: the model cannot be differentiated twice as it stands.
        RuntimeError: called in inference mode, where PyTorch records no graph at all; or the
            logits do not depend on the images.
    """
    if not images.is_floating_point():
        raise TypeError(
            f"images: expected a floating-point dtype, got {images.dtype}; "
            f"convert them with images.float()"
        )
    compiling = torch.compiler.is_compiling()
    if not compiling and torch.is_inference_mode_enabled():
        raise RuntimeError(
            "input_gradient: expected autograd to be available, but torch.inference_mode() is on "
            "and cannot be left from inside; use torch.no_grad() around it instead (Lightning: "
            "Trainer(inference_mode=False))"
        )
    with torch.enable_grad():
        pixels = images if images.requires_grad else images.detach().requires_grad_()
        if compiling:  # HarmonizerLoss has looked at the model before
            with sdpa_kernel(SDPBackend.MATH), grouped_convolution.GroupedConvolutions():
                return _gradient(model, pixels, targets, create_graph, scaler)
        with double_backward.clear_errors(), twice_differentiable.own_biases(model):
            if not create_graph:
                return _gradient(model, pixels, targets, False, scaler)
            double_backward.check_model(model)
            with (
                double_backward.saliency_forward(model) as grouped,
                distributed.whole_until_second_backward(model),
                grouped_convolution.inputs_only(grouped),
            ):
                logits, maps = _gradient(model, pixels, targets, True, scaler)

    def maps_of(model: Any, images: Tensor, targets: Targets) -> Tensor:
        return input_gradient(model, images, targets, create_graph=False, scaler=scaler)[1]

    double_backward.check_graph_once(
        maps,
        model,
        targets if callable(targets) else None,
        more=lambda: vanishing.check(
            model, images, targets, logits, maps_of, scaled=scaler is not None
        ),
    )
    return logits, maps
