"""ClickMe with one file per image: NumPy archives and PyTorch dictionaries."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harmonizer_ext.files.arrays import numpy, read_npz
from harmonizer_ext.files.reading import MAX_BYTES, UnreadableError, read_file, reading
from harmonizer_ext.files.text import shown
from harmonizer_ext.files.weights import read_sample_tensors

from .dataset import OnError, SampleDataset
from .kinds import Paths, find_files
from .released import Preprocess
from .sample import ClickMeSample, check_label

__all__ = ["ClickMeFiles"]

_KEYS = ("image", "heatmap", "label")


class ClickMeFiles(SampleDataset):
    """ClickMe from files of one sample each, with the keys ``image``, ``heatmap`` and ``label``.

    Two kinds are in use:

    - ``.npz`` (the archives that ``niniack/continualUtils`` reads): image (H, W, 3), heatmap
      (H, W), 0 to 255, label a number.
    - ``.pth``, a dictionary of tensors (``serre-lab/Pseudo_ClickMe``): image (3, H, W) and heatmap
      (1, H, W), uint8, label int32 with one element.

    Either may have either layout. uint8 stays uint8, other types become float32. Images must lie
    in 0 to 255. Nothing in a file is executed: pickled Python objects are refused.

    Args:
        paths: a file, a directory (its ``*.npz`` and ``*.pth`` files), a glob pattern, or a
            sequence of any of these; each directory's or pattern's files in natural order. A
            directory with data of other kinds too is refused.
        preprocess: as in ``ClickMe``. There is no default, because a file does not tell whether
            its heatmap was blurred before: the reader of the ``.npz`` above blurs it, that of the
            ``.pth`` does not.
        transform: called with each ``ClickMeSample``; what it returns is the sample.
        on_error: ``"raise"``, or ``"skip"`` to return the next readable sample in the place of one
            that is unreadable, which is logged and listed in ``skipped``; ``"mark"`` as in
            ``ClickMe``.
        max_bytes: largest size of a file, and of its arrays in memory. Sizes are compared before
            anything is read.

    Raises:
        FileNotFoundError: a path or pattern matches no file.
        ValueError: an argument has an unknown name. Indexing raises it for a file that cannot be
            read or lacks a key, or whose content has another shape; the text names the file.
        ImportError: NumPy is not installed and there are ``.npz`` files.
    """

    def __init__(
        self,
        paths: Paths,
        *,
        preprocess: Preprocess,
        transform: Callable[[ClickMeSample], Any] | None = None,
        on_error: OnError = "raise",
        max_bytes: int = MAX_BYTES,
    ) -> None:
        files = find_files(paths, "files")[1]
        for path in files:
            if path.suffix.lower() not in (".npz", ".pth"):
                raise ValueError(f"paths: {shown(path)} is neither a .npz nor a .pth file")
        if any(path.suffix.lower() == ".npz" for path in files):
            numpy()
        self.max_bytes = max_bytes
        # One string, which workers share; a list of paths would be copied to each of them.
        self._names = b"\0".join(map(os.fsencode, files))
        lengths = torch.tensor([len(os.fsencode(path)) + 1 for path in files], device="cpu")
        self._ends = lengths.cumsum(0)
        super().__init__(len(files), preprocess, transform, on_error)

    def locate(self, index: int) -> tuple[Path, int]:
        """The file of a sample, and 0, where it begins in it."""
        index = self._checked(index)
        start = int(self._ends[index - 1]) if index else 0
        return Path(os.fsdecode(self._names[start : int(self._ends[index]) - 1])), 0

    def _read(self, index: int, into: tuple[Tensor, Tensor] | None) -> ClickMeSample:
        path, _ = self.locate(index)
        data = read_file(path, self.max_bytes)
        content: dict[Any, Any]
        if path.suffix.lower() == ".npz":
            arrays = read_npz(data, path, _KEYS, self.max_bytes)
            with reading(path):
                content = {key: torch.from_numpy(array) for key, array in arrays.items()}
        else:
            content = read_sample_tensors(data, path, self.max_bytes)
        missing = [key for key in _KEYS if not isinstance(content.get(key), Tensor)]
        if missing:
            raise UnreadableError(
                f"{shown(path)}: no array {missing}, only {sorted(map(str, content))}"
            )
        with reading(path):
            return _sample(*(content[key] for key in _KEYS))

    def __repr__(self) -> str:
        return f"ClickMeFiles({len(self)} files, preprocess={self.preprocess!r})"


def _sample(image: Tensor, heatmap: Tensor, label: Tensor) -> ClickMeSample:
    image, heatmap = (_channels_first(*item) for item in (("image", image), ("heatmap", heatmap)))
    if image.shape[0] != 3 or heatmap.shape[0] != 1 or image.shape[1:] != heatmap.shape[1:]:
        raise ValueError(
            "image and heatmap must be (3, H, W) and (1, H, W), or (H, W, 3) and (H, W), got "
            f"{tuple(image.shape)} and {tuple(heatmap.shape)}"
        )
    if label.numel() != 1 or label.is_floating_point() or label.is_complex():
        raise ValueError(
            f"label must be one integer, got {label.dtype} of shape {tuple(label.shape)}"
        )
    check_label(int(label))
    image = _pixels(image)
    _check_range(image)
    token = torch.ones((), dtype=torch.float32, device="cpu")
    return ClickMeSample(image, _pixels(heatmap), int(label), token)


def _channels_first(name: str, pixels: Tensor) -> Tensor:
    if pixels.dim() == 2:
        return pixels[None]
    if pixels.dim() != 3:
        raise ValueError(f"{name} must have two or three axes, got shape {tuple(pixels.shape)}")
    return pixels if pixels.shape[0] in (1, 3) else pixels.permute(2, 0, 1)


def _pixels(pixels: Tensor) -> Tensor:
    if pixels.is_complex() or (pixels.is_floating_point() and not pixels.isfinite().all()):
        raise ValueError(f"pixels must be finite real numbers, got {pixels.dtype}")
    return pixels if pixels.dtype == torch.uint8 else pixels.float()


def _check_range(image: Tensor) -> None:
    """Other ranges would pass for images that are almost black, or beyond white."""
    if image.dtype == torch.uint8 or not image.numel():
        return
    low, high = image.min().item(), image.max().item()
    if low < 0 or high > 255 or 0 < high <= 1:
        raise ValueError(
            f"image must have values from 0 to 255, got {low:.4g} to {high:.4g}; scale it where it "
            "is stored"
        )
