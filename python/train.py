"""Trains a network whose input gradients agree with human maps: the reference training program.

Reads top to bottom: configuration, data, model, optimizer, evaluation, the loop. Flags have timm's
names where timm has one.

    python python/shortcut_digits.py --output data/shortcut_digits
    python python/train.py data/shortcut_digits --lambda-harmonization 1 --output runs/digits

Data: ``train.npz`` and ``test.npz`` in one directory, each with ``images`` (N, H, W, 3) uint8,
``heatmaps`` (N, H, W) float, ``labels`` (N,) integer and optionally ``tokens`` (N,), 0 where a row
has no human map. Output: ``config.json``, ``summary.csv`` (a row per epoch), ``results.json`` and
``checkpoint.pt``. ``train(Config(...))`` does the same from Python.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import importlib.util
import json
import math
import os
import time
import typing
from pathlib import Path

import torch
from torch import Tensor, nn

import harmonizer_ext as hx
from harmonizer_ext import alignment

try:
    import numpy as np
    from tqdm import tqdm
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"train: expected the module {error.name!r}, which is not installed; "
        f"pip install harmonizer-ext[train]",
        name=error.name,
    ) from error


def flag(default: object, text: str, *short: str, choices: tuple[str, ...] | None = None):
    """A field of the configuration that is a flag of the command line too."""
    return dataclasses.field(
        default=default, metadata={"help": text, "short": short, "choices": choices}
    )


@dataclasses.dataclass(frozen=True)
class Config:
    # Data
    data_dir: str = flag("data/shortcut_digits", "directory of train.npz and the test splits")
    test_splits: tuple[str, ...] = flag(("test",), "names of the files to evaluate on, in order")
    mean: float = flag(0.5, "subtracted from pixels in 0..1")
    std: float = flag(0.25, "that pixels are divided by after that")
    # Model
    model: str = flag("small", "'small' (four convolutions, GELU), or any timm name")
    pretrained: bool = flag(False, "start from timm's weights")
    # Harmonization
    lambda_harmonization: float = flag(1.0, "factor of the alignment; 0 trains a baseline")
    formulation: str = flag("released", "of the loss", choices=("released", "paper"))
    levels: int = flag(5, "scales of the pyramid")
    rows: str = flag("auto", "that take the saliency path", choices=("auto", "mapped", "all"))
    backend: str | None = flag(None, "of the fused loss; the best available if not given")
    # Optimization
    epochs: int = flag(30, "passes over the training set")
    batch_size: int = flag(64, "images per step", "-b")
    opt: str = flag("adamw", "optimizer", choices=("adamw", "adam", "sgd"))
    lr: float = flag(2e-3, "peak learning rate")
    momentum: float = flag(0.9, "of sgd (Nesterov)")
    weight_decay: float = flag(1e-4, "of weights that are not biases or norms")
    sched: str = flag("cosine", "learning rate after the warm-up", choices=("cosine", "none"))
    warmup_epochs: float = flag(2, "of linear warm-up")
    smoothing: float = flag(0.1, "label smoothing, as released")
    clip_grad: float | None = flag(None, "largest gradient norm")
    seed: int = flag(0, "of the weights and the order of images")
    # Machine
    device: str | None = flag(None, "'cuda' if there is a GPU, 'cpu' otherwise, if not given")
    amp: bool = flag(False, "automatic mixed precision; the loss itself stays in float32")
    amp_dtype: str = flag("bfloat16", "of the forward pass", choices=("bfloat16",))
    channels_last: bool = flag(False, "memory format of images and weights")
    # Output
    output: str = flag("runs/train", "directory for the log and the checkpoint")
    val_interval: int = flag(1, "epochs between evaluations; the last epoch always has one")
    log_interval: int = flag(10, "steps between updates of the progress bar")
    quiet: bool = flag(False, "no progress bar")

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "val_interval", "log_interval", "levels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("lambda_harmonization", "lr", "weight_decay", "warmup_epochs"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a number >= 0, got {getattr(self, name)}")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing: expected a number in [0, 1), got {self.smoothing}")
        for field in dataclasses.fields(self):
            choices, value = field.metadata["choices"], getattr(self, field.name)
            if choices and value not in choices:
                expected = ", ".join(map(repr, choices))
                raise ValueError(f"{field.name}: expected one of {expected}, got {value!r}")


# ------------------------------------------------------------------------------------------- data


@dataclasses.dataclass(frozen=True)
class Split:
    """One split in memory, on the device: images stay uint8 (N, C, H, W) until they are used."""

    images: Tensor
    heatmaps: Tensor
    labels: Tensor
    tokens: Tensor

    def __len__(self) -> int:
        return self.labels.shape[0]


def load_split(directory: str | os.PathLike[str], name: str, device: torch.device) -> Split:
    """Reads and checks ``<directory>/<name>.npz``.

    Raises:
        FileNotFoundError, KeyError, ValueError: no such file, or not of the form stated above.
    """
    path = Path(directory) / f"{name}.npz"
    if not path.is_file():
        raise FileNotFoundError(
            f"data_dir: expected the file {path}, which does not exist; "
            f"`python python/shortcut_digits.py --output {directory}` makes the demo's data"
        )
    with np.load(path, allow_pickle=False) as archive:
        missing = {"images", "heatmaps", "labels"} - set(archive.files)
        if missing:
            raise KeyError(f"{path}: expected the arrays {sorted(missing)}, got {archive.files}")
        images, heatmaps, labels = (archive[key] for key in ("images", "heatmaps", "labels"))
        tokens = archive["tokens"] if "tokens" in archive.files else np.ones(len(labels))
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"{path}: expected images (N, H, W, 3) uint8, got {images.shape} {images.dtype}"
        )
    if heatmaps.shape != images.shape[:3]:
        raise ValueError(
            f"{path}: expected heatmaps {images.shape[:3]}, one for each image and of its size, "
            f"got {heatmaps.shape}"
        )
    for key, array in (("labels", labels), ("tokens", tokens)):
        if array.shape != images.shape[:1]:
            raise ValueError(f"{path}: expected {key} {images.shape[:1]}, got {array.shape}")
    if len(labels) == 0 or labels.min() < 0 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{path}: expected at least one label, all of them class indices >= 0")
    return Split(
        torch.from_numpy(images).to(device).permute(0, 3, 1, 2),
        torch.from_numpy(heatmaps).to(device, torch.float32),
        torch.from_numpy(labels).to(device, torch.int64),
        torch.from_numpy(tokens).to(device, torch.float32),
    )


def to_input(images: Tensor, config: Config) -> Tensor:
    """Network input of uint8 images. Saliency is taken with respect to this, as released."""
    pixels = (images.float() / 255 - config.mean) / config.std
    return pixels.contiguous(
        memory_format=torch.channels_last if config.channels_last else torch.contiguous_format
    )


# ------------------------------------------------------------------------------------------ model


def small(classes: int) -> nn.Sequential:
    """Four strided convolutions with GELU (smooth, so that a second derivative exists)."""
    layers: list[nn.Module] = []
    widths = (3, 32, 64, 96, 128)
    for index, (before, after) in enumerate(zip(widths, widths[1:])):
        size = 5 if index == 0 else 3
        layers += [nn.Conv2d(before, after, size, stride=2, padding=size // 2), nn.GELU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes))


def create_model(name: str, classes: int, size: tuple[int, int], pretrained: bool) -> nn.Module:
    """The built-in network, or timm's of that name, for images of ``size``."""
    if name == "small":
        if pretrained:
            raise ValueError("pretrained: expected a timm model, got 'small', which has no weights")
        return small(classes)
    if importlib.util.find_spec("timm") is None:
        raise ModuleNotFoundError(
            f"model: expected 'small', or timm to be installed, got {name!r}; "
            f"pip install harmonizer-ext[train] timm",
            name="timm",
        )
    import timm

    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise ValueError(f"model: expected 'small' or a timm name, got {name!r}; near it: {close}")
    fixed = timm.models.get_pretrained_cfg(name).fixed_input_size
    options = {"img_size": size} if fixed else {}
    return timm.create_model(name, pretrained=pretrained, num_classes=classes, **options)


