"""input_gradient and harmonizer_loss on real networks: values, gradients, rows, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import harmonizer_ext as hx

BATCH, CLASSES, SIZE = 6, 5, 16


class Attention(nn.Module):
    """A tiny vision transformer with PyTorch's fused attention, whose default kernel cannot be
    differentiated twice."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 4, stride=4)
        self.qkv = nn.Linear(8, 24)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).unsqueeze(1).chunk(3, -1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1)
        return self.head(x.mean(1))


def convolutional(batch_norm: bool = False) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6) if batch_norm else nn.Identity(),
        nn.Softplus(),
        nn.Conv2d(6, 6, 3, stride=2),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, CLASSES),
    )


MODELS = {
    "convolutional": convolutional,
    "batch norm": lambda: convolutional(True),
    "attention": Attention,
}


@pytest.fixture
def batch(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "images": torch.randn(BATCH, 3, SIZE, SIZE, generator=generator).double(),
        "labels": torch.randint(0, CLASSES, (BATCH,), generator=generator),
        "heatmaps": torch.rand(BATCH, SIZE, SIZE, generator=generator).double(),
        "tokens": torch.tensor([1, 0, 0, 1, 1, 0]),
    }


def _gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("name", MODELS)
def test_parameter_gradients_against_finite_differences(
    name: str, batch: dict[str, Tensor]
) -> None:
    # The paper's formulation: its value's derivative is its gradient, without a stop-gradient.
    torch.manual_seed(0)
    model = MODELS[name]().double()

    def loss() -> Tensor:
        out = hx.harmonizer_loss(model, **batch, formulation="paper", lambda_harmonization=3.0)
        return out.loss

    gradients = _gradients(model, loss())
    generator = torch.Generator().manual_seed(1)
    for parameter, grad in zip(model.parameters(), gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=generator).double()
        step = 1e-5
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step * direction)
            values.append(loss().item())
            with torch.no_grad():
                parameter.sub_(sign * step * direction)
        numeric = (values[0] - values[1]) / (2 * step)
        # Central differences: error of step^2 times a third derivative, and rounding of 1e-16/step.
        # The cut of a standardized map adds kinks, whose slope is continuous.
        assert abs(numeric - (grad * direction).sum().item()) <= 1e-4 * max(1, abs(numeric))


