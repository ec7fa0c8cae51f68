"""The operations inside PyTorch: opcheck, compile, torch.func, autocast, a third derivative."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import FORMULATIONS, Target, make_case
from torch.func import functional_call, grad

import harmonizer_ext as hx
from harmonizer_ext import backends

ops = torch.ops.harmonizer_ext


@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize(("formulation", "distance"), FORMULATIONS)
def test_opcheck_loss(
    target: Target,
    generator: torch.Generator,
    formulation: str,
    distance: str,
    with_gradient: bool,
) -> None:
    case = make_case(generator, 31, 33)
    saliency = case.saliency.to(target.device).requires_grad_(with_gradient)
    heatmaps, tokens = case.heatmaps.to(target.device), case.tokens.to(target.device)
    args = (saliency, heatmaps, tokens, formulation, 5, distance, target.backend, with_gradient)
    torch.library.opcheck(ops.harmonization, args)


def test_opcheck_the_rest(target: Target, generator: torch.Generator) -> None:
    maps = torch.randn(2, 3, 17, 12, generator=generator).to(target.device)
    a, b = maps[:, 0], maps[:, 1]
    name = target.backend
    rows = torch.randn(2, generator=generator).to(target.device)
    torch.library.opcheck(ops.harmonization_backward, (maps[:, :1], rows, 3))
    torch.library.opcheck(ops.pyramid, (maps, 4, name))
    torch.library.opcheck(ops.pyramid_adjoint, (ops.pyramid(maps, 4, name), 17, 12, name))
    torch.library.opcheck(ops.standardize_cut, (maps.clone().requires_grad_(), name))
    torch.library.opcheck(ops.standardize_cut_backward, (maps, maps, name))
    torch.library.opcheck(ops.positive_part_mse, (a.clone().requires_grad_(), b, name))
    torch.library.opcheck(ops.positive_part_mse_backward, (rows, a, b, name))


def _functions(backend: str) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    heatmaps = torch.rand(3, 17, 12, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([1.0, 0.0, 0.5])
    return {
        "harmonization_loss": lambda x: hx.harmonization_loss(
            x, heatmaps.to(x.device), tokens.to(x.device), backend=backend
        ),
        "gaussian_pyramid": lambda x: sum(
            p.square().sum() for p in hx.gaussian_pyramid(x, 3, backend=backend)
        ),
        "standardize_cut": lambda x: hx.standardize_cut(x, backend=backend).sum(),
        "positive_part_mse": lambda x: hx.positive_part_mse(
            x[:, 0], x[:, 1], backend=backend
        ).sum(),
    }


@pytest.mark.parametrize("backend", backends.names())
@pytest.mark.parametrize("name", _functions("reference").keys())
def test_compiles_without_a_graph_break(
    backend: str, name: str, generator: torch.Generator
) -> None:
    reason = backends.why_not(backend, "cpu")
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    function = _functions(backend)[name]
    eager = torch.randn(3, 3, 17, 12, generator=generator).requires_grad_()
    compiled = eager.detach().clone().requires_grad_()
    expected = function(eager)
    expected.backward()
    torch.compiler.reset()
    # aot_eager traces everything that inductor would, without waiting for its C++ compiler.
    got = torch.compile(function, fullgraph=True, backend="aot_eager")(compiled)
    got.backward()
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(compiled.grad, eager.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", _functions("reference").keys())
def test_torch_func(name: str, generator: torch.Generator) -> None:
    function = _functions(hx.available_backends("cpu")[0])[name]
    x = torch.randn(3, 3, 17, 12, generator=generator)
    y = x.clone().requires_grad_()
    function(y).backward()
    torch.testing.assert_close(grad(function)(x), y.grad, rtol=1e-6, atol=1e-8)


def test_whole_step_compiles_as_one_function(generator: torch.Generator) -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(600, 5)
    )
    case = make_case(generator, 17, 12)
    images = torch.randn(3, 3, 17, 12, generator=generator)
    labels = torch.tensor([0, 4, 2])

    def loss(parameters: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        def score(x: torch.Tensor) -> torch.Tensor:
            return functional_call(model, parameters, (x,)).gather(1, labels[:, None]).sum()

        return hx.harmonization_loss(grad(score)(images), case.heatmaps, case.tokens)

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    torch.compiler.reset()
    got = torch.compile(grad(loss), fullgraph=True, backend="aot_eager")(parameters, images)
    _, maps = hx.input_gradient(model, images, labels, create_graph=True)
    hx.harmonization_loss(maps, case.heatmaps, case.tokens).backward()
    for name, p in model.named_parameters():
        expected = torch.zeros_like(p) if p.grad is None else p.grad
        # Two orders of the same float32 sums.
        torch.testing.assert_close(got[name], expected, rtol=1e-4, atol=1e-6 * 1.0)
    assert max(value.abs().max() for value in got.values()) > 1e-3


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(
    backend: str | None, dtype: torch.dtype, generator: torch.Generator
) -> None:
    case = make_case(generator, 33, 40)
    name = backend or hx.available_backends("cpu")[0]
    expected = case.run(name)
    with torch.autocast("cpu", dtype=dtype):
        got = case.run(name)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_third_derivative_is_refused(
    target: Target, generator: torch.Generator, reduction: str
) -> None:
    case = make_case(generator, 12, 12)
    maps = case.saliency.to(target.device).requires_grad_()

    def penalty(backend: str) -> torch.Tensor:
        rows = hx.harmonization_loss(
            maps, case.heatmaps.to(target.device), reduction=reduction, backend=backend
        )
        (first,) = torch.autograd.grad(rows.sum(), maps, create_graph=True)
        return first.square().sum()

    with pytest.raises(RuntimeError, match=r'harmonization_loss: .* backend="reference"'):
        penalty(target.backend).backward()
    penalty("reference").backward()
    assert maps.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_factor_with_a_graph_of_its_own(
    target: Target, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """``loss * factor`` under create_graph: the gradient is right, and a further one is refused."""
    case = make_case(generator, 12, 12, dtype=dtype)
    maps = case.saliency.to(target.device).requires_grad_()
    args = (maps, case.heatmaps.to(target.device), case.tokens.to(target.device))
    factor = torch.tensor(3e5, device=target.device, requires_grad=True)
    loss = hx.harmonization_loss(*args, backend=target.backend)
    (alone,) = torch.autograd.grad(loss * 3e5, maps, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss * factor, maps, create_graph=True)
    assert scaled.dtype == dtype
    assert torch.equal(scaled, alone)
    with pytest.raises(RuntimeError, match="differentiate once"):
        torch.autograd.grad(scaled.sum(), factor)


def test_no_gradient_is_computed_where_none_is_wanted(
    target: Target, generator: torch.Generator
) -> None:
    case = make_case(generator, 12, 12)
    maps = case.saliency.to(target.device)
    args = (maps, case.heatmaps.to(target.device), case.tokens.to(target.device))
    rows, gradient, std = ops.harmonization(*args, "released", 5, "mse", target.backend, False)
    assert gradient.numel() == 0
    with torch.no_grad():
        loss = hx.harmonization_loss(*args, reduction="none", backend=target.backend)
    assert torch.equal(loss, rows)
    expected = maps.mean(1).double().std((1, 2), correction=0)
    # The row without a token is not read.
    expected[1] = 0
    torch.testing.assert_close(std.double(), expected, rtol=1e-5, atol=0)


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CPU kernels of each in turn; afterwards those of the best again."""
    reason = backends.why_not("cpu", "cpu")
    if reason is not None:
        pytest.skip(f"cpu: {reason}")
    native = backends.get("cpu").native()
    best = native.cpu_instruction_set()
    if not native.cpu_use_instruction_set(request.param):
        pytest.skip(f"{request.param}: this processor has {best} at most")
    yield request.param
    native.cpu_use_instruction_set(best)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_instruction_set(
    instruction_set: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    for height, width in ((1, 1), (5, 33), (64, 47), (224, 224)):
        case = make_case(generator, height, width, scale=1.0, dtype=dtype)
        for formulation, distance in FORMULATIONS:
            options = {"formulation": formulation, "distance": distance}
            rows, _ = case.run("cpu", **options)
            expected, _ = case.run("reference", dtype=torch.float64, **options)
            torch.testing.assert_close(rows, expected, rtol=5e-6, atol=1e-12)
        x = case.saliency
        for got, want in zip(
            hx.gaussian_pyramid(x, 4, backend="cpu")[1:],
            hx.gaussian_pyramid(x.double(), 4, backend="reference")[1:],
            strict=True,
        ):
            tolerance = max(torch.finfo(dtype).eps, 1e-13)
            torch.testing.assert_close(
                got.double(), want, rtol=tolerance, atol=6e-7 * want.abs().max().item()
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("height", "width"), [(256, 256), (257, 255)])
@pytest.mark.parametrize(("formulation", "distance"), [("released", "mse"), ("paper", "l2")])
def test_large_gradients_past_the_caches(
    instruction_set: str,
    dtype: torch.dtype,
    height: int,
    width: int,
    formulation: str,
    distance: str,
    generator: torch.Generator,
) -> None:
    """Gradients of 4 MiB and more are written by other instructions: the bits are as row by row."""
    case = make_case(generator, height, width, batch=3, channels=1, dtype=dtype)
    assert 6 * height * width * case.saliency.element_size() < 4 << 20 < 33 * height * width * 4
    options = {"formulation": formulation, "distance": distance}
    alone = case.run("cpu", **options)
    case.saliency, case.heatmaps = (
        maps.repeat(11, *[1] * (maps.ndim - 1)) for maps in (case.saliency, case.heatmaps)
    )
    case.tokens = case.tokens.repeat(11)
    together = case.run("cpu", **options)
    for got, want in zip(together, alone, strict=True):
        assert torch.equal(got, want.repeat(11, *[1] * (want.ndim - 1)))
