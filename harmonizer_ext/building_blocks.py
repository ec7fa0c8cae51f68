"""The steps of the loss as differentiable functions of their own, for losses built from them."""

from __future__ import annotations

from torch import Tensor

from harmonizer_ext import backends, contract
from harmonizer_ext.backends import reference
from harmonizer_ext.ops import (
    PositivePartMseFunction,
    PyramidFunction,
    StandardizeCutFunction,
)


def gaussian_pyramid(x: Tensor, levels: int, *, backend: str | None = None) -> list[Tensor]:
    """Gaussian pyramid: 5-tap binomial [1 4 6 4 1]/16 per axis, stride 2, zero padding.

    Source: ``training/pyramid.py`` of the authors' package (TensorFlow's SAME padding: for an even
    length one zero before and two after, for an odd one two and two). MATH.md (4). Linear, so that
    derivatives of every order exist on every backend.

    Args:
        x: maps (H, W), (B, H, W) or (B, C, H, W); every map is treated alone; any strides.
        levels: how many levels to return, 1 to 16.
        backend: see ``harmonization_loss``.

    Returns:
        ``levels`` tensors in x's dtype; the first is ``x`` itself, each next one has
        ceil(H / 2) x ceil(W / 2) of the one before.

    Raises:
        TypeError, ValueError: wrong type, shape, dtype or number of levels.
        RuntimeError: the named backend cannot run here.
    """
    contract.check_maps("x", x)
    contract.check_levels(levels)
    chosen = backends.select(backend, x.device, contract.accumulation_dtype(x))
    if levels == 1:
        return [x]
    maps = x[(None,) * (4 - x.ndim)]
    if chosen == "reference":
        coarse = reference.pyramid(maps, levels)
    else:
        coarse = list(PyramidFunction.apply(maps, levels, chosen))
    return [x] + [level.reshape(*x.shape[:-2], *level.shape[-2:]) for level in coarse]


def standardize_cut(x: Tensor, *, backend: str | None = None) -> Tensor:
    """Positive part of each map's standardization, max((x - mean) / (std + 1e-5), 0).

    Source: ``standardize_cut`` in ``training/loss.py`` of the authors' package; population standard
    deviation. A constant map gives zeros and a zero gradient. MATH.md (3).

    Args:
        x: maps (H, W), (B, H, W) or (B, C, H, W); every map is treated alone.
        backend: see ``harmonization_loss``.

    Returns:
        A tensor of x's shape and dtype.

    Raises:
        TypeError, ValueError: wrong type, shape or dtype.
        RuntimeError: the named backend cannot run here; or a second derivative is taken through a
            fused backend.
    """
    contract.check_maps("x", x)
    chosen = backends.select(backend, x.device, contract.accumulation_dtype(x))
    if chosen == "reference":
        return reference.standardize_cut(x)
    maps = x[(None,) * (4 - x.ndim)]
    out: Tensor = StandardizeCutFunction.apply(maps, chosen)
    return out.reshape(x.shape)


def positive_part_mse(a: Tensor, b: Tensor, *, backend: str | None = None) -> Tensor:
    """Mean squared difference of the positive parts of two batches of maps, one value per map.

    ``mean over pixels of (max(a, 0) - max(b, 0))^2``; MATH.md (6). Gradients flow into both.

    Args:
        a, b: (B, H, W), same shape and device, any float dtypes.
        backend: see ``harmonization_loss``.

    Returns:
        (B,) in float32, or float64 where an input is float64.

    Raises:
        TypeError, ValueError: wrong type, dtype, or shapes that differ.
        RuntimeError: the named backend cannot run here; or a second derivative is taken through a
            fused backend.
    """
    contract.check_maps("a", a, (3,))
    contract.check_maps("b", b, (3,))
    if a.shape != b.shape:
        raise ValueError(
            f"b: expected the shape of a, {tuple(a.shape)}, got {tuple(b.shape)}; "
            f"resize it with torch.nn.functional.interpolate"
        )
    contract.check_same_device("b", b, "a", a)
    chosen = backends.select(backend, a.device, contract.accumulation_dtype(a, b))
    if chosen == "reference":
        return reference.positive_part_mse(a, b)
    out: Tensor = PositivePartMseFunction.apply(a, b, chosen)
    return out
