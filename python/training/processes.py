"""The processes of a run: one, or those that torchrun started; and their agreement to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from harmonizer_ext.files.lock import LOCK, LockedError, locked
from harmonizer_ext.files.output import remove_partial

#: Seconds within which a signal that comes again is the same request: a terminal and batch systems
#: tell torchrun and its processes alike, and torchrun passes on what it was told.
SAME_REQUEST = 5.0


class World(NamedTuple):
    """This process among those of the run."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """Sum over the processes; in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """The picklable values of all processes, on all of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """For all processes."""
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def join(device: str | None) -> Iterator[World]:
    """Joins the processes of a torchrun, if there is one, and leaves them at the end.

    Raises:
        ValueError: ``device`` is a GPU that this machine lacks.
    """
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if kind.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: expected 'cpu', got {device!r}; PyTorch sees no GPU here")
    if "RANK" not in os.environ:
        yield World(0, 1, kind)
        return
    if kind.type == "cuda":
        kind = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(kind)
    # gloo beside nccl: tensors on the CPU are exchanged without waiting for the GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), kind)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def claim(output: str, world: World) -> Iterator[None]:
    """Makes the output folder and holds its lock, on the first process for all of them.

    What a run that was killed has left half written in it is removed.

    Raises:
        LockedError: another run writes to it; on all processes alike.
        OSError: it cannot be made.
    """
    with contextlib.ExitStack() as held:
        problem: OSError | None = None
        if world.main:
            try:
                Path(output).mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(Path(output) / LOCK))
                remove_partial(output)
            except OSError as error:
                problem = error
        (found, *_) = world.gather(None if problem is None else str(problem))
        if problem is not None:
            raise problem
        if found is not None:
            raise LockedError(found)
        yield


class StopRequest:
    """SIGTERM and SIGINT, noted until all processes have finished the same update.

    Each process may be told at another time. What they were told is exchanged while the next
    update runs, so that all of them stop after the same one, and none waits for it. Whoever asks
    again, more than ``SAME_REQUEST`` seconds later, does not want to wait.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._told = 0
        self._told_at = 0.0
        self._exchanged = torch.zeros(1, dtype=torch.int64, device="cpu")
        self._pending: Any = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Python takes signals in the main thread alone.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, error: object, *rest: object) -> None:
        if self._pending is not None and error is None:
            self._pending.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if not self._told:
            self._told, self._told_at = number, now
        elif now - self._told_at > SAME_REQUEST:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)

    def after_update(self) -> int:
        """The signal that all processes stop for after this update, or 0."""
        if self._world.size == 1:
            return self._told
        agreed = 0
        if self._pending is not None:
            self._pending.wait()
            agreed = int(self._exchanged)
        self._exchanged = torch.tensor([self._told], device="cpu")
        self._pending = dist.all_reduce(self._exchanged, dist.ReduceOp.MAX, async_op=True)
        return agreed
