"""The kernels of this package on the device of ``gpu_on_host``: PTX, executed by an interpreter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import cuda_ptx_on_host
import gpu_on_host_device as device
import triton_on_host
from torch import Tensor

from harmonizer_ext.backends import cuda, native

#: What both compile for, and the device says it is.
TARGET = "sm_90"

OPERATIONS = (
    *("harmonization", "pyramid", "pyramid_adjoint", "standardize_cut"),
    *("standardize_cut_backward", "positive_part_mse", "positive_part_mse_backward"),
)


def _host_arguments(values: Any) -> Any:
    """Tensors of the GPU as the CPU's, on the same memory; one of the host is no argument."""

    def view(tensor: Tensor) -> Tensor:
        if tensor.device.type != "cuda":
            raise ValueError(
                "Pointer argument cannot be accessed from the GPU (it is a tensor of the CPU)"
            )
        return device.host_view(tensor)

    return device.each_tensor(values, view)


class _Driver(triton_on_host.Driver):
    """A launch is executed, or noted while a graph is captured."""

    def _launch(self, *launch: Any) -> None:
        for argument in launch[3]:
            if isinstance(argument, Tensor) and argument.device.type != "cuda":
                # Triton's words, where its own launcher looks.
                raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        run = functools.partial(super()._launch, *launch)
        if device.state.capture is not None:
            device.state.capture.work.append(run)
        else:
            run()


def _operation(name: str) -> Callable[..., Any]:
    """A function in the place of an operation of ``backends.cuda``."""
    backend = cuda_ptx_on_host.backend
    on_host = getattr(backend, name)

    @functools.wraps(getattr(cuda, name))
    def operation(*args: Any, variant: int = 0, prefetch: int = 0) -> Any:
        args = _host_arguments(args)

        def run() -> Any:
            # Asking for memory ahead changes no value, and the interpreter has no caches.
            backend.variant = variant
            return on_host(*args)

        result = run()
        if device.state.capture is not None:
            device.record(result, run)
        return device.each_tensor(result, device.to_device)

    return operation


def install() -> None:
    """Makes both fused backends of a GPU run on the stand-in, or say why one does not."""
    triton_on_host.install(_Driver(TARGET))
    module, _ = native.load()
    reason = cuda_ptx_on_host.why_not_here()
    if reason is not None:
        cuda.why_not_built = lambda: f"the stand-in for a GPU: {reason}"
    elif module is not None and getattr(module, "cuda", False):
        module.cuda_driver_version = lambda: module.cuda_runtime_version
    for name in OPERATIONS:
        setattr(cuda, name, _operation(name))
