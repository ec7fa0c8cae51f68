"""Downloads files over HTTP: resumed where they broke off, checked, and put in place when whole."""

from __future__ import annotations

import base64
import hashlib
import http.client
import os
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

try:
    import google_crc32c
except ImportError as error:
    raise ImportError(f"clickme_download.py: {error}; pip install harmonizer-ext[train]") from error

CHUNK = 1 << 18
#: Seconds without a byte after which a connection counts as broken.
TIMEOUT = 30.0
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


class StoppedError(Exception):
    """Ended from outside; what has arrived is kept."""


@dataclass
class Remote:
    """An answer of the server.

    Attributes:
        start: position in the file of the body's first byte.
        size: of the whole file, None where the server does not say.
        hashes: digests by algorithm, from the ``x-goog-hash`` of Google Cloud Storage.
        body: has ``read1(n)`` and ``close()``.
    """

    start: int
    size: int | None
    hashes: dict[str, bytes]
    body: Any


def open_remote(url: str, start: int = 0, method: Literal["GET", "HEAD"] = "GET") -> Remote:
    """Asks for a file from byte ``start`` on. All network access of the program is here."""
    request = urllib.request.Request(url, method=method, headers={"Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    length = answer.headers.get("Content-Length")
    size = None if length is None else int(length)
    first = 0
    if answer.status == 206:  # Content-Range: bytes 100-199/200
        text = answer.headers.get("Content-Range", "nothing")
        span, _, total = text.removeprefix("bytes ").partition("/")
        if not span.partition("-")[0].isdigit():
            answer.close()
            raise ValueError(f"asked for the bytes from {start} on, got {text!r}")
        first = int(span.partition("-")[0])
        size = int(total) if total.isdigit() else None
    digests = ",".join(answer.headers.get_all("x-goog-hash", [])).replace(" ", "").split(",")
    named = (digest.partition("=") for digest in digests if digest)
    hashes = {name: base64.b64decode(value) for name, _, value in named}
    return Remote(first, size, hashes, answer)


def download(
    url: str,
    path: Path,
    *,
    retries: int = 5,
    check: Callable[[Path], Any],
    progress: Callable[[int], Any],
    stop: threading.Event,
) -> bool:
    """Downloads one file.

    What arrives is collected in ``<path>.part``, from which an interrupted download goes on. When
    the size and every checksum that the server gives are right and ``check`` does not complain, it
    is renamed to ``path``. A file at ``path`` has passed that, so only its size is compared.

    Args:
        url: of the file.
        path: where to put it.
        retries: failures in a row, without a new byte in between, before giving up; and how often
            a part may be thrown away.
        check: called with the whole file; raises ValueError for a wrong one.
        progress: called with the number of bytes of each piece that arrives.
        stop: ends the download when set.

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
            head = open_remote(url, method="HEAD")
            head.body.close()
            if path.exists() and head.size in (None, _size(path)):
                return False
            if have == 0 or have != head.size:
                _receive(url, part, head.size, progress, stop)
            _check_hashes(part, head.hashes)
            check(part)
            os.replace(part, path)
            return True
        except urllib.error.HTTPError as error:
            if error.code == 416:  # the file has become shorter than what is there of it
                part.unlink(missing_ok=True)
            elif error.code not in PASSING:
                raise DownloadError(f"{url}: the server answers {error}") from error
            reason = str(error)
        except BROKEN as error:
            reason = f"the connection broke: {error}"
        except ValueError as error:
            part.unlink(missing_ok=True)  # nothing of it can be trusted
            reason = str(error)
        failures = 0 if _size(part) > have else failures + 1
        thrown_away += _size(part) < have
        if failures > retries:
            raise DownloadError(f"{url}: {reason}; given up after {failures} failures in a row")
        if thrown_away > retries:  # each time after new bytes, and without an end
            raise DownloadError(f"{url}: {reason}; given up, what arrived was wrong too often")
        if stop.wait(PAUSE * 2 ** max(failures - 1, 0)):
            raise StoppedError


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _receive(
    url: str,
    part: Path,
    size: int | None,
    progress: Callable[[int], Any],
    stop: threading.Event,
) -> None:
    remote = open_remote(url, _size(part))
    try:
        # A server that knows no ranges sends everything from the start.
        with open(part, "ab" if remote.start else "wb") as file:
            if file.tell() != remote.start:
                raise ValueError(f"asked for byte {file.tell()}, got byte {remote.start}")
            while piece := remote.body.read1(CHUNK):  # what is there, not a full chunk
                file.write(piece)
                progress(len(piece))
                if stop.is_set():
                    raise StoppedError
    finally:
        remote.body.close()
    if size is not None and _size(part) < size:
        raise ConnectionError(f"{_size(part)} of {size} bytes arrived")
    if size is not None and _size(part) > size:
        raise ValueError(f"{_size(part)} bytes arrived of a file of {size}")


def _check_hashes(path: Path, expected: dict[str, bytes]) -> None:
    found = {"crc32c": google_crc32c.Checksum(), "md5": hashlib.md5(usedforsecurity=False)}
    with open(path, "rb") as file:
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
) -> None:
    """Downloads files, several at a time. The first failure, or Ctrl-C, ends all.

    Args:
        files: URL and path of each.
        threads: how many at a time.
        retries: see ``download``.
        check: see ``download``.
        progress: see ``download``; called from several threads.
        done: called with each path that is there, and whether it was downloaded now.

    Raises:
        DownloadError: a file could not be had.
    """
    stop = threading.Event()

    def one(url: str, path: Path) -> None:
        if not stop.is_set():
            new = download(url, path, retries=retries, check=check, progress=progress, stop=stop)
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
