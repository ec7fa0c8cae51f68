"""Is the gradient of the alignment right for this network? Double backward against two oracles."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from harmonizer_ext import (
    distributed,
    double_backward,
    explained_gradients,
    twice_differentiable,
)
from harmonizer_ext import network as networks
from harmonizer_ext.backends.reference import STANDARDIZE_EPSILON
from harmonizer_ext.loss import harmonization_loss
from harmonizer_ext.saliency import Explain, Targets, input_gradient, target_scores

#: Parameters, by their name in the model, to a gradient of the same shape.
Gradients = dict[str, Tensor]

#: Parts of the largest gradient of all that errors are relative to at least. A bias before a
#: BatchNorm has the gradient zero: what rounding leaves of it is no error. Of differences it leaves
#: more, because they are taken of the ordinary gradient, which is not zero.
_FLOOR, _FLOOR_OF_DIFFERENCES = 1e-6, 1e-3

#: Root mean squares of the steps of central differences, relative to that of the images. The first
#: is best where it serves: the shorter, the more rounding is left, 1e-16 over the step. Networks
#: with kinks need short ones, that meet none.
_STEPS = (1e-5, 1e-6, 1e-7, 1e-8)

#: Two steps of a smooth network agree to 1e-8 or so; a kink between them makes 1e-3 to 1e5.
_SMOOTH = 1e-5


@dataclass(frozen=True)
class OracleResult:
    """How far double backward is from one oracle.

    Attributes:
        relative_error: the largest difference of any element, relative to the largest element of
            its parameter's gradient (at least 1e-6 of the largest of all, for central differences
            1e-3); None where the oracle could not run.
        worst_parameter: name of the parameter that holds it.
        reason: why the oracle could not run, or None.
    """

    relative_error: float | None = None
    worst_parameter: str | None = None
    reason: str | None = None


def _some(names: tuple[str, ...], most: int = 5) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True)
class GradientCheck:
    """The findings of ``check_gradients``; ``print`` it for a report.

    Attributes:
        passed: True where every oracle that ran agrees to ``tolerance``; False where one does not,
            or the gradient is zero everywhere or not finite; None where no oracle could run.
        tolerance: the relative error that was allowed.
        loss: the harmonization loss of the batch, in float64.
        forward_over_reverse: against the derivative of the ordinary parameter gradient along the
            loss's gradient, by forward-mode differentiation. Exact wherever it runs.
        finite_difference: the same derivative by central differences. For smooth networks, and
            others as long as a short step meets no kink (ReLU, max pooling): steps that disagree
            show it.
        parameters: number of trainable elements.
        zero_share: part of them, 0 to 1, whose gradient is exactly zero.
        zero_parameters: names of the parameters whose whole gradient is exactly zero. The last
            layer's bias always is: the saliency does not depend on it.
        saliency_std: mean over the images of the standard deviation of their maps; well above the
            loss's epsilon of 1e-5 in a network that can be harmonized.
        replaced: names of the modules that lack a second derivative and were replaced in the copy;
            ``make_twice_differentiable(model)`` does it in the network itself.
    """

    passed: bool | None
    tolerance: float
    loss: float
    forward_over_reverse: OracleResult
    finite_difference: OracleResult
    parameters: int
    zero_share: float
    zero_parameters: tuple[str, ...]
    saliency_std: float
    replaced: tuple[str, ...]

    def __str__(self) -> str:
        """A report of some lines."""
        verdict = {True: "right", False: "WRONG", None: "not checked, no oracle could run"}
        lines = [
            f"gradient of the harmonization loss, {self.parameters:,} parameters in float64: "
            f"{verdict[self.passed]} (allowed {self.tolerance:.0e})"
        ]
        for name, oracle in (
            ("forward over reverse", self.forward_over_reverse),
            ("central difference", self.finite_difference),
        ):
            if oracle.relative_error is None:
                text = oracle.reason or ""
            else:
                text = f"relative error {oracle.relative_error:.1e}"
                text += f", worst in {oracle.worst_parameter}"
            lines.append(f"  {name:<21} {text}")
        zeros = f"{100 * self.zero_share:.3g} % of the elements"
        if self.zero_parameters:
            zeros += f"; all of {_some(self.zero_parameters)}"
        lines.append(f"  {'exactly zero':<21} {zeros}")
        lines.append(f"  {'saliency std':<21} {self.saliency_std:.2e}")
        if self.saliency_std < STANDARDIZE_EPSILON:
            lines[-1] += (
                f", below the loss's epsilon {STANDARDIZE_EPSILON:.0e}: the alignment has little "
                f"to hold on to (equal labels in a batch with BatchNorm? a head that starts at "
                f"zero?)"
            )
        if self.replaced:
            lines.append(
                f"  {'to be replaced':<21} {_some(self.replaced)}: "
                f"harmonizer_ext.make_twice_differentiable(model)"
            )
        return "\n".join(lines)


# --- the copy -------------------------------------------------------------------------------------


def _unwrapped(model: nn.Module) -> nn.Module:
    model = model.module if isinstance(model, nn.DataParallel) else distributed.unwrapped(model)
    inner: nn.Module = getattr(model, "_orig_mod", model)  # of torch.compile
    return inner


def _double_copy(model: nn.Module, explain: Explain | None) -> tuple[nn.Module, Any]:
    """A copy of the network in float64, and the explanation of that copy."""
    if explain is not None and networks.refers_by_code(explain, model):
        raise ValueError(
            "explain: expected one that explains the model that it is called with, got a function "
            "that refers to this model itself, of which a copy in float64 is checked; use its "
            "argument, or make it an object that holds the model, which is copied along"
        )
    # Cached biases carry a graph, which cannot be copied: their copies are empty.
    without: dict[int, Any] = {id(cache): {} for cache in twice_differentiable.bias_caches(model)}
    try:
        twin, explained = copy.deepcopy((model, explain), without)
    except (RuntimeError, TypeError) as error:
        what = f"{type(model).__name__}" + ("" if explain is None else " or its explanation")
        raise RuntimeError(
            f"model: expected one that copy.deepcopy can copy, got {what}, which "
            f"it cannot: {error}. Pass a freshly built network with the same weights"
        ) from error
    if isinstance(explained, nn.Module):
        explained.double()
    return twin.double(), explained


def _keep_activations(model: Any) -> None:
    """Turns checkpointing off, which torch.func does not accept."""
    if hasattr(model, "set_grad_checkpointing"):  # timm
        model.set_grad_checkpointing(False)
    if hasattr(model, "gradient_checkpointing_disable"):  # transformers
        model.gradient_checkpointing_disable()


class _Network:
    """A network as a function of its parameters and images: every call starts from one state."""

    def __init__(self, model: nn.Module, targets: Targets, seed: int) -> None:
        self.model = model
        self.targets = targets
        self.parameters: Gradients = {
            name: p.detach() for name, p in model.named_parameters() if p.requires_grad
        }
        self._frozen = {
            name: p.detach() for name, p in model.named_parameters() if not p.requires_grad
        }
        self._buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self._seed = seed

    @contextlib.contextmanager
    def state(self, device: torch.device) -> Iterator[None]:
        """The same random numbers, attention that can be differentiated, no cached biases."""
        on_gpu = device.type == "cuda"
        with (
            torch.random.fork_rng([device] if on_gpu else []),
            sdpa_kernel(SDPBackend.MATH),
            twice_differentiable.own_biases(self.model),
        ):
            # Not torch.manual_seed: that seeds the devices too whose state is not kept here.
            torch.default_generator.manual_seed(self._seed)
            if on_gpu:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(self._seed)
            yield

    def maps_of(self, explain: Explain, pixels: Tensor) -> Tensor:
        """The maps of an explanation, without a graph; what its passes change is put back."""
        try:
            with self.state(pixels.device):
                return explain(self.model, pixels, self.targets, create_graph=False)[1]
        finally:
            for name, buffer in self.model.named_buffers():
                buffer.data.copy_(self._buffers[name])

    def score(self, parameters: Gradients, pixels: Tensor) -> Tensor:
        """Sum of the target scores; statistics of BatchNorm are updated in copies alone."""
        buffers = {name: buffer.clone() for name, buffer in self._buffers.items()}
        logits = torch.func.functional_call(
            self.model, {**parameters, **self._frozen, **buffers}, (pixels,)
        )
        return target_scores(logits, self.targets).sum()


# --- double backward and its oracles --------------------------------------------------------------


def _double_backward(
    network: _Network, images: Tensor, heatmaps: Tensor, explain: Explain | None = None
) -> tuple[Gradients, Tensor, float, float]:
    """Gradients of the loss, its gradient at the maps, its value and the saliency's deviation."""
    named = {name: p for name, p in network.model.named_parameters() if p.requires_grad}
    explained = input_gradient if explain is None else explain
    with network.state(images.device), torch.enable_grad(), double_backward.clear_errors():
        _, maps = explained(network.model, images, network.targets, create_graph=True)
        loss = harmonization_loss(maps, heatmaps, backend="reference")
        leaf = maps.detach().requires_grad_()  # where no hook of the explanation's is
        (at_maps,) = torch.autograd.grad(
            harmonization_loss(leaf, heatmaps, backend="reference"), leaf
        )
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    flat = maps.detach() if maps.ndim == 3 else maps.detach().mean(1)
    std = flat.std((-2, -1), correction=0)
    filled = {
        name: torch.zeros_like(p) if gradient is None else gradient.detach()
        for (name, p), gradient in zip(named.items(), gradients, strict=True)
    }
    return filled, at_maps.detach(), loss.item(), std.mean().item()


