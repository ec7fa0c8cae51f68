"""Tables, goals, comparison and pictures of a record: every figure is that of a row."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import goals
import pytest
import records
import table

LOSS = {
    "device": "cpu",
    "threads": 2,
    "saliency": [32, 3, 224, 224],
    "dtype": "float32",
    "levels": 5,
    "computed": "loss and gradient",
    "bytes_per_pixel": 20,
    "megabytes": 32.1,
}
COMPILED = ("torch.compile(eager_one_pyramid)", "torch.compile(shifted_slices)")


def _time(value: float, **columns: Any) -> dict[str, Any]:
    quantiles = {"quantile_20": 0.9 * value, "quantile_80": 1.2 * value}
    quantiles |= {"lower_quartile": 0.95 * value, "minimum": 0.8 * value, "samples": 15}
    return {**columns, "quantity": "time", "unit": "ms", "value": value, **quantiles}


def _loss_rows(section: str, case: str, times: dict[str, float], **columns: Any) -> list[Any]:
    """Rows of one case as ``bench_loss.time_rows`` makes them."""
    found = []
    for name, value in times.items():
        row = {"section": section, **LOSS, "case": case, "implementation": name, **columns}
        row |= {"gigabytes_per_second": 32.1 / value, "times_copy": value / times[records.COPY]}
        found.append(_time(value, **row))
    return found


def _peak(case: str, name: str, value: float) -> dict[str, Any]:
    row = {"section": "memory", **LOSS, "case": case, "implementation": name}
    return row | {"quantity": "peak extra memory", "unit": "MB", "value": value}


def _step_rows(network: str) -> list[dict[str, Any]]:
    case = f"{network} 16x3x96x96"
    base = {"section": "step", "device": "cpu", "case": case, "network": network}
    base |= {"batch": 16, "size": 96, "mapped_rows": 2}
    times = {
        "cross entropy alone": 111.0,
        "harmonized, all rows": 333.0,
        "harmonized, rows with a map": 138.75,
        "harmonized, all rows, eager loss": 366.3,
    }
    found = [
        _time(v, **base, implementation=k, times_plain=v / 111.0) for k, v in times.items()
    ] + [
        _time(1.0, **base, implementation="loss on maps alone, fused", share_of_step=0.003),
        _time(33.0, **base, implementation="loss on maps alone, eager", share_of_step=0.09),
    ]
    for name, value in times.items():
        row = {**base, "implementation": name, "quantity": "peak extra memory", "unit": "MB"}
        found.append(row | {"value": value * 2, "times_plain": value / 111.0})
    if network == "resnet18":
        found[2]["note"] = "BatchNorm is special"
        name = "harmonized, all rows, torch.compile"
        found.append(_time(222.0, **base, implementation=name, times_plain=2.0))
    return found


@pytest.fixture
def record() -> dict[str, Any]:
    """A record as ``run.py`` writes it; the figures are made up and all different."""
    times = {
        records.COPY: 0.91,
        "cpu: op": 1.47,
        "cpu: harmonization_loss": 1.86,
        "reference: harmonization_loss": 50.1,
        "eager_released": 38.7,
        "eager_one_pyramid": 35.2,
        COMPILED[0]: 14.4,
        COMPILED[1]: 8.79,
        "TensorFlow, as released": 88.8,
        "TensorFlow, as released, tf.function": 44.4,
    }
    paper = {
        records.COPY: 0.92,
        "cpu: op": 1.67,
        "cpu: harmonization_loss": 1.99,
        "eager_paper": 45.1,
    }
    rows = _loss_rows("loss", "released", times, formulation="released")
    rows += _loss_rows("loss", "paper", paper, formulation="paper")
    alone = {name: value / 2 for name, value in times.items()}
    of = {"formulation": "released", "computed": "loss", "bytes_per_pixel": 16}
    rows += _loss_rows("loss", "released, loss only", alone, **of)
    odd = {name: times[name] * 1.25 for name in list(times)[:3]}
    of = {"formulation": "released", "saliency": [32, 3, 225, 223]}
    rows += _loss_rows("loss", "released, odd size", odd, **of)
    rows += [_peak("released", name, 7.4 if "cpu" in name else 71.0) for name in times]
    rows += [_peak("paper", name, 7.5 if "cpu" in name else 63.0) for name in paper]
    for batch in (1, 8, 64):
        here = {name: times[name] * batch / 32 for name in list(times)[:5]}
        of = {"formulation": "released", "saliency": [batch, 3, 224, 224], "varied": "batch"}
        swept = _loss_rows("sweep", f"sweep, batch {batch}", here, **of)
        rows += [row | {"times_faster_than_eager": 9.0} for row in swept]
    rows += _loss_rows(
        "latency", "one image, back to back", {k: v / 20 for k, v in list(times.items())[:3]}
    )
    rows += _step_rows("resnet18") + _step_rows("vit_tiny_patch16_224")
    package = {"section": "import", "device": "cpu", "case": "import"}
    rows.append(_time(1234.0, **package, implementation="import torch"))
    devices = {"cpu": {"name": "A Processor", "last_level_cache_bytes": 1, "backends": ["cpu"]}}
    machine = {"date": "2026-01-02T03:04:05+00:00", "commit": "abcdef", "devices": devices}
    machine |= {"threads": 2, "versions": {"torch": "2.13.0"}}
    counted = {**LOSS, "section": "instructions", "case": "released", "implementation": "cpu: op"}
    counted |= {"formulation": "released", "quantity": "instructions"}
    counted |= {"unit": "per pixel", "value": 11.65}
    rows.append(counted)
    return {
        "format": records.FORMAT,
        "machine": machine,
        "left_out": [{"what": "something", "why": "a reason"}],
        "rows": rows,
        "goals": goals.goals(rows),
    }


def _cells(markdown: str, start: str) -> list[str]:
    (line,) = [line for line in markdown.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_keys_of_rows_are_unique(record: dict[str, Any]) -> None:
    keys = [records.key(row) for row in record["rows"]]
    assert len(set(keys)) == len(keys)


def test_readme_shows_the_rows(record: dict[str, Any]) -> None:
    text = table.readme(record, Path("bench/results/x.json"))
    ours = "**fused C++ kernels**, the op alone"
    released, paper = text.split("`formulation='paper'`")
    # Time, times the copy, loss alone, memory.
    assert _cells(released, ours) == ["1.47", "1.62", "0.73", "7"]
    assert _cells(released, "the best `torch.compile`") == ["8.79", "9.66", "4.39", "71"]
    assert _cells(released, "the authors' TensorFlow code")[0] == "88.80"
    assert _cells(released, "the authors' TensorFlow code in `tf.function`")[0] == "44.40"
    assert _cells(paper, ours) == ["1.67", "1.82", "-", "8"]
    assert "read saliency 3x4 + human map 4, write gradient 4 = 20 B/px" in text
    resnet = _cells(text, "resnet18, 16x3x96x96, 2 with a map")
    assert resnet == ["111", "3.00x", "1.25x (1)", "3.00x", "1.25x", "0.3 %", "9.0 %"]
    assert "(1) BatchNorm is special." in text
    compiled = _cells(text, "resnet18 16x3x96x96")
    assert compiled == ["harmonized, all rows, torch.compile", "222", "2.00x"]
    assert "11.7 instructions/px in our kernels" in released
    assert "instructions/px" not in paper
    assert "A Processor, 2 threads, PyTorch 2.13.0, 2026-01-02, commit abcdef" in text


def test_report_has_everything(record: dict[str, Any]) -> None:
    text = table.report(record)
    for row in record["rows"]:
        if row["section"] in ("loss", "latency", "import"):
            assert row["implementation"] in text
    for expected in ("batch 64", "one image", "a reason", "aim met", "1234 ms"):
        assert expected in text


def test_goals_are_ratios_of_rows(record: dict[str, Any]) -> None:
    of_op = {g["goal"]: g for g in record["goals"] if g["of"] == "op"}
    assert of_op["eager, as released / ours"]["value"] == pytest.approx(38.7 / 1.47)
    assert of_op["eager, as released / ours"]["verdict"] == "aim met"
    assert of_op["best torch.compile / ours"]["value"] == pytest.approx(8.79 / 1.47)
    assert of_op["best torch.compile / ours"]["verdict"] == "accepted"
    assert of_op["ours / copy"]["value"] == pytest.approx(1.47 / 0.91)
    rate = of_op["pixel rate at an odd size / at the even one"]
    assert rate["value"] == pytest.approx(225 * 223 / 224**2 / 1.25)
    assert of_op["one image, loss and gradient, back to back"]["value"] == pytest.approx(
        1e3 * 1.47 / 20
    )
    # The gradient, three maps a thread, and half a megabyte.
    memory = of_op["peak extra memory: the gradient and a workspace per thread"]
    assert memory["accept"] == pytest.approx((32 + 6) * 224 * 224 * 4e-6 + 0.5)
    assert memory["verdict"] == "aim met"


def test_a_missed_goal_is_said(record: dict[str, Any]) -> None:
    rows = [
        row | {"value": 5.0} if row["implementation"].startswith("cpu: ") else row
        for row in record["rows"]
    ]
    verdicts = {g["goal"]: g["verdict"] for g in goals.goals(rows)}
    assert verdicts["ours / copy"] == "MISSED"


def test_comparison_sees_a_slower_kernel_but_not_a_slower_machine(record: dict[str, Any]) -> None:
    slower = copy.deepcopy(record["rows"])
    for row in slower:
        if "times_copy" in row:
            row["value"] *= 2  # a busier machine: everything, the copy included
    changes = records.compare(slower, record["rows"])
    assert {row["change_against_copy"] for row in changes} == {1.0, None}
    worse = next(row for row in slower if row["implementation"] == "cpu: op")
    worse["times_copy"] *= 1.5
    first = records.compare(slower, record["rows"])[0]
    assert (first["implementation"], first["change_against_copy"]) == ("cpu: op", 1.5)
    assert "1.50x" in table.comparison([first], record).text()


def test_a_file_that_is_no_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"rows": []}))
    with pytest.raises(records.RecordError, match=r"other\.json: expected a record of bench/run"):
        records.load(path)


def test_pictures_are_drawn_of_what_there_is(record: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    import plots

    names = {path.name for path in plots.draw_all(record, tmp_path / "all", "svg")}
    assert names == {f"bench_{name}_cpu.svg" for name in plots.PICTURES}
    speed_up = (tmp_path / "all" / "bench_speed_up_cpu.svg").read_text()
    # By what a user calls: 88.8, 38.7 and 8.79 over 1.86 ms.
    for words in ("47.7x", "20.8x", "4.7x", "A Processor"):
        assert words in speed_up
    record["rows"] = records.select(record["rows"], section="step")
    few = plots.draw_all(record, tmp_path / "few", "svg")
    assert [path.name for path in few] == ["bench_step_cpu.svg"]
