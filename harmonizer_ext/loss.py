"""The harmonization loss for people: maps in, loss out, gradients that reach the network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from harmonizer_ext import backends, contract, network, ops
from harmonizer_ext.backends import reference
from harmonizer_ext.fingerprint import Fingerprint, Memory


class NoGraphError(RuntimeError):
    """The saliency carries no graph, so that the alignment would teach the network nothing."""


def check_graph(saliency: Tensor) -> None:
    """Refuses a saliency without a graph where gradients are enabled."""
    if saliency.requires_grad or not torch.is_grad_enabled():
        return
    raise NoGraphError(
        "saliency: expected a tensor that carries a graph (requires_grad=True), got one without, "
        "so no gradient of the alignment would reach the network. The usual causes: "
        "torch.autograd.grad or .backward() without create_graph=True; .detach(), .data or a "
        "round trip through numpy on the way; the saliency was computed under torch.no_grad() or "
        "torch.inference_mode(). harmonizer_ext.input_gradient(..., create_graph=True) gives one "
        "that works. For the value alone, call the loss under torch.no_grad()"
    )


def _check_targets(name: str, value: Tensor | None, backend: str) -> None:
    if value is not None and value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: expected data without a graph, got requires_grad=True; the fused backend "
            f"{backend!r} differentiates the saliency only. Pass {name}.detach(), or "
            f'backend="reference" to differentiate {name} too'
        )


def normalized(weights: Tensor, reduction: str, total: Tensor | None = None) -> Tensor:
    """Weights that make the reduction a plain sum of the row losses.

    Dividing B numbers before the loss rather than the loss after it leaves the gradient unscaled
    where it is largest: in the maps.

    Args:
        weights: (B,), the tokens in the accumulation dtype.
        reduction: one of ``contract.REDUCTIONS``.
        total: what "mean_valid" divides by, where it is not the sum of these weights alone.
    """
    if reduction == "mean":
        return weights / max(weights.shape[0], 1)
    if reduction == "mean_valid":
        total = weights.sum() if total is None else total
        # All rows are zero where no row has a token: any divisor but 0 serves.
        return weights / torch.where(total > 0, total, torch.ones_like(total))
    return weights


def check_formulation(formulation: str, levels: int, distance: str) -> None:
    """Refuses options of the loss that do not exist, or not together."""
    contract.check_choice("formulation", formulation, contract.FORMULATIONS)
    contract.check_choice("distance", distance, contract.DISTANCES)
    contract.check_levels(levels)
    if formulation == "released" and distance != "mse":
        raise ValueError(
            f"distance: expected 'mse' with formulation='released' (the published code has no "
            f"other), got {distance!r}; formulation='paper' offers both"
        )


def row_losses(
    saliency: Tensor,
    heatmaps: Tensor,
    tokens: Tensor | None,
    *,
    formulation: str,
    levels: int,
    distance: str,
    backend: str | None,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Validates, picks a backend, computes.

    Returns:
        Row losses, weighted so that the reduction is their sum, and saliency standard deviations,
        both (B,) in the accumulation dtype; only the first is differentiable.
    """
    check_formulation(formulation, levels, distance)
    saliency = contract.canonical_saliency(saliency)
    heatmaps = contract.canonical_heatmaps(heatmaps, saliency)
    dtype = contract.accumulation_dtype(saliency, heatmaps)
    weights = normalized(contract.canonical_tokens(tokens, saliency, dtype), reduction)
    check_graph(saliency)
    chosen = backends.select(backend, saliency.device, dtype)
    if chosen == "reference":
        return reference.harmonization(saliency, heatmaps, weights, formulation, levels, distance)
    _check_targets("heatmaps", heatmaps, chosen)
    _check_targets("tokens", tokens, chosen)
    with_gradient = saliency.requires_grad and torch.is_grad_enabled()
    if not torch.is_grad_enabled():  # where PyTorch still says that a leaf wants one
        saliency = saliency.detach()
    rows, _, std = ops.harmonization(
        saliency, heatmaps, weights, formulation, levels, distance, chosen, with_gradient
    )
    return rows, std


_checked: Memory[bool] = Memory()


def _check_alignment(alignment: object, rows: Tensor, maps: Tensor) -> None:
    """Refuses losses whose graph does not lead to the maps; once for an alignment as it is set."""
    call = Fingerprint(alignment)
    if rows.requires_grad and _checked.recall(call):
        return
    if all(node is not maps.grad_fn for node in network.graph_nodes(rows.grad_fn)):
        raise NoGraphError(
            "alignment: expected losses that depend on the maps, got some whose graph does not "
            "lead to them, so that the alignment would teach the network nothing; look for "
            ".detach() or torch.no_grad()"
        )
    _checked.put(call, True)