def create_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.opt == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=True)
    cls = torch.optim.AdamW if config.opt == "adamw" else torch.optim.Adam
    return cls(groups, lr=config.lr)


def learning_rate(step: int, steps: int, config: Config) -> float:
    """Learning rate of a step, of ``steps`` in all."""
    warmup = round(config.warmup_epochs * steps / config.epochs)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.sched == "none":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


# ------------------------------------------------------------------------------------- evaluation


def input_maps(model: nn.Module, split: Split, config: Config, batch: int = 256):
    """Yields (rows, logits, signed input gradient (B, C, H, W) of the true class) by batches."""
    model.eval()
    for start in range(0, len(split), batch):
        rows = slice(start, start + batch)
        pixels = to_input(split.images[rows], config)
        logits, maps = hx.input_gradient(model, pixels, split.labels[rows], create_graph=False)
        yield rows, logits.detach(), maps


def evaluate(model: nn.Module, split: Split, config: Config) -> dict[str, float]:
    """Accuracy of all rows, and how the input gradient of those with a human map agrees with it.

    ``alignment`` is the mean Spearman correlation between the absolute input gradient (averaged
    over channels) and the human map; ``alignment_signed`` that of the signed mean over channels,
    which is what the loss sees; ``saliency_std`` the mean standard deviation of the latter.
    """
    correct, absolute, signed, spread = [], [], [], []
    for rows, logits, maps in input_maps(model, split, config):
        correct.append(logits.argmax(1) == split.labels[rows])
        mapped = split.tokens[rows] > 0
        maps, heatmaps = maps[mapped], split.heatmaps[rows][mapped]
        absolute.append(alignment.spearman(maps.abs().mean(1), heatmaps))
        signed.append(alignment.spearman(maps.mean(1), heatmaps))
        spread.append(maps.mean(1).flatten(1).std(1, correction=0))
    return {
        "accuracy": torch.cat(correct).float().mean().item(),
        "alignment": torch.cat(absolute).mean().item(),
        "alignment_signed": torch.cat(signed).mean().item(),
        "saliency_std": torch.cat(spread).mean().item(),
    }


