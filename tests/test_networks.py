"""Networks of timm: what they need to be differentiated twice, and that the gradient is right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import check_networks
import pytest
import timm_networks
import torch
from check_networks import BIASES, HARDSIGMOID, MATH
from torch import nn

import harmonizer_ext as hx
from harmonizer_ext.gradient_check import GradientCheck, OracleResult

needs_timm = pytest.mark.skipif(
    timm_networks.why_no_timm() is not None, reason=str(timm_networks.why_no_timm())
)

#: What a step in plain PyTorch needs on a CPU. Swin's and MaxViT's attention is masked by learned
#: biases, for which PyTorch takes the MATH kernel there by itself.
NEEDED = {
    "vit_small_patch16_224": (MATH,),
    "vit_small_patch14_dinov2": (MATH,),
    "eva02_tiny_patch14_224": (MATH,),
    "mobilenetv3_large_100": (HARDSIGMOID,),
}

#: Families whose modes differ in more than BatchNorm's statistics, and one for those.
BOTH_MODES = ("resnet50", "levit_128s", "mobilenetv3_large_100")


#: As others, but for their widths or without their BatchNorm; the program checks them too.
LIKE_OTHERS = (
    *("vgg16", "vit_base_patch16_224", "deit_tiny_patch16_224", "deit_small_patch16_224"),
)


def _cases() -> Iterator[tuple[check_networks.Network, str]]:
    for network in check_networks.NETWORKS:
        if network.name in LIKE_OTHERS:
            continue
        yield network, "train"
        if network.name in BOTH_MODES:
            yield network, "eval"


@needs_timm
@pytest.mark.parametrize(("network", "mode"), list(_cases()), ids=lambda v: getattr(v, "name", v))
def test_the_gradient_of_every_parameter_is_right(
    network: check_networks.Network, mode: str
) -> None:
    row = check_networks.check(network, mode, shallow=True)
    assert row.failure is None, row.failure
    assert row.check is not None
    assert row.check.passed is True, row.check
    # Rounding of float64: with a BatchNorm in training mode over the 1e-6 of the largest that the
    # biases before it are compared with, whose gradient is zero; 100 times what was seen.
    error = row.check.forward_over_reverse.relative_error
    assert error is not None, row.check
    assert error < (1e-7 if mode == "train" else 1e-11), row.check
    expected = NEEDED.get(network.name, ())
    if network.name == "levit_128s" and mode == "eval":
        expected = (BIASES,)
    assert row.needed == expected
    # All parameters matter, so that none can be wrong unseen: but for the last bias and what acts
    # through the mean over positions, of which a small image has one.
    assert row.check.zero_share < 0.9


@needs_timm
def test_levit_in_eval_mode_trains_step_after_step() -> None:
    """Its cached biases would fail at the second step, or be those of before the first."""
    network = next(n for n in check_networks.NETWORKS if n.name == "levit_128s")
    images, labels, heatmaps = check_networks.batch_of(32, 3)
    model = check_networks.build(network, images, "eval", shallow=True)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for _ in range(3):
        optimizer.zero_grad()
        hx.harmonizer_loss(model, images, labels, heatmaps).loss.backward()
        optimizer.step()
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, start[name])]
    assert any("attention_biases" in name for name in moved)
    fresh = check_networks.build(network, images, "eval", shallow=True)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(images), fresh(images))


# --- the program ----------------------------------------------------------------------------------


class _Detached(nn.Module):
    """A network of nobody, whose alignment teaches the wrong thing: a hook cuts the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(3 * 32 * 32, 7)
        self.head = nn.Linear(7, check_networks.CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.hidden(x.flatten(1))
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient.detach())
        return self.head(y.square())


def test_a_wrong_gradient_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if timm_networks.why_no_timm() is not None:
        pytest.skip(str(timm_networks.why_no_timm()))

    def broken(*_: object) -> nn.Module:
        torch.manual_seed(0)
        return _Detached()

    monkeypatch.setattr(check_networks, "_create", broken)
    code = check_networks.main(["resnet18", "--shallow", "--output", str(tmp_path / "out.md")])
    assert code == 1
    assert "**wrong**" in (tmp_path / "out.md").read_text()
    assert "0 of 1 gradients are right" in (tmp_path / "out.md").read_text()
    assert "NOT RIGHT" in capsys.readouterr().out


@needs_timm
def test_the_program_writes_its_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "networks.md"
    names = ["deit_tiny_patch16_224", "levit_128s"]
    assert check_networks.main([*names, "--shallow", "--output", str(output)]) == 0
    text = output.read_text()
    assert "3 of 3 gradients are right" in text
    assert "| `deit_tiny_patch16_224` | 3x3x32x32 | train, eval |" in text
    assert f"| {MATH} |" in text
    assert f"| {BIASES} |" in text
    assert f"torch {torch.__version__}" in text
    said = capsys.readouterr().out
    assert "[2/2] levit_128s, eval: right" in said


@needs_timm
def test_wrong_arguments() -> None:
    with pytest.raises(SystemExit, match="networks: expected names in timm, got 'resnet9000'"):
        check_networks.main(["resnet9000"])
    with pytest.raises(SystemExit):
        check_networks.main(["--batch", "1"])


def test_without_timm_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm_networks, "why_no_timm", lambda: "the networks come from timm")
    with pytest.raises(SystemExit, match="the networks come from timm"):
        check_networks.main([])


def test_a_row_says_what_was_found() -> None:
    def row(**changes: object) -> str:
        found = GradientCheck(
            passed=True,
            tolerance=1e-6,
            loss=1.0,
            forward_over_reverse=OracleResult(2e-14, "a"),
            finite_difference=OracleResult(reason="not defined: no two steps agree"),
            parameters=10,
            zero_share=0.0,
            zero_parameters=(),
            saliency_std=0.01,
            replaced=(),
        )
        options: dict[str, object] = {"needed": (MATH,), "check": found}
        made = check_networks.Row("net", "3x3x8x8", "train", 1.0, **(options | changes))
        return check_networks.table([made]).splitlines()[-1]

    assert row() == (
        "| `net` | 3x3x8x8 | train | 2e-14 | - | MATH attention | "
        "no step is short enough for the difference |"
    )
    failed = row(check=None, needed=(), failure="RuntimeError: a|b")
    assert failed == "| `net` | 3x3x8x8 | train | fails | - | - | RuntimeError: a\\|b |"
