"""Traps that double backward does not survive: each is sprung here, and our words are read."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from small_networks import WIDTH, Block, Through, Transformer, gradients, make_batch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import harmonizer_ext as hx
from harmonizer_ext import double_backward

SIZE = 8


@pytest.fixture
def batch(generator: torch.Generator) -> dict[str, Tensor]:
    return make_batch(generator, 4, SIZE)


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    # The same operations in the same order; a recomputation may differ by the order of a sum.
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))


# --- attention and checkpoints --------------------------------------------------------------------


def test_fused_attention_is_refused_where_the_explanation_lets_it_in(
    batch: dict[str, Tensor],
) -> None:
    def naive(model: Any, images: Tensor, labels: Tensor, *, create_graph: bool) -> Any:
        pixels = images.requires_grad_()
        logits = model(pixels)
        score = logits.gather(1, labels[:, None]).sum()
        return logits, torch.autograd.grad(score, pixels, create_graph=create_graph)[0]

    model = Transformer()
    # PyTorch itself speaks in the last backward pass only.
    _, maps = naive(model, batch["images"].clone(), batch["labels"], create_graph=True)
    with pytest.raises(RuntimeError, match="derivative for aten::_scaled_dot_product"):
        hx.harmonization_loss(maps, batch["heatmaps"]).backward()
    with pytest.raises(
        hx.SecondDerivativeError,
        match=r"aten::_scaled_dot_product_flash.*exact_attention\(\).*finite_difference",
    ):
        hx.harmonizer_loss(model, **batch, explain=naive)
    with hx.exact_attention():
        hx.harmonizer_loss(model, **batch, explain=naive).loss.backward()


@pytest.mark.parametrize("attention", ["function", "module"])
def test_attention_just_works(batch: dict[str, Tensor], attention: str) -> None:
    torch.manual_seed(0)
    model = Transformer(attention=attention)
    got = gradients(model, batch)
    with sdpa_kernel(SDPBackend.MATH):
        want = gradients(model, batch)
    assert_same(got, want)


def test_encoder_layer_of_pytorch(batch: dict[str, Tensor]) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
    model = Transformer()
    model.blocks = nn.ModuleList([layer])
    for mode in (True, False):
        assert all(g.isfinite().all() for g in gradients(model.train(mode), batch))


@pytest.mark.parametrize("tokens", [None, (1, 0, 0, 1)])
def test_checkpoints_are_recomputed_through_the_kernel_of_their_forward(
    batch: dict[str, Tensor], tokens: tuple[int, ...] | None
) -> None:
    """The rows without a map run, with tokens, through the fused kernel, then and again."""
    torch.manual_seed(0)
    model = Transformer(reentrant=False)
    if tokens is not None:
        batch["tokens"] = torch.tensor(tokens)
    got = gradients(model, batch)
    model.reentrant = None
    assert_same(got, gradients(model, batch))


def test_a_checkpoint_needs_that(batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(double_backward, "_remembering", lambda run, contexts, named: run)
    with pytest.raises(torch.utils.checkpoint.CheckpointError, match="recomput"):
        gradients(Transformer(reentrant=False), batch)


def test_a_checkpoint_keeps_contexts_of_its_own(batch: dict[str, Tensor]) -> None:
    seen: list[str] = []

    class Context:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            seen.append(self.name)

        def __exit__(self, *_: object) -> None:
            seen.append("left " + self.name)

    class Model(Transformer):
        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x).flatten(2).transpose(1, 2)
            contexts = lambda: (Context("forward"), Context("again"))  # noqa: E731
            x = checkpoint(self.blocks[0], x, use_reentrant=False, context_fn=contexts)
            return self.head(x.mean(1))

    model = Model()
    gradients(model, batch)  # the first looks at more than itself
    seen.clear()
    gradients(model, batch)
    # Recomputed in both backward passes.
    assert seen[:2] == ["forward", "left forward"]
    assert seen.count("again") == seen.count("left again") == 2


def test_a_step_within_exact_attention(batch: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    model = Transformer(reentrant=False)
    want = gradients(model, batch)
    with hx.exact_attention():
        got = gradients(model, batch)
    assert_same(got, want)


def test_exact_attention_leaves_no_trace() -> None:
    module = torch.utils.checkpoint
    before = vars(module).copy()

    def fails() -> None:
        with hx.exact_attention():
            assert vars(module) != before
            assert not torch.backends.cuda.flash_sdp_enabled()
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert vars(module) == before
    assert torch.backends.cuda.flash_sdp_enabled()


def test_a_pytorch_whose_checkpoints_are_unknown_is_said(
    batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(double_backward, "_CHECKPOINT_RUNNERS", ("gone",))
    with pytest.warns(UserWarning, match=r"checkpoint of PyTorch .* is unknown here") as said:
        gradients(Transformer(), batch)
    assert {Path(warning.filename).name for warning in said} == {"small_networks.py"}


def test_reentrant_checkpoints_are_refused(batch: dict[str, Tensor]) -> None:
    with pytest.raises(hx.SecondDerivativeError, match=r"use_reentrant=False.*timm.*finite_diff"):
        hx.harmonizer_loss(Transformer(reentrant=True), **batch)


# --- compiled models ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["function", "method", "part"])
def test_compiled_models_are_refused(batch: dict[str, Tensor], how: str) -> None:
    model: Any = Through(nn.Identity())
    if how == "function":
        model = torch.compile(model, backend="eager")
    elif how == "method":
        model.compile(backend="eager")
    else:
        model.first = torch.compile(model.first, backend="eager")
    where = r"model\.first" if how == "part" else "model"
    with pytest.raises(
        hx.SecondDerivativeError, match=rf"^{where}: .*HarmonizerLoss\(model, compile=True\)"
    ):
        hx.harmonizer_loss(model, **batch)
    with torch.no_grad():  # the value alone needs one derivative
        assert hx.harmonizer_loss(model, **batch).loss.isfinite()


def test_compiled_functions_are_seen_in_the_graph(batch: dict[str, Tensor]) -> None:
    model = Through(torch.compile(lambda x: x * x, backend="aot_eager"))
    with pytest.raises(hx.SecondDerivativeError, match="compile the whole step"):
        hx.harmonizer_loss(model, **batch)


# --- operations -----------------------------------------------------------------------------------


def test_hardsigmoid_is_named_with_its_cure(batch: dict[str, Tensor]) -> None:
    model = Through(nn.Hardsigmoid())
    with pytest.raises(
        hx.SecondDerivativeError,
        match=r"aten::hardsigmoid_backward.*make_twice_differentiable\(model\)",
    ):
        hx.harmonizer_loss(model, **batch)
    assert hx.make_twice_differentiable(model) == ["function"]
    assert any(g.abs().sum() > 0 for g in gradients(model, batch))


def test_operations_without_a_cure_of_their_own(batch: dict[str, Tensor]) -> None:
    model = Through(
        lambda x: torch.cdist(x.flatten(2), x.flatten(2))[:, None].expand(-1, 4, -1, -1)
    )
    with pytest.raises(
        hx.SecondDerivativeError, match=r"aten::_cdist_backward: replace the operation.*finite_diff"
    ):
        hx.harmonizer_loss(model, **batch)


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0]


class _SquareOnce(_Square):
    backward = staticmethod(torch.autograd.function.once_differentiable(_Square.backward))


def test_functions_that_say_they_are_differentiated_once(batch: dict[str, Tensor]) -> None:
    with pytest.raises(hx.SecondDerivativeError, match=r"once_differentiable.*replace the oper"):
        hx.harmonizer_loss(Through(_SquareOnce.apply), **batch)
    hx.harmonizer_loss(Through(_Square.apply), **batch).loss.backward()


@pytest.mark.parametrize(
    ("package", "advice"),
    [
        ("flash_attn.flash_attn_interface", "attn_implementation"),
        ("xformers.ops.fmha", "attn_implementation"),
        ("natten.functional", "attn_implementation"),
        ("apex.normalization.fused_layer_norm", r"the layer of the same name in torch\.nn"),
    ],
)
def test_kernels_of_packages_that_break_off_the_graph(
    batch: dict[str, Tensor], package: str, advice: str
) -> None:
    # The packages need a GPU; what is recognized is where their function comes from.
    module = types.ModuleType(package)
    function = type("FusedFunc", (_Square,), {"__module__": package})
    assert package not in sys.modules
    module.FusedFunc = function  # type: ignore[attr-defined]
    with pytest.raises(hx.SecondDerivativeError, match=rf"{package}\.FusedFunc: .*{advice}"):
        hx.harmonizer_loss(Through(function.apply), **batch)


def test_maps_that_do_not_depend_on_the_network(batch: dict[str, Tensor]) -> None:
    def beside(model: Any, images: Tensor, labels: Tensor, *, create_graph: bool) -> Any:
        return model(images), images.detach().requires_grad_() * 2

    with pytest.raises(hx.SecondDerivativeError, match="reaches none of them"):
        hx.harmonizer_loss(Through(nn.Identity()), **batch, explain=beside)


def test_the_graph_is_walked_once_a_mode(
    batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    walks = []
    monkeypatch.setattr(double_backward, "check_graph", lambda *_: walks.append(1))
    model = Through(nn.Identity())
    for mode in (True, True, False, True):
        hx.harmonizer_loss(model.train(mode), **batch)
    assert len(walks) == 2


# --- caches ---------------------------------------------------------------------------------------


class CachedBias(nn.Module):
    """A bias as in timm's LeViT: in eval mode it is kept with its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_biases = nn.Parameter(torch.randn(WIDTH))
        self.attention_bias_cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x + self.attention_biases.exp()
        if "cpu" not in self.attention_bias_cache:
            self.attention_bias_cache["cpu"] = self.attention_biases.exp()
        return x + self.attention_bias_cache["cpu"]


