"""``harmonizer_loss`` as a module around the network, which compiles and is easy to wrap."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from harmonizer_ext import (
    diagnostics,
    distributed,
    double_backward,
    explanation_check,
    twice_differentiable,
)
from harmonizer_ext.finite_difference import FiniteDifference
from harmonizer_ext.saliency import Explain
from harmonizer_ext.step import (
    Batch,
    Criterion,
    HarmonizerOutput,
    Options,
    batch_of,
    compute,
    eager_step,
    network_of,
)

#: Different numbers of saliency rows that a compiled step may see, each a graph of its own.
_COMPILED_COUNTS = 8


class HarmonizerLoss(nn.Module):
    """The harmonized training step of one network, eager or compiled as a whole.

    ``torch.compile(model)`` cannot be differentiated twice; this compiles forward pass, saliency,
    fused loss and both backward passes as one function instead, without a graph break.

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
            criterion, lambda_harmonization, lambda_weights, formulation, levels, explain, rows,
            second_order, reduction, process_group, scaler, gradient_norms, backend,
        )  # fmt: skip
        if row_multiple is not None and row_multiple < 1:
            raise ValueError(f"row_multiple: expected at least 1, got {row_multiple}")
        self.row_multiple = row_multiple
        self._compiled: Any = None
        self._roots: tuple[nn.Module, ...] = ()
        if compile is not False:
            self._check_compilable()
            arguments: dict[str, Any] = {"fullgraph": True, "dynamic": False} | (
                compile if isinstance(compile, dict) else {}
            )
            self._compiled = torch.compile(self._compute, **arguments)

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
        roots = (self.model,) if isinstance(self.model, nn.Module) else self._roots
        return compute(self.model, batch, self.options, create_graph, roots)

    def forward(
        self, images: Tensor, labels: Tensor, heatmaps: Tensor, tokens: Tensor | None = None
    ) -> HarmonizerOutput:
        """Arguments, result and errors as in ``harmonizer_loss``."""
        if self._compiled is None:
            return eager_step(self.model, images, labels, heatmaps, tokens, self.options)
        self._roots = network_of(self.model, images, self.options)
        double_backward.check_model(self.model)
        multiple = self.row_multiple or max(1, -(-images.shape[0] // _COMPILED_COUNTS))
        batch = batch_of(self.model, images, labels, heatmaps, tokens, self.options, multiple)
        if self.options.explain is not None and torch.is_grad_enabled():
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
        diagnostics.watch_epsilon(out.row_saliency_std)
        return out

    def extra_repr(self) -> str:
        return f"compiled={self._compiled is not None}, options={self.options}"
