"""A target whose gradient vanishes is an error; a saliency that is small is none, however small."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_networks import CLASSES, Through, Transformer, make_batch
from torch import Tensor, nn

import harmonizer_ext as hx
from harmonizer_ext.explanations import GradCAM, InputGradient, IntegratedGradients

SIZE = 8


@pytest.fixture
def batch(generator: torch.Generator) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return make_batch(generator, 4, SIZE)


def deep() -> nn.Module:
    """Kinks in every layer."""
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()]
    for _ in range(4):
        layers += [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 16))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "transformer": Transformer,
    "GELU": lambda: Through(nn.GELU()),
    "deep": deep,
}

#: Of embeddings (B, D) to (B,): at a maximum, constant, or flat.
VANISHING: dict[str, Callable[[Tensor], Tensor]] = {
    "cosine with its copy": lambda z: F.cosine_similarity(z, z.detach(), dim=1),
    "cosine with itself": lambda z: F.cosine_similarity(z, z, dim=1),
    "normalized dot product": lambda z: (
        F.normalize(z, dim=1) * F.normalize(z, dim=1).detach()
    ).sum(1),
    "distance to its copy": lambda z: -(z - z.detach()).square().sum(1),
    "cross entropy with itself": lambda z: (z.log_softmax(1) * z.softmax(1).detach()).sum(1),
    "length of a unit vector": lambda z: F.normalize(z, dim=1).norm(dim=1),
    "sum of probabilities": lambda z: z.softmax(1).sum(1),
    "saturated": lambda z: (1e12 * z).softmax(1).amax(1),
    "constant": lambda z: z.detach().sum(1) + 0 * z.sum(1),
    "sign": lambda z: z.sign().sum(1),
}

#: To be explained as they are, whatever their size.
REAL: dict[str, Callable[[Tensor], Tensor]] = {
    "logit": lambda z: z[:, 0],
    "tiny": lambda z: 1e-12 * z[:, 0],
    "tinier": lambda z: 1e-25 * z[:, 0],
    "far from zero": lambda z: z[:, 0] + 1e7,
    "probability": lambda z: z.softmax(1)[:, 0],
    "entropy": lambda z: -(z.softmax(1) * z.log_softmax(1)).sum(1),
    "cosine with another": lambda z: F.cosine_similarity(z, z.detach().roll(1, 0), dim=1),
    "one of a hundred": lambda z: z[:, 0] + 100 * F.cosine_similarity(z, z.detach(), dim=1),
    "sum": lambda z: z.sum(1),
}


def explained_by(target: Callable[[Tensor], Tensor], explain: Any = hx.input_gradient) -> Any:
    def run(model: Any, images: Tensor, labels: Tensor, *, create_graph: bool) -> Any:
        return explain(model, images, target, create_graph=create_graph)

    return run


@pytest.mark.parametrize(
    ("network", "dtype", "rows"),
    [
        ("transformer", torch.float32, 4),
        ("GELU", torch.float64, 4),
        ("deep", torch.float32, 4),
        ("GELU", torch.float32, 1),
    ],
)
@pytest.mark.parametrize("name", VANISHING)
def test_a_vanishing_gradient_is_an_error(
    name: str, network: str, dtype: torch.dtype, rows: int, batch: dict[str, Tensor]
) -> None:
    model = NETWORKS[network]().to(dtype)
    batch = {k: v[:rows] for k, v in batch.items()}
    batch["images"] = batch["images"].to(dtype)
    target = VANISHING[name]
    for _ in range(2):  # and again, where the error was caught
        with pytest.raises(ValueError, match=r"saliency: .* the gradient of the target vanishes"):
            hx.input_gradient(model, batch["images"], target, create_graph=True)
    with pytest.raises(ValueError, match="the gradient of the target vanishes"):
        hx.harmonizer_loss(model, **batch, explain=explained_by(target))
    # Maps alone are looked at by whoever asks for them.
    hx.input_gradient(model, batch["images"], target, create_graph=False)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", REAL)
def test_a_small_gradient_is_none(name: str, network: str, batch: dict[str, Tensor]) -> None:
    model = NETWORKS[network]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "saliency: the standard deviation of most maps")
        hx.input_gradient(model, batch["images"], REAL[name], create_graph=True)
        hx.harmonizer_loss(model, **batch, explain=explained_by(REAL[name]), rows="all")


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-7, 1e-12])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.filterwarnings("ignore:saliency. the standard deviation")
def test_networks_of_any_scale(
    network: str, scale: float, rows: int, batch: dict[str, Tensor]
) -> None:
    model = NETWORKS[network]().eval()
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        head.weight.mul_(scale)
    hx.harmonizer_loss(model, **{k: v[:rows] for k, v in batch.items()}).loss.backward()


class InRange(nn.Module):
    """A network that takes pixels of 0 to 1 alone, with a root that begins at black ones."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.LazyLinear(5))

    def forward(self, x: Tensor) -> Tensor:
        if x.min() < 0 or x.max() > 1:
            raise ValueError(f"images: expected 0..1, got {x.min():g}..{x.max():g}")
        logits: Tensor = self.features((x + 1e-8).sqrt())
        return logits


