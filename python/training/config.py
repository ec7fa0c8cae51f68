"""Everything that decides a training run: one dataclass and its command line."""

from __future__ import annotations

import argparse
import dataclasses
import math
import reprlib
import textwrap
import typing

from harmonizer_ext.files.reading import MAX_BYTES, UnreadableError
from harmonizer_ext.files.tables import read_json
from harmonizer_ext.files.text import shown
from training.presets import PRESETS

#: Groups of the command line's help, in this order.
GROUPS = ("run", "data", "augmentation", "network", "loss", "optimizer", "schedule", "hardware")


def flag(
    default: typing.Any,
    group: str,
    text: str,
    *,
    short: str | None = None,
    least: float | None = None,
    most: float | None = None,
    choices: tuple[str, ...] | None = None,
    free: bool = False,
) -> typing.Any:
    """A field of the configuration that is a flag of the command line too.

    Args:
        free: whether a resumed run may have another value: it does not change the weights.
    """
    metadata = {"group": group, "help": text, "short": short, "free": free}
    metadata |= {"least": least, "most": most, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


def expect(condition: bool, message: str, kind: type[Exception] = ValueError) -> None:
    if not condition:
        raise kind(message)


@dataclasses.dataclass(frozen=True)
class Config:
    """What ``python python/train.py --help`` explains. Flags that timm has, have timm's names."""

    preset: str = flag(
        "none", "run", "recipe whose values replace the defaults below; they are listed at the end"
    )
    output: str = flag("runs/train", "run", "directory of checkpoints, log and panels", free=True)
    resume: str = flag(
        "auto",
        "run",
        "'auto': go on where OUTPUT has a last.pt; 'none': refuse to write over one; or the path "
        "of a checkpoint",
        free=True,
    )
    checkpoint_interval: int = flag(
        500, "run", "updates between checkpoints within an epoch; 0: none", least=0, free=True
    )
    val_interval: int = flag(
        1, "run", "epochs between evaluations; the last always has one", least=1
    )
    log_interval: int = flag(
        20, "run", "updates between lines of TensorBoard and the progress display", least=1,
        free=True,
    )  # fmt: skip
    panel_images: int = flag(8, "run", "images of the panel; 0: none", least=0, free=True)
    log_wandb: bool = flag(
        False, "run", "log to Weights & Biases too (key: WANDB_API_KEY)", free=True
    )
    wandb_project: str = flag("harmonizer", "run", "its project", free=True)
    quiet: bool = flag(False, "run", "no progress display and no line per epoch", free=True)
    seed: int = flag(42, "run", "of weights, order of images, augmentation and dropout")

    clickme: tuple[str, ...] = flag(
        (),
        "data",
        "images with human maps to train on: files, directories or patterns of ClickMe TFRecord "
        "shards, of .npz or of .pth files",
        free=True,
    )
    clickme_val: tuple[str, ...] = flag(
        (), "data", "the same to evaluate on, each as PATH or NAME=PATH", free=True
    )
    data_dir: str | None = flag(
        None,
        "data",
        "images without human maps: a directory with train/ and val/, one folder per class in each",
        free=True,
    )
    dataset: str = flag(
        "",
        "data",
        "timm's name of the data set in DATA_DIR: '' for folders, or hfds/NAME",
        free=True,
    )
    train_split: str = flag("train", "data", "its split to train on", free=True)
    val_split: str = flag("validation", "data", "its split to evaluate on", free=True)
    class_map: str = flag(
        "",
        "data",
        "file with the class folders of DATA_DIR in order, one a line, as in timm",
        free=True,
    )
    mapped_share: float = flag(
        0.2, "data", "share of images with human maps in a batch, if both kinds are given",
        least=0, most=1,
    )  # fmt: skip
    epoch_size: int | None = flag(
        None, "data", "images of an epoch; as many as the larger part has, if not given", least=1
    )
    num_classes: int = flag(1000, "data", "classes of the labels", least=1)
    decoder: str = flag(
        "simplejpeg-fast",
        "data",
        "of JPEGs in ClickMe; the default gives the pixels of the released pipeline",
        choices=("simplejpeg-fast", "simplejpeg", "pillow"),
    )
    skip_corrupt: bool = flag(
        False, "data", "leave out and count records and images that cannot be read", free=True
    )
    max_bytes: int = flag(
        MAX_BYTES,
        "data",
        "bytes that a record or an image may take in memory; larger ones cannot be read",
        least=1,
        free=True,
    )
    workers: int = flag(
        4, "data", "processes that decode, for each GPU", short="j", least=0, free=True
    )
    cache: bool = flag(
        False, "data", "keep decoded images in memory (small data, with --no-aug)", free=True
    )

    no_aug: bool = flag(False, "augmentation", "resize only")
    scale: tuple[float, float] = flag((0.08, 1.0), "augmentation", "area of random crops")
    ratio: tuple[float, float] = flag((3 / 4, 4 / 3), "augmentation", "aspect of random crops")
    hflip: float = flag(0.5, "augmentation", "probability of a left-right flip", least=0, most=1)
    rotation: float = flag(
        0.0, "augmentation", "largest angle of random rotations, degrees", least=0
    )
    mixup: float = flag(
        0.0, "augmentation", "alpha of Mixup of images, labels and maps; 0: none", least=0
    )
    mixup_prob: float = flag(
        1.0, "augmentation", "share of batches that are mixed", least=0, most=1
    )

    model: str = flag("resnet50", "network", "timm's name, or 'small': four convolutions, GELU")
    pretrained: bool = flag(False, "network", "start from timm's weights")
    initial_checkpoint: str | None = flag(
        None, "network", "start from the weights in this checkpoint of ours or timm's"
    )
    img_size: int | None = flag(
        None, "network", "side of images; the model's own if not given", least=1
    )
    mean: tuple[float, ...] | None = flag(
        None, "network", "subtracted from RGB in 0..1; the model's own if not given"
    )
    std: tuple[float, ...] | None = flag(
        None, "network", "that RGB is divided by; the model's own if not given"
    )
    crop_pct: float | None = flag(
        None,
        "network",
        "side of the square that images without a map are evaluated on, of the image's; the "
        "model's own if not given",
        least=0.01,
        most=1,
    )
    drop: float = flag(0.0, "network", "dropout", least=0, most=1)
    drop_path: float = flag(0.0, "network", "stochastic depth", least=0, most=1)
    freeze_norm: bool = flag(
        False,
        "network",
        "BatchNorm keeps its pretrained statistics, so that images without a map cost no more "
        "than ever",
    )
    grad_checkpointing: bool = flag(False, "network", "less memory, more time", free=True)

    lambda_harmonization: float = flag(
        1.0, "loss", "factor of the alignment; 0 trains a baseline", least=0
    )
    lambda_weights: float = flag(
        0.0, "loss", "factor of the published weight penalty, in the loss", least=0
    )
    formulation: str = flag("released", "loss", "of the alignment", choices=("released", "paper"))
    levels: int = flag(5, "loss", "scales of the pyramid", least=1)
    rows: str = flag(
        "auto", "loss", "that take the saliency path", choices=("auto", "mapped", "all")
    )
    second_order: str = flag(
        "exact", "loss", "derivative of the saliency", choices=("exact", "finite_difference")
    )
    backend: str | None = flag(
        None, "loss", "of the fused loss; the best available if not given", free=True
    )
    smoothing: float = flag(0.1, "loss", "label smoothing", least=0, most=0.999)

    batch_size: int = flag(
        128, "optimizer", "images that a process holds at a time", short="b", least=1, free=True
    )
    grad_accum_steps: int = flag(
        1, "optimizer", "batches of a process for each update", least=1, free=True
    )
    global_batch_size: int | None = flag(
        None,
        "optimizer",
        "images of an update over all processes; sets GRAD_ACCUM_STEPS",
        least=1,
    )
    opt: str = flag("adamw", "optimizer", "timm's name; 'momentum' is SGD, 'sgd' with Nesterov's")
    lr: float = flag(1e-3, "optimizer", "peak learning rate", least=0)
    momentum: float = flag(0.9, "optimizer", "of SGD", least=0)
    weight_decay: float = flag(
        0.05, "optimizer", "of weights that are not biases or norms", least=0
    )
    layer_decay: float | None = flag(None, "optimizer", "factor of the rate from layer to layer")
    clip_grad: float | None = flag(None, "optimizer", "largest gradient norm")
    model_ema: bool = flag(False, "optimizer", "evaluate and keep an average of the weights")
    model_ema_decay: float = flag(0.9998, "optimizer", "its decay for each update", least=0, most=1)

    epochs: int = flag(90, "schedule", "passes over the training set", least=1)
    sched: str = flag(
        "cosine", "schedule", "after the warm-up", choices=("cosine", "multistep", "step", "poly")
    )
    warmup_epochs: float = flag(5, "schedule", "of linear warm-up", least=0)
    warmup_lr: float = flag(1e-5, "schedule", "that it starts from", least=0)
    min_lr: float = flag(0.0, "schedule", "that it ends at", least=0)
    decay_milestones: tuple[float, ...] = flag((30, 50, 80), "schedule", "epochs of 'multistep'")
    decay_epochs: float = flag(30, "schedule", "between decays of 'step'", least=1e-9)
    decay_rate: float = flag(0.1, "schedule", "factor of each decay", least=0, most=1)

    device: str | None = flag(
        None, "hardware", "'cuda' where there is a GPU, if not given", free=True
    )
    amp: bool = flag(False, "hardware", "automatic mixed precision; the alignment stays in float32")
    # float16 is not offered: saliency of 1e-3 to 1e-7 falls out of its range.
    amp_dtype: str = flag("bfloat16", "hardware", "of the passes under AMP", choices=("bfloat16",))
    channels_last: bool = flag(
        False, "hardware", "memory format of images and weights (with --fsdp: of images)"
    )
    torchcompile: bool = flag(False, "hardware", "compile the whole step as one graph")
    fsdp: bool = flag(
        False,
        "hardware",
        "shard weights over the processes (FSDP2) instead of copying (DDP)",
        free=True,
    )

    def __post_init__(self) -> None:
        expect(
            self.preset in PRESETS,
            f"preset: expected one of {', '.join(PRESETS)}, got {self.preset!r}",
        )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            choices, least, most = (field.metadata[key] for key in ("choices", "least", "most"))
            expect(
                choices is None or value in choices,
                f"{field.name}: expected one of {', '.join(choices or ())}, got {value!r}",
            )
            if least is not None:
                high = math.inf if most is None else most
                text = f"a number >= {least}" if most is None else f"a number in {least}..{most}"
                inside = least <= value <= high and value < math.inf
                expect(inside, f"{field.name}: expected {text}, got {value}")
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            expect(0 < low <= high, f"{name}: expected 0 < MIN <= MAX, got {low} {high}")
        expect(self.scale[1] <= 1, f"scale: expected areas of at most 1, got {self.scale[1]}")
        expect(
            bool(self.clickme or self.data_dir),
            "clickme, data_dir: expected images to train on: --clickme for images with human maps, "
            "--data-dir for images without",
        )
        expect(
            bool(self.clickme) or self.lambda_harmonization == 0,
            "clickme: expected images with human maps; --lambda-harmonization 0 trains without",
        )
        expect(
            self.no_aug or not self.cache,
            "cache: expected --no-aug with it: augmented images are new each time",
        )
        expect(
            self.global_batch_size is None or self.grad_accum_steps == 1,
            "grad_accum_steps: expected 1 with --global-batch-size, which sets it",
        )
        expect(
            not (self.torchcompile and self.fsdp),
            "torchcompile: expected False with --fsdp, whose steps do not compile",
        )
        expect(
            not (self.torchcompile and self.second_order != "exact"),
            "second_order: expected 'exact' with --torchcompile",
        )

    def accumulation(self, processes: int) -> int:
        """Batches of each process for each update.

        Raises:
            ValueError: ``global_batch_size`` is no multiple of the images held at a time.
        """
        if self.global_batch_size is None:
            return self.grad_accum_steps
        held = self.batch_size * processes
        expect(
            self.global_batch_size % held == 0,
            f"global_batch_size: expected a multiple of {held} (--batch-size {self.batch_size} on "
            f"{processes} processes), got {self.global_batch_size}",
        )
        return self.global_batch_size // held


def with_preset(preset: str, **changes: typing.Any) -> Config:
    """The configuration of a preset, with changes."""
    expect(preset in PRESETS, f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    return Config(**{"preset": preset} | PRESETS[preset] | changes)


def from_dict(values: dict[str, typing.Any]) -> Config:
    """The configuration that ``dataclasses.asdict`` made; lists of a JSON file become tuples."""
    types = typing.get_type_hints(Config)
    unknown = sorted(map(str, values.keys() - types.keys()))
    expect(
        not unknown,
        f"config: expected fields of train.py's configuration, got {reprlib.repr(unknown)}",
    )
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    for name, value in values.items():
        kind = types[name]
        text = getattr(kind, "__name__", str(kind))
        expect(_fits(value, kind), f"{name}: expected {text}, got {reprlib.repr(value)}")
    return Config(**values)


def _fits(value: typing.Any, kind: typing.Any) -> bool:
    """Whether a value has the type of a field."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            return False
        inner = arguments[:1] * len(value) if ... in arguments else arguments
        return len(value) == len(inner) and all(map(_fits, value, inner))
    if arguments:
        return any(_fits(value, argument) for argument in arguments)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def differences(old: Config, new: Config) -> list[str]:
    """What keeps a run with the configuration ``new`` from going on where ``old`` stopped."""
    return [
        f"{field.name}: {getattr(old, field.name)!r} -> {getattr(new, field.name)!r}"
        for field in dataclasses.fields(Config)
        if not field.metadata["free"] and getattr(old, field.name) != getattr(new, field.name)
    ]


def _help_format(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=98)


def _preset_help() -> str:
    """The values of each preset, as flags."""
    texts = ["presets:"]
    for name, values in PRESETS.items():
        flags = " ".join(
            "--" + key.replace("_", "-") + ("" if value is True else f" {_shown(value)}")
            for key, value in values.items()
        )
        texts += textwrap.wrap(flags, 96, initial_indent=f"  {name}: ", subsequent_indent="    ")
    return "\n".join(texts)


def _shown(value: typing.Any) -> str:
    return (
        " ".join(map(_shown, value))
        if isinstance(value, tuple)
        else f"{value:.4g}"
        if isinstance(value, float)
        else str(value)
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.py",
        usage="%(prog)s [--preset NAME] --clickme PATH [--clickme-val PATH] [--data-dir DIR] [...]",
        formatter_class=_help_format,
        description="Trains a network whose input gradients agree with human maps.",
        epilog=_preset_help(),
    )
    parser.add_argument(
        "--config", metavar="FILE", help="config.json of another run; flags go over it"
    )
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    types = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        kind, default = types[field.name], field.default
        text = field.metadata["help"]
        if default not in (None, (), "", False):
            text += f" (default: {_shown(default)})"
        # Left out where not given: presets and files lie between defaults and flags.
        options: dict[str, typing.Any] = {"default": argparse.SUPPRESS, "help": text}
        arguments = typing.get_args(kind)
        inner = next((a for a in arguments if typing.get_origin(a) is tuple), None) or kind
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(inner) is tuple:
            element, *rest = typing.get_args(inner)
            options |= {"type": element, "nargs": "+" if ... in rest else 1 + len(rest)}
            pair = ("MIN", "MAX") if options["nargs"] == 2 else "X"
            options["metavar"] = "PATH" if element is str else pair
        else:
            options["type"] = arguments[0] if arguments else kind
            options["choices"] = field.metadata["choices"]
            if field.name == "preset":
                options["choices"] = tuple(PRESETS)
            elif options["choices"] is None:
                options["metavar"] = {int: "N", float: "X"}.get(options["type"], "TEXT")
        names = ["--" + field.name.replace("_", "-")]
        if kind is bool and field.name.startswith("no_"):
            options["action"] = "store_true"
        if field.metadata["short"]:
            names.insert(0, "-" + field.metadata["short"])
        groups[field.metadata["group"]].add_argument(*names, **options)
    return parser


def parse(arguments: list[str] | None = None) -> Config:
    """The configuration that a command line asks for: defaults, then preset, file and flags."""
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}
    file = given.pop("config", None)
    try:
        values = {}
        if file is not None:
            values = read_json(file)
            expect(isinstance(values, dict), f"config: expected an object in {shown(file)}")
        preset = given.get("preset", values.get("preset", "none"))
        # A file has every field; a preset named beside it goes over it.
        over = PRESETS[preset] if file is None or "preset" in given else {}
        return from_dict(values | over | {"preset": preset} | given)
    except UnreadableError as error:
        parser.error(f"config: {shown(file)} cannot be read: {shown(error)}")
    except ValueError as error:
        parser.error(shown(error))
