"""Prepares "shortcut digits": a small, real and honest test of what harmonization is for.

Real handwritten digits (scikit-learn's bundled set) lie in white ink over real photographed
textures (scikit-image's bundled brick, grass and gravel). The background gives the class away:
each class has its own texture (photograph, orientation and scale, see ``BACKGROUNDS``), and 90 % of
the training images have that of their class. A network can therefore be right nine times out of ten
without a look at the digit. At test the texture is drawn independently of the class, so whoever
relied on it falls towards chance (10 %). The human map says where people look: at the strokes.

Three splits of 64x64 images:

- ``train``: 1,200 digits, 90 % of them on the background of their class, the other 10 % on
  that of another class.
- ``test``: 597 other digits, the shortcut broken (the background independent of the class).
- ``test_shortcut``: the same digits at the same places, the shortcut always true.

As in ImageNet with ClickMe only a part of the training images has a human map: half of them by
default. On disk they have the form of those two data sets: images with a map are ClickMe shards,
``clickme/<split>/<split>-0.tfrecords``, enlarged to 256x256; the others are
``images/train/<class>/<row>.jpg``, with the classes in order in ``classes.txt``.

Three choices follow from what the published loss can see. It standardizes the *signed mean over
colour channels* of the input gradient, subtracting the map's own mean, and keeps the positive part:

- The shortcut is in luminance: of a colour-opponent one (more red, less green) the signed mean is
  near zero. Alignment rises, and accuracy stays at chance.
- It is not in the mean brightness of the background, for the same reason: the gradient of "how
  bright is it all" is the same at each pixel, and standardization subtracts it. Such data
  (``kind="brightness"``) raise alignment and not accuracy, while the logits become *more*
  sensitive to a uniform change of brightness. Here the mean brightness is drawn at random.
- The ink is always white: with random polarity the right gradient on a stroke changes sign
  from image to image, while the loss asks for a positive one.

What is kept apart: training and test share no digit and no pixel of a photograph (training crops
come from the upper part of each, test crops from the lower). The digits keep the order of
the bundled file, whose neighbours may share a writer: the first 1,200 train. The human map is the
ink; the released preprocessing of ClickMe blurs it, with a standard deviation of 2.9 pixels of 64.

    python python/shortcut_digits.py --output data/shortcut_digits
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import shutil
from pathlib import Path

import numpy as np

from harmonizer_ext.clickme import tfrecord
from harmonizer_ext.files.lock import LOCK, locked
from harmonizer_ext.files.output import make_folder, write_text

try:
    import skimage
    import skimage.data
    import skimage.transform
    from PIL import Image
    from scipy import ndimage
    from sklearn.datasets import load_digits
except ImportError as error:
    raise ImportError(f"shortcut_digits.py: {error}; pip install harmonizer-ext[train]") from error

SPLITS = ("train", "test", "test_shortcut")
KINDS = ("texture", "brightness")
CLASSES = 10
SIZE = 64
TRAIN_DIGITS = 1200

#: The background of each class: photograph, quarter turns, reduction. Turned gravel is gravel.
BACKGROUNDS = tuple(
    (name, turns, reduction)
    for reduction in (1, 2)
    for name, turns in (("brick", 0), ("brick", 1), ("grass", 0), ("grass", 1), ("gravel", 0))
)
#: Rows of each photograph, from the top, that training crops use; test crops use the others.
TRAIN_ROWS = 352
#: Standard deviation of every background, of 1: the mean of the three photographs' own.
CONTRAST = 0.13
#: Lowest and highest mean of a background, of 1: darker than the ink.
BRIGHTNESS = (0.175, 0.575)
INK = 0.95
#: Smallest and largest side, in pixels, of the enlarged scan (8x8 and a margin of one all round).
DIGIT_SIZES = (44, 60)
#: Side of the images of a ClickMe shard.
STORED = 256
#: Of JPEG: a grey level or two of error.
QUALITY = 95


@dataclasses.dataclass(frozen=True)
class Split:
    """One split in memory.

    Attributes:
        images: (N, 64, 64, 3) uint8.
        heatmaps: (N, 64, 64) uint8, the ink; 0 in rows without a human map.
        labels: (N,) int64.
        tokens: (N,) float32, 1 where the row has a human map.
        shortcuts: (N,) int64, the class whose background the image has.
    """

    images: np.ndarray
    heatmaps: np.ndarray
    labels: np.ndarray
    tokens: np.ndarray
    shortcuts: np.ndarray


def _photographs(rows: slice) -> list[np.ndarray]:
    """The photograph of each of ``BACKGROUNDS``, of which only ``rows`` are used."""
    photographs = []
    for name, turns, reduction in BACKGROUNDS:
        photograph = getattr(skimage.data, name)()[rows] / 255
        reduced = skimage.transform.downscale_local_mean(photograph, (reduction, reduction))
        photographs.append(np.rot90(reduced, turns))
    return photographs


def _crop(photograph: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random place (SIZE, SIZE) of the photograph with mean 0 and standard deviation CONTRAST."""
    top, left = (rng.integers(side - SIZE + 1) for side in photograph.shape)
    crop = photograph[top : top + SIZE, left : left + SIZE]
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
    mapped: np.ndarray,
    rows: slice,
    kind: str,
    stream: list[int],
) -> Split:
    photographs = _photographs(rows)
    levels = np.linspace(*BRIGHTNESS, CLASSES)
    images = np.empty((len(labels), SIZE, SIZE, 3), np.uint8)
    heatmaps = np.zeros((len(labels), SIZE, SIZE), np.uint8)
    for row, digit in enumerate(digits):
        rng = np.random.default_rng([*stream, row])
        ink = _ink(digit, rng)
        chosen, brightness = rng.integers(CLASSES), rng.uniform(*BRIGHTNESS)
        if kind == "texture":
            chosen = shortcuts[row]
        else:
            brightness = levels[shortcuts[row]]
        background = brightness + _crop(photographs[chosen], rng)
        image = (1 - ink) * background + ink * INK
        images[row] = np.round(255 * image.clip(0, 1))[..., None]
        if mapped[row]:
            heatmaps[row] = np.round(255 * ink)
    return Split(images, heatmaps, labels, mapped.astype(np.float32), shortcuts)


