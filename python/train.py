"""Trains a network whose input gradients agree with human maps: the reference training program.

Reads top to bottom: configuration, data, model, evaluation, the loop. Flags have timm's names.

    python python/shortcut_digits.py --output data/shortcut_digits
    python python/train.py --data-dir data/shortcut_digits --output runs/digits

Data: ``train.npz`` and ``test.npz`` in one directory, each with ``images`` (N, H, W, 3) uint8,
``heatmaps`` (N, H, W) float, ``labels`` (N,) integer and optionally ``tokens`` (N,), 0 where a row
has no human map. Output: ``summary.csv`` (a row per epoch), ``results.json`` and ``checkpoint.pt``,
both with the configuration. ``train(Config(...))`` does the same from Python.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
import time
import typing
from collections.abc import Iterator
from pathlib import Path

import timm_networks
import torch
from torch import Tensor, nn

import harmonizer_ext as hx
from harmonizer_ext import alignment

try:
    import numpy as np
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(f"train.py: {error}; pip install harmonizer-ext[train]") from error

#: What is averaged over the steps of an epoch and logged.
TERMS = ("loss", "cross_entropy", "harmonization", "saliency_std")


def flag(default: typing.Any, text: str, *short: str, least=None, choices=None) -> typing.Any:
    """A field of the configuration that is a flag of the command line too."""
    metadata = {"help": text, "short": short, "least": least, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


def expect(condition: bool, message: str, kind: type[Exception] = ValueError) -> None:
    if not condition:
        raise kind(message)


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run; ``python python/train.py --help`` explains each field."""

    data_dir: str = flag("data/shortcut_digits", "directory of train.npz and the test splits")
    test_splits: tuple[str, ...] = flag(("test",), "names of the files to evaluate on, in order")
    mean: float = flag(0.5, "subtracted from pixels in 0..1")
    std: float = flag(0.25, "that pixels are divided by after that")
    model: str = flag("small", "'small' (four convolutions, GELU), or any timm name")
    pretrained: bool = flag(False, "start from timm's weights")
    lambda_harmonization: float = flag(1.0, "factor of the alignment; 0 trains a baseline", least=0)
    formulation: str = flag("released", "of the loss", choices=("released", "paper"))
    levels: int = flag(5, "scales of the pyramid", least=1)
    rows: str = flag("auto", "that take the saliency path", choices=("auto", "mapped", "all"))
    backend: str | None = flag(None, "of the fused loss; the best available if not given")
    epochs: int = flag(30, "passes over the training set", least=1)
    batch_size: int = flag(64, "images per step", "-b", least=1)
    opt: str = flag("adamw", "optimizer; sgd has Nesterov momentum 0.9", choices=("adamw", "sgd"))
    lr: float = flag(2e-3, "peak learning rate", least=0)
    weight_decay: float = flag(1e-4, "of weights that are not biases or norms", least=0)
    sched: str = flag("cosine", "learning rate after the warm-up", choices=("cosine", "none"))
    warmup_epochs: float = flag(2.0, "of linear warm-up", least=0)
    smoothing: float = flag(0.1, "label smoothing, as released", least=0)
    clip_grad: float | None = flag(None, "largest gradient norm")
    seed: int = flag(0, "of the weights and the order of images")
    device: str | None = flag(None, "'cuda' if there is a GPU, 'cpu' otherwise, if not given")
    amp: bool = flag(False, "automatic mixed precision; the harmonization loss stays in float32")
    # float16 is not offered: saliency of 1e-3 to 1e-7 falls out of its range.
    amp_dtype: str = flag("bfloat16", "of the forward pass under --amp", choices=("bfloat16",))
    channels_last: bool = flag(False, "memory format of images and weights")
    output: str = flag("runs/train", "directory for the log and the checkpoint")
    val_interval: int = flag(1, "epochs between evaluations; the last always has one", least=1)
    log_interval: int = flag(10, "steps between updates of the bar's text", least=1)
    quiet: bool = flag(False, "no progress bar and no line per epoch")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), field.metadata["least"]
            choices = field.metadata["choices"] or (value,)
            allowed = ", ".join(map(str, choices))
            expect(value in choices, f"{field.name}: expected one of {allowed}, got {value!r}")
            enough = least is None or least <= value < math.inf
            expect(enough, f"{field.name}: expected a number >= {least}, got {value}")
        expect(self.smoothing < 1, f"smoothing: expected less than 1, got {self.smoothing}")