def test_terms_add_up(batch: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    model = convolutional().double()
    out = hx.harmonizer_loss(model, **batch, lambda_harmonization=2.0, lambda_weights=0.5)
    expected = out.cross_entropy + 2 * out.harmonization + 0.5 * out.weight_penalty
    torch.testing.assert_close(out.loss.detach(), expected, rtol=1e-14, atol=0)
    logits = model(batch["images"])
    torch.testing.assert_close(out.logits, logits.detach(), rtol=1e-12, atol=0)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    torch.testing.assert_close(out.cross_entropy, criterion(logits, batch["labels"]).detach())
    mapped = batch["tokens"].nonzero().squeeze(1)
    _, maps = hx.input_gradient(model, batch["images"], batch["labels"], create_graph=False)
    torch.testing.assert_close(out.saliency, maps[mapped], rtol=1e-10, atol=1e-16)
    std = maps[mapped].mean(1).std((1, 2), correction=0).mean()
    torch.testing.assert_close(out.saliency_std, std, rtol=1e-10, atol=0)
    loss = hx.harmonization_loss(maps.requires_grad_(), batch["heatmaps"], batch["tokens"]).detach()
    torch.testing.assert_close(out.harmonization, loss, rtol=1e-10, atol=0)
    for field in ("cross_entropy", "harmonization", "weight_penalty", "logits", "saliency_std"):
        assert not getattr(out, field).requires_grad


@pytest.mark.parametrize("name", MODELS)
def test_rows(name: str, batch: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().double()
    results = {}
    for rows in ("all", "mapped", "auto"):
        out = hx.harmonizer_loss(model, **batch, rows=rows)
        results[rows] = out, _gradients(model, out.loss)
    couples = name == "batch norm"
    mapped = int((batch["tokens"] != 0).sum())
    assert results["all"][0].saliency.shape[0] == BATCH
    assert results["mapped"][0].saliency.shape[0] == mapped
    # Batch statistics of three rows are not those of six: "auto" must not split the batch.
    assert results["auto"][0].saliency.shape[0] == (BATCH if couples else mapped)
    exact = ("auto",) if couples else ("mapped", "auto")
    for rows in exact:
        torch.testing.assert_close(
            results[rows][0].logits, results["all"][0].logits, rtol=1e-12, atol=1e-14
        )
        for got, want in zip(results[rows][1], results["all"][1], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-13)
    model.eval()
    assert hx.harmonizer_loss(model, **batch, rows="auto").saliency.shape[0] == mapped


def test_batch_without_any_map(batch: dict[str, Tensor]) -> None:
    model = convolutional().double()
    batch["tokens"] = torch.zeros(BATCH)
    batch["heatmaps"].fill_(torch.nan)
    for rows in ("all", "mapped"):
        out = hx.harmonizer_loss(model, **batch, rows=rows)
        assert out.harmonization == 0
        assert out.saliency_std == 0
        assert all(grad.isfinite().all() for grad in _gradients(model, out.loss))


def test_soft_labels_follow_one_hot(batch: dict[str, Tensor]) -> None:
    model = convolutional().double()
    hard = hx.harmonizer_loss(model, **batch)
    batch["labels"] = nn.functional.one_hot(batch["labels"], CLASSES).double()
    soft = hx.harmonizer_loss(model, **batch)
    torch.testing.assert_close(soft.loss, hard.loss, rtol=1e-12, atol=0)
    batch["labels"] = batch["labels"].roll(1, 0) / 2 + batch["labels"] / 2
    assert not torch.isclose(hx.harmonizer_loss(model, **batch).loss, hard.loss)


def test_values_without_gradients(batch: dict[str, Tensor]) -> None:
    model = convolutional().double()
    expected = hx.harmonizer_loss(model, **batch)
    with torch.no_grad():
        out = hx.harmonizer_loss(model, **batch)
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.loss, expected.loss.detach(), rtol=1e-12, atol=0)


def test_weight_penalty_leaves_out_what_the_released_one_does() -> None:
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(1, 2, 1),
            "bn1": nn.BatchNorm2d(2),
            "downsample": nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2)),
            "layer": nn.LayerNorm(2),
            "patch_embed": nn.Linear(2, 2),
            "frozen": nn.Linear(2, 2).requires_grad_(False),
        }
    )
    model.register_parameter("cls_token", nn.Parameter(torch.ones(2)))
    model.register_parameter("scale", nn.Parameter(torch.full((3,), 2.0)))
    model["tied"] = model["conv"]
    penalized = [*model["conv"].parameters(), model["downsample"][0].weight, model.scale]
    expected = sum(p.square().sum() for p in penalized) / 2
    torch.testing.assert_close(hx.weight_penalty(model), expected)


