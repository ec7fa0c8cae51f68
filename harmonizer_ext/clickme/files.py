"""ClickMe with one file per image: NumPy archives and PyTorch dictionaries."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .dataset import OnError, SampleDataset
from .released import Preprocess
from .sample import ClickMeSample, check_label
from .shards import resolve_paths

__all__ = ["ClickMeFiles"]

_KEYS = ("image", "heatmap", "label")


class ClickMeFiles(SampleDataset):
    """ClickMe from files of one sample each, with the keys ``image``, ``heatmap`` and ``label``.

    Two kinds are in use:

    - ``.npz`` (the archives that ``niniack/continualUtils`` reads): image (H, W, 3), heatmap
      (H, W), 0 to 255, label a number.
    - ``.pth``, a dictionary of tensors (``serre-lab/Pseudo_ClickMe``): image (3, H, W) and heatmap
      (1, H, W), uint8, label int32 with one element.

    Either may have either layout. uint8 stays uint8, other types become float32. Nothing in a file
    is executed: pickled Python objects are refused.

    Args:
        paths: a file, a directory (its ``*.npz`` and ``*.pth`` files), a glob pattern, or a
            sequence of any of these; each directory's or pattern's files in natural order.
        preprocess: as in ``ClickMe``. There is no default, because a file does not tell whether
            its heatmap was blurred before: the reader of the ``.npz`` above blurs it, that of the
            ``.pth`` does not.
        transform: called with each ``ClickMeSample``; what it returns is the sample.
        on_error: ``"raise"``, or ``"skip"`` to return the next readable sample in the place of one
            that is unreadable, which is logged and listed in ``skipped``.

    Raises:
        FileNotFoundError: a path or pattern matches no file.
        ValueError: an argument has an unknown name. Indexing raises it for a file that cannot be
            read or lacks a key, or whose content has another shape; the text names the file.
        ImportError: NumPy is not installed and there are ``.npz`` files.
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        preprocess: Preprocess,
        transform: Callable[[ClickMeSample], Any] | None = None,
        on_error: OnError = "raise",
    ) -> None:
        files = resolve_paths(paths, "*.npz", "*.pth")
        for path in files:
            if path.suffix not in (".npz", ".pth"):
                raise ValueError(f"paths: {path} is neither a .npz nor a .pth file")
        if any(path.suffix == ".npz" for path in files):
            _numpy()
        # One string, which workers share; a list of paths would be copied to each of them.
        self._names = "\0".join(map(os.fspath, files)).encode()
        sizes = [len(os.fspath(path).encode()) + 1 for path in files]
        lengths = torch.tensor(sizes, device="cpu")
        self._ends = lengths.cumsum(0)
        super().__init__(len(files), preprocess, transform, on_error)

    def locate(self, index: int) -> tuple[Path, int]:
        """The file of a sample, and 0, where it begins in it."""
        index = self._checked(index)
        start = int(self._ends[index - 1]) if index else 0
        return Path(self._names[start : int(self._ends[index]) - 1].decode()), 0

    def _read(self, index: int, into: tuple[Tensor, Tensor] | None) -> ClickMeSample:
        path, _ = self.locate(index)
        data = path.read_bytes()
        try:
            content = _load_npz(data) if path.suffix == ".npz" else _load_pth(data)
            missing = [key for key in _KEYS if not isinstance(content.get(key), Tensor)]
            if missing:
                raise ValueError(f"no array {missing}, only {sorted(map(str, content))}")
            return _sample(*(content[key] for key in _KEYS))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def __repr__(self) -> str:
        return f"ClickMeFiles({len(self)} files, preprocess={self.preprocess!r})"


def _load_npz(data: bytes) -> dict[str, Tensor]:
    np = _numpy()
    _check_archive(data)
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in _KEYS if key in archive.files}
    try:
        return {key: torch.from_numpy(array) for key, array in arrays.items()}
    except TypeError as error:  # text, for one
        raise ValueError(str(error)) from error


def _load_pth(data: bytes) -> dict[Any, Any]:
    _check_archive(data)
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(f"no dictionary of tensors: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"expected a dictionary of tensors, got {type(content).__name__}")
    return content


def _check_archive(data: bytes) -> None:
    """Both kinds are zip archives. Their readers look into files before, or without, the check."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            damaged = archive.testzip()
    # Structure, contents, end of data, compressions that are none, a flag that says encrypted.
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"no readable archive: {error}") from error
    if damaged is not None:
        raise ValueError(f"{damaged} in it does not match its checksum")


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
    token = torch.ones((), dtype=torch.float32, device="cpu")
    return ClickMeSample(_pixels(image), _pixels(heatmap), int(label), token)


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


def _numpy() -> Any:
    try:
        import numpy
    except ImportError as error:
        raise ImportError(
            "reading .npz files needs NumPy: pip install harmonizer-ext[train]"
        ) from error
    return numpy
