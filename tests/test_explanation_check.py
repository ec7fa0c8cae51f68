"""Maps that cannot teach, or teach something else, are refused, whatever made them and whenever."""

from __future__ import annotations

import copy
import functools
import gc
import importlib.util
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_networks import CLASSES, Transformer, gradients, make_batch
from torch import Tensor, nn

import harmonizer_ext as hx
from harmonizer_ext import explanation_check
from harmonizer_ext.explanations import Attribution, GradCAM, IntegratedGradients, SmoothGrad

SIZE = 8

needs_captum = pytest.mark.skipif(
    importlib.util.find_spec("captum") is None, reason="pip install --no-deps captum"
)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Softplus())
        self.more = nn.Sequential(nn.Conv2d(6, 5, 3, padding=1), nn.Softplus())
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.more(self.features(x)).mean((2, 3)))


@pytest.fixture
def batch(generator: torch.Generator) -> dict[str, Tensor]:
    return make_batch(generator, 4, SIZE)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Convolutions()


Explain = Callable[..., Any]


def then(change: Callable[..., Tensor]) -> Explain:
    """The input gradient, and what is done to it afterwards."""

    def explain(model: Any, images: Tensor, targets: Tensor, *, create_graph: bool) -> Any:
        logits, maps = hx.input_gradient(model, images, targets, create_graph=create_graph)
        return logits, change(maps, images)

    return explain


def of_a_copy(model: Any, images: Tensor, targets: Tensor, *, create_graph: bool) -> Any:
    twin = copy.deepcopy(model)
    return model(images), hx.input_gradient(twin, images, targets, create_graph=create_graph)[1]


def of_loose_weights(model: Any, images: Tensor, targets: Tensor, *, create_graph: bool) -> Any:
    weights = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
    run = functools.partial(torch.func.functional_call, model, weights)
    _, maps = hx.input_gradient(run, images, targets, create_graph=create_graph)
    return model(images), maps


