"""Prints the Markdown table of a record of ``bench_loss.py``, as the README has it.

python bench/table.py bench/results/<record>.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

#: Implementations in the README's words, the fused ones first.
LABELS = {
    "cpu: op": "**fused C++ kernels**, the op alone",
    "cpu: harmonization_loss": "**fused C++ kernels**, `harmonization_loss` and `autograd.grad`",
    "eager_released": "eager PyTorch, as released",
    "eager_paper": "eager PyTorch",
    "torch.compile": "the best `torch.compile`",
    "copy_ of the same bytes": "`copy_` of the same bytes, the floor",
}


def table(record: dict[str, Any], case: str) -> str:
    """Milliseconds, ratios and memory of one case."""
    rows = [row for row in record["rows"] if row["case"] == case]
    times = {row["implementation"]: row for row in rows if row["quantity"] == "time"}
    memory = {row["implementation"]: row["value"] for row in rows if row["unit"] == "MB"}
    compiled = [name for name in times if name.startswith("torch.compile")]
    best = min(compiled, key=lambda name: times[name]["value"], default=None)
    lines = ["| | ms | times the copy | extra memory, MB |", "|---|---:|---:|---:|"]
    for key, label in LABELS.items():
        name = best if key == "torch.compile" else key
        if name not in times:
            continue
        row, peak = times[name], memory.get(name)
        lines.append(
            f"| {label} | {row['value']:.2f} | {row['times_copy']:.2f} | "
            f"{'-' if peak is None else format(peak, '.0f')} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("record", type=Path)
    args = parser.parse_args()
    record = json.loads(args.record.read_text())
    machine = record["machine"]
    for case in ("released", "paper"):
        of = record["cases"][case]
        shape = "x".join(str(n) for n in of["saliency"])
        print(f"`formulation={case!r}`, {shape} {of['dtype']}, {of['computed']}:\n")
        print(table(record, case), end="\n\n")
    print(
        f"{machine['processor']}, {machine['threads']} threads, PyTorch {machine['torch']}, "
        f"{machine['date'][:10]}; medians, interleaved in one process; record "
        f"[{args.record.name}]({args.record})."
    )


if __name__ == "__main__":
    main()
