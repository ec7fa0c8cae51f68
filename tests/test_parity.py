"""The authors' released code against every backend: golden values, and TensorFlow where it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import released
import torch
from twins import TwinNetwork

import harmonizer_ext as hx

GOLDEN = np.load(Path(__file__).parent / "golden" / "released.npz")
BACKENDS = hx.available_backends("cpu")

needs_tensorflow = pytest.mark.skipif(
    released.why_not() is not None, reason=f"the released code cannot run: {released.why_not()}"
)

# The promise of the README. float32 is what both sides store; see test_loss.py for the count.
PROMISED = 1e-5


def _assert_close(got: torch.Tensor, expected: np.ndarray, rtol: float) -> None:
    """Compares relative to the largest element of each row (or of the whole, for scalars)."""
    want = torch.as_tensor(expected, dtype=torch.float64)
    size = want.abs().amax(tuple(range(1, want.ndim)), keepdim=True) if want.ndim else want.abs()
    excess = (got.detach().double() - want).abs() - rtol * size
    assert not excess.isnan().any()
    assert excess.max() <= 1e-30


def _loss_and_gradient(
    saliency: torch.Tensor, heatmaps: torch.Tensor, tokens: torch.Tensor, levels: int, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    maps = saliency.requires_grad_()
    loss = hx.harmonization_loss(maps, heatmaps, tokens, levels=levels, backend=backend)
    return loss, torch.autograd.grad(loss, maps)[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", GOLDEN["cases"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_loss(case: str, backend: str, dtype: torch.dtype) -> None:
    def get(key: str) -> np.ndarray:
        return GOLDEN[f"loss/{case}/{key}"]

    loss, grad = _loss_and_gradient(
        torch.tensor(get("saliency"), dtype=dtype),
        torch.tensor(get("heatmaps"), dtype=dtype),
        torch.tensor(get("tokens")),
        int(get("levels")),
        backend,
    )
    # Float64 against float64: sums in another order.
    rtol = 1e-12 if dtype == torch.float64 else PROMISED
    _assert_close(loss, get("loss"), rtol)
    _assert_close(grad[:, 0], get("gradient"), rtol)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("twin", GOLDEN["twins"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_step(twin: str, backend: str, dtype: torch.dtype) -> None:
    """The whole ``harmonizer_loss``: every term, and every parameter's gradient."""

    def get(key: str) -> np.ndarray:
        return GOLDEN[f"step/{twin}/{key}"]

    model = TwinNetwork(twin == "batch_norm").to(dtype).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.tensor(get(f"weights/{name}")))
    out = hx.harmonizer_loss(
        model,
        torch.tensor(get("images"), dtype=dtype),
        torch.tensor(get("labels"), dtype=dtype),
        torch.tensor(get("heatmaps"), dtype=dtype),
        torch.tensor(get("tokens")),
        lambda_harmonization=float(get("lambda_harmonization")),
        lambda_weights=float(get("lambda_weights")),
        rows="all",
        backend=backend,
    )
    out.loss.backward()
    rtol = 1e-11 if dtype == torch.float64 else PROMISED
    for name in ("loss", "cross_entropy", "harmonization", "weight_penalty"):
        _assert_close(getattr(out, name), get(name), rtol)
    _assert_close(out.saliency, get("saliency"), rtol)
    for name, parameter in model.named_parameters():
        want = get(f"gradients/{name}")
        error = np.abs(parameter.grad.double().numpy() - want).max()
        # 2e-5 of the largest element is the promise for parameters, which lie one network further
        # from the loss. The rest is for a bias in front of BatchNorm: its gradient is exactly zero,
        # and what is computed is the rounding of terms of the size of the loss.
        rtol, atol = (2e-5, 1e-6) if dtype == torch.float32 else (1e-11, 1e-15)
        assert error <= rtol * np.abs(want).max() + atol, name


@needs_tensorflow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-7, 1e-5, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize(
    ("height", "width", "channels", "levels"),
    [(224, 224, 3, 5), (225, 223, 3, 5), (31, 64, 1, 6), (7, 9, 4, 3), (50, 20, 2, 1)],
)
def test_released_loss(
    backend: str,
    scale: float,
    height: int,
    width: int,
    channels: int,
    levels: int,
    generator: torch.Generator,
) -> None:
    batch = 3
    saliency = torch.randn(batch, channels, height, width, generator=generator) * scale
    heatmaps = torch.rand(batch, height, width, generator=generator).square()
    tokens = torch.tensor([1.0, 0.0, 0.5])
    loss, gradient = released.released_loss_and_gradient(
        saliency.numpy(), heatmaps.numpy(), tokens.numpy(), levels, dtype="float64"
    )
    got_loss, got_gradient = _loss_and_gradient(saliency, heatmaps, tokens, levels, backend)
    _assert_close(got_loss, np.asarray(loss), PROMISED)
    # A pixel within float32's step of its mean may fall on either side of the cut, where the
    # gradient jumps.
    m = saliency.detach().double().mean(1)
    z = (m - m.mean((1, 2), keepdim=True)) / m.std((1, 2), correction=0, keepdim=True)
    clear = (z.abs() > 3e-7).all(2).all(1)
    assert clear[0] or clear[2]
    _assert_close(got_gradient[clear], gradient[clear.numpy()], PROMISED)


@needs_tensorflow
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("seed", [11, 12, 13])
def test_released_harmonizer_loss(seed: int, batch_norm: bool) -> None:
    twins = released.keras_and_torch_twins(seed, batch_norm)
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((6, 3, 21, 16))
    heatmaps = rng.random((6, 21, 16))
    tokens = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    labels = np.eye(TwinNetwork.CLASSES)[rng.integers(0, TwinNetwork.CLASSES, 6)]
    step = released.released_harmonizer_loss(twins.keras, images, labels, heatmaps, tokens)
    model = twins.torch
    for rows in ("all", "auto"):
        model.zero_grad()
        out = hx.harmonizer_loss(
            model,
            torch.tensor(images),
            torch.tensor(labels),
            torch.tensor(heatmaps),
            torch.tensor(tokens),
            rows=rows,
        )
        out.loss.backward()
        _assert_close(out.loss, np.asarray(step.loss), 1e-11)
        gradients = twins.to_torch(step.gradients)
        for name, parameter in model.named_parameters():
            want = gradients[name]
            error = np.abs(parameter.grad.numpy() - want).max()
            assert error <= 1e-10 * max(np.abs(g).max() for g in gradients.values()), name