class Split(typing.NamedTuple):
    """A split in memory, on the device: images are uint8 (N, C, H, W) until a batch is drawn."""

    images: Tensor
    heatmaps: Tensor
    labels: Tensor
    tokens: Tensor


def load_split(directory: str | Path, name: str, device: torch.device) -> Split:
    """Reads and checks ``<directory>/<name>.npz``, of the form stated at the top."""
    path = Path(directory) / f"{name}.npz"
    hint = f"`python python/shortcut_digits.py --output {directory}` prepares the demo's data"
    expect(path.is_file(), f"data_dir: expected the file {path}; {hint}", FileNotFoundError)
    with np.load(path, allow_pickle=False) as archive:
        for key in ("images", "heatmaps", "labels"):
            expect(key in archive, f"{path}: expected {key!r}, got {archive.files}", KeyError)
        images, heatmaps, labels = (archive[key] for key in ("images", "heatmaps", "labels"))
        tokens = archive["tokens"] if "tokens" in archive else np.ones(len(labels), np.float32)
    got, pixels = f"{images.shape} {images.dtype}", images.dtype == np.uint8 and images.ndim == 4
    expect(
        pixels and images.shape[-1] == 3, f"{path}: expected images (N, H, W, 3) uint8, got {got}"
    )
    for key, array in {"heatmaps": heatmaps, "labels": labels, "tokens": tokens}.items():
        shape = images.shape[: 3 if key == "heatmaps" else 1]
        expect(array.shape == shape, f"{path}: expected {key} {shape}, got {array.shape}")
    indices = len(labels) > 0 and labels.dtype.kind in "iu" and labels.min() >= 0
    expect(indices, f"{path}: expected one or more labels, all of them class indices >= 0")
    arrays = (images.transpose(0, 3, 1, 2), heatmaps.astype(np.float32), labels.astype(np.int64))
    return Split(*(torch.from_numpy(array).to(device) for array in (*arrays, tokens)))


def to_input(images: Tensor, config: Config) -> Tensor:
    """Network input of uint8 images. Saliency is taken with respect to this, as released."""
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return ((images.float() / 255 - config.mean) / config.std).contiguous(memory_format=layout)


def create_model(name: str, classes: int, size: tuple[int, int], pretrained: bool) -> nn.Module:
    """The built-in network, or timm's of that name, for images of ``size``."""
    if name == "small":
        expect(not pretrained, "pretrained: expected a timm model; 'small' has no such weights")
        shapes = ((3, 32, 7, 4), (32, 64, 3, 2), (64, 96, 3, 2), (96, 128, 3, 1))
        pairs = [(nn.Conv2d(a, b, k, s, padding=k // 2), nn.GELU()) for a, b, k, s in shapes]
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes))
        return nn.Sequential(*(layer for pair in pairs for layer in pair), *head)
    try:
        timm = timm_networks.import_timm()
    except ImportError as error:
        raise ImportError(f"model: {name!r} needs timm ({error}); pip install timm") from error
    expect(timm.is_model(name), f"model: expected 'small' or a name in timm, got {name!r}")
    options = {"img_size": size} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    return timm.create_model(name, pretrained=pretrained, num_classes=classes, **options)


def create_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    rest = {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}
    groups = [{"params": [p for p in parameters if p.ndim > 1]}, rest]
    common = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.opt == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True, **common)
    return torch.optim.AdamW(groups, **common)


def learning_rate(step: int, steps: int, config: Config) -> float:
    """Learning rate of one of ``steps`` steps."""
    warmup = round(config.warmup_epochs * steps / config.epochs)
    progress = max(step - warmup, 0) / max(steps - warmup, 1)
    factor = 0.5 + 0.5 * math.cos(math.pi * progress) if config.sched == "cosine" else 1.0
    return config.lr * min(factor, (step + 1) / max(warmup, 1))


