"""``harmonizer_loss`` as a module around the network, which compiles and is easy to wrap."""

from __future__ import annotations

import copy
import dataclasses
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from harmonizer_ext import (
    contract,
    diagnostics,
    distributed,
    double_backward,
    explanation_check,
    network,
    twice_differentiable,
)
from harmonizer_ext.finite_difference import FiniteDifference
from harmonizer_ext.map_losses import Alignment
from harmonizer_ext.saliency import Explain
from harmonizer_ext.step import (
    Batch,
    Criterion,
    HarmonizerOutput,
    Options,
    batch_of,
    compute,
    eager_step,
    penalized_weights,
)

#: Different numbers of saliency rows that a compiled step may see, each a graph of its own.
_COMPILED_COUNTS = 8


class HarmonizerLoss(nn.Module):
    """The harmonized training step of one network, eager or compiled as a whole.

    ``torch.compile(model)`` cannot be differentiated twice; this compiles forward pass, saliency,
    fused loss and both backward passes as one function instead, without a graph break.

    Copies (``copy.deepcopy``, ``AveragedModel``, pickle) have weights of their own and compute with
    them; a compiled one is compiled anew where it is first called.

    For several processes, wrap this and not the model within:
    ``DistributedDataParallel(HarmonizerLoss(model, compile=True))``.

    Args:
        model: the network, not compiled and, with ``compile``, not wrapped. It stays reachable as
            ``.model``; its parameters are this module's.
        compile: True, or keyword arguments of ``torch.compile`` such as
            ``{"mode": "max-autotune-no-cudagraphs"}``.
        row_multiple: with ``compile``, the number of rows that take the saliency path is rounded up
            to a multiple of this with rows whose weight is 0, which changes no value, so that few
            different shapes are compiled; None is an eighth of the batch.
        The rest as in ``harmonizer_loss``.

    Example:
        >>> step = HarmonizerLoss(model, lambda_harmonization=2.0, compile=True)
        >>> step(images, labels, heatmaps, tokens).loss.backward()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        compile: bool | dict[str, Any] = False,  # noqa: A002 - PyTorch's own word
        row_multiple: int | None = None,
        criterion: Criterion | None = None,
        lambda_harmonization: float = 1.0,
        lambda_weights: float = 1e-5,
        formulation: str = "released",
        levels: int = 5,
        distance: str = "mse",
        alignment: Alignment | None = None,
        explain: Explain | None = None,
        rows: str = "auto",
        second_order: str | FiniteDifference = "exact",
        reduction: str = "mean",
        process_group: Any = None,
        scaler: GradScaler | None = None,
        gradient_norms: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.options = Options(
            criterion, lambda_harmonization, lambda_weights, formulation, levels, distance,
            alignment, explain, rows, second_order, reduction, process_group, scaler,
            gradient_norms, backend,
        )  # fmt: skip
        if isinstance(alignment, nn.Module):
            self.alignment = alignment  # its weights are this module's
        if row_multiple is not None and row_multiple < 1:
            raise ValueError(f"row_multiple: expected at least 1, got {row_multiple}")
        self.row_multiple = row_multiple
        self._penalized: tuple[Tensor, ...] = ()
        #: Arguments of torch.compile, and what it made of this object's own method.
        self._compile_options: dict[str, Any] | None = None
        self._compiled: Any = None
        if compile is not False:
            self._check_compilable()
            self._compile_options = {"fullgraph": True, "dynamic": False} | (
                compile if isinstance(compile, dict) else {}
            )

    def _check_compilable(self) -> None:
        options = self.options
        if distributed.is_wrapped(self.model):
            raise ValueError(
                "compile: expected the network itself, got one that is wrapped for several "
                "processes; wrap the other way round: "
                "DistributedDataParallel(HarmonizerLoss(network, compile=True)). FSDP2 runs "
                "uncompiled"
            )
        for name, wrong in (
            ("second_order", options.difference is not None),
            ("gradient_norms", options.gradient_norms),
            ("scaler", options.scaler is not None),
        ):
            if wrong:
                raise ValueError(
                    f"compile: expected {name} to be left out of a compiled step; use compile=False"
                )

    def _compute(self, batch: Batch, create_graph: bool) -> HarmonizerOutput:
        return compute(self.model, batch, self.options, create_graph, self._penalized)

    def _own_compute(self) -> Any:
        """``_compute`` with code of its own: the compiler counts the graphs of a code object."""
        function = type(self)._compute
        code = function.__code__.replace()
        return types.MethodType(types.FunctionType(code, function.__globals__), self)

    def forward(
        self, images: Tensor, labels: Tensor, heatmaps: Tensor, tokens: Tensor | None = None
    ) -> HarmonizerOutput:
        """Arguments, result and errors as in ``harmonizer_loss``."""
        if self._compile_options is None:
            return eager_step(self.model, images, labels, heatmaps, tokens, self.options)
        if self._compiled is None:
            self._compiled = torch.compile(self._own_compute(), **self._compile_options)
        # Which they are is asked of the modules, and that is nothing to be traced.
        self._penalized = tuple(penalized_weights(self.model, images, self.options))
        double_backward.check_model(self.model)
        multiple = self.row_multiple or max(1, -(-images.shape[0] // _COMPILED_COUNTS))
        batch = batch_of(self.model, images, labels, heatmaps, tokens, self.options, multiple)
        if torch.is_grad_enabled():
            explanation_check.check_before_compiling(
                self.options.explain, self.model, batch.some, labels[batch.rows]
            )
        # The tracer wants to see what is differentiated come from outside.
        batch = dataclasses.replace(batch, some=batch.some.detach().requires_grad_())
        # Both settings hold while it compiles; they change nothing else.
        settings = torch._dynamo.config.patch(
            trace_autograd_ops=True, recompile_limit=4 * _COMPILED_COUNTS
        )
        with (
            settings,
            double_backward.clear_errors(),
            twice_differentiable.own_biases(self.model),
        ):
            out: HarmonizerOutput = self._compiled(batch, torch.is_grad_enabled())
        diagnostics.watch_epsilon(out.epsilon_ratio)
        return out

    def extra_repr(self) -> str:
        return f"compiled={self._compile_options is not None}, options={self.options}"

    # --- copies, which compute with weights of their own ------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # What is compiled is bound to this object, and compiled again where a copy is called.
        state: dict[str, Any] = super().__getstate__()
        return state | {"_compiled": None, "_penalized": ()}

    def __copy__(self) -> HarmonizerLoss:
        twin = type(self).__new__(type(self))
        twin.__setstate__(self.__getstate__())
        for name in ("_modules", "_parameters", "_buffers"):  # what one is given, the other is not
            twin.__dict__[name] = self.__dict__[name].copy()
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> HarmonizerLoss:
        """A step with a model of its own; process group and scaler are shared with this one.

        Raises:
            TypeError: the model is a function, whose copy would be the same function of the same
                modules.
        """
        functions = network.functions_within(self.model)
        if any(network.referred(function) for function in functions):
            raise TypeError(
                "model: expected a torch.nn.Module in a HarmonizerLoss that is copied, got a "
                "function, which would go on with the modules of the original. Pass the module "
                "itself, or an object that holds it"
            )
        for name in ("criterion", "explain", "alignment"):
            part = getattr(self.options, name)
            if isinstance(self.model, nn.Module) and network.refers_by_code(part, self.model):
                contract.warn(
                    f"{name}: a function that refers to the model itself was copied along with "
                    f"HarmonizerLoss, and still refers to the original's; use an object that "
                    f"holds the model, which is copied with it"
                )
        for shared in (self.options.process_group, self.options.scaler):
            if shared is not None:
                memo[id(shared)] = shared
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.options.process_group is not None:
            raise TypeError(
                "process_group: expected None in a HarmonizerLoss that is saved whole, got one, "
                "which lives in this process alone; save state_dict() and build the step anew"
            )
        return super().__reduce_ex__(protocol)
