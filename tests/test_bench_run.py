"""The benchmark: what it will measure, and that its contestants compute the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_instructions
import bench_loss
import bench_step
import harness
import peers_tensorflow
import pytest
import run
import sections
import torch
from torch import nn

import harmonizer_ext as hx


@pytest.fixture
def options() -> sections.Options:
    """Options of a run without flags on a machine without a GPU."""
    return sections.Options(
        batch={"cpu": 32},
        size=224,
        seconds=15,
        quick=False,
        compiled=True,
        compiled_steps=False,
        tensorflow=True,
    )


def test_a_default_run_is_planned_to_take_less_than_five_minutes(
    options: sections.Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_step, "why_no_networks", lambda: None)
    wanted = [name for name in sections.SECTIONS if name not in sections.ON_REQUEST]
    steps = sections.plan(wanted, ["cpu"], options, sections.LeftOut())
    assert {step.section for _, step in steps} == set(wanted)
    assert sum(step.seconds for _, step in steps) < 300


def test_what_is_missing_is_said_with_its_reason(
    options: sections.Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_step, "why_no_networks", lambda: "no timm")
    left_out = sections.LeftOut()
    assert sections.plan(["step"], ["cpu"], options, left_out) == []
    assert left_out.entries == [{"what": "the training step", "why": "no timm"}]


def test_names_of_cases_are_unique(options: sections.Options) -> None:
    names = [case.name for case in sections.headline_cases(options, "cpu")]
    names += [case.name for _, case in sections.sweep_cases(options, "cpu")]
    assert max(Counter(names).values()) == 1


def test_a_case_survives_the_way_to_another_process(options: sections.Options) -> None:
    for _, case in sections.sweep_cases(options, "cpu"):
        assert bench_loss.Case.from_json(case.to_json()) == case


@pytest.mark.parametrize(
    ("dtype", "gradient", "expected"),
    [
        (torch.float32, True, 3 * 4 + 4 + 4),
        (torch.float32, False, 3 * 4 + 4),
        # The human map stays in float32.
        (torch.bfloat16, True, 3 * 2 + 4 + 2),
        (torch.float64, True, 3 * 8 + 8 + 8),
    ],
)
def test_bytes_on_the_model(dtype: torch.dtype, gradient: bool, expected: int) -> None:
    case = bench_loss.Case("", 2, 8, 4, dtype, gradient=gradient)
    assert case.bytes_per_pixel == expected
    assert case.bytes == 2 * 8 * 4 * expected


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("levels", [3, 5])
@pytest.mark.parametrize("formulation", ["released", "paper"])
def test_contestants_agree(formulation: str, levels: int, channels_last: bool) -> None:
    case = bench_loss.Case(
        "",
        2,
        33,
        40,
        torch.float32,
        formulation,
        headline=True,
        levels=levels,
        channels_last=channels_last,
    )
    maps = case.maps("cpu", 0)
    found = bench_loss.implementations(case, "cpu", compiled=False)
    expected = found["reference: harmonization_loss"](*maps)
    for name, implementation in found.items():
        bench_loss.check_agreement(case, name, implementation(*maps), expected)


def test_a_wrong_contestant_is_refused() -> None:
    case = bench_loss.Case("", 1, 8, 8, torch.float32)
    right = (torch.tensor(1.0), torch.ones(1, 3, 8, 8))
    for wrong in ((torch.tensor(1.1), right[1]), (right[0], 1.1 * right[1])):
        with pytest.raises(RuntimeError, match=r"of impostor is .* off the reference"):
            bench_loss.check_agreement(case, "impostor", wrong, right)


@pytest.fixture(scope="module")
def tensorflow() -> Iterator[peers_tensorflow.TensorFlowPeer]:
    try:
        peer = peers_tensorflow.TensorFlowPeer(1)
    except peers_tensorflow.TensorFlowError as error:
        pytest.skip(str(error))
    with peer:
        yield peer


@pytest.mark.parametrize("levels", [3, 5])
def test_the_released_code_in_its_process_agrees(
    tensorflow: peers_tensorflow.TensorFlowPeer, levels: int
) -> None:
    case = bench_loss.Case("", 2, 33, 40, torch.float32, levels=levels)
    maps = case.maps("cpu", 0)
    run = bench_loss.through_autograd(
        lambda *of: hx.harmonization_loss(*of, levels=levels, backend="reference"), gradient=True
    )
    loss, gradient = run(*(m.double() for m in maps))
    for call in tensorflow.load(maps, levels, gradient=True, sets=2).values():
        got, got_gradient = call.result()
        # Float32 sums of a thousand pixels, in blocks.
        torch.testing.assert_close(got.double(), loss.detach(), rtol=1e-5, atol=0)
        error = (got_gradient - gradient).abs().amax()
        assert error <= 1e-4 * gradient.abs().amax()
        assert call.milliseconds(1) > 0


def _failing(name: str, error: Exception) -> Any:
    implementations = bench_loss.implementations

    def found(*of: Any) -> dict[str, bench_loss.Run]:
        def run(*maps: torch.Tensor) -> object:
            raise error

        return implementations(*of) | {name: run}

    return found


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("9 GiB"), AssertionError("a stride"), KeyError("kernel")]
)
def test_a_contender_that_fails_is_said_and_the_others_are_timed(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    case = bench_loss.Case("tiny", 1, 8, 8, torch.float32)
    monkeypatch.setattr(bench_loss, "implementations", _failing("broken", error))
    left_out = sections.LeftOut()
    times = bench_loss.measure_time(
        [case], "cpu", False, 0.0, failed=left_out.failed, minimum_rounds=2
    )
    assert ("tiny", "broken") not in times
    assert ("tiny", "eager_released") in times
    assert left_out.failures == 1
    (entry,) = left_out.entries
    assert entry["what"] == "tiny, broken"
    assert entry["why"].startswith(type(error).__name__)


def test_a_wrong_contender_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = bench_loss.Case("tiny", 1, 8, 8, torch.float32)
    implementations = bench_loss.implementations
    monkeypatch.setattr(
        bench_loss,
        "implementations",
        lambda *of: (
            implementations(*of)
            | {"wrong": lambda x, y, w: (torch.tensor(1e3), torch.ones_like(x))}
        ),
    )
    left_out = sections.LeftOut()
    times = bench_loss.measure_time(
        [case], "cpu", False, 0.0, failed=left_out.failed, minimum_rounds=2
    )
    assert ("tiny", "wrong") not in times
    assert "off the reference" in left_out.entries[0]["why"]


def test_a_backend_that_refuses_a_dtype_is_no_contender(monkeypatch: pytest.MonkeyPatch) -> None:
    # As both fused backends of a GPU refuse float64.
    monkeypatch.setattr(
        hx.backends.get("cpu"),
        "why_not",
        lambda kind, dtype=None, index=None: "float32 only" if dtype == torch.float64 else None,
    )
    found = {
        dtype: list(bench_loss.implementations(bench_loss.Case("", 1, 8, 8, dtype), "cpu", False))
        for dtype in (torch.float32, torch.float64)
    }
    assert "cpu: op" in found[torch.float32]
    assert not any(name.startswith("cpu") for name in found[torch.float64])


def test_a_step_that_does_not_compile_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = _problem()

    def broken() -> None:
        raise AssertionError("expected size 4==4, stride 16==1 at dim=1")

    monkeypatch.setattr(bench_step.Problem, "of", lambda *of: problem)
    compiled = {bench_step.ALL_ROWS + bench_step.COMPILED: broken}
    monkeypatch.setattr(bench_step.Problem, "compiled_steps", lambda self: compiled)
    failures: dict[str, str] = {}
    rows = bench_step.measure(
        problem.workload, "cpu", 0.0, True, failures.__setitem__, rounds=2, top=3
    )
    assert list(failures) == list(compiled)
    assert failures[bench_step.ALL_ROWS + bench_step.COMPILED].startswith("AssertionError: expec")
    measured = {row["implementation"] for row in rows if "value" in row}
    assert measured == {*problem.steps(), *problem.losses()}
    (kernels,) = [row for row in rows if row.get("quantity") == "kernel"]
    assert "no profiler for a GPU" in kernels["left_out"]


def test_a_section_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> list[Any]:
        raise torch.OutOfMemoryError("tried to allocate 100 GiB")

    def plan(*of: Any) -> list[tuple[str, sections.Step]]:
        row = {"case": "x", "implementation": "y", "quantity": "q", "unit": "s", "value": 1.0}
        return [
            ("cpu", sections.Step("import", "broken", 1.0, broken)),
            ("cpu", sections.Step("import", "good", 1.0, lambda: [row])),
        ]

    output = tmp_path / "record.json"
    monkeypatch.setattr(sections, "plan", plan)
    monkeypatch.setattr(
        "sys.argv", ["run.py", "--quick", "--device", "cpu", "--no-plots", "--output", str(output)]
    )
    assert run.main() == 1
    record = run.records.load(output)
    assert [row["value"] for row in record["rows"]] == [1.0]
    assert record["left_out"] == [
        {
            "what": "import on cpu: broken",
            "why": "OutOfMemoryError: tried to allocate 100 GiB",
        }
    ]


def _problem(batch: int = 4) -> bench_step.Problem:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    generator = torch.Generator().manual_seed(1)
    tokens = torch.zeros(batch)
    tokens[1] = 1
    return bench_step.Problem(
        bench_step.Workload("tiny", batch, 32),
        model,
        torch.optim.SGD(model.parameters(), lr=1e-9),
        torch.randn(batch, 3, 32, 32, generator=generator),
        torch.randint(4, (batch,), generator=generator),
        torch.rand(batch, 32, 32, generator=generator),
        tokens,
    )


def test_steps_compute_the_same_loss() -> None:
    problem = _problem()
    eager, fused = problem.eager_loss(), problem.harmonized_loss("all")
    # Float32 sums of a thousand pixels, twice.
    torch.testing.assert_close(fused, eager, rtol=1e-5, atol=0)
    plain, mapped = problem.plain_loss(), problem.harmonized_loss("mapped")
    assert plain < mapped < fused


def test_every_step_updates_and_leaves_no_gradient() -> None:
    for name, step in _problem().steps().items():
        problem = _problem()
        problem.optimizer.param_groups[0]["lr"] = 1e-3
        before = [parameter.detach().clone() for parameter in problem.model.parameters()]
        problem.steps()[name]()
        for old, new in zip(before, problem.model.parameters(), strict=True):
            assert not torch.equal(old, new), name
            assert new.grad is None
        step()


def test_calls_of_another_process_take_their_turn() -> None:
    class Remote:
        indices: list[int] = []  # noqa: RUF012  shared on purpose

        def milliseconds(self, index: int) -> float:
            self.indices.append(index)
            return 7.0

    calls: dict[str, Any] = {"here": lambda index: index, "there": Remote()}
    times = harness.interleave(calls, device="cpu", seconds=0.0, minimum_rounds=3)
    assert times["there"].median == 7.0
    assert times["there"].samples == times["here"].samples == 3


def test_a_run_writes_a_record_with_a_unit_in_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "record.json"
    arguments = ["run.py", "--quick", "--only", "latency", "--device", "cpu", "--no-plots"]
    arguments += ["--seconds", "0.01", "--output", str(output)]
    monkeypatch.setattr("sys.argv", arguments)
    threads = torch.get_num_threads()
    assert run.main() == 0
    assert torch.get_num_threads() == threads
    record = run.records.load(output)
    assert {row["case"] for row in record["rows"]} >= {"one image", "one small image"}
    for row in record["rows"]:
        assert (row["unit"], row["section"], row["device"]) == ("ms", "latency", "cpu")
        assert row["value"] > 0
    assert "one small image" in capsys.readouterr().out
    # The same machine, compared with itself.
    monkeypatch.setattr("sys.argv", [*arguments, "--baseline", str(output)])
    assert run.main() == 0
    assert "Since " in capsys.readouterr().out


@pytest.mark.skipif(
    bench_instructions.why_not() is not None, reason=str(bench_instructions.why_not())
)
def test_instructions_are_counted() -> None:
    """A sum executes in proportion to its length; the rest is the same and drops out."""
    one, two, four = (bench_instructions.count(lambda n=n: sum(range(n))) for n in (60, 120, 240))
    assert two > one
    assert (four - two) / (two - one) == pytest.approx(2, rel=0.2)
