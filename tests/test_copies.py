"""A copy computes with its own weights and sends gradients to them, whatever it is copied by."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_networks import Through, make_batch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import harmonizer_ext as hx
from harmonizer_ext.explanations import Attribution, GradCAM, GradientTimesInput


@pytest.fixture
def batch(generator: torch.Generator) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return make_batch(generator, 4, 8) | {"tokens": torch.tensor([1.0, 0, 1, 0])}


def network() -> nn.Module:
    torch.manual_seed(0)
    return Through(nn.GELU())


def saved(step: Any) -> Any:
    file = io.BytesIO()
    torch.save(step, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def averaged(step: Any) -> Any:
    return AveragedModel(step).module


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "AveragedModel": averaged,
    "pickle": lambda step: pickle.loads(pickle.dumps(step)),
    "torch.save": saved,
    "deepcopy of a list": lambda step: copy.deepcopy([step])[0],
    "deepcopy of a copy": lambda step: copy.deepcopy(copy.deepcopy(step)),
}
OPTIONS: dict[str, Callable[[nn.Module], dict[str, Any]]] = {
    "eager": lambda model: {},
    "compiled": lambda model: {"compile": {"backend": "aot_eager"}},
    "explained by a layer": lambda model: {"explain": GradCAM(model.first, relu=False)},
    "explained by an object": lambda model: {"explain": Attribution(Holding(model))},
    "explained": lambda model: {"explain": GradientTimesInput("mean"), "formulation": "paper"},
}


class Holding:
    """An attribution that holds its model, as those of Captum do."""

    def __init__(self, model: nn.Module) -> None:
        self.forward_func = model

    def attribute(self, images: Tensor, target: Tensor) -> Tensor:
        score = self.forward_func(images).gather(1, target[:, None]).sum()
        return torch.autograd.grad(score, images, create_graph=True)[0].mean(1)


def run(step: Any, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    for parameter in step.parameters():
        parameter.grad = None
    out = step(*batch.values())
    out.loss.backward()
    return out.loss.detach(), [p.grad for p in step.parameters()]


CASES = [(how, options, True) for how in COPIES for options in OPTIONS if options != "compiled"]
# Each is compiled twice.
CASES += [(how, "compiled", False) for how in ("deepcopy", "AveragedModel", "torch.save")]
CASES += [("deepcopy", "compiled", True), ("pickle", "eager", False)]


@pytest.mark.parametrize(("how", "options", "called_before"), CASES)
def test_a_copy_has_weights_of_its_own(
    how: str, options: str, called_before: bool, batch: dict[str, Tensor]
) -> None:
    model = network()
    step = hx.HarmonizerLoss(model, lambda_harmonization=3.0, **OPTIONS[options](model))
    if called_before:
        run(step, batch)
    twin = COPIES[how](step)
    assert {id(p) for p in twin.parameters()}.isdisjoint(id(p) for p in step.parameters())
    for part in (step, twin):
        for parameter in part.parameters():
            parameter.grad = None
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    other = network()
    other.load_state_dict(twin.model.state_dict())
    fresh = hx.HarmonizerLoss(other, lambda_harmonization=3.0, **OPTIONS[options](other))
    (loss, got), (expected, want) = run(twin, batch), run(fresh, batch)
    assert torch.equal(loss, expected)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert all(p.grad is None for p in step.parameters())
    assert loss != run(step, batch)[0]


def test_a_shallow_copy_shares_them(batch: dict[str, Tensor]) -> None:
    step = hx.HarmonizerLoss(network(), compile={"backend": "aot_eager"})
    twin = copy.copy(step)
    assert twin.model is step.model
    assert torch.equal(run(twin, batch)[0], run(step, batch)[0])
    twin.model = network().requires_grad_(False)  # and nothing else
    assert step.model is not twin.model


def test_averaged_weights_are_evaluated(batch: dict[str, Tensor]) -> None:
    """The average of two steps, by hand."""
    step = hx.HarmonizerLoss(network(), compile={"backend": "aot_eager"})
    average = AveragedModel(step)
    with torch.no_grad():
        for parameter in step.parameters():
            parameter.mul_(2.0)
    average.update_parameters(step)  # the first takes the weights
    with torch.no_grad():
        for parameter in step.parameters():
            parameter.mul_(2.0)
    average.update_parameters(step)
    other = network()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(3.0)
        want = hx.harmonizer_loss(other, **batch).loss
        torch.testing.assert_close(average(*batch.values()).loss, want, rtol=1e-6, atol=0)


# --- what cannot follow a copy --------------------------------------------------------------------


def test_functions_do_not_follow_a_copy(batch: dict[str, Tensor]) -> None:
    model = network()
    for function in (lambda x: model(x), Object(lambda x: model(x))):
        with pytest.raises(
            TypeError, match=r"expected a torch\.nn\.Module in a HarmonizerLoss that"
        ):
            copy.deepcopy(hx.HarmonizerLoss(function))
    held = copy.deepcopy(hx.HarmonizerLoss(Object(model)))
    assert held.model.part is not model
    bound = copy.deepcopy(hx.HarmonizerLoss(model.forward))
    assert bound.model.__self__ is not model


class Object:
    def __init__(self, part: Any) -> None:
        self.part = part

    def __call__(self, x: Tensor) -> Tensor:
        return self.part(x)


def test_an_option_that_refers_to_the_original_is_said(batch: dict[str, Tensor]) -> None:
    model = network()

    def explain(_: Any, images: Tensor, targets: Any, *, create_graph: bool) -> Any:
        return hx.input_gradient(model, images, targets, create_graph=create_graph)

    step = hx.HarmonizerLoss(model, explain=explain)
    run(step, batch)
    with pytest.warns(UserWarning, match="explain: a function that refers to the model itself"):
        twin = copy.deepcopy(step)
    with pytest.raises((hx.SecondDerivativeError, hx.NoGraphError), match="reaches none of them"):
        run(twin, batch)
    with pytest.warns(UserWarning, match="criterion: a function that refers to the model itself"):
        copy.deepcopy(
            hx.HarmonizerLoss(
                model, criterion=lambda logits, y: logits.sum() + model.last.weight.sum()
            )
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.deepcopy(hx.HarmonizerLoss(model, criterion=lambda logits, y: logits.sum()))


@pytest.fixture
def group(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def test_what_belongs_to_the_process_is_shared(group: Any, batch: dict[str, Tensor]) -> None:
    scaler = torch.amp.GradScaler("cpu")
    options = {"reduction": "mean_valid", "process_group": group, "scaler": scaler}
    step = hx.HarmonizerLoss(network(), **options)
    twin = copy.deepcopy(step)
    assert twin.options.process_group is group
    assert twin.options.scaler is scaler
    assert torch.equal(run(twin, batch)[0], run(step, batch)[0])
    assert copy.copy(step).options.process_group is group
    with pytest.raises(TypeError, match=r"process_group: .*save state_dict\(\)"):
        pickle.dumps(step)


def test_meters(group: Any) -> None:
    maps = torch.rand(3, 6, 6)
    for meter in (
        hx.alignment.AlignmentMeter(process_group=group), hx.alignment.AlignmentMeter(),
    ):  # fmt: skip
        meter.update(maps, maps.roll(1, 0))
        for twin in (copy.deepcopy(meter), copy.copy(meter)):
            twin.update(maps, maps)
            assert twin.process_group is meter.process_group
            assert len(twin.compute(gather=False).values["spearman"]) == 6
            assert len(meter.compute(gather=False).values["spearman"]) == 3
    again = pickle.loads(pickle.dumps(meter))
    assert torch.equal(
        again.compute(gather=False).values["spearman"],
        meter.compute(gather=False).values["spearman"],
    )
    with pytest.raises(TypeError, match=r"AlignmentMeter that is saved.*save the result of comp"):
        pickle.dumps(hx.alignment.AlignmentMeter(process_group=group))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_other_objects(how: str, batch: dict[str, Tensor]) -> None:
    loss = hx.HarmonizationLoss(formulation="paper", distance="l2")
    maps = torch.randn(4, 8, 8, requires_grad=True)
    twin = COPIES[how](loss)
    assert torch.equal(twin(maps, batch["heatmaps"]), loss(maps, batch["heatmaps"]))
    model = network()
    for explain in (GradientTimesInput(), GradCAM("first"), Attribution(Holding(model))):
        pair = COPIES[how]([model, explain])
        _, got = pair[1](pair[0], batch["images"], batch["labels"], create_graph=True)
        _, want = explain(model, batch["images"], batch["labels"], create_graph=True)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)
        grads = torch.autograd.grad(got.sum(), list(pair[0].parameters()), allow_unused=True)
        assert sum(float(g.abs().sum()) for g in grads if g is not None) > 0
    # By itself it would be of another model than the one that it is called with, which is refused.
    alone = COPIES[how](Attribution(Holding(model)))
    with pytest.raises(ValueError, match="explain: expected an attribution of this model"):
        alone(model, batch["images"], batch["labels"], create_graph=True)
