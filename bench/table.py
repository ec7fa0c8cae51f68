"""Tables of a record of ``run.py``: as text for a terminal, as Markdown for the README.

python bench/table.py bench/results/RECORD.json                 the README's, in Markdown
python bench/table.py bench/results/RECORD.json --text          everything, as run.py prints it
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import records
from records import COMPILE, COPY, Row, Rows

#: Backends in the README's words.
BACKENDS = {"cpu": "C++", "cuda": "CUDA", "triton": "Triton"}
LABELS = {
    "reference: harmonization_loss": '`backend="reference"`, plain PyTorch',
    "eager_released": "eager PyTorch, as released",
    "eager_one_pyramid": "eager PyTorch, one pyramid",
    "eager_paper": "eager PyTorch",
    "TensorFlow, as released": "the authors' TensorFlow code",
    "TensorFlow, as released, tf.function": "the authors' TensorFlow code in `tf.function`",
    COPY: "`copy_` of the same bytes, the floor",
}
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Table:
    """A title, columns of which the first is names, and a line below."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def text(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(len(line[n]) for line in lines) for n in range(len(self.header))]
        body = [
            "  "
            + line[0].ljust(widths[0])
            + "".join(
                f"  {cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True)
            )
            for line in lines
        ]
        return "\n".join(["", self.title, *body] + ([f"  {self.note}"] if self.note else []))

    def markdown(self) -> str:
        aligned = "|".join(["---", *["---:"] * (len(self.header) - 1)])
        lines = [f"{self.title}:", "", "| " + " | ".join(self.header) + " |", f"|{aligned}|"]
        lines += ["| " + " | ".join(line) + " |" for line in self.rows]
        return "\n".join(lines + (["", self.note] if self.note else []))


def is_ours(implementation: str) -> bool:
    """Whether these are the fused kernels, by one way or another."""
    backend, colon, _ = implementation.partition(": ")
    return bool(colon) and backend in BACKENDS


def label(implementation: str) -> str:
    """An implementation in the README's words."""
    if is_ours(implementation):
        backend, _, how = implementation.partition(": ")
        words = {
            "op": "the op alone",
            "op, CUDA graph": "the op alone, CUDA graph",
            "harmonization_loss": "`harmonization_loss` and `autograd.grad`",
        }
        return f"**fused {BACKENDS[backend]} kernels**, {words.get(how, how)}"
    return LABELS.get(implementation, implementation)


def _number(value: float | None, digits: int = 3) -> str:
    """``digits`` figures, never an exponent."""
    if value is None:
        return "-"
    before = math.floor(math.log10(abs(value))) + 1 if value else 1
    return f"{value:.{max(digits - before, 0)}f}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{_number(value)}x"


def bytes_per_pixel(row: Row) -> str:
    """How the bytes of the model are counted, in words."""
    size = _BYTES[row["dtype"]]
    heatmap, channels = max(size, 4), row["saliency"][1]
    writes = f", write gradient {size}" if row["computed"] == "loss and gradient" else ""
    total = row["bytes_per_pixel"]
    return f"read saliency {channels}x{size} + human map {heatmap}{writes} = {total} B/px"


def _counted(record: dict[str, Any], row: Row) -> str:
    """The bytes of a case in words, and the instructions of our kernels where they were counted."""
    found = records.select(
        record["rows"],
        quantity="instructions",
        formulation=row.get("formulation"),
        computed=row.get("computed"),
        dtype=row["dtype"],
    )
    executed = f", {found[0]['value']:.1f} instructions/px in our kernels" if found else ""
    return bytes_per_pixel(row) + executed


def _devices(record: dict[str, Any]) -> list[str]:
    return list(record["machine"]["devices"])


# --- the loss -------------------------------------------------------------------------------------


def loss_tables(record: dict[str, Any], device: str) -> list[Table]:
    """Everything timed of the loss and of one image, which is in microseconds; a table a case."""
    rows = records.select(record["rows"], device=device)
    peaks = {
        (row["case"], row["implementation"]): row["value"]
        for row in records.select(rows, section="memory")
    }
    columns = ("20 % .. 80 %", "25 %", "GB/s", "of copy", "vs eager", "vs compile", "extra MB")
    found = []
    for section, unit, scale in (("loss", "ms", 1.0), ("latency", "us", 1e3)):
        times = records.select(rows, section=section, quantity="time")
        for case in dict.fromkeys(row["case"] for row in times):
            mine = records.select(times, case=case)
            first = mine[0]
            title = (
                f"{case}: {records.shape(first)} {first['dtype']}, {first['computed']}; "
                f"{_counted(record, first)}, {_number(first['megabytes'])} MB"
            )
            lines = [
                (
                    row["implementation"],
                    *(
                        _number(scale * row["value"]),
                        f"{_number(scale * row['quantile_20'])} .. "
                        f"{_number(scale * row['quantile_80'])}",
                        _number(scale * row["lower_quartile"]),
                    ),
                    _number(row["gigabytes_per_second"]),
                    _times(row.get("times_copy")),
                    _times(row.get("times_faster_than_eager")),
                    _times(row.get("times_faster_than_best_compile")),
                    _number(peaks.get((case, row["implementation"]))),
                )
                for row in mine
            ]
            found.append(Table(title, ("", unit, *columns), lines))
    return found


