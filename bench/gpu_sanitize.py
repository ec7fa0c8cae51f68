"""Runs every fused GPU kernel once on small and odd sizes: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python bench/gpu_sanitize.py

Values are checked by the tests; a sanitizer slows a kernel a hundredfold, so that this is small.
"""

from __future__ import annotations

import sys

import torch

import harmonizer_ext as hx

SIZES = ((1, 1), (5, 7), (33, 31), (64, 64), (224, 224), (225, 223))
FORMULATIONS = (("released", "mse"), ("paper", "mse"), ("paper", "l2"))


def main() -> int:
    generator = torch.Generator().manual_seed(0)
    fused = [name for name in hx.available_backends("cuda") if name != "reference"]
    for backend in fused:
        for height, width in SIZES:
            for dtype in (torch.float32, torch.bfloat16):
                maps = torch.randn(2, 3, height, width, generator=generator).to("cuda", dtype)
                heatmaps = torch.rand(2, height, width, generator=generator).cuda()
                for layout in (torch.contiguous_format, torch.channels_last):
                    for formulation, distance in FORMULATIONS:
                        x = maps.contiguous(memory_format=layout).requires_grad_()
                        hx.harmonization_loss(
                            x,
                            heatmaps,
                            torch.tensor([1.0, 0.0], device="cuda"),
                            formulation=formulation,
                            distance=distance,
                            backend=backend,
                        ).backward()
                x = maps.requires_grad_()
                sum(p.sum() for p in hx.gaussian_pyramid(x, 5, backend=backend)).backward()
                hx.standardize_cut(x, backend=backend).sum().backward()
                hx.positive_part_mse(x[:, 0], heatmaps, backend=backend).sum().backward()
    torch.cuda.synchronize()
    print(f"ran {', '.join(fused) or 'nothing: no fused backend runs here'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
