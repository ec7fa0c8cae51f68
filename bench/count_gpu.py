"""Counts what the compiled GPU kernels of the loss execute, without a GPU.

    python bench/count_gpu.py --output bench/results/<date>-counts.json

Every specialization and the general path of the CUDA kernels, and the Triton kernels, as compiled
for one architecture, are executed by the interpreter in tests/native/ptx_on_host on one image with
three channels. A count is no time: it says what a GPU has to do at least, not how long it takes. It
is of PTX, of which ptxas makes machine code of about as many instructions.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests")]

import cuda_cases  # noqa: E402
import cuda_paths  # noqa: E402
import cuda_ptx_on_host  # noqa: E402
import ptx_on_host  # noqa: E402
from conftest import make_case  # noqa: E402

LANES = 32
#: Columns of the table: title, and what of a row it shows.
COLUMNS = (
    ("instructions", "instructions"),
    ("issue slots", "issue slots"),
    ("bytes read", "global bytes read"),
    ("bytes written", "global bytes written"),
    ("sectors / ideal", "sectors over ideal"),
    ("shared wavefronts", "shared wavefronts"),
    ("shared / ideal", "wavefronts over ideal"),
    ("barriers", "barriers"),
)


def per_pixel(counts: dict[str, Any], pixels: int) -> dict[str, Any]:
    """The counts of all kernels of a call, divided by the pixels of the map.

    ``instructions`` are of threads. ``issue slots`` are 32 for every instruction that a warp
    issues, whether all its lanes take part or one. Sectors are of 32 bytes, wavefronts passes over
    the banks of shared memory for a warp.
    """
    classes: dict[str, float] = {}
    issued, traffic, excess = 0, {}, {}
    for kernel in counts.values():
        for name, (threads, warps) in kernel["instructions"].items():
            classes[name] = classes.get(name, 0) + threads / pixels
            issued += warps
        for name, numbers in kernel["traffic"].items():
            total = traffic.setdefault(name, dict.fromkeys(numbers, 0))
            for key, value in numbers.items():
                total[key] += value
        for line, pieces in kernel["excess"].items():
            excess[line] = excess.get(line, 0) + pieces

    def total(key: str, *names: str) -> float:
        return sum(numbers[key] for name, numbers in traffic.items() if name.startswith(names))

    shared, global_ = ("shared",), ("global",)
    return {
        "instructions": sum(classes.values()),
        "issue slots": LANES * issued / pixels,
        "classes": {name: round(value, 3) for name, value in classes.items()},
        "global bytes read": total("bytes", "global loads") / pixels,
        "global bytes written": total("bytes", "global stores") / pixels,
        "sectors over ideal": total("pieces", *global_) / max(total("ideal", *global_), 1),
        "shared wavefronts": total("pieces", *shared) / pixels,
        "wavefronts over ideal": total("pieces", *shared) / max(total("ideal", *shared), 1),
        "barriers": classes["barriers and fences"],
        "traffic": traffic,
        "most excess": dict(sorted(excess.items(), key=lambda item: -item[1])[:8]),
    }


def cuda_counts(case: cuda_cases.Case, device: str = "hopper") -> dict[str, Any]:
    """Counts of all that a call of the CUDA kernels executes."""
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts.json"
        settings = cuda_paths.DEVICES[device] | {"HARMONIZER_PTX_COUNT": str(counts)}
        cuda_ptx_on_host.run([case], environment=settings | {"HARMONIZER_PTX_RACES": "0"})
        found: dict[str, Any] = json.loads(counts.read_text())
    return found


def cuda_rows(sizes: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Every specialization of some sizes, and the general path for Ampere."""
    for variant in cuda_paths.variants(cuda_ptx_on_host.run):
        if variant.size in sizes:
            case = loss_case(variant.size, variant.formulation, variant.number)
            counts = per_pixel(cuda_counts(case), variant.size**2)
            name = f"cuda {variant.name}, sm_90"
            yield {"path": name, "size": variant.size, "formulation": variant.formulation} | counts
    for size in sizes:
        for formulation in cuda_cases.FORMULATIONS:
            counts = per_pixel(cuda_counts(loss_case(size, formulation, -1), "ampere"), size**2)
            yield {"path": "cuda general, sm_80", "size": size, "formulation": formulation} | counts


def loss_case(size: int, formulation: str, variant: int) -> cuda_cases.Case:
    """A call for one square image with three channels."""
    case = make_case(torch.Generator().manual_seed(0), size, size, batch=1)
    maps = (case.saliency, case.heatmaps, torch.ones(1))
    return cuda_cases.loss_case(*maps, formulation, variant=variant)


def triton_rows(sizes: tuple[int, ...], targets: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The Triton kernels."""
    import triton_on_host

    from harmonizer_ext.backends import triton as backend

    for target in targets:
        with triton_on_host.executing(target) as driver:
            driver.options = ptx_on_host.Options(count=True, races=False)
            for size in sizes:
                for formulation in cuda_cases.FORMULATIONS:
                    tensors = loss_case(size, formulation, 0).tensors
                    maps = (tensors["saliency"], tensors["heatmaps"], tensors["weights"])
                    backend.harmonization(*maps, formulation, 5, "mse", True)
                    counts = per_pixel(ptx_on_host.counts(), size**2)
                    row = {"path": f"triton, {target}", "size": size, "formulation": formulation}
                    yield row | counts


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a row for every path."""
    lines = [
        "| path | size | formulation | " + " | ".join(title for title, _ in COLUMNS) + " |",
        "|---|---:|---|" + "---:|" * len(COLUMNS),
    ]
    for row in rows:
        numbers = " | ".join(f"{row[key]:.2f}" for _, key in COLUMNS)
        lines.append(f"| {row['path']} | {row['size']} | {row['formulation']} | {numbers} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="where the record is written, as JSON")
    parser.add_argument("--sizes", type=int, nargs="+", default=[112, 224])
    args = parser.parse_args()
    reason = cuda_ptx_on_host.why_not_here()
    if reason is not None:
        print(f"count_gpu: {reason}; nothing was counted", file=sys.stderr)
        return 2
    sizes, rows = tuple(args.sizes), []
    for row in (*cuda_rows(sizes), *triton_rows(sizes, ("sm_80", "sm_90"))):
        rows.append(row)
        print(f"{row['path']} {row['size']} {row['formulation']}", flush=True)
    print(table(rows))
    if args.output is not None:
        describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout.strip()
        version = [cuda_ptx_on_host.nvcc() or "nvcc", "--version"]
        nvcc = subprocess.run(version, capture_output=True, text=True).stdout
        record = {
            "what": "counts of executed PTX a pixel; no GPU was used and nothing is a time",
            "commit": commit,
            "nvcc": nvcc.strip().splitlines()[-1],
            "torch": torch.__version__,
            "machine": platform.machine(),
            "levels": 5,
            "channels": 3,
            "dtype": "float32",
            "rows": rows,
        }
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
