"""The network of a run: made by name, prepared for its hardware, with the loss around it."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import classifiers
import timm_networks
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import harmonizer_ext as hx
from harmonizer_ext.files.reading import UnreadableError, reading
from harmonizer_ext.files.text import shown
from harmonizer_ext.files.weights import read_weights
from training.config import Config, expect
from training.processes import World

timm_networks.import_torchvision()
import timm  # noqa: E402
from timm.data import resolve_model_data_config  # noqa: E402

#: Names under which networks keep their repeated parts: what FSDP2 shards one by one.
_BLOCKS = ("blocks", "layers", "stages", "layer1", "layer2", "layer3", "layer4")


class InputForm(NamedTuple):
    """What a network takes.

    Attributes:
        size: side of its images.
        mean, std: of R, G, B in 0..1, which standardize them.
        crop_pct: side of the square in the middle that it is evaluated on, of the image's.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 1.0

    def __call__(self, images: Tensor, channels_last: bool) -> Tensor:
        """Network input of images (B, 3, H, W) in 0..255. Saliency is taken with respect to it."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        mean, std = (
            torch.tensor(v, dtype=torch.float32, device=images.device).view(1, -1, 1, 1)
            for v in (self.mean, self.std)
        )
        return ((images.float() / 255 - mean) / std).contiguous(memory_format=layout)


def create(config: Config) -> tuple[nn.Module, InputForm]:
    """The network of the configuration on the CPU, and what it takes.

    Raises:
        ValueError: an unknown name, weights that do not fit.
    """
    if config.model == "small":
        expect(
            not config.pretrained, "pretrained: expected a timm model; 'small' has no such weights"
        )
        shapes = ((3, 32, 7, 4), (32, 64, 3, 2), (64, 96, 3, 2), (96, 128, 3, 1))
        pairs = [(nn.Conv2d(a, b, k, s, padding=k // 2), nn.GELU()) for a, b, k, s in shapes]
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, config.num_classes))
        model: nn.Module = nn.Sequential(*(layer for pair in pairs for layer in pair), *head)
        own = InputForm(64, (0.5,) * 3, (0.25,) * 3)
    else:
        expect(
            timm.is_model(config.model),
            f"model: expected 'small' or a name in timm.list_models(), got {config.model!r}; near "
            f"it: {', '.join(timm.list_models(f'*{config.model}*')[:5]) or 'none'}",
        )
        fixed = timm.get_pretrained_cfg(config.model).fixed_input_size
        size = {"img_size": config.img_size} if fixed and config.img_size else {}
        drop_path = {"drop_path_rate": config.drop_path} if config.drop_path else {}
        model = timm.create_model(
            config.model,
            pretrained=config.pretrained,
            num_classes=config.num_classes,
            drop_rate=config.drop,
            **size,
            **drop_path,
        )
        classifiers.check_classifier(model, config.model)
        data = resolve_model_data_config(model)
        own = InputForm(
            data["input_size"][-1], tuple(data["mean"]), tuple(data["std"]), data["crop_pct"]
        )
    form = InputForm(
        config.img_size or own.size,
        config.mean or own.mean,
        config.std or own.std,
        config.crop_pct or own.crop_pct,
    )
    for name in ("mean", "std"):
        value = getattr(form, name)
        expect(len(value) == 3, f"{name}: expected a number for each of R, G, B, got {value}")
    if config.initial_checkpoint is not None:
        load_weights(model, config.initial_checkpoint)
    if config.grad_checkpointing:
        expect(
            hasattr(model, "set_grad_checkpointing"),
            f"grad_checkpointing: expected a network that offers it, got {config.model!r}",
        )
        model.set_grad_checkpointing()
    return model, form


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Takes the weights of a checkpoint of ours (its average, if it has one) or of timm's.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is of another network.
    """
    found = Path(path).is_file()
    expect(found, f"initial_checkpoint: expected a file, got {shown(path)}", FileNotFoundError)
    # timm keeps the arguments of its run beside the weights; they are read, and nothing is run.
    content = read_weights(path, "initial_checkpoint", allowed=(argparse.Namespace,))
    for key in ("ema", "state_dict_ema", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict) and content[key]:
            content = content[key]
            break
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UnreadableError(
            f"initial_checkpoint: expected weights by their names in {shown(path)}, got "
            f"{type(content).__name__}; torch.save(network.state_dict(), FILE) writes such"
        )
    try:
        with reading(f"initial_checkpoint: {shown(path)}"):
            model.load_state_dict(content)
    except UnreadableError as error:
        raise UnreadableError(
            f"initial_checkpoint: {shown(path)} does not fit the network: {_misfit(model, content)}"
        ) from error


