"""Downloads from servers that lie about sizes, never end, drip, or send on to elsewhere."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from clickme_shards import framed, record

pytest.importorskip("google_crc32c", reason="google-crc32c (extra: train) checks the downloads")
pytest.importorskip("webdataset", reason="webdataset (extra: train) writes the tar shards")
pytest.importorskip("tqdm", reason="tqdm (extra: train) shows the progress")

import clickme_download
import prepare_clickme

SHARD = framed(record(0))
SIZE = len(SHARD)
Answer = Callable[[socket.socket], None]


def text(*lines: str) -> bytes:
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode()


def head(size: object = SIZE) -> bytes:
    return text("HTTP/1.1 200 OK", f"Content-Length: {size}", "Connection: close")


def without_size() -> bytes:
    return text("HTTP/1.1 200 OK", "Connection: close")


class Server:
    """Answers HEAD and GET by what a test gives it: bytes, or a function of the connection."""

    def __init__(self) -> None:
        self.answers: dict[str, bytes | Answer] = {}
        self.sent = 0
        self.requests: list[str] = []
        self.stopped = threading.Event()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._listening.settimeout(0.05)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listening.getsockname()[1]}"

    def _serve(self) -> None:
        while not self.stopped.is_set():
            with contextlib.suppress(TimeoutError):
                connection, _ = self._listening.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            connection.settimeout(10)
            request = b""
            while b"\r\n\r\n" not in request:
                request += connection.recv(4096)
            method, path, _ = request.decode().split(" ", 2)
            self.requests.append(f"{method} {path}")
            answer = self.answers.get(f"{method} {path}", self.answers.get(method, b""))
            if callable(answer):
                answer(connection)
            else:
                connection.sendall(answer)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass

    def endless(self, start: bytes, piece: bytes, pause: float = 0) -> Answer:
        """A beginning, and then the same for ever."""

        def send(connection: socket.socket) -> None:
            connection.sendall(start)
            while not self.stopped.is_set():
                connection.sendall(piece)
                self.sent += len(piece)
                time.sleep(pause)

        return send

    def close(self) -> None:
        self.stopped.set()
        self._thread.join()
        self._listening.close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(clickme_download, "PAUSE", 0.01)
    monkeypatch.setitem(prepare_clickme.SHARDS, "val", 1)
    server = Server()
    server.answers["HEAD"] = head()
    yield server
    server.close()


def download(server: Server, output: Path, *more: str) -> int:
    line = ["download", "--url", server.url, "--output", str(output), "--split", "val"]
    return prepare_clickme.main([*line, "--retries", "1", *more])


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


CHUNKED = text("HTTP/1.1 200 OK", "Transfer-Encoding: chunked", "Connection: close")


# ---------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("way", ["close", "chunked"])
def test_a_download_ends_at_the_size_that_was_announced(
    server: Server, tmp_path: Path, way: str
) -> None:
    """The bytes behind it are not even read."""
    start = without_size() + SHARD if way == "close" else CHUNKED + chunk(SHARD)
    piece = bytes(2**16) if way == "close" else chunk(bytes(2**16))
    server.answers["GET"] = server.endless(start, piece)
    assert download(server, tmp_path) == 0
    assert files(tmp_path) == {"val-0.tfrecords": SIZE}
    assert (tmp_path / "val/val-0.tfrecords").read_bytes() == SHARD


@pytest.mark.parametrize("way", ["close", "chunked"])
def test_a_body_without_an_end_is_no_shard(
    server: Server, tmp_path: Path, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    start, piece = (
        (without_size(), bytes(2**16)) if way == "close" else (CHUNKED, chunk(bytes(999)))
    )
    server.answers["GET"] = server.endless(start, piece)
    assert download(server, tmp_path) == 1
    assert "does not match its checksum" in capsys.readouterr().err
    assert files(tmp_path) == {}
    assert server.sent < 10**8


@pytest.mark.parametrize("way", ["close", "chunked"])
def test_unknown_sizes_are_capped(
    server: Server, tmp_path: Path, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers["HEAD"] = without_size()
    start, piece = (
        (without_size(), bytes(2**16)) if way == "close" else (CHUNKED, chunk(bytes(999)))
    )
    server.answers["GET"] = server.endless(start, piece)
    assert download(server, tmp_path, "--max-bytes", "1000000") == 1
    told = capsys.readouterr().err
    assert "expected at most 1000000 bytes, the server announces no size and sends more" in told
    assert files(tmp_path) == {}
    # What fits is had, though nobody said how long it is.
    server.answers["GET"] = without_size() + SHARD
    assert download(server, tmp_path, "--max-bytes", str(SIZE)) == 0
    assert files(tmp_path) == {"val-0.tfrecords": SIZE}


def test_announced_sizes_are_capped_too(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers["HEAD"] = head(10**15)
    assert download(server, tmp_path) == 1
    told = capsys.readouterr().err
    assert (
        f"at most {clickme_download.MAX_BYTES} bytes, the server announces {10**15} bytes" in told
    )
    assert "--max-bytes allows more" in told
    assert server.requests == ["HEAD /val/val-0.tfrecords"]


@pytest.mark.parametrize("size", [SIZE - 1, SIZE + 1, 10**12, 0])
def test_two_sizes_for_one_file(
    server: Server, tmp_path: Path, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers["GET"] = head(size) + SHARD
    assert download(server, tmp_path) == 1
    assert f"the server announces {SIZE} bytes, and then {size}" in capsys.readouterr().err
    assert files(tmp_path) == {}


@pytest.mark.parametrize("size", ["-5", "abc", "1e9", "9" * 30, "\u0661", "5, 6"])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_sizes_that_are_none(
    server: Server, tmp_path: Path, size: str, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers["GET"] = head() + SHARD
    server.answers[method] = head(size) + SHARD * (method == "GET")
    assert download(server, tmp_path) == 1
    assert "the server announces" in capsys.readouterr().err
    assert files(tmp_path) == {}


# ---------------------------------------------------------------------------- time


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tenths of a second stand for a minute."""
    import clickme_http

    monkeypatch.setattr(clickme_http, "WINDOW", 0.3)
    monkeypatch.setattr(clickme_http, "LEAST", 1000)


