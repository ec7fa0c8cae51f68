"""Images and maps as small pictures within the page."""

from __future__ import annotations

import base64
import io

import matplotlib
import numpy as np
from PIL import Image
from torch import Tensor

#: Side of the pictures in pixels: one and a half of what the page shows, for fine screens.
SIDE = 144
#: Maps are shown up to this percentile of their own absolute values.
PERCENTILE = 99


def picture(image: Tensor) -> str:
    """An image (3, H, W) in 0..255, as a data URL."""
    return _url(image.permute(1, 2, 0).round().clamp(0, 255).byte().numpy())


def heat(values: Tensor) -> str:
    """A map (H, W), as a data URL: from 0 (dark) on; around 0 (white) where it is signed."""
    array = values.double().numpy()
    limit = np.percentile(np.abs(array), PERCENTILE) or np.abs(array).max() or 1.0
    if array.min() < 0:
        colors = matplotlib.colormaps["PuOr_r"](0.5 + 0.5 * (array / limit).clip(-1, 1))
    else:
        colors = matplotlib.colormaps["inferno"]((array / limit).clip(0, 1))
    return _url(np.uint8(255 * colors[..., :3]))


def _url(pixels: np.ndarray) -> str:
    height, width = pixels.shape[:2]
    # Few pixels stay squares, many are averaged.
    how = Image.Resampling.NEAREST if max(height, width) < SIDE else Image.Resampling.BOX
    small = Image.fromarray(pixels).resize((SIDE, SIDE), how)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