def test_explain_may_be_any_differentiable_explanation(batch: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    model = convolutional().double()

    def gradient_times_input(
        model: nn.Module, images: Tensor, targets: Tensor, *, create_graph: bool
    ) -> tuple[Tensor, Tensor]:
        logits, maps = hx.input_gradient(model, images, targets, create_graph=create_graph)
        return logits, (maps * images).sum(1, keepdim=True)

    out = hx.harmonizer_loss(model, **batch, explain=gradient_times_input)
    assert out.saliency.shape == (3, 1, SIZE, SIZE)
    default = hx.harmonizer_loss(model, **batch)
    changed = [
        not torch.allclose(a, b)
        for a, b in zip(_gradients(model, out.loss), _gradients(model, default.loss), strict=True)
    ]
    assert any(changed)

    def detached(
        model: nn.Module, images: Tensor, targets: Tensor, *, create_graph: bool
    ) -> tuple[Tensor, Tensor]:
        return hx.input_gradient(model, images, targets, create_graph=False)

    with pytest.raises(hx.NoGraphError, match="explain: expected maps that carry a graph"):
        hx.harmonizer_loss(model, **batch, explain=detached)


def test_detached_saliency_is_refused() -> None:
    maps, heatmaps = torch.randn(2, 3, 8, 8), torch.rand(2, 8, 8)
    with pytest.raises(hx.NoGraphError, match="create_graph=True"):
        hx.harmonization_loss(maps, heatmaps)
    with torch.no_grad():
        assert hx.harmonization_loss(maps, heatmaps) > 0
    with torch.inference_mode():
        assert hx.harmonization_loss(maps, heatmaps) > 0
    value = hx.harmonization_loss(maps.requires_grad_(), heatmaps).detach()
    with torch.no_grad():
        assert hx.harmonization_loss(maps, heatmaps) == value


def test_module_twin(batch: dict[str, Tensor]) -> None:
    maps = torch.randn(BATCH, 3, SIZE, SIZE, requires_grad=True)
    options = {"formulation": "paper", "levels": 3, "distance": "l2", "reduction": "sum"}
    module = hx.HarmonizationLoss(**options)
    args = (maps, batch["heatmaps"], batch["tokens"])
    assert torch.equal(module(*args), hx.harmonization_loss(*args, **options))
    assert "distance='l2'" in repr(module)


def test_input_gradient_errors() -> None:
    model = convolutional()
    images, labels = torch.randn(2, 3, SIZE, SIZE), torch.tensor([0, 1])
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        hx.input_gradient(model, images, labels, create_graph=False)
    with torch.no_grad():
        _, maps = hx.input_gradient(model, images, labels, create_graph=False)
    assert maps.shape == images.shape
    assert not maps.requires_grad
    with pytest.raises(TypeError, match=r"images: expected a floating-point dtype.*uint8"):
        hx.input_gradient(model, images.to(torch.uint8), labels, create_graph=False)
    with pytest.raises(ValueError, match=r"targets: expected class indices of shape \(2,\)"):
        hx.input_gradient(model, images, labels[:1], create_graph=False)
    with pytest.raises(ValueError, match="targets: expected soft labels"):
        hx.input_gradient(model, images, torch.rand(2, 3), create_graph=False)
    with pytest.raises(ValueError, match="model: expected logits"):
        hx.input_gradient(nn.Conv2d(3, 4, 1), images, labels, create_graph=False)
    with pytest.raises(RuntimeError, match="model: expected logits that depend on the images"):
        hx.input_gradient(lambda x: model(x).detach(), images, labels, create_graph=False)
    scored = hx.input_gradient(model, images, lambda logits: logits[:, 2], create_graph=False)
    same = hx.input_gradient(model, images, torch.tensor([2, 2]), create_graph=False)
    assert torch.equal(scored[1], same[1])


def test_step_errors(batch: dict[str, Tensor]) -> None:
    model = convolutional().double()
    with pytest.raises(ValueError, match="rows: expected one of 'auto', 'mapped', 'all'"):
        hx.harmonizer_loss(model, **batch, rows="some")
    with pytest.raises(ValueError, match="second_order: expected one of 'exact', 'finite_diff"):
        hx.harmonizer_loss(model, **batch, second_order="jvp")
    with pytest.raises(ValueError, match="reduction: expected one of 'mean', 'mean_valid'"):
        hx.harmonizer_loss(model, **batch, reduction="sum")
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match="scaler: expected None with an explain of your own"):
        hx.harmonizer_loss(model, **batch, explain=hx.input_gradient, scaler=scaler)
    with pytest.raises(ValueError, match=r"tokens: expected shape \(6,\)"):
        hx.harmonizer_loss(model, **(batch | {"tokens": torch.ones(5)}))
    with pytest.raises(ValueError, match="images: expected"):
        hx.harmonizer_loss(model, **(batch | {"images": batch["images"][0]}))