def load_checkpoint(path: str | Path) -> tuple[nn.Module, Config]:
    """The network of a ``checkpoint.pt``, in eval mode on the CPU, and its configuration."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    config = Config(**content["config"])
    model = create_model(config.model, content["classes"], content["size"], pretrained=False)
    model.load_state_dict(content["model"])
    return model.eval(), config


def input_maps(model: nn.Module, split: Split, config: Config) -> Iterator[tuple]:
    """Yields rows, their logits, and the true class's signed input gradients (B, C, H, W)."""
    model.eval()
    for start in range(0, len(split.labels), 256):
        rows = slice(start, start + 256)
        pixels = to_input(split.images[rows], config)
        logits, maps = hx.input_gradient(model, pixels, split.labels[rows], create_graph=False)
        yield rows, logits.detach(), maps


def evaluate(model: nn.Module, split: Split, config: Config) -> dict[str, float]:
    """Accuracy of all rows, and how the input gradients of those with a human map agree with it.

    ``alignment`` is the mean Spearman correlation between the absolute input gradient, averaged
    over channels, and the human map; ``alignment_signed`` that of the signed mean over channels,
    which is what the loss sees; ``saliency_std`` the latter's mean standard deviation.
    """
    batches = []
    for rows, logits, maps in input_maps(model, split, config):
        mapped = split.tokens[rows] > 0
        maps, human = maps[mapped], split.heatmaps[rows][mapped]
        correct, signed = logits.argmax(1) == split.labels[rows], maps.mean(1)
        ranks = [alignment.spearman(one, human) for one in (maps.abs().mean(1), signed)]
        batches.append((correct, *ranks, signed.flatten(1).std(1, correction=0)))
    names = ("accuracy", "alignment", "alignment_signed", "saliency_std")
    columns = [torch.cat(column).double() for column in zip(*batches, strict=True)]
    # Without human maps accuracy is all there is.
    return {name: c.mean().item() for name, c in zip(names, columns, strict=True) if len(c)}


