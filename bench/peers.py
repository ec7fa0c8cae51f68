"""The peers of the fused loss: the same loss in plain PyTorch, as people would write it.

Every function takes saliency (B, C, H, W), heatmaps (B, H, W) and tokens (B,) and returns the mean
over the batch, a scalar. Sums are carried in the dtype of ``heatmaps``: the released code casts the
saliency in the same place. ``tests/test_bench_peers.py`` compares values and gradients with the
float64 reference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_TAPS = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


def _zeros_before(length: int) -> int:
    """TensorFlow's SAME padding of a kernel of 5 and a stride of 2; two zeros come after."""
    return 2 if length % 2 else 1


def _kernel(dtype: torch.dtype, device: torch.device) -> Tensor:
    taps = torch.tensor(_TAPS, dtype=dtype, device=device)
    return torch.outer(taps, taps)[None, None]


#: Made once, as a module keeps a buffer: the copy from the host waits for the device, and while a
#: CUDA graph is captured that is an error.
_kernel_once = functools.cache(_kernel)


def _halve_by_convolution(maps: Tensor) -> Tensor:
    """One pyramid step on (B, H, W) as released: a dense 5x5 convolution with stride 2."""
    # To a compiler it is a constant.
    kernel = (_kernel if torch.compiler.is_compiling() else _kernel_once)(maps.dtype, maps.device)
    padding = (_zeros_before(maps.shape[2]), 2, _zeros_before(maps.shape[1]), 2)
    return F.conv2d(F.pad(maps[:, None], padding), kernel, stride=2)[:, 0]


def _halve_axis_by_slices(maps: Tensor, axis: int) -> Tensor:
    half = (maps.shape[axis] + 1) // 2
    # One zero more than the taps reach makes the padded length even.
    padding = (_zeros_before(maps.shape[axis]), 3)
    padded = F.pad(maps, padding if axis == 2 else (0, 0, *padding))
    even, odd = padded.unflatten(axis, (half + 2, 2)).unbind(axis + 1)
    halved: Tensor = (
        (even.narrow(axis, 0, half) + even.narrow(axis, 2, half)) * _TAPS[0]
        + (odd.narrow(axis, 0, half) + odd.narrow(axis, 1, half)) * _TAPS[1]
        + even.narrow(axis, 1, half) * _TAPS[2]
    )
    return halved


def _halve_by_slices(maps: Tensor) -> Tensor:
    """One pyramid step on (B, H, W) as sums of shifted slices, rows first, then columns.

    Pointwise throughout, which a compiler can fuse where it has to call a convolution as it is.
    Taking even and odd pixels apart once compiles to about half the time of slices with a step.
    """
    return _halve_axis_by_slices(_halve_axis_by_slices(maps, 1), 2)


def _pyramid(maps: Tensor, levels: int, halve: Callable[[Tensor], Tensor]) -> list[Tensor]:
    scales = [maps]
    for _ in range(levels - 1):
        scales.append(halve(scales[-1]))
    return scales


def _standardize_cut(maps: Tensor) -> Tensor:
    means = maps.mean((1, 2), keepdim=True)
    stds = maps.std((1, 2), correction=0, keepdim=True)
    return F.relu((maps - means) / (stds + 1e-5))


def _standardized_maps(saliency: Tensor, heatmaps: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps standardized and cut, the human one brought to the saliency's maximum."""
    predicted = _standardize_cut(saliency.to(heatmaps.dtype).mean(1))
    true = _standardize_cut(heatmaps)
    true_max = true.amax((1, 2), keepdim=True) + 1e-6
    predicted_max = predicted.amax((1, 2), keepdim=True).detach() + 1e-6
    return predicted, true / true_max * predicted_max


def _weighted_mse(a: Tensor, b: Tensor, tokens: Tensor) -> Tensor:
    return ((a - b).square() * tokens[:, None, None]).mean()


def eager_released(saliency: Tensor, heatmaps: Tensor, tokens: Tensor, levels: int = 5) -> Tensor:
    """``training/loss.py`` and ``training/pyramid.py`` of the authors' package, line by line.

    Two pyramids. The sixth level that the released code builds and never reads is left out, as
    TensorFlow's graph mode does.
    """
    predicted, true = _standardized_maps(saliency, heatmaps)
    predicted_pyramid = _pyramid(predicted, levels, _halve_by_convolution)
    true_pyramid = _pyramid(true, levels, _halve_by_convolution)
    losses = [
        _weighted_mse(a, b, tokens) for a, b in zip(true_pyramid, predicted_pyramid, strict=True)
    ]
    return torch.stack(losses).mean()


def _of_difference(
    saliency: Tensor,
    heatmaps: Tensor,
    tokens: Tensor,
    levels: int,
    halve: Callable[[Tensor], Tensor],
) -> Tensor:
    predicted, true = _standardized_maps(saliency, heatmaps)
    losses = [
        (p.square() * tokens[:, None, None]).mean()
        for p in _pyramid(predicted - true, levels, halve)
    ]
    return torch.stack(losses).mean()


def eager_one_pyramid(
    saliency: Tensor, heatmaps: Tensor, tokens: Tensor, levels: int = 5
) -> Tensor:
    """The released loss with one pyramid, that of the difference: the pyramid is linear."""
    return _of_difference(saliency, heatmaps, tokens, levels, _halve_by_convolution)


def shifted_slices(saliency: Tensor, heatmaps: Tensor, tokens: Tensor, levels: int = 5) -> Tensor:
    """``eager_one_pyramid`` without convolutions: the stronger formulation for torch.compile."""
    return _of_difference(saliency, heatmaps, tokens, levels, _halve_by_slices)


def _per_level(
    saliency: Tensor,
    heatmaps: Tensor,
    tokens: Tensor,
    levels: int,
    halve: Callable[[Tensor], Tensor],
) -> Tensor:
    predicted = _pyramid(saliency.to(heatmaps.dtype).mean(1), levels, halve)
    true = _pyramid(heatmaps, levels, halve)
    losses = [
        _weighted_mse(_standardize_cut(a), _standardize_cut(b), tokens)
        for a, b in zip(predicted, true, strict=True)
    ]
    return torch.stack(losses).sum()


def eager_paper(saliency: Tensor, heatmaps: Tensor, tokens: Tensor, levels: int = 5) -> Tensor:
    """Equation (1) of the paper with mean squares: pyramids first, every level standardized."""
    return _per_level(saliency, heatmaps, tokens, levels, _halve_by_convolution)


def shifted_slices_paper(
    saliency: Tensor, heatmaps: Tensor, tokens: Tensor, levels: int = 5
) -> Tensor:
    """``eager_paper`` without convolutions, for torch.compile."""
    return _per_level(saliency, heatmaps, tokens, levels, _halve_by_slices)


#: What is run as it is and what is compiled, by formulation; the first eager one is the yardstick.
EAGER = {"released": (eager_released, eager_one_pyramid), "paper": (eager_paper,)}
COMPILED = {
    "released": (eager_one_pyramid, shifted_slices),
    "paper": (eager_paper, shifted_slices_paper),
}
