"""The demo's data: the shortcut is there where it is said to be, and so are the human maps."""

from __future__ import annotations

import hashlib
from pathlib import Path

import extras
import numpy as np
import pytest

if (reason := extras.why_no_train()) is not None:
    pytest.skip(reason, allow_module_level=True)

import shortcut_digits

import harmonizer_ext as hx

FIELDS = ("images", "heatmaps", "labels", "tokens", "shortcuts")


@pytest.fixture(scope="module")
def full() -> dict[str, shortcut_digits.Split]:
    return shortcut_digits.make(seed=0)


def test_same_seed_gives_the_same_bytes(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        splits = shortcut_digits.make(seed, train_images=20, test_images=10)
        shortcut_digits.save(splits, tmp_path / name)
        shortcut_digits.save(splits, tmp_path / name)  # over what is there

    def contents(name: str) -> dict[str, str]:
        root = tmp_path / name
        files = (path for path in root.rglob("*") if path.is_file())
        return {
            str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
        }

    assert contents("a") == contents("b")
    assert contents("a") != contents("c")


def test_files_hold_the_arrays(full, tmp_path):
    """The arrays are there when read back as ClickMe, and as a folder of images."""
    few = {
        name: shortcut_digits.Split(*(getattr(split, f)[:40] for f in FIELDS))
        for name, split in full.items()
    }
    shortcut_digits.save(few, tmp_path)
    split = few["train"]
    mapped = np.flatnonzero(split.tokens)
    data = hx.clickme.ClickMe(tmp_path / "clickme/train", preprocess=None, decoder="pillow")
    assert len(data) == len(mapped)
    for sample, row in zip(data, mapped, strict=True):
        assert sample.label == split.labels[row]
        for stored, made in (
            (sample.image, split.images[row]),
            (sample.heatmap[0], split.heatmaps[row]),
        ):
            small = stored.reshape(*stored.shape[:-2], 64, 4, 64, 4).double().mean((-3, -1)).numpy()
            # JPEG of quality 95 quantizes the mean of 4x4 pixels by a grey level or two.
            expected = made.transpose(2, 0, 1) if made.ndim == 3 else made
            assert np.abs(small - expected).max() < 6
            assert np.abs(small - expected).mean() < 0.6
    others = sorted(path.relative_to(tmp_path / "images/train") for path in tmp_path.rglob("*.jpg"))
    assert others == sorted(
        Path(str(split.labels[row]), f"{row:04}.jpg") for row in np.flatnonzero(split.tokens == 0)
    )
    assert (tmp_path / "classes.txt").read_text().split() == list("0123456789")


def test_shortcut_predicts_the_class_in_training_and_not_at_test(full):
    share = {name: (split.shortcuts == split.labels).mean() for name, split in full.items()}
    assert share["train"] == 0.9
    assert share["test_shortcut"] == 1.0
    # Independent of the class: 597 draws at 0.1 have a standard deviation of 0.0123; four of them.
    assert abs(share["test"] - 0.1) < 4 * np.sqrt(0.1 * 0.9 / 597)
    assert {name: len(split.labels) for name, split in full.items()} == {
        "train": 1200,
        "test": 597,
        "test_shortcut": 597,
    }


def test_half_of_the_training_rows_and_all_test_rows_have_a_human_map(full):
    assert full["train"].tokens.mean() == 0.5
    assert full["test"].tokens.all()
    for split in full.values():
        tops = split.heatmaps.max((1, 2))
        np.testing.assert_array_equal(tops > 0, split.tokens)  # there is ink, or the map is empty


def test_test_splits_differ_in_the_background_alone(full):
    broken, held = full["test"], full["test_shortcut"]
    np.testing.assert_array_equal(broken.heatmaps, held.heatmaps)
    same = broken.shortcuts == broken.labels
    identical = (broken.images == held.images).all((1, 2, 3))
    np.testing.assert_array_equal(identical, same)


def test_human_map_lies_on_the_ink(full):
    split = full["test"]
    pixels, heatmaps = split.images[..., 0] / 255, split.heatmaps / 255
    on = (pixels * (heatmaps > 0.5)).sum((1, 2)) / (heatmaps > 0.5).sum((1, 2))
    off = (pixels * (heatmaps == 0)).sum((1, 2)) / (heatmaps == 0).sum((1, 2))
    # White ink over a background of mean 0.575 at most: brighter wherever people look.
    assert (on > off).all()


@pytest.mark.parametrize("kind", shortcut_digits.KINDS)
def test_mean_brightness_tells_the_class_only_where_it_is_the_shortcut(kind):
    split = shortcut_digits.make(kind=kind, train_images=300, test_images=300)["test"]
    away = split.heatmaps == 0
    brightness = (split.images[..., 0] * away).sum((1, 2)) / away.sum((1, 2)) / 255
    correlation = np.corrcoef(brightness, split.shortcuts)[0, 1]
    # Independent variables correlate by 1/sqrt(300) = 0.058 by chance; the crop's own variation
    # (0.13 over a few grains of texture) leaves more than 0.8 where brightness is the shortcut.
    assert correlation > 0.8 if kind == "brightness" else abs(correlation) < 4 * 0.058


def test_data_errors_name_the_argument():
    with pytest.raises(ValueError, match="kind: expected one of texture, brightness, got 'smell'"):
        shortcut_digits.make(kind="smell")
    with pytest.raises(ValueError, match="train_images: expected 1 to 1200 digits, got 5000"):
        shortcut_digits.make(train_images=5000)
    with pytest.raises(ValueError, match=r"mapped: expected a share in 0..1, got 2"):
        shortcut_digits.make(mapped=2)
