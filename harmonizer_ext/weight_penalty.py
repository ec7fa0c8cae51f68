"""The weight decay of the released loss, as a term of the loss."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from harmonizer_ext import contract

_NORM_LAYERS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)
_CLASS_TOKENS = ("class_token", "cls_token")


def _is_penalized(name: str, module: nn.Module) -> bool:
    if isinstance(module, (*_NORM_LAYERS, nn.Embedding)):
        return False
    parts = name.lower().split(".")
    return not any(
        "embed" in part or "norm" in part or part.startswith("bn") or part in _CLASS_TOKENS
        for part in parts
    )


def penalized_parameters(models: Iterable[nn.Module]) -> Iterator[nn.Parameter]:
    """The parameters that ``weight_penalty`` sums over, each once."""
    seen: set[int] = set()
    for module_name, module in itertools.chain(*(m.named_modules() for m in models)):
        for name, parameter in module.named_parameters(module_name, recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                if _is_penalized(name, module):
                    yield parameter


class _HalfSquaredNorm(torch.autograd.Function):
    """Half the squared norm of all inputs together; no copy of any is made."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return torch.nn.utils.get_total_norm(parameters).square() / 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled():  # PyTorch's derivative of the line below fails
            return tuple(parameter * grads[0] for parameter in ctx.saved_tensors)
        return tuple(torch._foreach_mul(ctx.saved_tensors, grads[0]))


def _half_square(parameter: Tensor) -> Tensor:
    half = parameter.to(contract.accumulation_dtype(parameter)).square().sum() / 2
    # A weight that FSDP2 shards: the sum over all processes.
    return half.full_tensor() if hasattr(half, "full_tensor") else half


def penalty_of(models: Iterable[nn.Module]) -> Tensor:
    """``weight_penalty`` of modules that together are the network."""
    together: list[Tensor] = []
    apart: list[Tensor] = []
    for parameter in penalized_parameters(models):
        plain = type(parameter.data) is Tensor and parameter.dtype in (torch.float32, torch.float64)
        fused = plain and not torch.compiler.is_compiling()  # a compiler fuses better
        (together if fused else apart).append(parameter)
    terms = [_half_square(parameter) for parameter in apart]
    if together:
        terms.append(_HalfSquaredNorm.apply(*together))
    if not terms:
        return torch.zeros(())
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def weight_penalty(model: nn.Module) -> Tensor:
    """Sum of squares over two, over the weights that the released loss decays.

    Every trainable parameter but those of normalization layers, embeddings and class tokens, which
    the authors' ``harmonizer_loss`` recognizes by name and this function by layer type and name.
    Biases of other layers are included, as released.

    Args:
        model: any module; frozen parameters are left out.

    Returns:
        A scalar attached to the parameters, in float32 or wider.
    """
    return penalty_of([model])
