"""Records: one JSON object of machine, rows, goals and what was left out, written and read.

A row says what was measured (section, device, case, implementation, quantity; together unique), the
value with its unit, and for times the quantiles. Needs nothing but Python's own library.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Mapping
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


# --- writing --------------------------------------------------------------------------------------

#: The process runs on tests/gpu_on_host.py, or starts such processes.
STAND_IN = os.environ.get("HARMONIZER_STAND_IN") == "1"
STAND_IN_NOTE = (
    "no GPU: tests/gpu_on_host.py stood in for one on a CPU. It shows that the programs run; its "
    "times mean nothing, so that no figure is kept here, and nothing with a fraction"
)


def without_figures(value: Any) -> Any:
    """The same without any number that is not whole."""
    if isinstance(value, Mapping):
        kept = {key: without_figures(v) for key, v in value.items()}
        return {key: v for key, v in kept.items() if not isinstance(v, float)}
    if isinstance(value, list | tuple):
        return [without_figures(v) for v in value if not isinstance(v, float)]
    return value


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Puts a whole record in the place of what was there: whoever reads finds one or the other.

    Raises:
        ValueError: it is a record of the stand-in, and the folder is that of the measured ones.
    """
    if STAND_IN:
        results = Path(__file__).resolve().parent / "results"
        if results in path.resolve().parents:
            raise ValueError(f"{path}: expected another folder for a record of the stand-in")
        record = {"stand_in": STAND_IN_NOTE, **without_figures(record)}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    unfinished.replace(path)


class Journal:
    """A record into which a program puts each row as soon as it is measured.

    Args:
        path: the record, which is whole after every row; or a pipe (``/dev/fd/N``), into which goes
            one line of JSON for everything that happens: ``gpu_check.py`` listens; or None.
        skip: names of what is not to be begun, because it was done or ended the process before.
        head: what the record says beside its rows.
    """

    def __init__(self, path: Path | None, skip: Iterable[str] = (), **head: Any) -> None:
        self.path = path
        self.skip = frozenset(skip)
        self.record: dict[str, Any] = {**head, "rows": []}
        pipe = path is not None and path.exists() and stat.S_ISFIFO(path.stat().st_mode)
        self._pipe = path.open("w") if path is not None and pipe else None

    @property
    def rows(self) -> Rows:
        return self.record["rows"]  # type: ignore[no-any-return]

    def _tell(self, **event: Any) -> None:
        if self._pipe is not None:
            self._pipe.write(json.dumps(event) + "\n")
            self._pipe.flush()

    def plan(self, names: Iterable[str]) -> None:
        """Tells what will be done, if nothing comes in between."""
        self._tell(plan=list(names))

    def begin(self, name: str) -> bool:
        """Whether to do it. If the process ends in it, the next one leaves it out."""
        if name not in self.skip:
            self._tell(begin=name)
        return name not in self.skip

    def end(self, name: str) -> None:
        """It is done and need not be done again."""
        self._tell(end=name)

    def tally(self, outcome: str) -> None:
        """One more of these."""
        self._tell(tally=outcome)

    def row(self, **row: Any) -> None:
        self.rows.append(row)
        self._tell(row=row)
        if self._pipe is None and self.path is not None:
            write(self.path, self.record)


# --- reading --------------------------------------------------------------------------------------


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