def sweep_tables(record: dict[str, Any], device: str) -> list[Table]:
    """One table for each thing that is varied: a line a case, the best fused call beside others."""
    rows = records.select(record["rows"], device=device, section="sweep", quantity="time")
    columns = ("shape", "B/px", "op, ms", "loss, ms", "GB/s", "copy GB/s", "of copy", "vs eager")
    found = []
    for varied in dict.fromkeys(row["varied"] for row in rows):
        mine = records.select(rows, varied=varied)
        lines = []
        for case in dict.fromkeys(row["case"] for row in mine):
            here = records.select(mine, case=case)
            ours = [row for row in here if is_ours(row["implementation"])]
            (copy,) = records.select(here, implementation=COPY)
            op = next((row for row in ours if row["implementation"].endswith(": op")), None)
            loss = next((row for row in ours if row["implementation"].endswith("loss")), None)
            if loss is None:
                continue
            lines.append(
                (
                    case.removeprefix("sweep, "),
                    records.shape(loss),
                    str(loss["bytes_per_pixel"]),
                    _number(op["value"] if op else None),
                    _number(loss["value"]),
                    _number(loss["gigabytes_per_second"]),
                    _number(copy["gigabytes_per_second"]),
                    _times(loss["times_copy"]),
                    _times(loss["times_faster_than_eager"]),
                )
            )
        if lines:
            title = f"{varied} varied; released, float32, loss and gradient unless said"
            found.append(Table(title, ("", *columns), lines))
    return found


# --- the step -------------------------------------------------------------------------------------


def step_table(record: dict[str, Any], device: str) -> Table | None:
    """The cost of a harmonized step, a line a network."""
    rows = records.select(record["rows"], device=device, section="step")
    if not rows:
        return None
    header = (
        "",
        "cross entropy, ms",
        "harmonized",
        "rows with a map",
        "memory",
        "memory, rows with a map",
        "fused loss, of the step",
        "eager loss, of the step",
    )
    lines, notes = [], []
    for case in dict.fromkeys(row["case"] for row in rows):
        times = {
            row["implementation"]: row for row in records.select(rows, case=case, quantity="time")
        }
        peaks = {
            row["implementation"]: row["times_plain"]
            for row in records.select(rows, case=case, quantity="peak extra memory")
        }
        noted = next((row["note"] for row in times.values() if "note" in row), None)
        if noted and noted not in notes:
            notes.append(noted)
        mark = f" ({notes.index(noted) + 1})" if noted else ""

        def share(name: str, times: dict[str, Row] = times) -> str:
            return f"{100 * times[name]['share_of_step']:.1f} %"

        plain = times["cross entropy alone"]
        mapped = times["harmonized, rows with a map"]
        lines.append(
            (
                f"{plain['network']}, {plain['batch']}x3x{plain['size']}x{plain['size']}, "
                f"{plain['mapped_rows']} with a map",
                _number(plain["value"]),
                _times(times["harmonized, all rows"]["times_plain"]),
                f"{_times(mapped['times_plain'])}{mark}",
                _times(peaks.get("harmonized, all rows")),
                _times(peaks.get("harmonized, rows with a map")),
                share("loss on maps alone, fused"),
                share("loss on maps alone, eager"),
            )
        )
    note = " ".join(f"({n + 1}) {text}." for n, text in enumerate(notes))
    title = "One training step, float32, against cross entropy alone"
    return Table(title, header, lines, note)


def compiled_step_table(record: dict[str, Any], device: str) -> Table | None:
    rows = [
        row
        for row in records.select(record["rows"], device=device, section="step", quantity="time")
        if row["implementation"].endswith(COMPILE)
    ]
    lines = [
        (row["case"], row["implementation"], _number(row["value"]), _times(row["times_plain"]))
        for row in rows
    ]
    header = ("", "step", "ms", "of cross entropy, eager")
    return Table("Compiled training steps", header, lines) if lines else None


# --- the rest -------------------------------------------------------------------------------------


