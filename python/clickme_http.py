"""HTTP for downloads: what a server sends is watched, so that none can keep a program for ever."""

from __future__ import annotations

import base64
import contextlib
import http.client
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from harmonizer_ext.files.text import shown

#: Seconds without a byte after which a connection counts as broken.
TIMEOUT = 30.0
#: Seconds in which a connection must bring so many bytes; one that drips is as good as broken. The
#: head of an answer must come within them.
WINDOW, LEAST = 60.0, 2**14


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


class Watch:
    """Cuts a connection that brings too little for too long, whatever its library waits for."""

    def __init__(self) -> None:
        self.received = 0
        self._socket: socket.socket | None = None
        self._done = threading.Event()
        self.cut = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def connected(self, sock: socket.socket) -> None:
        """Tells of a new connection, such as that of a redirection."""
        self._socket = sock

    def _run(self) -> None:
        before = 0
        while not self._done.wait(WINDOW):
            if self.received - before < LEAST and self._socket is not None:
                self.cut = True
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
                return
            before = self.received


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to where the connection is no less safe, without reading what comes beside it."""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        scheme = urllib.parse.urlsplit(newurl).scheme.lower()
        own = urllib.parse.urlsplit(req.full_url).scheme.lower()
        if scheme not in ("http", "https") or (own == "https" and scheme != "https"):
            raise ValueError(f"the server sends on from {own} to {shown(newurl)[:200]}")
        fp.read = lambda *_: b""  # urllib would read all of a body that nobody needs
        made = super().redirect_request(req, fp, code, msg, headers, newurl)
        if made is not None:
            made.method = req.get_method()  # of a HEAD, older versions of Python make a GET
        return made


def _opener(watch: Watch) -> urllib.request.OpenerDirector:
    def watched(kind: type) -> Any:
        class Connection(kind):  # type: ignore[misc]
            def connect(self) -> None:
                super().connect()
                watch.connected(self.sock)

        return Connection

    class Http(urllib.request.HTTPHandler):
        def http_open(self, req: Any) -> Any:
            return self.do_open(watched(http.client.HTTPConnection), req)

    class Https(urllib.request.HTTPSHandler):
        def https_open(self, req: Any) -> Any:
            # As urllib's own, with the certificates that it checks by default.
            return self.do_open(watched(http.client.HTTPSConnection), req)

    return urllib.request.build_opener(Http, Https, _Redirects)


@contextlib.contextmanager
def open_remote(
    url: str, start: int = 0, method: Literal["GET", "HEAD"] = "GET"
) -> Iterator[tuple[Remote, Watch]]:
    """Asks for a file from byte ``start`` on. All network access of the program is here.

    Raises:
        ValueError: the answer contradicts itself or the question.
        OSError: of urllib and sockets.
    """
    request = urllib.request.Request(url, method=method, headers={"Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    with Watch() as watch:
        try:
            answer = _opener(watch).open(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            error.close()
            raise
        except (OSError, http.client.HTTPException) as error:
            if watch.cut:
                raise _late() from error
            raise
        with contextlib.closing(answer):
            if watch.cut:  # within its head, whose end that seemed to be
                raise _late()
            yield _remote(answer), watch


def _late() -> TimeoutError:
    return TimeoutError(f"no answer within {WINDOW:.0f} seconds")


def _remote(answer: Any) -> Remote:
    size = _count(answer.headers.get("Content-Length"))
    first = 0
    if answer.status == 206:  # Content-Range: bytes 100-199/200
        text = answer.headers.get("Content-Range", "nothing")
        span, _, total = text.removeprefix("bytes ").partition("/")
        if not span.partition("-")[0].isdecimal():
            raise ValueError(f"asked for a part, got {shown(text)[:100]!r}")
        first = int(span.partition("-")[0][:20])
        size = _count(total) if total.isdecimal() else None
    digests = ",".join(answer.headers.get_all("x-goog-hash", [])).replace(" ", "").split(",")
    named = (digest.partition("=") for digest in digests if digest)
    hashes = {name: base64.b64decode(value) for name, _, value in named}
    return Remote(first, size, hashes, answer)


def _count(text: str | None) -> int | None:
    if text is None:
        return None
    if not text.strip().isdecimal() or len(text) > 20:
        raise ValueError(f"the server announces {shown(text)[:40]!r} bytes")
    return int(text)
