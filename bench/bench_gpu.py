"""The fused backends of a GPU against eager PyTorch, CUDA graphs, torch.compile and a copy.

    python bench/bench_gpu.py --output rows.json

What it measures is one call that gives loss and gradient: of a fused backend the op itself, plain
and replayed from a CUDA graph; of a peer the forward and the backward pass, plain and replayed.
``bench_loss.py`` has the bytes on the model and the peers, ``harness.py`` the clock: events round
every call, implementations in turn, inputs from sets that together exceed the cache. A GPU's short
calls are launched faster than they run only when several wait in its queue, so that a plain call
includes what its launches cost; the graph does not.

Normally called by ``gpu_check.sh``, which adds tests and sanitizers and writes the record.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_loss  # first of all: through harness it sets what torch reads when it is loaded

# isort: split
import harness
import peers
import torch

from harmonizer_ext import available_backends

GRAPH = ", CUDA graph"


def cases(quick: bool) -> list[bench_loss.Case]:
    """Batches at 224x224, then other sizes, in float32 and bfloat16, both formulations.

    Last, because compiling takes half a minute a graph, the targets once more beside torch.compile.
    """
    shapes = [(64, 224, 224), (512, 224, 224), (8, 224, 224)]
    shapes += [(64, n, n) for n in (112, 256, 384, 512)] + [(64, 225, 223)]
    dtypes = [torch.float32, torch.bfloat16]
    if quick:
        shapes, dtypes = [(2, 33, 31)], [torch.float32]
    plain = [
        bench_loss.Case(
            f"{formulation} B={batch} {height}x{width} {str(dtype).removeprefix('torch.')}",
            batch,
            height,
            width,
            dtype,
            formulation=formulation,
        )
        for batch, height, width in shapes
        for dtype in dtypes
        for formulation in ("released", "paper")
    ]
    headlines = [
        replace(case, name=f"{case.name}, with {bench_loss.COMPILE}", headline=True)
        for case in plain
        if case.dtype == torch.float32 and case.batch >= 64 and case.height == case.width == 224
    ]
    return plain + headlines


def maps(case: bench_loss.Case, device: str, seed: int) -> bench_loss.Maps:
    """Inputs of a case, made on the device: gigabytes for a GPU would take a CPU minutes."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = case.description["saliency"]
    saliency = torch.randn(shape, generator=generator, device=device) * 1e-3
    heatmaps = torch.rand(shape[0], *shape[2:], generator=generator, device=device)
    tokens = torch.ones(shape[0], dtype=case.heatmap_dtype, device=device)
    return saliency.to(case.dtype), heatmaps.to(case.heatmap_dtype), tokens


def implementations(case: bench_loss.Case, device: str) -> dict[str, bench_loss.Run]:
    """The fused op of every backend, the eager peer, and the compiled ones of a headline case."""
    found: dict[str, bench_loss.Run] = {
        f"{backend}: op": bench_loss.fused_op(case, backend)
        for backend in available_backends(device)
        if backend != "reference"
    }
    eager = peers.EAGER[case.formulation][0]
    found[eager.__name__] = bench_loss.through_autograd(eager, gradient=True)
    if case.headline:
        for peer in peers.COMPILED[case.formulation]:
            graph = torch.compile(peer, dynamic=False)
            found[f"{bench_loss.COMPILE}({peer.__name__})"] = bench_loss.through_autograd(
                graph, gradient=True
            )
    return found


def captured(run: bench_loss.Run, sets: list[bench_loss.Maps]) -> harness.Call:
    """The same call replayed from a CUDA graph, one graph for every set of inputs."""
    graphs, outputs = [], []
    stream = torch.cuda.Stream()
    for inputs in sets:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs.append(run(*inputs))
        graphs.append(graph)
    return lambda index: (graphs[index % len(graphs)].replay(), outputs)[0]


def measure(case: bench_loss.Case, device: str, seconds: float) -> list[dict[str, Any]]:
    """Rows of the record for one case."""
    on_gpu = torch.device(device).type == "cuda"
    count = harness.sets_beyond_cache(case.bytes, device)
    sets = [maps(case, device, seed) for seed in range(count)]
    calls: dict[str, harness.Call] = {bench_loss.COPY: bench_loss.copy_call(case, device)}
    peaks: dict[str, int] = {}
    eager = bench_loss.through_autograd(peers.EAGER[case.formulation][0], gradient=True)
    expected = eager(*sets[0])
    for name, run in implementations(case, device).items():
        bench_loss.check_agreement(case, name, run(*sets[0]), expected)
        if on_gpu:
            peaks[name] = harness.peak_extra_bytes(
                lambda _, run=run: run(*sets[0]), lambda: None, device
            )
        calls[name] = bench_loss.over_sets(run, sets)
        if on_gpu and not name.startswith(bench_loss.COMPILE):
            calls[name + GRAPH] = captured(run, sets)
    timings = harness.interleave(calls, device=device, seconds=seconds)
    copy = timings[bench_loss.COPY].median
    rows = []
    for name, timing in timings.items():
        row = {"case": case.name, **case.description, "implementation": name}
        row |= harness.timing_row(timing)
        row |= {"times_copy": timing.median / copy}
        row |= {"gigabytes_per_second": case.bytes / timing.median / 1e6}
        if name in peaks:
            row["peak_extra_megabytes"] = peaks[name] / 1e6
        rows.append(row)
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    """A table a case, the floor first."""
    last = None
    for row in rows:
        if row["case"] != last:
            last = row["case"]
            print(f"\n{last}: {row['bytes_per_pixel']} B/px, {row['megabytes']:.1f} MB")
            titles = ("ms", "20 % .. 80 %", "GB/s", "x copy", "extra MB")
            print(f"  {'':<44}" + "{:>9}{:>18}{:>8}{:>8}{:>10}".format(*titles))
        peak = row.get("peak_extra_megabytes")
        print(
            f"  {row['implementation']:<44}{row['value']:>9.4f}"
            f"{row['quantile_20']:>9.4f} .. {row['quantile_80']:.4f}"
            f"{row['gigabytes_per_second']:>8.0f}{row['times_copy']:>8.2f}"
            f"{'-' if peak is None else format(peak, '.1f'):>10}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring, for each case")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds after which to stop")
    parser.add_argument("--quick", action="store_true", help="one tiny case: does it run at all?")
    parser.add_argument("--output", type=Path, required=True, help="file for the rows")
    args = parser.parse_args()
    start = time.monotonic()
    record: dict[str, Any] = {"rows": [], "left_out": [], "wrong": []}
    for case in cases(args.quick):
        if time.monotonic() - start > args.budget:
            record["left_out"].append(f"{case.name}: the budget of {args.budget:g} s was spent")
        else:
            harness.say(f"{case}  ({time.monotonic() - start:.0f} s)")
            try:
                record["rows"] += measure(case, args.device, args.seconds)
            except torch.OutOfMemoryError as error:
                record["left_out"].append(f"{case.name}: {str(error).splitlines()[0]}")
            except RuntimeError as error:
                record["wrong"].append(f"{case.name}: {error}")
        # After every case: what was measured is not lost to what comes next.
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    print_rows(record["rows"])
    for key in ("left_out", "wrong"):
        if record[key]:
            print(f"\n{key}:\n  " + "\n  ".join(record[key]))
    return 1 if record["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
