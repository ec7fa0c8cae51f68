"""Decisions of the CUDA backend before it calls a kernel, on any machine."""

from __future__ import annotations

import types
import warnings
from pathlib import Path

import pytest
import torch

import harmonizer_ext as hx
from harmonizer_ext import backends
from harmonizer_ext.backends import cuda


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 0), "sm_80", True),
        ((8, 6), "sm_80", True),
        ((8, 0), "sm_86", False),
        ((9, 0), "sm_80", False),
        ((9, 0), "sm_80 compute_80", True),
        ((9, 0), "sm_100 compute_120", False),
        ((10, 3), "sm_90 sm_100 sm_120 compute_120", True),
        ((11, 0), "sm_90 sm_100 sm_120 compute_120", False),
        ((12, 1), "sm_90 sm_100 sm_120 compute_120", True),
        ((13, 0), "sm_75 sm_120 compute_120", True),
        ((7, 0), "sm_75 compute_75", False),
    ],
)
def test_code_for_a_gpu(capability: tuple[int, int], architectures: str, runs: bool) -> None:
    assert cuda.has_code(capability, architectures) is runs


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A native module with CUDA kernels, and a PyTorch that sees an A100; change what is wanted."""
    native = types.SimpleNamespace(
        cuda=True,
        cuda_architectures="sm_80 sm_90 compute_90",
        cuda_runtime_version=12080,
        cuda_driver_version=lambda: native.driver,
        driver=13000,
        capability=(8, 0),
    )
    monkeypatch.setattr(cuda.native_module, "load", lambda: (native, None))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: native.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Test GPU")
    for cached in (cuda.why_not_built, cuda._why_not_gpu):
        monkeypatch.setattr(cuda, cached.__name__, cached.__wrapped__)
    return native


def test_the_gpu_of_the_tensors_is_asked(
    gpu: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A machine with an A100 and a V100, the first being current.
    capabilities = {0: (8, 0), 1: (7, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    for device in ("cuda", "cuda:0", torch.device("cuda", 0)):
        assert backends.why_not("cuda", device, torch.float32) is None
        assert backends.select("cuda", device, torch.float32) == "cuda"
        assert hx.available_backends(device)[0] == "cuda"
    assert "(sm_70)" in str(backends.why_not("cuda", "cuda:1", torch.float32))
    with pytest.raises(RuntimeError, match=r"backend='cuda' cannot run .* \(sm_70\)"):
        backends.select("cuda", torch.device("cuda", 1), torch.float32)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert "(sm_70)" in str(backends.why_not("cuda", "cuda", torch.float32))
    assert backends.why_not("cuda", "cuda:0", torch.float32) is None


def test_the_device_is_switched_by_pytorch_and_only_where_it_must(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []

    class Guard:
        def __init__(self, device: torch.device) -> None:
            self.name = f"cuda:{device.index}"

        def __enter__(self) -> None:
            events.append(f"to {self.name}")

        def __exit__(self, *_: object) -> None:
            events.append("back")

    def record(kernels: object, operation: str, *_: object, **options: object) -> None:
        events.append(f"{operation} {options}")

    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda.native_module.Kernels, "_call", record)
    first, second = (
        types.SimpleNamespace(device=torch.device("cuda", i), get_device=lambda i=i: i)
        for i in range(2)
    )
    cuda._kernels._call("pyramid", first, 1)
    cuda._kernels._call("loss", second, 1, options=(0, 0))
    call = "loss {'options': (0, 0)}"
    assert events == ["pyramid {'options': ()}", "to cuda:1", call, "back"]


def test_the_native_module_changes_no_device() -> None:
    # Whoever changes it must change it back, which may create a context on a GPU that nobody uses.
    sources = [*(Path(__file__).parent.parent / "csrc").rglob("*.cu*")]
    assert len(sources) > 10
    assert not [path.name for path in sources if "cudaSetDevice" in path.read_text()]


def test_runs_where_everything_is_there(gpu: types.SimpleNamespace) -> None:
    assert cuda.why_not("cuda", torch.float32) is None
    assert hx.available_backends("cuda")[0] == "cuda"
    assert cuda.why_not("cpu") == "it runs on NVIDIA GPUs; move the tensors with .cuda()"


def test_every_reason_names_the_way_out(
    gpu: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reason(dtype: torch.dtype = torch.float32) -> str:
        return cuda.why_not("cuda", dtype) or "none"

    assert 'backend="reference"' in reason(torch.float64)
    gpu.capability = (7, 0)
    assert reason() == "the GPU is Test GPU (sm_70), and the kernels need sm_75 or later"
    gpu.capability = (7, 5)
    assert "built for sm_80 sm_90 compute_90; set HARMONIZER_CUDA_ARCHS=75" in reason()
    gpu.driver = 11080
    assert "serves CUDA 11.8 at most and the native module is built with 12.8" in reason()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert reason() == "PyTorch sees no cuda device"
    gpu.cuda = False
    assert "install the CUDA toolkit, 11.8 or later, and reinstall with" in reason()
    assert cuda.description().startswith("no: the native module was built without CUDA kernels")
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert 'take backend="triton"' in reason()


def test_says_once_that_triton_takes_over(
    gpu: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.cuda = False
    monkeypatch.setattr(backends, "_announced", set())
    monkeypatch.setattr(backends.get("triton"), "why_not", lambda *_: None)
    with pytest.warns(RuntimeWarning, match=r"'cuda' is passed over .*'triton' computes instead"):
        assert backends.select(None, "cuda", torch.float32) == "triton"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select(None, "cuda", torch.float32) == "triton"


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the calls would run")
def test_bindings_take_what_the_backend_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    if cuda.why_not_built() is not None:
        pytest.skip(str(cuda.why_not_built()))
    monkeypatch.setattr(cuda._kernels, "_place", lambda beside, samples: (0, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)  # as if those on the CPU were
    maps = torch.rand(2, 3, 8, 9)
    a, rows = maps[:, 0], torch.rand(2)
    # Every argument is converted before the kernels' first question to the driver fails.
    for call in (
        lambda: cuda.harmonization(maps, a, rows, "paper", 3, "l2", True),
        lambda: cuda.harmonization(maps, a, rows, "paper", 3, "l2", True, variant=-1, prefetch=2),
        lambda: cuda.pyramid(maps, 3),
        lambda: cuda.pyramid_adjoint([maps], 16, 18),
        lambda: cuda.standardize_cut(maps),
        lambda: cuda.standardize_cut_backward(maps, maps),
        lambda: cuda.positive_part_mse(a, a),
        lambda: cuda.positive_part_mse_backward(rows, a, a),
    ):
        with pytest.raises(RuntimeError, match=r"cuda|CUDA"):
            call()


def test_variants_of_the_loss_are_numbered() -> None:
    if cuda.why_not_built() is not None:
        pytest.skip(str(cuda.why_not_built()))
    variants = cuda.native().cuda_loss_variants()
    assert [variant["number"] for variant in variants] == list(range(1, len(variants) + 1))
    assert len({(variant["formulation"], variant["name"]) for variant in variants}) == len(variants)
