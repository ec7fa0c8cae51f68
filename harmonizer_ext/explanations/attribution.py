"""Explanations of other libraries, and plain functions, as explanations of this one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from harmonizer_ext import distributed
from harmonizer_ext.loss import NoGraphError
from harmonizer_ext.saliency import Targets, checked_logits

from .maps import Reduce, check_reduce, reduce_channels


class Attribution:
    """Makes an explanation of Captum's attributions and of functions of images and labels.

    To be trained through, the maps must carry a graph to the parameters. Those of Captum and of
    most other libraries do not.

    Args:
        function: an object with ``attribute(images, target=labels) -> maps``, as Captum has them;
            or a function ``f(images, labels) -> maps``, as the released ``evaluate_clickme``
            takes them. Maps are (B, H, W) or (B, C, H, W), in a tensor or in what
            ``torch.as_tensor`` reads, such as a NumPy array. It knows its model itself.
        reduce: channels to one value. ``"mean"`` is what the released ``evaluate_clickme`` does
            with maps that have channels.
        options: more keywords for each call, such as ``n_steps=20``.
    """

    def __init__(
        self, function: Callable[..., Any] | Any, *, reduce: Reduce = "abs_max", **options: Any
    ) -> None:
        check_reduce(reduce)
        attribute = getattr(function, "attribute", None)
        if not callable(attribute) and not callable(function):
            raise TypeError(
                f"function: expected an object with attribute(images, target=...) or a function "
                f"f(images, labels), got {type(function).__name__}"
            )
        self.function = function
        self.reduce = reduce
        self.options = options

    def __repr__(self) -> str:
        named = getattr(self.function, "__name__", type(self.function).__name__)
        return f"Attribution({named}, reduce={self.reduce!r})"

    def __call__(
        self,
        model: Callable[..., Tensor],
        images: Tensor,
        targets: Targets,
        *,
        create_graph: bool,
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, classes) and maps (B, H, W).

        Raises:
            TypeError: ``targets`` is no tensor, or the maps are nothing that a tensor can hold.
            ValueError: the attribution is of another model.
            NoGraphError: ``create_graph``, and the maps carry none.
        """
        if not isinstance(targets, Tensor):
            raise TypeError(
                f"targets: expected a tensor of labels, got {type(targets).__name__}; functions of "
                f"the logits serve the explanations of harmonizer_ext itself"
            )
        self._check_model(model)
        with torch.enable_grad():
            inputs = images if images.requires_grad else images.detach().requires_grad_()
            attribute = getattr(self.function, "attribute", None)
            if callable(attribute):
                maps = attribute(inputs, target=targets, **self.options)
            else:
                maps = self.function(inputs, targets, **self.options)
        maps = maps if isinstance(maps, Tensor) else torch.as_tensor(maps, device=images.device)
        maps = reduce_channels(maps.to(images.device), self.reduce)
        if create_graph and not maps.requires_grad:
            raise NoGraphError(
                f"explain: expected maps that carry a graph to the parameters, got maps of "
                f"{self!r} without one; the explanations of harmonizer_ext can be trained through"
            )
        with torch.set_grad_enabled(create_graph):
            logits = model(images)
        return (checked_logits(logits) if create_graph else logits), maps

    def _check_model(self, model: object) -> None:
        explained = getattr(self.function, "forward_func", None)  # Captum's name for its model
        if (
            isinstance(explained, nn.Module)
            and isinstance(model, nn.Module)
            and distributed.unwrapped(explained) is not distributed.unwrapped(model)
        ):
            raise ValueError(
                f"explain: expected an attribution of this model, got one of another "
                f"({type(explained).__name__}); make one for each model"
            )
