"""Every compiled specialization of the CUDA loss against each other, the general path and a copy.

    python bench/gpu_sweep.py --batches 8,64,512 --dtypes float32,bfloat16 --prefetch 0,1,2

Answers which specialization csrc/cuda should choose, and how far ahead it should ask for memory.
What is timed is a CUDA graph of one call on every set of inputs, the sets together more than twice
the cache: launches cost nothing there and reads come from memory. All contenders of a case take
turns. Prints a table and writes bench/results/<date>-<time>-<gpu>-sweep.json after every case.
"""

from __future__ import annotations

import argparse
import datetime
import re
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import bench_loss  # first of all: through harness it sets what torch reads when it is loaded

# isort: split
import bench_gpu
import harness
import torch

import harmonizer_ext as hx
from harmonizer_ext import backends

FORMULATIONS = ("released", "paper")
GENERAL = -1


def contenders(
    case: bench_loss.Case, variants: list[dict[str, Any]], prefetch: list[int]
) -> dict[str, tuple[dict[str, Any], bench_loss.Run]]:
    """By name: what the row says of it, and the call."""
    found: dict[str, tuple[dict[str, Any], bench_loss.Run]] = {}

    def add(name: str, description: dict[str, Any], variant: int, ahead: int) -> None:
        function = partial(backends.get("cuda").harmonization, variant=variant, prefetch=ahead)
        found[name] = (
            description | {"variant": variant, "prefetch": ahead},
            lambda x, y, w: function(x, y, w, case.formulation, 5, "mse", True),
        )

    add("automatic", {}, 0, 0)
    add("general", {}, GENERAL, 0)
    for variant in variants:
        if (
            FORMULATIONS[variant["formulation"]] == case.formulation
            and case.width == (variant["size"])
        ):
            for ahead in prefetch:
                name = f"{variant['name']}, prefetch {ahead}"
                add(name, dict(variant), variant["number"], ahead)
    if "triton" in hx.available_backends("cuda"):
        found["triton"] = ({}, bench_loss.fused_op(case, "triton"))
    return found


