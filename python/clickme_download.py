"""Downloads files over HTTP: resumed where they broke off, checked, and put in place when whole."""

from __future__ import annotations

import hashlib
import http.client
import os
import ssl
import threading
import urllib.error
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from clickme_http import WINDOW, open_remote

from harmonizer_ext.files.output import open_to_append
from harmonizer_ext.files.reading import open_file
from harmonizer_ext.files.text import shown

try:
    import google_crc32c
except ImportError as error:
    raise ImportError(f"clickme_download.py: {error}; pip install harmonizer-ext[train]") from error

CHUNK = 1 << 18
#: Largest size of a file; those of ClickMe are smaller than a tenth of it.
MAX_BYTES = 2**32
#: Answers that another try may change: timeouts, too many requests, the server's own errors.
PASSING = (408, 429, 500, 502, 503, 504)
#: What urllib and sockets raise for a broken connection; not OSError, which a full disk is too.
BROKEN = (
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
)
#: Seconds before the first retry; each further one in a row waits twice as long as the last.
PAUSE = 0.5


class DownloadError(Exception):
    """A file could not be had; the text says which and why."""


class TooLargeError(Exception):
    """A file is larger than it may be."""


class StoppedError(Exception):
    """Ended from outside; what has arrived is kept."""


def download(
    url: str,
    path: Path,
    *,
    retries: int = 5,
    check: Callable[[Path], Any],
    progress: Callable[[int], Any],
    stop: threading.Event,
    max_bytes: int = MAX_BYTES,
) -> bool:
    """Downloads one file.

    What arrives is collected in ``<path>.part``, from which an interrupted download goes on. When
    the size and every checksum that the server gives are right and ``check`` does not complain, it
    is renamed to ``path``. A file at ``path`` has passed that, so only its size is compared.

    It ends at the size that the server announces, however much it sends; where it announces none,
    or more than ``max_bytes``, at that. A connection that brings nothing for 30 seconds, or next to
    nothing for 60, counts as broken. Links are not followed where files are written.

    Args:
        url: of the file.
        path: where to put it.
        retries: failures in a row, without a new byte in between, before giving up; and how often
            a part may be thrown away.
        check: called with the whole file; raises ValueError for a wrong one.
        progress: called with the number of bytes of each piece that arrives.
        stop: ends the download when set.
        max_bytes: largest size of the file.

    Returns:
        Whether anything was downloaded.

    Raises:
        DownloadError: the server refuses, or retries are used up.
        StoppedError: ``stop`` was set.
    """
    part = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    failures = thrown_away = 0
    while True:
        have = _size(part)
        try:
            with open_remote(url, method="HEAD") as (head, _):
                pass
            if head.size is not None and head.size > max_bytes:
                raise TooLargeError(f"the server announces {head.size} bytes")
            if path.exists() and head.size in (None, _size(path)):
                return False
            if have == 0 or have != head.size:
                _receive(url, part, head.size, max_bytes, progress, stop)
            _check_hashes(part, head.hashes)
            check(part)
            os.replace(part, path)
            return True
        except urllib.error.HTTPError as error:
            if error.code == 416:  # the file has become shorter than what is there of it
                part.unlink(missing_ok=True)
            elif error.code not in PASSING:
                raise DownloadError(f"{shown(url)}: the server answers {shown(error)}") from error
            reason = shown(error)
        except BROKEN as error:
            reason = f"the connection broke: {shown(error)}"
        except TooLargeError as error:
            part.unlink(missing_ok=True)
            raise DownloadError(
                f"{shown(url)}: expected at most {max_bytes} bytes, {error}; --max-bytes allows "
                "more"
            ) from error
        except ValueError as error:
            part.unlink(missing_ok=True)  # nothing of it can be trusted
            reason = shown(error)
        failures = 0 if _size(part) > have else failures + 1
        thrown_away += _size(part) < have
        if failures > retries:
            raise DownloadError(
                f"{shown(url)}: {reason}; given up after {failures} failures in a row"
            )
        if thrown_away > retries:  # each time after new bytes, and without an end
            raise DownloadError(
                f"{shown(url)}: {reason}; given up, what arrived was wrong too often"
            )
        if stop.wait(PAUSE * 2 ** max(failures - 1, 0)):
            raise StoppedError


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _receive(
    url: str,
    part: Path,
    size: int | None,
    max_bytes: int,
    progress: Callable[[int], Any],
    stop: threading.Event,
) -> None:
    """Appends to the part what the server sends, up to the size that it has announced."""
    end = max_bytes + 1 if size is None else size
    with open_remote(url, _size(part)) as (remote, watch):
        if None not in (size, remote.size) and remote.size != size:
            raise ValueError(f"the server announces {size} bytes, and then {remote.size}")
        # A server that knows no ranges sends everything from the start.
        with open_to_append(part, empty=not remote.start) as file:
            have = file.tell()
            if have != remote.start:
                raise ValueError(f"asked for byte {have}, got byte {remote.start}")
            # What is there, not a full chunk; and no more than there should be.
            while have < end and (piece := _piece(remote.body, min(CHUNK, end - have), watch)):
                file.write(piece)
                have += len(piece)
                progress(len(piece))
                if stop.is_set():
                    raise StoppedError
    if have > max_bytes:
        raise TooLargeError("the server announces no size and sends more")
    if size is not None and have < size:
        raise ConnectionError(f"{have} of {size} bytes arrived")
    if size is not None and have > size:
        raise ValueError(f"{have} bytes arrived of a file of {size}")


def _piece(body: Any, most: int, watch: Any) -> bytes:
    try:
        piece = body.read1(most)
    except BROKEN as error:
        if watch.cut:
            raise _dripped() from error
        raise
    watch.received += len(piece)
    if not piece and watch.cut:
        raise _dripped()
    return piece


def _dripped() -> TimeoutError:
    return TimeoutError(f"next to nothing came within {WINDOW:.0f} seconds")


def _check_hashes(path: Path, expected: dict[str, bytes]) -> None:
    found = {"crc32c": google_crc32c.Checksum(), "md5": hashlib.md5(usedforsecurity=False)}
    with open_file(path) as file:
        while piece := file.read(CHUNK):
            for name in found.keys() & expected.keys():
                found[name].update(piece)
    for name in sorted(found.keys() & expected.keys()):
        if found[name].digest() != expected[name]:
            raise ValueError(
                f"what arrived has the {name} {found[name].digest().hex()}, the server says "
                f"{expected[name].hex()}"
            )


def download_all(
    files: Iterable[tuple[str, Path]],
    *,
    threads: int,
    retries: int,
    check: Callable[[Path], Any],
    progress: Callable[[int], Any],
    done: Callable[[Path, bool], Any],
    max_bytes: int = MAX_BYTES,
) -> None:
    """Downloads files, several at a time. The first failure, or Ctrl-C, ends all.

    Args:
        files: URL and path of each.
        threads: how many at a time.
        retries: see ``download``.
        check: see ``download``.
        progress: see ``download``; called from several threads.
        done: called with each path that is there, and whether it was downloaded now.
        max_bytes: see ``download``.

    Raises:
        DownloadError: a file could not be had.
    """
    stop = threading.Event()

    def one(url: str, path: Path) -> None:
        if not stop.is_set():
            new = download(
                url,
                path,
                retries=retries,
                check=check,
                progress=progress,
                stop=stop,
                max_bytes=max_bytes,
            )
            done(path, new)

    with ThreadPoolExecutor(threads) as pool:
        try:
            futures = [pool.submit(one, url, path) for url, path in files]
            finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in finished:
                future.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
