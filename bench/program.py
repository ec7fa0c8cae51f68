"""The parts that the programs for a GPU share: flags, and work of which each part is on its own."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import harness  # first of all: it sets what torch reads when it is loaded
import records


def arguments(
    description: str | None, seconds: float = 1.0, rounds: int = 15
) -> argparse.ArgumentParser:
    """A parser with the flags that the programs for a GPU share."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    add = parser.add_argument
    add("--device", default="cuda")
    add("--seconds", type=float, default=seconds, help="of measuring, for each case")
    add("--rounds", type=int, default=rounds, help="of each case, at least")
    add("--budget", type=float, default=240.0, help="seconds after which to begin nothing more")
    add("--skip", type=Path, help="file with a JSON list of names to leave out")
    add("--output", type=Path, help="the record; default: a new file in runs/bench")
    return parser


def work_through(
    work: Mapping[str, Callable[[records.Journal], object]],
    args: argparse.Namespace,
    show: Callable[[list[dict[str, Any]]], object] | None = None,
    **head: Any,
) -> int:
    """Does one thing after the other, each on its own, until the budget is spent.

    Args:
        work: by name; each adds its rows to the journal.
        args: of ``arguments``.
        show: is given the rows of each.
        head: what the record says beside its rows.

    Returns:
        The exit status: 1 where something failed, which a row says.
    """
    start = time.monotonic()
    journal = records.Journal(
        args.output or harness.default_output([args.device]),
        json.loads(args.skip.read_text()) if args.skip else (),
        command=sys.argv,
        machine=harness.machine(args.device),
        **head,
    )
    journal.plan(work)
    for name, do in work.items():
        first = len(journal.rows)
        if time.monotonic() - start > args.budget:
            journal.row(case=name, left_out=f"the budget of {args.budget:g} s was spent")
        elif journal.begin(name):
            harness.say(f"{name}  ({time.monotonic() - start:.0f} s)")
            harness.attempt(
                lambda do=do: do(journal), lambda why, name=name: journal.row(case=name, failed=why)
            )
        journal.end(name)
        if show is not None:
            show(journal.rows[first:])
    return 1 if any("failed" in row for row in journal.rows) else 0