BROKEN: dict[str, Explain] = {
    "made a leaf": then(lambda maps, images: maps.detach().requires_grad_()),
    "data": then(lambda maps, images: maps.data.requires_grad_()),
    "NumPy": then(lambda maps, images: torch.from_numpy(maps.detach().numpy()).requires_grad_()),
    "through the image": then(
        lambda maps, images: maps.detach() * images.detach().requires_grad_()
    ),
    "a new leaf": then(lambda maps, images: maps.detach() * torch.ones((), requires_grad=True)),
    "a copy": of_a_copy,
    "loose weights": of_loose_weights,
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("before", [None, hx.input_gradient, SmoothGrad(2)])
def test_maps_whose_graph_leads_nowhere(
    name: str, before: Any, model: nn.Module, batch: dict[str, Tensor]
) -> None:
    """The maps are refused whatever the network was explained by before, and once more after it."""
    hx.harmonizer_loss(model, **batch, explain=before)
    for _ in range(2):
        with pytest.raises(hx.SecondDerivativeError, match="reaches none of them"):
            hx.harmonizer_loss(model, **batch, explain=BROKEN[name])
    with torch.no_grad():  # values alone need no graph
        assert hx.harmonizer_loss(model, **batch, explain=BROKEN[name]).loss.isfinite()


@needs_captum
@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")
def test_attributions_of_captum(model: nn.Module, batch: dict[str, Tensor]) -> None:
    from captum import attr

    hx.harmonizer_loss(model, **batch)
    with pytest.raises(hx.SecondDerivativeError, match="reaches none of them"):
        hx.harmonizer_loss(model, **batch, explain=Attribution(attr.InputXGradient(model)))
    with pytest.raises(hx.NoGraphError, match="explain: expected maps that carry a graph"):
        hx.harmonizer_loss(model, **batch, explain=Attribution(attr.Saliency(model)))


# --- a graph that says nothing --------------------------------------------------------------------


def of_another_network(
    model: Any, images: Tensor, targets: Tensor, *, create_graph: bool
) -> tuple[Tensor, Tensor]:
    logits, maps = hx.input_gradient(model, images, targets, create_graph=create_graph)
    # One that follows the first, as a teacher does.
    twin = copy.deepcopy(model)
    _, others = hx.input_gradient(twin, images, targets, create_graph=create_graph)
    return logits, others + 0 * maps


SAYS_NOTHING: dict[str, Explain] = {
    "zero times": then(lambda maps, images: maps.detach() + 0 * maps),
    "rounded": then(lambda maps, images: (1e5 * maps).round()),
    "sign": then(lambda maps, images: maps.sign()),
    "another network": of_another_network,
}
SAYS_ENOUGH: dict[str, Explain] = {
    "half": then(lambda maps, images: (maps + maps.detach()) / 2),
    "straight through": then(
        lambda maps, images: maps + ((1e5 * maps).round() / 1e5 - maps).detach()
    ),
    "times the image": then(lambda maps, images: maps * images),
    "positive part": then(lambda maps, images: maps.relu()),
    "normalized": then(lambda maps, images: maps / maps.detach().abs().amax()),
    "blurred": then(lambda maps, images: F.avg_pool2d(maps, 3, 1, 1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SAYS_NOTHING)
def test_maps_whose_gradient_says_nothing(
    name: str, dtype: torch.dtype, model: nn.Module, batch: dict[str, Tensor]
) -> None:
    model, explain = model.to(dtype), SAYS_NOTHING[name]
    batch["images"] = batch["images"].to(dtype)
    for _ in range(2):
        with pytest.raises(hx.SecondDerivativeError, match="would teach the network nothing"):
            hx.harmonizer_loss(model, **batch, explain=explain)
    meant = functools.partial(explain)
    meant.partial_graph = True  # type: ignore[attr-defined]
    hx.harmonizer_loss(model, **batch, explain=meant)


@pytest.mark.parametrize("kinks", [False, True])
@pytest.mark.parametrize("name", SAYS_ENOUGH)
def test_maps_whose_gradient_says_enough(
    name: str, kinks: bool, model: nn.Module, batch: dict[str, Tensor]
) -> None:
    if kinks:
        model.features[1] = model.more[1] = nn.ReLU()
    hx.harmonizer_loss(model, **batch, explain=SAYS_ENOUGH[name]).loss.backward()


# --- a part of the graph --------------------------------------------------------------------------


def grad_cam(model: Any, images: Tensor, targets: Tensor, create_graph: bool, whole: bool) -> Any:
    """Grad-CAM behind ``features``, with the weights of the features as constants or not."""
    with torch.enable_grad():
        features = model.features(images)
        logits = model.head(model.more(features).mean((2, 3)))
        score = logits.gather(1, targets[:, None]).sum()
        (gradient,) = torch.autograd.grad(
            score, features, create_graph=whole and create_graph, retain_graph=True
        )
        return logits, (gradient.mean((2, 3), keepdim=True) * features).sum(1)


class Half:
    """A Grad-CAM that can be told to stop the gradient through its weights."""

    def __init__(self, whole: bool) -> None:
        self.whole = whole

    def __call__(self, model: Any, images: Tensor, targets: Tensor, *, create_graph: bool) -> Any:
        return grad_cam(model, images, targets, create_graph, self.whole)


def test_a_part_of_the_graph_is_not_all_of_it(model: nn.Module, batch: dict[str, Tensor]) -> None:
    hx.harmonizer_loss(model, **batch, explain=Half(whole=True)).loss.backward()
    with pytest.raises(
        hx.SecondDerivativeError,
        match=r"maps that change with .*(more\.0\.weight|head\.weight).*take them for a constant",
    ):
        hx.harmonizer_loss(model, **batch, explain=Half(whole=False))


def test_it_may_be_meant(model: nn.Module, batch: dict[str, Tensor]) -> None:
    explain = Half(whole=False)
    explain.partial_graph = True  # type: ignore[attr-defined]
    hx.harmonizer_loss(model, **batch, explain=explain).loss.backward()


@needs_captum
def test_grad_cam_of_captum(model: nn.Module, batch: dict[str, Tensor]) -> None:
    from captum import attr

    def resized(images: Tensor, labels: Tensor) -> Tensor:
        maps = attr.LayerGradCam(model, model.features).attribute(images, target=labels)
        return F.interpolate(maps, images.shape[-2:], mode="bilinear")

    with pytest.raises(hx.SecondDerivativeError, match="maps that change with"):
        hx.harmonizer_loss(model, **batch, explain=Attribution(resized, reduce="mean"))
    hx.harmonizer_loss(model, **batch, explain=GradCAM("features", relu=False)).loss.backward()


def activation(model: Any, images: Tensor, targets: Tensor, *, create_graph: bool) -> Any:
    """Depends on the first layers, and on them alone."""
    features = model.features(images)
    return model(images), features.square().mean(1)


def class_map(model: Any, images: Tensor, targets: Tensor, *, create_graph: bool) -> Any:
    """Class activation mapping: no gradient at all, and the head's weights take part."""
    features = model.more(model.features(images))
    maps = torch.einsum("bchw,bc->bhw", features, model.head.weight[targets])
    return model.head(features.mean((2, 3))), maps


class Projected(nn.Module):
    """The input gradient through a learned projection of its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, 1, 1)

    def forward(self, model: Any, images: Tensor, targets: Tensor, *, create_graph: bool) -> Any:
        logits, maps = hx.input_gradient(model, images, targets, create_graph=create_graph)
        return logits, self.projection(maps)


WHOLE: dict[str, Callable[[], Explain]] = {
    "features": lambda: activation,
    "class activation": lambda: class_map,
    "projection": Projected,
    "integrated gradients": lambda: IntegratedGradients(2),
    "SmoothGrad that draws": lambda: SmoothGrad(2, seed=None),
    "Grad-CAM": lambda: GradCAM("more", relu=False),
}


@pytest.mark.parametrize("name", WHOLE)
def test_explanations_that_are_whole(name: str, model: nn.Module, batch: dict[str, Tensor]) -> None:
    explain = WHOLE[name]()
    before = [t.clone() for t in model.state_dict().values()]
    torch.manual_seed(0)
    first = gradients(model, batch, explain=explain)
    torch.manual_seed(0)
    again = gradients(model, batch, explain=explain)  # known now
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(model.state_dict().values(), before, strict=True):
        assert torch.equal(a, b)


def test_a_mean_of_dead_ends_is_whole_where_the_network_is(batch: dict[str, Tensor]) -> None:
    """Biases behind which the network is linear are in no graph of a saliency, and change none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardtanh(), nn.Flatten(), nn.Linear(144, CLASSES))
    explain = then(lambda maps, images: (maps * images).sum(1))
    hx.harmonizer_loss(model, **batch, explain=explain).loss.backward()


# --- logits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["detached", "copy", "shape", "three", "maps"])
def test_what_else_an_explanation_may_return(
    how: str, model: nn.Module, batch: dict[str, Tensor]
) -> None:
    def explain(model: Any, images: Tensor, targets: Tensor, *, create_graph: bool) -> Any:
        logits, maps = hx.input_gradient(model, images, targets, create_graph=create_graph)
        return {
            "detached": (logits.detach(), maps),
            "copy": (copy.deepcopy(model)(images), maps),
            "shape": (logits[:2], maps),
            "three": (logits, maps, maps),
            "maps": (logits, maps.detach().numpy()),
        }[how]

    kind, text = {
        "detached": (hx.NoGraphError, "expected logits that carry a graph"),
        "copy": (hx.NoGraphError, r"logits whose graph reaches none of them \(those of a copy\?\)"),
        "shape": (ValueError, r"expected logits \(4, classes\).*got \(2, 4\)"),
        "three": (TypeError, r"expected a tuple \(logits, maps\), got 3 values"),
        "maps": (TypeError, r"expected maps in a torch\.Tensor, got ndarray"),
    }[how]
    with pytest.raises(kind, match=text):
        hx.harmonizer_loss(model, **batch, explain=explain)


# --- once, and not for another --------------------------------------------------------------------


def count_checks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    checks: list[int] = []
    check = explanation_check._check_whole
    monkeypatch.setattr(
        explanation_check, "_check_whole", lambda *a: (checks.append(1), check(*a))[1]
    )
    return checks


def test_each_explanation_is_looked_at_once(
    model: nn.Module, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = count_checks(monkeypatch)

    def after(explain: Explain) -> int:
        before = len(checks)
        hx.harmonizer_loss(model, **batch, explain=explain)
        return len(checks) - before

    assert [after(GradCAM("more", relu=False)) for _ in range(3)] == [1, 0, 0]  # made anew
    assert [after(then(lambda maps, images: maps * 2)) for _ in range(3)] == [1, 0, 0]
    assert after(GradCAM("features", relu=False)) == 1
    model.eval()
    assert [after(GradCAM("features", relu=False)) for _ in range(2)] == [1, 0]
    model.head.requires_grad_(False)
    assert [after(GradCAM("features", relu=False)) for _ in range(2)] == [1, 0]


def test_an_explanation_that_is_set_differently_is_another(
    model: nn.Module, batch: dict[str, Tensor]
) -> None:
    explain = Half(whole=True)
    hx.harmonizer_loss(model, **batch, explain=explain)
    explain.whole = False
    with pytest.raises(hx.SecondDerivativeError, match="maps that change with"):
        hx.harmonizer_loss(model, **batch, explain=explain)


FLAGS = {"detach": False}


def test_a_setting_that_is_not_the_explanations_own(
    model: nn.Module, batch: dict[str, Tensor]
) -> None:
    explain = then(lambda maps, images: maps.detach().requires_grad_() if FLAGS["detach"] else maps)
    hx.harmonizer_loss(model, **batch, explain=explain)
    FLAGS["detach"] = True
    try:
        with pytest.raises(hx.SecondDerivativeError, match="reaches none of them"):
            hx.harmonizer_loss(model, **batch, explain=explain)
    finally:
        FLAGS["detach"] = False


def test_numbers_of_objects_that_are_gone(batch: dict[str, Tensor]) -> None:
    """Networks and explanations that come where others were are looked at."""
    for number in range(10):
        model = Transformer()
        broken = number % 2 == 1
        explain = Closure(broken)
        gone = weakref.ref(explain)
        if broken:
            with pytest.raises(hx.SecondDerivativeError):
                hx.harmonizer_loss(model, **batch, explain=explain)
        else:
            hx.harmonizer_loss(model, **batch, explain=explain)
        del explain, model
        gc.collect()
        assert gone() is None  # nothing keeps them


class Closure:
    def __init__(self, broken: bool) -> None:
        self.change = (lambda maps: maps.detach().requires_grad_()) if broken else (lambda m: m)

    def __call__(self, model: Any, images: Tensor, targets: Tensor, *, create_graph: bool) -> Any:
        logits, maps = hx.input_gradient(model, images, targets, create_graph=create_graph)
        return logits, self.change(maps)


def test_the_module_twin(model: nn.Module, batch: dict[str, Tensor]) -> None:
    hx.HarmonizerLoss(model)(*batch.values())
    with pytest.raises(hx.SecondDerivativeError, match="maps that change with"):
        hx.HarmonizerLoss(model, explain=Half(whole=False))(*batch.values())


def test_compiled_steps(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """A compiled graph shows no parameters: it is looked at before."""

    def step(explain: Explain) -> hx.HarmonizerOutput:
        out: hx.HarmonizerOutput = hx.HarmonizerLoss(
            model, explain=explain, compile={"backend": "aot_eager"}
        )(*batch.values())
        return out

    with pytest.raises(hx.SecondDerivativeError, match="reaches none of them"):
        step(BROKEN["made a leaf"])
    with pytest.raises(hx.SecondDerivativeError, match="maps that change with"):
        step(Half(whole=False))
    step(then(lambda maps, images: 2 * maps)).loss.backward()
    assert model.head.weight.grad is not None
