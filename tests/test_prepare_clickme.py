"""The ClickMe preparation program against a local server that breaks off, lies and refuses."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from clickme_shards import crc32c, framed, record

from harmonizer_ext.clickme import TFRecordError, tfrecord
from harmonizer_ext.clickme.shards import read_features

pytest.importorskip("google_crc32c", reason="google-crc32c (extra: train) checks the downloads")
pytest.importorskip("webdataset", reason="webdataset (extra: train) writes the tar shards")
pytest.importorskip("tqdm", reason="tqdm (extra: train) shows the progress")

import clickme_convert
import clickme_download
import prepare_clickme

PROGRAM = Path(prepare_clickme.__file__)

RECORDS = [record(seed) for seed in range(4)]
SHARDS = {
    "/val/val-0.tfrecords": framed(RECORDS[0]) + framed(RECORDS[1]),
    "/val/val-1.tfrecords": framed(RECORDS[2]),
    "/val/val-2.tfrecords": framed(RECORDS[3]),
}
#: The bitwise checksum is slow: once for each file.
CHECKSUMS = {path: crc32c(content).to_bytes(4, "big") for path, content in SHARDS.items()}


class Server(ThreadingHTTPServer):
    """Serves ``files`` as Google Cloud Storage does, but for the faults that a test asks for.

    Attributes:
        files: content by path.
        ranges: whether ranges are honoured.
        span: what answers to ranges say instead of the truth; "" for nothing.
        break_after: bytes of a body after which the connection is closed, from a list that empties.
        refuse: status codes to answer GET with, from a list that empties.
        hashes: whether checksums are sent.
        wrong: those of a file when they are not the right ones.
        pause: seconds between pieces of a body.
        requests: method, path and Range of each.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = dict(SHARDS)
        self.ranges = True
        self.span: str | None = None
        self.break_after: list[int] = []
        self.refuse: list[int] = []
        self.hashes = True
        self.wrong: dict[str, list[str]] = {}
        self.pause = 0.0
        self.requests: list[tuple[str, str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        server, span = self.server, self.headers.get("Range")
        server.requests.append((self.command, self.path, span))
        if self.path not in server.files:
            self.send_error(404)
            return
        if body and server.refuse:
            self.send_error(server.refuse.pop(0))
            return
        content = server.files[self.path]
        start = int(re.fullmatch(r"bytes=(\d+)-", span)[1]) if span and server.ranges else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            span = f"bytes {start}-{len(content) - 1}/{len(content)}"
            span = span if server.span is None else server.span
            self.send_header(*("Content-Range", span) if span else ("X-No-Range", "1"))
        self.send_header("Content-Length", str(len(content) - start))
        if server.hashes:
            crc = base64.b64encode(CHECKSUMS[self.path]).decode()
            md5 = base64.b64encode(hashlib.md5(SHARDS[self.path]).digest()).decode()
            for digest in server.wrong.get(self.path, [f"crc32c={crc}", f"md5={md5}"]):
                self.send_header("x-goog-hash", digest)
        self.end_headers()
        if body:
            rest = content[start:]
            if server.break_after:
                rest = rest[: server.break_after.pop(0)]
            for at in range(0, len(rest), 4096):
                self.wfile.write(rest[at : at + 4096])
                time.sleep(server.pause)
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(clickme_download, "PAUSE", 0.01)
    monkeypatch.setattr(clickme_download, "CHUNK", 2048)
    monkeypatch.setitem(prepare_clickme.SHARDS, "val", 3)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def download(server: Server, output: Path, *more: str) -> int:
    arguments = ["download", "--url", server.url, "--output", str(output), "--split", "val"]
    return prepare_clickme.main([*arguments, *more])


def files(folder: Path) -> dict[str, bytes]:
    return {
        "/" + str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# ---------------------------------------------------------------------------- download


def test_download_of_a_split(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert download(server, tmp_path) == 0
    assert files(tmp_path) == SHARDS
    assert "3 shards downloaded, 0 were there" in capsys.readouterr().out
    # Nothing is fetched twice; what has another size is.
    server.requests.clear()
    (tmp_path / "val" / "val-1.tfrecords").write_bytes(b"short")
    assert download(server, tmp_path) == 0
    assert files(tmp_path) == SHARDS
    assert "1 shards downloaded, 2 were there" in capsys.readouterr().out
    assert [request for request in server.requests if request[0] == "GET"] == [
        ("GET", "/val/val-1.tfrecords", None)
    ]


def test_download_of_some_shards(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert download(server, tmp_path, "--shards", "1-2", "--threads", "1") == 0
    assert list(files(tmp_path)) == ["/val/val-1.tfrecords", "/val/val-2.tfrecords"]
    assert download(server, tmp_path, "--shards", "3") == 1
    assert "--shards: val has the shards 0 to 2, got 3" in capsys.readouterr().err
    for wrong in ("2-1", "x", "-1"):
        with pytest.raises(SystemExit):
            download(server, tmp_path, f"--shards={wrong}")


@pytest.mark.parametrize("hashes", [True, False])
def test_broken_connections_are_resumed(server: Server, tmp_path: Path, hashes: bool) -> None:
    server.hashes = hashes
    server.break_after = [5000, 0, 7000]
    assert download(server, tmp_path, "--shards", "0", "--retries", "1") == 0
    path = "/val/val-0.tfrecords"
    assert files(tmp_path) == {path: SHARDS[path]}
    spans = [span for method, _, span in server.requests if method == "GET"]
    assert spans == [None, "bytes=5000-", "bytes=5000-", "bytes=12000-"]


def test_a_server_without_ranges_starts_over(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.break_after = [5000]
    assert download(server, tmp_path, "--shards", "0") == 0
    assert files(tmp_path) == {"/val/val-0.tfrecords": SHARDS["/val/val-0.tfrecords"]}


@pytest.mark.parametrize("span", ["", "bytes */20000", "bytes 7-19999/20000", "items 5000-1/2"])
def test_wrong_ranges_end_it(
    server: Server, tmp_path: Path, span: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The connection breaks each time too, so that each time something new has arrived."""
    server.span = span
    server.break_after = [5000] * 100
    assert download(server, tmp_path, "--shards", "0", "--retries", "2") == 1
    assert "what arrived was wrong too often" in capsys.readouterr().err
    assert files(tmp_path) == {}
    assert len(server.break_after) > 80
    server.span, server.break_after = None, []
    assert download(server, tmp_path, "--shards", "0") == 0


def test_wrong_checksums_behind_a_breaking_connection_end_it(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.wrong["/val/val-0.tfrecords"] = ["crc32c=AAAAAA=="]
    server.break_after = [5000, 10**6] * 50
    assert download(server, tmp_path, "--shards", "0", "--retries", "2") == 1
    assert "what arrived has the crc32c" in capsys.readouterr().err
    assert len(server.break_after) > 80


@pytest.mark.parametrize("codes", [[503], [500, 429], [408]])
def test_passing_refusals_are_retried(server: Server, tmp_path: Path, codes: list[int]) -> None:
    server.refuse = list(codes)
    assert download(server, tmp_path, "--shards", "0") == 0
    assert files(tmp_path) == {"/val/val-0.tfrecords": SHARDS["/val/val-0.tfrecords"]}


def test_lasting_refusals_end_it(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.refuse = [403]
    assert download(server, tmp_path, "--shards", "0") == 1
    assert "val-0.tfrecords: the server answers HTTP Error 403" in capsys.readouterr().err
    server.refuse = [503] * 9
    assert download(server, tmp_path, "--shards", "0", "--retries", "2") == 1
    assert "503: Service Unavailable; given up after 3 failures" in capsys.readouterr().err
    assert len(server.refuse) == 6
    del server.files["/val/val-1.tfrecords"]
    assert download(server, tmp_path) == 1
    assert "val-1.tfrecords: the server answers HTTP Error 404" in capsys.readouterr().err


def test_an_unreachable_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--output", str(tmp_path), "--shards", "0", "--retries", "1"]
    assert prepare_clickme.main(["download", "--url", "http://127.0.0.1:9", *arguments]) == 1
    assert "the connection broke" in capsys.readouterr().err


@pytest.mark.parametrize("digest", ["crc32c=AAAAAA==", "md5=AAAAAAAAAAAAAAAAAAAAAA=="])
def test_wrong_checksums(
    server: Server, tmp_path: Path, digest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.wrong["/val/val-0.tfrecords"] = [digest]
    assert download(server, tmp_path, "--shards", "0", "--retries", "1") == 1
    kind = digest.partition("=")[0]
    assert f"what arrived has the {kind}" in capsys.readouterr().err
    assert files(tmp_path) == {}  # not even a part, of which nobody knows what is wrong


def test_a_damaged_part_is_replaced(server: Server, tmp_path: Path) -> None:
    part = tmp_path / "val" / "val-0.tfrecords.part"
    part.parent.mkdir()
    content = SHARDS["/val/val-0.tfrecords"]
    for start in (b"x" * 100, content + b"more", b"y" * len(content), content[:-1], content):
        part.write_bytes(start)
        (tmp_path / "val" / "val-0.tfrecords").unlink(missing_ok=True)
        assert download(server, tmp_path, "--shards", "0") == 0
        assert files(tmp_path) == {"/val/val-0.tfrecords": content}


def test_what_is_no_shard_gets_no_name(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that sends no checksums, and a page in the place of the file."""
    server.hashes = False
    server.files["/val/val-0.tfrecords"] = b"<html>please log in</html>"
    assert download(server, tmp_path, "--shards", "0", "--retries", "1") == 1
    assert "no TFRecord file" in capsys.readouterr().err
    assert files(tmp_path) == {}


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_interrupted_download_goes_on(server: Server, tmp_path: Path) -> None:
    """The program in a process of its own, and Ctrl-C in the midst of a file."""
    server.pause = 0.05
    part = tmp_path / "val" / "val-0.tfrecords.part"
    command = ["--output", tmp_path, "--split", "val", "--shards", "0"]
    process = start("download", "--url", server.url, *command)
    try:
        deadline = time.monotonic() + 60
        while not (part.exists() and part.stat().st_size > 0):
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "interrupted; the same command goes on from here" in errors
    assert "Traceback" not in errors
    have = part.stat().st_size
    assert 0 < have < len(SHARDS["/val/val-0.tfrecords"])
    server.pause = 0
    server.requests.clear()
    assert download(server, tmp_path, "--shards", "0") == 0
    assert ("GET", "/val/val-0.tfrecords", f"bytes={have}-") in server.requests
    assert files(tmp_path) == {"/val/val-0.tfrecords": SHARDS["/val/val-0.tfrecords"]}


# ---------------------------------------------------------------------------- convert


@pytest.fixture
def released(tmp_path: Path) -> Path:
    for path, content in SHARDS.items():
        file = tmp_path / "released" / path[1:]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return tmp_path / "released" / "val"


def test_conversion_copies_byte_for_byte(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "wds"
    assert prepare_clickme.main(["convert", str(released), "--output", str(output)]) == 0
    assert "3 shards converted (4 samples, 0 left out), 0 were there" in capsys.readouterr().out
    manifest = json.loads((output / "manifest.json").read_text())["shards"]
    assert sorted(path.name for path in output.iterdir()) == ["manifest.json", *sorted(manifest)]
    for shard, records in (("val-0", RECORDS[:2]), ("val-1", RECORDS[2:3]), ("val-2", RECORDS[3:])):
        content = (output / f"{shard}.tar").read_bytes()
        entry = manifest[f"{shard}.tar"]
        assert (entry["size"], entry["samples"], entry["skipped"]) == (
            len(content),
            len(records),
            [],
        )
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        expected = {}
        for number, data in enumerate(records):
            image, heatmap, label = read_features(data)
            key = f"{shard}-{number:06d}"
            expected |= {f"{key}.jpg": image, f"{key}.heatmap.jpg": heatmap}
            expected[f"{key}.cls"] = str(label).encode()
        with tarfile.open(output / f"{shard}.tar") as archive:
            found = {member.name: archive.extractfile(member).read() for member in archive}
        assert found == expected


def test_conversion_is_resumed_and_reproducible(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "wds"
    command = ["convert", str(released), "--output", str(output)]
    assert (
        prepare_clickme.main([*command[:1], str(released / "val-1.tfrecords"), *command[2:]]) == 0
    )
    assert prepare_clickme.main(command) == 0
    assert "2 shards converted (3 samples, 0 left out), 1 were there" in capsys.readouterr().out
    first = files(output)
    (output / "val-0.tar").unlink()
    (output / "val-1.tar").write_bytes(b"short")
    os.utime(released / "val-2.tfrecords", (1, 1))
    assert prepare_clickme.main(command) == 0
    assert "3 shards converted" in capsys.readouterr().out
    damaged = bytearray((output / "val-1.tar").read_bytes())
    damaged[5000] ^= 1
    (output / "val-1.tar").write_bytes(damaged)
    assert prepare_clickme.main(command) == 0
    assert "1 shards converted (1 samples, 0 left out), 2 were there" in capsys.readouterr().out
    again = files(output)
    assert first.keys() == again.keys()
    assert all(first[name] == again[name] for name in first if name != "/manifest.json")


def test_conversion_of_damaged_shards(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "wds"
    path = released / "val-0.tfrecords"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content[:-7])
    truncated = len(framed(RECORDS[0]))
    command = ["convert", str(released), "--output", str(output)]
    assert prepare_clickme.main(command) == 1
    assert f"convert: {path}, record at byte {truncated}:" in capsys.readouterr().err
    assert files(output) == {}
    assert prepare_clickme.main([*command, "--on-error", "skip"]) == 0
    out = capsys.readouterr().out
    assert f"left out: {path}, record at byte {truncated}: its length is" in out
    assert f"left out: {path}, record at byte 0: the data does not match" in out
    assert "3 shards converted (2 samples, 2 left out)" in out
    manifest = json.loads((output / "manifest.json").read_text())["shards"]
    assert manifest["val-0.tar"]["skipped"] == [truncated, 0]
    # What was left out does not count as done for one who wants all.
    assert prepare_clickme.main(command) == 1
    # A JPEG that cannot be decoded under sound checksums.
    bad = released / "val-1.tfrecords"
    tfrecord.write_records(bad, [{"image": b"GIF", "heatmap": b"GIF", "label": 3}])
    with pytest.raises(TFRecordError, match=r"image: expected a readable picture \(JPEG\)"):
        clickme_convert.convert_shard(bad, output)


def test_an_interrupted_conversion_leaves_whole_shards(
    released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "wds"
    written = []

    def interrupted(file: object, path: Path, samples: object) -> None:
        written.append(path)
        if len(written) == 2:
            raise KeyboardInterrupt
        compare(file, path, samples)  # type: ignore[arg-type]

    compare = clickme_convert._compare
    monkeypatch.setattr(clickme_convert, "_compare", interrupted)
    command = ["convert", str(released), "--output", str(output)]
    assert prepare_clickme.main(command) == 130
    assert sorted(files(output)) == ["/manifest.json", "/val-0.tar"]
    monkeypatch.undo()
    assert prepare_clickme.main(command) == 0
    assert prepare_clickme.main(["verify", str(output)]) == 0


def test_what_does_not_read_back_gets_no_name(
    released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that changes a byte between writing and reading."""
    output = tmp_path / "wds"
    flush = os.fsync

    def lying(descriptor: int) -> None:
        flush(descriptor)
        amidst = os.fstat(descriptor).st_size // 4  # the first image
        os.pwrite(descriptor, b"unlike any JPEG", amidst)

    monkeypatch.setattr(os, "fsync", lying)
    with pytest.raises(OSError, match=r"does not read back .* at val-0-000000\.jpg"):
        clickme_convert.convert_shard(released / "val-0.tfrecords", output)
    assert files(output) == {}


def test_two_shards_of_one_name(released: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = released.parent / "train"
    other.mkdir()
    (other / "val-0.tfrecords").write_bytes(SHARDS["/val/val-0.tfrecords"])
    both = [str(released), str(other)]
    assert prepare_clickme.main(["convert", *both, "--output", str(released.parent / "x")]) == 1
    assert "several shards have the name val-0" in capsys.readouterr().err


# ---------------------------------------------------------------------------- verify


def test_verification(released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "wds"
    prepare_clickme.main(["convert", str(released), "--output", str(output)])
    capsys.readouterr()
    for folder in (released, output):
        assert prepare_clickme.main(["verify", str(folder)]) == 0
        assert re.search(
            r"3 shards, \d\.\d MB: 4 samples of 4 classes, 0 problems", capsys.readouterr().out
        )
    for path in (released / "val-1.tfrecords", output / "val-1.tar"):
        content = bytearray(path.read_bytes())
        content[5000] ^= 1
        path.write_bytes(content)
        assert prepare_clickme.main(["verify", str(path.parent)]) == 1
        out = capsys.readouterr().out
        assert "3 samples of 3 classes, 1 problems" in out
        assert str(path) in out
    (output / "foreign.tar").write_bytes((output / "val-0.tar").read_bytes())
    assert prepare_clickme.main(["verify", str(output / "foreign.tar")]) == 1
    assert "foreign.tar: not in" in capsys.readouterr().out
    assert prepare_clickme.main(["verify", str(tmp_path / "nowhere")]) == 1
    assert "nowhere matches no file" in capsys.readouterr().err