def test_cached_biases_are_neither_stale_nor_shared(batch: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    model = Transformer()
    model.blocks = nn.ModuleList([Block(), CachedBias(), nn.GELU()])
    batch["tokens"] = torch.tensor([1, 0, 0, 1])
    model.train()
    want = gradients(model, batch)
    model.eval()
    model(batch["images"])  # somebody else's call fills the cache
    for _ in range(2):
        assert_same(gradients(model, batch), want)
    with torch.no_grad():
        model.blocks[1].attention_biases.add_(1)
    moved = model.train()(batch["images"])
    torch.testing.assert_close(model.eval()(batch["images"]), moved)


# --- what is not offered --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(
            name,
            marks=pytest.mark.xfail(
                strict=True,
                reason="PyTorch's jvp of this layer takes the saved statistics for constants when "
                "it is differentiated again (pytorch#196699, #196700). Should this test pass, "
                "PyTorch has repaired it and reverse over forward can be offered.",
            ),
        )
        for name in ("layer norm", "batch norm")
    ]
    + ["group norm"],
)
def test_why_reverse_over_forward_is_not_offered(layer: str, batch: dict[str, Tensor]) -> None:
    """The derivative along v by forward mode, differentiated in reverse, against exact."""
    norm = {
        "layer norm": lambda: nn.LayerNorm([4, 6, 6]),
        "batch norm": lambda: nn.BatchNorm2d(4, track_running_stats=False),
        "group norm": lambda: nn.GroupNorm(2, 4),
    }[layer]()
    torch.manual_seed(0)
    model = Through(norm).double()
    images, labels = batch["images"].double(), batch["labels"]
    direction = torch.randn_like(images)
    parameters = list(model.parameters())

    def scores(x: Tensor) -> Tensor:
        return model(x).gather(1, labels[:, None]).sum()

    _, pulled = torch.func.jvp(scores, (images,), (direction,))
    got = torch.autograd.grad(pulled, parameters, allow_unused=True)
    _, maps = hx.input_gradient(model, images, labels, create_graph=True)
    want = torch.autograd.grad((maps * direction).sum(), parameters, allow_unused=True)
    for a, b in zip(got, want, strict=True):
        a, b = (torch.zeros(()) if g is None else g for g in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
