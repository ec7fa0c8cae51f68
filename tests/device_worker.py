"""The loss and the step on a device without memory: what test_devices.py runs in a process.

A tensor there has a device, a shape and a dtype, and no values: whatever would wait for a value, or
mix two devices, is an error. So it is seen without a GPU that a step does neither on one.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from small_networks import Through, Transformer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import harmonizer_ext as hx
from harmonizer_ext import alignment, backends, diagnostics, explanations, rows, vanishing

DEVICE = "gpu"
_setup_privateuseone_for_python_backend(DEVICE)
backends.PREFERENCE[DEVICE] = backends.PREFERENCE["cuda"]

FUSED = ("cuda", "triton")
NETWORKS = {
    "transformer": Transformer,
    "gelu": lambda: Through(nn.GELU()),
    "group norm": lambda: Through(nn.GroupNorm(2, 4)),
    "grouped convolution": lambda: Through(nn.Conv2d(4, 4, 3, padding=1, groups=4)),
}
OPTIONS = (
    *({}, {"rows": "all"}, {"formulation": "paper"}, {"gradient_norms": True}),
    *({"reduction": "mean_valid"}, {"lambda_weights": 0.0}, {"levels": 1}),
)


@pytest.fixture(autouse=True)
def without_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in FUSED:
        monkeypatch.setattr(
            backends.get(name), "why_not", lambda kind, *_: None if kind == DEVICE else "no"
        )
    # It looks at values once, in the first step of a network.
    monkeypatch.setattr(vanishing, "check", lambda *_, **__: None)
    # It reads in the background on CUDA alone, which tests/test_step_gpu.py shows.
    monkeypatch.setattr(diagnostics, "watch_epsilon", lambda std: None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def maps() -> Tensor:
    return torch.randn(4, 3, 32, 32, device=DEVICE, requires_grad=True)


def heatmaps() -> Tensor:
    return torch.rand(4, 32, 32, device=DEVICE)


def network(name: str) -> nn.Module:
    with torch.device(DEVICE):
        return NETWORKS[name]()


def step(model: nn.Module, **options: object) -> hx.HarmonizerOutput:
    labels = torch.zeros(4, dtype=torch.long, device=DEVICE)
    return hx.harmonizer_loss(model, maps().detach(), labels, heatmaps(), **options)


def test_a_value_that_is_waited_for_is_an_error() -> None:
    with pytest.raises(DataDependentOutputException):
        float(maps().detach().sum())


def test_two_devices_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="device"):
        maps() + torch.ones(4, 3, 32, 32)


@pytest.mark.parametrize("reduction", ["mean", "mean_valid", "sum", "none"])
@pytest.mark.parametrize("formulation", ["released", "paper"])
@pytest.mark.parametrize("backend", [*FUSED, None])
def test_loss(backend: str | None, formulation: str, reduction: str) -> None:
    saliency, tokens = maps(), torch.ones(4, device=DEVICE)
    options = {"formulation": formulation, "reduction": reduction, "backend": backend}
    loss = hx.harmonization_loss(saliency, heatmaps(), tokens, **options)
    loss.sum().backward()
    assert loss.device.type == saliency.grad.device.type == DEVICE
    assert loss.shape == ((4,) if reduction == "none" else ())


@pytest.mark.parametrize("backend", FUSED)
def test_building_blocks(backend: str) -> None:
    saliency = maps()
    total = sum(level.sum() for level in hx.gaussian_pyramid(saliency, 5, backend=backend))
    total = total + hx.standardize_cut(saliency, backend=backend).sum()
    total = total + hx.positive_part_mse(saliency[:, 0], heatmaps(), backend=backend).sum()
    total.backward()
    assert saliency.grad.device.type == DEVICE


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rows": "all"},
        {"formulation": "paper"},
        {"gradient_norms": True},
        {"reduction": "mean_valid"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", NETWORKS)
def test_step(name: str, options: dict[str, object]) -> None:
    model = network(name)
    out = step(model, **options)
    out.loss.backward()
    assert {p.grad.device.type for p in model.parameters()} == {DEVICE}


@pytest.mark.parametrize("name", NETWORKS)
def test_step_of_some_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Which rows is read from tokens on the CPU, whose values this mode would not tell.
    parts = (torch.arange(2, device=DEVICE), torch.arange(2, 4, device=DEVICE))
    split = rows.Split(*parts, torch.arange(4, device=DEVICE))
    monkeypatch.setattr(rows, "split", lambda *_: split)
    model = network(name)
    out = step(model)
    assert out.logits.shape[0] == 4
    out.loss.backward()
    assert {p.grad.device.type for p in model.parameters()} == {DEVICE}


@pytest.mark.parametrize("name", NETWORKS)
def test_step_without_gradients(name: str) -> None:
    model = network(name)
    with torch.no_grad():
        assert step(model).loss.device.type == DEVICE


@pytest.mark.parametrize("name", ["InputGradient", "GradientTimesInput", "SmoothGrad"])
def test_explanations(name: str) -> None:
    labels = torch.zeros(4, dtype=torch.long, device=DEVICE)
    explain = getattr(explanations, name)()
    for create_graph in (False, True):
        _, found = explain(network("gelu"), maps().detach(), labels, create_graph=create_graph)
        assert found.device.type == DEVICE


@pytest.mark.parametrize("metric", ["spearman", "pearson", "dice", "iou"])
def test_alignment(metric: str) -> None:
    scores = getattr(alignment, metric)(heatmaps(), heatmaps())
    assert scores.device.type == DEVICE