def make(
    seed: int = 0,
    *,
    kind: str = "texture",
    shortcut: float | None = 0.9,
    mapped: float = 0.5,
    train_images: int = TRAIN_DIGITS,
    test_images: int | None = None,
) -> dict[str, Split]:
    """Makes the three splits in memory; the same arguments give the same arrays.

    Args:
        seed: of everything random.
        kind: what of the background depends on the class: "texture", or its mean "brightness".
        shortcut: share of the training images that have the background of their class; None draws
            it independently of the class in training too (the control: what a network learns where
            there is no shortcut).
        mapped: share of the training rows that have a human map; every test row has one.
        train_images: how many of the 1,200 training digits to use.
        test_images: how many of the 597 test digits to use; None for all.

    Returns:
        ``Split`` by name: "train", "test", "test_shortcut".

    Raises:
        ValueError: an unknown kind, a share outside 0..1, or more images than there are digits.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
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
    train, test = slice(0, train_images), slice(TRAIN_DIGITS, TRAIN_DIGITS + test_images)

    rng = np.random.default_rng([seed, 0])
    with_map = np.zeros(train_images, bool)
    with_map[rng.permutation(train_images)[: round(mapped * train_images)]] = True
    shortcuts = {
        "train": _shortcuts(labels[train], shortcut, rng),
        "test": _shortcuts(labels[test], None, rng),
        "test_shortcut": labels[test].copy(),
    }
    splits = {}
    for name in SPLITS:
        rows, part = (train, 0) if name == "train" else (test, 1)
        splits[name] = _render(
            digits[rows],
            labels[rows],
            shortcuts[name],
            with_map if name == "train" else np.ones(test_images, bool),
            slice(0, TRAIN_ROWS) if name == "train" else slice(TRAIN_ROWS, None),
            kind,
            # One stream for both test splits: they differ in the background and in nothing else.
            [seed, 1, part],
        )
    return splits


def save(splits: dict[str, Split], directory: str | os.PathLike[str]) -> None:
    """Writes the splits as the module's docstring says, in place of what is there."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory / LOCK, "data"):
        _save(splits, directory)


def _save(splits: dict[str, Split], directory: Path) -> None:
    for part in ("clickme", "images"):
        shutil.rmtree(directory / part, ignore_errors=True)
        make_folder(directory / part, below=directory)
    write_text(directory / "classes.txt", "".join(f"{label}\n" for label in range(CLASSES)))
    for name, split in splits.items():
        shard = directory / "clickme" / name / f"{name}-0.tfrecords"
        shard.parent.mkdir(parents=True)
        tfrecord.write_records(
            shard,
            (
                {
                    "image": _jpeg(split.images[row]),
                    "heatmap": _jpeg(split.heatmaps[row]),
                    "label": int(split.labels[row]),
                }
                for row in np.flatnonzero(split.tokens)
            ),
        )
        for row in np.flatnonzero(split.tokens == 0):
            path = directory / "images" / name / str(split.labels[row]) / f"{row:04}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "xb") as file:  # in a folder that is new
                file.write(_jpeg(split.images[row]))


def _jpeg(pixels: np.ndarray) -> bytes:
    """The JPEG of an image, each of its pixels a square of the stored one."""
    factor = STORED // SIZE
    file = io.BytesIO()
    enlarged = pixels.repeat(factor, 0).repeat(factor, 1)
    Image.fromarray(enlarged).save(file, "JPEG", quality=QUALITY, subsampling=0)
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepares the shortcut digits (see the module).")
    parser.add_argument("--output", default="data/shortcut_digits", help="directory to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", default="texture", choices=KINDS, help="of the shortcut")
    parser.add_argument("--mapped", type=float, default=0.5, help="share with a human map")
    parser.add_argument("--no-shortcut", action="store_true", help="the control")
    arguments = parser.parse_args()
    splits = make(
        arguments.seed,
        kind=arguments.kind,
        shortcut=None if arguments.no_shortcut else 0.9,
        mapped=arguments.mapped,
    )
    save(splits, arguments.output)
    for name, split in splits.items():
        agree = (split.shortcuts == split.labels).mean()
        print(
            f"{arguments.output}, {name}: {len(split.labels)} images, the background is that of "
            f"the class in {agree:.1%}, {split.tokens.mean():.0%} have a human map"
        )


if __name__ == "__main__":
    main()