def _misfit(model: nn.Module, weights: dict[str, Tensor]) -> str:
    """How weights differ from those of a network, in a line."""
    own = model.state_dict()
    missing, foreign = own.keys() - weights.keys(), weights.keys() - own.keys()
    other = {
        name
        for name in own.keys() & weights.keys()
        if own[name].shape != getattr(weights[name], "shape", None)
    }
    parts = [
        f"{len(names)} {text}, such as {shown(sorted(map(str, names))[0])}"
        for text, names in (
            ("weights are missing", missing),
            ("are of another network", foreign),
            ("have another shape", other),
        )
        if names
    ]
    return "; ".join(parts) or "its weights cannot be copied"


def training_mode(model: nn.Module, config: Config) -> None:
    """Puts the network into training mode; frozen BatchNorm keeps its statistics.

    No layer couples the rows of a batch then, and those without a human map are split off.

    Raises:
        ValueError: ``freeze_norm`` for a network without BatchNorm.
    """
    model.train()
    if config.freeze_norm:
        layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        expect(
            bool(layers), f"freeze_norm: expected BatchNorm in the network, {config.model} has none"
        )
        for layer in layers:
            layer.eval()


def prepare(model: nn.Module, config: Config, world: World) -> nn.Module:
    """Puts the network on its device; shards it under FSDP2."""
    model = model.to(world.device)
    if config.channels_last and not config.fsdp:  # FSDP2 takes none but contiguous weights
        model = model.to(memory_format=torch.channels_last)
    if config.fsdp:
        expect(world.size > 1, "fsdp: expected several processes: torchrun --nproc-per-node N")
        for name in _BLOCKS:
            for block in getattr(model, name, nn.Sequential()):
                fully_shard(block)
        fully_shard(model)
    return model


def with_loss(model: nn.Module, config: Config, world: World) -> nn.Module:
    """The harmonized step around the network: eager or compiled, for one process or several."""
    harmonize = config.lambda_harmonization > 0
    step: nn.Module = hx.HarmonizerLoss(
        model,
        compile=config.torchcompile,
        criterion=nn.CrossEntropyLoss(label_smoothing=config.smoothing),
        lambda_harmonization=config.lambda_harmonization,
        lambda_weights=config.lambda_weights,
        formulation=config.formulation,
        levels=config.levels,
        # A baseline needs no saliency: no row has a token, and only rows with one take that path.
        rows=config.rows if harmonize else "mapped",
        second_order=config.second_order,
        backend=config.backend,
    )
    if world.size > 1 and not config.fsdp:
        devices = [world.device.index] if world.device.type == "cuda" else None
        step = DistributedDataParallel(step, device_ids=devices, gradient_as_bucket_view=True)
    return step


@contextlib.contextmanager
def without_exchange(step: nn.Module, model: nn.Module, last: bool) -> Iterator[None]:
    """Gradients stay with their process until the last batch of an update."""
    if isinstance(step, DistributedDataParallel) and not last:
        with step.no_sync():
            yield
        return
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2
        model.set_requires_gradient_sync(last)
    yield
