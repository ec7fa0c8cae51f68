"""Nothing waits for a device or mixes two: shown without one, in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).parent / "device_worker.py"


def test_a_step_neither_waits_nor_mixes_devices() -> None:
    # The device that PyTorch keeps for out-of-tree backends can be named once in a process.
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    result = subprocess.run([*command, str(WORKER)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-4_000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    # No case may be lost in silence.
    assert passed is not None
    assert int(passed[1]) >= 60, result.stdout
    assert "skipped" not in result.stdout