def _forward_over_reverse(network: _Network, images: Tensor, direction: Tensor) -> Gradients:
    """(d/dx d/dparameters of the score) direction, the derivatives taken in the other order."""

    def gradient(pixels: Tensor) -> Gradients:
        found: Gradients = torch.func.grad(network.score)(network.parameters, pixels)
        return found

    with network.state(images.device):
        tangent = torch.func.jvp(gradient, (images,), (direction,))[1]
    result: Gradients = {name: value.detach() for name, value in tangent.items()}
    return result


def _gradient_at(network: _Network, pixels: Tensor) -> Gradients:
    leaves = {name: p.detach().requires_grad_() for name, p in network.parameters.items()}
    with network.state(pixels.device), torch.enable_grad():
        gradients = torch.autograd.grad(
            network.score(leaves, pixels), list(leaves.values()), allow_unused=True
        )
    return {
        name: torch.zeros_like(p) if gradient is None else gradient
        for (name, p), gradient in zip(leaves.items(), gradients, strict=True)
    }


def _central_difference(
    network: _Network, images: Tensor, direction: Tensor, step: float
) -> Gradients:
    size = float(images.square().mean().sqrt()) or 1.0
    step = step * size / float(direction.square().mean().sqrt())
    ahead = _gradient_at(network, images + step * direction)
    behind = _gradient_at(network, images - step * direction)
    return {name: (ahead[name] - behind[name]) / (2 * step) for name in ahead}


