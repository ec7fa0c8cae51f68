"""Runs every fused GPU kernel once on small and odd sizes: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python bench/gpu_sanitize.py --backend cuda

Values are checked by the tests; a sanitizer slows a kernel a hundredfold, so that this is small.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import harmonizer_ext as hx
from harmonizer_ext import backends

#: The specialized size first, then borders in the middle of everything, then the smallest maps.
SIZES = ((224, 224), (33, 31), (225, 223), (112, 112), (64, 64), (5, 7), (1, 1))
FORMULATIONS = (("released", "mse"), ("paper", "mse"), ("paper", "l2"))


def losses(backend: str, maps: Tensor, heatmaps: Tensor) -> None:
    tokens = torch.tensor([1.0, 0.0], device=maps.device)
    for layout in (torch.contiguous_format, torch.channels_last):
        for formulation, distance in FORMULATIONS:
            x = maps.contiguous(memory_format=layout).requires_grad_()
            hx.harmonization_loss(
                x, heatmaps, tokens, formulation=formulation, distance=distance, backend=backend
            ).backward()


def building_blocks(backend: str, maps: Tensor, heatmaps: Tensor) -> None:
    x = maps.requires_grad_()
    sum(p.sum() for p in hx.gaussian_pyramid(x, 5, backend=backend)).backward()
    hx.standardize_cut(x, backend=backend).sum().backward()
    hx.positive_part_mse(x[:, 0], heatmaps, backend=backend).sum().backward()


def variant(number: int, size: int, formulation: str, dtype: torch.dtype) -> None:
    """A specialization that the automatic choice may not take here."""
    maps = torch.randn(3, 3, size, size, device="cuda").to(dtype)
    heatmaps, tokens = torch.rand(3, size, size, device="cuda"), torch.ones(3, device="cuda")
    cuda = backends.get("cuda")
    cuda.harmonization(maps, heatmaps, tokens, formulation, 5, "mse", True, variant=number)


def work(backend: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """What is run, by name, the most valuable first."""
    generator = torch.Generator().manual_seed(0)
    for height, width in SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            maps = torch.randn(2, 3, height, width, generator=generator).to("cuda", dtype)
            heatmaps = torch.rand(2, height, width, generator=generator).cuda()
            name = f"{height}x{width} {str(dtype).removeprefix('torch.')}"
            for function in (losses, building_blocks):
                yield (
                    f"{function.__name__} {name}",
                    lambda f=function, m=maps, h=heatmaps: f(backend, m.clone(), h),
                )
    if backend == "cuda":
        for found in backends.get("cuda").native().cuda_loss_variants():
            formulation = ("released", "paper")[found["formulation"]]
            yield (
                f"variant {found['name']} {formulation}",
                lambda v=found, f=formulation: variant(v["number"], v["size"], f, torch.bfloat16),
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    fused = [name for name in hx.available_backends("cuda") if name != "reference"]
    parser.add_argument("--backend", choices=fused, default=fused[0] if fused else None)
    parser.add_argument("--seconds", type=float, default=1e9, help="after which to stop")
    args = parser.parse_args()
    if args.backend is None:
        sys.exit("gpu_sanitize: no fused backend runs on a GPU here; see python -m harmonizer_ext")
    start, left_out, done = time.monotonic(), [], 0
    for name, call in work(args.backend):
        if time.monotonic() - start > args.seconds:
            left_out.append(name)
            continue
        try:
            call()
        except RuntimeError as error:
            # A specialization for another GPU says so; anything else must not pass for coverage.
            if not name.startswith("variant") or "the GPU has" not in str(error):
                raise
            left_out.append(f"{name} ({error})")
            continue
        torch.cuda.synchronize()
        done += 1
        print(f"{time.monotonic() - start:.0f} s: {name}", flush=True)
    print(
        f"ran {args.backend}: {done} of {done + len(left_out)}; left out: {left_out or 'nothing'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