def package_table(record: dict[str, Any]) -> Table | None:
    rows = records.select(record["rows"], section="import") + records.select(
        record["rows"], section="build"
    )
    lines = [
        (
            row["implementation"],
            f"{_number(row['value'])} {row['unit']}",
            str(row.get("samples", 1)),
        )
        for row in rows
    ]
    return Table("The package", ("", "median", "times"), lines) if lines else None


def goals_table(record: dict[str, Any]) -> Table | None:
    lines = [
        (
            f"{goal['device']}, {goal['of']}: {goal['goal']}",
            f"{_number(goal['value'])} {'' if goal['unit'] == 'ratio' else goal['unit']}".strip(),
            _number(goal["by_lower_quartile"]),
            f"{goal['sense']} {_number(goal['accept'])}",
            f"{goal['sense']} {_number(goal['aim'])}",
            goal["verdict"],
        )
        for goal in record["goals"]
    ]
    header = ("", "measured", "by 25 %", "accepted", "aim", "")
    title = "Goals, set for 32x3x224x224 float32 on two cores and 512x3x224x224 on an H200"
    return Table(title, header, lines) if lines else None


def comparison(changes: Rows, baseline: dict[str, Any]) -> Table:
    """Changes since a baseline, the worst first."""
    lines = [
        (
            f"{row['case']}: {row['implementation']}",
            f"{_number(row['value'])} {row['unit']}",
            f"{_number(row['baseline'])} {row['unit']}",
            f"{row['change']:.2f}x",
            "-" if row["change_against_copy"] is None else f"{row['change_against_copy']:.2f}x",
        )
        for row in changes
    ]
    title = f"Since {records.caption(baseline)}"
    return Table(title, ("", "now", "then", "time", "against the copy"), lines)


def report(record: dict[str, Any]) -> str:
    """Everything in a record, as text."""
    tables: list[Table | None] = []
    for device in _devices(record):
        tables += loss_tables(record, device)
        tables += sweep_tables(record, device)
        tables += [step_table(record, device), compiled_step_table(record, device)]
    tables += [package_table(record), goals_table(record)]
    lines = [records.caption(record)]
    lines += [found.text() for found in tables if found is not None]
    if record["left_out"]:
        lines += ["", "left out"]
        lines += [f"  {entry['what']}: {entry['why']}" for entry in record["left_out"]]
    return "\n".join(lines)


# --- the README -----------------------------------------------------------------------------------


def readme_table(record: dict[str, Any], device: str, case: str) -> Table | None:
    """Milliseconds, ratios and memory of one formulation; of the compiled ones the better."""
    rows = records.select(record["rows"], device=device)
    times = {
        row["implementation"]: row
        for row in records.select(rows, section="loss", case=case, quantity="time")
    }
    if not times:
        return None
    alone = {
        row["implementation"]: row["value"]
        for row in records.select(rows, section="loss", case=f"{case}, loss only", quantity="time")
    }
    memory = {
        row["implementation"]: row["value"]
        for row in records.select(rows, section="memory", case=case)
    }
    compiled = [name for name in times if name.startswith(COMPILE)]
    best = min(compiled, key=lambda name: times[name]["value"], default=None)
    shown = [name for name in times if is_ours(name)]
    shown += [name for name in LABELS if name in times and name.startswith("eager")]
    shown += [best] if best else []
    shown += [name for name in LABELS if name in times and name.startswith("TensorFlow")] + [COPY]
    lines = [
        (
            "the best `torch.compile`" if name == best else label(name),
            f"{times[name]['value']:.2f}",
            f"{times[name]['times_copy']:.2f}",
            "-" if name not in alone else f"{alone[name]:.2f}",
            "-" if name not in memory else f"{memory[name]:.0f}",
        )
        for name in shown
    ]
    first = times[COPY]
    title = (
        f"`formulation={first['formulation']!r}`, {records.shape(first)} {first['dtype']} "
        f"({_counted(record, first)}; {first['megabytes']:.0f} MB)"
    )
    header = (
        "",
        "loss and gradient, ms",
        "times the copy",
        "loss alone, ms",
        "extra memory, MB",
    )
    return Table(title, header, lines)


def readme(record: dict[str, Any], path: Path) -> str:
    """The README's tables in Markdown, with where they come from."""
    parts = []
    for device in _devices(record):
        tables = [readme_table(record, device, case) for case in ("released", "paper")]
        tables += [step_table(record, device), compiled_step_table(record, device)]
        parts += [found.markdown() for found in tables if found is not None]
        parts.append(
            f"{records.caption(record, device)}; medians, interleaved; record "
            f"[{path.name}]({path})."
        )
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("record", type=Path)
    parser.add_argument("--text", action="store_true", help="everything, for a terminal")
    args = parser.parse_args()
    record = records.load(args.record)
    print(report(record) if args.text else readme(record, args.record))


if __name__ == "__main__":
    main()
