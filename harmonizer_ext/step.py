"""The loss of a whole training step: cross entropy, alignment and weight penalty in one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from harmonizer_ext import contract
from harmonizer_ext.loss import NoGraphError, row_losses
from harmonizer_ext.saliency import Explain, input_gradient

ROWS = ("auto", "mapped", "all")
SECOND_ORDER = ("exact", "finite_difference")

_NORM_LAYERS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)


@dataclasses.dataclass(frozen=True)
class HarmonizerOutput:
    """What ``harmonizer_loss`` returns; only ``loss`` is meant for ``backward``.

    Attributes:
        loss: scalar, the sum of the three terms with their factors.
        cross_entropy: scalar, detached, without a factor (it has none).
        harmonization: scalar, detached, before ``lambda_harmonization``.
        weight_penalty: scalar, detached, before ``lambda_weights``; 0 where the factor is 0.
        logits: (B, classes), detached, in the order of the images.
        saliency: (R, C, H, W), detached, maps of the R rows that took the saliency path, in their
            order: all rows, or those with a human map.
        saliency_std: scalar, detached, mean over the rows with a human map of the standard
            deviation of the channel mean. A network can lower the loss by shrinking its gradients
            towards the epsilon of 1e-5: log this number and watch that it stays well above.
    """

    loss: Tensor
    cross_entropy: Tensor
    harmonization: Tensor
    weight_penalty: Tensor
    logits: Tensor
    saliency: Tensor
    saliency_std: Tensor


_CLASS_TOKENS = ("class_token", "cls_token")


def _is_penalized(name: str, module: nn.Module) -> bool:
    if isinstance(module, (*_NORM_LAYERS, nn.Embedding)):
        return False
    parts = name.lower().split(".")
    return not any(
        "embed" in part or "norm" in part or part.startswith("bn") or part in _CLASS_TOKENS
        for part in parts
    )


def weight_penalty(model: nn.Module) -> Tensor:
    """Sum of squares over two, over the weights that the released loss decays.

    Every trainable parameter but those of normalization layers, embeddings and class tokens, which
    the authors' ``harmonizer_loss`` recognizes by name and this function by layer type and name.
    Biases of other layers are included, as released.

    Args:
        model: any module; frozen parameters are left out.

    Returns:
        A scalar attached to the parameters, in float32 or wider.
    """
    total: Tensor | None = None
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(module_name, recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if _is_penalized(name, module):
                wide = parameter.to(contract.accumulation_dtype(parameter))
                half_square = wide.square().sum() / 2
                total = half_square if total is None else total + half_square
    return torch.zeros(()) if total is None else total


def _couples_rows(model: nn.Module) -> bool:
    """Whether one row's output depends on the other rows: batch statistics in use."""
    return any(
        isinstance(module, nn.modules.batchnorm._BatchNorm)
        and (module.training or module.running_mean is None)
        for module in model.modules()
    )


def _saliency_rows(model: nn.Module, tokens: Tensor | None, rows: str) -> Tensor | None:
    """Indices of the rows that take the saliency path; None for all of them."""
    if rows == "all" or tokens is None or (rows == "auto" and _couples_rows(model)):
        return None
    return (tokens != 0).nonzero().squeeze(1)


def _forward(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    explain: Explain,
    chosen: Tensor | None,
    create_graph: bool,
) -> tuple[Tensor, Tensor]:
    """Logits of every row, and maps of the chosen ones."""
    if chosen is None:
        return explain(model, images, labels, create_graph=create_graph)
    rest = torch.ones(images.shape[0], dtype=torch.bool, device=images.device)
    rest[chosen] = False
    others = rest.nonzero().squeeze(1)
    if chosen.numel() == 0:
        return model(images), images.new_zeros((0, *images.shape[1:]))
    some, maps = explain(model, images[chosen], labels[chosen], create_graph=create_graph)
    if others.numel() == 0:
        return some, maps
    order = torch.argsort(torch.cat([chosen, others]))
    return torch.cat([some, model(images[others])])[order], maps


