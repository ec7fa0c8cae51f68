"""Alignments beside the fused loss: their definitions, their gradients, and training by them."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_networks import Through, gradients, make_batch
from torch import Tensor, nn

import harmonizer_ext as hx
from harmonizer_ext.explanations import InputGradient
from harmonizer_ext.map_losses import (
    BinaryCrossEntropy,
    CosineDistance,
    MinMaxError,
    PixelCrossEntropy,
    min_max,
)

ALIGNMENTS: dict[str, Any] = {
    "min-max": MinMaxError(),
    "cosine": CosineDistance(),
    "bce": BinaryCrossEntropy(),
    "masked bce": BinaryCrossEntropy(masked=True),
    "pixels": PixelCrossEntropy(),
    "one pixel": PixelCrossEntropy(hard=True, temperature=1.0),
}


@pytest.fixture
def maps(generator: torch.Generator) -> Tensor:
    return torch.randn(4, 3, 6, 7, generator=generator, dtype=torch.float64) * 1e-3


@pytest.fixture
def heatmaps(generator: torch.Generator) -> Tensor:
    blobs = torch.rand(4, 1, 3, 3, generator=generator, dtype=torch.float64) - 0.3
    return F.interpolate(blobs, (6, 7), mode="bilinear").clamp(min=0)[:, 0]


# --- definitions ----------------------------------------------------------------------------------


def by_hand(name: str, m: np.ndarray, h: np.ndarray) -> float:
    """MATH.md (22) to (27) for one pair of maps, in NumPy, pixel by pixel."""

    def scaled(x: np.ndarray) -> np.ndarray:
        return (x - x.min()) / (x.max() - x.min()) if x.max() > x.min() else 0 * x

    m, h = scaled(m).ravel(), scaled(h).ravel()
    if name == "min-max":
        return float(((m - h) ** 2).mean())
    if name == "cosine":
        return float(1 - m @ h / np.sqrt((m @ m) * (h @ h))) if m.any() and h.any() else 1.0
    if "bce" in name:
        p = m.clip(1e-6, 1 - 1e-6)
        pixels = -(h * np.log(p) + (1 - h) * np.log(1 - p))
        if name == "bce":
            return float(pixels.mean())
        return float(pixels[h > 0].mean()) if (h > 0).any() else 0.0
    temperature = 1.0 if name == "one pixel" else 0.1
    logs = m / temperature - np.log(np.exp(m / temperature).sum())
    if name == "one pixel":
        return float(-logs[h.argmax()])
    q = h / h.sum() if h.any() else np.full_like(h, 1 / h.size)
    return float(-(q * logs).sum())


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_values_by_hand(name: str, maps: Tensor, heatmaps: Tensor) -> None:
    tokens = torch.tensor([1.0, 0.0, 0.5, 2.0])
    rows = ALIGNMENTS[name](maps.requires_grad_(), heatmaps, tokens)
    want = [
        float(t) * by_hand(name, m.mean(0).numpy(), h.numpy())
        for m, h, t in zip(maps.detach(), heatmaps, tokens, strict=True)
    ]
    torch.testing.assert_close(
        rows.detach(), torch.tensor(want, dtype=torch.float64), rtol=1e-10, atol=1e-12
    )
    without = ALIGNMENTS[name](maps, heatmaps[:, None])
    assert torch.equal(without[0], rows[0])


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_gradients_by_differences(name: str, maps: Tensor, heatmaps: Tensor) -> None:
    tokens = torch.tensor([1.0, 0.0, 0.5, 2.0], dtype=torch.float64)
    maps = (1e3 * maps).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ALIGNMENTS[name](x, heatmaps, tokens), [maps])
    assert torch.autograd.gradgradcheck(lambda x: ALIGNMENTS[name](x, heatmaps, tokens), [maps])


def test_the_labs_own(maps: Tensor, heatmaps: Tensor) -> None:
    """Loss by loss as co3d_harmonization/losses.py computes them, from maps in 0..1."""
    m, h = (x.flatten(1) for x in (min_max(maps.mean(1)), min_max(heatmaps)))
    mask = (h > 0).double()
    # Theirs cuts at 1e-8, which is another number at the one pixel of the minimum.
    pixels = F.binary_cross_entropy(m.clamp(1e-6, 1 - 1e-6), h, reduction="none")
    for name, want in {
        "min-max": (m - h).square().mean(1),
        "cosine": 1 - F.cosine_similarity(m, h),
        "bce": pixels.mean(1),
        "one pixel": F.cross_entropy(m, h.argmax(1), reduction="none"),
        "masked bce": (pixels * mask).sum(1) / mask.sum(1),
    }.items():
        rows = ALIGNMENTS[name](maps.requires_grad_(), heatmaps).detach()
        torch.testing.assert_close(rows, want.detach(), rtol=1e-9, atol=1e-12)


# --- what the formulas leave open, as in MATH.md, section 6 ---------------------------------------


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_a_row_without_a_map_is_not_read(name: str, maps: Tensor, heatmaps: Tensor) -> None:
    tokens = torch.tensor([1.0, 0.0, 0.5, 2.0])
    want = ALIGNMENTS[name](maps.clone().requires_grad_(), heatmaps, tokens).detach()
    maps[1], heatmaps[1] = torch.nan, torch.inf
    maps.requires_grad_()
    rows = ALIGNMENTS[name](maps, heatmaps, tokens)
    assert torch.equal(rows.detach(), want)
    assert rows[1] == 0
    (gradient,) = torch.autograd.grad(rows.sum(), maps)
    assert not gradient[1].any()
    assert gradient[0].any()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["maps", "heatmaps"])
@pytest.mark.parametrize("name", ALIGNMENTS)
def test_what_is_not_finite_stays_in_its_row(
    name: str, where: str, bad: float, maps: Tensor, heatmaps: Tensor
) -> None:
    want = ALIGNMENTS[name](maps.clone().requires_grad_(), heatmaps).detach()
    if where == "maps":
        maps[2, 0, 3, 3] = bad
    else:
        heatmaps[2, 3, 3] = bad
    maps.requires_grad_()
    rows = ALIGNMENTS[name](maps, heatmaps)
    others = [0, 1, 3]
    assert rows[2].isnan()
    assert torch.equal(rows[others].detach(), want[others])
    (gradient,) = torch.autograd.grad(rows.sum(), maps)
    assert gradient[others].isfinite().all()
    assert gradient[2].isnan().any()


@pytest.mark.parametrize("constant", [0.0, 0.3, -2.0])
@pytest.mark.parametrize("name", ALIGNMENTS)
def test_constant_maps(name: str, constant: float, maps: Tensor, heatmaps: Tensor) -> None:
    maps[0] = constant
    heatmaps[1] = constant
    maps[2], heatmaps[2] = constant, constant
    maps.requires_grad_()
    rows = ALIGNMENTS[name](maps, heatmaps)
    want = [
        by_hand(name, m.mean(0).numpy(), h.numpy())
        for m, h in zip(maps.detach(), heatmaps, strict=True)
    ]
    torch.testing.assert_close(rows.detach(), torch.tensor(want, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(rows.sum(), maps)
    assert gradient.isfinite().all()
    assert not gradient[[0, 2]].any()
    if name in ("cosine", "masked bce"):
        assert not gradient[1].any()


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_an_empty_batch(name: str) -> None:
    maps = torch.zeros(0, 3, 5, 5, requires_grad=True)
    rows = ALIGNMENTS[name](maps, torch.zeros(0, 5, 5))
    assert rows.shape == (0,)
    rows.sum().backward()
    assert maps.grad.shape == maps.shape


@pytest.mark.parametrize("scale", [1e-20, 1e-7, 1.0, 1e7])
@pytest.mark.parametrize("name", ALIGNMENTS)
def test_maps_of_any_size(name: str, scale: float, maps: Tensor, heatmaps: Tensor) -> None:
    """No epsilon stands against small ones, in float32 either."""
    small = (scale * maps).float().requires_grad_()
    want = ALIGNMENTS[name](maps.requires_grad_(), heatmaps)
    rows = ALIGNMENTS[name](small, heatmaps.float())
    assert rows.dtype == torch.float32
    # Rounding of float32, which the logarithm at the cut of 1e-6 makes 0.1 of one pixel in 42.
    torch.testing.assert_close(rows.double(), want, rtol=2e-2 if "bce" in name else 1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ALIGNMENTS)
def test_half_precision_is_widened(
    name: str, dtype: torch.dtype, maps: Tensor, heatmaps: Tensor
) -> None:
    half = maps.to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        rows = ALIGNMENTS[name](half, heatmaps.to(dtype))
    want = ALIGNMENTS[name](half.detach().float().requires_grad_(), heatmaps.to(dtype).float())
    assert torch.equal(rows, want)
    rows.sum().backward()
    assert half.grad.dtype == dtype


def test_what_they_refuse(maps: Tensor, heatmaps: Tensor) -> None:
    for alignment in ALIGNMENTS.values():
        with pytest.raises(hx.NoGraphError, match="saliency: expected a tensor that carries a gr"):
            alignment(maps, heatmaps)
        with torch.no_grad():
            assert alignment(maps, heatmaps).shape == (4,)
        with pytest.raises(ValueError, match="heatmaps: expected maps of 6x7"):
            alignment(maps, heatmaps[:, :3])
        with pytest.raises(ValueError, match=r"tokens: expected shape \(4,\)"):
            alignment(maps, heatmaps, torch.ones(3))
        again = pickle.loads(pickle.dumps(alignment))
        assert again == alignment == copy.deepcopy(alignment)
    with pytest.raises(ValueError, match="temperature: expected a number above 0, got 0"):
        PixelCrossEntropy(temperature=0)


# --- training -------------------------------------------------------------------------------------


@pytest.fixture
def batch(generator: torch.Generator) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return make_batch(generator, 4, 8) | {"tokens": torch.tensor([1.0, 0.0, 0.5, 1.0])}


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return Through(nn.GELU()).to(dtype)


@pytest.mark.parametrize("rows", ["mapped", "all"])
@pytest.mark.parametrize("reduction", ["mean", "mean_valid"])
def test_the_fused_loss_as_an_alignment(
    reduction: str, rows: str, batch: dict[str, Tensor]
) -> None:
    """A loss that comes through ``alignment=`` is weighed and reduced as the loss is by itself."""
    options: dict[str, Any] = {"reduction": reduction, "rows": rows}
    for own in ({}, {"formulation": "paper", "levels": 3, "distance": "l2"}):
        fused = functools.partial(hx.harmonization_loss, reduction="none", **own)
        want = gradients(network(), batch, **options, **own)
        got = gradients(network(), batch, **options, alignment=fused)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7 * float(b.abs().max()) + 1e-12)
        outs = [
            hx.harmonizer_loss(network(), **batch, **options, **more)
            for more in ({"alignment": fused}, own)
        ]
        for field in ("harmonization", "saliency_std", "row_saliency_std", "mapped_rows"):
            torch.testing.assert_close(*(getattr(out, field) for out in outs))


def test_the_printed_norm_is_trained(batch: dict[str, Tensor]) -> None:
    """Equation (1) of the paper as it stands, by differences of its value."""
    model = network(torch.float64)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    options: dict[str, Any] = {"formulation": "paper", "distance": "l2", "levels": 2}

    def loss() -> Tensor:
        return hx.harmonizer_loss(model, **batch, **options, lambda_weights=0.0).loss

    assert_gradients_by_differences(model, loss)
    mse = hx.harmonizer_loss(model, **batch, formulation="paper", levels=2).harmonization
    assert hx.harmonizer_loss(model, **batch, **options).harmonization > 2 * mse


def assert_gradients_by_differences(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    exact = torch.autograd.grad(loss(), list(model.parameters()))
    generator = torch.Generator().manual_seed(1)
    for parameter, gradient in zip(model.parameters(), exact, strict=True):
        direction = torch.randn(parameter.shape, generator=generator).double()
        values = []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
            values.append(loss().item())
        with torch.no_grad():
            parameter.add_(direction, alpha=1e-6)
        numeric = (values[0] - values[1]) / 2e-6
        want = float((gradient * direction).sum())
        # The square of the step times third derivatives, and 1e-16 over the step.
        assert abs(numeric - want) <= 1e-5 * max(1.0, abs(want))


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_parameter_gradients(name: str, batch: dict[str, Tensor]) -> None:
    model = network(torch.float64)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}

    def loss() -> Tensor:
        return hx.harmonizer_loss(
            model, **batch, alignment=ALIGNMENTS[name], lambda_harmonization=2.0
        ).loss

    assert_gradients_by_differences(model, loss)


def test_maps_of_the_lab(batch: dict[str, Tensor]) -> None:
    """Largest absolute value over the channels, as there."""
    out = hx.harmonizer_loss(
        network(), **batch, explain=InputGradient("abs_max"), alignment=ALIGNMENTS["masked bce"]
    )
    weights = batch["tokens"][batch["tokens"] > 0]
    rows = [
        float(w) * by_hand("masked bce", m.double().numpy(), h.double().numpy())
        for w, m, h in zip(
            weights, out.saliency, batch["heatmaps"][batch["tokens"] > 0], strict=True
        )
    ]
    assert float(out.harmonization) == pytest.approx(sum(rows) / 4, rel=1e-4)


def test_an_alignment_of_ones_own(batch: dict[str, Tensor]) -> None:
    """It is told which rows have a map, and sees nothing of those that have none."""
    batch["heatmaps"][1] = torch.nan
    seen: list[Tensor] = []

    def alignment(maps: Tensor, heatmaps: Tensor, tokens: Tensor) -> Tensor:
        seen.append(tokens)
        assert maps.shape == (4, 3, 8, 8)
        assert heatmaps.isfinite().all()
        assert not heatmaps[1].any()
        assert not maps[1].any()
        return (maps.mean(1) - heatmaps).square().mean((1, 2)) + 5  # tokens left out

    out = hx.harmonizer_loss(network(), **batch, rows="all", alignment=alignment)
    assert seen[0].tolist() == [1, 0, 1, 1]
    difference = (out.saliency.mean(1) - batch["heatmaps"]).square().mean((1, 2)) + 5
    want = (difference[0] + 0.5 * difference[2] + difference[3]) / 4
    torch.testing.assert_close(out.harmonization, want)


class Projected(nn.Module):
    """A learned projection of the saliency, as in the lab's later networks."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Conv2d(1, 1, 1)
        self.compare = BinaryCrossEntropy(masked=True)

    def forward(self, maps: Tensor, heatmaps: Tensor, tokens: Tensor) -> Tensor:
        maps = maps if maps.ndim == 4 else maps[:, None]
        projected = self.projection(min_max(maps.mean(1, keepdim=True)))
        return self.compare(projected.sigmoid() * maps.mean(1, keepdim=True), heatmaps, tokens)


