"""The loader: batches in shared memory that is used again, signals, exits; a data set in memory."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from clickme_shards import framed, record
from torch.utils.data import Dataset, default_collate

from harmonizer_ext.clickme import ClickMe, ClickMeSample
from harmonizer_ext.data import (
    Draw,
    InMemory,
    MixedDataset,
    collate,
    create_loader,
    memory,
    shared,
)


class Samples(Dataset[Any]):
    """Each full of its own number; some interleaved as decoders write them."""

    def __init__(self, count: int, interleaved: bool = True, side: int = 6) -> None:
        self.count = count
        self.interleaved = interleaved
        self.side = side

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> ClickMeSample:
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(
            256, (self.side, self.side + 1, 3), generator=generator, dtype=torch.uint8
        )
        image = image.permute(2, 0, 1)
        return ClickMeSample(
            image if self.interleaved else image.contiguous(),
            torch.rand(1, self.side, self.side + 1, generator=generator),
            index % 1000,
            torch.tensor(float(index % 2)),
        )


class Growing(Samples):
    """Images of another size in each batch of four."""

    def __getitem__(self, index: int) -> ClickMeSample:
        return Samples(self.count, side=4 + index // 4)[index]


def chunks(count: int, size: int) -> list[list[int]]:
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]


def assert_equal(got: ClickMeSample, expected: ClickMeSample) -> None:
    assert type(got) is ClickMeSample
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("interleaved", [True, False])
def test_collate_is_default_collate(interleaved: bool) -> None:
    samples = [Samples(5, interleaved)[index] for index in range(5)]
    got, expected = collate(samples), default_collate(samples)
    assert_equal(got, expected)
    assert got.image.is_contiguous(memory_format=torch.channels_last) == interleaved
    assert got.image.is_contiguous() != interleaved
    assert got.heatmap.is_contiguous()


def test_samples_that_make_no_batch() -> None:
    a, b = Samples(1)[0], Samples(1, side=7)[0]
    with pytest.raises(
        ValueError, match=r"images of one size and dtype, got \(3, 6, 7\) torch.uint8 and \(3, 7, 8"
    ):
        collate([a, b])
    with pytest.raises(ValueError, match="expected heatmaps of one size and dtype"):
        collate([a, a._replace(heatmap=a.heatmap.double())])
    data = [a, b]
    batched = create_loader(data, [[0, 1]], workers=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="images of one size and dtype"):
        next(iter(batched))


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_batches_of_workers(context: str, interleaved: bool) -> None:
    data, batches = Samples(23, interleaved), chunks(23, 4)
    batched = create_loader(data, batches, workers=2)
    batched.multiprocessing_context = context
    for _ in range(2):
        got = list(batched)  # all held at once: more than the pieces of memory that are kept
        assert len(got) == len(batches)
        for batch, rows in zip(got, batches, strict=True):
            assert_equal(batch, collate([data[row] for row in rows]))
            assert batch.image.is_contiguous(memory_format=torch.channels_last) == interleaved
        del got


def test_memory_is_used_again_and_never_too_early() -> None:
    data, batches = Samples(400), chunks(400, 4)
    batched = create_loader(data, batches, workers=1, prefetch_factor=2)
    held: list[tuple[int, torch.Tensor]] = []
    addresses = set()
    for number, batch in enumerate(batched):
        addresses.add(batch.image.data_ptr())
        if number % 7 == 0:
            held.append((number, batch.image[1:, :1]))  # a view keeps its batch
        if len(held) > 2:
            held.pop(0)
        for index, view in held:
            assert torch.equal(view, collate([data[row] for row in batches[index]]).image[1:, :1])
        del batch
    # Four pieces; now and then one more for a single batch.
    assert len(addresses) < 40
    (name,) = [key for key in shared._mapped if any(shared._mapped[key])][-1:]
    assert len(shared._mapped[name]) == 4
    del batched
    gc.collect()
    assert name not in shared._mapped
    index, view = held[-1]
    assert torch.equal(view, collate([data[row] for row in batches[index]]).image[1:, :1])


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight records of ClickMe, of which the fifth has an image that is none."""
    pytest.importorskip("google_crc32c", reason="google-crc32c (extra: train) checks the records")
    path = tmp_path_factory.mktemp("clickme") / "train-0.tfrecords"
    path.write_bytes(
        b"".join(framed(record(n, **({"image": b"none"} if n == 4 else {}))) for n in range(8))
    )
    return path


