"""The programs for a machine with a GPU: nothing ends them, and their record is whole whenever."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_ptx_on_host
import gpu_check
import gpu_on_host
import gpu_run
import gpu_sweep
import pytest
import records
import torch

from harmonizer_ext import backends

ROOT = Path(__file__).resolve().parent.parent
NO_FIGURES = {"name": "test", "devices": {}}

#: Says through the pipe what it does; what goes wrong is its third argument.
PROGRAM = """
import faulthandler, json, os, signal, subprocess, sys, time
from pathlib import Path
import records

output, *arguments = sys.argv[sys.argv.index("--output") + 1 :]
skip = ()
if "--skip" in arguments:
    skip = json.loads(Path(arguments[arguments.index("--skip") + 1]).read_text())
journal = records.Journal(Path(output), skip)
journal.plan(["first", "second", "third"])
for name in ("first", "second", "third"):
    if name in skip or not journal.begin(name):
        continue
    if name == "second":
        match sys.argv[1]:
            case "segfault":
                print("the last words", flush=True)
                os.kill(os.getpid(), signal.SIGSEGV)
            case "hang":
                time.sleep(100)
            case "lost":
                journal.row(case=name, failed="an access outside")
                sys.exit(70)
            case "exit":
                sys.exit("no more")
            case "orphans":
                hidden = "import time; time.sleep(100)"
                for _ in range(3):
                    subprocess.Popen([sys.executable, "-c", hidden], start_new_session=True)
    time.sleep(float(os.environ.get("PAUSE", "0")))
    journal.row(case=name, value=1.5)
    journal.end(name)
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> gpu_run.Record:
    monkeypatch.setattr(records, "STAND_IN", False)
    return gpu_run.Record(tmp_path / "record.json", machine=NO_FIGURES)


def drive(program: Path, trouble: str, record: gpu_run.Record, **options: Any) -> gpu_run.Ended:
    command = [sys.executable, str(program), trouble, "--output", gpu_run.JOURNAL]
    options = {"deadline": time.monotonic() + 60, "patience": 30} | options
    return gpu_run.drive("step", command, record=record, **options)


def processes_with(text: str) -> list[int]:
    """Processes in whose environment something is."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if text in path.read_text(errors="replace"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


# --- one process ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("segfault", f"killed by signal {int(signal.SIGSEGV)}; last: the last words"),
        ("hang", "nothing was heard of it any more; last: "),
        ("lost", "an access outside"),
    ],
)
def test_a_process_that_ends_has_its_row_and_the_rest_goes_on(
    program: Path, record: gpu_run.Record, trouble: str, reason: str
) -> None:
    ended = drive(program, trouble, record, patience=10 if trouble == "hang" else 30)
    assert ended.status == 0
    record.save()
    written = json.loads(record.path.read_text())["steps"]["step"]
    assert written["planned"] == 3
    assert written["done"] == 2
    rows = {row["case"]: row for row in written["rows"]}
    assert list(rows) == ["first", "second", "third"]
    assert rows["first"]["value"] == rows["third"]["value"] == 1.5
    assert rows["second"]["failed"].startswith(reason)
    if trouble == "hang":  # where it hung
        assert "program.py" in rows["second"]["failed"]
    assert not gpu_check.good(written | {"ended": ended.reason})


def test_a_step_is_cut_off_at_its_limit(program: Path, record: gpu_run.Record) -> None:
    start = time.monotonic()
    ended = drive(program, "hang", record, deadline=start + 10)
    assert time.monotonic() - start < 60
    assert ended.status is None
    rows = record["step"]["rows"]
    assert [row["case"] for row in rows] == ["first", "second"]
    assert rows[1]["failed"].startswith("its time was over")


def test_what_cannot_be_killed_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_run, "GRACE", 0.5)
    # In the place of a keeper whose command waits for a driver that does not answer.
    with subprocess.Popen(["sleep", "100"], stdin=subprocess.PIPE) as keeper:
        reading, writing = os.pipe()
        start = time.monotonic()
        ended = gpu_run._listen(keeper, reading, lambda event: None, start + 0.2, 1e9)
        assert time.monotonic() - start < 20
        assert ended.status is None
        keeper.kill()
    os.close(reading)
    os.close(writing)


def test_a_full_disk_or_half_a_line_does_not_end_the_check(
    program: Path, record: gpu_run.Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = records.write, iter(range(1000))

    def full(path: Path, content: Any) -> None:
        if next(calls) == 2:
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(records, "write", full)
    program.write_text(
        program.read_text().replace("journal.plan(", "journal._pipe.write('{x\\n')\njournal.plan(")
    )
    assert drive(program, "nothing", record).status == 0
    record.save()
    assert len(json.loads(record.path.read_text())["steps"]["step"]["rows"]) == 3


def test_an_error_of_the_check_itself_is_one_step(
    program: Path, record: gpu_run.Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    do = gpu_check.do

    def broken(step: gpu_check.Step, *of: Any) -> None:
        if step.name == "step 0":
            raise OSError("no more pipes")
        do(step, *of)

    monkeypatch.setattr(gpu_check, "do", broken)
    gpu_check.check(_steps(program), {}, record, time.monotonic())
    steps = json.loads(record.path.read_text())["steps"]
    assert "no more pipes" in steps["step 0"]["ended"]
    assert [gpu_check.good(step) for step in steps.values()] == [False, True]


def test_an_error_of_the_whole_program_is_a_row(program: Path, record: gpu_run.Record) -> None:
    ended = gpu_run.drive(
        "step", [sys.executable, "-c", "import no_such_module"], time.monotonic() + 30, record,
        patience=30,
    )  # fmt: skip
    assert ended.status == 1
    assert not gpu_check.good(record["step"] | {"ended": ended.reason})


def test_nothing_outlives_its_process(
    program: Path, record: gpu_run.Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = f"HARMONIZER_TEST_MARK={os.getpid()}"
    monkeypatch.setenv(*mark.split("="))
    assert drive(program, "orphans", record).status == 0
    assert len(record["step"]["rows"]) == 3
    assert processes_with(mark) == []


def test_a_command_dies_with_its_keeper(monkeypatch: pytest.MonkeyPatch) -> None:
    mark = f"HARMONIZER_TEST_MARK=keeper-{os.getpid()}"
    keeper = subprocess.Popen(
        [sys.executable, str(ROOT / "bench" / "keeper.py"), "sleep", "100"],
        stdin=subprocess.PIPE,
        env=os.environ | dict([mark.split("=")]),
    )
    until = time.monotonic() + 30
    while len(processes_with(mark)) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    keeper.kill()
    keeper.communicate()
    while processes_with(mark) and time.monotonic() < until:
        time.sleep(0.02)
    assert processes_with(mark) == []


# --- killed at any moment -------------------------------------------------------------------------

CHECK = """
import sys
from pathlib import Path
import gpu_check, gpu_run

