"""The fused Triton kernels: any GPU that Triton serves, no compiler needed.

Triton is imported at the first call. Nothing waits for the device, and all that a call needs is one
allocation: a call can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from harmonizer_ext import contract
from harmonizer_ext.backends.triton_kernels import launch
from harmonizer_ext.backends.triton_kernels.fused_loss import FusedLoss


@functools.cache
def _triton_reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return (
            "triton is not installed; the CUDA and ROCm builds of PyTorch for Linux bring it, "
            "elsewhere pip install triton"
        )
    return None


def why_not(
    device_type: str, dtype: torch.dtype | None = None, index: int | None = None
) -> str | None:
    """None if the kernels run on this device (and dtype), otherwise the reason."""
    if device_type not in ("cpu", "cuda", "xpu"):
        return f"it has no kernels for {device_type}; move the tensors with .cuda()"
    if device_type == "cpu" and not launch.interpreted():
        return (
            "it runs on GPUs; move the tensors with .cuda(), or, to test without a GPU, set "
            "TRITON_INTERPRET=1 before Python starts"
        )
    reason = _triton_reason()
    if reason is not None:
        return reason
    if device_type != "cpu" and not torch.get_device_module(device_type).is_available():
        return f"PyTorch sees no {device_type} device"
    if dtype == torch.float64:
        return 'it carries sums in float32; take backend="reference" for float64, or .float()'
    return None


def harmonization(
    saliency: Tensor,
    heatmaps: Tensor,
    weights: Tensor,
    formulation: str,
    levels: int,
    distance: str,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row losses (B,), unit gradient (B, 1, H, W) or (0,), saliency std (B,)."""
    saliency, heatmaps, weights = contract.materialized(saliency, heatmaps, weights)
    batch, _, height, width = saliency.shape
    pixels = launch.check_pixels("saliency", height, width)
    weights = weights.contiguous()
    rows, std = torch.empty_like(weights), torch.empty_like(weights)
    gradient = saliency.new_empty((batch, 1, height, width) if with_gradient else (0,))
    if not batch:
        return rows, gradient, std
    # The columns, level 1 with what (14) needs of it, and the levels below: some 10 bytes a pixel.
    most = max(1, launch.current().workspace_bytes // (10 * pixels))
    size = launch.ceil(batch, launch.ceil(batch, most))
    with launch.device_guard(saliency):
        for start in range(0, batch, size):
            part = slice(start, start + size) if size < batch else ...
            FusedLoss(
                saliency[part],
                heatmaps[part],
                weights[part],
                rows[part],
                std[part],
                gradient[part] if with_gradient else None,
                formulation == "paper",
                levels,
                distance == "l2",
            ).run()
    return rows, gradient, std


# --- building blocks ------------------------------------------------------------------------------


def pyramid(maps: Tensor, levels: int) -> list[Tensor]:
    """Levels 1 to levels-1 of (B, C, H, W)."""
    (maps,) = contract.materialized(maps)
    batch, channels, height, width = maps.shape
    launch.check_pixels("maps", height, width)
    sizes = contract.level_sizes(height, width, levels)[1:]
    outputs = [maps.new_empty((batch, channels, *size)) for size in sizes]
    if not batch * channels:
        return outputs
    kernels, t = launch.kernels("pyramid"), launch.current()
    # A level is made from the one above in float32, not from its rounded output.
    rounded = maps.dtype != torch.float32
    source = maps
    with launch.device_guard(maps):
        for i, (output, (height, width)) in enumerate(zip(outputs, sizes, strict=True)):
            carry = rounded and i + 1 < len(outputs)
            carried = torch.empty_like(output, dtype=torch.float32) if carry else output
            tiling = launch.tiling(height, width, t.rows)
            launch.launch(
                kernels.pyramid_step,
                tiling.tiles * batch * channels,
                source, output, carried, channels, *source.shape[2:], *source.stride(),
                tiling.tiles_x, tiling.tiles,
                CARRY=carry, WIDE=launch.wide(source), BLOCK_Y=tiling.block_y,
                BLOCK_X=tiling.block_x, warps=t.rows_warps,
            )  # fmt: skip
            source = carried
    return outputs


def pyramid_adjoint(gradients: list[Tensor], height: int, width: int) -> Tensor:
    """Adjoint of ``pyramid``: (B, C, H, W) from the gradients of its outputs."""
    launch.check_pixels("gradients", height, width)
    gradients = contract.materialized(*gradients)
    batch, channels = gradients[0].shape[:2]
    output = gradients[0].new_empty((batch, channels, height, width))
    if not batch * channels:
        return output
    kernels, t = launch.kernels("pyramid"), launch.current()
    coarse = gradients[-1]
    with launch.device_guard(output):
        for i in range(len(gradients) - 1, -1, -1):
            if i:
                fine = gradients[i - 1]
                out = torch.empty(fine.shape, dtype=torch.float32, device=fine.device)
            else:
                fine, out = coarse, output
            rows, columns = out.shape[2:]
            tiling = launch.tiling(rows, columns, t.rows)
            launch.launch(
                kernels.pyramid_adjoint_step,
                tiling.tiles * batch * channels,
                coarse, fine, out, channels, rows, columns, *coarse.stride(), *fine.stride(),
                tiling.tiles_x, tiling.tiles,
                ADD=i > 0, WIDE=launch.wide(coarse, fine), BLOCK_Y=tiling.block_y,
                BLOCK_X=tiling.block_x, warps=t.rows_warps,
            )  # fmt: skip
            coarse = out
    return output


def standardize_cut(maps: Tensor) -> Tensor:
    """(B, C, H, W) to the same shape and dtype."""
    (maps,) = contract.materialized(maps)
    batch, channels, height, width = maps.shape
    pixels = launch.check_pixels("maps", height, width)
    output = maps.new_empty(maps.shape)
    if maps.numel():
        t = launch.current()
        stride_y, stride_x, flat = launch.layout(maps)
        with launch.device_guard(maps):
            launch.launch(
                launch.kernels("standardize").standardize_cut,
                batch * channels,
                maps, output, channels, pixels, width, maps.stride(0), maps.stride(1), stride_y,
                stride_x,
                FLAT=flat, WIDE=launch.wide(maps),
                BLOCK=min(t.whole_map, launch.power_of_two(pixels)),
                warps=t.whole_map_warps,
            )  # fmt: skip
    return output


def standardize_cut_backward(grad: Tensor, maps: Tensor) -> Tensor:
    """Gradient with respect to ``maps``, in their dtype."""
    grad, maps = contract.materialized(grad, maps)
    batch, channels, height, width = maps.shape
    pixels = launch.check_pixels("maps", height, width)
    output = maps.new_empty(maps.shape)
    if maps.numel():
        t = launch.current()
        stride_y, stride_x, flat = launch.layout(maps)
        grad_y, grad_x, grad_flat = launch.layout(grad)
        with launch.device_guard(maps):
            launch.launch(
                launch.kernels("standardize").standardize_cut_backward,
                batch * channels,
                grad, maps, output, channels, pixels, width, grad.stride(0), grad.stride(1),
                grad_y, grad_x, maps.stride(0), maps.stride(1), stride_y, stride_x,
                GRADIENT_FLAT=grad_flat, FLAT=flat, WIDE=launch.wide(grad, maps),
                BLOCK=min(t.whole_map, launch.power_of_two(pixels)), warps=t.whole_map_warps,
            )  # fmt: skip
    return output


def positive_part_mse(a: Tensor, b: Tensor) -> Tensor:
    """(B,) from two (B, H, W)."""
    a, b = contract.materialized(a, b)
    batch, height, width = a.shape
    pixels = launch.check_pixels("a", height, width)
    rows = a.new_empty(batch, dtype=torch.float32)
    if batch:
        t = launch.current()
        a_y, a_x, a_flat = launch.layout(a)
        b_y, b_x, b_flat = launch.layout(b)
        with launch.device_guard(a):
            launch.launch(
                launch.kernels("positive_part_mse").positive_part_mse,
                batch,
                a, b, rows, pixels, width, a.stride(0), a_y, a_x, b.stride(0), b_y, b_x,
                A_FLAT=a_flat, B_FLAT=b_flat, WIDE=launch.wide(a, b),
                BLOCK=min(t.whole_map, launch.power_of_two(pixels)), warps=t.whole_map_warps,
            )  # fmt: skip
    return rows


def positive_part_mse_backward(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients with respect to ``a`` and ``b``, each in its own dtype."""
    grad, a, b = contract.materialized(grad, a, b)
    batch, height, width = a.shape
    pixels = launch.check_pixels("a", height, width)
    grad = grad.to(torch.float32).contiguous()
    grad_a, grad_b = a.new_empty(a.shape), b.new_empty(b.shape)
    if batch:
        t = launch.current()
        a_y, a_x, a_flat = launch.layout(a)
        b_y, b_x, b_flat = launch.layout(b)
        block = min(t.moments, launch.power_of_two(pixels))
        tiles = launch.ceil(pixels, block)
        with launch.device_guard(a):
            launch.launch(
                launch.kernels("positive_part_mse").positive_part_mse_backward,
                tiles * batch,
                grad, a, b, grad_a, grad_b, pixels, width, tiles, 2.0 / pixels, a.stride(0), a_y,
                a_x, b.stride(0), b_y, b_x,
                A_FLAT=a_flat, B_FLAT=b_flat, WIDE=launch.wide(a, b), BLOCK=block,
                warps=t.moments_warps,
            )  # fmt: skip
    return grad_a, grad_b
