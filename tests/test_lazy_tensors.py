"""Tensors whose memory does not hold their values, as arguments of every operation.

A negated view is memory of the other sign and a bit that says so; a tensor of zeros that nobody has
read has no memory at all. A kernel that is called with an address sees neither.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import FORMULATIONS, Target, make_case
from torch import Tensor

import harmonizer_ext as hx
from harmonizer_ext import alignment, contract


def negated(values: Tensor) -> Tensor:
    """The values as the imaginary part of a conjugated tensor, which negates when it is read."""
    lazy = torch.complex(values, -values).conj().imag
    assert lazy.is_neg()
    return lazy


def negated_densely(values: Tensor) -> Tensor:
    """The same without gaps: nothing would have to be copied but for the sign."""
    lazy = torch._neg_view(-values)
    assert lazy.is_neg()
    assert lazy.stride() == values.stride()
    return lazy


def without_memory(values: Tensor) -> Tensor:
    """A tensor of as many zeros, in no memory."""
    lazy: Tensor = torch._efficientzerotensor(
        tuple(values.shape), dtype=values.dtype, device=values.device
    )
    assert lazy.data_ptr() == 0
    return lazy


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "negated": negated,
    "negated, dense": negated_densely,
    "without memory": without_memory,
}
EACH_KIND = pytest.mark.parametrize("kind", KINDS)

Operation = Callable[..., list[Tensor]]


def _gradient(
    outputs: Tensor | list[Tensor], inputs: list[Tensor], upstream: Tensor
) -> list[Tensor]:
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    grads = torch.autograd.grad(
        outputs, inputs, [upstream.expand_as(outputs[0]), *outputs[1:]], allow_unused=True
    )
    return [*(output.detach() for output in outputs), *grads]


def operations(backend: str) -> dict[str, tuple[Operation, tuple[str, ...]]]:
    """Values and gradients of operations by name, and which arguments each takes."""

    def loss(formulation: str, distance: str) -> Operation:
        def run(saliency: Tensor, heatmaps: Tensor, tokens: Tensor, rows: Tensor) -> list[Tensor]:
            maps = saliency.requires_grad_()
            out = hx.harmonization_loss(
                maps,
                heatmaps,
                tokens,
                formulation=formulation,
                distance=distance,
                levels=3,
                reduction="none",
                backend=backend,
            )
            return _gradient(out, [maps], rows)

        return run

    def value(saliency: Tensor, heatmaps: Tensor, tokens: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [hx.harmonization_loss(saliency, heatmaps, tokens, levels=3, backend=backend)]

    def standardize(saliency: Tensor, maps: Tensor) -> list[Tensor]:
        x = saliency.requires_grad_()
        return _gradient(hx.standardize_cut(x, backend=backend), [x], maps)

    def pyramid(saliency: Tensor, maps: Tensor) -> list[Tensor]:
        x = saliency.requires_grad_()
        return _gradient(hx.gaussian_pyramid(x, 3, backend=backend)[1:], [x], maps[..., ::2, ::2])

    def mse(heatmaps: Tensor, other: Tensor, rows: Tensor) -> list[Tensor]:
        a, b = heatmaps.requires_grad_(), other.requires_grad_()
        return _gradient(hx.positive_part_mse(a, b, backend=backend), [a, b], rows)

    by_name = torch.ops.harmonizer_ext
    found: dict[str, tuple[Operation, tuple[str, ...]]] = {
        f"loss, {formulation}, {distance}": (
            loss(formulation, distance),
            ("saliency", "heatmaps", "tokens", "rows"),
        )
        for formulation, distance in FORMULATIONS
    }
    found |= {
        "loss alone": (value, ("saliency", "heatmaps", "tokens")),
        "standardize_cut": (standardize, ("saliency", "maps")),
        "gaussian_pyramid": (pyramid, ("saliency", "maps")),
        "positive_part_mse": (mse, ("heatmaps", "other", "rows")),
    }
    if backend != "reference":
        found["the loss by its name"] = (
            lambda *maps: list(by_name.harmonization(*maps, "released", 3, "mse", backend, True)),
            ("saliency", "heatmaps", "tokens"),
        )
    return found


def arguments(generator: torch.Generator) -> dict[str, Tensor]:
    case = make_case(generator, 17, 20)
    return {
        "saliency": case.saliency,
        "heatmaps": case.heatmaps,
        "tokens": case.tokens,
        "rows": torch.tensor([1.5, -2.0, 0.25]),
        "maps": torch.randn(case.saliency.shape, generator=generator),
        "other": torch.randn(case.heatmaps.shape, generator=generator),
    }


def _same(got: list[Tensor], expected: list[Tensor], where: str) -> None:
    for a, b in zip(got, expected, strict=True):
        assert not a.is_neg(), where
        torch.testing.assert_close(
            a, b, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{where}: {text}"
        )


def check(backend: str, device: str, generator: torch.Generator, kind: str, *only: str) -> None:
    """Every argument of every operation, or of those named, against the same written out."""
    given = {name: value.to(device) for name, value in arguments(generator).items()}
    chosen = operations(backend)
    for name in only or chosen:
        operation, names = chosen[name]
        plain = [given[argument] for argument in names]
        for which, argument in enumerate(names):
            lazy = KINDS[kind](plain[which])
            # Of the same strides, which another order of sums may hang on.
            written = torch.empty_like(lazy).copy_(lazy)
            results = []
            for tensor in (lazy, written):
                inputs = [value.clone() for value in plain]
                inputs[which] = tensor
                results.append(operation(*inputs))
            _same(results[0], results[1], f"{argument} of {name}")


@EACH_KIND
def test_every_argument_of_every_operation(
    target: Target, generator: torch.Generator, kind: str
) -> None:
    check(target.backend, target.device, generator, kind)


@EACH_KIND
def test_the_reference(generator: torch.Generator, kind: str) -> None:
    check("reference", "cpu", generator, kind)


@EACH_KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_alignment(generator: torch.Generator, kind: str, dtype: torch.dtype) -> None:
    model = torch.randn(3, 16, 12, generator=generator).to(dtype)
    human = torch.rand(3, 16, 12, generator=generator).to(dtype)

    def meter(a: Tensor, b: Tensor) -> Tensor:
        counted = alignment.AlignmentMeter()
        counted.update(a, b)
        return torch.stack(list(counted.compute().values.values()))

    functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        **{name: getattr(alignment, name) for name in ("spearman", "pearson", "dice", "iou")},
        "reduce_resolution": lambda a, b: alignment.reduce_resolution(a, 2) + 0 * b.sum(),
        "alignment_score": lambda a, b: torch.tensor(alignment.alignment_score(a, b).spearman),
        "meter": meter,
        "ceiling": lambda a, b: alignment.split_half_ceiling([a, b], splits=3).per_image,
    }
    for name, function in functions.items():
        for which in range(2):
            pair = [model, human]
            lazy = KINDS[kind](pair[which]) if dtype != torch.bfloat16 else None
            if lazy is None:  # no complex numbers are made of it
                lazy = (without_memory if kind == "without memory" else negated_densely)(
                    pair[which]
                )
            results = []
            for tensor in (lazy, lazy.clone() if lazy.data_ptr() == 0 else lazy.resolve_neg()):
                pair[which] = tensor
                results.append(function(*pair))
            torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True, msg=name)


@EACH_KIND
def test_a_step(generator: torch.Generator, kind: str) -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1),
        torch.nn.GELU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(4, 5),
    )
    given = [
        torch.randn(3, 3, 16, 16, generator=generator),
        torch.rand(3, 16, 16, generator=generator),
        torch.tensor([1.0, 0.0, 0.5]),
    ]
    labels = torch.tensor([0, 3, 1])
    for which in range(3):
        lazy = KINDS[kind](given[which])
        losses = []
        for tensor in (lazy, torch.empty_like(lazy).copy_(lazy)):
            inputs = list(given)
            inputs[which] = tensor
            images, heatmaps, tokens = inputs
            model.zero_grad()
            out = hx.harmonizer_loss(model, images, labels, heatmaps, tokens)
            out.loss.backward()
            losses.append([out.loss.detach(), out.harmonization.detach(), model[0].weight.grad])
        for a, b in zip(*losses, strict=True):
            torch.testing.assert_close(a, b)


def test_what_holds_its_values_is_not_copied() -> None:
    maps = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    (same,) = contract.materialized(maps)
    assert same is maps
