"""Grad-CAM, which can be trained through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harmonizer_ext import distributed, double_backward, grouped_convolution, twice_differentiable
from harmonizer_ext.saliency import Targets, checked_logits, target_scores


class GradCAM:
    """Features of a layer, weighted by how much the target's logit depends on each.

    ``relu(sum over features k of mean(gradient_k) * feature_k)``, the mean over places (Selvaraju
    et al., 2017), brought to the size of the image by bilinear interpolation. Twice differentiable.

    Of a transformer's tokens (B, T, D) the class and register tokens are left out and the others
    laid out in the image's proportions. Take a layer whose image tokens the logits still depend on:
    behind the last block of a network that reads its class token they do not, and the map is
    constant; ``"blocks.11.norm1"`` of a ViT with 12 blocks will do.

    Args:
        layer: a module of the model, or its dotted name, which serves for several models; for
            instance ``"layer4"`` of a ResNet.
        relu: whether to cut negative values, as published.
        reshape_transform: from the layer's output to (B, features, h, w), where it is neither that
            nor tokens; ``lambda x: x.permute(0, 3, 1, 2)`` for a Swin transformer of timm.
    """

    def __init__(
        self,
        layer: nn.Module | str,
        *,
        relu: bool = True,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if not isinstance(layer, nn.Module | str):
            raise TypeError(f"layer: expected a module or its name, got {type(layer).__name__}")
        self.layer = layer
        self.relu = relu
        self.reshape_transform = reshape_transform

    def __repr__(self) -> str:
        layer = self.layer if isinstance(self.layer, str) else type(self.layer).__name__
        return f"GradCAM(layer={layer!r}, relu={self.relu})"

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
            TypeError: the model is no module.
            ValueError: it has no such layer, the layer does not run once, or its output is of
                another form than features or tokens.
        """
        layer = self._find(model)
        assert isinstance(model, nn.Module)
        with (
            torch.enable_grad(),
            double_backward.clear_errors(),
            twice_differentiable.own_biases(model),
        ):
            # Features need a graph even where no parameter does.
            pixels = images if images.requires_grad else images.detach().requires_grad_()
            if not create_graph:
                return self._explain(model, layer, pixels, targets, False)
            double_backward.check_model(model)
            with (
                double_backward.saliency_forward(model) as grouped,
                distributed.whole_until_second_backward(model),
                grouped_convolution.inputs_only(grouped),
            ):
                logits, maps = self._explain(model, layer, pixels, targets, True)
            double_backward.check_graph_once(maps, model)
            return logits, maps

    def _explain(
        self, model: nn.Module, layer: nn.Module, pixels: Tensor, targets: Targets, graph: bool
    ) -> tuple[Tensor, Tensor]:
        outputs: list[Any] = []

        def keep(module: nn.Module, args: Any, output: Any) -> Any:
            outputs.append(output)
            # What follows may work in place.
            return output.clone() if isinstance(output, Tensor) else output

        handle = layer.register_forward_hook(keep)
        try:
            logits = checked_logits(model(pixels))
        finally:
            handle.remove()
        if len(outputs) != 1:
            raise ValueError(
                f"layer: expected one that runs once, got one that ran {len(outputs)} times"
            )
        (output,) = outputs
        if not isinstance(output, Tensor):
            raise ValueError(
                f"layer: expected one whose output is a tensor, got {type(output).__name__}"
            )
        score = target_scores(logits, targets).sum()
        (gradient,) = torch.autograd.grad(score, output, create_graph=graph, materialize_grads=True)
        features, gradient = (self._grid(t, model, pixels) for t in (output, gradient))
        maps = (gradient.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True)
        maps = maps.relu() if self.relu else maps
        resized = F.interpolate(maps, tuple(pixels.shape[-2:]), mode="bilinear")
        return logits, resized[:, 0] if graph else resized[:, 0].detach()

    def _find(self, model: object) -> nn.Module:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model: Grad-CAM looks into it, expected a torch.nn.Module, got "
                f"{type(model).__name__}"
            )
        if isinstance(self.layer, nn.Module):
            if not any(module is self.layer for module in model.modules()):
                raise ValueError(
                    "layer: expected a module of the model, got one of another; give its dotted "
                    "name, which serves for several models"
                )
            return self.layer
        inner: nn.Module = distributed.unwrapped(model)
        try:
            return inner.get_submodule(self.layer)
        except AttributeError as error:
            names = [name for name, _ in inner.named_children()]
            raise ValueError(
                f"layer: expected the dotted name of a module, got {self.layer!r}; the model has "
                f"{', '.join(names)}"
            ) from error

    def _grid(self, values: Tensor, model: nn.Module, pixels: Tensor) -> Tensor:
        """(B, features, h, w) of a layer's output, or of the gradient with respect to it."""
        if self.reshape_transform is not None:
            values = self.reshape_transform(values)
        elif values.ndim == 3:
            values = _tokens_to_grid(values, distributed.unwrapped(model), pixels.shape[-2:])
        if values.ndim != 4:
            raise ValueError(
                f"layer: expected an output (B, features, h, w) or tokens (B, T, D), got "
                f"{tuple(values.shape)}; reshape_transform= can bring it into the first form"
            )
        return values


def _tokens_to_grid(tokens: Tensor, model: object, size: torch.Size) -> Tensor:
    """(B, T, D) to (B, D, h, w) in the proportions of an image of this size."""
    count = tokens.shape[1]
    known = getattr(model, "num_prefix_tokens", None)  # timm: class token and registers
    for prefix in (0, 1) if known is None else (known, 0):
        places = count - prefix
        height = round((places * size[0] / size[1]) ** 0.5)
        if height and places % height == 0 and height * size[1] == places // height * size[0]:
            grid: Tensor = tokens[:, prefix:].unflatten(1, (height, places // height))
            return grid.permute(0, 3, 1, 2)
    raise ValueError(
        f"layer: expected tokens that fill a grid in the proportions of {size[0]}x{size[1]} "
        f"pixels, got {count}; reshape_transform= can lay them out"
    )