@pytest.mark.parametrize("black", [False, True])
def test_images_at_the_ends_of_their_range(black: bool, batch: dict[str, Tensor]) -> None:
    model = InRange()
    images = batch["images"] - batch["images"].amin()
    images = images / images.amax()
    if black:
        images = torch.where(images < 0.5, 0, images)
    model(images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hx.harmonizer_loss(model, **batch | {"images": images}).loss.backward()


@pytest.mark.parametrize("labelled", [1, 2, 3])
def test_rows_without_a_class(labelled: int, batch: dict[str, Tensor]) -> None:
    """Their maps are zero, and the others are as real as ever."""
    model = NETWORKS["GELU"]().eval()
    classes = model(batch["images"]).shape[1]
    labels = F.one_hot(batch["labels"], classes).float()
    labels[labelled:] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hx.harmonizer_loss(model, **batch | {"labels": labels})


@pytest.mark.parametrize("rows", [1, 4])
def test_under_autocast(rows: int, batch: dict[str, Tensor]) -> None:
    model, images = deep(), batch["images"][:rows]
    with torch.autocast("cpu", torch.bfloat16):
        hx.input_gradient(model, images, REAL["logit"], create_graph=True)
        for name in ("cosine with its copy", "constant", "sum of probabilities"):
            with pytest.raises(ValueError, match="the gradient of the target vanishes"):
                hx.input_gradient(model, images, VANISHING[name], create_graph=True)


@pytest.mark.parametrize(
    "explain", [InputGradient("l2"), IntegratedGradients(2), GradCAM("first", relu=False)]
)
def test_by_any_explanation(explain: Any, batch: dict[str, Tensor]) -> None:
    model = Through(nn.GELU())
    hx.harmonizer_loss(model, **batch, explain=explained_by(REAL["logit"], explain))
    for name in ("distance to its copy", "constant", "saturated"):
        with pytest.raises(ValueError, match="the gradient of the target vanishes"):
            hx.harmonizer_loss(model, **batch, explain=explained_by(VANISHING[name], explain))


class Similarities(nn.Module):
    """A network whose logits are similarities with the detached embeddings of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = Through(nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        z = self.embed(x)
        return F.cosine_similarity(z[:, None], z.detach()[None], dim=2)


@pytest.mark.parametrize("options", [{}, {"second_order": "finite_difference"}])
def test_networks_whose_own_output_is_flat(
    options: dict[str, Any], batch: dict[str, Tensor]
) -> None:
    """The label of each row is itself: the logit is at its maximum. Another label is not."""
    model = Similarities()
    batch["labels"] = torch.arange(4)
    if options:
        options["second_order"] = hx.FiniteDifference(compare=False)
        model.forward = lambda x: VANISHING["sum of probabilities"](model.embed(x))[:, None]
        batch["labels"] = torch.zeros(4, dtype=torch.long)
        with pytest.raises(ValueError, match="the gradient of the target vanishes"):
            hx.harmonizer_loss(model, **batch, **options)
        return
    with pytest.warns(UserWarning, match="maps of all 4 images of this batch are rounding"):
        hx.harmonizer_loss(model, **batch)
    batch["labels"] = torch.tensor([1, 2, 3, 0])
    hx.harmonizer_loss(Similarities(), **batch).loss.backward()


def test_compiled_steps(batch: dict[str, Tensor]) -> None:
    class Flat(Through):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).softmax(1).sum(1, keepdim=True).expand(-1, CLASSES)

    step = hx.HarmonizerLoss(Flat(nn.GELU()), compile={"backend": "aot_eager"})
    with pytest.raises(ValueError, match="the gradient of the target vanishes"):
        step(*batch.values())


# --- zero, and rightly so -------------------------------------------------------------------------


def test_a_head_that_starts_with_zeros_trains(batch: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    model = Through(nn.GELU())
    nn.init.zeros_(model.last.weight)
    nn.init.zeros_(model.last.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    told = []
    std = []
    for _ in range(4):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            out = hx.harmonizer_loss(model, **batch)
        told += [str(w.message) for w in caught if "maps of all 4 images" in str(w.message)]
        std.append(float(out.saliency_std))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    assert len(told) == 1
    assert "a head that starts with zeros goes on from its first update" in told[0]
    assert std[0] == 0
    assert all(s > 1e-5 for s in std[1:])


def test_equal_labels_before_batch_norm(batch: dict[str, Tensor]) -> None:
    """The sum of a batch of one normalized logit is a constant, for these labels alone."""
    torch.manual_seed(0)
    model = nn.Sequential(Through(nn.GELU()), nn.BatchNorm1d(CLASSES))
    same = batch | {"labels": torch.zeros(4, dtype=torch.long)}
    with pytest.warns(UserWarning, match="BatchNorm before the head leaves no gradient"):
        hx.harmonizer_loss(model, **same).loss.backward()
    hx.harmonizer_loss(model, **batch).loss.backward()


def test_gradients_that_float16_cannot_hold(batch: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    model = Through(nn.Tanh())
    with torch.no_grad():
        model.last.weight.mul_(1e-6)  # which float16 holds; but not its 36th part
    images = batch["images"].half()
    model = model.half()
    with pytest.raises(ValueError, match=r"float16, in which small gradients .*scaler="):
        hx.input_gradient(model, images, batch["labels"], create_graph=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    hx.input_gradient(model, images, batch["labels"], create_graph=True, scaler=scaler)


def test_maps_that_are_the_same_everywhere_are_no_noise(batch: dict[str, Tensor]) -> None:
    """A network of the mean colour has a constant gradient, which the loss cannot see."""
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, CLASSES))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = hx.harmonizer_loss(model, **batch)
    assert out.saliency.std((2, 3)).max() < 1e-7
    assert out.saliency.abs().max() > 1e-3


def test_looking_leaves_no_trace(batch: dict[str, Tensor]) -> None:
    results = []
    for first in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(deep(), nn.Dropout(0.5), nn.Linear(16, CLASSES))
        nn.init.zeros_(model[2].weight)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if first:
                torch.manual_seed(1)
                hx.input_gradient(model, batch["images"], batch["labels"], create_graph=True)
            torch.manual_seed(1)
            model.load_state_dict(model.state_dict())
            before = [t.clone() for t in model.state_dict().values()]
            found = hx.input_gradient(model, batch["images"], batch["labels"], create_graph=True)
        results.append([found[0].detach(), torch.get_rng_state()])
        names = [n for n, _ in model.named_parameters()]
        after = dict(model.named_parameters())
        kept = dict(zip(model.state_dict(), before, strict=True))
        assert all(torch.equal(after[n], kept[n]) for n in names)
        assert int(model[0][3].num_batches_tracked) == 1 + first  # one for each call
    assert torch.equal(results[0][1], results[1][1])


def test_a_network_that_nobody_can_repeat(batch: dict[str, Tensor]) -> None:
    """Its maps differ from pass to pass, and that is no sign of a gradient that vanishes."""
    numbers = iter(torch.randn(10_000, 4, 1, 1, generator=torch.Generator().manual_seed(0)))

    class Unrepeatable(Through):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * next(numbers)[:3])

    model = Unrepeatable(nn.GELU())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hx.input_gradient(model, batch["images"], batch["labels"], create_graph=True)
