"""``python -m harmonizer_ext``: what is installed, which backend serves what, and a self-test."""

from __future__ import annotations

import platform
import sys
import time

import torch

import harmonizer_ext as hx
from harmonizer_ext import backends


def _devices() -> list[str]:
    return ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def _cuda() -> str:
    if not torch.cuda.is_available():
        version = torch.version.cuda
        return f"not available (PyTorch is built {f'for CUDA {version}' if version else 'without'})"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{torch.version.cuda}, {', '.join(names)}"


def _native() -> str:
    if backends.why_not("cpu", "cpu") is not None:
        return "not built"
    native = backends.get("cpu").native()
    openmp = "OpenMP" if native.openmp else "one thread: built without OpenMP"
    return f"{native.cpu_instruction_set()}, {openmp}"


def _self_test(backend: str, device: str) -> str:
    """Compares loss and gradient of a backend with the reference in float64; a line of text."""
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.device("cpu"):
        saliency = torch.randn(4, 3, 97, 64, generator=generator, dtype=torch.float32) * 1e-3
        heatmaps = torch.rand(4, 97, 64, generator=generator, dtype=torch.float32)
    start = time.perf_counter()
    worst = 0.0
    for formulation in ("released", "paper"):
        results = []
        for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
            maps = saliency.to(device, dtype).requires_grad_()
            loss = hx.harmonization_loss(
                maps, heatmaps.to(device, dtype), formulation=formulation, backend=name
            )
            (grad,) = torch.autograd.grad(loss, maps)
            results.append((loss.detach().double(), grad.double()))
        for got, expected in zip(*results, strict=True):
            error = (got - expected).abs().max() / expected.abs().max()
            worst = max(worst, error.item())
    milliseconds = (time.perf_counter() - start) * 1e3
    # float32 keeps 7 digits; sums over 6,208 pixels cost about one of them.
    verdict = "ok" if worst < 1e-5 else "WRONG"
    return f"{verdict}: within {worst:.1e} of float64, {milliseconds:.0f} ms"


def main() -> int:
    """Prints the report; returns 1 if a backend that claims to run computes wrongly."""
    print(f"harmonizer_ext {hx.__version__}")
    print(f"  Python   {platform.python_version()} on {platform.system()} {platform.machine()}")
    print(f"  PyTorch  {torch.__version__}")
    print(f"  CUDA     {_cuda()}")
    print(f"  native   {_native()}")
    print(f"  CUDA C++ {backends.get('cuda').description()}")
    failed = False
    for device in _devices():
        print(f"\n{device}: backend=None picks {hx.available_backends(device)[0]!r}")
        for name in backends.names():
            reason = backends.why_not(name, device)
            if reason is None:
                outcome = _self_test(name, device)
                failed |= outcome.startswith("WRONG")
            else:
                outcome = f"no: {reason}"
            print(f"  {name:<10} {outcome}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
