"""Names of files are names: no scheme, pattern, markup or escape in them is obeyed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import extras
import numpy as np
import pytest

if (reason := extras.why_no_train()) is not None:
    pytest.skip(reason, allow_module_level=True)

import prepare_clickme
import torch
from clickme_shards import click_map, framed, picture, record
from PIL import Image

TESTS = Path(__file__).parent
#: A command runs where any of these is obeyed, or a connection is opened.
NAMES = (
    "pipe:touch PIPED;echo ",
    "http:127.0.0.1",
    "https:127.0.0.1",
    "s3:bucket",
    "gs:bucket",
    "hf:owner",
    "ais:bucket",
    "file:elsewhere",
    "ftp:127.0.0.1",
    "data:,x",
    "-",
    "--help",
    "-rf",
    "{000..010}",
    "a::b",
    "zip:a::http:b",
    "*",
    "[ab]?",
    "~",
    "$HOME",
    "`touch TICKED`",
    "$(touch DOLLAR)",
    "x;touch SEMICOLON",
    "x|touch BAR",
    "%s%n",
    "a\nb",
    "\x1b]0;title\x07",
    "\u202egpj",
    "\udcff",
    "1\u00b22",
)


def sample_files(folder: Path, name: str, shard: bytes) -> None:
    """A sample in each form under a name."""
    (folder / f"tfrecords/{name}.tfrecords").write_bytes(shard)
    np.savez(
        folder / f"files/{name}.npz",
        image=picture(1)[:8, :8], heatmap=click_map(1)[:8, :8], label=np.int64(1),
    )  # fmt: skip
    torch.save({"weight": torch.zeros(1)}, folder / f"weights/{name}.pt")
    torch.save({"version": 1, "files": {}}, folder / f"caches/{name}.pt")
    for root in ("images/train", "images/validation", "folder/images", "folder/maps"):
        place = folder / root / (name if root.startswith("images") else "1")
        place.mkdir(exist_ok=True)
        map_ = root == "folder/maps"
        pixels = (click_map(1) if map_ else picture(1))[:32, :32]
        Image.fromarray(pixels).save(place / f"{name}.{'png' if map_ else 'jpg'}")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("names")
    parts = ("tfrecords", "files", "weights", "caches", "tables", "images/train", "folder/images")
    for part in (*parts, "images/validation", "folder/maps", "tar", "http:/127.0.0.1:9"):
        (folder / part).mkdir(parents=True)
    content = framed(record(0))  # once: the bitwise checksum is slow
    for name in NAMES:
        sample_files(folder, name, content)
    (folder / "images/classes.txt").write_bytes(
        b"".join(
            os.fsencode(name.replace("\n", "")) + b"\n" for name in NAMES if "\udcff" not in name
        )
    )
    one = folder / "one"
    one.mkdir()
    (one / "x.tfrecords").write_bytes(content)
    assert prepare_clickme.main(["convert", str(one), "--output", str(one / "tar")]) == 0
    shard = (one / "tar/x.tar").read_bytes()
    for name in NAMES:
        (folder / f"tar/{name}.tar").write_bytes(shard)
        quoted = f'"../folder/images/1/{name}.jpg","../folder/maps/1/{name}.png",1'
        head = "image,importance,label"
        (folder / f"tables/{name}.csv").write_bytes(os.fsencode(f"{head}\n{quoted}\n"))
    (folder / "tables/urls.csv").write_text(
        f"{head}\nhttp://127.0.0.1:9/x.png,pipe:touch PIPED;,1\n"
    )
    (folder / "http:/127.0.0.1:9/x.tar").write_bytes(shard)
    (folder / "pipe:touch ROOT;echo ").symlink_to("images")
    return folder


def test_no_name_starts_a_process_or_opens_a_connection(hostile: Path) -> None:
    path = os.pathsep.join([str(TESTS), str(TESTS.parent / "python"), str(TESTS.parent)])
    before = {entry.name for entry in os.scandir(hostile)}
    done = subprocess.run(
        [sys.executable, str(TESTS / "hostile_names_worker.py")],
        cwd=hostile,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert told["events"] == []
    commands = {"PIPED", "ROOT", "TICKED", "DOLLAR", "SEMICOLON", "BAR"}
    made = {path.name for path in hostile.rglob("*")} & commands
    assert not made
    assert {entry.name for entry in os.scandir(hostile)} - before <= {"converted", "stimuli"}
    # They are read, not merely refused.
    counts = {name: told for name, told in told["told"].items() if told not in ("read", 0)}
    everything = ("ClickMe, one", "ClickMeFiles, one", "ClickMeWebDataset, one", "TarShards")
    everything += ("ClickMeWebDataset, here", "index_cache", "reveal, table")
    expected = dict.fromkeys(everything, len(NAMES))
    expected["reveal, table"] -= 1  # a table in UTF-8 cannot have the name that is none
    expected["verify"] = 1  # a manifest is missing, which is told
    assert counts == expected
