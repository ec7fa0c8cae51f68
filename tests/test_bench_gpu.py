"""What the programs for a machine with a GPU do around the GPU: reports, verdicts, refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_check
import gpu_sweep
import pytest
import torch

from harmonizer_ext import backends

TESTS = """
import pytest

def test_right(): pass
def test_wrong(): assert 1 == 2
def test_left_out(): pytest.skip("no reason")
@pytest.fixture
def broken(): raise KeyError("broken")
def test_error(broken): pass
"""


def run_pytest(folder: Path, report: Path) -> gpu_check.Done:
    (folder / "tests").mkdir()
    (folder / "tests" / "test_some.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--rootdir=."]
    done = subprocess.run(
        [*command, f"--junitxml={report}", "tests"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    return gpu_check.Done(done.returncode, done.stdout, 1.0)


def test_a_report_is_counted(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    done = run_pytest(tmp_path, report)
    counts = gpu_check.parse_report(report, done)
    failures = counts.pop("failures")
    assert counts == {"passed": 1, "failed": 2, "skipped": 1}
    assert [text.partition(":")[0] for text in failures] == ["tests.test_some"] * 2
    assert "test_wrong: assert 1 == 2" in failures[0]
    assert "test_error" in failures[1]


@pytest.mark.parametrize(("status", "why"), [(None, "killed at the limit"), (-11, "status -11")])
def test_what_a_crash_had_printed_is_counted(tmp_path: Path, status: int | None, why: str) -> None:
    done = run_pytest(tmp_path, tmp_path / "report.xml")
    # As far as a crash in the last test would have let it come.
    printed = done.output[: done.output.index("tests/test_some.py::test_error") + 30]
    crashed = gpu_check.Done(status, printed, 1.0)
    counts = gpu_check.parse_report(tmp_path / "none.xml", crashed)
    failures = counts.pop("failures")
    assert counts == {"passed": 1, "failed": 2, "skipped": 1}
    assert failures[0] == "tests/test_some.py::test_wrong"
    assert f"{why}, the last test was tests/test_some.py::test_error" in failures[1]


@pytest.mark.parametrize(
    ("step", "outcome", "good"),
    [
        ("self_test", {"status": 0}, True),
        ("self_test", {"status": 1}, False),
        ("self_test", {"status": None}, False),
        ("tests", {"passed": 9, "failed": 0, "not_run": 0}, True),
        ("tests", {"passed": 9, "failed": 1, "not_run": 0}, False),
        ("tests", {"passed": 9, "failed": 0, "not_run": 1}, False),
        ("tests", {"passed": 0, "failed": 0, "not_run": 0}, False),
        ("sanitizer", {"memcheck: cuda": 0, "racecheck: cuda": 0}, True),
        ("sanitizer", {"memcheck: cuda": 0, "racecheck: cuda": 3}, False),
        ("sanitizer", {"memcheck: cuda": "not run: no time was left"}, False),
    ],
)
def test_verdict(step: str, outcome: dict[str, Any], good: bool) -> None:
    assert gpu_check.verdict({"backends": ["cuda"], step: outcome}, [step]) is good


def test_verdict_without_a_backend_or_rows() -> None:
    assert not gpu_check.verdict({"backends": [], "self_test": {"status": 0}}, ["self_test"])
    assert not gpu_check.verdict({"backends": ["cuda"], "rows": []}, ["benchmark"])
    assert not gpu_check.verdict({"backends": ["cuda"], "rows": [1], "error": ""}, ["benchmark"])
    assert gpu_check.verdict({"backends": ["cuda"], "rows": [1]}, ["benchmark"])


def test_every_test_that_needs_a_gpu_is_collected() -> None:
    for name in ("test_gpu.py", "test_step_gpu.py"):
        assert name in gpu_check.FIRST
    for name in (*gpu_check.FIRST, *(name for name in gpu_check.ELSEWHERE if "*" not in name)):
        assert (gpu_check.ROOT / "tests" / name).exists(), name


def test_a_run_is_cut_off_at_its_limit() -> None:
    program = "import time; print('begun', flush=True); time.sleep(60)"
    done = gpu_check.run([sys.executable, "-c", program], gpu_check.time.monotonic() + 3)
    assert done.status is None
    assert done.output.startswith("begun")
    assert done.seconds < 30


def test_the_sweep_prints_every_contender(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"case": "released", "megabytes": 1.0, "quantile_20": 0.1, "quantile_80": 0.3}
    row |= {"gigabytes_per_second": 5.0, "times_copy": 2.0}
    shape = {"cluster": 4, "threads": 224, "shared_bytes": 1000}
    gpu_sweep.print_rows(
        [
            row | {"implementation": "slow", "value": 0.2},
            row | shape | {"implementation": "fast", "value": 0.1},
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split() == [
        "fast",
        "100.0",
        "100.0",
        "..",
        "300.0",
        "5",
        "2.00",
        "4,",
        "224,",
        "1000",
    ]
    assert " ".join(lines[-1].split()) == "slow 200.0 100.0 .. 300.0 5 2.00"


def test_the_sweep_lists_what_is_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = backends.get("cuda").why_not_built()
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(sys, "argv", ["gpu_sweep.py", "--list"])
    assert gpu_sweep.main() == 0
    printed = capsys.readouterr().out
    for formulation in gpu_sweep.FORMULATIONS:
        assert f"'formulation': '{formulation}'" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
@pytest.mark.parametrize("program", [gpu_check, gpu_sweep])
def test_no_gpu_is_said_and_nothing_written(
    program: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    output = tmp_path / "record.json"
    monkeypatch.setattr(sys, "argv", ["program", "--output", str(output)])
    assert program.main() == 2
    assert "nothing was run and nothing was written" in capsys.readouterr().err
    assert not output.exists()
