"""The needs of double backward, and words that help where the network cannot meet them.

The saliency is a gradient, and training differentiates it again. PyTorch has no second derivative
for some kernels and wrappers; it says so in the last backward pass, far from the cause, or not at
all. Here they are found at the first call: by the network's modules, and in the graph of the maps,
where PyTorch leaves a node of its own for every derivative that it lacks.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
import torch.distributed
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from harmonizer_ext import contract, distributed, network
from harmonizer_ext.fingerprint import Fingerprint, Memory
from harmonizer_ext.grouped_convolution import GroupedConvolutions, has_grouped_convolutions

Context = Callable[[], contextlib.AbstractContextManager[Any]]


class SecondDerivativeError(RuntimeError):
    """The network cannot be differentiated twice as it stands; the message says what to change."""


# --- kernels --------------------------------------------------------------------------------------


class _Again:
    """A checkpoint's context of recomputation with others around; enters many times."""

    def __init__(self, *contexts: Context) -> None:
        self._contexts = contexts
        self._entered: list[contextlib.ExitStack] = []

    def __enter__(self) -> None:
        with contextlib.ExitStack() as stack:
            for context in self._contexts:
                stack.enter_context(context())
            self._entered.append(stack.pop_all())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return self._entered.pop().__exit__(kind, error, traceback)


#: What runs a checkpoint goes by the first name since PyTorch 2.14, by the second before.
_CHECKPOINT_RUNNERS = (
    "_checkpoint_without_reentrant_generator_impl",
    "_checkpoint_without_reentrant_generator",
)


def _remembering(run: Callable[..., Any], contexts: Sequence[Context], named: bool) -> Any:
    def chosen(context_fn: Callable[[], tuple[Any, Any]], debug: bool) -> Any:
        def both() -> tuple[Any, Any]:
            forward, recompute = context_fn()
            return forward, _Again(lambda: recompute, *contexts)

        # A checkpoint that is being debugged takes no contexts but its own.
        return context_fn if debug else both

    def by_name(*args: Any, context_fn: Any, debug: Any, **kw: Any) -> Any:
        return run(*args, context_fn=chosen(context_fn, debug), debug=debug, **kw)

    def by_place(
        function: Any, preserve: Any, context_fn: Any, check: Any, debug: Any, *args: Any, **kw: Any
    ) -> Any:
        return run(function, preserve, chosen(context_fn, debug), check, debug, *args, **kw)

    return by_name if named else by_place


@contextlib.contextmanager
def _now_and_in_recomputations(*contexts: Context) -> Iterator[None]:
    """Enters the contexts, and enters them again where a checkpoint from within is recomputed.

    PyTorch has no public place for this: a checkpoint takes its contexts from its caller.
    """
    module = torch.utils.checkpoint
    name = next((name for name in _CHECKPOINT_RUNNERS if hasattr(module, name)), None)
    with _Again(*contexts):
        if name is None:
            contract.warn(
                f"torch.utils.checkpoint of PyTorch {torch.__version__} is unknown here: blocks "
                f"under it may be recomputed by other kernels than their forward pass ran, which "
                f"is an error for attention. Turn checkpoints off, or use PyTorch 2.11 to 2.15"
            )
            yield
            return
        run = getattr(module, name)
        setattr(module, name, _remembering(run, contexts, name == _CHECKPOINT_RUNNERS[0]))
        try:
            yield
        finally:
            setattr(module, name, run)


def _math() -> contextlib.AbstractContextManager[Any]:
    return sdpa_kernel(SDPBackend.MATH)


def exact_attention() -> contextlib.AbstractContextManager[None]:
    """Runs attention within it through PyTorch's MATH kernel, the one with a second derivative.

    Wrap the forward pass of a network whose input gradient is to be trained through;
    ``input_gradient(create_graph=True)`` does. The flash, memory-efficient and cuDNN kernels lack
    the second derivative on every device. MATH stores the attention weights, (B, heads, T, T).

    Blocks under ``torch.utils.checkpoint`` (``use_reentrant=False``) are recomputed through MATH
    too, whenever that is: PyTorch restores autocast and random state for them, but not this choice,
    and a recomputation through another kernel than the forward's is an error.
    """
    return _now_and_in_recomputations(_math)


@contextlib.contextmanager
def saliency_forward(model: object) -> Iterator[GroupedConvolutions | None]:
    """Runs the model's forward pass by what has a second derivative, and a cheap one.

    Yields:
        What the grouped convolutions run under, where the model has any.
    """
    mode = GroupedConvolutions() if has_grouped_convolutions(model) else None
    contexts = [_math] if mode is None else [_math, lambda: mode]
    with _now_and_in_recomputations(*contexts):
        yield mode