# ------------------------------------------------------------------------------------- checkpoint


def save_checkpoint(path: Path, **content: object) -> None:
    """Writes in one step: whoever reads finds the old file or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.tmp")
    torch.save(content, temporary)
    temporary.replace(path)


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[nn.Module, Config]:
    """The network of a ``checkpoint.pt``, in eval mode on the CPU, and its configuration."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    config = Config(**content["config"] | {"test_splits": tuple(content["config"]["test_splits"])})
    model = create_model(config.model, content["classes"], tuple(content["size"]), False)
    model.load_state_dict(content["model"])
    return model.eval(), config


# ------------------------------------------------------------------------------------------- loop


def train(config: Config) -> dict:
    """Trains, evaluates, and writes the log and the checkpoint to ``config.output``.

    Returns:
        What ``results.json`` holds: "history" (a dict per epoch), "final" (the measures of
        ``evaluate`` by test split), "seconds", "images_per_second", "checkpoint", "config".

    Raises:
        FileNotFoundError, KeyError, ValueError, ModuleNotFoundError: before the first step.
        FloatingPointError: the loss of an epoch is not finite.
    """
    name = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    torch.manual_seed(config.seed)

    split = load_split(config.data_dir, "train", device)
    tests = {test: load_split(config.data_dir, test, device) for test in config.test_splits}
    size, classes = tuple(split.images.shape[2:]), int(split.labels.max()) + 1
    for test, other in tests.items():
        if tuple(other.images.shape[2:]) != size or int(other.labels.max()) >= classes:
            raise ValueError(
                f"{test}.npz: expected images of {size} and labels below {classes} as in train.npz, "
                f"got {tuple(other.images.shape[2:])} and labels up to {int(other.labels.max())}"
            )
    if config.lambda_harmonization and not bool((split.tokens > 0).any()):
        raise ValueError(
            "tokens: expected at least one training row with a human map, got none; "
            "--lambda-harmonization 0 trains without"
        )
    if config.batch_size > len(split):
        raise ValueError(
            f"batch_size: expected at most {len(split)}, the training images, "
            f"got {config.batch_size}"
        )

    model = create_model(config.model, classes, size, config.pretrained).to(device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = create_optimizer(model, config)
    criterion = nn.CrossEntropyLoss(label_smoothing=config.smoothing)
    harmonize = config.lambda_harmonization > 0
    # A baseline needs no saliency: no token, and only rows with a token take that path.
    tokens = split.tokens if harmonize else torch.zeros_like(split.tokens)
    rows = config.rows if harmonize else "mapped"

    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")

    # As in timm the rest of an epoch that fills no batch is left out.
    steps_per_epoch = len(split) // config.batch_size
    steps = config.epochs * steps_per_epoch
    order = torch.Generator().manual_seed(config.seed)
    history: list[dict[str, float]] = []
    training_seconds = 0.0
    bar = tqdm(total=steps, unit="step", desc=output.name, disable=config.quiet, leave=True)
    for epoch in range(config.epochs):
        model.train()
        start = time.perf_counter()
        permutation = torch.randperm(len(split), generator=order).to(device)
        sums = torch.zeros(4, device=device)
        for index in range(steps_per_epoch):
            step = epoch * steps_per_epoch + index
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, config)
            batch = permutation[index * config.batch_size : (index + 1) * config.batch_size]
            with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
                out = hx.harmonizer_loss(
                    model,
                    to_input(split.images[batch], config),
                    split.labels[batch],
                    split.heatmaps[batch],
                    tokens[batch],
                    criterion=criterion,
                    lambda_harmonization=config.lambda_harmonization,
                    lambda_weights=0.0,  # the optimizer decays the weights
                    formulation=config.formulation,
                    levels=config.levels,
                    rows=rows,
                    backend=config.backend,
                )
            optimizer.zero_grad(set_to_none=True)
            out.loss.backward()
            if config.clip_grad is not None:
                nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
            optimizer.step()
            terms = (out.loss.detach(), out.cross_entropy, out.harmonization, out.saliency_std)
            sums += torch.stack([term.float() for term in terms])
            bar.update()
            if step % config.log_interval == 0:  # reading a value waits for a GPU: not every step
                bar.set_postfix_str(f"loss {out.loss.item():.3f}", refresh=False)
        loss, cross_entropy, harmonization, saliency_std = (sums / steps_per_epoch).tolist()
        seconds = time.perf_counter() - start
        training_seconds += seconds
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"loss: expected a finite value in epoch {epoch}, got {loss} (cross entropy "
                f"{cross_entropy}, harmonization {harmonization}); lower --lr or set --clip-grad"
            )
        row = {
            "epoch": epoch,
            "lr": optimizer.param_groups[0]["lr"],
            "train_loss": loss,
            "train_cross_entropy": cross_entropy,
            "train_harmonization": harmonization,
            "train_saliency_std": saliency_std,
            "images_per_second": steps_per_epoch * config.batch_size / seconds,
        }
        if (epoch + 1) % config.val_interval == 0 or epoch + 1 == config.epochs:
            evaluation = {test: evaluate(model, other, config) for test, other in tests.items()}
            for test, measures in evaluation.items():
                row |= {f"{test}_{key}": value for key, value in measures.items()}
        history.append(row)
        write_summary(output / "summary.csv", history)
        if not config.quiet and "test_accuracy" in row:
            tqdm.write(
                f"{output.name}: epoch {epoch}  loss {loss:.3f}  harmonization {harmonization:.3f}  "
                f"saliency std {saliency_std:.1e}  {row['images_per_second']:.0f} images/s  "
                f"accuracy {row['test_accuracy']:.3f}  alignment {row['test_alignment']:.3f}"
            )
    bar.close()

    results = {
        "final": {test: evaluation[test] for test in tests},
        "seconds": training_seconds,
        "images_per_second": steps * config.batch_size / training_seconds,
        "backend": config.backend or hx.available_backends(device.type)[0],
        "checkpoint": str(output / "checkpoint.pt"),
        "config": dataclasses.asdict(config),
        "history": history,
    }
    save_checkpoint(
        output / "checkpoint.pt",
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        epoch=config.epochs,
        classes=classes,
        size=list(size),
        config=dataclasses.asdict(config),
        final=results["final"],
        versions={"torch": str(torch.__version__), "harmonizer_ext": hx.__version__},
    )
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


