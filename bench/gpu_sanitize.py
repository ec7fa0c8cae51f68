"""Runs every fused GPU kernel once on small and odd sizes: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python bench/gpu_sanitize.py --output ran.json

Values are checked by the tests; a sanitizer slows a kernel a hundredfold, so that this is small.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import harness  # first of all: it sets what torch reads when it is loaded

# isort: split
import gpu_sweep
import records
import torch
from torch import Tensor

import harmonizer_ext as hx
from harmonizer_ext import backends

#: The specialized size first, then borders in the middle of everything, then the smallest maps.
SIZES = ("224x224", "33x31", "112x112", "225x223", "64x64", "5x7", "1x1")
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


def variant(number: int, size: int, formulation: str, device: str) -> None:
    """A specialization that the automatic choice may not take here."""
    maps = torch.randn(3, 3, size, size, device=device).bfloat16()
    heatmaps, tokens = torch.rand(3, size, size, device=device), torch.ones(3, device=device)
    cuda = backends.get("cuda")
    cuda.harmonization(maps, heatmaps, tokens, formulation, 5, "mse", True, variant=number)


def make(size: tuple[int, int], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    maps = torch.randn(2, 3, *size, device=device).to(dtype)
    return maps, torch.rand(2, *size, device=device)


def on(
    of: Callable[[str, Tensor, Tensor], None],
    backend: str,
    maps: Callable[[], tuple[Tensor, Tensor]],
) -> None:
    of(backend, *maps())


def done(name: str, call: Callable[[], object], journal: records.Journal) -> None:
    try:
        call()
    except RuntimeError as error:
        # A specialization for another GPU says so; anything else must not pass for coverage.
        if not name.startswith("variant") or "the GPU has" not in str(error):
            raise
        journal.row(case=name, left_out=str(error))
        return
    torch.cuda.synchronize()
    journal.row(case=name, ran=True)


def main() -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="HEIGHTxWIDTH")
    parser.add_argument("--dtypes", nargs="+", default=("float32", "bfloat16"))
    args = parser.parse_args()
    fused = [name for name in hx.available_backends(args.device) if name != "reference"]
    if not fused:
        print("gpu_sanitize: no fused backend runs here: python -m harmonizer_ext", file=sys.stderr)
        return 2
    work: dict[str, Callable[[records.Journal], object]] = {}
    for size in args.sizes:
        height, width = map(int, size.split("x"))
        for backend in fused:
            for dtype in args.dtypes:
                for of in (losses, building_blocks):
                    name = f"{backend}: {of.__name__} {size} {dtype}"
                    maps = partial(make, (height, width), getattr(torch, dtype), args.device)
                    call = partial(on, of, backend, maps)
                    work[name] = partial(done, name, call)
    for found in backends.get("cuda").native().cuda_loss_variants() if "cuda" in fused else ():
        if f"{found['size']}x{found['size']}" in args.sizes:
            formulation = gpu_sweep.formulation_of(found)
            name = f"variant {found['name']} {formulation}"
            call = partial(variant, found["number"], found["size"], formulation, args.device)
            work[name] = partial(done, name, call)
    return harness.work_through(work, args)


if __name__ == "__main__":
    sys.exit(main())