def harmonizer_loss(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    heatmaps: Tensor,
    tokens: Tensor | None = None,
    *,
    criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
    lambda_harmonization: float = 1.0,
    lambda_weights: float = 1e-5,
    formulation: str = "released",
    levels: int = 5,
    explain: Explain | None = None,
    rows: str = "auto",
    second_order: str = "exact",
    backend: str | None = None,
) -> HarmonizerOutput:
    """The complete loss of one training step, differentiable through the saliency.

    ``cross entropy + lambda_harmonization * alignment + lambda_weights * weight penalty``, with one
    forward pass for the first two. Source: ``harmonizer_loss`` in ``training/loss.py`` of the
    authors' package; equations (1) and (2) of the paper. Call ``.loss.backward()`` on the result.
    Under ``torch.no_grad()`` it gives the values alone.

    Args:
        model: maps images (B, C, H, W) to logits (B, classes); its train or eval mode is left as
            it is (released: train).
        images: (B, C, H, W), floating point.
        labels: class indices (B,), or soft labels (B, classes); the saliency's targets follow them.
        heatmaps: human maps, (B, H, W) or (B, 1, H, W); any finite values where the token is 0.
        tokens: (B,), weight >= 0 of each row's human map, 0 where it has none; None means 1.
        criterion: ``criterion(logits, labels) -> scalar``; None is cross entropy with label
            smoothing 0.1, as released.
        lambda_harmonization: factor of the alignment, averaged over all B rows.
        lambda_weights: factor of ``weight_penalty(model)``; 0 leaves it to the optimizer.
        formulation, levels, backend: as in ``harmonization_loss``.
        explain: ``explain(model, images, targets, *, create_graph) -> (logits, maps)``; None is
            ``input_gradient``. Any differentiable explanation serves.
        rows: which rows take the saliency path. "all"; "mapped", those with a token; "auto",
            "mapped" where that changes nothing, that is unless a BatchNorm uses batch statistics.
        second_order: "exact", the double backward. "finite_difference" is reserved.

    Returns:
        HarmonizerOutput: the loss, its terms, logits, maps and the saliency's standard deviation.

    Raises:
        NoGraphError: ``explain`` returned maps without a graph.
        NotImplementedError: second_order="finite_difference" in this version.
        TypeError, ValueError, RuntimeError: as in ``harmonization_loss`` and ``input_gradient``.
    """
    contract.check_choice("rows", rows, ROWS)
    contract.check_choice("second_order", second_order, SECOND_ORDER)
    if second_order != "exact":
        raise NotImplementedError(
            f"second_order={second_order!r}: this version differentiates through the saliency "
            f"exactly; use second_order='exact'"
        )
    if images.ndim != 4:
        raise ValueError(f"images: expected (B, C, H, W), got shape {tuple(images.shape)}")
    if tokens is not None and tuple(tokens.shape) != (images.shape[0],):
        raise ValueError(
            f"tokens: expected shape ({images.shape[0]},), one weight per image, got shape "
            f"{tuple(tokens.shape)}"
        )
    if criterion is None:
        criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    chosen = _saliency_rows(model, tokens, rows)  # None: all of them
    create_graph = torch.is_grad_enabled()
    logits, maps = _forward(model, images, labels, explain or input_gradient, chosen, create_graph)
    if create_graph and maps.shape[0] and maps.grad_fn is None:
        raise NoGraphError(
            "explain: expected maps that carry a graph to the parameters (create_graph=True), got "
            "maps without one, so that the alignment would teach the network nothing"
        )
    cross_entropy = criterion(logits, labels)
    if maps.shape[0]:
        picked = slice(None) if chosen is None else chosen
        mapped = None if tokens is None else tokens[picked]
        row_loss, std = row_losses(
            maps,
            heatmaps[picked],
            mapped,
            formulation=formulation,
            levels=levels,
            distance="mse",
            backend=backend,
            reduction="mean",
            batch=images.shape[0],
        )
        harmonization = row_loss.sum()
        # Rows without a human map are not read: their standard deviation is 0.
        count = std.shape[0] if mapped is None else (mapped != 0).sum().clamp(min=1)
        saliency_std = std.sum() / count
    else:
        harmonization = logits.sum() * 0
        saliency_std = logits.new_zeros(())
    penalty = weight_penalty(model) if lambda_weights else logits.new_zeros(())
    loss = cross_entropy + lambda_harmonization * harmonization
    if lambda_weights:
        loss = loss + lambda_weights * penalty
    return HarmonizerOutput(
        loss=loss,
        cross_entropy=cross_entropy.detach(),
        harmonization=harmonization.detach(),
        weight_penalty=penalty.detach(),
        logits=logits.detach(),
        saliency=maps.detach(),
        saliency_std=saliency_std.detach(),
    )
