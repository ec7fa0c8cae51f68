"""``python -m harmonizer_ext``: what is installed, which backend serves what, and a self-test."""

from __future__ import annotations

import platform
import sys
import time

import torch

import harmonizer_ext as hx
from harmonizer_ext import backends


def _devices() -> list[str]:
    """The CPU, and the GPUs, of several of one kind the first."""
    if not torch.cuda.is_available():
        return ["cpu"]
    kinds = {torch.cuda.get_device_name(i): i for i in reversed(range(torch.cuda.device_count()))}
    gpus = ["cuda"] if len(kinds) == 1 else [f"cuda:{i}" for i in sorted(kinds.values())]
    return ["cpu", *gpus]


def _keeps_denormals() -> bool:
    """Whether this process computes with numbers below the smallest normal one."""
    return sys.float_info.min / 2 > 0


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


def _lost(backend: str, device: str) -> list[str]:
    """Names what a backend loses of numbers that compilers are tempted to do without.

    A flag such as -ffast-math, or of a library that was loaded, lets NaN, the sign of zero and
    denormal numbers go; all other results stay as they are.
    """
    lost = []
    maps = torch.arange(-24.0, 24.0).reshape(2, 1, 4, 6).to(device)
    maps[0, 0, 1, 2] = torch.nan
    heatmaps = torch.arange(48.0).reshape(2, 4, 6).to(device)
    with torch.no_grad():
        for formulation in ("released", "paper"):
            rows = hx.harmonization_loss(
                maps, heatmaps, formulation=formulation, reduction="none", backend=backend
            )
            if not (rows[0].isnan() and rows[1].isfinite()):
                lost.append(f"a NaN ({formulation})")
        cut = hx.standardize_cut(maps, backend=backend)
        if not (cut[0].isnan().all() and cut[1].isfinite().all()):
            lost.append("a NaN (standardize_cut)")
        # Every product and sum is a multiple of 2^-148, of which float32 holds the half.
        tiny = torch.full((1, 4, 4), 2.0**-140, device=device)
        (_, coarse) = hx.gaussian_pyramid(tiny, 2, backend=backend)
        expected = hx.gaussian_pyramid(tiny.cpu().double(), 2, backend="reference")[1]
        if not torch.equal(coarse.cpu().double(), expected):
            lost.append("a denormal number")
        zeros = torch.tensor([[[0.0, -0.0, 1.0, -1.0]]], device=device)
        same = torch.tensor([[[0.0, 0.0, 1.0, -1.0]]], device=device)
        rank = getattr(backends.get(backend), "spearman", hx.alignment.spearman)
        if not abs(rank(zeros, same).item() - 1) < 1e-6:
            lost.append("the tie of 0 and -0")
    return lost


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
    line = f"within {worst:.1e} of float64, {milliseconds:.0f} ms"
    if lost := _lost(backend, device):
        verdict, line = "WRONG", f"{line}; loses {', '.join(lost)}"
    return f"{verdict}: {line}"


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
    if not _keeps_denormals():
        failed = True
        print(
            "\nWRONG: this process flushes denormal numbers to zero, because a library that it has "
            "loaded was linked with -ffast-math or the like"
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
