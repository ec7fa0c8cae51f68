"""Networks and batches so small that a harmonized step of them takes milliseconds."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import harmonizer_ext as hx

CLASSES, WIDTH = 4, 8


class Block(nn.Module):
    """Attention by PyTorch's fused function and a small perceptron."""

    def __init__(self, attention: str = "function") -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = attention
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.heads = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.attention == "module":
            return x + self.dropout(self.heads(y, y, y, need_weights=False)[0])
        q, k, v = self.qkv(y).unsqueeze(1).chunk(3, -1)
        return x + self.dropout(F.scaled_dot_product_attention(q, k, v).squeeze(1))


class Transformer(nn.Module):
    def __init__(self, reentrant: bool | None = None, attention: str = "function") -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 2, stride=2)
        self.blocks = nn.ModuleList(Block(attention) for _ in range(2))
        self.head = nn.Linear(WIDTH, CLASSES)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x.mean(1))


#: Passes are counted by iterators, whose numbers no trial can put back.
_PASSES, _READS = itertools.count(), itertools.count()


class Counting(Transformer):
    """Counts the forward passes of all of its kind."""

    def forward(self, x: Tensor) -> Tensor:
        next(_PASSES)
        return super().forward(x)

    @staticmethod
    def passes() -> int:
        """The number of passes since it was last asked."""
        found = next(_PASSES) - next(_READS)
        for _ in range(found):
            next(_READS)
        return found


class Through(nn.Module):
    """Two convolutions and a function between them."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.function = function
        self.last = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.function(self.first(x))).mean((2, 3)))


def make_batch(generator: torch.Generator, rows: int, size: int) -> dict[str, Tensor]:
    """Images, labels and human maps, by their names in ``harmonizer_loss``."""
    return {
        "images": torch.randn(rows, 3, size, size, generator=generator),
        "labels": torch.randint(0, CLASSES, (rows,), generator=generator),
        "heatmaps": torch.rand(rows, size, size, generator=generator),
    }


def gradients(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Gradients as the user's own .backward() leaves them, outside of any context."""
    model.zero_grad()
    hx.harmonizer_loss(model, **batch, lambda_harmonization=10.0, **options).loss.backward()
    return [torch.zeros(()) if p.grad is None else p.grad for p in model.parameters()]