def turned(sample: ClickMeSample) -> ClickMeSample:
    """Another view of the memory that it is given, of the same size."""
    return sample._replace(
        image=sample.image.transpose(1, 2), heatmap=sample.heatmap.transpose(1, 2)
    )


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("transform", [None, turned])
@pytest.mark.parametrize("preprocess", [None, "released-heatmap", "released"])
@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg-fast"])
def test_clickme_is_decoded_to_shared_memory(
    shard: Path, decoder: Any, preprocess: Any, transform: Any, mixed: bool
) -> None:
    pytest.importorskip(decoder.split("-")[0].replace("pillow", "PIL"), reason="extra: train")
    options = {"preprocess": preprocess, "decoder": decoder, "on_error": "skip"}
    rows: list[Any] = [0, 1, 2, 3, 4, 5, 6, 7]
    if mixed:
        data: Any = MixedDataset(ClickMe(shard, **options), None, transform=transform)
        rows = [Draw(True, row, 0) for row in rows]
    else:
        data = ClickMe(shard, transform=transform, **options)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a worker: with more, an interpolation is rounded otherwise
    expected = collate([data[row] for row in rows])
    torch.set_num_threads(threads)
    for batch in create_loader(data, [rows] * 3, workers=1):
        assert_equal(batch, expected)


def test_given_memory_is_written_to(shard: Path) -> None:
    pytest.importorskip("simplejpeg", reason="simplejpeg (extra: train) decodes to given memory")
    data = MixedDataset(ClickMe(shard, preprocess=None, decoder="simplejpeg-fast"), None)
    image = torch.empty(256, 256, 3, dtype=torch.uint8)
    heatmap = torch.empty(256, 256, 1, dtype=torch.uint8)
    sample = data.read(Draw(True, 2, 0), (image, heatmap))
    assert sample.image.data_ptr() == image.data_ptr()
    assert sample.heatmap.data_ptr() == heatmap.data_ptr()
    assert torch.equal(image.permute(2, 0, 1), data[Draw(True, 2, 0)].image)
    # What has another form is left alone.
    for other in (image.float(), image.transpose(0, 1), image[1:]):
        before = other.clone()
        sample = data.read(Draw(True, 3, 0), (other, heatmap))
        assert torch.equal(other, before)
        assert torch.equal(sample.image, data[Draw(True, 3, 0)].image)


def test_batches_that_grow() -> None:
    data, batches = Growing(80), chunks(80, 4)
    for batch, rows in zip(create_loader(data, batches, workers=1), batches, strict=True):
        assert_equal(batch, collate([data[row] for row in rows]))


def test_an_epoch_left_early() -> None:
    data, batches = Samples(60), chunks(60, 4)
    batched = create_loader(data, batches, workers=2)
    for _ in range(4):
        for number, batch in enumerate(batched):
            assert_equal(batch, collate([data[row] for row in batches[number]]))
            if number == 3:
                break
    assert len(list(batched)) == len(batches)


def test_without_workers() -> None:
    data, batches = Samples(9), chunks(9, 4)
    got = list(create_loader(data, batches, workers=0))
    for batch, rows in zip(got, batches, strict=True):
        assert_equal(batch, collate([data[row] for row in rows]))


# --- signals and exits ----------------------------------------------------------------------------

PROGRAM = """
import os, signal, sys, time, torch
from test_loader import Samples, chunks
from harmonizer_ext.data import create_loader
told = []
batched = create_loader(Samples(4000), chunks(4000, 4), workers=2)
for number, batch in enumerate(batched):
    if number == 3:
        # After the workers' start: they do not have these handlers.
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, lambda number, frame: told.append(number))
        print("ready", *(w.pid for w in batched._iterator._workers), flush=True)
        while not told:
            time.sleep(0.01)
assert number == 999
print("told", told[0], flush=True)
{ending}
"""


