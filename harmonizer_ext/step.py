"""The loss of a whole training step: cross entropy, alignment and weight penalty in one call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from harmonizer_ext import rows as row_choice
from harmonizer_ext.finite_difference import FiniteDifference
from harmonizer_ext.finite_difference import harmonize as harmonize_by_difference
from harmonizer_ext.loss import aligned_rows, check_formulation, normalized, row_losses
from harmonizer_ext.map_losses import Alignment
from harmonizer_ext.saliency import Explain, input_gradient
from harmonizer_ext.weight_penalty import penalized_parameters, penalty_of

SECOND_ORDER = ("exact", "finite_difference")
REDUCTIONS = ("mean", "mean_valid")

Criterion = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class HarmonizerOutput:
    """The output of ``harmonizer_loss``; only ``loss`` is meant for ``backward``.

    Everything else is detached, for the log. Reading a value (``float(out.cross_entropy)``) waits
    for the device; computing it did not.

    Attributes:
        loss: scalar, the sum of the three terms with their factors.
        cross_entropy: scalar, without a factor (it has none).
        harmonization: scalar, before ``lambda_harmonization``.
        weight_penalty: scalar, before ``lambda_weights``; 0 where the factor is 0.
        logits: (B, classes), in the order of the images.
        saliency: (R, C, H, W), maps of the R rows that took the saliency path.
        saliency_rows: (R,), int64, which rows of the batch those are, in rising order within those
            with a human map and within those without.
        saliency_std: scalar, mean over the rows with a human map of the standard deviation of the
            channel mean. A network can lower the loss by shrinking its gradients towards the
            epsilon of 1e-5: log this number and watch that it stays well above.
        row_saliency_std: (R,), the same for each row; 0 where a row has no human map.
        epsilon_ratio: (R,), 1e-5 over ``row_saliency_std``; NaN where a row has no human map,
            infinite where the map of the network is constant.
        mapped_rows: scalar, int64, the number of rows with a human map in this batch.
        gradient_norms: with ``gradient_norms=True``, the norms of the gradients of
            "cross_entropy" and "harmonization" (without its factor) with respect to all
            parameters; else None.
        second_order_gap: scalar, at the first batch of a model with finite differences: relative
            distance of the alignment's gradient from the exact one; else None.
    """

    loss: Tensor
    cross_entropy: Tensor
    harmonization: Tensor
    weight_penalty: Tensor
    logits: Tensor
    saliency: Tensor
    saliency_rows: Tensor
    saliency_std: Tensor
    row_saliency_std: Tensor
    epsilon_ratio: Tensor
    mapped_rows: Tensor
    gradient_norms: dict[str, Tensor] | None = None
    second_order_gap: Tensor | None = None


@dataclass(frozen=True)
class Options:
    """The options of ``harmonizer_loss``, checked; see there."""

    criterion: Criterion | None = None
    lambda_harmonization: float = 1.0
    lambda_weights: float = 1e-5
    formulation: str = "released"
    levels: int = 5
    distance: str = "mse"
    alignment: Alignment | None = None
    explain: Explain | None = None
    rows: str = "auto"
    second_order: str | FiniteDifference = "exact"
    reduction: str = "mean"
    process_group: Any = None
    scaler: GradScaler | None = None
    gradient_norms: bool = False
    backend: str | None = None

    def __post_init__(self) -> None:
        contract.check_choice("rows", self.rows, row_choice.CHOICES)
        contract.check_choice("reduction", self.reduction, REDUCTIONS)
        check_formulation(self.formulation, self.levels, self.distance)
        if self.alignment is not None:
            self._check_alignment()
        if not isinstance(self.second_order, FiniteDifference):
            contract.check_choice("second_order", self.second_order, SECOND_ORDER)
        if self.explain is not None and self.difference is not None:
            raise ValueError(
                'explain: expected None with second_order="finite_difference", which is the '
                'derivative of the input gradient; another explanation needs second_order="exact"'
            )
        if self.explain is not None and self.scaler is not None:
            raise ValueError(
                "scaler: expected None with an explain of your own, which must scale its own "
                "gradient: see input_gradient(scaler=...)"
            )

    def _check_alignment(self) -> None:
        if not callable(self.alignment):
            raise TypeError(
                f"alignment: expected a callable (maps, heatmaps, tokens) -> (B,), got "
                f"{type(self.alignment).__name__}"
            )
        own = {"formulation": "released", "levels": 5, "distance": "mse", "backend": None}
        for name, default in own.items():
            if getattr(self, name) != default:
                raise ValueError(
                    f"{name}: expected it to be left out with an alignment of your own, which it "
                    f"is no option of; got {getattr(self, name)!r}"
                )

    @property
    def difference(self) -> FiniteDifference | None:
        if isinstance(self.second_order, FiniteDifference):
            return self.second_order
        return FiniteDifference() if self.second_order == "finite_difference" else None


def _criterion(options: Options) -> Criterion:
    return options.criterion or nn.CrossEntropyLoss(label_smoothing=0.1)


@dataclass(frozen=True)
class Batch:
    """One batch, in the parts in which the network sees it.

    Attributes:
        some: (R, C, H, W), the images that take the saliency path.
        others: (B - R, C, H, W), the rest; None where all take it.
        labels: (B,) or (B, classes), of all rows in their order.
        heatmaps, weights: (R, ...) and (R,), human maps and what each row weighs in the loss.
        rows: (R,), which rows of the batch take the saliency path.
        inverse: (B,), puts ``cat([some, others])`` back in order; None where ``others`` is.
    """

    some: Tensor
    others: Tensor | None
    labels: Tensor
    heatmaps: Tensor
    weights: Tensor
    rows: Tensor
    inverse: Tensor | None


def batch_of(
    model: object,
    images: Tensor,
    labels: Tensor,
    heatmaps: Tensor,
    tokens: Tensor | None,
    options: Options,
    multiple: int | None = None,
) -> Batch:
    """Checks a batch and takes it apart; ``multiple`` as in ``rows.split``."""
    if images.ndim != 4:
        raise ValueError(f"images: expected (B, C, H, W), got shape {tuple(images.shape)}")
    if tokens is not None and tuple(tokens.shape) != (images.shape[0],):
        raise ValueError(
            f"tokens: expected shape ({images.shape[0]},), one weight per image, got shape "
            f"{tuple(tokens.shape)}"
        )
    device = images.device
    dtype = contract.accumulation_dtype(images)
    if tokens is None:
        weights = torch.ones(images.shape[0], dtype=dtype, device=device)
    else:
        weights = tokens.detach().to(device, dtype, non_blocking=True)
    total: Tensor | None = None
    if options.reduction == "mean_valid":
        total = distributed.mean_over_processes(weights.sum(), model, options.process_group)
    weights = normalized(weights, options.reduction, total)
    split = row_choice.split(model, tokens, options.rows, device, multiple, images)
    if split is None:
        every = torch.arange(images.shape[0], device=device)
        return Batch(images, None, labels, heatmaps, weights, every, None)
    chosen = split.chosen
    return Batch(
        images[chosen],
        images[split.others],
        labels,
        heatmaps[chosen],
        weights[chosen],
        chosen,
        split.inverse,
    )


def compute(
    model: Callable[[Tensor], Tensor],
    batch: Batch,
    options: Options,
    create_graph: bool,
    penalized: Sequence[Tensor],
) -> HarmonizerOutput:
    """The step itself: no choice is made here that depends on a value, so that it compiles.

    Args:
        model, batch, options: what is run, on what, and how.
        create_graph: False for the values alone.
        penalized: the weights that the penalty is of.
    """
    images, labels = batch.some, batch.labels[batch.rows]
    # The backward pass takes what came last first: the other rows, whose memory is then free for
    # the gradients of the weights. But FSDP2 frees the weights after a forward pass, and the
    # saliency's graph needs them.
    others_first = distributed.is_sharded(model)
    # How many passes a process runs depends on its rows, and those of DistributedDataParallel are
    # counted: it sees one in every step.
    aside = distributed.unwrapped(model) if images.shape[0] else model
    other_logits: Tensor | None = None
    if batch.others is not None and (others_first or images.shape[0] == 0):
        other_logits = aside(batch.others)
    maps, gap = images.new_zeros((0, *images.shape[1:])), None
    std = images.new_zeros(0)
    harmonization: Tensor | None = None

    def loss_of_maps(maps: Tensor) -> tuple[Tensor, Tensor]:
        if options.alignment is not None:
            return aligned_rows(options.alignment, maps, batch.heatmaps, batch.weights)
        return row_losses(
            maps,
            batch.heatmaps,
            batch.weights,
            formulation=options.formulation,
            levels=options.levels,
            distance=options.distance,
            backend=options.backend,
            reduction="sum",
        )

    if images.shape[0] == 0:
        logits = model(images) if other_logits is None else other_logits
    elif options.difference is not None and create_graph:
        pulled = harmonize_by_difference(model, images, labels, loss_of_maps, options.difference)
        logits, maps, std, gap = pulled.logits, pulled.maps, pulled.std, pulled.gap
        harmonization = pulled.harmonization
    else:
        if options.explain is None:
            logits, maps = input_gradient(
                model, images, labels, create_graph=create_graph, scaler=options.scaler
            )
        else:
            whole = create_graph and others_first
            with distributed.one_pass_explained(model) if whole else contextlib.nullcontext():
                result = options.explain(model, images, labels, create_graph=create_graph)
            logits, maps = explanation_check.checked(result, images, create_graph)
            if create_graph and not torch.compiler.is_compiling():
                explanation_check.check_once(options.explain, model, images, labels, logits, maps)
        losses, std = loss_of_maps(maps)
        harmonization = losses.sum()
    if batch.others is not None and images.shape[0]:
        other_logits = aside(batch.others) if other_logits is None else other_logits
        logits = torch.cat([logits, other_logits])
    if batch.inverse is not None:
        logits = logits[batch.inverse]
    # bfloat16 has 8 bits, too few for a logarithm of a sum.
    wide = logits.to(contract.accumulation_dtype(logits))
    if harmonization is None:
        # Still in the graph; in float32, where a GradScaler's 2**16 is no infinity.
        harmonization = wide.sum() * 0
        if isinstance(options.alignment, nn.Module):  # whose weights some process may have used
            harmonization = harmonization + sum(p.sum() * 0 for p in options.alignment.parameters())
    cross_entropy = _criterion(options)(wide, batch.labels)
    loss = cross_entropy + options.lambda_harmonization * harmonization
    penalty = logits.new_zeros(())
    if options.lambda_weights and penalized:
        penalty = penalty_of(penalized).to(logits.device)
        loss = loss + options.lambda_weights * penalty
    norms = None
    if options.gradient_norms and create_graph:
        terms = {"cross_entropy": cross_entropy, "harmonization": harmonization}
        parameters = network.parameters(model)
        norms = {name: diagnostics.gradient_norm(t, parameters) for name, t in terms.items()}
    mapped = batch.weights != 0
    std = std.detach()
    return HarmonizerOutput(
        loss=loss,
        cross_entropy=cross_entropy.detach(),
        harmonization=harmonization.detach(),
        weight_penalty=penalty.detach(),
        logits=logits.detach(),
        saliency=maps.detach(),
        saliency_rows=batch.rows,
        # Rows without a human map are not read: their standard deviation is 0.
        saliency_std=std.sum() / mapped.sum().clamp(min=1),
        row_saliency_std=std,
        epsilon_ratio=diagnostics.epsilon_ratio(std, mapped),
        mapped_rows=mapped.sum(),
        gradient_norms=norms,
        second_order_gap=gap,
    )


def harmonizer_loss(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    heatmaps: Tensor,
    tokens: Tensor | None = None,
    *,
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
) -> HarmonizerOutput:
    """The complete loss of one training step, differentiable through the saliency.

    ``cross entropy + lambda_harmonization * alignment + lambda_weights * weight penalty``, with one
    forward pass of every row for the first two. Source: ``harmonizer_loss`` in ``training/loss.py``
    of the authors' package; equations (1) and (2) of the paper. Call ``.loss.backward()`` on the
    result. Under ``torch.no_grad()`` it gives the values alone. ``HarmonizerLoss`` is its module
    twin, and compiles. docs/training.md has what works with what, measured.

    Args:
        model: maps images (B, C, H, W) to logits (B, classes); its train or eval mode is left as
            it is (released: train). DistributedDataParallel and FSDP2 are welcome. So is any other
            callable: the modules behind it are found by running it once, and must have all of its
            weights where those are penalized.
        images: (B, C, H, W), floating point.
        labels: class indices (B,), or soft labels (B, classes); the saliency's targets follow them.
        heatmaps: human maps, (B, H, W) or (B, 1, H, W); any finite values where the token is 0.
        tokens: (B,), weight >= 0 of each row's human map, 0 where it has none; None means 1. Kept
            on the CPU they spare a wait for the device, which choosing rows by them needs.
        criterion: ``criterion(logits, labels) -> scalar``; None is cross entropy with label
            smoothing 0.1, as released.
        lambda_harmonization: factor of the alignment.
        lambda_weights: factor of ``weight_penalty(model)``; 0 leaves it to the optimizer.
        formulation, levels, distance, backend: as in ``harmonization_loss``.
        alignment: in place of the fused loss, ``alignment(maps, heatmaps, tokens) -> (R,)``: a loss
            for each of R rows, of maps (R, C, H, W) or (R, H, W) as ``explain`` gives them and
            human maps (R, H, W). Its tokens are 1 where a row has a human map and 0 where it has
            none; such a row is given maps of zeros, and counts 0. The step weighs the rows.
            ``harmonizer_ext.map_losses`` has some. A module may have weights of its own.
        explain: ``explain(model, images, targets, *, create_graph) -> (logits, maps)``; None is
            ``input_gradient``. Any differentiable explanation serves; with FSDP2, any that runs the
            model once. Its maps must carry a whole graph, which is looked at once for a model, a
            mode and an explanation as it is set (with FSDP2, for second derivatives alone).
        rows: which rows take the saliency path. "all", as released; "mapped", those with a token,
            in a forward pass of their own; "auto", "mapped" where that changes nothing. That is
            tried out once for a model in a mode, by some eight forward passes that leave no trace:
            no row's logits may depend on other rows, and no forward pass may change what a later
            one finds (running statistics, counters). A true attribute ``couples_rows`` of a module
            says so too. Dropout and drop-path draw anew for each part: the same distribution,
            other numbers; a number drawn once for a batch is drawn for each part.
            Processes of one model may have maps for any of their rows, or none; but give tokens to
            all of them or to none.
        second_order: "exact", the double backward; or "finite_difference", a central difference
            for smooth networks whose flash attention, reentrant checkpoints or compiled model must
            stay, or a ``FiniteDifference`` with options.
        reduction: what the alignment divides by: "mean", all B rows, as released; "mean_valid",
            the sum of tokens, over all processes that train the model.
        process_group: whose tokens "mean_valid" counts; None is that of the model's wrapper. Name
            it where another wrapper than ``model`` averages the gradients.
        scaler: the GradScaler of float16 training, so that the saliency does not vanish; the loss
            is scaled as ever, ``scaler.scale(out.loss).backward()``.
        gradient_norms: True for the gradient norms of the two terms, at the cost of two more
            backward passes; of this process alone.

    Returns:
        HarmonizerOutput: the loss, its terms, logits, maps and diagnostics.

    Raises:
        NoGraphError: ``explain`` returned maps or logits without a graph.
        SecondDerivativeError: the model cannot be differentiated twice as it stands, or the maps
            of ``explain`` depend on parameters that their graph does not reach; the message says
            what to change.
        TypeError, ValueError, RuntimeError: as in ``harmonization_loss`` and ``input_gradient``;
            finite differences of a network that is not smooth or couples rows; weights to be
            penalized that no module has.
    """
    options = Options(
        criterion, lambda_harmonization, lambda_weights, formulation, levels, distance, alignment,
        explain, rows, second_order, reduction, process_group, scaler, gradient_norms, backend,
    )  # fmt: skip
    return eager_step(model, images, labels, heatmaps, tokens, options)


def penalized_weights(
    model: Callable[[Tensor], Tensor], images: Tensor, options: Options
) -> list[nn.Parameter]:
    """The weights that the penalty is of, found by running a model that is no module itself.

    Raises:
        TypeError, ValueError: the weights of something that is no module are to be penalized, and
            not all of them can be found.
    """
    if not callable(model):
        raise TypeError(
            f"model: expected a torch.nn.Module or another callable from images to logits, "
            f"got {type(model).__name__}"
        )
    found = network.behind(model)
    if images.shape[0]:
        found = network.discover(model, images, graph=not distributed.is_wrapped(model))
    if options.lambda_weights and found.orphans:
        shapes = ", ".join(map(str, found.orphans[:3])) + (", ..." if found.orphans[3:] else "")
        raise ValueError(
            f"lambda_weights: expected 0, or a model whose modules say which of its weights are "
            f"penalized (those of normalization layers and embeddings are not); got a "
            f"{type(model).__name__} whose logits depend on tensors of shape {shapes} that no "
            f"module has. Pass the torch.nn.Module, or lambda_weights=0 and decay the weights in "
            f"the optimizer"
        )
    return penalized_parameters(found.roots) if options.lambda_weights else []


def eager_step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    heatmaps: Tensor,
    tokens: Tensor | None,
    options: Options,
) -> HarmonizerOutput:
    """``harmonizer_loss`` with its options checked."""
    create_graph = torch.is_grad_enabled()
    weights = penalized_weights(model, images, options)
    if create_graph and options.difference is None:
        double_backward.check_model(model)
    if options.gradient_norms and distributed.is_sharded(model):
        raise ValueError(
            "gradient_norms: expected False with FSDP2, whose weights are not the graph's; norm "
            "the gradients after backward"
        )
    if create_graph and options.lambda_weights and distributed.has_fsdp1(model):
        raise ValueError(
            "lambda_weights: expected 0 with FullyShardedDataParallel (FSDP1), which exchanges the "
            "weights while the loss is computed; use the optimizer's weight decay, or "
            "torch.distributed.fsdp.fully_shard(model) (FSDP2)"
        )
    batch = batch_of(model, images, labels, heatmaps, tokens, options)
    with twice_differentiable.own_biases(model):
        out = compute(model, batch, options, create_graph, weights)
    diagnostics.watch_epsilon(out.epsilon_ratio)
    return out