@pytest.mark.parametrize("second_order", ["exact", "finite_difference"])
def test_an_alignment_with_weights_of_its_own(second_order: str, batch: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    alignment, model = Projected(), network()
    step = hx.HarmonizerLoss(
        model, alignment=alignment, second_order=second_order, lambda_weights=0.0
    )
    assert {id(p) for p in step.parameters()} == {
        id(p) for part in (model, alignment) for p in part.parameters()
    }
    step(*batch.values()).loss.backward()
    _, maps = hx.input_gradient(model, batch["images"], batch["labels"], create_graph=False)
    active = (batch["tokens"] > 0).float()
    rows = alignment(maps.requires_grad_(), batch["heatmaps"], active)
    want = torch.autograd.grad((rows * batch["tokens"]).sum() / 4, list(alignment.parameters()))
    for parameter, gradient in zip(alignment.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-7)
    assert all(p.grad is not None for p in model.parameters())
    step.zero_grad()
    batch["tokens"].zero_()  # no row for it, and every weight has a gradient all the same
    step(*batch.values()).loss.backward()
    assert all(p.grad is not None for p in step.parameters())
    twin = copy.deepcopy(step)
    assert twin.alignment is twin.options.alignment
    assert twin.alignment is not alignment


def test_compiled_steps(batch: dict[str, Tensor]) -> None:
    eager = gradients(network(), batch, alignment=ALIGNMENTS["masked bce"])
    model = network()
    step = hx.HarmonizerLoss(
        model, alignment=ALIGNMENTS["masked bce"], lambda_harmonization=10.0,
        compile={"backend": "aot_eager"},
    )  # fmt: skip
    step(*batch.values()).loss.backward()
    for p, want in zip(model.parameters(), eager, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-4, atol=1e-6 * float(want.abs().max()))


def test_what_the_step_refuses(batch: dict[str, Tensor]) -> None:
    model = network()
    own = MinMaxError()
    for option in (
        {"formulation": "paper"}, {"levels": 3}, {"backend": "reference"},
    ):  # fmt: skip
        name = next(iter(option))
        with pytest.raises(ValueError, match=f"{name}: expected it to be left out with an align"):
            hx.harmonizer_loss(model, **batch, alignment=own, **option)
    with pytest.raises(TypeError, match="alignment: expected a callable"):
        hx.HarmonizerLoss(model, alignment="bce")
    with pytest.raises(ValueError, match="distance: expected 'mse' with formulation='released'"):
        hx.harmonizer_loss(model, **batch, distance="l2")
    with pytest.raises(ValueError, match="distance: expected one of 'mse', 'l2', got 'l1'"):
        hx.HarmonizerLoss(model, formulation="paper", distance="l1")
    for wrong, kind, text in (
        (lambda m, h, t: m.mean(), ValueError, r"a loss for each row, shape \(3,\), got \(\)"),
        (lambda m, h, t: [1.0, 2.0, 3.0], ValueError, r"shape \(3,\), got list"),
        (lambda m, h, t: own(m.detach().requires_grad_(), h, t), hx.NoGraphError, "does not lead"),
        (lambda m, h, t: h.mean((1, 2)), hx.NoGraphError, "does not lead to them"),
    ):
        for _ in range(2):
            with pytest.raises(kind, match=text):
                hx.harmonizer_loss(model, **batch, alignment=wrong)
    with torch.no_grad(), warnings.catch_warnings():
        assert hx.harmonizer_loss(model, **batch, alignment=own).loss.isfinite()
