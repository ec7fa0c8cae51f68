"""Which rows take the saliency path, and that leaving the others out changes nothing."""

from __future__ import annotations

import warnings

import pytest
import torch
from small_networks import Through, Transformer, gradients, make_batch
from torch import Tensor, nn

import harmonizer_ext as hx
from harmonizer_ext import rows

BATCH, CLASSES, SIZE = 8, 4, 8


@pytest.fixture
def batch(generator: torch.Generator) -> dict[str, Tensor]:
    return make_batch(generator, BATCH, SIZE) | {
        "tokens": torch.tensor([0.0, 1.0, 0.0, 0.0, 0.5, 0.0, 0.0, 1.0])
    }


@pytest.mark.parametrize("multiple", [None, 1, 2, 4, 5])
@pytest.mark.parametrize("tokens", ["0100100", "1111111", "0000000", "1000000"])
def test_split_is_a_permutation_that_starts_with_the_mapped_rows(
    tokens: str, multiple: int | None
) -> None:
    weights = torch.tensor([float(t) for t in tokens])
    mapped, total = tokens.count("1"), len(tokens)
    split = rows.split(None, weights, "mapped", torch.device("cpu"), multiple)
    count = mapped
    if multiple is not None:
        count = min(total, -(-max(mapped, 1) // multiple) * multiple)
    if split is None:
        assert count == total
        return
    assert split.chosen.shape == (count,)
    order = torch.cat([split.chosen, split.others])
    assert sorted(order.tolist()) == list(range(total))
    assert order[split.inverse].tolist() == list(range(total))
    assert (weights[split.chosen[:mapped]] > 0).all()
    assert (weights[split.others] == 0).all()


def test_rows_without_a_map_change_nothing(batch: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    model = Transformer().double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    batch["heatmaps"][batch["tokens"] == 0] = torch.nan  # and are not read
    want = gradients(model, batch, rows="all")
    got = gradients(model, batch, rows="auto")
    # The same sums in another order: float64's rounding times the number of terms.
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_tokens_may_stay_on_the_cpu_and_be_of_any_kind(batch: dict[str, Tensor]) -> None:
    model = Transformer()
    batch["tokens"] = (batch["tokens"] > 0).float()
    want = hx.harmonizer_loss(model, **batch)
    for dtype in (torch.bool, torch.int64, torch.float64):
        out = hx.harmonizer_loss(model, **(batch | {"tokens": batch["tokens"].to(dtype)}))
        torch.testing.assert_close(out.loss, want.loss)
    assert want.mapped_rows == 3
    assert want.saliency_rows.tolist() == [1, 4, 7]


def sizes_seen_by(model: nn.Module) -> list[int]:
    """Sizes of the batches that a network is run on, as they come."""
    seen: list[int] = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    return seen


@pytest.mark.parametrize(
    ("layer", "couples"),
    [
        (nn.BatchNorm2d(4), True),
        (nn.BatchNorm2d(4).eval(), False),
        (nn.BatchNorm2d(4, track_running_stats=False).eval(), True),
        (nn.GroupNorm(2, 4), False),
        (nn.InstanceNorm2d(4, track_running_stats=True), True),
        (nn.InstanceNorm2d(4, track_running_stats=True).eval(), False),
        (nn.Identity(), False),
    ],
    ids=lambda value: str(value),
)
def test_auto_knows_what_couples_rows(
    batch: dict[str, Tensor], layer: nn.Module, couples: bool
) -> None:
    training = layer.training
    model = Through(layer)
    layer.train(training)
    seen = sizes_seen_by(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            hx.harmonizer_loss(model, **batch)
    assert sorted(seen) == ([8, 8] if couples else [3, 3, 5, 5])
    told = [str(w.message) for w in caught if 'rows="auto"' in str(w.message)]
    assert len(told) == couples  # once, not twice
    seen.clear()
    hx.harmonizer_loss(model, **batch, rows="mapped")
    assert sorted(seen) == [3, 5]
    seen.clear()
    hx.harmonizer_loss(model, **batch, rows="all")
    assert seen == [8]


def test_modules_may_say_that_they_couple_rows(batch: dict[str, Tensor]) -> None:
    class Router(nn.Module):
        couples_rows = True

        def forward(self, x: Tensor) -> Tensor:
            return x

    model = Through(Router())
    with pytest.warns(UserWarning, match="because function lets rows depend on each other") as told:
        out = hx.harmonizer_loss(model.eval(), **batch)
    assert told[0].filename == __file__  # where the user's line is
    assert out.saliency.shape[0] == BATCH


def test_dropout_draws_anew_for_each_part(batch: dict[str, Tensor]) -> None:
    """The distribution is the same, as documented; the numbers are others than in one pass."""
    model = Through(nn.Dropout(0.5))

    def logits(rows: str, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return hx.harmonizer_loss(model, **batch, rows=rows).logits

    assert torch.equal(logits("mapped", 0), logits("mapped", 0))
    assert not torch.allclose(logits("mapped", 0), logits("all", 0))
    means = [torch.stack([logits(r, s) for s in range(400)]).mean(0) for r in ("mapped", "all")]
    spread = torch.stack([logits("all", s) for s in range(400)]).std(0) / 400**0.5
    # Two means of 400 draws: their difference is within five standard errors of it.
    assert ((means[0] - means[1]).abs() < 5 * 2**0.5 * spread).all()


def test_channels_last_survives_the_split(batch: dict[str, Tensor]) -> None:
    seen: list[bool] = []
    model = Through(nn.Identity()).to(memory_format=torch.channels_last)
    model.function.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    batch["images"] = batch["images"].to(memory_format=torch.channels_last)
    hx.harmonizer_loss(model, **batch)
    assert seen == [True, True]


@pytest.mark.parametrize("reduction", ["mean", "mean_valid"])
def test_reductions(batch: dict[str, Tensor], reduction: str) -> None:
    model = Transformer()
    out = hx.harmonizer_loss(model, **batch, reduction=reduction)
    # Maps by PyTorch's MATH kernel in both cases.
    with hx.exact_attention():
        _, maps = hx.input_gradient(model, batch["images"], batch["labels"], create_graph=False)
    want = hx.harmonization_loss(
        maps.requires_grad_(), batch["heatmaps"], batch["tokens"], reduction=reduction
    )
    torch.testing.assert_close(out.harmonization, want.detach(), rtol=1e-4, atol=0)


def test_mean_valid_without_any_map(batch: dict[str, Tensor]) -> None:
    batch["tokens"].zero_()
    out = hx.harmonizer_loss(Transformer(), **batch, reduction="mean_valid")
    assert out.harmonization == 0
    assert out.loss.isfinite()
