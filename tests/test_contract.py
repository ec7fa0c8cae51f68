"""Every wrong argument gets an error that names it, what was expected, what came, the way out."""

from __future__ import annotations

import warnings

import pytest
import torch

import harmonizer_ext as hx
from harmonizer_ext import backends


def good() -> dict[str, object]:
    return {
        "saliency": torch.randn(2, 3, 8, 9, requires_grad=True),
        "heatmaps": torch.rand(2, 8, 9),
        "tokens": torch.tensor([1, 0]),
    }


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"saliency": 3}, TypeError, r"saliency: expected a torch.Tensor, got int"),
        ({"saliency": torch.rand(8, 9)}, ValueError, r"saliency: expected 3-D or 4-D.*\(8, 9\)"),
        ({"saliency": torch.zeros(2, 3, 8, 0)}, ValueError, r"saliency: .*at least one pixel"),
        ({"saliency": torch.zeros(2, 0, 8, 9)}, ValueError, r"saliency: .*at least one channel"),
        (
            {"saliency": torch.zeros(2, 3, 8, 9, dtype=torch.int32)},
            TypeError,
            r"saliency: expected dtype .*got int32; convert it with saliency.float\(\)",
        ),
        ({"heatmaps": torch.rand(2, 3, 8, 9)}, ValueError, r"heatmaps: expected one channel"),
        ({"heatmaps": torch.rand(1, 8, 9)}, ValueError, r"heatmaps: expected 2 rows.*\(1, 8, 9\)"),
        (
            {"heatmaps": torch.rand(2, 9, 8)},
            ValueError,
            r"heatmaps: expected maps of 8x9.*\(2, 9, 8\).*interpolate",
        ),
        ({"heatmaps": torch.zeros(2, 8, 9).bool()}, TypeError, r"heatmaps: expected dtype.*bool"),
        (
            {"heatmaps": torch.rand(2, 8, 9, device="meta")},
            ValueError,
            r"heatmaps: .*device of sal",
        ),
        ({"tokens": [1, 0]}, TypeError, r"tokens: expected a torch.Tensor or None, got list"),
        ({"tokens": torch.ones(3)}, ValueError, r"tokens: expected shape \(2,\).*\(3,\)"),
        (
            {"tokens": torch.tensor([1.0, -1.0])},
            ValueError,
            r"tokens: expected weights >= 0.*row 1",
        ),
        ({"tokens": torch.ones(2).to(torch.complex64)}, TypeError, r"tokens: expected bool"),
        ({"formulation": "published"}, ValueError, r"formulation: expected one of 'released', 'pa"),
        ({"distance": "l1"}, ValueError, r"distance: expected one of 'mse', 'l2', got 'l1'"),
        ({"distance": "l2"}, ValueError, r"distance: expected 'mse' with formulation='released'"),
        ({"reduction": "avg"}, ValueError, r"reduction: expected one of 'mean', 'mean_valid'"),
        ({"levels": 0}, ValueError, r"levels: expected 1 to 16, got 0"),
        ({"levels": 2.0}, TypeError, r"levels: expected an int, got float"),
        ({"backend": "gpu"}, ValueError, r"backend: expected one of .*'reference'.*got 'gpu'"),
        (
            {"heatmaps": torch.rand(2, 8, 9, requires_grad=True)},
            ValueError,
            r"heatmaps: expected data without a graph.*backend=\"reference\"",
        ),
        (
            {"tokens": torch.ones(2, requires_grad=True)},
            ValueError,
            r"tokens: expected data without a graph",
        ),
    ],
)
def test_loss_errors(changes: dict[str, object], error: type[Exception], text: str) -> None:
    if hx.available_backends("cpu")[0] == "reference" and "graph" in text:
        pytest.skip("only fused backends refuse what they cannot differentiate")
    hx.harmonization_loss(**good()).backward()
    with pytest.raises(error, match=text):
        hx.harmonization_loss(**(good() | changes))


def test_building_block_errors() -> None:
    with pytest.raises(ValueError, match=r"x: expected 2-D or 3-D or 4-D.*\(8,\)"):
        hx.gaussian_pyramid(torch.rand(8), 2)
    with pytest.raises(ValueError, match="levels: expected 1 to 16, got 17"):
        hx.gaussian_pyramid(torch.rand(8, 8), 17)
    with pytest.raises(TypeError, match="x: expected dtype"):
        hx.standardize_cut(torch.zeros(8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"b: expected the shape of a, \(1, 8, 8\)"):
        hx.positive_part_mse(torch.rand(1, 8, 8), torch.rand(1, 8, 7))


def test_named_backend_is_obeyed_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hx.available_backends("cpu")[-1] == "reference"
    monkeypatch.setattr(backends.get("cpu"), "why_not", lambda *_: "the test says so")
    assert hx.available_backends("cpu") == ("reference",)
    with pytest.raises(RuntimeError, match=r"backend='cpu' cannot run .*: the test says so"):
        hx.harmonization_loss(**good(), backend="cpu")
    monkeypatch.setenv("HARMONIZER_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match=r"\$HARMONIZER_BACKEND='cpu' cannot run"):
        hx.harmonization_loss(**good())
    monkeypatch.setenv("HARMONIZER_BACKEND", "reference")
    hx.harmonization_loss(**good()).backward()


def test_automatic_choice_says_once_what_it_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.get("cpu"), "why_not", lambda *_: "the test says so")
    monkeypatch.setattr(backends, "_announced", set())
    with pytest.warns(RuntimeWarning, match="'cpu' is passed over on cpu: the test says so"):
        hx.harmonization_loss(**good())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hx.harmonization_loss(**good())


def test_environment_variable_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARMONIZER_BACKEND", "reference")
    # Only the reference differentiates the human map: that it works shows who computed.
    heatmaps = torch.rand(2, 8, 9, requires_grad=True)
    hx.harmonization_loss(**(good() | {"heatmaps": heatmaps})).backward()
    assert heatmaps.grad.abs().max() > 0
