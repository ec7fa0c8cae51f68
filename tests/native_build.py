"""Compiles sources of the tests once, side by side, and remembers the objects between sessions."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def fused_multiply_add() -> list[str]:
    """Flags that let the compiler use the processor's fused multiply-add, where it has one."""
    cpuinfo = Path("/proc/cpuinfo")
    x86 = platform.machine() == "x86_64"
    return ["-mfma"] if x86 and " fma " in cpuinfo.read_text() else []


class Objects:
    """A folder of compiled objects and programs, named by what went into them.

    Args:
        folder: made if it is not there; what is older than a week is deleted.
        headers: files that any object may depend on.
        workers: compilers that run at once.
    """

    def __init__(self, folder: Path, headers: Iterable[Path], workers: int = 2) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in folder.iterdir():
            if time.time() - path.stat().st_mtime > 7 * 24 * 3600:
                path.unlink(missing_ok=True)
        self._headers = b"".join(path.read_bytes() for path in sorted(headers))
        self._pool = ThreadPoolExecutor(workers)
        self._pending: dict[tuple[Path, tuple[str, ...]], Future[Path]] = {}

    def start(self, source: Path, command: Sequence[str]) -> Future[Path]:
        """Compiles a source in the background: ``command source -o object``."""
        key = (source, tuple(command))
        if key not in self._pending:
            self._pending[key] = self._pool.submit(self._compile, *key)
        return self._pending[key]

    def link(self, name: str, command: Sequence[str], objects: Iterable[Future[Path]]) -> Path:
        """Links objects: ``command objects -o name``."""
        paths = [str(each.result()) for each in objects]
        return self._make(name, [*command, *paths], repr((command, paths)).encode())

    def _compile(self, source: Path, command: tuple[str, ...]) -> Path:
        version = subprocess.run([command[0], "--version"], capture_output=True).stdout
        content = repr(command).encode() + version + self._headers + source.read_bytes()
        return self._make(f"{source.stem}.o", [*command, str(source)], content)

    def _make(self, name: str, command: Sequence[str], content: bytes) -> Path:
        stem, dot, suffix = name.partition(".")
        digest = hashlib.sha256(content).hexdigest()[:24]
        target = self.folder / f"{stem}-{digest}{dot}{suffix}"
        if target.exists():
            return target
        # Whole or not at all: another process may build the same.
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            made = Path(folder) / target.name
            result = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
            assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr[:4000]}"
            made.replace(target)
        return target
