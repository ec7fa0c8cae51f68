"""Spearman's correlation: against scipy, and the kernel against PyTorch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from harmonizer_ext import alignment, backends

stats = pytest.importorskip("scipy.stats", reason="scipy (extra: test) is the oracle here")

# Ranks and their sums are whole numbers, exact in float64; what remains is scipy's own rounding
# (Pearson on ranks of up to 5e4 pixels), some 1e-15.
RANK_TOLERANCE = 1e-12


def random_maps(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scipy_spearman(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    pairs = zip(a.double().numpy(), b.double().numpy(), strict=True)
    return np.array([stats.spearmanr(x.flatten(), y.flatten()).statistic for x, y in pairs])


# ---------------------------------------------------------------------------- values


def test_spearman_by_hand() -> None:
    # Without ties 1 - 6 sum d^2 / (n (n^2 - 1)): d = (1, -1, 0, 0), so 1 - 12 / 60.
    a = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    b = torch.tensor([[[20.0, 10.0], [30.0, 1000.0]]])
    assert alignment.spearman(a, b).tolist() == pytest.approx([0.8], abs=1e-15)
    # Midranks (1.5, 1.5, 3, 4) against (1, 2, 3, 4): 4.5 / sqrt(4.5 * 5).
    tied = torch.tensor([[[7.0, 7.0], [8.0, 9.0]]])
    assert alignment.spearman(tied, a).tolist() == pytest.approx([math.sqrt(0.9)], abs=1e-15)


def test_spearman_equals_scipy_on_random_maps() -> None:
    a, b = random_maps(0, 5, 31, 33), random_maps(1, 5, 31, 33)
    b = b + a * torch.tensor([-3.0, -0.3, 0.0, 0.3, 3.0])[:, None, None]
    np.testing.assert_allclose(
        alignment.spearman(a, b).numpy(), scipy_spearman(a, b), rtol=0, atol=RANK_TOLERANCE
    )


@pytest.mark.parametrize("levels", [2, 3, 10])
def test_spearman_equals_scipy_with_heavy_ties(levels: int) -> None:
    a = (random_maps(2, 6, 24, 17) * levels / 4).round()
    b = (
        (random_maps(3, 6, 24, 17) * levels / 4 + a).round().clamp(min=0)
    )  # as a cut map: half zeros
    assert len(torch.unique(b)) <= 3 * levels
    np.testing.assert_allclose(
        alignment.spearman(a, b).numpy(), scipy_spearman(a, b), rtol=0, atol=RANK_TOLERANCE
    )


def test_spearman_at_full_resolution() -> None:
    a, b = random_maps(4, 2, 224, 224), random_maps(5, 2, 224, 224)
    b = (a + b).clamp(min=0)
    np.testing.assert_allclose(
        alignment.spearman(a, b).numpy(), scipy_spearman(a, b), rtol=0, atol=RANK_TOLERANCE
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_spearman_of_every_dtype(dtype: torch.dtype) -> None:
    # Rounding to the dtype makes ties; the oracle gets the rounded maps.
    a, b = random_maps(6, 3, 20, 21).to(dtype), random_maps(7, 3, 20, 21)
    b = (b + a.double()).to(dtype)
    np.testing.assert_allclose(
        alignment.spearman(a, b).numpy(), scipy_spearman(a, b), rtol=0, atol=RANK_TOLERANCE
    )


def test_spearman_of_integers_bools_and_mixed_dtypes() -> None:
    a, b = random_maps(8, 2, 9, 9), random_maps(9, 2, 9, 9)
    mask = a > 0.3
    expected = scipy_spearman(mask, b)
    for maps in (mask, mask.long(), mask.to(torch.uint8), mask.half()):
        np.testing.assert_allclose(
            alignment.spearman(maps, b).numpy(), expected, rtol=0, atol=RANK_TOLERANCE
        )


def test_spearman_depends_on_order_alone() -> None:
    a, b = random_maps(10, 2, 16, 16), random_maps(11, 2, 16, 16)
    expected = alignment.spearman(a, b)
    assert torch.equal(alignment.spearman(a.exp() * 1e-30, b), expected)
    assert torch.equal(alignment.spearman(b, a), expected)
    assert torch.equal(alignment.spearman(-a, b), -expected)
    assert torch.equal(alignment.spearman(a, a), torch.ones(2, dtype=torch.float64))


def test_negative_zero_ties_with_zero() -> None:
    a = torch.tensor([[[0.0, -0.0, 1.0, -1.0]]])
    plain = torch.tensor([[[0.0, 0.0, 1.0, -1.0]]])
    b = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    assert torch.equal(alignment.spearman(a, b), alignment.spearman(plain, b))


def test_undefined_spearman_is_nan_in_its_row_only() -> None:
    a, b = random_maps(12, 4, 8, 8), random_maps(13, 4, 8, 8)
    expected = alignment.spearman(a, b)
    a[1] = 0.3
    b[2, 3, 3] = math.nan
    result = alignment.spearman(a, b)
    assert result.isnan().tolist() == [False, True, True, False]
    assert torch.equal(result[[0, 3]], expected[[0, 3]])


def test_spearman_of_int64_beyond_float64() -> None:
    # 2 ** 53 and its successor are one number in float64.
    a = torch.tensor([[[2**53, 2**53 + 1, 2**53 + 2]]])
    b = torch.tensor([[[1.0, 3.0, 2.0]]])
    assert alignment.spearman(a, b).tolist() == pytest.approx([0.5], abs=1e-15)


# ---------------------------------------------------------------------------- the kernel

# The kernel against PyTorch: whole numbers, added without rounding, and the same formula on them.
# On Intel's processors PyTorch takes square roots from MKL, which rounds one in a hundred to the
# other neighbour: two square roots, a product and a quotient of 1.1e-16 each, twice. A rank that is
# off by one moves the correlation by 1e-10 or more.
KERNEL_TOLERANCE = 1e-15
KERNEL_CASES = {
    "random": lambda x: x,
    "half zeros": lambda x: x.clamp(min=0),
    "three levels": lambda x: x.round().clamp(-1, 1),
    "two values in one row": lambda x: torch.where(x > 0, 1.0, -1.0),
    "one pixel": lambda x: (x == x.amax((1, 2), keepdim=True)).to(x),
    "tiny": lambda x: x * 1e-40,  # denormal in float32
    "infinities": lambda x: torch.where(x.abs() > 1.5, x.sign() * math.inf, x),
    "both zeros": lambda x: x.clamp(min=0) * x.sign(),
    "close together": lambda x: 1 + x * 2.0**-22,
}


@pytest.mark.skipif(
    backends.why_not("cpu", "cpu") is not None, reason=f"cpu: {backends.why_not('cpu', 'cpu')}"
)
@pytest.mark.parametrize("case", KERNEL_CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(1, 2), (3, 1), (5, 7), (64, 64), (61, 67)])
def test_kernel_equals_pytorch(
    case: str, dtype: torch.dtype, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    a = KERNEL_CASES[case](random_maps(50, 5, *size).to(dtype))
    b = random_maps(51, 5, *size).to(dtype) + a.nan_to_num(0, 3, -3)
    b[1, 0, 0] = math.nan
    b[2] = 0.1
    module, calls = backends.get("cpu"), []
    run = module.spearman
    monkeypatch.setattr(module, "spearman", lambda *pair: calls.append(1) or run(*pair))
    monkeypatch.setenv("HARMONIZER_BACKEND", "cpu")
    kernel = [alignment.spearman(*pair) for pair in ((a, b), (b, a))]
    assert len(calls) == 2
    monkeypatch.setenv("HARMONIZER_BACKEND", "reference")
    pytorch = [alignment.spearman(*pair) for pair in ((a, b), (b, a))]
    assert len(calls) == 2
    torch.testing.assert_close(kernel, pytorch, rtol=0, atol=KERNEL_TOLERANCE, equal_nan=True)
    assert kernel[0][1:3].isnan().all()
    if size[0] > 3 and case != "one pixel":
        assert kernel[0][[0, 3, 4]].isfinite().all()


@pytest.mark.skipif(
    backends.why_not("cpu", "cpu") is not None, reason=f"cpu: {backends.why_not('cpu', 'cpu')}"
)
def test_kernel_of_every_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARMONIZER_BACKEND", "cpu")
    module = backends.get("cpu").native()
    best = module.cpu_instruction_set()
    a, b = random_maps(52, 3, 31, 33), random_maps(53, 3, 31, 33).clamp(min=0)
    expected = alignment.spearman(a, b)
    try:
        for name in ("baseline", "avx2", "avx512"):
            if module.cpu_use_instruction_set(name):
                assert torch.equal(alignment.spearman(a, b), expected), name
                assert torch.equal(alignment.spearman(a.float(), b.float()), expected), name
    finally:
        module.cpu_use_instruction_set(best)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernel_reads_any_strides(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = backends.why_not(backend, "cpu")
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    monkeypatch.setenv("HARMONIZER_BACKEND", backend)
    a, b = random_maps(54, 4, 9, 11).to(dtype), random_maps(55, 1, 9, 11).to(dtype)
    transposed = a.transpose(1, 2).contiguous().transpose(1, 2)
    sliced = torch.full((4, 18, 44), math.nan, dtype=dtype)[:, ::2, 3::4]
    sliced.copy_(a)
    expected = alignment.spearman(a, b.repeat(4, 1, 1))
    for strided in (transposed, sliced):
        assert torch.equal(alignment.spearman(strided, b.expand(4, 9, 11)), expected)
