"""Processes with little memory: what a header asks for cannot be had in them."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
#: Bytes that may be taken beyond what the imports have taken.
ROOM = 2**30


def limit(room: int = ROOM) -> None:
    """Gives this process so many bytes more from here on, and no core files."""
    with open("/proc/self/status") as file:
        lines = (line.split() for line in file)
        taken = next(int(line[1]) for line in lines if line[0] == "VmData:") * 1024
    # Not the address space, of which PyTorch's libraries alone map gigabytes.
    resource.setrlimit(resource.RLIMIT_DATA, (taken + room, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def run(script: str, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """A script of the tests in a process of its own."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent / "python"), str(TESTS.parent)])
    return subprocess.run(
        [sys.executable, str(TESTS / script), *arguments],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
