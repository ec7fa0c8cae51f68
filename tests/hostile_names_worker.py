"""Reads files of hostile names with every reader, in a process that counts what is started.

Run in the folder that ``test_names.py`` has made; prints the events, by reader, as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROCESSES = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty"}
SOCKETS = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"}

found: list[list[str]] = []
now = ""


def hook(event: str, arguments: tuple[Any, ...]) -> None:
    if now and event in PROCESSES | SOCKETS:
        found.append([now, event, repr(arguments)[:200]])


def readers() -> dict[str, Callable[[], Any]]:
    import prepare_clickme
    import reveal_experiment
    import torch
    from evaluating.data import FolderOfMaps, ImageSet
    from evaluating.networks import load
    from evaluating.tar_shards import TarShards
    from training import checkpoint, config, data, networks
    from training.networks import InputForm
    from training.processes import World

    from harmonizer_ext.clickme import ClickMe, ClickMeFiles, ClickMeWebDataset

    def settings(**changes: Any) -> config.Config:
        return config.Config(model="small", num_classes=10, workers=0, **changes)

    def each(read: Callable[[str], Any], folder: str) -> int:
        """How many of the files of a folder are read by their bare names."""
        count = 0
        for name in sorted(os.listdir(folder)):
            os.chdir(folder)
            try:
                with contextlib.suppress(ValueError, OSError):
                    read(name)
                    count += 1
            finally:
                os.chdir("..")
        return count

    def training(root: str) -> None:
        asked = settings(
            clickme=("tfrecords",),
            data_dir=root,
            class_map="classes.txt",
            batch_size=2,
            no_aug=True,
        )
        alone = World(0, 1, torch.device("cpu"))
        list(data.open_training(asked, 32, alone).batches)
        for test in data.open_tests(asked, InputForm(32, (0.5,) * 3, (0.5,) * 3), alone).values():
            list(test.batches)

    def streamed(root: str) -> None:
        with contextlib.suppress(ValueError):
            data._images(settings(clickme=("x",), data_dir=root, dataset="wds/x"), "train", "x")

    def weights(name: str) -> None:
        with contextlib.suppress(ValueError):
            checkpoint.read(name)
        with contextlib.suppress(ValueError):
            load(name)
        networks.load_weights(networks.create(settings(clickme=("x",)))[0], name)

    def cached(name: str) -> None:
        ClickMe("../tfrecords", index_cache=name)

    def tables(name: str) -> None:
        list(reveal_experiment.read_pictures(Path(name)))

    def program(*line: str) -> Callable[[], Any]:
        return lambda: prepare_clickme.main(line)

    plain: dict[str, Any] = {"preprocess": None}

    def tar(name: str) -> None:
        list(ClickMeWebDataset(name, **plain))

    return {
        "ClickMe": lambda: list(ClickMe("tfrecords", **plain)),
        "ClickMe, one": lambda: each(lambda n: list(ClickMe(n, **plain)), "tfrecords"),
        "ClickMeFiles": lambda: list(ClickMeFiles("files", **plain)),
        "ClickMeFiles, one": lambda: each(lambda n: list(ClickMeFiles(n, **plain)), "files"),
        "ClickMeWebDataset": lambda: tar("tar"),
        "ClickMeWebDataset, here": lambda: each(lambda n: tar("."), "tar"),
        "ClickMeWebDataset, one": lambda: each(tar, "tar"),
        "ClickMeWebDataset, url": lambda: tar("http://127.0.0.1:9/x.tar"),
        "TarShards": lambda: each(lambda n: list(TarShards(n, **plain)), "tar"),
        "FolderOfMaps": lambda: list(FolderOfMaps("folder")),
        "ImageSet": lambda: [
            list(ImageSet(kind).at(32)) for kind in ("tar", "tfrecords", "files", "folder")
        ],
        "training": lambda: training("images"),
        "training, root": lambda: training("pipe:touch ROOT;echo "),
        "training, wds": lambda: streamed("pipe:touch ROOT;echo "),
        "weights": lambda: each(weights, "weights"),
        "index_cache": lambda: each(cached, "caches"),
        "verify": program("verify", "tfrecords", "tar"),
        "convert": program("convert", "tfrecords", "--output", "converted"),
        "reveal, shards": lambda: list(reveal_experiment.read_pictures(Path("tar"))),
        "reveal, table": lambda: each(tables, "tables"),
        "reveal, folder": lambda: reveal_experiment.make_stimuli(
            argparse.Namespace(
                source=Path("folder"), output=Path("stimuli"), levels=2, lowest=0.5, pixels=1,
                images=None, seed=0, max_bytes=2**28,
            )
        ),
    }  # fmt: skip


def main() -> None:
    global now
    sys.addaudithook(hook)
    told = {}
    for name, read in readers().items():
        now = name
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                count = read()
            told[name] = count if isinstance(count, int) else "read"
        except Exception as error:  # noqa: BLE001 - told; what it has started counts
            told[name] = f"{type(error).__name__}: {error}"
        now = ""
    print(json.dumps({"events": found, "told": told}))


if __name__ == "__main__":
    main()
