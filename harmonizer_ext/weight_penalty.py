"""The weight decay of the released loss, as a term of the loss."""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from harmonizer_ext import contract
from harmonizer_ext.fingerprint import Fingerprint, Memory

_NORM_LAYERS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)
_CLASS_TOKENS = ("class_token", "cls_token")

#: How the operations of those layers are named where nothing but a graph is left of a layer.
_NOT_PENALIZED = re.compile(r"(batch|layer|group|instance|rms)_norm|embedding")


# --- layers of which a graph is left --------------------------------------------------------------

_scripted: weakref.WeakKeyDictionary[nn.Module, frozenset[str]] = weakref.WeakKeyDictionary()


def _nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)


def _attributes_read(value: Any, depth: int = 4) -> Iterator[str]:
    """Names of a scripted module's attributes that a value in its graph is, or is cast from."""
    node = value.node()
    if node.kind() == "prim::GetAttr":
        yield node.s("name")
    elif depth and node.kind() in ("prim::unchecked_cast", "aten::to"):
        for inner in node.inputs():
            yield from _attributes_read(inner, depth - 1)


def _read_by_norms(module: Any) -> frozenset[str]:
    """Attributes of a scripted or traced module that its normalizations and embeddings read."""
    found = _scripted.get(module)
    if found is None:
        methods = module._c._method_names()
        nodes = [node for name in methods for node in _nodes(module._c._get_method(name).graph)]
        names: set[str] = set()
        for node in nodes:
            inputs = list(node.inputs())
            kind = node.kind()
            if kind == "prim::CallFunction":
                called = inputs[0].node()
                kind = called.s("name") if called.hasAttribute("name") else str(inputs[0].type())
            if _NOT_PENALIZED.search(kind):
                names.update(name for value in inputs for name in _attributes_read(value))
        found = frozenset(names)
        _scripted[module] = found
    return found


#: Operations that change the form of a tensor alone.
_RESHAPES = re.compile(r"aten\.(repeat|view|reshape|expand|unsqueeze|squeeze|clone|_to_copy)\b")


def _made_by(value: Any) -> tuple[str, tuple[Any, ...]]:
    """Name and inputs of the operation that made a value, whatever its form was changed to."""
    while _RESHAPES.search(str(value.target)):
        value = value.args[0]
    inputs = value.args if value.op == "call_function" else ()
    return str(value.target), tuple(x for x in inputs if hasattr(x, "target"))


def _is_normalized(value: Any) -> bool:
    """Whether a value was divided by a root, as decomposed normalizations do."""
    name, inputs = _made_by(value)
    return bool(re.search(r"\b(mul|div)\b", name)) and any(
        "sqrt" in _made_by(each)[0] for each in inputs
    )


def _is_scaled(value: Any) -> bool:
    name, inputs = _made_by(value)
    return bool(re.search(r"\bmul\b", name)) and any(map(_is_normalized, inputs))


def _is_read_by_norms(node: Any, depth: int = 4) -> bool:
    """Whether normalizations or embeddings of a graph read a value, as it is or in another form."""
    for user in node.users:
        name = str(user.target)
        others = [n for n in user.all_input_nodes if n is not node]
        if user.op != "call_function":
            continue
        if _NOT_PENALIZED.search(name):
            return True
        if re.search(r"\bmul\b", name) and any(map(_is_normalized, others)):
            return True
        if re.search(r"\badd\b", name) and any(map(_is_scaled, others)):
            return True
        if depth and _RESHAPES.search(name) and _is_read_by_norms(user, depth - 1):
            return True
    return False


def _exported_names(model: nn.Module) -> Iterator[str]:
    """Names of the weights that normalizations and embeddings read in graphs of torch.fx."""
    fx = sys.modules.get("torch.fx")
    if fx is None:
        return
    for prefix, module in model.named_modules():
        graph = module.__dict__.get("_graph", module.__dict__.get("graph"))
        for node in graph.nodes if isinstance(graph, fx.Graph) else ():
            if node.op == "get_attr" and _is_read_by_norms(node):
                yield f"{prefix}.{node.target}" if prefix else str(node.target)


