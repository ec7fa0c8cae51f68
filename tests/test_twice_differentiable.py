"""Which layers of PyTorch have no second derivative; replacing them; caches that carry a graph."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable

import pytest
import timm_networks
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harmonizer_ext.twice_differentiable import (
    TwiceDifferentiableHardsigmoid,
    bias_caches,
    clear_cached_biases,
    make_twice_differentiable,
    own_biases,
)

# --- every layer of torch.nn that a classifier of images may hold ---------------------------------

#: Layers that PyTorch 2.13 cannot differentiate twice, and its words. One that is missing
#: here has a right second derivative, or the test below fails: it notices when PyTorch changes.
LACKING = {
    "Hardsigmoid": "derivative for aten::hardsigmoid_backward is not implemented",
    # Legacy: LocalResponseNorm is what networks use.
    "CrossMapLRN2d": "don't support automatic differentiation",
}

_MODULES = nn.modules
#: Where each kind of layer is declared: a new one there is tested as soon as PyTorch has it.
_KINDS = (
    _MODULES.activation,
    _MODULES.pooling,
    _MODULES.batchnorm,
    _MODULES.instancenorm,
    _MODULES.normalization,
    _MODULES.padding,
    _MODULES.pixelshuffle,
    _MODULES.upsampling,
    _MODULES.dropout,
)
#: Not of one image tensor to another; or in need of several processes; or tested elsewhere.
_NOT_HERE = ("MaxUnpool1d", "MaxUnpool2d", "MaxUnpool3d", "SyncBatchNorm", "MultiheadAttention")

_CHANNELS = 4
_ARGUMENTS: dict[str, tuple[object, ...]] = {
    "Threshold": (0.1, 0.2),
    "Softmax": (1,),
    "Softmax2d": (),
    "Softmin": (1,),
    "LogSoftmax": (1,),
    "GLU": (1,),
    "LPPool": (2, 2),
    "AdaptiveMaxPool": (3,),
    "AdaptiveAvgPool": (3,),
    "MaxPool": (2,),
    "AvgPool": (2,),
    "ReflectionPad": (1,),
    "ReplicationPad": (1,),
    "ZeroPad": (1,),
    "CircularPad": (1,),
    "ConstantPad": (1, 0.5),
    "BatchNorm": (_CHANNELS,),
    "InstanceNorm": (_CHANNELS,),
    "GroupNorm": (2, _CHANNELS),
    "LayerNorm": ((6, 6),),
    "RMSNorm": ((6, 6),),
    "LocalResponseNorm": (3,),
    "CrossMapLRN2d": (3,),
    "PixelShuffle": (2,),
    "PixelUnshuffle": (2,),
}


def _dimensions(name: str) -> int:
    """The dimensions of the images that a layer takes: 1, 2 or 3."""
    return int(name[-2]) if name[-1] == "d" and name[-2].isdigit() else 2


def _layer(name: str) -> nn.Module:
    if name.startswith("FractionalMaxPool"):
        return getattr(nn, name)(2, output_ratio=0.5)
    if name.startswith("Upsampling"):
        return getattr(nn, name)(scale_factor=2)
    stem = name if name in _ARGUMENTS else name[:-2] if name[-1] == "d" else name
    return getattr(nn, name)(*_ARGUMENTS.get(stem, ()))


class _Resized(nn.Module):
    def __init__(self, mode: str, antialias: bool, size: int) -> None:
        super().__init__()
        self.options = {"mode": mode, "size": (size, size), "antialias": antialias}

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, **self.options)


def _layers() -> dict[str, Callable[[], nn.Module]]:
    names = {name for kind in _KINDS for name in kind.__all__} - {"Upsample", *_NOT_HERE}
    layers: dict[str, Callable[[], nn.Module]] = {
        name: (lambda name=name: _layer(name)) for name in sorted(names)
    }
    for mode, antialias, size in (
        ("nearest", False, 9),
        ("nearest-exact", False, 9),
        ("area", False, 4),
        *itertools.product(("bilinear", "bicubic"), (False, True), (4, 9)),
    ):
        name = f"interpolate to {size}, {mode}" + (", antialias" if antialias else "")
        layers[name] = lambda options=(mode, antialias, size): _Resized(*options)
    layers["BatchNorm2d, eval"] = lambda: nn.BatchNorm2d(_CHANNELS).eval()
    layers["RReLU, eval"] = lambda: nn.RReLU().eval()
    layers["GELU, tanh"] = lambda: nn.GELU("tanh")
    return layers


LAYERS = _layers()


def _second_derivative_is_right(layer: nn.Module, x: Tensor) -> bool:
    """Checks by central differences of the first (``gradgradcheck``), with fixed random numbers."""

    def call(pixels: Tensor) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            # Curved, so that a layer that is linear has something to be differentiated twice.
            return layer(pixels * 1.0).sin()

    return torch.autograd.gradgradcheck(call, (x,), fast_mode=True)


@pytest.mark.parametrize("name", LAYERS)
def test_which_layers_have_a_second_derivative(name: str, generator: torch.Generator) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    size = (6,) * _dimensions(name.partition(",")[0])
    x = torch.randn(2, _CHANNELS, *size, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    if name in LACKING:
        with pytest.raises(RuntimeError, match=LACKING[name]):
            _second_derivative_is_right(layer, x)
    else:
        assert _second_derivative_is_right(layer, x)


def test_timm_has_no_other_hard_sigmoid_without_one(generator: torch.Generator) -> None:
    reason = timm_networks.why_no_timm()
    if reason is not None:
        pytest.skip(reason)
    timm = timm_networks.import_timm()
    own = [
        kind
        for module in (timm.layers.activations, timm.layers.activations_me)
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, nn.Module) and kind.__module__ == module.__name__
    ]
    assert {"HardSigmoid", "HardSigmoidMe"} <= {kind.__name__ for kind in own}
    x = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    for kind in own:
        assert _second_derivative_is_right(kind().double(), x), kind


# --- hardsigmoid ----------------------------------------------------------------------------------


def _around(value: float, dtype: torch.dtype, steps: int = 8) -> list[float]:
    """The numbers of the type next to a value, on both sides."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    middle = torch.tensor([value], dtype=dtype).view(bits)
    return torch.cat([(middle + k).view(dtype) for k in range(-steps, steps + 1)]).tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_hardsigmoid_is_the_same(dtype: torch.dtype, generator: torch.Generator) -> None:
    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-30, -1e-30]
    special += _around(3.0, dtype) + _around(-3.0, dtype)
    random = 3 * torch.randn(1001, generator=generator)
    x = torch.cat([torch.tensor(special, dtype=dtype), random.to(dtype)])
    weights = torch.randn(len(x), generator=generator).to(dtype)
    found = []
    for layer in (nn.Hardsigmoid(), TwiceDifferentiableHardsigmoid()):
        pixels = x.clone().requires_grad_()
        output = layer(pixels)
        (gradient,) = torch.autograd.grad(output, pixels, weights)
        found.append((output.detach(), gradient))
    (output, gradient), (other_output, other_gradient) = found
    assert torch.equal(output.nan_to_num(-1), other_output.nan_to_num(-1))
    assert torch.equal(output.isnan(), other_output.isnan())
    assert torch.equal(gradient == 0, other_gradient == 0)
    # PyTorch multiplies by the 1/6 of float32, in float64 too: half a unit in its last place, and
    # as much for the product in a narrower type.
    rtol = max(2**-24, torch.finfo(dtype).eps)
    torch.testing.assert_close(other_gradient, gradient, rtol=rtol, atol=0)


