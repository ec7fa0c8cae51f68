"""Prepares the ClickMe data set: download, conversion to WebDataset shards, verification.

    python python/prepare_clickme.py download --output data/clickme
    python python/prepare_clickme.py verify data/clickme/val
    python python/prepare_clickme.py convert data/clickme/val --output data/clickme-wds/val

Each may be interrupted and started again: it goes on where it was. ``harmonizer_ext.clickme``
reads the downloaded shards as they are (``ClickMe``); converted ones (``ClickMeWebDataset``) suit
network and object storage, where random access is slow.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

try:
    import clickme_convert
    import clickme_download
    import command_line
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(f"prepare_clickme.py: {error}; pip install harmonizer-ext[train]") from error

from harmonizer_ext.clickme import tfrecord
from harmonizer_ext.clickme.kinds import find_files
from harmonizer_ext.files.lock import LOCK, locked
from harmonizer_ext.files.output import make_folder, remove_partial
from harmonizer_ext.files.text import shown

BUCKET = "https://storage.googleapis.com/serrelab/prj_harmonization/dataset/click-me"
#: Number of shards of each split.
SHARDS = {"train": 318, "val": 17}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand; 0 if all is well, 1 for a problem, 130 for an interruption."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    # Unreadable data (ValueError), a refused download, a full disk: expected, and said in a line.
    except (clickme_download.DownloadError, ValueError, OSError) as problem:
        print(f"{options.command}: {command_line.message(problem)}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    download = commands.add_parser(
        "download",
        help="fetch the released TFRecord shards",
        description="Fetches the released TFRecord shards to OUTPUT/train and OUTPUT/val. Files "
        "that are there are kept; half a file (.part) is completed. Sizes, the server's checksums "
        "and the records' framing are checked before a shard gets its name.",
    )
    download.add_argument("--output", type=Path, required=True, help="directory to fill")
    download.add_argument(
        "--split", nargs="+", choices=sorted(SHARDS), default=sorted(SHARDS), help="default: both"
    )
    download.add_argument(
        "--shards",
        type=_numbers,
        metavar="A[-B]",
        help="numbers of the shards, for a part of the data: 0 or 0-9 (default: all)",
    )
    download.add_argument("--threads", type=_positive, default=4, help="default: %(default)s")
    download.add_argument(
        "--retries",
        type=_positive,
        default=5,
        help="failures in a row before giving up on a file (default: %(default)s)",
    )
    download.add_argument("--url", default=BUCKET, help="default: %(default)s")
    download.add_argument(
        "--max-bytes",
        type=_positive,
        default=clickme_download.MAX_BYTES,
        help="of a file, whatever the server announces (default: %(default)s)",
    )
    download.set_defaults(run=_download)

    convert = commands.add_parser(
        "convert",
        help="copy TFRecord shards into WebDataset tar shards",
        description="Copies each TFRecord shard into a tar file of its name: for each sample "
        "NAME.jpg (the image), NAME.heatmap.jpg and NAME.cls (the label). The JPEGs are copied "
        "byte for byte, and what was written is read back and compared. OUTPUT/manifest.json "
        "lists the finished shards with size and checksum; those that still have both are not "
        "converted again.",
    )
    convert.add_argument("paths", nargs="+", help="shards, directories or glob patterns")
    convert.add_argument("--output", type=Path, required=True, help="directory to fill")
    convert.add_argument(
        "--on-error",
        choices=("raise", "skip"),
        default="raise",
        help="skip: leave unreadable records out, and say which (default: %(default)s)",
    )
    convert.set_defaults(run=_convert)

    verify = commands.add_parser(
        "verify",
        help="check shards of either kind and tell what is in them",
        description="Reads TFRecord shards in full (checksums, features, JPEGs) and compares tar "
        "shards with their manifest. Tells every problem, and the number of samples and classes.",
    )
    verify.add_argument("paths", nargs="+", help="shards, directories or glob patterns")
    verify.set_defaults(run=_verify)
    return parser


def _numbers(text: str) -> range:
    first, _, last = text.partition("-")
    if not first.isdigit() or not (last or first).isdigit() or int(last or first) < int(first):
        raise argparse.ArgumentTypeError(f"expected a number or a range such as 0-9, got {text!r}")
    return range(int(first), int(last or first) + 1)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 on, got {text!r}")
    return int(text)


def _download(options: argparse.Namespace) -> int:
    options.output.mkdir(parents=True, exist_ok=True)
    with locked(options.output / LOCK):
        return _download_here(options)


def _download_here(options: argparse.Namespace) -> int:
    files = []
    for split in options.split:
        numbers = range(SHARDS[split]) if options.shards is None else options.shards
        if numbers[-1] >= SHARDS[split]:
            raise ValueError(
                f"--shards: {split} has the shards 0 to {SHARDS[split] - 1}, got {numbers[-1]}"
            )
        make_folder(options.output / split, below=options.output)
        names = [f"{split}/{split}-{number}.tfrecords" for number in numbers]
        files += [(f"{options.url}/{name}", options.output / name) for name in names]
    lock = threading.Lock()
    received = downloaded = 0
    with tqdm(total=len(files), unit="shard", desc="download") as bar:

        def progress(count: int) -> None:
            nonlocal received
            with lock:
                received += count
                bar.set_postfix_str(f"{received / 1e6:.1f} MB", refresh=False)
                bar.update(0)

        def done(path: Path, new: bool) -> None:
            nonlocal downloaded
            with lock:
                downloaded += new
                bar.update()

        clickme_download.download_all(
            files,
            threads=options.threads,
            retries=options.retries,
            check=tfrecord.index_records,
            progress=progress,
            done=done,
            max_bytes=options.max_bytes,
        )
    print(f"{downloaded} shards downloaded, {len(files) - downloaded} were there")
    return 0


def _convert(options: argparse.Namespace) -> int:
    sources = find_files(options.paths, "tfrecords")[1]
    names = [path.stem for path in sources]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"several shards have the name {twice[0]}: convert them one by one")
    options.output.mkdir(parents=True, exist_ok=True)
    with locked(options.output / LOCK):
        remove_partial(options.output)
        return _convert_here(options, sources)


def _convert_here(options: argparse.Namespace, sources: list[Path]) -> int:
    entries = []
    total = sum(path.stat().st_size for path in sources)
    with tqdm(total=total, unit="B", unit_scale=True, desc="convert") as bar:
        for source in sources:
            bar.set_postfix_str(shown(source.name))
            entries.append(
                clickme_convert.convert_shard(
                    source,
                    options.output,
                    on_error=options.on_error,
                    warn=bar.write,
                    progress=bar.update,
                )
            )
    new = [entry for entry in entries if entry is not None]
    samples = sum(entry.samples for entry in new)
    left_out = sum(len(entry.skipped) for entry in new)
    print(
        f"{len(new)} shards converted ({samples} samples, {left_out} left out), "
        f"{len(entries) - len(new)} were there"
    )
    return 0


def _verify(options: argparse.Namespace) -> int:
    paths = find_files(options.paths, "tfrecords", "tar", mixed=True)[1]
    samples, problems = 0, 0
    classes: set[int] = set()
    with tqdm(paths, unit="shard", desc="verify") as bar:
        for path in bar:
            is_tar = path.suffix == ".tar"
            check = clickme_convert.verify_tar if is_tar else clickme_convert.verify_tfrecord
            findings = check(path)
            samples += findings.samples
            classes |= findings.classes
            problems += len(findings.problems)
            for problem in findings.problems:
                bar.write(problem)
    size = sum(path.stat().st_size for path in paths)
    print(
        f"{len(paths)} shards, {size / 1e6:.1f} MB: {samples} samples of {len(classes)} classes, "
        f"{problems} problems"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
