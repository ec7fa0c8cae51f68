"""Networks as they come, made fit for two derivatives: layers without one, caches with a graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harmonizer_ext import network


class TwiceDifferentiableHardsigmoid(nn.Hardsigmoid):
    """``nn.Hardsigmoid`` in operations that have a second derivative.

    Same output, bit for bit, in every dtype; same gradient, up to its factor of 1/6, which PyTorch
    rounds once more. ``inplace`` is read but not obeyed.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002, PyTorch's name
        # PyTorch's kernel computes half precision in float32 and rounds once.
        half = input.dtype in (torch.float16, torch.bfloat16)
        x = input.float() if half else input
        # Cut at the input, not at input + 3 as relu6(x + 3) does: that sum rounds to 6 for the
        # largest numbers below 3, whose gradient would be lost.
        return ((F.hardtanh(x, -3.0, 3.0) + 3.0) / 6.0).to(input.dtype)


#: What has no second derivative, and the equal of it that has. Exact types: a subclass may compute
#: something else.
_EQUALS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Hardsigmoid: TwiceDifferentiableHardsigmoid,
}


def make_twice_differentiable(model: nn.Module) -> list[str]:
    """Gives the layers of a network that lack a second derivative one, in place.

    PyTorch has no second derivative of ``nn.Hardsigmoid``, the gate of squeeze-and-excitation in
    MobileNetV3, GhostNet, HardCoRe-NAS and others, so that their saliency cannot be trained
    through. The layer's class is changed to one with the same output; the module itself stays,
    with its name, mode, hooks and place in lists of modules, so call it before or after the
    optimizer is built, and before ``torch.compile``. Calls of ``F.hardsigmoid`` in a ``forward``
    are not layers and cannot be replaced: write ``F.hardtanh(x, -3, 3).add(3).div(6)`` there.
    Attention needs nothing: ``input_gradient`` chooses a kernel that has the derivative.

    Args:
        model: any module; changed in place.

    Returns:
        Names of the changed modules, as in ``model.named_modules()``; one that is shared is named
        once. Empty where nothing was to be done.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Hardsigmoid())
        >>> make_twice_differentiable(model)
        ['1']
    """
    changed = []
    for name, module in model.named_modules():
        equal = _EQUALS.get(type(module))
        if equal is not None:
            module.__class__ = equal
            changed.append(name)
    return changed


#: Where LeViT, EfficientFormer (V1 and V2), TinyViT and EfficientViT-MSRA of timm keep the biases
#: of their attention, one tensor for each device.
_BIAS_CACHE = "attention_bias_cache"


def bias_caches(model: object) -> Iterator[dict[object, Tensor]]:
    """Every cache of attention biases in a network that is not empty."""
    for module in network.modules(model):
        # Not getattr: it is slow where there is no such attribute.
        cache = module.__dict__.get(_BIAS_CACHE)
        if isinstance(cache, dict) and cache:
            yield cache


def clear_cached_biases(model: object) -> None:
    """Empties the caches of attention biases that some networks of timm keep in eval mode.

    They hold tensors with their graph: the next forward pass would go on with a graph that the
    last backward pass has freed, or, after an optimizer step, with the biases of before it.
    """
    for cache in bias_caches(model):
        cache.clear()


@contextlib.contextmanager
def own_biases(model: object) -> Iterator[None]:
    """A context in which the network's forward pass shares no cached biases with others.

    Args:
        model: any network.
    """
    clear_cached_biases(model)
    try:
        yield
    finally:
        clear_cached_biases(model)
