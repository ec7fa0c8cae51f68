"""The fused CUDA kernels of csrc/cuda: NVIDIA GPUs from sm_75, best on Hopper.

A call goes to the current stream of the tensors' device and waits for nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harmonizer_ext.backends import native as native_module

OLDEST = (7, 5)


@functools.cache
def why_not_built() -> str | None:
    """None if the native module has CUDA kernels, otherwise the reason."""
    module, reason = native_module.load()
    if module is None:
        return reason
    if not getattr(module, "cuda", False):
        why = getattr(module, "cuda_left_out", "") or "none were asked for"
        return (
            f"the native module was built without CUDA kernels: {why}; install the CUDA toolkit, "
            f"11.8 or later, and {native_module.REINSTALL}"
        )
    return None


def has_code(capability: tuple[int, int], architectures: str) -> bool:
    """Whether code compiled for ``architectures``, such as "sm_80 sm_90 compute_90", runs on a GPU.

    Machine code (sm) runs on GPUs of the same major version and no lower minor one; PTX (compute)
    on every later GPU.
    """
    for code in architectures.split():
        kind, _, number = code.partition("_")
        compiled = divmod(int(number), 10)
        if compiled <= capability and (kind == "compute" or compiled[0] == capability[0]):
            return True
    return False


@functools.cache
def _why_not_gpu(index: int) -> str | None:
    module, _ = native_module.load()
    if module is None:
        return why_not_built()
    runtime, driver = module.cuda_runtime_version, module.cuda_driver_version()
    if driver // 1000 < runtime // 1000:
        return (
            f"the driver serves CUDA {_version(driver)} at most and the native module is built "
            f"with {_version(runtime)}; update the driver, or set CUDACXX to the nvcc of CUDA "
            f"{driver // 1000} and {native_module.REINSTALL}"
        )
    capability = torch.cuda.get_device_capability(index)
    major, minor = capability
    gpu = f"the GPU is {torch.cuda.get_device_name(index)} (sm_{major}{minor})"
    if capability < OLDEST:
        return f"{gpu}, and the kernels need sm_75 or later"
    if not has_code(capability, module.cuda_architectures):
        return (
            f"{gpu}, and the native module is built for {module.cuda_architectures}; set "
            f"HARMONIZER_CUDA_ARCHS={major}{minor} and {native_module.REINSTALL}"
        )
    return None


def _version(number: int) -> str:
    """13000 is 13.0."""
    return f"{number // 1000}.{number % 1000 // 10}"


def description() -> str:
    """Describes what is built: the CUDA version and the GPUs that there is code for."""
    reason = why_not_built()
    if reason is not None:
        return f"no: {reason}"
    module = native()
    return f"{_version(module.cuda_runtime_version)}, {module.cuda_architectures}"


def why_not(
    device_type: str, dtype: torch.dtype | None = None, index: int | None = None
) -> str | None:
    """None if the kernels run on this GPU, by default the current one, otherwise the reason."""
    if device_type != "cuda":
        return "it runs on NVIDIA GPUs; move the tensors with .cuda()"
    if torch.version.hip is not None:
        return 'this PyTorch is for ROCm and the kernels are for NVIDIA GPUs; take backend="triton"'
    reason = why_not_built()
    if reason is not None:
        return reason
    # Once a tensor is on a GPU the cheap half of this is enough.
    if not torch.cuda.is_initialized() and not torch.cuda.is_available():
        return f"PyTorch sees no {device_type} device"
    reason = _why_not_gpu(torch.cuda.current_device() if index is None else index)
    if reason is not None:
        return reason
    if dtype == torch.float64:
        return 'it carries sums in float32; take backend="reference" for float64, or .float()'
    return None


def _place(beside: Tensor, samples: int) -> tuple[int, int]:
    """Device and stream."""
    index = beside.get_device()
    return index, torch.cuda.current_stream(index).cuda_stream


# PyTorch's allocator gives a block of a few megabytes without asking the driver, and takes it back
# while the kernels still run: what is next given that block on this stream comes after them. During
# the capture of a CUDA graph it takes the block from the graph's own pool. A buffer kept here would
# have to know both, and would grow to the largest call for good.
def _workspace(beside: Tensor) -> Callable[[int], Tensor]:
    return lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, device=beside.device)


class _Kernels(native_module.Kernels):
    def _call(
        self,
        operation: str,
        beside: Tensor,
        samples: int,
        *arguments: Any,
        options: tuple[int, ...] = (),
    ) -> None:
        # The native module launches on the current device and changes none. PyTorch's guard does,
        # for it goes back to a device only where a context exists: whoever works on the second GPU
        # alone keeps the first one's memory free.
        if beside.get_device() == torch.cuda.current_device():
            super()._call(operation, beside, samples, *arguments, options=options)
        else:
            with torch.cuda.device(beside.device):
                super()._call(operation, beside, samples, *arguments, options=options)


_kernels = _Kernels("cuda", _place, _workspace)

native = _kernels.native
pyramid = _kernels.pyramid
pyramid_adjoint = _kernels.pyramid_adjoint
standardize_cut = _kernels.standardize_cut
standardize_cut_backward = _kernels.standardize_cut_backward
positive_part_mse = _kernels.positive_part_mse
positive_part_mse_backward = _kernels.positive_part_mse_backward


def harmonization(
    saliency: Tensor,
    heatmaps: Tensor,
    weights: Tensor,
    formulation: str,
    levels: int,
    distance: str,
    with_gradient: bool,
    *,
    variant: int = 0,
    prefetch: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row losses (B,), unit gradient (B, 1, H, W) or (0,), saliency std (B,).

    ``variant`` is the number of a compiled specialization (``native().cuda_loss_variants()``), 0
    for the choice by size and GPU, -1 for the path of any size; ``prefetch`` is how many samples
    ahead memory is asked for. bench/gpu_sweep.py compares them.
    """
    return _kernels.harmonization(
        saliency,
        heatmaps,
        weights,
        formulation,
        levels,
        distance,
        with_gradient,
        (variant, prefetch),
    )
