"""The lock of a place that is written to: who has it, when it ends, and what is none."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harmonizer_ext.files import lock

HOLD = """
import os, sys, time
from pathlib import Path
from harmonizer_ext.files.lock import LOCK, locked

with locked(Path(sys.argv[1]) / LOCK):
    if "fork" in sys.argv[2:]:
        reading, writing = os.pipe()
        if os.fork() == 0:
            os.write(writing, b".")  # it is forked, with all that is done then
            time.sleep(60)
            os._exit(0)
        os.read(reading, 1)
    print(os.getpid(), flush=True)
    time.sleep(60)
"""


@pytest.fixture
def hold() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts processes that hold the lock of a folder."""
    processes: list[subprocess.Popen[str]] = []

    def start(folder: Path, *options: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder), *options],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        assert process.stdout is not None
        assert int(process.stdout.readline()) == process.pid
        return process

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_second_program_is_told_who_has_the_place(tmp_path: Path, hold: Any) -> None:
    process = hold(tmp_path)
    who = rf"in use by process {process.pid} on host {socket.gethostname()} since 20"
    with (
        pytest.raises(lock.LockedError, match=f"output: .*{who}"),
        lock.locked(tmp_path / lock.LOCK),
    ):
        pass
    assert (tmp_path / lock.LOCK).exists()


@pytest.mark.parametrize("options", [(), ("fork",)])
def test_the_lock_of_a_killed_program_is_taken_over_at_once(
    tmp_path: Path, hold: Any, options: tuple[str, ...]
) -> None:
    """A process that it had forked may live on, as workers of a DataLoader do for a while."""
    process = hold(tmp_path, *options)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with lock.locked(tmp_path / lock.LOCK):
        holder = json.loads((tmp_path / lock.LOCK).read_text())
        assert holder["process"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_one_process_has_it_once(tmp_path: Path) -> None:
    with lock.locked(tmp_path / lock.LOCK), lock.locked(tmp_path / "other.lock"):
        again = lock.locked(tmp_path / lock.LOCK)
        with pytest.raises(lock.LockedError, match=f"process {os.getpid()} on host"), again:
            pass
    with lock.locked(tmp_path / lock.LOCK):
        pass


def written(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps(lock._holder() | changes))
    return path


ELSEWHERE = {"machine": "another boot", "host": "elsewhere", "process": 4711}


def test_a_program_on_another_host(tmp_path: Path) -> None:
    """Its file locks are not seen here; it lives as long as it touches its lock."""
    path = written(tmp_path / lock.LOCK, **ELSEWHERE)
    with pytest.raises(lock.LockedError, match="process 4711 on host elsewhere"), lock.locked(path):
        pass
    assert json.loads(path.read_text())["host"] == "elsewhere"
    long_ago = time.time() - lock.DEAD - 1
    os.utime(path, (long_ago, long_ago))
    with lock.locked(path):
        assert json.loads(path.read_text())["host"] == socket.gethostname()


def test_the_holder_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.02)
    path = tmp_path / lock.LOCK
    with lock.locked(path):
        os.utime(path, (1, 1))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.time() - path.stat().st_mtime < 60


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_storage_without_file_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The number of the process and its time of birth tell there."""

    def none(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    path = written(tmp_path / lock.LOCK)
    with pytest.raises(lock.LockedError, match=f"process {os.getpid()}"), lock.locked(path):
        pass
    for changes in ({"born": "1"}, {"process": 2**22 + 1}, {"process": None}, {"born": None}):
        with lock.locked(written(path, **changes)):
            pass


@pytest.mark.parametrize("content", ["", "no JSON", "[]", "[" * 5000, '{"machine": 3}'])
def test_a_lock_of_other_content(tmp_path: Path, content: str) -> None:
    """A lock of nobody's, or one that a full disk has left."""
    path = tmp_path / lock.LOCK
    path.write_text(content)
    os.utime(path, (1, 1))
    with lock.locked(path):
        assert json.loads(path.read_text())["process"] == os.getpid()


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe"])
def test_a_lock_that_is_another_file(tmp_path: Path, kind: str) -> None:
    path, victim = tmp_path / lock.LOCK, tmp_path / "victim"
    victim.write_text("precious")
    {"link": path.symlink_to, "hard link": path.hardlink_to}.get(kind, lambda _: os.mkfifo(path))(
        victim
    )
    with pytest.raises(OSError, match="remove it"), lock.locked(path):
        pass
    assert victim.read_text() == "precious"


def test_threads_do_not_disturb_each_other(tmp_path: Path) -> None:
    """One waits for the lock of a folder while another lets go of it."""
    seen: list[str] = []

    def work(name: str) -> None:
        for _ in range(30):
            try:
                with lock.locked(tmp_path / lock.LOCK):
                    seen.append(name)
                    assert not (tmp_path / "busy").exists()
                    (tmp_path / "busy").touch()
                    (tmp_path / "busy").unlink()
            except lock.LockedError:
                continue

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen
    assert not list(tmp_path.iterdir())
