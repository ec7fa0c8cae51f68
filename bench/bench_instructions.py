"""How many instructions the CPU kernels execute a pixel, counted one by one; a section of run.py.

A child process runs one call on one thread while its parent lets it go on by single instructions
(ptrace), so that the count is exact and needs no hardware counter. What Python and PyTorch execute
around the kernel is the same for one image and for two, and drops out of their difference. A second
of counting takes some ten thousand instructions, hence minutes.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import signal
from collections.abc import Callable
from typing import Any

SIZE = 224

# <sys/ptrace.h> of Linux, the same on every architecture.
_TRACEME, _CONTINUE, _SINGLE_STEP = 0, 7, 9


def why_not() -> str | None:
    """None where instructions can be counted, otherwise the reason."""
    if platform.system() != "Linux":
        return f"counting instructions takes ptrace of Linux; this is {platform.system()}"
    return None


def count(call: Callable[[], object]) -> int:
    """Instructions of one call in a fork of this process, and a constant of some thousands."""
    trace = ctypes.CDLL(None, use_errno=True).ptrace
    trace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    child = os.fork()
    if child == 0:
        trace(_TRACEME, 0, None, None)
        os.kill(os.getpid(), signal.SIGSTOP)
        call()
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    os.waitpid(child, 0)
    executed = 0
    while True:
        if trace(_SINGLE_STEP, child, None, None):
            raise OSError(ctypes.get_errno(), "ptrace may not trace a child of this process")
        _, status = os.waitpid(child, 0)
        if not os.WIFSTOPPED(status):
            raise RuntimeError(f"the call that was counted ended its process, status {status}")
        if os.WSTOPSIG(status) == signal.SIGSTOP:
            break
        executed += 1
    trace(_CONTINUE, child, None, None)
    os.waitpid(child, 0)
    return executed


def per_pixel(formulation: str, gradient: bool) -> float:
    """Instructions a pixel of a 3-channel float32 saliency with its human map."""
    import torch

    from harmonizer_ext import backends

    torch.set_num_threads(1)
    kernels = backends.get("cpu")
    counts = []
    for batch in (1, 2):
        generator = torch.Generator().manual_seed(0)
        saliency = torch.randn(batch, 3, SIZE, SIZE, generator=generator) * 1e-3
        heatmaps = torch.rand(batch, SIZE, SIZE, generator=generator)
        inputs = (saliency, heatmaps, torch.ones(batch), formulation, 5, "mse", gradient)
        kernels.harmonization(*inputs)  # what only the first call does
        counts.append(count(lambda inputs=inputs: kernels.harmonization(*inputs)))
    return (counts[1] - counts[0]) / SIZE**2


def measure() -> list[dict[str, Any]]:
    """Rows of the record; counted in a process that has one thread only."""
    import harness

    counted = harness.in_child(["bench/bench_instructions.py"], exact_memory=False)
    return [
        {"case": formulation, "implementation": "cpu: op", "formulation": formulation}
        | {"computed": "loss and gradient", "saliency": [1, 3, SIZE, SIZE], "dtype": "float32"}
        | {"quantity": "instructions", "unit": "per pixel", "value": value}
        for formulation, value in counted.items()
    ]


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    print(json.dumps({name: per_pixel(name, True) for name in ("released", "paper")}))
