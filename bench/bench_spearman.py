"""Alignment metrics and their usual loop: pytest bench/bench_spearman.py --benchmark-only"""

from __future__ import annotations

from typing import Any

import harness  # first of all: it sets what torch reads when it is loaded

# isort: split
import numpy as np
import pytest
import torch

from harmonizer_ext import alignment

SIZE = (224, 224)


def pair(batch: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Maps of a model, and of people: half of their pixels are 0."""
    model = torch.randn(batch, *SIZE, device=device)
    return model.abs(), (torch.randn_like(model) + model).clamp(min=0)


def scipy_loop(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    from scipy import stats  # the peer alone needs it

    pairs = zip(a.numpy(), b.numpy(), strict=True)
    return [stats.spearmanr(x.ravel(), y.ravel()).statistic for x, y in pairs]


def numpy_loop(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    """Dice as the released code does it."""
    results = []
    for x, y in zip(a.numpy(), b.numpy(), strict=True):
        x, y = (np.float32(m > np.percentile(m, 90)) for m in (x, y))
        results.append(2 * (x * y).sum() / ((x + y).sum() + 1e-9))
    return results


@pytest.mark.benchmark(group="spearman, 224x224 float32")
@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize(("device", "backend"), harness.targets())
def test_spearman(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, device: str, backend: str, batch: int
) -> None:
    if device == "cuda" and backend != "reference":
        pytest.skip("on a GPU there is PyTorch alone")
    monkeypatch.setenv("HARMONIZER_BACKEND", backend)
    a, b = pair(batch, device)
    benchmark(harness.finished(lambda: alignment.spearman(a, b), device))


@pytest.mark.benchmark(group="spearman, 224x224 float32")
@pytest.mark.parametrize("batch", [1, 32])
def test_scipy_loop(benchmark: Any, batch: int) -> None:
    pytest.importorskip("scipy.stats", reason="scipy (extra: test) is the peer here")
    a, b = pair(batch)
    benchmark(lambda: scipy_loop(a, b))


@pytest.mark.benchmark(group="dice, 224x224 float32")
@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("device", sorted({device for device, _ in harness.targets()}))
def test_dice(benchmark: Any, device: str, batch: int) -> None:
    a, b = pair(batch, device)
    benchmark(harness.finished(lambda: alignment.dice(a, b), device))


@pytest.mark.benchmark(group="dice, 224x224 float32")
@pytest.mark.parametrize("batch", [1, 32])
def test_numpy_loop(benchmark: Any, batch: int) -> None:
    a, b = pair(batch)
    benchmark(lambda: numpy_loop(a, b))
