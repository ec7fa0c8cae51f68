"""The names of ``torch.cuda`` on the device of ``gpu_on_host``: streams, events, graphs, memory."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import gpu_on_host_device as device
import torch
from gpu_on_host_device import CUDA, Capture, refuse_in_capture, state

NAME = "stand-in for a GPU (interpreted on the CPU)"
#: A Hopper, so that the specializations for clusters are chosen.
CAPABILITY = (9, 0)

PROPERTIES = SimpleNamespace(
    name=NAME,
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    multi_processor_count=132,
    total_memory=1 << 34,
    # Two sets of inputs exceed it: each is interpreted by itself.
    L2_cache_size=1 << 10,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    regs_per_multiprocessor=65536,
    gcnArchName="",
)

_library: Any = None


# --- streams, events, graphs ----------------------------------------------------------------------


class Stream:
    """A stream, as ``torch.cuda.Stream``."""

    def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any) -> None:
        self.stream_id = int(kwargs["stream_id"] if kwargs else next(state.streams))
        self.device, self.device_index, self.device_type = CUDA, 0, 1
        self.priority = priority
        self.cuda_stream = self.stream_id

    def wait_event(self, event: Event) -> None:
        event._check_recorded()

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def query(self) -> bool:
        refuse_in_capture("a query")
        return True

    def synchronize(self) -> None:
        refuse_in_capture("a wait for a stream")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self.stream_id == other.stream_id

    def __hash__(self) -> int:
        return hash(self.stream_id)


class Event:
    """An event, as ``torch.cuda.Event``; its times are the host's."""

    def __init__(
        self,
        enable_timing: bool = False,
        blocking: bool = False,
        interprocess: bool = False,
        external: bool = False,
    ) -> None:
        self._timing, self._time = enable_timing, -1.0

    def _check_recorded(self) -> None:
        if self._time < 0:
            raise RuntimeError("the stand-in for a GPU: this event is waited for and not recorded")

    def record(self, stream: Stream | None = None) -> None:
        self._time = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        self._check_recorded()

    def query(self) -> bool:
        refuse_in_capture("a query")
        return True

    def elapsed_time(self, end_event: Event) -> float:
        if not (self._timing and end_event._timing):
            raise RuntimeError("Both events must be created with argument 'enable_timing=True'.")
        if self._time < 0 or end_event._time < 0:
            raise RuntimeError("Both events must be recorded before calculating elapsed time.")
        return (end_event._time - self._time) * 1e3

    def synchronize(self) -> None:
        refuse_in_capture("a wait for an event")


class CUDAGraph:
    """A graph, as ``torch.cuda.CUDAGraph``."""

    def __init__(self, keep_graph: bool = False) -> None:
        self._captured: Capture | None = None
        self._pool: Any = (0, next(state.pools))

    def capture_begin(
        self, pool: Any = None, capture_error_mode: str = "global", **options: Any
    ) -> None:
        if _library.gpu_on_host_stream() == 0:
            raise RuntimeError(
                "CUDA graphs must be captured on a non-default stream. (However, after capture, "
                "it's ok to replay them on the default stream.)"
            )
        refuse_in_capture("another capture")
        self._pool = self._pool if pool is None else pool
        self._captured = state.capture = Capture()

    def capture_end(self) -> None:
        captured, state.capture = state.capture, None
        if captured is None or captured.broken:
            self._captured = None
            raise torch.AcceleratorError(
                "CUDA error: operation failed due to a previous error during capture"
            )

    def replay(self) -> None:
        if self._captured is None:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        refuse_in_capture("a replay")
        for work in self._captured.work:
            work()

    def reset(self) -> None:
        self._captured = None

    def pool(self) -> Any:
        return self._pool


#: What of torch.cuda these stand for; tests compare how they are called.
replaced: dict[type, type] = {}


# --- the names that torch.cuda calls --------------------------------------------------------------


def _memory_stats(device: int) -> dict[str, Any]:
    counts = {"current": state.allocated, "peak": state.peak, "allocated": 0, "freed": 0}
    return {name: {"all": counts} for name in ("allocated_bytes", "reserved_bytes")}


def _reset_peak(device: int) -> None:
    state.peak = state.allocated


def _set_device(device: int) -> None:
    if device > 0:
        raise torch.AcceleratorError("CUDA error: invalid device ordinal")


def _exchange_device(device: int) -> int:
    _set_device(device)
    return 0


def _set_sync_debug_mode(mode: int) -> None:
    state.sync_debug_mode = mode


def _empty_cache(*_: object) -> None:
    refuse_in_capture("giving memory back")


_NAMES: dict[str, Callable[..., Any]] = {
    "init": lambda: None,
    "isInBadFork": lambda: False,
    "getDeviceCount": lambda: 1,
    "getDevice": lambda: 0,
    "setDevice": _set_device,
    "exchangeDevice": _exchange_device,
    "maybeExchangeDevice": _exchange_device,
    "getCurrentStream": lambda device: (_library.gpu_on_host_stream(), 0, 1),
    "getDefaultStream": lambda device: (0, 0, 1),
    "getCurrentRawStream": lambda device: _library.gpu_on_host_stream(),
    "setStream": lambda stream_id, **_: _library.gpu_on_host_set_stream(ctypes.c_int64(stream_id)),
    "synchronize": lambda: refuse_in_capture("a wait for the device"),
    "sleep": lambda cycles: None,
    "memoryStats": _memory_stats,
    "resetPeakMemoryStats": _reset_peak,
    "emptyCache": _empty_cache,
    "set_sync_debug_mode": _set_sync_debug_mode,
    "get_sync_debug_mode": lambda: state.sync_debug_mode,
}


def install(library: ctypes.CDLL) -> None:
    """Puts the stand-in where ``torch.cuda`` looks for the GPU."""
    global _library
    _library = library
    device.install(library)
    library.gpu_on_host_stream.restype = ctypes.c_int64
    for name, function in _NAMES.items():
        setattr(torch._C, f"_cuda_{name}", function)
    torch._C._host_emptyCache = lambda: None
    cuda: Any = torch.cuda
    cuda._initialized = True
    cuda._exchange_device = cuda._maybe_exchange_device = _exchange_device
    cuda._device_count_nvml = lambda: -1
    cuda._get_device_properties = lambda device: PROPERTIES
    free = PROPERTIES.total_memory
    cuda._cudart = SimpleNamespace(cudaMemGetInfo=lambda device: (free - state.allocated, free))
    cuda.default_generators = (torch._C.Generator("cuda"),)
    for made, home in ((Stream, cuda.streams), (Event, cuda.streams), (CUDAGraph, cuda.graphs)):
        replaced[made] = getattr(home, made.__name__)
        setattr(home, made.__name__, made)
        setattr(cuda, made.__name__, made)
    cuda.graphs._graph_pool_handle = lambda: (0, next(state.pools))
    cuda.graphs._cuda_isCurrentStreamCapturing = lambda: state.capture is not None
    torch.compile = lambda model=None, **options: (lambda m: m) if model is None else model
