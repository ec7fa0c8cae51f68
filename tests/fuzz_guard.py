"""The guard of the fuzzed readers: limits on their process, and what they must not do there."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import site
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class Watch:
    """Notes what a reader does besides reading, by the events of Python's audit."""

    NEVER = (
        *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty"),
        *("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"),
        "pickle.find_class",
    )
    CHANGES = (
        *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate"),
        *("os.chmod", "os.utime", "shutil.rmtree", "shutil.copyfile"),
    )

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.on = False
        self.may_read_outside = False
        self.found: list[str] = []
        places = (sys.prefix, sys.base_prefix, ROOT, *site.getsitepackages())
        self.code = tuple(str(Path(place).resolve()) for place in places)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in self.NEVER:
            self.found.append(f"{event}{arguments!r:.150}")
        elif event == "open":
            path, _, flags = arguments
            if isinstance(path, str | bytes) and not self._inside(path):
                self._outside(os.fsdecode(path), flags)
        elif event in self.CHANGES:
            for path in arguments[:2]:
                if isinstance(path, str | bytes | os.PathLike) and not self._inside(path):
                    self.found.append(f"{event}: {path!r}")

    def _inside(self, path: Any) -> bool:
        return os.path.abspath(os.fsdecode(path)).startswith(self.folder + os.sep)

    def _outside(self, path: str, flags: int) -> None:
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        imported = os.path.abspath(path).startswith(self.code)
        if writes or not (imported or self.may_read_outside):
            self.found.append(f"open: {path!r}")


watch: Watch | None = None


def watch_process(folder: Path) -> Watch:
    """Puts a watch, which is not yet on, over everything that this process does."""
    global watch
    watch = Watch(folder)
    sys.addaudithook(watch)
    return watch


@contextlib.contextmanager
def outside_is_read() -> Any:
    """Allows paths that whoever made a table wrote into it."""
    if watch is not None:
        watch.may_read_outside = True
    try:
        yield
    finally:
        if watch is not None:
            watch.may_read_outside = False


def is_ours(error: BaseException) -> bool:
    """Whether an error was raised by this project, for the user."""
    if getattr(error, "told", False):
        return True
    if not isinstance(error, ValueError | TypeError | OSError):
        return False
    place = traceback.extract_tb(error.__traceback__)[-1].filename
    return place.startswith((str(ROOT / "harmonizer_ext"), str(ROOT / "python")))


def refused(message: str) -> ValueError:
    """The end of a program that has said why."""
    assert ": error: " in message, message
    assert message.strip().isprintable() or message.count("\n") < 99, message
    error = ValueError(message)
    error.told = True  # type: ignore[attr-defined]
    return error


def prepare() -> None:
    """Prepares a process once: imports what the readers import, and limits its memory."""
    import limited
    import timm_networks

    timm_networks.import_timm()
    import PIL.Image

    PIL.Image.init()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    limited.limit()
