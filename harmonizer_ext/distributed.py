"""Networks that live on several processes: what wraps them, and what a harmonized step asks of it.

Gradients are averaged over the processes by DistributedDataParallel and FSDP2, whose wrappers are
recognized here without importing them: who uses one has imported it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from harmonizer_ext import network


def is_static_graph(module: nn.Module) -> bool:
    """DistributedDataParallel that learns its graph once: autograd.grad is what it would learn."""
    return isinstance(module, DistributedDataParallel) and bool(module.static_graph)


def is_fsdp1(module: nn.Module) -> bool:
    """FullyShardedDataParallel, which frees the weights after the first backward pass."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel)


def _is_fsdp2(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


_parts = network.modules


def has_fsdp1(model: object) -> bool:
    """Whether FSDP1 wraps the model or a part of it."""
    return "torch.distributed.fsdp" in sys.modules and any(map(is_fsdp1, _parts(model)))


def is_sharded(model: object) -> bool:
    """Whether FSDP2 shards any part of the model."""
    return "torch.distributed.fsdp" in sys.modules and any(map(_is_fsdp2, _parts(model)))


def is_wrapped(model: object) -> bool:
    """Whether a wrapper of the model, or within it, averages gradients over processes.

    A forward pass is then an affair of all of them: FSDP gathers weights, DistributedDataParallel
    hands out the buffers of its first process. A process that runs one pass more than another waits
    for ever, or reads what was sent for something else.
    """
    replicated = any(isinstance(module, DistributedDataParallel) for module in _parts(model))
    return replicated or is_sharded(model) or has_fsdp1(model)


def unwrapped(model: Any) -> Any:
    """The network within DistributedDataParallel, whose forward pass is this process's own.

    Gradients are averaged all the same as long as one pass of a step goes through the wrapper: it
    is the parameters that tell it of their gradients.
    """
    return model.module if isinstance(model, DistributedDataParallel) else model


def synchronizes(module: nn.Module) -> bool:
    """SyncBatchNorm whose forward pass waits for other processes."""
    return (
        isinstance(module, nn.SyncBatchNorm)
        and (module.training or module.running_mean is None)
        and torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size(module.process_group) > 1
    )


def runs_together(model: object) -> bool:
    """Whether a forward pass that goes past the model's own wrapper still waits for others."""
    inner = unwrapped(model)
    return is_wrapped(inner) or any(map(synchronizes, _parts(inner)))


def _parameter_groups(model: object) -> Iterator[Any]:
    for module in _parts(model):
        if _is_fsdp2(module):
            state = module._get_fsdp_state()  # type: ignore[operator]
            # One group a module until PyTorch 2.12, a list of them since.
            groups = getattr(state, "_fsdp_param_groups", None)
            for group in [state._fsdp_param_group] if groups is None else groups:
                if group is not None:
                    yield group


@contextlib.contextmanager
def whole_until_second_backward(model: object) -> Iterator[None]:
    """Keeps FSDP2 from freeing the weights after the backward pass that runs inside.

    The graph of the saliency needs them in the last backward pass, which frees them as the model's
    owner has set it. Until then the model is whole on every process.
    """
    if not is_sharded(model):
        yield
        return
    groups = [(group, group.reshard_after_backward) for group in _parameter_groups(model)]
    try:
        for group, _ in groups:
            group.reshard_after_backward = False
        yield
    finally:
        for group, reshard in groups:
            group.reshard_after_backward = reshard


@contextlib.contextmanager
def one_pass_explained(model: Any) -> Iterator[None]:
    """``whole_until_second_backward`` for an explanation of a sharded model that is not ours.

    Raises:
        ValueError: it runs the model twice. The last backward pass would free the weights after
            one of the graphs, and the other needs them.
    """
    passes = 0

    def count(module: nn.Module, args: Any) -> None:
        nonlocal passes
        passes += 1
        if passes > 1:
            raise ValueError(
                "explain: expected one forward pass of a model that FSDP2 shards, got a second; "
                "use DistributedDataParallel for explanations that run the model several times"
            )

    handle = model.register_forward_pre_hook(count)
    try:
        with whole_until_second_backward(model):
            yield
    finally:
        handle.remove()


def mean_over_processes(value: Tensor, model: object, group: Any = None) -> Tensor:
    """Mean of a scalar over the processes that average the model's gradients.

    Args:
        value: scalar, the same dtype on every process; not changed.
        model: what is trained; where nothing wraps it and no group is named, the value is its mean.
        group: process group; None is that of DistributedDataParallel, or the default one.

    Raises:
        ValueError: several processes run, and neither the model nor a group says whether they
            average gradients.
    """
    if group is None and not is_wrapped(model):
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        # An evaluation may run on one process alone.
        if several and torch.distributed.get_world_size() > 1 and torch.is_grad_enabled():
            raise ValueError(
                'process_group: expected one with reduction="mean_valid", where several processes '
                "run and the model itself is not wrapped, as in "
                "DistributedDataParallel(HarmonizerLoss(model)); pass the group whose processes "
                "average the gradients, such as torch.distributed.group.WORLD"
            )
        return value
    if group is None:
        replicas = (m for m in _parts(model) if isinstance(m, DistributedDataParallel))
        group = next((m.process_group for m in replicas), None)
    total = value.detach().clone()
    torch.distributed.all_reduce(total, group=group)
    return total / torch.distributed.get_world_size(group)