def test_hardsigmoid_can_be_differentiated_twice(generator: torch.Generator) -> None:
    x = 2 * torch.randn(50, generator=generator, dtype=torch.float64)
    assert _second_derivative_is_right(TwiceDifferentiableHardsigmoid(), x.requires_grad_())


class _Gate(nn.Hardsigmoid):
    """A user's own, which may compute anything."""


def test_what_is_replaced_stays_where_it_was(generator: torch.Generator) -> None:
    shared = nn.Hardsigmoid()
    model = nn.Sequential(nn.Linear(4, 4), shared, nn.Sequential(nn.Hardsigmoid(), shared), _Gate())
    model.eval()
    seen: list[nn.Module] = []
    shared.register_forward_hook(lambda module, *_: seen.append(module))
    x = torch.randn(3, 4, generator=generator)
    before = model(x)
    keys = list(model.state_dict())
    assert make_twice_differentiable(model) == ["1", "2.0"]
    assert make_twice_differentiable(model) == []
    assert model[1] is model[2][1] is shared
    assert type(shared) is TwiceDifferentiableHardsigmoid
    assert type(model[3]) is _Gate
    assert not shared.training
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), before)
    assert seen == [shared] * 4  # twice in each of two calls
    assert isinstance(copy.deepcopy(model)[1], nn.Hardsigmoid)


def test_a_model_that_is_itself_replaced() -> None:
    model = nn.Hardsigmoid()
    assert make_twice_differentiable(model) == [""]
    assert type(model) is TwiceDifferentiableHardsigmoid


# --- cached biases --------------------------------------------------------------------------------


class _Biased(nn.Module):
    """Keeps what it computes from a parameter, with its graph, as some attention in timm does."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_biases = nn.Parameter(torch.ones(3))
        self.attention_bias_cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if "cpu" not in self.attention_bias_cache:
            self.attention_bias_cache["cpu"] = self.attention_biases.exp()
        return x * self.attention_bias_cache["cpu"]


def test_clearing_makes_calls_independent() -> None:
    model = nn.Sequential(_Biased(), _Biased())
    x = torch.ones(2, 3)
    model(x).sum().backward()
    assert len(list(bias_caches(model))) == 2
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        model(x).sum().backward()
    clear_cached_biases(model)
    assert list(bias_caches(model)) == []
    model(x).sum().backward()
    with torch.no_grad():
        model[0].attention_biases.zero_()
    with own_biases(model):
        fresh = model(x)
    assert list(bias_caches(model)) == []
    torch.testing.assert_close(fresh, torch.full((2, 3), torch.e))
    fresh.sum().backward()  # what the cache held lives on in the graph


def test_biases_are_cleared_after_an_error_and_of_modules_alone() -> None:
    model = _Biased()

    def fail() -> None:
        with own_biases(model):
            model(torch.ones(1, 3))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(bias_caches(model)) == []
    with own_biases(lambda x: x):
        pass


@pytest.mark.parametrize(
    "name",
    [
        "levit_128s",
        "efficientformer_l1",
        "efficientformerv2_s0",
        "tiny_vit_5m_224",
        "efficientvit_m0",
    ],
)
def test_networks_of_timm_that_cache_biases(name: str, generator: torch.Generator) -> None:
    reason = timm_networks.why_no_timm()
    if reason is not None:
        pytest.skip(reason)
    timm = timm_networks.import_timm()
    model = timm.create_model(name, pretrained=False, num_classes=4).eval()
    images = torch.randn(1, 3, 224, 224, generator=generator)
    model(images)
    # This is where timm keeps them; were the name another, clearing would do nothing.
    assert list(bias_caches(model))
    assert all(value.requires_grad for cache in bias_caches(model) for value in cache.values())
    clear_cached_biases(model)
    assert list(bias_caches(model)) == []