def _is_penalized(name: str, module: nn.Module, exported: set[str]) -> bool:
    if isinstance(module, (*_NORM_LAYERS, nn.Embedding)) or name in exported:
        return False
    scripted = isinstance(module, torch.jit.ScriptModule)
    if scripted and name.rpartition(".")[2] in _read_by_norms(module):
        return False
    parts = name.lower().split(".")
    return not any(
        "embed" in part or "norm" in part or part.startswith("bn") or part in _CLASS_TOKENS
        for part in parts
    )


def _chosen(models: Iterable[nn.Module]) -> Iterator[nn.Parameter]:
    seen: set[int] = set()
    for model in models:
        modules = dict(model.named_modules(remove_duplicate=False))
        exported = set(_exported_names(model))
        for module_name, module in model.named_modules():
            # A parametrized weight belongs to its layer, not to what makes it.
            owner = modules[module_name.partition(".parametrizations.")[0]]
            for name, parameter in module.named_parameters(module_name, recurse=False):
                if parameter.requires_grad and id(parameter) not in seen:
                    seen.add(id(parameter))
                    if _is_penalized(name, owner, exported):
                        yield parameter


_known: Memory[list[weakref.ref[nn.Parameter]]] = Memory()


def penalized_parameters(models: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The parameters that ``weight_penalty`` sums over, each once; chosen once for a network."""
    models = tuple(models)
    network = Fingerprint(*models)
    known = _known.get(network)
    if known is None:
        known = [weakref.ref(parameter) for parameter in _chosen(models)]
        _known.put(network, known)
    found = (ref() for ref in known)
    return [parameter for parameter in found if parameter is not None]


# --- the sum --------------------------------------------------------------------------------------


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
    values = parameter
    if values.layout is torch.sparse_coo:
        values = values.coalesce().values()
    elif values.layout is not torch.strided:
        values = values.values()
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    half = values.to(contract.accumulation_dtype(values)).square().sum() / 2
    # A weight that FSDP2 shards: the sum over all processes.
    return half.full_tensor() if hasattr(half, "full_tensor") else half


def _check_values(parameters: Sequence[Tensor]) -> None:
    if any(nn.parameter.is_lazy(parameter) for parameter in parameters):
        raise ValueError(
            "model: expected weights that have been made, got lazy ones; run the model once"
        )
    kinds = {parameter.device.type for parameter in parameters}
    if "meta" in kinds and len(kinds) > 1:
        raise ValueError(
            "model: expected weights that have values, got some on the device meta, which has "
            "none; give them some by model.to_empty(device=...) and load_state_dict"
        )


def penalty_of(penalized: Sequence[Tensor]) -> Tensor:
    """Half the sum of squares of these, which are what ``penalized_parameters`` gives."""
    if not torch.compiler.is_compiling():
        _check_values(penalized)
    together: list[Tensor] = []
    apart: list[Tensor] = []
    for parameter in penalized:
        plain = (
            type(parameter.data) is Tensor
            and parameter.layout is torch.strided
            and parameter.dtype in (torch.float32, torch.float64)
        )
        fused = plain and not torch.compiler.is_compiling()  # a compiler fuses better
        (together if fused else apart).append(parameter)
    terms = [_half_square(parameter) for parameter in apart]
    if together:
        terms.append(_HalfSquaredNorm.apply(*together))
    if not terms:
        return torch.zeros((), dtype=torch.float32, device="cpu")
    total = terms[0]
    for term in terms[1:]:
        total = total + term.to(total.device)
    return total


def weight_penalty(model: nn.Module) -> Tensor:
    """Sum of squares over two, over the weights that the released loss decays.

    Every trainable parameter but those of normalization layers, embeddings and class tokens, which
    the authors' ``harmonizer_loss`` recognizes by name and this function by layer type and name; of
    scripted, traced and exported networks, by the operations that are left of a layer. Biases of
    other layers are included, as released. Of a parametrized weight it is what is trained that
    counts, as part of the layer that it belongs to; of a complex one, real and imaginary part.

    Args:
        model: any module; frozen parameters are left out.

    Returns:
        A scalar attached to the parameters, in float32 or wider.

    Raises:
        ValueError: lazy layers have no weights yet, or some weights are on the device meta.
    """
    return penalty_of(penalized_parameters([model]))
