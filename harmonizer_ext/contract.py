"""The contract that every backend obeys: names, shapes, dtypes, and how bad input is answered.

Nothing outside this module decides what an operation accepts or returns. The checks look at
shapes, dtypes and devices only, so that they cost no synchronization and survive tracing.
"""

from __future__ import annotations

import sys
import warnings
from types import FrameType

import torch
from torch import Tensor

FORMULATIONS = ("released", "paper")
DISTANCES = ("mse", "l2")
REDUCTIONS = ("mean", "mean_valid", "sum", "none")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

#: A pyramid never needs more: sixteen halvings bring 65,536 pixels down to one.
MAX_LEVELS = 16


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where any input is float64, float32 otherwise: what sums are carried in."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def downsampled_size(size: int) -> int:
    """Length of an axis after one pyramid step: ceil(size / 2), TensorFlow's SAME padding."""
    return (size + 1) // 2


def level_sizes(height: int, width: int, levels: int) -> list[tuple[int, int]]:
    """(height, width) of every level of the pyramid, the full-size level first."""
    sizes = [(height, width)]
    for _ in range(levels - 1):
        height, width = downsampled_size(height), downsampled_size(width)
        sizes.append((height, width))
    return sizes


def materialized(*tensors: Tensor) -> list[Tensor]:
    """Tensors whose memory holds their values, for kernels that read it by its address.

    PyTorch postpones some operations to whoever reads. A negated view (``z.conj().imag`` makes one)
    is memory of the other sign and a bit that says so, and a tensor of zeros that nobody has read
    has no memory at all. PyTorch's own operations see to that before they run; for a kernel that is
    called with an address it must be seen to. (The third such bit, of conjugation, is of complex
    tensors alone, which no kernel takes.)
    """
    return [_materialized(tensor) for tensor in tensors]


def _materialized(tensor: Tensor) -> Tensor:
    if tensor.is_neg():
        return tensor.resolve_neg()
    return tensor.clone() if tensor._is_zerotensor() else tensor


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}: expected one of {expected}, got {value!r}")


def check_levels(levels: int) -> None:
    if isinstance(levels, bool) or not isinstance(levels, int):
        raise TypeError(f"levels: expected an int, got {type(levels).__name__}")
    if not 1 <= levels <= MAX_LEVELS:
        raise ValueError(f"levels: expected 1 to {MAX_LEVELS}, got {levels}")


def check_tensor(name: str, value: Tensor, dims: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name}: expected a torch.Tensor, got {type(value).__name__}; "
            f"convert it with torch.as_tensor"
        )
    if value.ndim not in dims:
        expected = " or ".join(f"{d}-D" for d in dims)
        raise ValueError(
            f"{name}: expected {expected} with maps in the last two dimensions, "
            f"got shape {tuple(value.shape)}"
        )
    if value.dtype not in DTYPES:
        expected = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(
            f"{name}: expected dtype {expected}, got {str(value.dtype).removeprefix('torch.')}; "
            f"convert it with {name}.float()"
        )


def check_maps(name: str, value: Tensor, dims: tuple[int, ...] = (2, 3, 4)) -> None:
    """Checks a batch of maps (..., H, W) whose maps have at least one pixel."""
    check_tensor(name, value, dims)
    if value.shape[-1] == 0 or value.shape[-2] == 0:
        raise ValueError(
            f"{name}: expected maps of at least one pixel, got shape {tuple(value.shape)}"
        )


def check_same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"{name}: expected the device of {other_name} ({other.device}), got {value.device}; "
            f"move it with {name}.to({other_name}.device)"
        )


def canonical_saliency(saliency: Tensor) -> Tensor:
    """(B, C, H, W) view of a saliency given as (B, C, H, W) or (B, H, W); strides are kept."""
    check_maps("saliency", saliency, (3, 4))
    view = saliency if saliency.ndim == 4 else saliency.unsqueeze(1)
    if view.shape[1] == 0:
        raise ValueError(
            f"saliency: expected at least one channel, got shape {tuple(saliency.shape)}"
        )
    return view


def canonical_heatmaps(heatmaps: Tensor, saliency: Tensor) -> Tensor:
    """(B, H, W) view of human maps given as (B, H, W) or (B, 1, H, W), matched to the saliency."""
    check_maps("heatmaps", heatmaps, (3, 4))
    if heatmaps.ndim == 4 and heatmaps.shape[1] != 1:
        raise ValueError(
            f"heatmaps: expected one channel, (B, H, W) or (B, 1, H, W), got shape "
            f"{tuple(heatmaps.shape)}; average the channels with heatmaps.mean(1)"
        )
    view = heatmaps if heatmaps.ndim == 3 else heatmaps.squeeze(1)
    batch, height, width = saliency.shape[0], saliency.shape[-2], saliency.shape[-1]
    if view.shape[0] != batch:
        raise ValueError(
            f"heatmaps: expected {batch} rows as in saliency {tuple(saliency.shape)}, got shape "
            f"{tuple(heatmaps.shape)}; give rows without a human map any finite map and token 0"
        )
    if tuple(view.shape[1:]) != (height, width):
        raise ValueError(
            f"heatmaps: expected maps of {height}x{width} as in saliency "
            f"{tuple(saliency.shape)}, got shape {tuple(heatmaps.shape)}; resize them with "
            f"torch.nn.functional.interpolate"
        )
    check_same_device("heatmaps", heatmaps, "saliency", saliency)
    return view


def canonical_tokens(tokens: Tensor | None, saliency: Tensor, dtype: torch.dtype) -> Tensor:
    """(B,) weights in the accumulation dtype; None means that every row has a human map.

    That no weight is negative is left to the backends that can read it for nothing.
    """
    batch = saliency.shape[0]
    if tokens is None:
        return torch.ones(batch, dtype=dtype, device=saliency.device)
    if not isinstance(tokens, Tensor):
        raise TypeError(
            f"tokens: expected a torch.Tensor or None, got {type(tokens).__name__}; "
            f"convert it with torch.as_tensor(tokens, device=saliency.device)"
        )
    if tuple(tokens.shape) != (batch,):
        raise ValueError(
            f"tokens: expected shape ({batch},), one weight per row of saliency "
            f"{tuple(saliency.shape)}, got shape {tuple(tokens.shape)}"
        )
    if tokens.is_complex():
        raise TypeError(f"tokens: expected bool, integer or float weights, got {tokens.dtype}")
    check_same_device("tokens", tokens, "saliency", saliency)
    return tokens.to(dtype)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the line of whoever called into this package, through PyTorch's modules or not."""
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (
        "contextlib",
        "harmonizer_ext",
        "torch",
    ):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
