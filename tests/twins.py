"""The torch half of the twin networks: see ``released.keras_and_torch_twins`` for the Keras half.

Apart from it, so that the training step can be tested against ``golden/released.npz`` without
TensorFlow.
"""

from __future__ import annotations

import torch
from torch import nn


class TwinNetwork(nn.Module):
    """A small smooth classifier whose Keras twin has the same weights.

    Two 3x3 convolutions (the second with stride 2 and no padding, where both frameworks agree on
    the grid), softplus, SiLU, global mean, linear head. Smooth, so that the second derivative is
    not made of kinks (and no GELU, which Keras evaluates to 1e-8 only, in float64 too).
    ``patch_embed`` bears that name because the released weight penalty leaves out every variable
    with ``embed`` in its name, as it does the norms' parameters. Biases are penalized, as
    released.
    """

    CHANNELS = (3, 6, 8)
    CLASSES = 7

    def __init__(self, batch_norm: bool = False) -> None:
        super().__init__()
        first, second, third = self.CHANNELS
        self.patch_embed = nn.Conv2d(first, second, 3, padding=1)
        self.batch_normalization = _batch_norm(second) if batch_norm else nn.Identity()
        self.features = nn.Conv2d(second, third, 3, stride=2)
        self.batch_normalization_1 = _batch_norm(third) if batch_norm else nn.Identity()
        self.head = nn.Linear(third, self.CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Maps images (B, 3, H, W) to logits (B, 7)."""
        x = nn.functional.softplus(self.batch_normalization(self.patch_embed(images)))
        x = nn.functional.silu(self.batch_normalization_1(self.features(x)))
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    # Keras' defaults: epsilon 1e-3, and a decay of 0.99 where torch counts the complement.
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


def torch_twin(seed: int, batch_norm: bool = False) -> TwinNetwork:
    """The torch half of the twins, float64, in training mode, without TensorFlow."""
    network = TwinNetwork(batch_norm).double()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        scale = fan_in**-0.5 if parameter.ndim > 1 else 0.1
        offset = 1.0 if "normalization" in name and name.endswith("weight") else 0.0
        parameter.data.copy_(values * scale + offset)
    return network.train()
