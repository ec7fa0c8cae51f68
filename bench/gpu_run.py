"""How ``gpu_check.py`` runs its programs: each under the keeper, watched, and again after a crash.

A program tells through a pipe what it begins and ends and gives its rows (``records.Journal``).
What it was at when it was killed, fell silent or ran out of time gets that reason as its row, and a
new process goes on without it.
"""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import records

ROOT = Path(__file__).resolve().parent.parent
#: In a command, the place of the pipe.
JOURNAL = "{journal}"
#: Seconds in which the keeper ends what it keeps, unless the kernel does not let it.
GRACE = 20.0
#: Of a program whose GPU answers no longer; see harness.py. It has said so in a row.
CONTEXT_LOST = 70

Event = dict[str, Any]


class Record:
    """The record of all steps, whole on disk at any moment; several threads write to it."""

    def __init__(self, path: Path, **head: Any) -> None:
        self.path = path
        self.content: dict[str, Any] = {**head, "steps": {}}
        self._lock = threading.Lock()
        self._saved = 0.0

    def __getitem__(self, step: str) -> dict[str, Any]:
        empty = {"ended": "not yet", "planned": 0, "done": 0, "tally": {}, "rows": []}
        found: dict[str, Any] = self.content["steps"].setdefault(step, empty)
        return found

    def save(self, **content: Any) -> None:
        with self._lock:
            self.content |= content
            try:
                records.write(self.path, self.content)
            except (
                OSError
            ) as error:  # a full disk: the last one is still whole, and the next may be
                print(f"  {self.path} could not be written: {error}", flush=True)
            self._saved = time.monotonic()

    def hear(self, step: str, event: Event) -> None:
        """Takes up what a process tells: a row at once; a thousand tests are counted in between."""
        of = self[step]
        with self._lock:
            if "row" in event and event["row"] not in of["rows"]:  # a second process says it too
                of["rows"].append(event["row"])
            of["planned"] += len(event.get("plan", ()))
            of["done"] += "end" in event
            if "tally" in event:
                of["tally"][event["tally"]] = of["tally"].get(event["tally"], 0) + 1
        if "failed" in event.get("row", {}):
            print(f"  {json.dumps(event['row'])[:600]}", flush=True)
        if "row" in event or time.monotonic() - self._saved > 0.3:
            self.save()


@dataclass
class Ended:
    """How a process ended: its status, None where it was cut off, and the end of what it said."""

    status: int | None
    output: str
    #: What it had begun and not ended.
    running: str | None = None
    #: Whether it was cut off because nothing was heard of it.
    silent: bool = False

    @property
    def reason(self) -> str:
        if self.status is None:
            return "nothing was heard of it any more" if self.silent else "its time was over"
        number = self.status - 128
        return f"killed by signal {number}" if number > 0 else f"exit status {self.status}"


def _listen(
    keeper: subprocess.Popen[bytes],
    pipe: int,
    hear: Callable[[Event], object],
    deadline: float,
    patience: float,
) -> Ended:
    """Hears what a command tells until it has ended, or has been ended."""
    ended, rest, heard, cut = Ended(None, ""), b"", time.monotonic(), False
    while True:
        over = keeper.poll() is not None
        told = select.select([pipe], [], [], 0 if over else 0.2)[0]
        text = os.read(pipe, 1 << 16) if told else b""
        if text:
            heard = time.monotonic()
        elif over:
            break
        elif told:
            time.sleep(0.05)  # it has closed the pipe and has not ended yet
        *lines, rest = (rest + text).split(b"\n")
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:
                continue  # half a line, of one that was killed
            ended.running = None if "end" in event else event.get("begin", ended.running)
            hear(event)
        now = time.monotonic()
        if not cut and not over and (now > deadline or now - heard > patience):
            cut, ended.silent, deadline = True, now <= deadline, now
            assert keeper.stdin is not None
            keeper.stdin.close()
        if cut and now > deadline + GRACE:
            break
    ended.status = None if cut and keeper.poll() != 0 else keeper.returncode
    return ended


def run(
    command: Sequence[str],
    deadline: float,
    hear: Callable[[Event], object] = lambda event: None,
    patience: float = 1e9,
    environment: Mapping[str, str] | None = None,
) -> Ended:
    """Runs a command until ``deadline``, or until nothing is heard of it for ``patience`` seconds.

    Nothing that it started is left, even if this process is killed meanwhile.
    """
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    command = [part.replace(JOURNAL, f"/dev/fd/{writing}") for part in command]
    paths = (str(ROOT), str(ROOT / "bench"), os.environ.get("PYTHONPATH", ""))
    settings = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONFAULTHANDLER": "1"}
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        keeper = subprocess.Popen(
            [sys.executable, "-S", "-E", str(ROOT / "bench" / "keeper.py"), *command],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **settings, **(environment or {})},
            pass_fds=(writing,),
            start_new_session=True,
        )
        os.close(writing)
        assert keeper.stdin is not None
        with keeper.stdin:  # closed whatever happens, which is what the keeper waits for
            ended = _listen(keeper, reading, hear, deadline, patience)
        os.close(reading)
        output.seek(0)
        ended.output = output.read()[-6000:]
    return ended


def drive(
    step: str,
    command: Sequence[str],
    deadline: float,
    record: Record,
    *,
    patience: float,
    environment: Mapping[str, str] | None = None,
    judge: Callable[[Ended], object] = lambda ended: None,
) -> Ended:
    """Runs a command to its end, in a new process behind whatever ends one.

    ``judge`` is given every process that ended.
    """
    done: set[str] = set()
    given_up: set[str] = set()

    def hear(event: Event) -> None:
        done.update([event["end"]] if "end" in event else [])
        if not (given_up and "plan" in event):  # the first process has planned for all
            record.hear(step, event)

    with tempfile.TemporaryDirectory() as folder:
        skip = Path(folder) / "skip.json"
        while True:
            skip.write_text(json.dumps(sorted(done | given_up)))
            again = ["--skip", str(skip)] if given_up else []
            ended = run([*command, *again], deadline, hear, patience, environment)
            judge(ended)
            if ended.status in (0, 1):
                return ended
            name = ended.running
            if ended.status != CONTEXT_LOST:
                last = re.sub(r"\s*\n\s*", " | ", ended.output.strip()[-1500:])
                row = {"case": name or "the process", "failed": f"{ended.reason}; last: {last}"}
                record.hear(step, {"row": row})
            if name is None or name in given_up or time.monotonic() > deadline - 5:
                return ended
            given_up.add(name)