def aligned_rows(
    alignment: Callable[[Tensor, Tensor, Tensor], Tensor],
    maps: Tensor,
    heatmaps: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor]:
    """``row_losses`` by an alignment of one's own, times the weights.

    Args:
        alignment: is given tokens of 1 and 0, and maps of zeros where they are 0.
        maps: (R, C, H, W) or (R, H, W).
        heatmaps: (R, H, W) or (R, 1, H, W).
        weights: (R,), what each row weighs; one of weight 0 is not read.

    Raises:
        TypeError, ValueError: it gives something else than a number for each row.
    """
    saliency = contract.canonical_saliency(maps)
    human = contract.canonical_heatmaps(heatmaps, saliency)
    dtype = contract.accumulation_dtype(saliency, human)
    active = weights != 0
    some = active.view(-1, *[1] * (maps.ndim - 1))
    read = torch.where(some, maps, torch.zeros_like(maps))
    people = torch.where(active[:, None, None], human, torch.zeros_like(human))
    rows = alignment(read, people, active.to(dtype))
    if not isinstance(rows, Tensor) or rows.shape != weights.shape:
        got = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise ValueError(
            f"alignment: expected a loss for each row, shape {tuple(weights.shape)}, got {got}"
        )
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        _check_alignment(alignment, rows, read)
    weighted = torch.where(active, rows.to(dtype) * weights.to(dtype), 0)
    std = reference.standard_deviation(read.detach())
    return weighted, std


def harmonization_loss(
    saliency: Tensor,
    heatmaps: Tensor,
    tokens: Tensor | None = None,
    *,
    formulation: str = "released",
    levels: int = 5,
    distance: str = "mse",
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Distance between a network's feature importance maps and human ones, at every scale.

    Each map is standardized (zero mean, unit population standard deviation, epsilon 1e-5), cut at
    zero, and compared at every level of a Gaussian pyramid. Source: Fel et al., NeurIPS 2022;
    ``formulation="released"`` is ``training/loss.py`` of the authors' package ``Harmonization``
    0.0.9, ``formulation="paper"`` is equation (1). MATH.md derives both and says how they differ.

    Args:
        saliency: the network's maps, (B, C, H, W) or (B, H, W), float32, bfloat16, float16 or
            float64, any strides. Channels are averaged with their sign, as released. It must carry
            a graph while gradients are enabled.
        heatmaps: the human maps, (B, H, W) or (B, 1, H, W), a float dtype, any unit and range.
        tokens: (B,), weight >= 0 of each row, bool, integer or float; 0 where a row has no human
            map: that row counts 0 and is not read. None means 1 everywhere.
        formulation: "released" or "paper".
        levels: scales of the pyramid, the full size included (5 as released; the original training
            runs used 6), 1 to 16.
        distance: "mse", or "l2" (the norm as printed in the paper; "paper" only).
        reduction: "mean" over all B rows, as released; "mean_valid" divides by the sum of tokens;
            "sum"; "none" gives (B,).
        backend: None picks the best available for the device; a name is obeyed or refused with
            the reason (see ``available_backends``).

    Returns:
        A scalar, or (B,) for reduction="none", in float32 (float64 where an input is float64),
        attached to the graph of ``saliency`` even for an empty batch. A row that holds NaN or
        infinity is NaN and touches no other row.

    Raises:
        NoGraphError: gradients are enabled and the saliency carries no graph.
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or value.
        RuntimeError: the named backend cannot run here; or a derivative beyond the first is taken
            through a fused backend.
    """
    contract.check_choice("reduction", reduction, contract.REDUCTIONS)
    rows, _ = row_losses(
        saliency,
        heatmaps,
        tokens,
        formulation=formulation,
        levels=levels,
        distance=distance,
        backend=backend,
        reduction=reduction,
    )
    return rows if reduction == "none" else rows.sum()


class HarmonizationLoss(nn.Module):
    """``harmonization_loss`` as a module: the options once, the maps at every call.

    Example:
        >>> loss = HarmonizationLoss(formulation="paper", distance="l2")
        >>> loss(saliency, heatmaps, tokens).backward()
    """

    def __init__(
        self,
        *,
        formulation: str = "released",
        levels: int = 5,
        distance: str = "mse",
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        contract.check_choice("formulation", formulation, contract.FORMULATIONS)
        contract.check_choice("distance", distance, contract.DISTANCES)
        contract.check_choice("reduction", reduction, contract.REDUCTIONS)
        contract.check_levels(levels)
        self.formulation = formulation
        self.levels = levels
        self.distance = distance
        self.reduction = reduction
        self.backend = backend

    def forward(self, saliency: Tensor, heatmaps: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Shapes, dtypes and errors as in ``harmonization_loss``."""
        return harmonization_loss(
            saliency,
            heatmaps,
            tokens,
            formulation=self.formulation,
            levels=self.levels,
            distance=self.distance,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"formulation={self.formulation!r}, levels={self.levels}, distance={self.distance!r}, "
            f"reduction={self.reduction!r}, backend={self.backend!r}"
        )
