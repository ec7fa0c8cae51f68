"""Mixup of images, labels and human maps together."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Mixup"]


class Mixup:
    """Mixup (Zhang et al., ICLR 2018) for batches of which some rows have human maps.

    ``x <- a x + (1 - a) x[partner]`` for images, one-hot labels, maps and tokens, with one ``a``
    from Beta(alpha, alpha) for the batch, as in timm's ``mode="batch"``. Partners are drawn among
    rows of the same kind: with a map among those with one, without among those without. So a
    mixture of two mapped images has the mixture of two maps, its token is that of both, and the
    number of rows that take the saliency path does not grow. (With any partner, a map would be
    mixed with nothing, or most rows would have half a map.)

    The authors' first training code (``training/augmentations.py`` and ``dataset.py`` in
    github.com/serre-lab/Harmonization-old) mixes within each source too, and image, label and map
    alike. There the rows of a pair are mixed one by one, each with probability 1/2 and a weight
    drawn evenly from 0 to 1; one weight for the batch is what networks of today are trained with.
    Its ``run.py`` has Mixup switched off.

    Args:
        alpha: of the Beta distribution, > 0; 0.2 is usual for ImageNet.
        num_classes: length of the soft labels.
        prob: share of the batches that are mixed; the others get one-hot labels.
        seed: of the draws, with the number of the batch.

    Raises:
        ValueError: ``alpha`` is not positive, or ``prob`` lies outside of 0 to 1.
    """

    def __init__(self, alpha: float, num_classes: int, *, prob: float = 1.0, seed: int = 0) -> None:
        if not alpha > 0:
            raise ValueError(f"alpha: expected a positive number, got {alpha}")
        if not 0 <= prob <= 1:
            raise ValueError(f"prob: expected a number in 0..1, got {prob}")
        self.alpha = alpha
        self.num_classes = num_classes
        self.prob = prob
        self.seed = seed

    def __call__(
        self, images: Tensor, heatmaps: Tensor, labels: Tensor, tokens: Tensor, *, step: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mixes a batch.

        Args:
            images: (B, C, H, W), any dtype; integers become float32.
            heatmaps: (B, 1, H, W) or (B, H, W).
            labels: (B,), class indices.
            tokens: (B,), on the CPU: partners are chosen without waiting for the device.
            step: number of the batch; the same number mixes in the same way.

        Returns:
            Images, heatmaps, labels (B, num_classes) and tokens of the mixtures.
        """
        generator = torch.Generator("cpu").manual_seed((self.seed * 1_000_003 + step) % 2**63)
        soft = F.one_hot(labels, self.num_classes).float()
        drawn = torch.rand((), generator=generator, dtype=torch.float32, device="cpu")
        if drawn >= self.prob:
            return images, heatmaps, soft, tokens
        weight = _beta(self.alpha, generator)
        partners = torch.arange(len(tokens), device="cpu")
        for kind in (tokens != 0, tokens == 0):
            rows = kind.nonzero().flatten()
            order = torch.randperm(len(rows), generator=generator, device="cpu")
            partners[rows] = rows[order]
        there = partners.to(images.device, non_blocking=True)

        def mixed(values: Tensor, order: Tensor) -> Tensor:
            values = values if values.is_floating_point() else values.float()
            return torch.lerp(values[order], values, weight)

        return (
            mixed(images, there),
            mixed(heatmaps, there),
            mixed(soft, there),
            mixed(tokens, partners),
        )


def _beta(alpha: float, generator: torch.Generator) -> float:
    """A draw from Beta(alpha, alpha), as the share of one of two draws from Gamma(alpha, 1)."""
    shape = torch.full((2,), alpha, dtype=torch.float64, device="cpu")
    gamma = torch._standard_gamma(shape, generator)
    total = float(gamma.sum())
    # Both may be too small for a number where alpha is; then one of them is all there is.
    return float(gamma[0]) / total if total > 0 else 1.0
