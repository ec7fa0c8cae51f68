"""Which networks can be harmonized, and is the gradient right? Measured, for networks of timm.

    python python/check_networks.py                              the networks below; twelve minutes
    python python/check_networks.py resnet18 mixer_s32_224       any other of timm
    python python/check_networks.py --mode train --output docs/networks.md

For each network, with random weights and a small batch: what a plain double backward in PyTorch
needs before it runs at all, and the largest relative error of any element of the gradient of the
harmonization loss, in float64, against two independent derivations (see
harmonizer_ext.check_gradients). Ends with an error where a gradient is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm_networks
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import harmonizer_ext as hx
from harmonizer_ext.files.output import write_text
from harmonizer_ext.gradient_check import GradientCheck, check_gradients
from harmonizer_ext.twice_differentiable import clear_cached_biases, make_twice_differentiable

CLASSES = 10
MODES = ("train", "eval")


@dataclass(frozen=True)
class Network:
    """A network of timm and the size of image it is checked at.

    Attributes:
        size: height and width, small: the graph's operations are those of any size.
        shallow: arguments that make it smaller still, with all its kinds of blocks, for tests.
        shallow_size: the images' height and width then.
    """

    name: str
    size: int = 64
    shallow: dict[str, Any] = field(default_factory=dict)
    shallow_size: int = 32


NETWORKS = (
    Network("resnet50", shallow={"layers": (1, 2, 1, 1)}),
    Network("resnetv2_50", shallow={"layers": (1, 2, 1, 1)}),
    Network("vgg16", shallow={"mlp_ratio": 1 / 64}),
    Network("vgg16_bn", shallow={"mlp_ratio": 1 / 64}),
    Network("efficientnet_b0"),
    Network("vit_small_patch16_224", shallow={"depth": 2}),
    Network("vit_base_patch16_224", shallow={"depth": 2}),
    Network("deit_tiny_patch16_224", shallow={"depth": 2}),
    Network("deit_small_patch16_224", shallow={"depth": 2}),
    Network("vit_small_patch14_dinov2", 56, {"depth": 2}, 28),
    Network("eva02_tiny_patch14_224", 56, {"depth": 2}, 28),
    Network("convnext_tiny", shallow={"depths": (1, 1, 1, 1)}),
    Network("swin_tiny_patch4_window7_224", shallow={"depths": (2, 1, 1, 1)}),
    Network("maxvit_tiny_tf_224", shallow={"depths": (1, 1, 1, 1)}),
    Network("levit_128s", shallow={"depth": (1, 1, 1)}),
    Network("mobilenetv3_large_100", shallow={"depth_multiplier": 0.3}),
    Network("nfnet_l0", shallow={"depths": (1, 1, 1, 1)}),
)

MATH = "MATH attention"
HARDSIGMOID = "hardsigmoid replaced"
BIASES = "cached biases cleared"


@dataclass(frozen=True)
class Row:
    """What was found for a network in one mode; ``failure`` where it could not be checked."""

    network: str
    image: str
    mode: str
    seconds: float
    needed: tuple[str, ...] = ()
    check: GradientCheck | None = None
    failure: str | None = None

    @property
    def right(self) -> bool:
        return self.check is not None and self.check.passed is True


# --- networks -------------------------------------------------------------------------------------


def _scatter_constants(model: nn.Module) -> None:
    """Moves what starts at one value: a branch scaled by zero would hide every error within it."""
    with torch.no_grad():
        for parameter in model.parameters():
            if bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(0.1 * torch.randn_like(parameter))


def _settle_statistics(model: nn.Module, images: Tensor) -> None:
    """Gives BatchNorm the statistics of the batch; with none, scales vanish in eval mode."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _create(network: Network, size: int, shallow: bool) -> nn.Module:
    timm = timm_networks.import_timm()
    options = network.shallow if shallow else {}
    if timm.get_pretrained_cfg(network.name).fixed_input_size:
        options = {**options, "img_size": size}
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(
        network.name, pretrained=False, num_classes=CLASSES, **options
    )
    return model


def build(network: Network, images: Tensor, mode: str, shallow: bool) -> nn.Module:
    """The network with random weights, all of which matter, for images of that size."""
    model = _create(network, images.shape[-1], shallow)
    _scatter_constants(model)
    model.to(images.device)
    _settle_statistics(model, images)
    return model.train(mode.startswith("train"))


