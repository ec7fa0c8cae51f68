"""check_gradients: right networks pass, every kind of wrong gradient is found and named."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import harmonizer_ext as hx
from harmonizer_ext import gradient_check
from harmonizer_ext.gradient_check import GradientCheck, OracleResult, check_gradients

BATCH, CLASSES, SIZE = 3, 5, 16


def convolutional(
    activation: Callable[[], nn.Module] = nn.SiLU, norm: bool = False, dropout: float = 0.0
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6) if norm else nn.Identity(),
        activation(),
        nn.Dropout(dropout),
        nn.Conv2d(6, 6, 3, stride=2),
        activation(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, CLASSES),
    )


class Attention(nn.Module):
    """PyTorch's fused attention, with one linear map used twice and a block under a checkpoint."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 4, stride=4)
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)
        self.again = self.out
        self.head = nn.Linear(8, CLASSES)
        self.checkpointed = checkpointed

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.checkpointed = enable

    def block(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unsqueeze(1).chunk(3, -1)
        attended = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x + self.again(F.gelu(self.out(attended)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)
        return self.head(x.mean(1))


@pytest.fixture
def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(BATCH, 3, SIZE, SIZE, generator=generator), torch.arange(BATCH)


# --- right networks -------------------------------------------------------------------------------

RIGHT: dict[str, Callable[[], nn.Module]] = {
    "convolutional": convolutional,
    "batch norm": lambda: convolutional(norm=True),
    "batch norm, eval": lambda: convolutional(norm=True).eval(),
    "dropout": lambda: convolutional(dropout=0.4),
    "attention": Attention,
    "attention under a checkpoint": lambda: Attention(checkpointed=True),
    "spectral norm": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)),
        nn.GELU(),
        nn.Flatten(),
        nn.utils.parametrizations.weight_norm(nn.Linear(4 * 14 * 14, CLASSES)),
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_network_passes_both_oracles(name: str, batch: tuple[Tensor, Tensor]) -> None:
    model = RIGHT[name]()
    found = check_gradients(model, *batch)
    assert found.passed is True, found
    # Rounding of float64, 1e-16, times the condition of what a few layers compute; and over the
    # 1e-6 that a bias before a BatchNorm is compared with, whose gradient is zero.
    assert found.forward_over_reverse.relative_error is not None, found
    assert found.forward_over_reverse.relative_error < (1e-8 if name == "batch norm" else 1e-12)
    # The steps leave 1e-10 and rounding over 1e-6, of sums of some hundred terms.
    assert found.finite_difference.relative_error is not None, found
    assert found.finite_difference.relative_error < 1e-6
    assert found.replaced == ()
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert 1e-5 < found.saliency_std < 1


def test_numbers_of_the_report_against_the_public_functions(batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    model = convolutional().double()
    heatmaps = torch.rand(BATCH, SIZE, SIZE, dtype=torch.float64)
    found = check_gradients(model, images, labels, heatmaps=heatmaps)
    _, maps = hx.input_gradient(model, images.double(), labels, create_graph=True)
    loss = hx.harmonization_loss(maps, heatmaps, backend="reference")
    gradients = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    zeros = sum(int((gradient == 0).sum()) for gradient in gradients)
    assert found.loss == pytest.approx(loss.item(), rel=1e-12)
    std = maps.detach().mean(1).std((-2, -1), correction=0).mean()
    assert found.saliency_std == pytest.approx(std.item(), rel=1e-12)
    assert found.zero_share == pytest.approx(zeros / found.parameters, abs=1e-12)
    # The saliency of a network whose last layer is linear does not depend on that layer's bias.
    assert found.zero_parameters == ("8.bias",)


def test_what_labels_may_be(batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    model = convolutional()
    hard = check_gradients(model, images, labels)
    soft = check_gradients(model, images, F.one_hot(labels, CLASSES).float())
    called = check_gradients(model, images, lambda logits: logits[range(BATCH), range(BATCH)])
    assert hard.passed
    assert soft.passed
    assert called.passed
    assert soft.loss == pytest.approx(hard.loss, rel=1e-12)
    assert called.loss == pytest.approx(hard.loss, rel=1e-12)


def test_frozen_parameters_are_left_out(batch: tuple[Tensor, Tensor]) -> None:
    model = convolutional()
    model[0].requires_grad_(False)
    found = check_gradients(model, *batch)
    assert found.passed
    assert found.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_under_no_grad_and_autocast(batch: tuple[Tensor, Tensor]) -> None:
    model = convolutional()
    expected = check_gradients(model, *batch)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = check_gradients(model, *batch)
    assert found.passed
    assert found.loss == expected.loss


# --- kinks ----------------------------------------------------------------------------------------


def test_few_kinks_are_stepped_over(batch: tuple[Tensor, Tensor]) -> None:
    found = check_gradients(convolutional(nn.ReLU), *batch)
    assert found.passed
    assert found.finite_difference.relative_error is not None


def test_many_kinks_leave_one_oracle(generator: torch.Generator) -> None:
    torch.manual_seed(0)

    class Saw(nn.Module):
        """A kink every 1e-9: no step is short enough."""

        def forward(self, x: Tensor) -> Tensor:
            return (x * 1e9).remainder(2.0).sub(1.0).abs() * 1e-9 + x * x

    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator)
    found = check_gradients(convolutional(Saw), images, torch.arange(BATCH))
    assert found.passed is True, found
    assert found.finite_difference.relative_error is None
    assert "not defined" in (found.finite_difference.reason or "")
    assert "kinks" in str(found)


# --- wrong gradients ------------------------------------------------------------------------------


class _DetachedSquare(torch.autograd.Function):
    """x^2 whose backward is right, but is a constant to whoever differentiates it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * 2 * x.detach()


class _DetachedAutogradFunction(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _DetachedSquare.apply(x) + x


def test_a_backward_that_detaches_is_found(batch: tuple[Tensor, Tensor]) -> None:
    found = check_gradients(convolutional(_DetachedAutogradFunction), *batch)
    assert found.passed is False
    assert found.forward_over_reverse.relative_error is None
    assert "setup_context" in (found.forward_over_reverse.reason or "")
    assert found.finite_difference.relative_error is not None
    assert found.finite_difference.relative_error > 1e-2
    assert "WRONG" in str(found)


class _Detached(nn.Module):
    """x^2 + x whose backward is detached by a hook: every oracle can run."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * x + x
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient.detach())
        return y


def test_a_hook_that_detaches_is_found_by_both(batch: tuple[Tensor, Tensor]) -> None:
    found = check_gradients(convolutional(_Detached), *batch)
    assert found.passed is False
    for oracle in (found.forward_over_reverse, found.finite_difference):
        assert oracle.relative_error is not None
        assert oracle.relative_error > 1e-2


def test_one_wrong_element_is_found_and_named(
    batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def off_by_little(*arguments: Any) -> Any:
        gradients, *rest = _exact(*arguments)
        gradients["4.weight"][1, 2, 0, 1] += 2e-6 * gradients["4.weight"].abs().max()
        return gradients, *rest

    _exact = gradient_check._double_backward
    monkeypatch.setattr(gradient_check, "_double_backward", off_by_little)
    found = check_gradients(convolutional(), *batch)
    assert found.passed is False
    assert found.forward_over_reverse.worst_parameter == "4.weight"
    assert found.forward_over_reverse.relative_error == pytest.approx(2e-6, rel=1e-3)
    assert check_gradients(convolutional(), *batch, tolerance=1e-5).passed is True


def test_what_two_thirds_of_the_maps_teach_is_wrong(
    batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def partly(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        logits, maps = hx.input_gradient(*arguments, **options)
        return logits, torch.cat([maps[:, :2], maps[:, 2:].detach()], 1)

    monkeypatch.setattr(gradient_check, "input_gradient", partly)
    found = check_gradients(convolutional(), *batch)
    assert found.passed is False
    for oracle in (found.forward_over_reverse, found.finite_difference):
        assert (oracle.relative_error or 0) > 1e-2


def test_no_oracle_is_no_verdict(batch: tuple[Tensor, Tensor]) -> None:
    class SawAutogradFunction(_DetachedAutogradFunction):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + (x * 1e9).remainder(2.0).sub(1.0).abs() * 1e-9

    found = check_gradients(convolutional(SawAutogradFunction), *batch)
    assert found.passed is None
    assert "not checked" in str(found)


def test_a_gradient_that_is_not_finite_or_nowhere(batch: tuple[Tensor, Tensor]) -> None:
    model = convolutional()
    with torch.no_grad():
        model[8].weight[0, 0] = float("nan")
    found = check_gradients(model, *batch)
    assert found.passed is False
    assert "not finite" in (found.finite_difference.reason or "")
    with torch.no_grad():
        model[8].weight.zero_()
    found = check_gradients(model, *batch)
    assert found.passed is False
    assert found.saliency_std == 0
    assert "below the loss's epsilon" in str(found)


def test_equal_labels_before_batch_norm_are_seen(generator: torch.Generator) -> None:
    """The sum of a batch of one normalized logit is a constant: there is no saliency."""
    torch.manual_seed(0)
    model = nn.Sequential(convolutional(), nn.BatchNorm1d(CLASSES))
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator)
    found = check_gradients(model, images, torch.zeros(BATCH, dtype=torch.long))
    assert found.saliency_std < 1e-10
    assert "equal labels" in str(found)
    assert check_gradients(model, images, torch.arange(BATCH)).saliency_std > 1e-4


# --- the user's model -----------------------------------------------------------------------------


def test_hardsigmoid_is_replaced_in_the_copy_alone(batch: tuple[Tensor, Tensor]) -> None:
    model = convolutional(nn.Hardsigmoid)
    found = check_gradients(model, *batch)
    assert found.passed
    assert found.replaced == ("2", "5")
    assert "make_twice_differentiable" in str(found)
    assert type(model[2]) is nn.Hardsigmoid


class _CachesBiases(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = convolutional()
        self.bias = nn.Parameter(torch.zeros(CLASSES))
        self.attention_bias_cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if "cpu" not in self.attention_bias_cache:
            self.attention_bias_cache["cpu"] = self.bias.exp()
        return self.body(x) * self.attention_bias_cache["cpu"]


def test_the_model_is_as_it_was(batch: tuple[Tensor, Tensor]) -> None:
    model = nn.Sequential(_CachesBiases().eval(), nn.BatchNorm1d(CLASSES), nn.Dropout(0.2))
    images, labels = batch
    model(images)
    cached = model[0].attention_bias_cache["cpu"]
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    found = check_gradients(model, images, labels)
    assert found.passed
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())
    assert model[0].attention_bias_cache["cpu"] is cached
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert not images.requires_grad


def test_the_same_numbers_every_time(batch: tuple[Tensor, Tensor]) -> None:
    model = convolutional(norm=True, dropout=0.3)
    first = check_gradients(model, *batch)
    torch.rand(5)
    second = check_gradients(model, *batch)
    assert first.loss == second.loss
    assert check_gradients(model, *batch, seed=1).loss != first.loss


def test_the_module_within_wrappers_is_taken(batch: tuple[Tensor, Tensor]) -> None:
    model = convolutional()
    expected = check_gradients(model, *batch)
    for wrapped in (nn.DataParallel(model), torch.compile(model)):
        assert check_gradients(wrapped, *batch).loss == expected.loss


# --- errors ---------------------------------------------------------------------------------------


def test_errors_say_what_is_expected(batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    model = convolutional()
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got function"):
        check_gradients(lambda x: x, images, labels)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"images: expected .* \(3, 16, 16\)"):
        check_gradients(model, images[0], labels)
    with pytest.raises(ValueError, match="images: expected floating-point"):
        check_gradients(model, images.byte(), labels)
    with pytest.raises(ValueError, match=r"tolerance: expected .* got 0"):
        check_gradients(model, images, labels, tolerance=0)
    with pytest.raises(ValueError, match=r"targets: expected class indices of shape \(3,\)"):
        check_gradients(model, images, labels[:2])
    with pytest.raises(ValueError, match="model: expected trainable parameters"):
        check_gradients(model.requires_grad_(False), images, labels)


def test_a_model_that_cannot_be_copied(batch: tuple[Tensor, Tensor]) -> None:
    model = convolutional()
    model.kept = model[0].weight * 2
    with pytest.raises(RuntimeError, match=r"model: expected one that copy\.deepcopy can copy"):
        check_gradients(model, *batch)


def test_layers_without_a_second_derivative_are_an_error(batch: tuple[Tensor, Tensor]) -> None:
    model = convolutional(lambda: nn.CrossMapLRN2d(3))
    with pytest.raises(RuntimeError):
        check_gradients(model, *batch)


def test_the_result_is_a_record() -> None:
    record = GradientCheck(
        passed=True,
        tolerance=1e-6,
        loss=1.0,
        forward_over_reverse=OracleResult(1e-14, "a.weight"),
        finite_difference=OracleResult(reason="because"),
        parameters=1234567,
        zero_share=0.015,
        zero_parameters=tuple("abcdefg"),
        saliency_std=0.01,
        replaced=(),
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.passed = False  # type: ignore[misc]
    assert str(record).splitlines() == [
        "gradient of the harmonization loss, 1,234,567 parameters in float64: right "
        "(allowed 1e-06)",
        "  forward over reverse  relative error 1.0e-14, worst in a.weight",
        "  central difference    because",
        "  exactly zero          1.5 % of the elements; all of a, b, c, d, e and 2 more",
        "  saliency std          1.00e-02",
    ]
