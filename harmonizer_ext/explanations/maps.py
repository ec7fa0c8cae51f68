"""The way from what an explanation gives to one checked map per image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harmonizer_ext import contract
from harmonizer_ext.saliency import Explain, Targets

#: Colour channels to one number per pixel: ``"abs_max"``, the largest absolute value (the released
#: evaluation); ``"mean"``, signed (the released training loss); ``"l2"``, the Euclidean norm; None
#: leaves the channels.
Reduce = Literal["abs_max", "mean", "l2"] | None
_REDUCTIONS = ("abs_max", "mean", "l2")


def check_reduce(reduce: Reduce) -> None:
    if reduce is not None:
        contract.check_choice("reduce", reduce, _REDUCTIONS)


def reduce_channels(maps: Tensor, reduce: Reduce) -> Tensor:
    """Maps (B, C, H, W) to (B, H, W), differentiably; (B, H, W) stay as they are.

    Where a gradient is zero in all channels, the derivative of ``"l2"`` is taken as zero. That of
    ``"abs_max"`` goes to the largest channel, in equal parts where several are.

    Raises:
        ValueError: the shape is another, or there is no such reduction.
    """
    check_reduce(reduce)
    if maps.ndim not in (3, 4):
        raise ValueError(f"maps: expected (B, C, H, W) or (B, H, W), got {tuple(maps.shape)}")
    if maps.ndim == 3 or reduce is None:
        return maps
    if reduce == "mean":
        return maps.mean(1)
    if reduce == "l2":
        norm: Tensor = torch.linalg.vector_norm(maps, dim=1)
        return norm
    return maps.abs().amax(1)


def importance_maps(
    explain: Explain,
    model: Callable[..., Tensor],
    images: Tensor,
    targets: Targets,
    *,
    reduce: Reduce = "abs_max",
    undefined: Literal["raise", "keep"] = "raise",
) -> tuple[Tensor, Tensor]:
    """One feature importance map per image, to compare with people's.

    Works wherever it is called: under ``torch.no_grad()``, and under ``torch.inference_mode()``,
    which it leaves (inference tensors are copied).

    Args:
        explain: any explanation; ``harmonizer_ext.input_gradient`` is one.
        model: maps images to logits. Put it into eval mode before.
        images: (B, C, H, W), floating point.
        targets: what to explain: class indices (B,), soft labels, or a function of the logits.
        reduce: for maps that still have their channels.
        undefined: what to do about maps that are constant or not finite, and so have no
            correlation: ``"raise"``, which waits for the device, or ``"keep"`` for metrics that
            count them (``alignment.AlignmentMeter``).

    Returns:
        logits (B, classes) and maps (B, H, W), both without a graph.

    Raises:
        TypeError: the explanation gives no tensor.
        ValueError: its maps are not of the images' number and size (nothing is resized), or are
            constant or not finite; the message names the rows.
        RuntimeError: the model's parameters were made in inference mode.
    """
    contract.check_choice("undefined", undefined, ("raise", "keep"))
    if isinstance(model, nn.Module) and any(p.is_inference() for p in model.parameters()):
        raise RuntimeError(
            "model: expected parameters that autograd can record, got some that were made under "
            "torch.inference_mode(); make or load the model outside of it"
        )
    with torch.inference_mode(False), torch.enable_grad():
        images = _plain(images)
        targets = _plain(targets) if isinstance(targets, Tensor) else targets
        logits, maps = explain(model, images, targets, create_graph=False)
        maps = _checked(maps, images, reduce)
        if undefined == "raise":
            _refuse_undefined(maps)
        return logits.detach(), maps


def _plain(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _checked(maps: Any, images: Tensor, reduce: Reduce) -> Tensor:
    if not isinstance(maps, Tensor):
        raise TypeError(f"explain: expected maps in a torch.Tensor, got {type(maps).__name__}")
    expected = (images.shape[0], *images.shape[2:])
    if maps.ndim not in (3, 4) or (maps.shape[0], *maps.shape[-2:]) != expected:
        raise ValueError(
            f"explain: expected maps {expected} or with channels, {(*images.shape,)}, of images "
            f"{(*images.shape,)}, got {(*maps.shape,)}; maps are not resized here: if theirs is a "
            f"coarser grid, let the explanation end with torch.nn.functional.interpolate(maps, "
            f'size=images.shape[-2:], mode="bilinear")'
        )
    if maps.ndim == 4 and maps.shape[1] == 1:
        return maps.detach()[:, 0]
    if maps.ndim == 4 and reduce is None:
        raise ValueError(
            f"reduce: expected a way to one number per pixel for maps of {maps.shape[1]} channels, "
            f"one of {', '.join(map(repr, _REDUCTIONS))}; got None"
        )
    return reduce_channels(maps.detach(), reduce)


def _refuse_undefined(maps: Tensor) -> None:
    if not maps.numel():
        return
    flat = maps.flatten(1)
    finite = flat.isfinite().all(1)
    constant = finite & (flat.amax(1) == flat.amin(1))
    for rows, what, cause in (
        (constant, "constant", "saturated logits, or a layer that the logits do not depend on"),
        (~finite, "not finite", "weights that diverged, or float16"),
    ):
        if rows.any():
            numbers = rows.nonzero().flatten().tolist()
            shown = ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")
            raise ValueError(
                f"explain: expected maps that differ between pixels, got {len(numbers)} of "
                f"{len(maps)} that are {what}, rows {shown}; usual causes: {cause}. "
                f'undefined="keep" leaves them to metrics that count them'
            )
