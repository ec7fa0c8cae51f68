"""The fuzzed readers of texts and checkpoints: how files are damaged, and how they are read."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz_guard import outside_is_read, refused
from fuzz_samples import PLAIN, Reader, folder_of_maps


def text(folder: Path, name: str, whole: list[bytes], read: Callable[[Path], Any]) -> Reader:
    from mutations import mutated

    (folder / name).write_bytes(whole[0])

    def make(draw: random.Random, folder: Path) -> None:
        (folder / name).write_bytes(mutated(draw, draw.choice(whole)))

    return Reader(make, read)


def labels(folder: Path) -> Reader:
    from evaluating.data import FolderOfMaps

    folder_of_maps(folder)
    whole = [b"name,label\n1/a,3\n", b'\xef\xbb\xbfname,label,x\r\n"1/a","3",""\r\n']
    return text(folder, "labels.csv", whole, lambda f: FolderOfMaps(f)[0])


def classes(folder: Path) -> Reader:
    from evaluating.data import FolderOfMaps

    folder_of_maps(folder)
    return text(folder, "classes.txt", [b"0\n1\n2\n"], lambda f: FolderOfMaps(f)[0])


def table(folder: Path) -> Reader:
    import reveal_experiment

    folder_of_maps(folder)
    from PIL import Image

    Image.new("L", (32, 32), 9).save(folder / "maps/1/a.png")
    whole = [b"image,importance,label\nimages/1/a.jpg,maps/1/a.png,3\n"]

    def read(folder: Path) -> None:
        # What a table names is read wherever it is: by whoever wrote the table.
        with outside_is_read():
            list(reveal_experiment.read_pictures(folder / "a.csv"))

    return text(folder, "a.csv", whole, read)


def accuracy(folder: Path) -> Reader:
    import evaluate
    from evaluations import network

    chosen = [network("a")]
    whole = [b"model,top1\na,76.1\nb,3\n"]
    return text(folder, "a.csv", whole, lambda f: evaluate.read_accuracy(str(f / "a.csv"), chosen))


def manifest(folder: Path) -> Reader:
    import bombs
    from clickme_shards import click_map, jpeg, picture

    from harmonizer_ext.clickme import ClickMeWebDataset

    parts = {"jpg": jpeg(picture(1)), "heatmap.jpg": jpeg(click_map(1)), "cls": b"7"}
    content = bombs.tar_of(*((bombs.plain(f"a.{n}"), part) for n, part in parts.items()))
    (folder / "a.tar").write_bytes(content)
    entry = {"source": "a", "size": len(content), "samples": 1, "sha256": "0", "skipped": []}
    whole = json.dumps({"version": 1, "shards": {"a.tar": entry}}, indent=1).encode()

    def read(folder: Path) -> None:
        list(ClickMeWebDataset(folder / "a.tar", on_error="skip", **PLAIN))
        list(ClickMeWebDataset(folder / "a.tar", **PLAIN))

    return text(folder, "manifest.json", [whole], read)


def stimuli(folder: Path) -> Reader:
    import hashlib

    import reveal_experiment

    (folder / "a.png").write_bytes(b"x")
    entry = {"file": "a.png", "image": "a", "label": 1, "animal": True, "level": 0}
    entry |= {"sha256": hashlib.sha256(b"x").hexdigest()}
    whole = json.dumps({"levels": [1.0], "stimuli": [entry]}).encode()
    return text(folder, "manifest.json", [whole], reveal_experiment.read_manifest)


def curve(folder: Path) -> Reader:
    import reveal_experiment

    whole = json.dumps({"levels": [0.1, 1.0], "accuracy": [0.5, 1.0]}).encode()
    return text(
        folder,
        "a.json",
        [whole],
        lambda f: reveal_experiment.read_human_curve(f / "a.json", [0.1, 1]),
    )


def settings(folder: Path) -> Reader:
    from training import config

    whole = json.dumps(dataclasses.asdict(config.Config(clickme=("x",)))).encode()

    def read(folder: Path) -> None:
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                config.parse(["--config", str(folder / "a.json")])
        except SystemExit as ended:
            raise refused(said.getvalue()) from ended

    return text(folder, "a.json", [whole], read)


def checkpoint_content() -> dict[str, Any]:
    from training import checkpoint, config, networks

    asked = config.Config(model="small", img_size=32, num_classes=10, clickme=("x",))
    model, form = networks.create(asked)
    state = {"version": checkpoint.VERSION, "config": dataclasses.asdict(asked)}
    return state | {"input": form._asdict(), "model": model.state_dict()}


def read_weights(folder: Path) -> None:
    from training import checkpoint, config, networks

    first = None
    model, _ = networks.create(config.Config(model="small", num_classes=10, clickme=("x",)))
    for read in (
        lambda: checkpoint.load_network(folder / "a.pt"),
        lambda: networks.load_weights(model, folder / "a.pt"),
    ):
        try:
            read()
        except ValueError as error:
            first = first or error
    if first is not None:
        raise first


def weights(folder: Path) -> Reader:
    import torch
    from mutations import PICKLED, is_pickle, mutated_zip

    file = io.BytesIO()
    torch.save(checkpoint_content(), file)
    whole = file.getvalue()

    def make(draw: random.Random, folder: Path) -> None:
        content = mutated_zip(draw, whole, 0.3, lambda: is_pickle, PICKLED)
        (folder / "a.pt").write_bytes(content)

    return Reader(make, read_weights)


def old_weights(folder: Path) -> Reader:
    """Weights as PyTorch wrote them before 1.6."""
    import torch
    from mutations import PICKLED, mutated

    file = io.BytesIO()
    torch.save(checkpoint_content(), file, _use_new_zipfile_serialization=False)
    whole = file.getvalue()

    def make(draw: random.Random, folder: Path) -> None:
        (folder / "a.pt").write_bytes(mutated(draw, whole, PICKLED))

    return Reader(make, read_weights)


def class_map(folder: Path) -> Reader:
    import pickle

    from mutations import PICKLED, mutated
    from training.images import read_class_map

    whole = {"a.txt": b"0\n1\n2\n", "a.pkl": pickle.dumps({"0": 0, "1": 1}, protocol=4)}

    def make(draw: random.Random, folder: Path) -> None:
        for name, content in whole.items():
            (folder / name).write_bytes(mutated(draw, content, PICKLED))

    def read(folder: Path) -> None:
        with contextlib.suppress(ValueError):
            read_class_map(str(folder / "a.txt"))
        read_class_map(str(folder / "a.pkl"))

    return Reader(make, read)