def start(ending: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM).format(ending=ending)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
        start_new_session=True,
    )


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are seen in /proc")
@pytest.mark.parametrize(
    ("number", "ending", "times"),
    [
        (signal.SIGINT, "", 1),
        (signal.SIGTERM, "raise KeyError('failed')", 1),
        (signal.SIGTERM, "", 2),
        (signal.SIGINT, "raise KeyError('failed')", 2),
    ],
)
def test_told_to_stop_and_ending(number: signal.Signals, ending: str, times: int) -> None:
    """A signal to all processes stops no worker; they end with the program, however it ends.

    Nor does one that comes twice, as where torchrun passes on what all processes were told.
    """
    process = start(ending)
    try:
        assert process.stdout is not None
        ready, *pids = process.stdout.readline().split()
        assert ready == "ready", process.communicate()
        for _ in range(times):
            os.killpg(process.pid, number)
            time.sleep(0.05)
        out, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert out == f"told {number.value}\n", err
    assert process.returncode == (1 if ending else 0)
    assert ("KeyError: 'failed'" in err) == bool(ending)
    deadline = time.monotonic() + 10
    while any(running(int(pid)) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(running(int(pid)) for pid in pids)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are seen in /proc")
def test_untold_it_ends_too() -> None:
    process = start("")
    try:
        assert process.stdout is not None
        process.stdout.readline()
        os.kill(process.pid, signal.SIGTERM)  # the program alone
        process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0


# --- in memory ------------------------------------------------------------------------------------


def test_in_memory_is_the_data_set() -> None:
    data = Samples(11)
    kept = InMemory(data, threads=3)
    assert len(kept) == 11
    for index in (*range(11), -1):
        for got, expected in zip(kept[index], data[index % 11], strict=True):
            assert type(got) is type(expected)
            assert torch.equal(torch.as_tensor(got), torch.as_tensor(expected))
        assert kept[index].image.stride() == data[index % 11].image.stride()
    assert [sample.label for sample in kept] == list(range(11))
    for index in (11, -12):
        with pytest.raises(IndexError):
            kept[index]


def test_in_memory_is_shared_with_workers() -> None:
    kept = InMemory(Samples(8))
    assert all(tensor.is_shared() for tensor in kept._tensors)
    (batch,) = create_loader(kept, [list(range(8))], workers=1)
    assert_equal(batch, collate([Samples(8)[index] for index in range(8)]))
    # The worker reads what the parent writes: it has no copy.
    batched = create_loader(kept, [[0]] * 20, workers=1)
    iterator = iter(batched)
    next(iterator)
    kept._tensors[0].zero_()
    assert not [batch.image.any() for batch in iterator][-1]


def test_what_is_not_kept_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="dataset: expected samples, got an empty data set"):
        InMemory(Samples(0))
    with pytest.raises(ValueError, match="images of one size"):
        InMemory(Growing(8))
    read: list[int] = []

    class Large(Samples):
        def __getitem__(self, index: int) -> ClickMeSample:
            read.append(index)
            return super().__getitem__(index)

    monkeypatch.setattr(memory, "_available", lambda: 2 * 294 * 9 - 1)
    with pytest.raises(MemoryError, match=r"9 of them take .* leave them on disk"):
        InMemory(Large(9))  # 126 bytes of image and 168 of map each, twice
    assert read == [0]
    InMemory(Large(8))
    monkeypatch.setattr(memory, "_available", lambda: None)
    InMemory(Large(9))


def test_threads_decode_at_the_same_time() -> None:
    """Each sample waits for another thread: one thread alone would never come through."""
    barrier = threading.Barrier(2, timeout=30)

    class Together(Samples):
        def __getitem__(self, index: int) -> ClickMeSample:
            if threading.current_thread() is not threading.main_thread():
                barrier.wait()
            return super().__getitem__(index)

    assert len(InMemory(Together(8), threads=2)) == 8
