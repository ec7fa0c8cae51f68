"""Mixup against a plain loop; its partners, its distribution, its labels in the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_networks import CLASSES, Transformer
from torch import Tensor

import harmonizer_ext as hx
from harmonizer_ext.data import Mixup

ROWS = 9
TOKENS = (torch.arange(ROWS) % 3 == 0).float()
#: Row n is an image with its n-th pixel lit: a mixture tells who was mixed, and how.
LIT = torch.eye(ROWS, dtype=torch.float64).view(ROWS, 1, 3, 3).expand(ROWS, 3, 3, 3)


def mixing(mixup: Mixup, step: int, tokens: Tensor = TOKENS) -> Tensor:
    """(B, B): the weight of each row of the batch in each mixture."""
    labels = torch.zeros(ROWS, dtype=torch.int64)
    images, *_ = mixup(LIT, LIT[:, :1], labels, tokens, step=step)
    assert torch.equal(images[:, 0], images[:, 2])
    return images[:, 0].flatten(1)


@pytest.mark.parametrize("step", range(5))
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_against_a_plain_loop(generator: torch.Generator, dtype: torch.dtype, step: int) -> None:
    mixup = Mixup(0.8, CLASSES, seed=3)
    weights = mixing(mixup, step)
    images = torch.randint(256, (ROWS, 3, 5, 4), generator=generator).to(dtype)
    heatmaps = torch.randint(256, (ROWS, 1, 5, 4), generator=generator).to(dtype)
    labels = torch.randint(CLASSES, (ROWS,), generator=generator)
    tokens = TOKENS * torch.rand(ROWS, generator=generator).add(0.1)
    got = mixup(images, heatmaps, labels, tokens, step=step)
    assert [part.shape for part in got] == [images.shape, heatmaps.shape, (ROWS, CLASSES), (ROWS,)]
    assert all(part.dtype == torch.float32 for part in got)
    for row in range(ROWS):
        image, heatmap = torch.zeros(3, 5, 4), torch.zeros(1, 5, 4)
        label, token = torch.zeros(CLASSES), torch.zeros(())
        for other, weight in enumerate(weights[row].tolist()):
            image = image + weight * images[other].double()
            heatmap = heatmap + weight * heatmaps[other].double()
            label[labels[other]] += weight
            token = token + weight * tokens[other]
        for one, expected in zip(got, (image, heatmap, label, token), strict=True):
            # lerp in float32: the weight and the difference are rounded, each product and sum.
            torch.testing.assert_close(
                one[row].double(), expected.double(), rtol=4 * 2**-24, atol=4 * 2**-24 * 255
            )


def test_partners_are_of_the_same_kind() -> None:
    partners = set()
    for step in range(40):
        weights = mixing(Mixup(0.8, CLASSES), step)
        torch.testing.assert_close(weights.sum(1), torch.ones(ROWS, dtype=torch.float64))
        # One weight for the batch: what a row keeps of itself, unless it is its own partner.
        kept = weights.diagonal()
        alone = (weights > 0).sum(1) == 1
        assert kept[~alone].unique().numel() <= 1
        for row, other in weights.nonzero().tolist():
            assert TOKENS[row] == TOKENS[other]
            partners.add((row, other))
    # In 40 draws among 3 or 6 each possible pair, but for a chance of (5/6) ** 40 = 7e-4 each.
    possible = {(r, o) for r in range(ROWS) for o in range(ROWS) if TOKENS[r] == TOKENS[o]}
    assert len(possible - partners) <= 2


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_the_weight_is_a_draw_from_beta(alpha: float) -> None:
    tokens = torch.zeros(ROWS)
    weights = []
    for step in range(3000):
        mixture = mixing(Mixup(alpha, CLASSES), step, tokens)
        apart = (mixture > 0).sum(1) == 2
        if apart.any():
            weights.append(float(mixture.diagonal()[apart][0]))
    values = torch.tensor(weights, dtype=torch.float64)
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2 a + 1)); five standard errors of either.
    variance = 1 / (4 * (2 * alpha + 1))
    count = len(values)
    assert count > 2000
    assert abs(float(values.mean()) - 0.5) < 5 * (variance / count) ** 0.5
    spread = float(((values - 0.5) ** 4).mean() - variance**2) ** 0.5
    assert abs(float(((values - 0.5) ** 2).mean()) - variance) < 5 * spread / count**0.5


def test_the_step_decides() -> None:
    def weights(seed: int, step: int) -> list[Any]:
        torch.manual_seed(step + 17)  # the process's own random numbers have no part in it
        return mixing(Mixup(1.0, CLASSES, seed=seed), step).tolist()

    assert weights(0, 5) == weights(0, 5)
    assert weights(0, 5) != weights(0, 6)
    assert weights(0, 5) != weights(1, 5)


def test_share_of_mixed_batches() -> None:
    mixup = Mixup(1.0, CLASSES, prob=0.25)
    identity = torch.eye(ROWS, dtype=torch.float64)
    mixed = sum(not torch.equal(mixing(mixup, step), identity) for step in range(800))
    assert abs(mixed - 200) < 5 * (800 * 0.25 * 0.75) ** 0.5  # five standard deviations
    labels = torch.arange(ROWS) % CLASSES
    unmixed = Mixup(1.0, CLASSES, prob=0)(LIT, LIT[:, :1], labels, TOKENS, step=0)
    assert torch.equal(unmixed[0], LIT)
    assert torch.equal(unmixed[2].argmax(1), labels)
    assert torch.equal(unmixed[2].sum(1), torch.ones(ROWS))


def test_alpha_may_be_tiny() -> None:
    # Both draws from the gamma distribution are then 0 in float64.
    for step in range(20):
        assert mixing(Mixup(1e-6, CLASSES), step).isfinite().all()


def test_soft_labels_in_the_loss(generator: torch.Generator) -> None:
    """The loss of the mixture is that of the mixed cross entropies, and all weights learn."""
    model = Transformer()
    images = torch.randn(ROWS, 3, 16, 16, generator=generator)
    heatmaps = torch.rand(ROWS, 1, 16, 16, generator=generator)
    labels = torch.arange(ROWS) % CLASSES
    mixup = Mixup(1.0, CLASSES, seed=2)
    mixed = mixup(images, heatmaps, labels, TOKENS, step=1)
    out = hx.harmonizer_loss(
        model, mixed[0], mixed[2], mixed[1], mixed[3], criterion=torch.nn.CrossEntropyLoss()
    )
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert out.harmonization > 0
    hard = torch.stack([
        torch.nn.functional.cross_entropy(
            model(mixed[0]), torch.full((ROWS,), label), reduction="none"
        )
        for label in range(CLASSES)
    ], 1)  # fmt: skip
    torch.testing.assert_close(
        out.cross_entropy, (mixed[2] * hard).sum(1).mean(), rtol=1e-5, atol=1e-6
    )


def test_errors() -> None:
    for alpha in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="alpha: expected a positive number"):
            Mixup(alpha, 10)
    with pytest.raises(ValueError, match=r"prob: expected a number in 0\.\.1, got 2"):
        Mixup(1.0, 10, prob=2)