# --- what modules show ----------------------------------------------------------------------------


def _is_compiled(module: nn.Module) -> bool:
    # Asking for the class would import all of Dynamo.
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    wrapped = dynamo is not None and isinstance(module, dynamo.OptimizedModule)
    return wrapped or getattr(module, "_compiled_call_impl", None) is not None


_COMPILED = (
    "{where}: expected a model that is not compiled by itself, got one under torch.compile, which "
    "cannot be differentiated twice. Compile the whole step instead, with the model as it was: "
    "harmonizer_ext.HarmonizerLoss(model, compile=True)"
)


def check_model(model: object) -> None:
    """Refuses wrappers and layers that double backward does not survive.

    Raises:
        SecondDerivativeError: a part of the model is compiled by itself, is DistributedDataParallel
            with ``static_graph=True``, FSDP1, or a SyncBatchNorm that synchronizes.
    """
    if hasattr(model, "_torchdynamo_orig_callable"):
        raise SecondDerivativeError(_COMPILED.format(where="model"))
    for name, module in network.named_modules(model):
        where = f"model.{name}" if name else "model"
        if _is_compiled(module):
            raise SecondDerivativeError(_COMPILED.format(where=where))
        if distributed.is_static_graph(module):
            raise SecondDerivativeError(
                f"{where}: expected DistributedDataParallel without static_graph=True; with it "
                f"the gradients of a harmonized step are not averaged over the processes, without "
                f"any error. Build it as DistributedDataParallel(model)"
            )
        if distributed.is_fsdp1(module):
            raise SecondDerivativeError(
                f"{where}: expected a model that takes two backward passes, got "
                f"FullyShardedDataParallel (FSDP1), which frees the weights after the first. Use "
                f"torch.distributed.fsdp.fully_shard(model) (FSDP2) or DistributedDataParallel; "
                f'or, where the network is smooth, second_order="finite_difference"'
            )
        if distributed.synchronizes(module):
            raise SecondDerivativeError(
                f"{where}: expected layers with a second derivative, got SyncBatchNorm in training "
                f"mode, which has none. Keep BatchNorm2d (no convert_sync_batchnorm), use "
                f"GroupNorm, or freeze its statistics with .eval()"
            )


# --- what the graph shows -------------------------------------------------------------------------

#: Packages whose fused kernels pretend to have a second derivative or break off the graph.
_ONCE_DIFFERENTIABLE_PACKAGES = ("flash_attn", "flash_attn_interface", "xformers", "natten", "apex")

_ATTENTION = (
    "attention through PyTorch's MATH kernel has it: harmonizer_ext.input_gradient and "
    "harmonizer_loss choose it; around a forward pass of your own write "
    "`with harmonizer_ext.exact_attention():`. Or keep the fast kernel and use "
    'harmonizer_loss(..., second_order="finite_difference")'
)

#: What PyTorch says, and the way out.
_WAYS_OUT = (
    (r"scaled_dot_product|flash_attention|efficient_attention|flex_attention", _ATTENTION),
    (
        r"hardsigmoid",
        "replace it by an equal one that has: harmonizer_ext.make_twice_differentiable(model)",
    ),
    (
        r"batch_norm_backward_(reduce|elemt)",
        "SyncBatchNorm has none: keep BatchNorm2d, use GroupNorm, or freeze it with .eval()",
    ),
    (r"cudnn_rnn", "run the model under `with torch.backends.cudnn.flags(enabled=False):`"),
    (
        r"CompiledFunction|aot_autograd",
        "a part of the model is under torch.compile; compile the whole step instead: "
        "harmonizer_ext.HarmonizerLoss(model, compile=True)",
    ),
    (
        r"^(flash_attn|xformers|natten)",
        "build the model with PyTorch's own attention (timm: fused_attn; transformers: "
        'attn_implementation="sdpa"), or use harmonizer_loss(..., second_order='
        '"finite_difference")',
    ),
    (r"^apex", "use the layer of the same name in torch.nn"),
)
_REPLACE_IT = (
    "replace the operation, or, where the network is smooth, use "
    'harmonizer_loss(..., second_order="finite_difference")'
)


#: Nodes that look like others and refuse when they are run.
_REFUSING_NODES = {"CdistBackwardBackward0": "aten::_cdist_backward"}


