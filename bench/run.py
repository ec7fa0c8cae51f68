"""The benchmark: how fast, how close to the limit, how much memory, on the machine it runs on.

    python bench/run.py                       everything that runs here; under five minutes
    python bench/run.py --only loss --only step
    python bench/run.py --quick               does it run at all? small inputs, half a minute
    python bench/run.py --baseline OLD.json   and what has changed since

Measures every backend of harmonizer_ext on every device it finds against the same loss in eager
PyTorch, torch.compile, the authors' TensorFlow code (where tensorflow and Harmonization 0.0.9 are
installed) and a copy of the same bytes. Prints tables, writes one JSON record and pictures.

Sections: loss (both formulations against every peer), memory (peak, of the same), sweep (batch,
size, dtype, channels, levels), latency (one image), step (the training step of three timm
networks), import (of the package), and only when asked for: build (of the package), instructions
(of the CPU kernels).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import harness  # first of all: it sets what torch reads when it is loaded

# isort: split
import goals
import records
import sections
import table
import torch

MINUTE = 60


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small inputs, nothing compiled")
    parser.add_argument(
        "--only",
        action="append",
        choices=sections.SECTIONS,
        metavar="SECTION",
        help=f"one of {', '.join(sections.SECTIONS)}; may be repeated",
    )
    parser.add_argument("--build", action="store_true", help="time the build of the package too")
    parser.add_argument(
        "--instructions", action="store_true", help="count those of the CPU kernels too, one by one"
    )
    parser.add_argument("--device", help="cpu or cuda; default: both, where there is a GPU")
    parser.add_argument("--threads", type=int, help="default: PyTorch's own choice")
    parser.add_argument("--batch", type=int, help="default: 32 on the CPU, 512 on a GPU")
    parser.add_argument("--size", type=int, default=224, help="height and width of the maps")
    parser.add_argument(
        "--seconds",
        type=float,
        default=15,
        help="of timing in the section 'loss', warm-up apart; the others take parts of it",
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--compile-steps",
        action="store_true",
        default=None,
        help="compile the training steps too; default: on a GPU",
    )
    parser.add_argument(
        "--networks",
        nargs="+",
        default=(),
        metavar="NETWORK[:BATCHxSIZE]",
        help="of timm, for the training step, such as vit_small_patch16_224:20x128",
    )
    parser.add_argument("--no-tensorflow", action="store_true", help="leave TensorFlow out")
    parser.add_argument("--output", type=Path, help="the record; default: a file in runs/bench")
    parser.add_argument(
        "--pictures", type=Path, help="folder for them; default: the record's name without .json"
    )
    parser.add_argument("--no-plots", action="store_true", help="no pictures")
    parser.add_argument("--baseline", type=Path, help="a record to compare the times with")
    parser.add_argument(
        "--fail-above",
        type=float,
        metavar="PERCENT",
        help="with --baseline: exit status 1 if ours has become this much slower",
    )
    args = parser.parse_args()
    if args.fail_above is not None and args.baseline is None:
        parser.error("--fail-above: expected --baseline RECORD beside it")
    if args.seconds <= 0:
        parser.error(f"--seconds: expected more than 0, got {args.seconds:g}")
    return args


def _devices(wanted: str | None) -> list[str]:
    if wanted is None:
        return ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    harness.clock(wanted)  # refuses an unknown device before any work
    if torch.device(wanted).type == "cuda" and not torch.cuda.is_available():
        sys.exit(f"--device {wanted}: PyTorch {torch.__version__} sees no GPU here")
    return [wanted]


def _options(args: argparse.Namespace, devices: list[str]) -> sections.Options:
    on_gpu = any(torch.device(device).type == "cuda" for device in devices)
    batch = {
        device: args.batch
        or (2 if args.quick else 512 if torch.device(device).type == "cuda" else 32)
        for device in devices
    }
    return sections.Options(
        batch=batch,
        size=64 if args.quick else args.size,
        seconds=min(args.seconds, 1.0) if args.quick else args.seconds,
        quick=args.quick,
        compiled=not (args.no_compile or args.quick),
        compiled_steps=on_gpu if args.compile_steps is None else args.compile_steps,
        networks=tuple(args.networks),
        tensorflow=not (args.no_tensorflow or args.quick),
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), MINUTE)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _run(
    steps: list[tuple[str, sections.Step]],
    record: dict[str, Any],
    output: Path,
    left_out: sections.LeftOut,
) -> None:
    """All steps, one line of progress each; the record is written after every one.

    A step that raises an error is left out with it, and the others go on.
    """
    start = time.monotonic()
    several = len({device for device, _ in steps}) > 1
    for number, (device, step) in enumerate(steps):
        left = sum(other.seconds for _, other in steps[number:])
        harness.say(
            f"[{number + 1:>2}/{len(steps)}] {step.section}{f' on {device}' if several else ''}: "
            f"{step.label}, about {_duration(step.seconds)} (then {_duration(left - step.seconds)})"
        )
        began = time.monotonic()
        what = f"{step.section} on {device}: {step.label}"
        rows = harness.attempt(step.measure, lambda why, what=what: left_out.failed(what, why))
        threads = {"threads": torch.get_num_threads()} if device == "cpu" else {}
        record["rows"] += [
            {"section": step.section, "device": device, **threads, **row} for row in rows or ()
        ]
        seconds = record["seconds"]
        seconds[step.section] = seconds.get(step.section, 0) + time.monotonic() - began
        # After every step: what was measured is not lost to what comes next.
        harness.write_record(output, record)
    harness.say(f"measured in {_duration(time.monotonic() - start)}")


def _draw(record: dict[str, Any], folder: Path) -> None:
    try:
        import plots
    except ImportError as error:
        harness.say(f"no pictures: {error}; pip install matplotlib")
        return
    for path in plots.draw_all(record, folder):
        harness.say(f"wrote {path}")


def _regressions(record: dict[str, Any], old: dict[str, Any], percent: float | None) -> bool:
    """Prints what has changed; whether ours has become slower by more than allowed."""
    changes = records.compare(record["rows"], old["rows"])
    print(table.comparison(changes, old).text())
    if percent is None:
        return False
    limit = 1 + percent / 100
    worse = [
        row
        for row in changes
        if table.is_ours(row["implementation"])
        and (row["change_against_copy"] or row["change"]) > limit
    ]
    for row in worse:
        harness.say(f"slower by more than {percent:g} %: {row['case']}, {row['implementation']}")
    return bool(worse)


def main() -> int:
    args = _arguments()
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit("TRITON_INTERPRET: expected to be unset; an interpreter's times mean nothing")
    baseline = records.load(args.baseline) if args.baseline else None
    if args.threads:
        torch.set_num_threads(args.threads)
    devices = _devices(args.device)
    options = _options(args, devices)
    wanted = args.only or [n for n in sections.SECTIONS if n not in sections.ON_REQUEST]
    asked = {"build": args.build, "instructions": args.instructions}
    wanted += [name for name, yes in asked.items() if yes and name not in wanted]
    left_out = sections.LeftOut()
    steps = sections.plan(wanted, devices, options, left_out)
    total = sum(step.seconds for _, step in steps)
    harness.say(f"{len(steps)} steps, about {_duration(total)} the first time")

    output = args.output or harness.default_output(devices)
    record: dict[str, Any] = {
        "format": records.FORMAT,
        "command": ["bench/run.py", *sys.argv[1:]],
        "machine": harness.machine(*devices),
        "notes": {
            "timing": "medians; the implementations of a case are called in turn, in a new order "
            "every round, each time on the next of several sets of inputs",
            "tensorflow": "a process of its own, timed there; takes its turn in the same loop",
            "memory": "peak beyond what was in use before one call, the result included",
        },
        "seconds": {},
        "left_out": left_out.entries,
        "goals": [],
        "rows": [],
    }
    _run(steps, record, output, left_out)
    # They are set for full sizes.
    record["goals"] = [] if args.quick else goals.goals(record["rows"])
    harness.write_record(output, record)
    print(table.report(record))
    if not args.no_plots:
        _draw(record, args.pictures or output.with_suffix(""))
    harness.say(f"wrote {output}")
    if baseline is not None and _regressions(record, baseline, args.fail_above):
        return 1
    return 1 if left_out.failures else 0


if __name__ == "__main__":
    sys.exit(main())
