"""Whether what the programs of python/ import is installed; tests of theirs are skipped else."""

from __future__ import annotations

import importlib.util

import timm_networks

#: What the extra "train" brings beside timm and torchvision.
TRAIN = (
    *("google_crc32c", "matplotlib", "numpy", "PIL", "scipy", "simplejpeg", "skimage", "sklearn"),
    *("tensorboard", "tqdm", "webdataset"),
)


def why_no_train() -> str | None:
    """None if everything of the extra "train" is there, otherwise what is not."""
    missing = [name for name in TRAIN if importlib.util.find_spec(name) is None]
    if missing:
        return f"pip install harmonizer-ext[train]: no {', '.join(missing)}"
    return timm_networks.why_no_timm()