DRIPS = {
    "body": (head(), b"x"),
    "chunks": (CHUNKED, chunk(b"x")),
    "the size of a chunk": (CHUNKED, b"0"),
    "head": (b"HTTP/1.1 200 OK\r\n", b"X"),
    "status": (b"HTTP/1.1 ", b"2"),
    "continue": (b"", text("HTTP/1.1 100 Continue")),
    "trailer": (CHUNKED + chunk(SHARD[:100]) + b"0\r\n", b"X: y\r\n"),
}


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize("what", DRIPS)
def test_a_connection_that_drips_is_broken(
    server: Server,
    tmp_path: Path,
    hurry: None,
    what: str,
    method: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The connection is broken though there is never a second without a byte."""
    if method == "HEAD" and what in ("body", "chunks", "the size of a chunk", "trailer"):
        pytest.skip("an answer to HEAD has no body")
    server.answers[method] = server.endless(*DRIPS[what], 0.01)
    start = time.monotonic()
    assert download(server, tmp_path) == 1
    assert time.monotonic() - start < 20
    told = capsys.readouterr().err
    assert "the connection broke" in told
    if what != "trailer":
        assert "within" in told


def test_a_slow_connection_is_none_that_drips(server: Server, tmp_path: Path, hurry: None) -> None:
    """Two windows long, and above what is the least."""

    def slow(connection: socket.socket) -> None:
        connection.sendall(head())
        for at in range(0, SIZE, SIZE // 12 + 1):
            connection.sendall(SHARD[at : at + SIZE // 12 + 1])
            time.sleep(0.06)

    server.answers["GET"] = slow
    assert download(server, tmp_path) == 0


# ---------------------------------------------------------------------------- redirections


def moved(to: str, body: bytes = b"") -> bytes:
    return text("HTTP/1.1 302 Found", f"Location: {to}", "Connection: close") + body


def test_redirections_over_http_are_followed(server: Server, tmp_path: Path) -> None:
    server.answers |= {
        "HEAD /val/val-0.tfrecords": moved(f"{server.url}/other"),
        "GET /val/val-0.tfrecords": moved(f"{server.url}/other"),
        "GET /other": head() + SHARD,
    }
    assert download(server, tmp_path) == 0
    assert files(tmp_path) == {"val-0.tfrecords": SIZE}


@pytest.mark.parametrize(
    "to", ["file:///etc/hostname", "ftp://127.0.0.1/x", "data:,x", "gopher://127.0.0.1/"]
)
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_redirections_to_elsewhere(
    server: Server, tmp_path: Path, to: str, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers["GET"] = head() + SHARD
    server.answers[method] = moved(to)
    assert download(server, tmp_path) == 1
    told = capsys.readouterr().err
    assert "the server sends on from http to" in told or "302" in told
    assert files(tmp_path) == {}


def test_redirections_without_an_end(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers["HEAD"] = moved(f"{server.url}/val/val-0.tfrecords")
    assert download(server, tmp_path) == 1
    assert "infinite loop" in capsys.readouterr().err
    assert len(server.requests) < 30


def test_the_body_of_a_redirection_is_not_read(server: Server, tmp_path: Path) -> None:
    """It may have no end; urllib alone would keep all of it in memory."""
    server.answers |= {
        "GET /val/val-0.tfrecords": server.endless(moved(f"{server.url}/other"), bytes(2**16)),
        "GET /other": head() + SHARD,
    }
    assert download(server, tmp_path) == 0
    assert server.sent < 10**8


def test_a_safe_connection_stays_one() -> None:
    from clickme_http import _Redirects

    request = urllib.request.Request("https://127.0.0.1/x")
    with pytest.raises(ValueError, match="the server sends on from https to http://127"):
        _Redirects().redirect_request(request, None, 302, "", {}, "http://127.0.0.1/x")
