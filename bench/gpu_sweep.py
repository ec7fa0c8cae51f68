"""Every compiled specialization of the CUDA loss against each other, the general path and a copy.

    python bench/gpu_sweep.py --batches 8,64,512 --dtypes float32,bfloat16 --prefetch 0,0.5,1

Answers which specialization csrc/cuda should choose, and how far ahead it should ask for memory.
What is timed is a CUDA graph of one call on every set of inputs, the sets together more than twice
the cache: launches cost nothing there and reads come from memory. All contenders of a case take
turns. Prints a table and writes a record, both as it goes.
"""

from __future__ import annotations

import re
import sys
from functools import partial
from typing import Any

import bench_loss  # first of all: through harness it sets what torch reads when it is loaded

# isort: split
import bench_gpu
import program
import torch

from harmonizer_ext import backends

FORMULATIONS = ("released", "paper")
GENERAL = -1


def formulation_of(variant: dict[str, Any]) -> str:
    """The formulation as the loss is called, whether the module says it by name or by number."""
    named = variant["formulation"]
    return named if isinstance(named, str) else FORMULATIONS[named]


def samples_at_once(variant: dict[str, Any], multiprocessors: int) -> int:
    """Clusters that the GPU holds at a time; a name such as 224/4x2 ends in blocks a processor."""
    blocks = re.match(r"\d+/\d+x(\d+)", variant["name"])
    return max(1, multiprocessors * int(blocks[1] if blocks else 1) // variant["cluster"])


def contenders(
    case: bench_loss.Case, variants: list[dict[str, Any]], prefetch: list[float], device: str
) -> dict[str, bench_gpu.Contender]:
    """The contenders by name: the automatic choice, the general path and every specialization."""
    cuda = backends.get("cuda")
    found: dict[str, bench_gpu.Contender] = {}

    def add(name: str, columns: dict[str, Any], variant: int, ahead: int) -> None:
        function = partial(cuda.harmonization, variant=variant, prefetch=ahead)
        found[name] = bench_gpu.Contender(
            lambda x, y, w: function(x, y, w, case.formulation, 5, "mse", True),
            columns | {"variant": variant, "prefetch": ahead},
            plain=False,
        )

    add("automatic", {}, 0, 0)
    add("general", {}, GENERAL, 0)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    for variant in variants:
        if formulation_of(variant) == case.formulation and case.width == variant["size"]:
            # What is resident is loading already: the samples behind it are what may be asked for.
            for distance in dict.fromkeys(
                round(part * samples_at_once(variant, processors)) for part in prefetch
            ):
                name = f"{variant['name']}, prefetch {distance}"
                add(name, dict(variant), variant["number"], distance)
    return found


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> int:
    parser = program.arguments(__doc__)
    add = parser.add_argument
    add("--batches", type=numbers, default=[64, 512, 8])
    add("--sizes", type=numbers, help="default: 224, then all that have variants")
    add("--dtypes", default="float32,bfloat16")
    add("--formulations", default=",".join(FORMULATIONS))
    add(
        "--prefetch",
        type=lambda text: [float(part) for part in text.split(",")],
        default=[0.0, 1.0],
        help="how far ahead, in what the GPU holds at a time; default: 0,1",
    )
    add("--list", action="store_true", help="print the variants and end; no GPU")
    args = parser.parse_args()
    reason = backends.get("cuda").why_not_built() if args.list else backends.why_not("cuda", "cuda")
    if reason is not None:
        print(f"gpu_sweep: {reason}; nothing was run and nothing was written", file=sys.stderr)
        return 2
    variants = backends.get("cuda").native().cuda_loss_variants()
    if args.list:
        for variant in variants:
            print(variant | {"formulation": formulation_of(variant)})
        return 0
    sizes = args.sizes or sorted({224} | {v["size"] for v in variants}, key=lambda n: (n != 224, n))
    cases = [
        bench_gpu.case(formulation, batch, size, size, getattr(torch, dtype))
        for size in sizes
        for batch in args.batches
        for dtype in args.dtypes.split(",")
        for formulation in args.formulations.split(",")
    ]
    work = {
        case.name: lambda journal, case=case: bench_gpu.measure(
            case,
            contenders(case, variants, args.prefetch, args.device),
            args.device,
            journal,
            args.seconds,
            args.rounds,
        )
        for case in cases
    }
    return program.work_through(work, args, bench_gpu.print_rows, variants=variants)


if __name__ == "__main__":
    sys.exit(main())
