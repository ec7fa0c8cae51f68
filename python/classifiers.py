"""Networks without a classifier, whose features are no classes: refused by all programs."""

from __future__ import annotations

from typing import Any

import timm_networks
from torch import nn

timm_networks.import_torchvision()
from timm.data import infer_imagenet_subset  # noqa: E402

#: What ClickMe and Clicktionary are labelled with.
IMAGENET_CLASSES = 1000


def check_classifier(model: Any, name: str) -> None:
    """Refuses a network whose outputs are features: "class 17" would be feature 17.

    Raises:
        ValueError: it says so itself, as timm's networks do: by ``num_classes`` or by a classifier
            without parameters, which passes on what it is given, also within another module.
    """
    model = _within(model)
    head = model.get_classifier() if hasattr(model, "get_classifier") else None
    passes_on = isinstance(head, nn.Module) and not any(True for _ in head.parameters())
    if getattr(model, "num_classes", None) == 0 or passes_on:
        width = getattr(model, "num_features", None)
        features = "features" if width is None else f"{width} features"
        raise ValueError(
            f"model: expected a network with a classifier, got {name!r}, which gives {features} "
            f"and no classes. Train one on it (python/train.py --model {name} --num-classes N) and "
            f"evaluate its checkpoint; or name weights that have one: --checkpoint FILE "
            f"--num-classes N"
        )


def _within(model: Any) -> Any:
    """The network in modules that add no parameters to it."""
    while isinstance(model, nn.Module) and not hasattr(model, "get_classifier"):
        own = {id(parameter) for parameter in model.parameters()}
        inner = [
            child
            for child in model.children()
            if own and own == {id(parameter) for parameter in child.parameters()}
        ]
        if not inner:
            break
        model = inner[0]
    return model


def check_own_classes(name: str, own: int | None, asked: int | None) -> None:
    """Refuses another number of classes than timm's weights have: the classifier would be random.

    Args:
        name: of the network.
        own: classes of its weights; None where timm does not say.
        asked: classes that are asked for; None for its own.

    Raises:
        ValueError: they differ.
    """
    if asked is not None and own is not None and asked != own:
        raise ValueError(
            f"num_classes: expected {own}, the classes of timm's weights of {name!r}, got {asked}, "
            f"for which its classifier would be random; name weights of {asked} classes: "
            f"--checkpoint FILE"
        )


def is_imagenet(model: Any) -> bool:
    """Whether the outputs of timm's own weights of a network are classes of an ImageNet.

    Those of CLIP and its kin are an embedding of as many numbers as there could be classes.
    """
    return infer_imagenet_subset(model) is not None


def check_imagenet(classes: int, name: str, own: bool = True) -> None:
    """Refuses a network of more classes than the 1,000 that ClickMe's labels are numbers of.

    Args:
        classes: number of its outputs.
        name: of the network.
        own: whether its outputs may be classes of ImageNet, by ``is_imagenet``.

    Raises:
        ValueError: its classes are others, such as those of ImageNet-21k, or begin with one for
            the background.
    """
    if not own:
        raise ValueError(
            f"model: expected a network of ImageNet's classes, got {name}, whose weights of timm's "
            f"give {classes} numbers that are none, such as an embedding; name weights that were "
            f"trained on them: --checkpoint FILE --num-classes N"
        )
    if classes > IMAGENET_CLASSES:
        raise ValueError(
            f"model: expected a network of ImageNet's {IMAGENET_CLASSES} classes, or of fewer that "
            f"it was trained on, got {name} with {classes}: ClickMe's labels are numbers of the "
            f"former, and others in this network"
        )