def computes_the_same(network: Network, size: int, shallow: bool) -> bool:
    """Whether train and eval mode are one function: no BatchNorm, no dropout, no cached biases."""
    model = _create(network, size, shallow)
    if any(hasattr(module, "attention_bias_cache") for module in model.modules()):
        return False
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        return torch.allclose(model.train()(images), model.eval()(images), rtol=1e-3)


# --- what plain PyTorch needs ---------------------------------------------------------------------


def _plain_double_backward(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    pixels = images.detach().requires_grad_()
    scores = model(pixels).gather(1, labels[:, None])
    (maps,) = torch.autograd.grad(scores.sum(), pixels, create_graph=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.autograd.grad(maps.square().sum(), parameters, allow_unused=True)


@contextlib.contextmanager
def _clearing(model: nn.Module) -> Iterator[None]:
    clear_cached_biases(model)
    yield
    clear_cached_biases(model)


def what_is_needed(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[str, ...]:
    """What a step in plain PyTorch fails without, found by running two; changes the model.

    Raises:
        RuntimeError: PyTorch's own, where nothing that is known here helps.
    """
    needed: list[str] = []
    cures: tuple[tuple[str, str], ...] = (
        ("scaled_dot_product", MATH),
        ("hardsigmoid", HARDSIGMOID),
        ("backward through the graph a second time", BIASES),
    )
    while True:
        try:
            for _ in range(2):
                with contextlib.ExitStack() as stack:
                    if MATH in needed:
                        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
                    if BIASES in needed:
                        stack.enter_context(_clearing(model))
                    _plain_double_backward(model, images, labels)
        except RuntimeError as error:
            cure = next((cure for text, cure in cures if text in str(error)), None)
            if cure is None or cure in needed:
                raise
            needed.append(cure)
            if cure == HARDSIGMOID:
                make_twice_differentiable(model)
        else:
            clear_cached_biases(model)
            return tuple(needed)


# --- checking -------------------------------------------------------------------------------------


def batch_of(
    size: int, batch: int, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels that all differ, and smooth human maps, in float32; the same every time."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator)
    coarse = torch.rand(batch, 1, 6, 6, generator=generator)
    heatmaps = nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    return images.to(device), torch.arange(batch, device=device) % CLASSES, heatmaps.to(device)


def check(
    network: Network,
    mode: str,
    *,
    batch: int = 3,
    device: str = "cpu",
    shallow: bool = False,
) -> Row:
    """Checks a network in a mode; what PyTorch says where it fails becomes part of the row."""
    start = time.perf_counter()
    size = network.shallow_size if shallow else network.size
    image = f"{batch}x3x{size}x{size}"

    def row(**found: Any) -> Row:
        return Row(network.name, image, mode, time.perf_counter() - start, **found)

    images, labels, heatmaps = batch_of(size, batch, device)
    try:
        needed = what_is_needed(build(network, images, mode, shallow), images, labels)
        model = build(network, images, mode, shallow)
        found = check_gradients(model, images, labels, heatmaps=heatmaps)
    except RuntimeError as error:
        return row(failure=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
    return row(needed=needed, check=found)


# --- the table ------------------------------------------------------------------------------------


def _error(value: float | None, absent: str) -> str:
    return absent if value is None else f"{value:.0e}"


def _notes(row: Row) -> str:
    if row.check is None:
        return row.failure or ""
    notes = []
    if row.check.passed is False:
        notes.append("**wrong**")
    if row.check.forward_over_reverse.reason:
        notes.append(row.check.forward_over_reverse.reason)
    reason = row.check.finite_difference.reason
    if reason and reason.startswith("not defined"):
        notes.append("no step is short enough for the difference")
    elif reason:
        notes.append(reason)
    return "; ".join(notes)


def table(rows: Sequence[Row]) -> str:
    """Markdown, a line for each row."""
    lines = [
        "| network | images | mode | forward over reverse | central difference | needed | notes |",
        "|---|---|---|---:|---:|---|---|",
    ]
    for row in rows:
        reverse = row.check.forward_over_reverse.relative_error if row.check else None
        difference = row.check.finite_difference.relative_error if row.check else None
        cells = (
            f"`{row.network}`",
            row.image,
            row.mode,
            _error(reverse, "-" if row.check else "fails"),
            _error(difference, "-"),
            ", ".join(row.needed) or ("nothing" if row.check else "-"),
            _notes(row).replace("|", "\\|"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def document(rows: Sequence[Row], device: str) -> str:
    """The page for the documentation."""
    timm = timm_networks.import_timm()
    today = datetime.datetime.now(datetime.timezone.utc).date()
    where = torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"
    right = sum(row.right for row in rows)
    return f"""# Networks

`python python/check_networks.py --output docs/networks.md`, {today}: harmonizer_ext \
{hx.__version__}, torch {torch.__version__}, timm {timm.__version__}, {where}. \
{right} of {len(rows)} gradients are right.

Networks of timm with random weights and {CLASSES} classes. What starts at one value (scales of
normalization layers, LayerScale, biases) is scattered by 0.1, so that no branch is scaled to zero
and hides what is wrong in it. The errors are the largest of any element of the parameter gradients
of the harmonization loss, in float64, relative to the largest element of the parameter (at least
1e-6 of the largest of all), as `harmonizer_ext.check_gradients` computes them for any network:

- *forward over reverse*: against forward-mode differentiation of the ordinary backward pass. Exact
  for every operation; what remains is rounding. It shows most in the biases before a BatchNorm in
  training mode, whose gradient is zero but for it.
- *central difference*: against differences of ordinary backward passes, relative to at least 1e-3
  of the largest. It needs a step within which the network is smooth, and none may be found where
  there are many kinks (ReLU, Hardswish, max pooling) or the network is very steep.

*needed*: what a step in plain PyTorch fails without, found by running it. `harmonizer_loss` and
`input_gradient` choose MATH attention and clear cached biases by themselves;
`harmonizer_ext.make_twice_differentiable(model)` replaces hardsigmoid.

{table(rows)}
"""


# --- the program ----------------------------------------------------------------------------------


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=inspect.getdoc(inspect.getmodule(_arguments)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("networks", nargs="*", help="names in timm (default: the table's own)")
    parser.add_argument(
        "--mode", nargs="+", choices=MODES, default=list(MODES), help="default: %(default)s"
    )
    parser.add_argument(
        "--batch", type=int, default=3, help="images, each with a label of its own (%(default)s)"
    )
    parser.add_argument(
        "--size", type=int, help="height and width of the images (default: 64, or what fits)"
    )
    parser.add_argument("--device", default="cpu", help="with float64: cpu, cuda (%(default)s)")
    parser.add_argument(
        "--shallow", action="store_true", help="fewer blocks of each kind: a minute for all"
    )
    parser.add_argument(
        "--output", type=Path, help="write the document here, e.g. docs/networks.md"
    )
    arguments = parser.parse_args(argv)
    if not 2 <= arguments.batch <= CLASSES:
        parser.error(f"--batch: expected 2 to {CLASSES}, got {arguments.batch}")
    return arguments


def _chosen(names: Sequence[str], size: int | None) -> list[Network]:
    known = {network.name: network for network in NETWORKS}
    timm = timm_networks.import_timm()
    for name in names:
        if not timm.is_model(name):
            raise SystemExit(f"networks: expected names in timm, got {name!r}")
    chosen = [known.get(name, Network(name)) for name in names or known]
    if size is None:
        return chosen
    return [dataclasses.replace(network, size=size, shallow_size=size) for network in chosen]


def main(argv: Sequence[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Runs the program; 1 where a gradient is wrong or could not be checked."""
    arguments = _arguments(argv)
    reason = timm_networks.why_no_timm()
    if reason is not None:
        raise SystemExit(reason)
    start = time.perf_counter()
    networks = _chosen(arguments.networks, arguments.size)
    rows: list[Row] = []
    for number, network in enumerate(networks, 1):
        size = network.shallow_size if arguments.shallow else network.size
        modes = arguments.mode
        if len(modes) > 1 and computes_the_same(network, size, arguments.shallow):
            modes = [", ".join(modes)]
        for mode in modes:
            row = check(
                network,
                mode,
                batch=arguments.batch,
                device=arguments.device,
                shallow=arguments.shallow,
            )
            rows.append(row)
            verdict = "right" if row.right else f"NOT RIGHT: {_notes(row)}"
            progress = f"[{number}/{len(networks)}] {network.name}, {mode}: {verdict}"
            say(f"{progress} ({row.seconds:.0f} s)")
    say(f"\n{table(rows)}\n")
    say(f"{time.perf_counter() - start:.0f} s")
    if arguments.output is not None:
        write_text(arguments.output, document(rows, arguments.device))
        say(f"written: {arguments.output}")
    return 0 if all(row.right for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
