"""Writes ``tests/golden/released.npz``: what the authors' released code computes.

    python tests/make_golden.py

Needs what ``released.why_not()`` asks for. With the file in place, the loss and the whole training
step are tested against the released code on machines without TensorFlow. All results are float64;
inputs are stored in float32 where they are large, and are exact as stored.

Keys (``<case>`` from ``cases``, ``<twin>`` from ``twins``):

* ``loss/<case>/{saliency (B,C,H,W), heatmaps (B,H,W), tokens (B,), levels ()}`` and the results
  ``loss () , rows (B,), gradient (B,H,W)``. The gradient is equal in every channel (checked here),
  so one is stored. ``rows`` are the row losses times B: their mean is ``loss``.
* ``step/<twin>/{images (B,3,H,W), labels (B,7), heatmaps (B,H,W), tokens (B,), lambda_weights (),
  lambda_harmonization ()}``, ``step/<twin>/weights/<parameter>`` with the torch names and layouts
  of ``twins.TwinNetwork``, and the results ``loss, cross_entropy, harmonization,
  weight_penalty ()``, ``saliency (B,3,H,W)``, ``gradients/<parameter>``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import released
from twins import TwinNetwork

PATH = Path(__file__).parent / "golden" / "released.npz"

# name: (rows, channels, height, width, levels, saliency scale of each row, token of each row).
# Even sizes pad asymmetrically, 31x33 goes through odd and even levels, 5x7 shrinks to one pixel.
# The scales span real input gradients (1e-7 to 1e-3, where the 1e-5 of the standardization
# counts) and unscaled ones.
LOSS_CASES: dict[str, tuple[int, int, int, int, int, list[float], list[float]]] = {
    "odd_31x33": (4, 2, 31, 33, 5, [1e-7, 1e-3, 1.0, 1e4], [1.0, 1.0, 1.0, 1.0]),
    "even_64x64": (2, 1, 64, 64, 5, [1e-5, 10.0], [1.0, 0.5]),
    "mixed_48x37": (3, 1, 48, 37, 5, [1e-6, 1e-2, 1e2], [0.0, 0.25, 1.0]),
    "levels3_30x18": (2, 3, 30, 18, 3, [1e-4, 1.0], [1.0, 2.0]),
    "levels6_33x32": (2, 1, 33, 32, 6, [1e-5, 1e-1], [1.0, 1.0]),
    "level1_17x16": (2, 1, 17, 16, 1, [1e-3, 1.0], [1.0, 1.0]),
    "tiny_5x7": (2, 3, 5, 7, 5, [1e-3, 1.0], [1.0, 1.0]),
    "no_token_12x12": (2, 1, 12, 12, 5, [1e-3, 1.0], [0.0, 0.0]),
}


def heatmaps_like_clickme(
    rng: np.random.Generator, rows: int, height: int, width: int
) -> np.ndarray:
    """Non-negative blobs with an exact zero background, as blurred clicks have. float32."""
    y = np.arange(height)[:, None] / height
    x = np.arange(width)[None, :] / width
    maps = np.zeros((rows, height, width))
    for row in maps:
        for _ in range(4):
            centre_y, centre_x, size, weight = rng.uniform(
                [0.1, 0.1, 0.05, 0.2], [0.9, 0.9, 0.2, 1]
            )
            row += weight * np.exp(-((y - centre_y) ** 2 + (x - centre_x) ** 2) / (2 * size**2))
    return np.where(maps > 0.05, maps, 0.0).astype(np.float32)


def loss_case(name: str, seed: int) -> dict[str, np.ndarray]:
    """Inputs and released results of one case of the alignment term."""
    rows, channels, height, width, levels, scales, tokens = LOSS_CASES[name]
    rng = np.random.default_rng(seed)
    heatmaps = heatmaps_like_clickme(rng, rows, height, width)
    noise = rng.standard_normal((rows, channels, height, width))
    saliency = (noise + heatmaps[:, None]) * np.array(scales)[:, None, None, None]
    saliency = saliency.astype(np.float32)
    weights = np.array(tokens)
    loss, gradient = released.released_loss_and_gradient(saliency, heatmaps, weights, levels)
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()
    assert (gradient == gradient[:, :1]).all(), "the gradient differs between channels"
    row_losses = [
        rows
        * released.released_loss_and_gradient(
            saliency, heatmaps, np.where(np.arange(rows) == row, weights, 0.0), levels
        )[0]
        for row in range(rows)
    ]
    np.testing.assert_allclose(np.mean(row_losses), loss, rtol=1e-13)
    return {
        "saliency": saliency,
        "heatmaps": heatmaps,
        "tokens": weights,
        "levels": np.array(levels),
        "loss": np.array(loss),
        "rows": np.array(row_losses),
        "gradient": gradient[:, 0],
    }


def step_case(batch_norm: bool, seed: int) -> dict[str, np.ndarray]:
    """Inputs, weights and released results of one whole ``harmonizer_loss``."""
    pair = released.keras_and_torch_twins(seed, batch_norm)
    rng = np.random.default_rng(seed)
    rows, height, width = 5, 18, 15
    images = rng.standard_normal((rows, 3, height, width)).astype(np.float32)
    heatmaps = heatmaps_like_clickme(rng, rows, height, width)
    tokens = np.array([1.0, 0.0, 1.0, 1.0, 0.0])
    labels = np.eye(TwinNetwork.CLASSES)[[0, 3, 2, 6, 1]]
    labels[1] = 0.75 * labels[1] + 0.25 * labels[0]  # a mixed-up row without, and
    labels[2] = 0.625 * labels[2] + 0.375 * labels[4]  # one with a human map
    # A penalty large enough to be seen in every gradient, and a factor that is not one.
    lambda_weights, lambda_harmonization = 1e-2, 2.0
    case: dict[str, np.ndarray] = {
        "images": images,
        "labels": labels,
        "heatmaps": heatmaps,
        "tokens": tokens,
        "lambda_weights": np.array(lambda_weights),
        "lambda_harmonization": np.array(lambda_harmonization),
    }
    for name, parameter in pair.torch.named_parameters():
        case[f"weights/{name}"] = parameter.detach().numpy().copy()
    step = released.released_harmonizer_loss(
        pair.keras,
        images,
        labels,
        heatmaps,
        tokens,
        lambda_weights=lambda_weights,
        lambda_harmonization=lambda_harmonization,
    )
    for name in ("loss", "cross_entropy", "harmonization", "weight_penalty", "saliency"):
        case[name] = np.array(getattr(step, name))
    for name, gradient in pair.to_torch(step.gradients).items():
        case[f"gradients/{name}"] = gradient
    return case


def main() -> None:
    """Runs every case and writes the file."""
    reason = released.why_not()
    if reason is not None:
        raise SystemExit(f"the released code cannot be loaded: {reason}")
    arrays: dict[str, np.ndarray] = {}
    for seed, name in enumerate(LOSS_CASES):
        case = loss_case(name, seed)
        arrays |= {f"loss/{name}/{key}": value for key, value in case.items()}
        print(f"loss/{name}: {case['loss']:.12g}", flush=True)
    for name, batch_norm in (("smooth", False), ("batch_norm", True)):
        case = step_case(batch_norm, seed=7)
        arrays |= {f"step/{name}/{key}": value for key, value in case.items()}
        print(f"step/{name}: {case['loss']:.12g}", flush=True)
    arrays["cases"] = np.array(list(LOSS_CASES))
    arrays["twins"] = np.array(["smooth", "batch_norm"])
    arrays["version"] = np.array(f"Harmonization {released.VERSION}")
    PATH.parent.mkdir(exist_ok=True)
    np.savez_compressed(PATH, **arrays)  # type: ignore[arg-type]
    print(f"{PATH.name}: {len(arrays)} arrays, {PATH.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
