"""The stand-in for a GPU, what it does and refuses: test_gpu_on_host.py runs this in a process.

python tests/gpu_on_host.py -m pytest tests/gpu_on_host_worker.py
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterator

import bench_gpu
import bench_loss
import gpu_on_host_runtime as runtime
import harness
import peers
import pytest
import torch
from torch import Tensor, nn

import harmonizer_ext as hx

CUDA = "cuda"


@pytest.fixture(autouse=True)
def _default_stream() -> Iterator[None]:
    """A capture that failed leaves the stream that it chose, as on a GPU."""
    yield
    torch.cuda.set_stream(torch.cuda.default_stream())
    torch.cuda.set_sync_debug_mode("default")


def capture(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


# --- a device with values -------------------------------------------------------------------------


def test_tensors_are_torch_tensors_of_the_gpu() -> None:
    x = torch.arange(6.0, device=CUDA)
    assert type(x) is Tensor
    assert x.device == torch.device("cuda", 0)
    for view in (x[1:], x.view(2, 3).t(), x.split([2, 4])[1], x.detach(), x.unbind()[0]):
        assert view.is_cuda
        assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert (x * 2).tolist() == [0, 2, 4, 6, 8, 10]


def test_views_write_to_what_they_are_views_of() -> None:
    x = torch.zeros(2, 3, device=CUDA)
    x[:, 1].fill_(4)
    x.t_().unsqueeze_(0)
    assert x.shape == (1, 3, 2)
    assert x.cpu().tolist() == [[[0, 0], [4, 4], [0, 0]]]
    out = torch.empty(0, device=CUDA)
    torch.add(x, 1, out=out)
    assert out.cpu().tolist() == [[[1, 1], [5, 5], [1, 1]]]


def test_a_double_backward_equals_the_cpu() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, groups=1), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(144, 3)
    )
    images = torch.randn(2, 3, 8, 8)

    def gradients(model: nn.Module, images: Tensor) -> list[Tensor]:
        images = images.requires_grad_()
        (maps,) = torch.autograd.grad(model(images)[:, 0].sum(), images, create_graph=True)
        model.zero_grad()
        maps.square().sum().backward()
        return [p.grad.cpu().clone() for p in model.parameters() if p.grad is not None]

    expected = gradients(model, images.clone())
    got = gradients(model.cuda(), images.cuda())
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_two_devices_are_an_error() -> None:
    x = torch.ones(2, 2, device=CUDA)
    for call in (lambda: x + torch.ones(2, 2), lambda: torch.ones(2, 2) @ x):
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            call()
    assert (x + torch.tensor(1.0)).sum().item() == 8
    with pytest.raises(TypeError, match="can't convert cuda"):
        x.numpy()


def test_memory_that_nobody_wrote_is_not_a_number() -> None:
    assert torch.empty(4, device=CUDA).isnan().all()


def test_memory_is_counted() -> None:
    gc.collect()
    before = torch.cuda.memory_allocated()
    x = torch.empty(1000, device=CUDA)
    assert torch.cuda.memory_allocated() - before == 4000
    torch.cuda.reset_peak_memory_stats()
    part = (x * 2)[::2]
    del x
    assert torch.cuda.memory_allocated() - before == 4000
    assert torch.cuda.max_memory_allocated() - before == 8000
    del part
    assert torch.cuda.memory_allocated() == before


def test_random_numbers_have_a_state_of_their_own() -> None:
    torch.manual_seed(0)
    state = torch.cuda.get_rng_state()
    drawn = torch.randn(3, device=CUDA)
    torch.randn(5)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.randn(3, device=CUDA), drawn)
    generator = torch.Generator(CUDA).manual_seed(1)
    assert torch.randn(3, generator=generator, device=CUDA).is_cuda


@pytest.mark.parametrize("mine", runtime.replaced, ids=lambda mine: mine.__name__)
def test_it_is_called_as_what_it_stands_for(mine: type) -> None:
    for name, method in inspect.getmembers(mine, inspect.isfunction):
        if name.startswith("_") and name != "__init__":
            continue
        theirs = getattr(runtime.replaced[mine], "__new__" if name == "__init__" else name)
        of = [[*inspect.signature(f).parameters.values()][1:] for f in (method, theirs)]
        known = [p.name for p in of[0] if p.kind is not p.VAR_KEYWORD]
        assert [p.name for p in of[1]][: len(known)] == known, f"{mine.__name__}.{name}"


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(RuntimeError, match="expected one of `default`"):
        torch.cuda.set_sync_debug_mode("loud")
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.cuda.set_device(1)
    start, end = torch.cuda.Event(), torch.cuda.Event(enable_timing=True)
    start.record()
    with pytest.raises(RuntimeError, match="enable_timing=True"):
        start.elapsed_time(end)
    with pytest.raises(RuntimeError, match="must be recorded"):
        torch.cuda.Event(enable_timing=True).elapsed_time(end)


# --- capture --------------------------------------------------------------------------------------

X = torch.ones(3, device=CUDA)


@pytest.mark.parametrize(
    "call",
    [
        lambda: torch.tensor([1.0, 2.0], device=CUDA),
        lambda: torch.ones(2).to(CUDA),
        lambda: torch.ones(2).to(CUDA, non_blocking=True),
        lambda: torch.ones(2).pin_memory().to(CUDA),
        lambda: X.cpu(),
        lambda: X.sum().item(),
        lambda: float(X.sum()),
        lambda: X.tolist(),
        lambda: bool((X > 0).all()),
        lambda: X.nonzero(),
        lambda: X[X > 0],
        lambda: X[torch.tensor([0, 1])],
        lambda: torch.equal(X, X),
        lambda: torch.cuda.synchronize(),
        lambda: torch.cuda.current_stream().synchronize(),
        lambda: torch.cuda.Event().query(),
        lambda: torch.cuda.Event().synchronize(),
        lambda: torch.cuda.empty_cache(),
        lambda: torch.randn(3, device=CUDA, generator=torch.Generator(CUDA)),
        lambda: capture(lambda: X * 2),
    ],
)
def test_what_cuda_refuses_in_a_capture(call: Callable[[], object]) -> None:
    call()  # nothing is wrong with it but where it is
    with pytest.raises(torch.AcceleratorError, match="previous error during capture") as error:
        capture(call)
    assert "not permitted when stream is capturing" in harness.reason(error.value)
    torch.cuda.set_stream(torch.cuda.default_stream())
    capture(lambda: X * 2).replay()


@pytest.mark.parametrize(
    "call",
    [
        lambda: torch.ones(2).pin_memory().to(CUDA, non_blocking=True),
        lambda: torch.empty(5, device=CUDA).normal_(),
        lambda: X[torch.zeros(2, dtype=torch.long, device=CUDA)],
        lambda: X + torch.tensor(1.0),
    ],
)
def test_what_cuda_captures(call: Callable[[], object]) -> None:
    capture(call).replay()


def test_captured_work_is_done_by_a_replay_and_not_before() -> None:
    x, kept = torch.ones(3, device=CUDA), torch.ones(3, device=CUDA)
    made: list[Tensor] = []

    def work() -> None:
        made.append(torch.exp(x * 3).add_(1))
        kept.copy_(x * 5)

    graph = capture(work)
    assert made[0].isnan().all()
    assert kept.tolist() == [1, 1, 1]
    for value in (1.0, 0.0):
        x.fill_(value)
        graph.replay()
        torch.testing.assert_close(made[0], torch.exp(x * 3) + 1)
        assert kept.tolist() == [5 * value] * 3


def test_a_capture_needs_a_stream_of_its_own() -> None:
    with pytest.raises(RuntimeError, match="non-default stream"):
        torch.cuda.CUDAGraph().capture_begin()


@pytest.mark.parametrize("call", [lambda: X.sum().item(), lambda: torch.ones(2).to(CUDA)])
def test_hidden_waits_are_found(call: Callable[[], object]) -> None:
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
        call()


# --- this package's kernels and the benchmark's peers ---------------------------------------------


def _maps() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 3, 33, 31, generator=generator) * 1e-3
    heatmaps = torch.rand(2, 33, 31, generator=generator)
    return maps.cuda(), heatmaps.cuda(), torch.ones(2, device=CUDA)


@pytest.mark.parametrize("backend", [b for b in hx.available_backends(CUDA) if b != "reference"])
def test_kernels_are_executed_and_captured(backend: str) -> None:
    case = bench_gpu.case("released", 2, 33, 31, torch.float32)
    maps = _maps()
    expected = bench_loss.through_autograd(
        lambda *of: hx.harmonization_loss(*of, backend="reference"), True
    )(*maps)
    run = bench_loss.fused_op(case, backend)
    bench_loss.check_agreement(case, backend, run(*maps), expected)
    results: list[object] = []
    graph = capture(lambda: results.append(run(*maps)))
    graph.replay()
    bench_loss.check_agreement(case, backend, results[0], expected)


def test_a_tensor_of_the_host_is_no_argument_of_a_kernel() -> None:
    maps, heatmaps, _ = _maps()
    for backend in hx.available_backends(CUDA)[:-1]:
        with pytest.raises((ValueError, RuntimeError), match=r"cpu|device"):
            hx.harmonization_loss(maps, heatmaps.cpu(), backend=backend)


def test_peers_can_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = [_maps()] * 2
    for peer in (*peers.EAGER["released"], *peers.EAGER["paper"]):
        bench_gpu.captured(bench_loss.through_autograd(peer, True), maps)(0)
    # As they were: the filter is made from a list at every call.
    monkeypatch.setattr(peers, "_kernel_once", peers._kernel)
    peer = bench_loss.through_autograd(peers.eager_released, True)
    with pytest.raises(torch.AcceleratorError):
        bench_gpu.captured(peer, maps)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
