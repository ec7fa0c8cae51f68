"""The benchmark's peers compute the same loss: otherwise a speed-up over them means nothing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import peers
import pytest
import torch
from conftest import make_case
from torch.utils._python_dispatch import TorchDispatchMode

import harmonizer_ext as hx

RELEASED = (peers.eager_released, peers.eager_one_pyramid, peers.shifted_slices)
PAPER = (peers.eager_paper, peers.shifted_slices_paper)
PEERS = [(peer, "released") for peer in RELEASED] + [(peer, "paper") for peer in PAPER]
GOLDEN = np.load(Path(__file__).parent / "golden" / "released.npz")

# Float64 steps of 1.1e-16, about 20 roundings a pixel and sums over 5e4 pixels in blocks; the
# largest deviation seen is 1.4e-14.
RTOL = 1e-12


def _loss_and_gradient(
    peer: Any, saliency: torch.Tensor, *data: torch.Tensor, **options: int
) -> tuple[torch.Tensor, torch.Tensor]:
    maps = saliency.detach().requires_grad_()
    loss = peer(maps, *data, **options)
    return loss.detach(), torch.autograd.grad(loss, maps)[0]


def _assert_close(
    got: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Loss relative to itself; gradient element by element, relative to its row's largest."""
    torch.testing.assert_close(got[0], expected[0], rtol=RTOL, atol=0)
    error = (got[1] - expected[1]).abs()
    # Written so that a NaN fails.
    assert (error <= RTOL * expected[1].abs().amax((1, 2, 3), keepdim=True)).all()


@pytest.mark.parametrize("levels", [1, 4, 5])
@pytest.mark.parametrize(("height", "width"), [(33, 37), (64, 50), (97, 224), (225, 223)])
@pytest.mark.parametrize(("peer", "formulation"), PEERS)
def test_agrees_with_reference(
    generator: torch.Generator, peer: Any, formulation: str, height: int, width: int, levels: int
) -> None:
    case = make_case(generator, height, width, dtype=torch.float64)
    assert case.tokens is not None
    data = (case.heatmaps, case.tokens)
    got = _loss_and_gradient(peer, case.saliency, *data, levels=levels)

    def reference(*inputs: torch.Tensor, levels: int) -> torch.Tensor:
        return hx.harmonization_loss(
            *inputs, formulation=formulation, levels=levels, backend="reference"
        )

    expected = _loss_and_gradient(reference, case.saliency, *data, levels=levels)
    _assert_close(got, expected)


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_eager_released_is_the_released_code(case: str) -> None:
    def get(key: str) -> torch.Tensor:
        return torch.tensor(GOLDEN[f"loss/{case}/{key}"], dtype=torch.float64)

    got = _loss_and_gradient(
        peers.eager_released,
        get("saliency"),
        get("heatmaps"),
        get("tokens"),
        levels=int(get("levels")),
    )
    # The golden gradient is that of the channel mean, spread over the channels.
    gradient = get("gradient")[:, None].expand(get("saliency").shape)
    _assert_close(got, (get("loss"), gradient))


@pytest.mark.parametrize(("peer", "formulation"), PEERS)
def test_half_precision_saliency_is_widened(
    generator: torch.Generator, peer: Any, formulation: str
) -> None:
    case = make_case(generator, 64, 48, dtype=torch.bfloat16)
    assert case.tokens is not None
    data = (case.heatmaps.double(), case.tokens)
    loss, gradient = _loss_and_gradient(peer, case.saliency, *data)
    expected_loss, expected = _loss_and_gradient(peer, case.saliency.double(), *data)
    assert gradient.dtype == torch.bfloat16
    assert torch.equal(loss, expected_loss)
    assert torch.equal(gradient, expected.bfloat16())


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        self.of[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("peer", "convolutions"),
    [
        (peers.eager_released, 8),
        (peers.eager_one_pyramid, 4),
        (peers.shifted_slices, 0),
        (peers.eager_paper, 8),
        (peers.shifted_slices_paper, 0),
    ],
)
def test_peers_are_what_they_are_named_for(
    generator: torch.Generator, peer: Any, convolutions: int
) -> None:
    case = make_case(generator, 33, 32)
    with _Calls() as calls:
        peer(case.saliency, case.heatmaps, case.tokens)
    assert calls.of["convolution"] == convolutions