def _compare(got: Gradients, expected: Gradients, floor: float = _FLOOR) -> OracleResult:
    largest = max(float(value.abs().max()) for value in expected.values())
    worst, worst_name = -1.0, ""
    for name, value in expected.items():
        size = max(float(value.abs().max()), floor * largest)
        difference = float((got[name] - value).abs().max())
        # Zero on both sides is right; a gradient where none should be is wrong altogether.
        error = 0.0 if difference == 0 else difference / size if size else float("inf")
        if not error <= worst:  # NaN is the worst
            worst, worst_name = error, name
    return OracleResult(worst, worst_name)


def _against_forward_over_reverse(
    network: _Network, images: Tensor, direction: Tensor, exact: Gradients
) -> OracleResult:
    try:
        return _compare(exact, _forward_over_reverse(network, images, direction))
    # An operation without forward-mode differentiation, or one that torch.func does not accept.
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0][:300]
        return OracleResult(reason=f"could not run: {type(error).__name__}: {first}")


def _against_central_differences(
    network: _Network, images: Tensor, direction: Tensor, exact: Gradients
) -> tuple[OracleResult, float]:
    """The result, and how well it is known: the difference of the two steps."""
    closest = float("inf")
    long = _central_difference(network, images, direction, _STEPS[0])
    for step in _STEPS[1:]:
        short = _central_difference(network, images, direction, step)
        apart = _compare(long, short, _FLOOR_OF_DIFFERENCES).relative_error
        assert apart is not None
        if apart <= _SMOOTH:
            return _compare(exact, short, _FLOOR_OF_DIFFERENCES), apart
        closest = min(closest, apart)
        long = short
    reason = f"not defined: no two steps agree, the closest to {closest:.0e}; the network "
    return OracleResult(reason=reason + "has kinks (ReLU, max pooling) or is too steep"), closest


def _against_the_explanation(
    network: _Network,
    images: Tensor,
    direction: Tensor,
    exact: Gradients,
    explain: Explain,
    tolerance: float,
    seed: int,
) -> tuple[OracleResult, OracleResult, float]:
    """The findings by differences of the maps along random directions, and their accuracy."""
    oracle = explained_gradients.Oracle(
        network.model, lambda: network.maps_of(explain, images), network.parameters, direction
    )
    found, apart = explained_gradients.compare(oracle, exact, tolerance, seed)
    difference = OracleResult(reason=found) if isinstance(found, str) else OracleResult(*found)
    forward = OracleResult(reason="of no use here: to it, too, what is detached is a constant")
    return forward, difference, apart


def _human_like_maps(images: Tensor, seed: int) -> Tensor:
    """Smooth random blobs, (B, 1, H, W): where the check is given no human maps."""
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = (images.shape[0], 1, 6, 6)
    coarse = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
    size = (images.shape[-2], images.shape[-1])
    return F.interpolate(coarse, size, mode="bilinear").to(images.device)


