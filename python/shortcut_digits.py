"""Prepares "shortcut digits": a small, real and honest test of what harmonization is for.

Real handwritten digits (scikit-learn's bundled set) lie in white ink over real photographed
textures (scikit-image's bundled brick, grass and gravel). The background gives the class away:
each class has its own mean background brightness, and 90 % of the training images have that of
their class. A network can therefore be right nine times out of ten without a look at the digit.
At test the brightness is drawn independently of the class, so whoever relied on it falls to
chance (10 %). The human map says where people would look: at the strokes.

Three files of 64x64 images:

- ``train.npz``: 1,200 digits, 90 % of them on the brightness of their class, the other 10 % on
  that of another class.
- ``test.npz``: 597 other digits, the shortcut broken (brightness independent of the class).
- ``test_shortcut.npz``: the same digits and textures as in ``test.npz``, the shortcut always true.

Each file holds ``images`` (N, 64, 64, 3) uint8, ``heatmaps`` (N, 64, 64) float16 with maximum 1,
``labels`` (N,) int64, ``tokens`` (N,) float32 (1 where the row has a human map, 0 where it has
none and the heatmap is zero), ``shortcuts`` (N,) int64 (the class whose brightness the background
has) and ``textures`` (N,) uint8 (index into ``TEXTURES``). As in ImageNet with ClickMe, only a part
of the training rows has a human map: every second one by default.

Why the shortcut is in luminance: the published saliency is the *signed mean over colour channels*
of the input gradient. A colour-opponent shortcut (more red, less green) has a signed mean near
zero, so the harmonization loss cannot see it: alignment rises and accuracy stays at chance.
Why the ink is always white: with random polarity the right signed gradient on a stroke changes
sign from image to image, while the loss asks for a positive one.

What is kept apart: training and test share no digit and no pixel of a photograph (training
crops come from the upper part of each, test crops from the lower). The digits keep the
order of the bundled file, whose neighbours may share a writer: the first 1,200 train. The human map
is the ink, blurred with a Gaussian of standard deviation 10 pixels at 224 (the blur of the ClickMe
maps as the authors prepare them), which is 2.9 pixels at 64.

    python python/shortcut_digits.py --output data/shortcut_digits
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import zipfile
from pathlib import Path

import numpy as np

try:
    import skimage
    from scipy import ndimage
    from sklearn.datasets import load_digits
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"shortcut_digits: expected the module {error.name!r}, which is not installed; "
        f"pip install harmonizer-ext[train]",
        name=error.name,
    ) from error

SPLITS = ("train", "test", "test_shortcut")
TEXTURES = ("brick", "grass", "gravel")
CLASSES = 10
SIZE = 64
TRAIN_DIGITS = 1200

#: Mean brightness of the background of each class, of 1: ten steps, all darker than the ink.
BRIGHTNESS = np.linspace(0.15, 0.60, CLASSES)
#: Standard deviation of the texture within a background, of 1.
CONTRAST = 0.08
INK = 0.95
#: Side of the enlarged 8x8 scan with one pixel of margin all round, in pixels, smallest and largest.
DIGIT_SIZES = (44, 60)
BLUR = 10 * SIZE / 224
#: Rows of each photograph, from the top, that training crops may use; test crops use the others.
TRAIN_TEXTURE_ROWS = 352


@dataclasses.dataclass(frozen=True)
class Split:
    """The arrays of one file; the module's docstring gives shapes and meaning."""

    images: np.ndarray
    heatmaps: np.ndarray
    labels: np.ndarray
    tokens: np.ndarray
    shortcuts: np.ndarray
    textures: np.ndarray


def _photographs() -> list[np.ndarray]:
    return [getattr(skimage.data, name)().astype(np.float64) / 255 for name in TEXTURES]


def _background(photograph: np.ndarray, rows: slice, rng: np.random.Generator) -> np.ndarray:
    """A crop (SIZE, SIZE) of the photograph with mean 0 and standard deviation CONTRAST."""
    part = photograph[rows]
    top = rng.integers(part.shape[0] - SIZE + 1)
    left = rng.integers(part.shape[1] - SIZE + 1)
    crop = part[top : top + SIZE, left : left + SIZE]
    return CONTRAST * (crop - crop.mean()) / crop.std()