def train(config: Config) -> dict[str, typing.Any]:
    """Trains, evaluates, and writes the log and the checkpoint to ``config.output``.

    Returns:
        What ``results.json`` holds: "final" (``evaluate`` of each test split), "history" (a dict
        per epoch), "seconds" of training, "images_per_second", "backend", "checkpoint", "config".

    Raises:
        FileNotFoundError, KeyError, ValueError, ImportError: bad input, before the first step.
        FloatingPointError: the loss of an epoch is not finite.
    """
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(config.seed)
    data = load_split(config.data_dir, "train", device)
    tests = {test: load_split(config.data_dir, test, device) for test in config.test_splits}
    count, size, classes = len(data.labels), data.images.shape[2:], int(data.labels.max()) + 1
    for test, split in tests.items():
        got, most = split.images.shape[2:], int(split.labels.max())
        wanted = f"{test}.npz: expected size {tuple(size)} and labels below {classes}, as for train"
        expect(got == size and most < classes, f"{wanted}, got {tuple(got)} and {most}")
    harmonize = config.lambda_harmonization > 0
    some = not harmonize or bool((data.tokens > 0).any())
    expect(some, "tokens: expected a human map for some row; --lambda-harmonization 0 needs none")
    most = f"batch_size: expected at most {count}, the training images, got {config.batch_size}"
    expect(config.batch_size <= count, most)

    model = create_model(config.model, classes, tuple(size), config.pretrained).to(device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = create_optimizer(model, config)
    criterion = nn.CrossEntropyLoss(label_smoothing=config.smoothing)
    # A baseline needs no saliency: no row has a token, and only rows with one take that path.
    tokens = data.tokens if harmonize else torch.zeros_like(data.tokens)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)

    per_epoch = count // config.batch_size  # the rest, which fills no batch, is left out
    steps = config.epochs * per_epoch
    shuffle = torch.Generator().manual_seed(config.seed)
    history: list[dict[str, float]] = []
    final: dict[str, dict[str, float]] = {}
    bar = tqdm(total=steps, unit="step", desc=output.name, disable=config.quiet)
    for epoch in range(config.epochs):
        model.train()
        start = time.perf_counter()
        order = torch.randperm(count, generator=shuffle).to(device)
        sums = torch.zeros(len(TERMS), device=device)
        for index in range(per_epoch):
            step = epoch * per_epoch + index
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, config)
            batch = order[index * config.batch_size : (index + 1) * config.batch_size]
            with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
                out = hx.harmonizer_loss(
                    model,
                    to_input(data.images[batch], config),
                    *(data.labels[batch], data.heatmaps[batch], tokens[batch]),
                    criterion=criterion,
                    lambda_harmonization=config.lambda_harmonization,
                    lambda_weights=0.0,  # the optimizer decays the weights
                    formulation=config.formulation,
                    levels=config.levels,
                    rows=config.rows if harmonize else "mapped",
                    backend=config.backend,
                )
            optimizer.zero_grad(set_to_none=True)
            out.loss.backward()
            if config.clip_grad is not None:
                nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
            optimizer.step()
            sums += torch.stack([getattr(out, term).detach().float() for term in TERMS])
            if step % config.log_interval == 0:  # reading a value waits for the GPU
                bar.set_postfix_str(f"loss {out.loss.item():.3f}", refresh=False)
            bar.update()
        seconds = time.perf_counter() - start
        row = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"], "seconds": seconds}
        row |= {"images_per_second": per_epoch * config.batch_size / seconds}
        row |= dict(zip(TERMS, (sums / per_epoch).tolist(), strict=True))
        message = f"loss: expected a finite value, got {row['loss']} in epoch {epoch}; lower --lr"
        expect(math.isfinite(row["loss"]), message, FloatingPointError)
        if (epoch + 1) % config.val_interval == 0 or epoch + 1 == config.epochs:
            final = {test: evaluate(model, split, config) for test, split in tests.items()}
            for test, measures in final.items():
                row |= {f"{test}_{key}": value for key, value in measures.items()}
            if not config.quiet:
                tqdm.write("  ".join(f"{key} {value:.4g}" for key, value in row.items()))
        history.append(row)
        with (output / "summary.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(k for row in history for k in row)))
            writer.writeheader()
            writer.writerows(history)
    bar.close()
    path, seconds = output / "checkpoint.pt", sum(row["seconds"] for row in history)
    results = {"final": final, "config": dataclasses.asdict(config), "seconds": seconds}
    results |= {"images_per_second": steps * config.batch_size / seconds, "version": hx.__version__}
    results |= {"backend": config.backend or hx.available_backends(device.type)[0]}
    results |= {"classes": classes, "size": tuple(size)}
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    # Whoever reads finds the old file or the new one, never half of one.
    torch.save(results | state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)
    results |= {"checkpoint": str(path), "history": history}
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


def parse(arguments: list[str] | None = None) -> Config:
    """The configuration that a command line asks for: a flag for every field."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    types = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        options = {"default": field.default, "help": field.metadata["help"]}
        names = [*field.metadata["short"], "--" + field.name.replace("_", "-")]
        kind = types[field.name]
        if kind is bool:
            options["action"] = "store_true"
        elif isinstance(field.default, tuple):
            options["nargs"] = "+"
        else:
            kind = next(iter(typing.get_args(kind)), kind)  # float of float | None
            options |= {"type": kind, "choices": field.metadata["choices"]}
        parser.add_argument(*names, **options)
    values = vars(parser.parse_args(arguments))
    try:
        return Config(**values | {"test_splits": tuple(values["test_splits"])})
    except ValueError as error:
        parser.error(str(error))


def main() -> None:
    try:
        final = train(parse())["final"]
    except (FileNotFoundError, KeyError, ValueError, ImportError) as error:
        raise SystemExit(f"train.py: error: {error.args[0]}") from error
    for test, measures in final.items():
        print(test, *(f"{key} {value:.4g}" for key, value in measures.items()), sep="  ")


if __name__ == "__main__":
    main()
