"""The executable specification: plain PyTorch and autograd, any dtype, any order of derivative.

Every function follows MATH.md line by line and nothing else; the other backends are independent
derivations that are compared with it element by element.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from harmonizer_ext.contract import accumulation_dtype

#: Guards a division by a small standard deviation; MATH.md (3).
STANDARDIZE_EPSILON = 1e-5
#: Guards the rescaling of the human map to the saliency's maximum; MATH.md (7).
MAXIMUM_EPSILON = 1e-6


def why_not(
    device_type: str, dtype: torch.dtype | None = None, index: int | None = None
) -> str | None:
    """None: plain PyTorch runs wherever PyTorch runs."""
    return None


def _statistics(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Centred maps and their population standard deviation, MATH.md (1) and (2).

    The shift by the first pixel makes a constant map exactly zero whatever its value; it is
    detached because it cancels from the mean.
    """
    shifted = maps - maps[..., :1, :1].detach()
    centred = shifted - shifted.mean((-2, -1), keepdim=True)
    variance = centred.square().mean((-2, -1), keepdim=True)
    # The inner where keeps the infinite slope of the square root at 0 out of the graph.
    positive = variance > 0
    safe = torch.where(positive, variance, torch.ones_like(variance))
    std = torch.where(positive, safe.sqrt(), torch.zeros_like(variance))
    # An overflown variance would otherwise turn the map into zeros and the loss into a lie.
    return centred, torch.where(variance.isfinite(), std, torch.full_like(std, torch.nan))


def standard_deviation(maps: Tensor) -> Tensor:
    """(B,) of the channel mean of maps (B, C, H, W) or of (B, H, W); MATH.md (2) and (5)."""
    maps = maps.to(accumulation_dtype(maps))
    return _statistics(maps if maps.ndim == 3 else maps.mean(1))[1][:, 0, 0]


def standardize_cut(maps: Tensor) -> Tensor:
    """Positive part of the standardized maps (..., H, W), in the input's dtype; MATH.md (3)."""
    compute = maps.to(accumulation_dtype(maps))
    centred, std = _statistics(compute)
    return F.relu(centred / (std + STANDARDIZE_EPSILON)).to(maps.dtype)


def _downsample(maps: Tensor) -> Tensor:
    """One pyramid step on (M, 1, H, W); MATH.md (4)."""
    taps = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], dtype=maps.dtype, device=maps.device) / 16
    for axis in (2, 3):
        before = 2 if maps.shape[axis] % 2 else 1
        padding = (0, 0, before, 2) if axis == 2 else (before, 2, 0, 0)
        kernel = taps.view(1, 1, 5, 1) if axis == 2 else taps.view(1, 1, 1, 5)
        stride = (2, 1) if axis == 2 else (1, 2)
        maps = F.conv2d(F.pad(maps, padding), kernel, stride=stride)
    return maps


def pyramid(maps: Tensor, levels: int) -> list[Tensor]:
    """Levels 1 to levels-1 of the Gaussian pyramid of (B, C, H, W), in the input's dtype."""
    with torch.autocast(maps.device.type, enabled=False):
        batch, channels = maps.shape[:2]
        level = maps.to(accumulation_dtype(maps)).reshape(batch * channels, 1, *maps.shape[2:])
        out = []
        for _ in range(levels - 1):
            level = _downsample(level)
            out.append(level.reshape(batch, channels, *level.shape[2:]).to(maps.dtype))
        return out


def positive_part_mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean over pixels of (a+ - b+)^2 for maps (M, H, W); returns (M,); MATH.md (6)."""
    dtype = accumulation_dtype(a, b)
    return (F.relu(a.to(dtype)) - F.relu(b.to(dtype))).square().mean((-2, -1))


def _norm(difference: Tensor) -> Tensor:
    """Euclidean norm of each map with subgradient 0 at 0; MATH.md (10)."""
    energy = difference.square().sum((-2, -1))
    positive = energy > 0
    safe = torch.where(positive, energy, torch.ones_like(energy))
    # NaN fails every comparison: it has to be let through by name.
    zero = torch.where(energy.isnan(), energy, torch.zeros_like(energy))
    return torch.where(positive, safe.sqrt(), zero)


def harmonization(
    saliency: Tensor,
    heatmaps: Tensor,
    weights: Tensor,
    formulation: str,
    levels: int,
    distance: str,
) -> tuple[Tensor, Tensor]:
    """Row losses (B,) and saliency standard deviations (B,); MATH.md (8) and (9).

    Args:
        saliency: (B, C, H, W), any dtype of the contract.
        heatmaps: (B, H, W).
        weights: (B,) in the accumulation dtype; a row with weight 0 takes no part.
    """
    dtype = accumulation_dtype(saliency, heatmaps)
    # Reading values on a GPU would stall its queue, and tracing has none to read.
    if weights.device.type == "cpu" and not torch.compiler.is_compiling():
        negative = (weights < 0).nonzero()
        if len(negative):
            raise ValueError(
                f"tokens: expected weights >= 0, got a negative one in row {negative[0].item()}"
            )
    active = (weights != 0)[:, None, None]
    zero = torch.zeros((), dtype=dtype, device=saliency.device)
    # Selecting before any arithmetic keeps whatever an inactive row holds out of value and graph.
    m = torch.where(active, saliency.to(dtype).mean(1), zero)
    h = torch.where(active, heatmaps.to(dtype), zero)
    std = _statistics(m.detach())[1][:, 0, 0]

    with torch.autocast(saliency.device.type, enabled=False):
        if formulation == "released":
            s, t = standardize_cut(m), standardize_cut(h)
            t_max = t.amax((-2, -1), keepdim=True) + MAXIMUM_EPSILON
            s_max = s.detach().amax((-2, -1), keepdim=True) + MAXIMUM_EPSILON
            difference = s - t / t_max * s_max
            scales = [difference] + [p[:, 0] for p in pyramid(difference.unsqueeze(1), levels)]
            rows = torch.stack([p.square().mean((-2, -1)) for p in scales]).mean(0)
        else:
            m_scales = [m] + [p[:, 0] for p in pyramid(m.unsqueeze(1), levels)]
            h_scales = [h] + [p[:, 0] for p in pyramid(h.unsqueeze(1), levels)]
            per_level = []
            for x, y in zip(m_scales, h_scales, strict=True):
                difference = standardize_cut(x) - standardize_cut(y)
                if distance == "mse":
                    per_level.append(difference.square().mean((-2, -1)))
                else:
                    per_level.append(_norm(difference))
            rows = torch.stack(per_level).sum(0)
    return weights * rows, std