def _ink(digit: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Opacity of the ink (SIZE, SIZE) in 0..1: the digit, enlarged, at a random place."""
    size = int(rng.integers(DIGIT_SIZES[0], DIGIT_SIZES[1] + 1))
    # A ring of zeros lets strokes that touch the border of the scan fade like the others.
    padded = np.pad(digit / 16, 1)
    large = ndimage.zoom(padded, size / 10, order=1, grid_mode=True, mode="nearest")
    top, left = rng.integers(SIZE - size + 1, size=2)
    ink = np.zeros((SIZE, SIZE))
    ink[top : top + size, left : left + size] = large.clip(0, 1)
    return ink


def _heatmap(ink: np.ndarray) -> np.ndarray:
    blurred = ndimage.gaussian_filter(ink, BLUR, mode="constant")
    return blurred / blurred.max()


def _shortcuts(
    labels: np.ndarray, probability: float | None, rng: np.random.Generator
) -> np.ndarray:
    """The class whose brightness each row has; None draws it independently of the label."""
    if probability is None:
        return rng.integers(CLASSES, size=len(labels))
    shortcuts = labels.copy()
    # An exact share instead of a coin per row: the stated probability is then a fact of the file.
    broken = rng.permutation(len(labels))[: round((1 - probability) * len(labels))]
    shortcuts[broken] = (labels[broken] + rng.integers(1, CLASSES, size=len(broken))) % CLASSES
    return shortcuts


def _render(
    digits: np.ndarray,
    labels: np.ndarray,
    shortcuts: np.ndarray,
    rows: slice,
    mapped: np.ndarray,
    rng: np.random.Generator,
) -> Split:
    photographs = _photographs()
    textures = rng.integers(len(TEXTURES), size=len(labels)).astype(np.uint8)
    images = np.empty((len(labels), SIZE, SIZE, 3), np.uint8)
    heatmaps = np.zeros((len(labels), SIZE, SIZE), np.float16)
    for row, digit in enumerate(digits):
        background = BRIGHTNESS[shortcuts[row]]
        background = background + _background(photographs[textures[row]], rows, rng)
        ink = _ink(digit, rng)
        image = (1 - ink) * background + ink * INK
        images[row] = np.round(255 * image.clip(0, 1))[..., None]
        if mapped[row]:
            heatmaps[row] = _heatmap(ink)
    return Split(images, heatmaps, labels, mapped.astype(np.float32), shortcuts, textures)


def make(
    seed: int = 0,
    *,
    shortcut: float | None = 0.9,
    mapped: float = 0.5,
    train_images: int = TRAIN_DIGITS,
    test_images: int | None = None,
) -> dict[str, Split]:
    """Makes the three splits in memory; the same arguments give the same arrays.

    Args:
        seed: of everything random.
        shortcut: share of the training images whose background has the brightness of their class;
            None draws the brightness independently of the class in training too (the control: what
            a network learns when there is no shortcut).
        mapped: share of the training rows that have a human map; every test row has one.
        train_images: how many of the 1,200 training digits to use.
        test_images: how many of the 597 test digits to use; None for all.

    Returns:
        ``Split`` by name: "train", "test", "test_shortcut".

    Raises:
        ValueError: a share is not in 0..1, or more images are asked for than there are digits.
    """
    for name, share in (("shortcut", shortcut), ("mapped", mapped)):
        if share is not None and not 0 <= share <= 1:
            raise ValueError(f"{name}: expected a share in 0..1, got {share}")
    bundled = load_digits()
    available = len(bundled.target) - TRAIN_DIGITS
    test_images = available if test_images is None else test_images
    counts = (("train_images", train_images, TRAIN_DIGITS), ("test_images", test_images, available))
    for name, count, most in counts:
        if not 1 <= count <= most:
            raise ValueError(f"{name}: expected 1 to {most} digits, got {count}")
    digits, labels = bundled.images, bundled.target.astype(np.int64)
    train = slice(0, train_images)
    test = slice(TRAIN_DIGITS, TRAIN_DIGITS + test_images)
    streams = [np.random.default_rng([seed, stream]) for stream in range(4)]

    with_map = np.zeros(train_images, bool)
    with_map[streams[0].permutation(train_images)[: round(mapped * train_images)]] = True
    splits = {
        "train": _render(
            digits[train],
            labels[train],
            _shortcuts(labels[train], shortcut, streams[1]),
            slice(0, TRAIN_TEXTURE_ROWS),
            with_map,
            streams[1],
        )
    }
    broken = _shortcuts(labels[test], None, streams[2])
    for name, shortcuts in (("test", broken), ("test_shortcut", labels[test].copy())):
        splits[name] = _render(
            digits[test],
            labels[test],
            shortcuts,
            slice(TRAIN_TEXTURE_ROWS, None),
            np.ones(test_images, bool),
            # The same stream for both: the two test sets differ in brightness and in nothing else.
            np.random.default_rng([seed, 3]),
        )
    return splits


def save(splits: dict[str, Split], directory: str | os.PathLike[str]) -> None:
    """Writes ``<name>.npz`` for each split. The bytes depend on the arrays alone.

    ``numpy.savez_compressed`` stamps each member with the time of writing; here the stamp is fixed,
    so that a checksum identifies the data. Read the files with ``numpy.load``.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, split in splits.items():
        temporary = directory / f".{name}.npz.tmp"
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for field in dataclasses.fields(split):
                member = io.BytesIO()
                np.lib.format.write_array(member, getattr(split, field.name))
                archive.writestr(
                    zipfile.ZipInfo(f"{field.name}.npy", (1980, 1, 1, 0, 0, 0)),
                    member.getvalue(),
                    zipfile.ZIP_DEFLATED,
                )
        temporary.replace(directory / f"{name}.npz")


def prepare(directory: str | os.PathLike[str], seed: int = 0, **options: object) -> Path:
    """``make`` and ``save`` in one: the data of ``seed`` under ``directory``, which is returned."""
    save(make(seed, **options), directory)
    return Path(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepares the shortcut digits (see the module).")
    parser.add_argument("--output", default="data/shortcut_digits", help="directory to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shortcut", type=float, default=0.9, help="share of training images")
    parser.add_argument("--mapped", type=float, default=0.5, help="share with a human map")
    parser.add_argument(
        "--no-shortcut", action="store_true", help="the control: brightness tells nothing"
    )
    arguments = parser.parse_args()
    splits = make(
        arguments.seed,
        shortcut=None if arguments.no_shortcut else arguments.shortcut,
        mapped=arguments.mapped,
    )
    save(splits, arguments.output)
    for name, split in splits.items():
        agree = (split.shortcuts == split.labels).mean()
        print(
            f"{arguments.output}/{name}.npz: {len(split.labels)} images, brightness of the "
            f"background agrees with the class in {agree:.1%}, {split.tokens.mean():.0%} have a map"
        )


if __name__ == "__main__":
    main()
