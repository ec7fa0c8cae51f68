"""The fused C++ kernels of csrc/cpu: OpenMP and vector instructions, one thread per sample."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from harmonizer_ext import contract
from harmonizer_ext.backends import native as native_module


def why_not(
    device_type: str, dtype: torch.dtype | None = None, index: int | None = None
) -> str | None:
    """None if the kernels run on this device, otherwise the reason."""
    if device_type != "cpu":
        return "it reads host memory; move the tensors with .cpu()"
    return native_module.load()[1]


class _Workspace(threading.local):
    """One buffer per Python thread, grown when needed: fresh pages cost more than the work."""

    buffer: Tensor | None = None

    def __call__(self, nbytes: int) -> Tensor:
        if self.buffer is None or self.buffer.numel() < nbytes:
            self.buffer = torch.empty(max(nbytes, 1), dtype=torch.uint8, device="cpu")
        return self.buffer


_workspace = _Workspace()


def _threads(beside: Tensor, samples: int) -> int:
    return max(1, min(torch.get_num_threads(), samples))


_kernels = native_module.Kernels("cpu", _threads, lambda beside: _workspace)

native = _kernels.native
harmonization = _kernels.harmonization
pyramid = _kernels.pyramid
pyramid_adjoint = _kernels.pyramid_adjoint
standardize_cut = _kernels.standardize_cut
standardize_cut_backward = _kernels.standardize_cut_backward
positive_part_mse = _kernels.positive_part_mse
positive_part_mse_backward = _kernels.positive_part_mse_backward


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """(B,) float64 from two (B, H, W), both float32 or both float64; of this backend alone."""
    a, b = contract.materialized(a, b)
    correlations = torch.empty(a.shape[0], dtype=torch.float64, device="cpu")
    if a.shape[0]:
        native().cpu_spearman(
            tuple(a.shape),
            native_module.maps_argument(a),
            native_module.maps_argument(b, a),
            native_module.address(correlations, a, torch.float64),
            _threads(a, a.shape[0]),
            _workspace,
        )
    return correlations