program, output = sys.argv[1:]
gpu_check.python = lambda arguments: [sys.executable, *arguments]
steps = [
    gpu_check.Step(f"step {i}", 20, (program, "orphans"), (program, "orphans")) for i in range(6)
]
import time
record = gpu_run.Record(Path(output), machine={})
record.save()
gpu_check.check(steps, {}, record, time.monotonic())
"""


@pytest.mark.parametrize("of_group", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_kill_leaves_a_whole_record_and_no_process(
    program: Path, tmp_path: Path, seed: int, of_group: bool
) -> None:
    output, mark = tmp_path / "record.json", f"mark-{os.getpid()}-{seed}-{of_group}"
    path = os.pathsep.join((str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")))
    check = subprocess.Popen(
        [sys.executable, "-c", CHECK, str(program), str(output)],
        env={**os.environ, "HARMONIZER_TEST_MARK": mark, "PAUSE": "0.05", "PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    started = time.monotonic()
    while not (output.exists() and json.loads(output.read_text())["steps"]):
        assert time.monotonic() - started < 60
        time.sleep(0.02)
    time.sleep(random.Random(seed).uniform(0.0, 2.0))
    (os.killpg if of_group else os.kill)(check.pid, signal.SIGKILL)
    check.wait()
    steps = json.loads(output.read_text())["steps"]
    for step in steps.values():
        assert {"ended", "planned", "done", "rows"} <= set(step)
        assert all(row == {"case": row["case"], "value": 1.5} for row in step["rows"])
    # The keeper gives a program three seconds for its last words.
    until = time.monotonic() + 20
    while processes_with(mark) and time.monotonic() < until:
        time.sleep(0.1)
    assert processes_with(mark) == []


# --- the plan -------------------------------------------------------------------------------------


def test_the_plan_takes_less_than_nine_minutes_and_exists() -> None:
    assert gpu_check.DESCRIBE + sum(step.seconds for step in gpu_check.PLAN) <= 9 * 60
    order = [step.name for step in gpu_check.PLAN]
    assert order[:4] == ["self_test", "sweep", "loss", "gpu_tests"]
    assert order.index("sanitizers") > order.index("training_step")
    assert order[-1] == "compiled_step"
    for step in gpu_check.PLAN:
        for argument in (*step.arguments, *step.small):
            if argument.endswith(".py"):
                assert (ROOT / argument).exists(), argument


def _steps(program: Path, count: int = 2) -> list[gpu_check.Step]:
    arguments = (str(program), "nothing")
    return [
        gpu_check.Step(f"step {i}", 30, arguments, arguments, beside_build=i == 1)
        for i in range(count)
    ]


def test_a_build_that_fails_is_recorded_and_the_rest_runs_beside_and_behind_it(
    program: Path, record: gpu_run.Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[str] = []

    def build(capability: str, deadline: float) -> dict[str, Any]:
        while "step 1" not in began:
            time.sleep(0.01)
        return {"failed": "exit status 1", "compiler_said_last": ["loss.cu(3): error: no"]}

    do = gpu_check.do
    monkeypatch.setattr(gpu_check, "build", build)
    monkeypatch.setattr(
        gpu_check, "do", lambda step, *of: (began.append(step.name), do(step, *of))[1]
    )
    machine = {"why_no_cuda_kernels": "built for sm_80", "compute_capability": "9.0"}
    gpu_check.check(_steps(program), machine, record, time.monotonic())
    assert began == ["step 1", "step 0"]
    written = json.loads(record.path.read_text())
    assert written["build"]["compiler_said_last"] == ["loss.cu(3): error: no"]
    assert [gpu_check.good(step) for step in written["steps"].values()] == [True, True]


def test_the_compilers_last_lines_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, script in {
        "nvcc": "echo 'release 13.0'",
        "cmake": "echo 'loss.cu(3): error: expected a ;' >&2; exit 1",
        "ninja": "exit 1",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nvcc"))
    native = {path: path.stat().st_mtime_ns for path in (ROOT / "harmonizer_ext").glob("*.so")}
    result = gpu_check.build("9.0", time.monotonic() + 60)
    assert result["failed"] == "exit status 1"
    assert "loss.cu(3): error: expected a ;" in result["compiler_said_last"]
    assert native == {path: path.stat().st_mtime_ns for path in native}


def test_what_no_time_is_left_for_is_said(program: Path, record: gpu_run.Record) -> None:
    gpu_check.check(_steps(program), {}, record, time.monotonic() - 1000)
    assert [step["ended"] for step in record.content["steps"].values()] == [
        "left out: no time was left"
    ] * 2


# --- all of it ------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
@pytest.mark.parametrize(
    "command",
    [["bash", "bench/gpu_check.sh"], [sys.executable, "bench/gpu_sweep.py"]],
    ids=["check", "sweep"],
)
def test_no_gpu_is_said_and_nothing_written(command: list[str], tmp_path: Path) -> None:
    output = tmp_path / "record.json"
    environment = {k: v for k, v in os.environ.items() if k != gpu_on_host.VARIABLE}
    result = subprocess.run(
        [*command, "--output", str(output)],
        cwd=ROOT,
        env={**environment, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2, result.stderr
    assert "nothing was run and nothing was written" in result.stderr.replace("\n", " ")
    assert not output.exists()


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


def test_the_sweep_asks_for_memory_behind_what_is_resident() -> None:
    # 132 processors with two blocks each, four blocks a sample.
    assert gpu_sweep.samples_at_once({"name": "224/4x2 signals", "cluster": 4}, 132) == 66


@pytest.mark.skipif(
    gpu_on_host.why_not_here() is not None, reason=f"stand-in: {gpu_on_host.why_not_here()}"
)
def test_the_whole_check_on_the_stand_in(tmp_path: Path) -> None:
    with_cuda = cuda_ptx_on_host.why_not_here() is None and backends.get("cuda").why_not_built()
    if cuda_ptx_on_host.why_not_here() is None:
        cuda_ptx_on_host.program()  # minutes, the first time
    output = tmp_path / "record.json"
    result = subprocess.run(
        ["bash", "bench/gpu_check.sh", "--output", str(output)],
        cwd=ROOT,
        env={**os.environ, gpu_on_host.VARIABLE: "1", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    text = output.read_text()
    record = json.loads(text)
    assert "no GPU" in record["stand_in"]
    assert "stand-in" in record["machine"]["gpu"]
    assert record["verdict"] == "all well"
    assert list(record["steps"]) == [step.name for step in gpu_check.PLAN]
    fused = {"triton"} if with_cuda is not None else {"triton", "cuda"}
    implementations = {row.get("implementation") for row in record["steps"]["loss"]["rows"]}
    for backend in fused:
        assert {f"{backend}: op", f"{backend}: op, CUDA graph"} <= implementations
    assert {"eager_released, CUDA graph", "eager_paper, CUDA graph"} <= implementations
    for name in ("gpu_tests", "triton_tests"):
        assert record["steps"][name]["tally"]["passed"] > 0

    def numbers(value: Any) -> Iterator[float]:
        if isinstance(value, dict | list):
            for part in value.values() if isinstance(value, dict) else value:
                yield from numbers(part)
        elif isinstance(value, float):
            yield value

    assert list(numbers(record)) == []