def _message(node: Any) -> str:
    """The message that an error node of the graph gives when run, which is all that it does."""
    for outputs in range(1, 10):  # as many arguments as the operation has outputs, which it hides
        try:
            node(*[torch.zeros((), device="cpu")] * outputs)
        except TypeError:
            continue
        except RuntimeError as error:
            found = re.search(r"derivative for (\S+) is not implemented", str(error))
            return found[1] if found else str(error).splitlines()[0]
    return "an operation of an unknown name"


def _without_derivative(node: Any) -> str | None:
    """The operation that a node stands for, where it has no derivative."""
    kind = type(node).__name__
    if kind in ("NotImplemented", "Error"):
        return _message(node)
    if kind == "CompiledFunctionBackwardBackward":
        return kind
    if kind in _REFUSING_NODES:
        return _REFUSING_NODES[kind]
    forward = getattr(type(node), "_forward_cls", None)
    module: str = getattr(forward, "__module__", "") or ""
    if forward is not None and module.partition(".")[0] in _ONCE_DIFFERENTIABLE_PACKAGES:
        return f"{module}.{forward.__qualname__}"
    return None


def _way_out(text: str) -> str:
    for pattern, advice in _WAYS_OUT:
        if re.search(pattern, text):
            return advice
    return _REPLACE_IT


def check_graph(maps: Tensor, model: object) -> None:
    """Refuses maps whose graph cannot be differentiated, or does not lead to the network.

    Raises:
        SecondDerivativeError: an operation on the way has no second derivative.
    """
    lacking: dict[str, None] = {}
    reached: set[int] = set()
    for node in network.graph_nodes(maps.grad_fn):
        what = _without_derivative(node)
        if what is not None:
            lacking[what] = None
        variable = getattr(node, "variable", None)
        if variable is not None:
            reached.add(id(variable))
    if maps.grad_fn is None:
        reached.add(id(maps))
    if lacking:
        raise SecondDerivativeError(
            "model: expected operations with a second derivative; PyTorch has none of "
            + "; ".join(f"{what}: {_way_out(what)}" for what in lacking)
        )
    if not distributed.is_sharded(model):
        trained = network.trained(model)
        if trained and not any(id(p) in reached for p in trained):
            raise SecondDerivativeError(
                "explain: expected maps that depend on the parameters of the model, got maps whose "
                "graph reaches none of them, so that the alignment would teach it nothing; look "
                "for .detach() or torch.no_grad() within the explanation"
            )


_checked: Memory[bool] = Memory()


def check_graph_once(
    maps: Tensor, model: object, *settings: Any, more: Callable[[], None] | None = None
) -> None:
    """``check_graph`` at the first call for a model in this mode: a walk of some milliseconds.

    Where values of a callable change all the time, ever less often: see ``Memory``.

    Args:
        maps, model: as there.
        settings: what else makes another call of it, such as a function of the logits.
        more: is called after it, to look at something else for the first time too.
    """
    call = Fingerprint(model, *network.behind(model).roots, *settings)
    if not _checked.recall(call):
        check_graph(maps, model)
        if more is not None:
            more()
        _checked.put(call, True)


# --- what PyTorch says while it runs --------------------------------------------------------------

_RAW_ERRORS = (
    (
        r"use_reentrant=True",
        "model: expected torch.utils.checkpoint with use_reentrant=False, got use_reentrant=True, "
        "which takes no torch.autograd.grad. Pass use_reentrant=False (timm: "
        "set_reentrant_ckpt(False) of timm.layers, or TIMM_REENTRANT_CKPT=0; transformers: "
        'gradient_checkpointing_kwargs={"use_reentrant": False}), or '
        'harmonizer_loss(..., second_order="finite_difference")',
    ),
    (
        r"Trying to backward through the graph a second time",
        "model: expected a forward pass whose graph is its own, got one that shares tensors with "
        "an earlier one, already freed: look for values that the model caches with their graph "
        "(timm's LeViT does so in eval mode; harmonizer_ext.input_gradient empties its cache)",
    ),
)


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """Rewrites errors of PyTorch that double backward is known to cause."""
    try:
        yield
    except SecondDerivativeError:
        raise
    except RuntimeError as error:
        text = str(error)
        for pattern, advice in _RAW_ERRORS:
            if re.search(pattern, text):
                raise SecondDerivativeError(advice) from error
        missing = re.search(r"derivative for (\S+) is not implemented", text)
        if missing or "aot_autograd does not currently support double backward" in text:
            what = missing[1] if missing else "CompiledFunction"
            raise SecondDerivativeError(
                f"model: expected operations with a second derivative; PyTorch has none of {what}: "
                f"{_way_out(what)}"
            ) from error
        raise
