"""Reading a record of ``run.py``: one JSON object of machine, rows, goals and what was left out.

A row says what was measured (section, device, case, implementation, quantity; together unique), the
value with its unit, and for times the quantiles. Needs nothing but Python's own library.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FORMAT = "harmonizer_ext benchmark 1"

Row = dict[str, Any]
Rows = list[Row]
KEY = ("section", "device", "case", "implementation", "quantity")

COPY = "copy_ of the same bytes"
COMPILE = "torch.compile"


class RecordError(ValueError):
    """A file that is no record of ``run.py``, or a row that the record lacks."""


def load(path: Path) -> dict[str, Any]:
    """The record in a file.

    Raises:
        RecordError: the file holds something else.
    """
    record = json.loads(path.read_text())
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise RecordError(
            f"{path}: expected a record of bench/run.py (format {FORMAT!r}); make one with "
            f"python bench/run.py --output {path}"
        )
    return record


def select(rows: Rows, **columns: Any) -> Rows:
    """The rows with these values, in their order."""
    return [
        row for row in rows if all(row.get(column) == value for column, value in columns.items())
    ]


def key(row: Row) -> tuple[str, ...]:
    return tuple(row[column] for column in KEY)


def pixels(row: Row) -> int:
    batch, _, height, width = row["saliency"]
    return int(batch * height * width)


def shape(row: Row) -> str:
    return "x".join(str(length) for length in row["saliency"])


def caption(record: dict[str, Any], device: str | None = None) -> str:
    """Hardware, versions and date in one line."""
    machine = record["machine"]
    devices = [device] if device else list(machine["devices"])
    names = " and ".join(machine["devices"][name]["name"] for name in devices)
    threads = f", {machine['threads']} threads" if "cpu" in devices else ""
    return (
        f"{names}{threads}, PyTorch {machine['versions']['torch']}, {machine['date'][:10]}, "
        f"commit {machine['commit']}"
    )


def compare(rows: Rows, baseline: Rows) -> Rows:
    """Times of both records: value, baseline and their ratio, the worst first.

    Against the copy where both have one in the same case, so that a machine that is busier, or
    another one, does not pass for slower kernels.
    """
    before = {key(row): row for row in baseline if row["quantity"] == "time"}
    found = []
    for row in rows:
        old = before.get(key(row)) if row["quantity"] == "time" else None
        if old is None:
            continue
        change = row["value"] / old["value"]
        against_copy = None
        if "times_copy" in row and "times_copy" in old and row["implementation"] != COPY:
            against_copy = row["times_copy"] / old["times_copy"]
        found.append(
            {column: row[column] for column in KEY}
            | {"unit": row["unit"], "value": row["value"], "baseline": old["value"]}
            | {"change": change, "change_against_copy": against_copy}
        )
    # How the copy itself has changed says how busy the machine is: last.
    return sorted(
        found,
        key=lambda row: (
            row["implementation"] == COPY,
            -(row["change_against_copy"] or row["change"]),
        ),
    )
