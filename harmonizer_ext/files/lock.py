"""A lock that names who holds it, so that two programs never write to one place."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import secrets
import socket
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .text import shown

__all__ = ["LOCK", "LockedError", "locked"]

#: Name of the lock of a folder.
LOCK = ".harmonizer.lock"

#: Seconds between two signs of life of the holder, and without one after which a holder on another
#: machine counts as dead.
BEAT, DEAD = 15.0, 120.0

#: File locks that processes forked from this one close, so that they end with this one.
_held: set[int] = set()


class LockedError(OSError):
    """Another process has the place for itself; the text names it and its host."""


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], argument: str = "output") -> Iterator[None]:
    """Holds the file ``path`` as a lock while the block runs.

    The lock of a process that has ended, however it did, is taken over: at once where it ran on
    this machine, whose system knows. Of a process on another machine the signs of life tell: it
    touches the file every 15 seconds, and counts as dead after 120 seconds without, by the clock of
    the storage.

    Args:
        path: of the lock, in the place that it is for.
        argument: name of the argument that chose the place, for the text of the error.

    Raises:
        LockedError: another process holds it; the text names process and host.
        OSError: the file cannot be made, or is a link.
    """
    path = Path(path)
    descriptor = _open(path, argument)
    _held.add(descriptor)
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(descriptor, stop), daemon=True)
    beat.start()
    try:
        yield
    finally:
        stop.set()
        beat.join()
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                os.unlink(path)
        _held.discard(descriptor)
        os.close(descriptor)


def _open(path: Path, argument: str) -> int:
    """A descriptor of the file, with this process as its holder."""
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            descriptor = os.open(path, flags, 0o666)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise OSError(
                f"{argument}: expected a place to write to, got the link {shown(path)} where its "
                f"lock belongs; remove it"
            ) from error
        with contextlib.ExitStack() as unless_held:
            unless_held.callback(os.close, descriptor)
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                raise OSError(
                    f"{argument}: expected a lock at {shown(path)}, got a file of another kind or "
                    f"with a second name; remove it"
                )
            reaches = _flock(descriptor, path, argument)
            if not _same(path, descriptor):
                continue  # its last holder has removed it in between
            _check_holder(descriptor, path, argument, reaches)
            unless_held.pop_all()
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(_holder()) + "\n").encode(), 0)
        return descriptor


def _same(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _flock(descriptor: int, path: Path, argument: str) -> bool:
    """Whether the storage has file locks, of which this process has this one now."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _refusal(_read(descriptor), path, argument) from error
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL):
            raise
        return False
    return True


def _check_holder(descriptor: int, path: Path, argument: str, reaches: bool) -> None:
    """Refuses where who wrote the file may still be alive, though its file lock is not seen."""
    holder, own = _read(descriptor), _holder()
    if not holder:
        return
    if holder.get("machine") == own["machine"]:
        # The file lock has decided, or else the process's number and its time of birth.
        dead = reaches or _birth(holder.get("process")) != holder.get("born")
    else:
        dead = _now(path.parent) - os.fstat(descriptor).st_mtime > DEAD
    if not dead:
        raise _refusal(holder, path, argument)


def _now(folder: Path) -> float:
    """The time by the clock of the storage, which need not be that of this machine."""
    path = folder / f".clock.{secrets.token_hex(8)}"
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        return os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)
        os.unlink(path)


def _refusal(holder: dict[str, Any], path: Path, argument: str) -> LockedError:
    who = "another process"
    if holder:
        who = f"process {shown(holder.get('process'))} on host {shown(holder.get('host'))}"
        who += f" since {shown(holder.get('since'))} ({shown(holder.get('program'))})"
    return LockedError(
        f"{argument}: expected a place that no other program writes to, {shown(path.parent)} is in "
        f"use by {who}; wait for it or stop it, or name another place. If that host is gone for "
        f"good, remove {shown(path)}, or wait {DEAD:.0f} seconds"
    )


def _holder() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "program": Path(sys.argv[0]).name if sys.argv else "",
        "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": _machine(),
        "born": _birth(os.getpid()),
    }


def _machine() -> str:
    """The identity of the running system: another one after it has started anew."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.is_file() else socket.gethostname()


def _birth(process: Any) -> str | None:
    """The start of a process of this machine; None if there is none of this number."""
    try:
        return Path(f"/proc/{int(process)}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, ValueError, TypeError, IndexError):
        return None


def _read(descriptor: int) -> dict[str, Any]:
    try:
        content = json.loads(os.pread(descriptor, 4096, 0))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _beat(descriptor: int, stop: threading.Event) -> None:
    while not stop.wait(BEAT):
        # Storage that is out of reach for a while is no reason to end a run.
        with contextlib.suppress(OSError):
            os.utime(descriptor)


def _let_go() -> None:
    """Lets go in a forked process: a lock lasts as long as any process has the file open."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
