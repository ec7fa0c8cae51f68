"""Reads what ``bombs.py`` makes, with a gigabyte of memory; prints what the readers say as JSON.

Arguments: the folder with ``tar/``, ``files/``, ``records/`` and ``pictures/``, in which each bomb
has a folder of its own.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import limited
import timm_networks

timm_networks.import_timm()
import PIL.Image  # noqa: E402
from evaluating.data import FolderOfMaps  # noqa: E402
from evaluating.tar_shards import TarShards  # noqa: E402
from training import config, data  # noqa: E402

from harmonizer_ext.clickme import ClickMe, ClickMeFiles, ClickMeWebDataset  # noqa: E402
from harmonizer_ext.data import Draw, MixedDataset  # noqa: E402

logging.disable(logging.WARNING)
PIL.Image.init()

PLAIN: dict[str, Any] = {"preprocess": None}


def images(folder: Path) -> Any:
    asked = config.Config(model="small", clickme=("x",), data_dir=str(folder / "data"))
    return data._images(asked, "train", "train_split")


def marked(folder: Path) -> int:
    mixed = MixedDataset(None, images(folder), on_error="mark")
    labels = [mixed[Draw(False, number, 0)].label for number in range(2)]
    assert labels == [-1, 0], labels
    return len(mixed.skipped)


def skipped(dataset: Any, good: int) -> int:
    labels = [sample.label for sample in dataset]
    assert set(labels) <= {good}, labels
    return dataset.skipped if isinstance(dataset.skipped, int) else len(dataset.skipped)


#: By the kind of bomb: ways to read it that must raise, and that must skip one.
RAISING: dict[str, dict[str, Callable[[Path], Any]]] = {
    "tar": {
        "stream": lambda f: list(ClickMeWebDataset(f / "x.tar", **PLAIN)),
        "by number": lambda f: list(TarShards(f / "x.tar", **PLAIN)),
    },
    "files": {"files": lambda f: ClickMeFiles(f, **PLAIN)[0]},
    "records": {"records": lambda f: ClickMe(f, verify=False, **PLAIN)[0]},
    "pictures": {
        "evaluation": lambda f: FolderOfMaps(f / "folder")[0],
        "training": lambda f: images(f)[0],
        "mixed": lambda f: MixedDataset(None, images(f))[Draw(False, 0, 0)],
    },
}
SKIPPING: dict[str, Callable[[Path], int]] = {
    "tar": lambda f: skipped(ClickMeWebDataset(f, on_error="skip", **PLAIN), 7),
    "files": lambda f: skipped(ClickMeFiles(f, on_error="skip", **PLAIN), 7),
    "records": lambda f: skipped(ClickMe(f, on_error="skip", verify=False, **PLAIN), 7),
    "pictures": marked,
}


def main() -> None:
    limited.limit()
    told = {}
    before = peak()
    for folder in sorted(Path(sys.argv[1]).glob("*/*")):
        kind = folder.parent.name
        for name, read in RAISING[kind].items():
            key = f"{kind}, {folder.name}, {name}"
            try:
                read(folder)
                told[key] = "read"
            except Exception as error:  # noqa: BLE001 - whatever it is, it is told
                told[key] = f"{type(error).__name__}: {error}"
        try:
            told[f"{kind}, {folder.name}, skipped"] = SKIPPING[kind](folder)
        except Exception as error:  # noqa: BLE001 - as above
            told[f"{kind}, {folder.name}, skipped"] = f"{type(error).__name__}: {error}"
    print(json.dumps({"told": told, "megabytes": (peak() - before) / 2**20}))


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
