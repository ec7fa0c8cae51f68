"""Damages what every reader of this project reads, a thousand ways and more, and watches it read.

    python tests/fuzz_readers.py --cases 10000

Each reader has a process of its own with a gigabyte of memory. A case passes where the reader reads
it, or ends with an error of this project. It fails where another error comes, where a process is
started or a connection opened, where a file outside of the case's folder is touched, where a
pickle looks a class up, or where it takes longer than ten seconds. A crash ends the process, and is
told with the case; its file stays in the folder that is named.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
sys.path[:0] = [str(TESTS), str(ROOT / "python"), str(ROOT)]

import fuzz_guard  # noqa: E402
import fuzz_samples as samples  # noqa: E402
import fuzz_texts as texts  # noqa: E402
from fuzz_samples import Reader  # noqa: E402

#: Seconds that a case may take.
MOST_SECONDS = 10


def readers() -> dict[str, Callable[[Path], Reader]]:
    """Functions by name that prepare the folder, with files that are whole, and give the reader."""
    made: dict[str, Callable[[Path], Reader]] = {
        "tfrecord": samples.tfrecord,
        "record": samples.record,
        "tar": samples.tar,
        "npz": samples.npz,
        "pth": samples.pth,
        "npy": samples.npy,
        "labels.csv": texts.labels,
        "classes.txt": texts.classes,
        "images.csv": texts.table,
        "accuracy": texts.accuracy,
        "manifest.json": texts.manifest,
        "stimuli": texts.stimuli,
        "curve": texts.curve,
        "config.json": texts.settings,
        "checkpoint": texts.weights,
        "old checkpoint": texts.old_weights,
        "index cache": samples.index,
        "class map": texts.class_map,
        "columns": samples.columns,
        "tar of images": samples.tar_of_images,
    }
    kinds = ("png", "jpeg", "webp", "bmp", "gif", "ppm", "tiff")
    return made | {kind: lambda folder, kind=kind: samples.pictures(folder, kind) for kind in kinds}


def run_cases(name: str, cases: int, seed: int, folder: Path) -> dict[str, Any]:
    """Runs the cases of one reader in this process."""
    place = folder / name
    place.mkdir()
    reader = readers()[name](place)
    watch = fuzz_guard.watch_process(place.resolve())
    counts: collections.Counter[str] = collections.Counter()
    slowest, bad = 0.0, []
    progress = os.open(folder / "progress", os.O_CREAT | os.O_WRONLY, 0o600)
    for number in range(cases):
        reader.make(random.Random(f"{seed} {name} {number}"), place)
        os.pwrite(progress, f"{name}, case {number:<12}".encode(), 0)
        start = time.perf_counter()
        signal.alarm(MOST_SECONDS)
        watch.on = number >= 3  # what is imported at first is
        try:
            reader.read(place)
            counts["read"] += 1
        except Exception as error:  # noqa: BLE001 - whatever it is, it is looked at
            counts["refused"] += 1
            if not fuzz_guard.is_ours(error):
                bad.append(f"case {number}: {type(error).__name__}: {error}"[:300])
        watch.on = False
        signal.alarm(0)
        slowest = max(slowest, time.perf_counter() - start)
        if watch.found:
            bad.append(f"case {number}: {watch.found}"[:400])
            watch.found.clear()
    os.close(progress)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"bad": bad, "slowest": slowest, "peak": peak, **counts}


def fuzz(names: list[str], cases: int, seed: int) -> dict[str, dict[str, Any]]:
    """Runs the cases of readers in a process of their own.

    Returns:
        By reader: numbers "read" and "refused", seconds of the slowest case, "peak" memory in MB,
        and "bad", what is wrong, a text for each. Where the process has ended, only that.
    """
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    line = [sys.executable, __file__, "--cases", str(cases), "--seed", str(seed)]
    done = subprocess.run(
        [*line, "--folder", str(folder), "--reader", *names],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode == 0:
        told: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
        if not any(one["bad"] for one in told.values()):
            shutil.rmtree(folder)
        return told
    at = (folder / "progress").read_text() if (folder / "progress").exists() else "none"
    reason = done.stderr.strip()[-1500:]
    if done.returncode < 0:
        reason = f"{signal.Signals(-done.returncode).name} {reason[-200:]}"
    return {names[0]: {"bad": [f"{at.strip()} ended the process, see {folder}: {reason}"]}}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10000, help="of each reader (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all (%(default)s)")
    parser.add_argument("--reader", nargs="+", choices=list(readers()), help="default: all")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.reader or list(readers())
    if options.folder:  # this is the process of the readers
        fuzz_guard.prepare()
        told = {n: run_cases(n, options.cases, options.seed, options.folder) for n in names}
        print(json.dumps(told))
        return 0
    return table_of(names, options.cases, options.seed)


def table_of(names: list[str], cases: int, seed: int) -> int:
    wrong = 0
    heads = ("cases", "read", "refused", "slowest ms", "peak MB", "bad")
    print(f"{'reader':<16}", *(f"{head:>10}" for head in heads))
    for name in names:
        told = fuzz([name], cases, seed)[name]
        cells = [cases, told.get("read", 0), told.get("refused", 0)]
        cells += [round(1000 * told.get("slowest", 0)), round(told.get("peak", 0))]
        print(f"{name:<16}", *(f"{n:>10}" for n in (*cells, len(told["bad"]))), flush=True)
        for text in told["bad"][:10]:
            print(f"    {text}")
        wrong += len(told["bad"])
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