def check_gradients(
    model: nn.Module,
    images: Tensor,
    labels: Targets,
    *,
    explain: Explain | None = None,
    heatmaps: Tensor | None = None,
    tolerance: float = 1e-6,
    seed: int = 0,
) -> GradientCheck:
    """Whether the gradient of the harmonization loss is right for this network, for all parameters.

    A layer that breaks double backward seldom says so: a hand-written ``autograd.Function`` or a
    fused kernel may drop a part of the graph, and the network then learns from a wrong gradient.
    This computes the gradient as training does, in float64, and compares it element by element with
    two derivations that do not differentiate a backward pass backwards: forward mode through the
    ordinary backward pass, and central differences of it. Run it once for a network, in the mode in
    which it is trained, on two to four images: it takes the time of some twenty ordinary steps in
    float64, and eight copies of the parameters.

    The model is not changed: a copy is made, in float64. Random layers (dropout) draw the same
    numbers in all passes; statistics of BatchNorm are those of the batch or of the model, by mode.

    Args:
        model: maps images (B, C, H, W) to logits (B, classes), on any device with float64. Of
            DataParallel, DistributedDataParallel and ``torch.compile``, the module within is taken.
        images: (B, C, H, W), a float dtype, two images or more, normalized as for training.
        labels: class indices (B,), soft labels (B, classes) or a function of the logits that gives
            (B,). Different classes: with BatchNorm before the head, equal ones give saliency zero.
        explain: the explanation that is trained through, as in ``harmonizer_loss``; None is the
            input gradient. It is compared along random directions, all parameters at once, and each
            by itself where they do not agree. One that holds the model or its layers is copied
            along with it; a function must explain the model that it is called with.
        heatmaps: human maps, (B, H, W) or (B, 1, H, W); None takes smooth random ones.
        tolerance: relative error allowed; against central differences no less than their own, at
            most 1e-4. What rounding in float64 leaves is 1e-15 to 1e-9.
        seed: of the random layers and the random maps.

    Returns:
        GradientCheck: errors against both oracles, the worst parameter, and what else to know.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value; the model has no
            trainable parameter; the explanation is a function that refers to the model.
        NoGraphError: the explanation's maps carry no graph.
        SecondDerivativeError: the model cannot be differentiated twice as it stands.
        RuntimeError: the model cannot be copied.

    Example:
        >>> print(check_gradients(model.train(), images[:2], labels[:2]))
        gradient of the harmonization loss, 25,557,032 parameters in float64: right (allowed 1e-06)
        ...
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"images: expected floating-point (B, C, H, W), got {images.dtype} of shape "
            f"{tuple(images.shape)}"
        )
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance: expected a relative error between 0 and 1, got {tolerance}")
    model = _unwrapped(model)
    if distributed.is_sharded(model):
        raise ValueError(
            "model: expected a whole model, got one whose parameters are sharded (FSDP2); check it "
            "before fully_shard"
        )
    copied, explain = _double_copy(model, explain)
    replaced = twice_differentiable.make_twice_differentiable(copied)
    pixels = images.detach().double()
    if isinstance(labels, Tensor) and labels.is_floating_point():
        labels = labels.double()
    human = _human_like_maps(pixels, seed) if heatmaps is None else heatmaps.detach().double()
    network = _Network(copied, labels, seed)
    if not network.parameters:
        raise ValueError("model: expected trainable parameters, got none with requires_grad=True")
    explained = () if explain is None else (explain,)
    exact, direction, loss, std = _double_backward(network, pixels, human, *explained)
    zeros = {name: int((value == 0).sum()) for name, value in exact.items()}
    count = sum(value.numel() for value in exact.values())
    passed: bool | None = False
    if not all(bool(value.isfinite().all()) for value in exact.values()):
        forward_over_reverse = OracleResult(reason="did not run: the gradient is not finite")
        finite_difference = forward_over_reverse
    elif not direction.any():
        forward_over_reverse = OracleResult(reason="did not run: the loss is flat in the saliency")
        finite_difference = forward_over_reverse
    else:
        _keep_activations(copied)
        if explain is None:
            oracles = (network, pixels, direction, exact)
            forward_over_reverse = _against_forward_over_reverse(*oracles)
            finite_difference, apart = _against_central_differences(*oracles)
        else:
            forward_over_reverse, finite_difference, apart = _against_the_explanation(
                network, pixels, direction, exact, explain, tolerance, seed
            )
        # Ten, because the two steps may be off to the same side in the element that is worst.
        known = max(tolerance, 10 * apart)
        allowed = ((forward_over_reverse, tolerance), (finite_difference, known))
        verdicts = [
            oracle.relative_error <= most
            for oracle, most in allowed
            if oracle.relative_error is not None
        ]
        passed = all(verdicts) and sum(zeros.values()) < count if verdicts else None
    return GradientCheck(
        passed=passed,
        tolerance=tolerance,
        loss=loss,
        forward_over_reverse=forward_over_reverse,
        finite_difference=finite_difference,
        parameters=count,
        zero_share=sum(zeros.values()) / count,
        zero_parameters=tuple(name for name, n in zeros.items() if n == exact[name].numel()),
        saliency_std=std,
        replaced=tuple(replaced),
    )