def captured(run: bench_loss.Run, sets: list[bench_loss.Maps], pool: Any) -> torch.cuda.CUDAGraph:
    """One graph that calls ``run`` on every set of inputs in turn."""
    run(*sets[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        # Results that were freed would give their memory, by then in the cache, to the next call.
        results = [run(*inputs) for inputs in sets]
    del results
    return graph


def measure(
    case: bench_loss.Case, variants: list[dict[str, Any]], prefetch: list[int], seconds: float
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of the record for one case, and what could not be measured and why."""
    count = harness.sets_beyond_cache(case.bytes, "cuda")
    sets = [bench_gpu.maps(case, "cuda", seed) for seed in range(count)]
    reference = partial(hx.harmonization_loss, formulation=case.formulation, backend="reference")
    expected = bench_loss.through_autograd(reference, gradient=True)(*sets[0])
    halves = [torch.empty(case.bytes // 8, device="cuda") for _ in range(2 * count)]
    runs: dict[str, tuple[dict[str, Any], bench_loss.Run]] = {
        bench_loss.COPY: ({}, lambda source, target: target.copy_(source))
    }
    runs |= contenders(case, variants, prefetch)
    pool = torch.cuda.graph_pool_handle()
    calls: dict[str, harness.Call] = {}
    problems = []
    for name, (_, run) in runs.items():
        inputs = sets
        if name == bench_loss.COPY:
            inputs = list(zip(halves[::2], halves[1::2], strict=True))
        else:
            try:
                bench_loss.check_agreement(case, name, run(*sets[0]), expected)
            except RuntimeError as error:
                problems.append(f"{case.name}: {name}: {error}")
                continue
        graph = captured(run, inputs, pool)
        calls[name] = lambda _, graph=graph: graph.replay()
    timings = harness.interleave(calls, device="cuda", seconds=seconds)
    rows = []
    for name, timing in timings.items():
        milliseconds = timing.median / count
        rows.append(
            {"case": case.name, **case.description, "implementation": name, **runs[name][0]}
            | {"unit": "ms", "value": milliseconds, "minimum": timing.minimum / count}
            | {"quantile_20": timing.quantile_20 / count, "quantile_80": timing.quantile_80 / count}
            | {"gigabytes_per_second": case.bytes / milliseconds / 1e6}
            | {"times_copy": timing.median / timings[bench_loss.COPY].median}
        )
    return rows, problems


def print_rows(rows: list[dict[str, Any]]) -> None:
    """The fastest first."""
    print(f"\n{rows[0]['case']}  ({rows[0]['megabytes']:.1f} MB)")
    print(f"  {'':<28}{'us':>9}{'20 .. 80 %':>20}{'GB/s':>7}{'x copy':>8}  blocks, threads, shared")
    for row in sorted(rows, key=lambda row: row["value"]):
        keys = ("cluster", "threads", "shared_bytes")
        shape = ", ".join(str(row[key]) for key in keys if key in row)
        print(
            f"  {row['implementation']:<28}{row['value'] * 1e3:>9.1f}"
            f"{row['quantile_20'] * 1e3:>10.1f} ..{row['quantile_80'] * 1e3:>7.1f}"
            f"{row['gigabytes_per_second']:>7.0f}{row['times_copy']:>8.2f}  {shape}",
            flush=True,
        )


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batches", type=numbers, default=[64, 512, 8])
    parser.add_argument("--sizes", type=numbers, help="default: 224, then all that have variants")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--formulations", default=",".join(FORMULATIONS))
    parser.add_argument("--prefetch", type=numbers, default=[0, 1, 2, 4], help="samples ahead")
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring, for each case")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds after which to stop")
    parser.add_argument("--output", type=Path, help="default: a new file in bench/results")
    parser.add_argument("--list", action="store_true", help="print the variants and end; no GPU")
    args = parser.parse_args()
    reason = backends.get("cuda").why_not_built() if args.list else backends.why_not("cuda", "cuda")
    if reason is not None:
        print(f"gpu_sweep: {reason}; nothing was run and nothing was written", file=sys.stderr)
        return 2
    variants = backends.get("cuda").native().cuda_loss_variants()
    if args.list:
        for variant in variants:
            print(variant | {"formulation": FORMULATIONS[variant["formulation"]]})
        return 0
    sizes = args.sizes or sorted({224} | {v["size"] for v in variants}, key=lambda n: (n != 224, n))
    cases = [
        bench_loss.Case(
            f"{formulation} B={batch} {size}x{size} {dtype}",
            batch,
            size,
            size,
            getattr(torch, dtype),
            formulation=formulation,
        )
        for size in sizes
        for batch in args.batches
        for dtype in args.dtypes.split(",")
        for formulation in args.formulations.split(",")
    ]
    now = datetime.datetime.now(datetime.timezone.utc)
    slug = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    output = args.output or harness.RESULTS / f"{now:%Y-%m-%d-%H%M}-{slug}-sweep.json"
    record: dict[str, Any] = {"machine": harness.machine("cuda"), "variants": variants}
    record |= {"rows": [], "problems": [], "left_out": []}
    start = time.monotonic()
    for case in cases:
        if time.monotonic() - start > args.budget:
            record["left_out"].append(case.name)
            continue
        try:
            rows, problems = measure(case, variants, args.prefetch, args.seconds)
        except torch.OutOfMemoryError as error:
            record["left_out"].append(f"{case.name}: {str(error).splitlines()[0]}")
            continue
        record["rows"] += rows
        record["problems"] += problems
        harness.write_record(output, record)
        print_rows(rows)
        for problem in problems:
            print(f"  {problem}", flush=True)
        torch.cuda.empty_cache()
    harness.write_record(output, record)
    if record["left_out"]:
        print(f"\nleft out: {'; '.join(record['left_out'])}")
    return 1 if record["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
