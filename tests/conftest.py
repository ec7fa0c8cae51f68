"""Fixtures of all tests: implementations that exist here, one tester for any, tolerances."""

from __future__ import annotations

import itertools
import os
import signal
import zlib
from dataclasses import dataclass
from pathlib import Path

# Threads that wait by spinning take the cores from whoever else tests on this machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# In the background of a shell (nohup, some CI) SIGINT is ignored, and would be by the programs that
# the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch

import harmonizer_ext as hx
from harmonizer_ext import backends

#: (formulation, distance) pairs that exist.
FORMULATIONS = (("released", "mse"), ("paper", "mse"), ("paper", "l2"))


@dataclass(frozen=True)
class Target:
    """A fused implementation under test; the reference in float64 is what it is compared with."""

    backend: str
    device: str


def _targets() -> list[Target]:
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return [
        Target(name, device)
        for device in devices
        # What stands behind the reference is never picked by itself.
        for name in itertools.takewhile(
            lambda name: name != "reference", backends.PREFERENCE.get(device, ())
        )
    ]


def _name(target: Target) -> str:
    return f"{target.backend}-{target.device}"


def skip_unless_supported(target: Target, dtype: torch.dtype | None = None) -> None:
    """Skips, with the backend's own reason, what it leaves to the reference."""
    reason = backends.why_not(target.backend, target.device, dtype)
    if reason is not None:
        pytest.skip(f"{target.backend} on {target.device}: {reason}")


@pytest.fixture(params=_targets(), ids=_name)
def target(request: pytest.FixtureRequest) -> Target:
    skip_unless_supported(request.param)
    return request.param


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """A generator seeded by the test's name, so that neither order nor other tests matter.

    Every target gets the same inputs: what one machine has shown of a case holds on the others.
    """
    name = request.node.nodeid
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if (target := parameters.get("target")) is not None:
        name = name.replace(_name(target), "any", 1)
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


@dataclass
class Case:
    """One input of the loss, on the CPU; ``run`` moves it where it is wanted."""

    saliency: torch.Tensor
    heatmaps: torch.Tensor
    tokens: torch.Tensor | None

    def run(
        self, backend: str, device: str = "cpu", dtype: torch.dtype | None = None, **options: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Row losses (B,) and the gradient of their sum, both on the CPU in float64."""
        dtype = dtype or self.saliency.dtype
        # Moving, unlike converting, keeps the strides, which are part of the case.
        maps = self.saliency.detach().to(device, dtype).requires_grad_()
        rows = hx.harmonization_loss(
            maps,
            self.heatmaps.to(device, torch.promote_types(self.heatmaps.dtype, dtype)),
            None if self.tokens is None else self.tokens.to(device),
            reduction="none",
            backend=backend,
            **options,
        )
        (grad,) = torch.autograd.grad(rows.sum(), maps)
        assert grad.dtype == dtype
        return rows.detach().double().cpu(), grad.double().cpu()


def make_case(
    generator: torch.Generator,
    height: int,
    width: int,
    *,
    batch: int = 3,
    channels: int = 3,
    scale: float = 1e-3,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """Noise with a blob in it against a smooth human map, with a token of every kind."""
    y = torch.linspace(-1, 1, height)[:, None]
    x = torch.linspace(-1, 1, width)[None, :]
    centre = torch.rand(batch, 2, 1, 1, generator=generator) - 0.5
    blob = torch.exp(-4 * ((y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2))
    noise = torch.randn(batch, channels, height, width, generator=generator)
    heatmaps = (blob * torch.rand(batch, height, width, generator=generator)).clamp(min=0.05)
    tokens = torch.tensor([1.0, 0.0, 0.5])[:batch]
    return Case(((noise + blob[:, None]) * scale).to(dtype), heatmaps.to(dtype), tokens)


def near_the_cut(case: Case, levels: int, formulation: str, tolerance: float) -> torch.Tensor:
    """Rows (B,) in which a pixel lies so close to its mean that rounding decides which side.

    The gradient jumps there, so that two correct implementations may differ by the jump.
    """
    maps = case.saliency.double().mean(1, keepdim=True)
    scales = hx.gaussian_pyramid(maps, levels if formulation == "paper" else 1, backend="reference")
    near = torch.zeros(maps.shape[0], dtype=torch.bool)
    for level in scales:
        centred = level - level.mean((-2, -1), keepdim=True)
        std = centred.std((-2, -1), correction=0, keepdim=True)
        close = (centred.abs() < tolerance * (std + level.abs())) & (std > 0)
        near |= close.flatten(1).any(1)
    return near


def conditioned(rtol: float, case: Case, levels: int, formulation: str) -> float:
    """The tolerance, or what rounding alone makes of the paper's levels where that is more.

    A level is rounded to float32 before it is standardized: where its pixels, be they two, differ
    little from their mean, the error is that rounding times the mean over the standard deviation.
    """
    if formulation != "paper":
        return rtol
    for maps in (case.saliency.double().mean(1), case.heatmaps.double()):
        for level in hx.gaussian_pyramid(maps[:, None], levels, backend="reference"):
            std = level.std((-2, -1), correction=0)
            apart = level.mean((-2, -1)).abs() / std
            if (std > 0).any():
                rtol = max(rtol, 4 * 2**-24 * float(apart[std > 0].amax()))
    return rtol


def assert_rows_close(
    got: tuple[torch.Tensor, torch.Tensor],
    expected: tuple[torch.Tensor, torch.Tensor],
    rtol: float,
    *,
    atol: float = 0.0,
    except_rows: torch.Tensor | None = None,
) -> None:
    """Loss relative to itself; gradient element by element, relative to its row's largest.

    The gradient of a row is a difference of terms of the size of its largest element, so that this,
    not each element, is what rounding is relative to.
    """
    torch.testing.assert_close(got[0], expected[0], rtol=rtol, atol=1e-300)
    keep = torch.ones(len(got[0]), dtype=torch.bool) if except_rows is None else ~except_rows
    size = expected[1].abs().amax((1, 2, 3), keepdim=True)
    error = (got[1] - expected[1]).abs()
    excess = (error - atol - rtol * size)[keep]
    assert not excess.isnan().any()
    assert excess.numel() == 0 or excess.max() <= 0, (
        f"gradient off by {(error / size.clamp(min=1e-300))[keep].max():.2e} of its row's largest "
        f"element, allowed {rtol:.0e}"
    )


def assert_agrees(
    case: Case,
    got: tuple[torch.Tensor, torch.Tensor],
    rtol: float,
    *,
    levels: int,
    formulation: str,
    distance: str,
) -> None:
    """Loss and gradient of a case as the reference has them in float64.

    But for the gradient of rows in which rounding decides on which side of its mean a pixel lies.
    """
    options = {"levels": levels, "formulation": formulation, "distance": distance}
    expected = case.run("reference", dtype=torch.float64, **options)
    near = near_the_cut(case, levels, formulation, 3e-6)
    assert_rows_close(got, expected, rtol, except_rows=near)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature of the demo's data: 48 images with human maps, 48 without, and tests of 24."""
    import extras  # which finds the programs' modules where pytest alone looks for them

    if (reason := extras.why_no_train()) is not None:
        pytest.skip(reason)
    import shortcut_digits

    directory = tmp_path_factory.mktemp("digits")
    splits = shortcut_digits.make(train_images=96, test_images=24)
    shortcut_digits.save(splits, directory)
    return directory
