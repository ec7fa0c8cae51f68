"""Runs a command for ``gpu_run.py`` and leaves nothing of it behind.

    python bench/keeper.py COMMAND...

The command is over when it ends, or when standard input is closed: by whoever started this, or
because that process is dead. Then everything that descends from the command is killed, in whatever
session it hid, and the exit status is the command's, or 128 and the number of a signal.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36
#: Seconds for a program that is told to abort to print where each thread is.
_LAST_WORDS = 3.0
#: Seconds in which a killed process ends, unless the kernel does not let it.
_PATIENCE = 5.0


def _control(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _descendants() -> list[int]:
    """Processes whose parents lead to this one: orphans of the command are given to it."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # Behind the name, which may hold anything, come the state and the parent.
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue  # it has ended since
    found, last = {os.getpid()}, 0
    while last != len(found):
        last = len(found)
        found |= {process for process, parent in parents.items() if parent in found}
    return sorted(found - {os.getpid()})


def _kill_all() -> None:
    """Kills until none is left, or only those that wait for a driver that does not answer."""
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        for process in _descendants():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.01)
        except ChildProcessError:
            return


def main() -> int:
    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(kind, signal.SIG_IGN)
    _control(_SET_CHILD_SUBREAPER, 1)
    command = subprocess.Popen(
        sys.argv[1:],
        stdin=subprocess.DEVNULL,
        close_fds=False,  # the pipe that it writes its rows to
        preexec_fn=lambda: _control(_SET_PDEATHSIG, signal.SIGKILL),
    )
    while command.poll() is None and not select.select([0], [], [], 0.1)[0]:
        pass
    if command.poll() is None:
        command.send_signal(signal.SIGABRT)
        try:
            command.wait(_LAST_WORDS)
        except subprocess.TimeoutExpired:
            command.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                command.wait(_PATIENCE)
    _kill_all()
    if command.returncode is None:
        return 128 + signal.SIGKILL
    return command.returncode if command.returncode >= 0 else 128 - command.returncode


if __name__ == "__main__":
    sys.exit(main())
