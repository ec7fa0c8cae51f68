"""The networks to compare: by timm's names, or from checkpoints."""

from __future__ import annotations

import dataclasses
import importlib
import os
from pathlib import Path
from typing import Any

import classifiers
import timm_networks
from torch import nn
from training import checkpoint
from training import networks as training_networks
from training.networks import InputForm

from harmonizer_ext import explanations
from harmonizer_ext.saliency import Explain

timm_networks.import_torchvision()
import timm  # noqa: E402
from timm.data import resolve_model_data_config  # noqa: E402

EXPLANATIONS = (
    "gradient",
    "gradient-times-input",
    "smoothgrad",
    "integrated-gradients",
    "grad-cam",
)

#: Beginnings of names of networks that are no architecture of timm's.
_HUBS = ("hf-hub:", "hf_hub:", "local-dir:")


@dataclasses.dataclass
class Network:
    """A network and what it takes.

    Attributes:
        name: in table and pictures.
        model: maps its input (B, 3, size, size) to logits.
        form: side of its images, and their standardization.
        description: where it comes from.
        explain: its explanation; None is the one that all are evaluated with.
        imagenet: whether its outputs may be ImageNet's classes; not, for an embedding.
    """

    name: str
    model: nn.Module
    form: InputForm
    description: str = ""
    explain: Explain | None = None
    imagenet: bool = True

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


def load(
    spec: str,
    *,
    checkpoint_path: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    img_size: int | None = None,
) -> Network:
    """A network by its description, in eval mode on the CPU.

    Args:
        spec: ``[NAME=]`` and a checkpoint of train.py, or a model of timm with its pretrained
            weights (also ``hf-hub:OWNER/MODEL``).
        checkpoint_path: weights for the timm model instead: of timm, torch or train.py, the
            averaged ones where it has both.
        num_classes: of the timm model, where the checkpoint's is not the architecture's own.
        img_size: side of the images, where it is not the network's own.

    Raises:
        FileNotFoundError, ValueError: there is no such file or model, they do not fit, or the
            network has no classifier, or a random one.
        OSError: timm's weights cannot be fetched.
    """
    name, equals, rest = spec.partition("=")
    if Path(spec).is_file():  # of whatever name
        name, equals, rest = spec, "", ""
    source = rest if equals else spec
    imagenet = True
    if not name or not source:
        raise ValueError(f"model: expected NAME=MODEL or MODEL, got {spec!r}")
    is_file = Path(source).suffix in (".pt", ".pth", ".tar") or Path(source).is_file()
    if is_file:
        if checkpoint_path is not None:
            raise ValueError(
                f"checkpoint: expected a timm name in front of it, got the file {source!r} and "
                f"{os.fspath(checkpoint_path)!r}"
            )
        model, form, config = checkpoint.load_network(source)
        name = name if equals else Path(source).parent.name or Path(source).stem
        description = f"{config.model}, weights of {source}"
    else:
        model, form = _create(source, checkpoint_path, num_classes, img_size)
        hub = source.startswith(_HUBS)
        imagenet = checkpoint_path is not None or hub or classifiers.is_imagenet(model)
        weights = "timm's pretrained weights"
        if checkpoint_path is not None:
            weights = f"weights of {os.fspath(checkpoint_path)}"
        description = f"{source}, {weights}"
    if img_size is not None:
        form = form._replace(size=img_size)
    return Network(name, model.eval(), form, description, imagenet=imagenet)


def _create(
    source: str, checkpoint_path: Any, num_classes: int | None, img_size: int | None
) -> tuple[nn.Module, InputForm]:
    hub = source.startswith(_HUBS)
    if not hub and not timm.is_model(source):
        near = ", ".join(timm.list_models(f"*{source}*")[:5]) or "none"
        raise ValueError(
            f"model: expected a file, or a name in timm.list_models(), got {source!r}; near it: "
            f"{near}"
        )
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if img_size is not None and not hub and timm.get_pretrained_cfg(source).fixed_input_size:
        options["img_size"] = img_size
    if checkpoint_path is None and not hub:
        own = timm.get_pretrained_cfg(source).num_classes
        classifiers.check_own_classes(source, own, num_classes)
    if checkpoint_path is None and not hub and not timm.is_model_pretrained(source):
        raise ValueError(
            f"model: expected a network that timm has weights of, got {source!r}; --checkpoint "
            f"takes them from a file"
        )
    try:
        model = timm.create_model(source, pretrained=checkpoint_path is None, **options)
    except OSError as error:  # Hugging Face's are these, and those of the connection
        raise OSError(
            f"model: the weights of {source!r} could not be fetched: {error}; --checkpoint takes "
            f"them from a file"
        ) from error
    classifiers.check_classifier(model, source)
    if checkpoint_path is not None:
        training_networks.load_weights(model, checkpoint_path)
    data = resolve_model_data_config(model)
    return model, InputForm(data["input_size"][-1], tuple(data["mean"]), tuple(data["std"]))


def explanation(
    name: str,
    model: nn.Module,
    *,
    reduce: explanations.Reduce = "abs_max",
    samples: int = 50,
    noise: float = 0.15,
    steps: int = 50,
    layer: str | None = None,
) -> Explain:
    """An explanation by its name on the command line.

    Args:
        name: one of ``EXPLANATIONS``; or ``MODULE:NAME``, which is called with the network and
            gives an explanation, an attribution like Captum's, or a function of images and labels
            (``captum.attr:DeepLift``).
        model: the network that it is for.
        reduce: channels to one value.
        samples, noise: of SmoothGrad.
        steps: of integrated gradients.
        layer: of Grad-CAM.

    Raises:
        ImportError, ValueError: there is no such explanation; Grad-CAM without a layer.
    """
    if name == "gradient":
        return explanations.InputGradient(reduce)
    if name == "gradient-times-input":
        return explanations.GradientTimesInput(reduce)
    if name == "smoothgrad":
        return explanations.SmoothGrad(samples, noise, reduce=reduce)
    if name == "integrated-gradients":
        return explanations.IntegratedGradients(steps, reduce=reduce)
    if name == "grad-cam":
        if layer is None:
            children = ", ".join(child for child, _ in model.named_children())
            raise ValueError(
                f"layer: grad-cam expects the name of a layer, such as layer4 of a ResNet or "
                f"blocks.11.norm1 of a ViT; this network has {children}"
            )
        return explanations.GradCAM(layer)
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(
            f"explanation: expected one of {', '.join(EXPLANATIONS)}, or MODULE:NAME, got {name!r}"
        )
    made = getattr(importlib.import_module(module), attribute)(model)
    own = type(made).__module__.partition(".")[0] == "harmonizer_ext"
    return made if own else explanations.Attribution(made, reduce=reduce)