def write_summary(path: Path, history: list[dict[str, float]]) -> None:
    """A row per epoch; epochs without an evaluation leave its columns empty."""
    columns = dict.fromkeys(key for row in history for key in row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(history)


# ----------------------------------------------------------------------------------- command line


def parse(arguments: list[str] | None = None) -> Config:
    """The configuration that a command line asks for."""
    parser = argparse.ArgumentParser(
        description="Trains a network whose input gradients agree with human maps.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    types = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        options = {"default": field.default, "help": field.metadata["help"]}
        if field.name == "data_dir":
            parser.add_argument("data_dir", metavar="DIR", nargs="?", **options)
            continue
        if types[field.name] is bool:
            options["action"] = "store_true"
        elif isinstance(field.default, tuple):
            options |= {"nargs": "+", "metavar": "NAME"}
        else:
            members = [t for t in typing.get_args(types[field.name]) if t is not type(None)]
            options["type"] = members[0] if members else types[field.name]
            if field.metadata["choices"]:
                options["choices"] = field.metadata["choices"]
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(*field.metadata["short"], name, dest=field.name, **options)
    values = vars(parser.parse_args(arguments))
    values["test_splits"] = tuple(values["test_splits"])
    try:
        return Config(**values)
    except ValueError as error:
        parser.error(str(error))


def main(arguments: list[str] | None = None) -> None:
    config = parse(arguments)
    try:
        results = train(config)
    except (FileNotFoundError, KeyError, ValueError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error.args[0] if error.args else error}") from error
    for test, measures in results["final"].items():
        print(f"{test}: " + "  ".join(f"{key} {value:.4g}" for key, value in measures.items()))
    print(f"wrote {config.output}")


if __name__ == "__main__":
    main()
