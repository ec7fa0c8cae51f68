"""The parts of a measuring program, each on its own, with its error a row; and whole records."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import extras
import harness
import program as programs
import pytest
import records
import torch

# --- contenders are apart -------------------------------------------------------------------------


class CompilationError(Exception):
    """An error as Triton's: no RuntimeError."""


def _raise(error: BaseException) -> Callable[[records.Journal], object]:
    def work(journal: records.Journal) -> None:
        raise error

    return work


def _triton_errors() -> Iterator[BaseException]:
    try:
        from triton.runtime.errors import OutOfResources
    except ImportError:
        return
    yield OutOfResources(300_000, 232_448, "shared memory")


def test_whatever_is_raised_is_a_row_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "STAND_IN", False)
    errors = [
        *(RuntimeError("of CUDA"), CompilationError("at 3:7"), AssertionError("of Inductor")),
        *(torch.OutOfMemoryError("tried to allocate"), KeyError("x"), MemoryError(), OSError("y")),
        *_triton_errors(),
    ]
    work = {f"error {i}": _raise(error) for i, error in enumerate(errors)}
    work["last"] = lambda journal: journal.row(case="last", value=2.0)
    output = tmp_path / "record.json"
    args = programs.arguments("").parse_args(["--device", "cpu", "--output", str(output)])
    assert programs.work_through(work, args) == 1
    rows = json.loads(output.read_text())["rows"]
    for row, error in zip(rows, errors, strict=False):
        assert row["failed"].startswith(type(error).__name__)
    assert rows[-1] == {"case": "last", "value": 2.0}


def test_what_the_budget_leaves_out_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "STAND_IN", False)
    output = tmp_path / "record.json"
    arguments = ["--device", "cpu", "--output", str(output), "--budget", "0"]
    args = programs.arguments("").parse_args(arguments)
    assert programs.work_through({"a": _raise(KeyError())}, args) == 0
    (row,) = json.loads(output.read_text())["rows"]
    assert row == {"case": "a", "left_out": "the budget of 0 s was spent"}


def test_a_contender_that_fails_while_it_is_timed_is_dropped() -> None:
    calls, failures = {"good": 0, "bad": 0}, {}

    def call(name: str, index: int) -> None:
        calls[name] += 1
        if name == "bad" and calls[name] == 4:
            raise torch.OutOfMemoryError("tried to allocate 9 GiB\nand more")

    times = harness.interleave(
        {name: lambda index, name=name: call(name, index) for name in calls},
        device="cpu",
        seconds=0.0,
        minimum_rounds=6,
        failed=lambda name, why: failures.update({name: why}),
    )
    assert calls == {"good": 8, "bad": 4}
    assert set(times) == {"good"}
    assert failures == {"bad": "OutOfMemoryError: tried to allocate 9 GiB"}


def test_the_reason_is_what_happened_first() -> None:
    try:
        try:
            raise ValueError("the cause\nand details")
        finally:
            raise RuntimeError("left with an error too")
    except RuntimeError as error:
        reason = harness.reason(error)
    assert reason == "RuntimeError: left with an error too (after ValueError: the cause)"


def test_training_rehearses_before_it_writes_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (reason := extras.why_no_train()) is not None:
        pytest.skip(reason)
    import bench_training

    written: list[int] = []

    def write_files(directory: Path, count: int, classes: int) -> None:
        written.append(count)
        raise ModuleNotFoundError("No module named 'google_crc32c'")

    output = tmp_path / "record.json"
    monkeypatch.setattr(bench_training, "write_files", write_files)
    arguments = ["bench_training.py", "--device", "cpu", "--output", str(output)]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit, match="ModuleNotFoundError: No module named 'google_crc32c'"):
        bench_training.main()
    assert written == [8]
    assert not output.exists()


def test_training_keeps_the_rows_of_what_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (reason := extras.why_no_train()) is not None:
        pytest.skip(reason)
    import bench_training

    class Contender:
        images, run = 8, SimpleNamespace(form=SimpleNamespace(size=32))

        def __init__(self, settings: Any) -> None:
            if settings.rows == "all":
                raise AssertionError("a stride")

        def epoch(self) -> tuple[float, float]:
            return 2.0, 0.5

        def loader(self) -> float:
            return 1.0

    output = tmp_path / "record.json"
    monkeypatch.setattr(records, "STAND_IN", False)
    monkeypatch.setattr(bench_training, "write_files", lambda *of: None)
    monkeypatch.setattr(bench_training, "rehearse", lambda *of: None)
    monkeypatch.setattr(bench_training, "Contender", Contender)
    arguments = ["bench_training.py", "--device", "cpu", "--models", "vit_tiny", "resnet18"]
    monkeypatch.setattr("sys.argv", [*arguments, "--output", str(output)])
    assert bench_training.main() == 1
    rows = json.loads(output.read_text())["rows"]
    for case in ("vit_tiny, batches of 256", "resnet18, batches of 256"):
        found = {row["implementation"]: row for row in rows if row["case"] == case}
        assert found[bench_training.PLAIN]["value"] == 4.0
        assert found[bench_training.LOADER]["value"] == 8.0
        assert found["harmonized, all rows"]["failed"] == "AssertionError: a stride"


# --- records --------------------------------------------------------------------------------------


def test_a_record_of_the_stand_in_has_no_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "STAND_IN", True)
    path = tmp_path / "record.json"
    records.write(path, {"rows": [{"case": "a", "value": 1.5, "batch": 2, "times": [0.5, 1]}]})
    written = json.loads(path.read_text())
    assert "no GPU" in written.pop("stand_in")
    assert written == {"rows": [{"case": "a", "batch": 2, "times": [1]}]}
    with pytest.raises(ValueError, match="another folder for a record of the stand-in"):
        records.write(harness.RESULTS / "2026-01-01-h200.json", {})


def test_a_record_is_whole_whenever_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "STAND_IN", False)
    path = tmp_path / "record.json"
    contents = [{"rows": [number] * 20_000} for number in range(2)]
    records.write(path, contents[0])
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(lambda: [records.write(path, contents[i % 2]) for i in range(40)])
        while not writing.done():
            assert json.loads(path.read_text()) in contents
        writing.result()
