"""The recipes of docs/recipes.md, run as they are printed there."""

from __future__ import annotations

import copy
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import timm_networks
import torch
from small_networks import CLASSES, Transformer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import harmonizer_ext as hx

SIZE = 16
PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"
RECIPES = dict(re.findall(r"```python (\w+)\n(.*?)```", PAGE.read_text(), re.DOTALL))


def loader(generator: torch.Generator, rows: int = 12) -> DataLoader[Any]:
    tokens = (torch.arange(rows) % 3 == 0).float()
    samples = [
        (
            torch.randn(3, SIZE, SIZE, generator=generator),
            torch.rand(1, SIZE, SIZE, generator=generator),
            row % CLASSES,
            tokens[row],
        )
        for row in range(rows)
    ]
    return DataLoader(samples, batch_size=4)  # type: ignore[arg-type]


def run(name: str, model: nn.Module, batches: Any) -> dict[str, Any]:
    names: dict[str, Any] = {"model": model, "loader": batches, "__name__": "recipe"}
    exec(compile(RECIPES[name], f"docs/recipes.md {name}", "exec"), names)
    return names


def plainly(model: nn.Module, batches: Any, accumulate: int = 1, **options: Any) -> nn.Module:
    """The same training, by hand."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for index, (images, heatmaps, labels, tokens) in enumerate(batches):
        out = hx.harmonizer_loss(model, images, labels, heatmaps, tokens, **options)
        (out.loss / accumulate).backward()
        if (index + 1) % accumulate == 0 or index + 1 == len(batches):
            optimizer.step()
            optimizer.zero_grad()
    return model


def assert_same_weights(
    got: nn.Module, expected: nn.Module, start: nn.Module, atol: float = 1e-6
) -> None:
    """Element by element; and the weights have moved, the alignment's share of it included."""
    moved = 0.0
    for a, b, c in zip(got.parameters(), expected.parameters(), start.parameters(), strict=True):
        # The same operations in the same order on one thread or two: a few roundings of float32,
        # which AdamW divides by a gradient of the same size.
        torch.testing.assert_close(a.detach().cpu(), b.detach(), rtol=1e-5, atol=atol)
        moved += float((b - c).detach().abs().sum())
    assert moved > 0


@pytest.fixture
def model(generator: torch.Generator) -> nn.Module:
    torch.manual_seed(0)
    return Transformer()


def test_every_recipe_is_tested():
    assert set(RECIPES) == {
        *("plain", "alignment", "projection"),
        *("lightning", "accelerate", "timm"),
    }


def test_plain(model: nn.Module, generator: torch.Generator):
    batches, start = loader(generator), copy.deepcopy(model)
    expected = plainly(model, batches)
    run("plain", model, batches)
    assert_same_weights(model, expected, start)


def test_alignment(model: nn.Module, generator: torch.Generator):
    batches, start = loader(generator), copy.deepcopy(model)
    expected = plainly(
        model,
        batches,
        explain=hx.explanations.InputGradient("abs_max"),
        alignment=hx.map_losses.BinaryCrossEntropy(masked=True),
    )
    run("alignment", model, batches)
    assert_same_weights(model, expected, start)


def test_projection(model: nn.Module, generator: torch.Generator):
    """Network and projection, against the loss written out by hand for one batch after another."""
    batches, twin, start = loader(generator), copy.deepcopy(model), copy.deepcopy(model)
    torch.manual_seed(1)
    projection = nn.Conv2d(1, 1, 1)
    first = copy.deepcopy(projection)
    torch.manual_seed(1)
    step = run("projection", model, batches)["step"]
    parameters = [*twin.parameters(), *projection.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    for images, heatmaps, labels, tokens in batches:
        with hx.exact_attention():
            logits, maps = hx.input_gradient(twin, images, labels, create_graph=True)
            total = torch.zeros(())
            for row in tokens.nonzero().flatten().tolist():
                m, h = (
                    (x - x.min()) / (x.max() - x.min())
                    for x in (maps[row].abs().amax(0), heatmaps[row, 0])
                )
                z = projection(m[None, None])[0, 0]
                pixels = h * nn.functional.softplus(-z) + (1 - h) * nn.functional.softplus(z)
                total = total + pixels[h > 0].mean() / len(tokens)
            loss = criterion(logits, labels) + total + 1e-5 * hx.weight_penalty(twin)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # Other operations in another order: AdamW makes a step of 1e-3 of a gradient that is rounding.
    assert_same_weights(model, twin, start, atol=1e-4)
    assert_same_weights(step.alignment, projection, first, atol=1e-4)
    assert (projection.weight - first.weight).abs() > 1e-3


# Of classes of its own, which the process that collects the results would import, and torchvision
# with them, without what import_torchvision does first.
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_lightning(model: nn.Module, generator: torch.Generator, tmp_path, monkeypatch):
    if importlib.util.find_spec("torchvision"):  # which Lightning imports where it is
        timm_networks.import_torchvision()
    pytest.importorskip("lightning", reason="the recipe needs pip install lightning")
    monkeypatch.chdir(tmp_path)  # it writes its log where it stands
    batches, start = loader(generator), copy.deepcopy(model)
    expected = plainly(model, batches)
    names = run("lightning", model, batches)
    assert_same_weights(model, expected, start)
    assert -1 <= float(names["trainer"].callback_metrics["alignment"]) <= 1


def test_accelerate(model: nn.Module, generator: torch.Generator):
    pytest.importorskip("accelerate", reason="the recipe needs pip install accelerate")
    batches, start = loader(generator), copy.deepcopy(model)
    expected = plainly(model, batches, accumulate=2)
    names = run("accelerate", model, batches)
    assert_same_weights(names["accelerator"].unwrap_model(names["model"]), expected, start)


def test_timm(model: nn.Module, generator: torch.Generator):
    reason = timm_networks.why_no_timm()
    if reason is not None:
        pytest.skip(reason)
    batches, start = loader(generator), copy.deepcopy(model)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    expected = plainly(model, batches, criterion=criterion, lambda_weights=0.0)
    task = run("timm", model, batches)["HarmonizedTask"](model, criterion)
    task.setup_ema(decay=0.5)
    optimizer = torch.optim.AdamW(task.get_trainable_module().parameters(), lr=1e-3)
    for update, (images, heatmaps, labels, tokens) in enumerate(batches):  # as its train.py does
        result: dict[str, Tensor] = task(images, (labels, heatmaps, tokens))
        result["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step=update)
    assert result["output"].shape == (4, CLASSES)
    assert_same_weights(task.get_eval_model(), expected, start)
