"""Tests that only a GPU can pass: streams, graph capture, no hidden synchronization, same bits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import FORMULATIONS, Case, Target, make_case, skip_unless_supported

import harmonizer_ext as hx
from harmonizer_ext import backends

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU that PyTorch can use on this machine"
)


@pytest.fixture
def gpu(target: Target) -> Target:
    if target.device != "cuda":
        pytest.skip(f"{target.backend} on {target.device} has no streams or graphs")
    return target


def _loss_and_gradient(
    backend: str, saliency: torch.Tensor, heatmaps: torch.Tensor, **options: object
) -> tuple[torch.Tensor, torch.Tensor]:
    maps = saliency.detach().requires_grad_()
    loss = hx.harmonization_loss(maps, heatmaps, backend=backend, **options)
    return loss.detach(), torch.autograd.grad(loss, maps)[0]


def _on_gpu(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    return case.saliency.cuda(), case.heatmaps.cuda()


@pytest.mark.parametrize(("formulation", "distance"), FORMULATIONS)
@pytest.mark.parametrize(("height", "width"), [(33, 47), (224, 224)])
def test_side_stream(
    gpu: Target,
    generator: torch.Generator,
    height: int,
    width: int,
    formulation: str,
    distance: str,
) -> None:
    options = {"formulation": formulation, "distance": distance}
    saliency, heatmaps = _on_gpu(make_case(generator, height, width))
    expected = _loss_and_gradient(gpu.backend, saliency, heatmaps, **options)
    late = torch.zeros_like(saliency)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        # A kernel on any other stream would read the zeros: this one writes after about 50 ms.
        torch.cuda._sleep(100_000_000)
        late.copy_(saliency)
        got = _loss_and_gradient(gpu.backend, late, heatmaps, **options)
    stream.synchronize()
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize(("formulation", "distance"), FORMULATIONS)
def test_graph_capture_and_replay(
    gpu: Target, generator: torch.Generator, formulation: str, distance: str
) -> None:
    options = {"formulation": formulation, "distance": distance}
    first, second = (_on_gpu(make_case(generator, 64, 61)) for _ in range(2))
    saliency, heatmaps = first[0].clone(), first[1].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _loss_and_gradient(gpu.backend, saliency, heatmaps, **options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _loss_and_gradient(gpu.backend, saliency, heatmaps, **options)
    for inputs in (second, first, second):
        saliency.copy_(inputs[0])
        heatmaps.copy_(inputs[1])
        graph.replay()
        expected = _loss_and_gradient(gpu.backend, *inputs, **options)
        assert torch.equal(captured[0], expected[0])
        assert torch.equal(captured[1], expected[1])


@pytest.fixture
def synchronization_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_synchronization(
    gpu: Target, generator: torch.Generator, request: pytest.FixtureRequest
) -> None:
    saliency, heatmaps = _on_gpu(make_case(generator, 224, 224))
    tokens = torch.ones(len(saliency), device="cuda")
    _loss_and_gradient(gpu.backend, saliency, heatmaps)
    request.getfixturevalue("synchronization_is_an_error")
    for reduction in ("mean", "mean_valid", "sum"):
        maps = saliency.detach().requires_grad_()
        hx.harmonization_loss(
            maps, heatmaps, tokens, reduction=reduction, backend=gpu.backend
        ).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("formulation", "distance"), FORMULATIONS)
@pytest.mark.parametrize(("height", "width"), [(31, 45), (224, 224)])
def test_same_bits_a_hundred_times(
    gpu: Target,
    generator: torch.Generator,
    height: int,
    width: int,
    formulation: str,
    distance: str,
    dtype: torch.dtype,
) -> None:
    options = {"formulation": formulation, "distance": distance}
    saliency, heatmaps = _on_gpu(make_case(generator, height, width, dtype=dtype, scale=1.0))
    first = _loss_and_gradient(gpu.backend, saliency, heatmaps, **options)
    for _ in range(99):
        again = _loss_and_gradient(gpu.backend, saliency, heatmaps, **options)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


def test_second_device(gpu: Target, generator: torch.Generator) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one GPU")
    saliency, heatmaps = _on_gpu(make_case(generator, 48, 50))
    expected = _loss_and_gradient(gpu.backend, saliency, heatmaps)
    # The current device stays the first: the kernel has to go where the tensors are.
    got = _loss_and_gradient(gpu.backend, saliency.to("cuda:1"), heatmaps.to("cuda:1"))
    assert torch.equal(got[0].cpu(), expected[0].cpu())
    assert torch.equal(got[1].cpu(), expected[1].cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_specialization_of_the_cuda_loss(
    generator: torch.Generator, dtype: torch.dtype
) -> None:
    skip_unless_supported(Target("cuda", "cuda"), dtype)
    cuda = backends.get("cuda")
    unsupported = []
    for variant in cuda.native().cuda_loss_variants():
        size, formulation = variant["size"], ("released", "paper")[variant["formulation"]]
        case = make_case(generator, size, size, dtype=dtype, scale=1.0)
        expected, gradient = case.run("reference", dtype=torch.float64, formulation=formulation)
        tokens = case.tokens.cuda()
        # -1 is the path of any size, which is otherwise not tested at these.
        for number, prefetch in ((variant["number"], 0), (variant["number"], 2), (-1, 0)):
            try:
                rows, got, _ = cuda.harmonization(
                    case.saliency.cuda(), case.heatmaps.float().cuda(), tokens,
                    formulation, 5, "mse", True, variant=number, prefetch=prefetch,
                )  # fmt: skip
            except RuntimeError as error:
                if "the GPU has" not in str(error):
                    raise
                unsupported.append(str(error))
                continue
            torch.testing.assert_close(rows.double().cpu(), expected, rtol=5e-6, atol=1e-12)
            # Relative to a row's largest element: float32 sums, then rounding to the dtype. Where a
            # pixel lies at the mean the gradient jumps, so that a few may differ by the jump.
            largest = gradient.abs().amax((1, 2, 3), keepdim=True)
            error = (got.double().cpu() - gradient[:, :1]).abs()
            allowed = 5e-6 * largest + torch.finfo(dtype).eps * gradient[:, :1].abs()
            assert (error > allowed).double().mean() < 1e-3, f"{variant}: {error.max()}"
    if unsupported:
        pytest.skip("; ".join(unsupported))
