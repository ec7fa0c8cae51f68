"""The training program, its data and the demo: what they promise, on a miniature of each."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the demo's data need pip install harmonizer-ext[train]")
pytest.importorskip("skimage", reason="the demo's data need pip install harmonizer-ext[train]")
pytest.importorskip("matplotlib", reason="the panel needs pip install harmonizer-ext[train]")
pytest.importorskip("tqdm", reason="the progress bar needs pip install harmonizer-ext[train]")

import demo
import shortcut_digits
import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def full() -> dict[str, shortcut_digits.Split]:
    return shortcut_digits.make(seed=0)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("digits")
    splits = shortcut_digits.make(train_images=96, test_images=24)
    shortcut_digits.save(splits, directory)
    return str(directory)


def config(data_dir: str, output: object, **changes: object) -> train.Config:
    defaults: dict = {"data_dir": data_dir, "output": str(output), "epochs": 1, "batch_size": 32}
    return train.Config(**defaults | {"device": "cpu", "quiet": True} | changes)


def weights(run: dict) -> torch.Tensor:
    model, _ = train.load_checkpoint(run["checkpoint"])
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# Data.


def test_same_seed_gives_the_same_bytes(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        splits = shortcut_digits.make(seed, train_images=20, test_images=10)
        shortcut_digits.save(splits, tmp_path / name)
    for split in shortcut_digits.SPLITS:
        a, b, c = ((tmp_path / name / f"{split}.npz").read_bytes() for name in "abc")
        assert a == b
        assert a != c


def test_shortcut_predicts_the_class_in_training_and_not_at_test(full):
    share = {name: (split.shortcuts == split.labels).mean() for name, split in full.items()}
    assert share["train"] == 0.9
    assert share["test_shortcut"] == 1.0
    # Independent of the class: 597 draws at 0.1 have a standard deviation of 0.0123; four of them.
    assert abs(share["test"] - 0.1) < 4 * np.sqrt(0.1 * 0.9 / 597)
    assert {name: len(split.labels) for name, split in full.items()} == {
        "train": 1200,
        "test": 597,
        "test_shortcut": 597,
    }


def test_half_of_the_training_rows_and_all_test_rows_have_a_human_map(full):
    assert full["train"].tokens.mean() == 0.5
    assert full["test"].tokens.all()
    for split in full.values():
        tops = split.heatmaps.max((1, 2))
        np.testing.assert_array_equal(tops, split.tokens)  # the maximum is 1, or the map is empty


def test_test_splits_differ_in_the_background_alone(full):
    broken, held = full["test"], full["test_shortcut"]
    np.testing.assert_array_equal(broken.heatmaps, held.heatmaps)
    same = broken.shortcuts == broken.labels
    identical = (broken.images == held.images).all((1, 2, 3))
    np.testing.assert_array_equal(identical, same)


def test_human_map_lies_on_the_ink(full):
    split = full["test"]
    pixels, heatmaps = split.images[..., 0] / 255, split.heatmaps.astype(np.float64)
    on = (pixels * (heatmaps > 0.8)).sum((1, 2)) / (heatmaps > 0.8).sum((1, 2))
    off = (pixels * (heatmaps < 0.05)).sum((1, 2)) / (heatmaps < 0.05).sum((1, 2))
    # White ink over a background of mean 0.575 at most: brighter wherever people look.
    assert (on > off).all()


@pytest.mark.parametrize("kind", shortcut_digits.KINDS)
def test_mean_brightness_tells_the_class_only_where_it_is_the_shortcut(kind):
    split = shortcut_digits.make(kind=kind, train_images=300, test_images=300)["test"]
    away = split.heatmaps == 0
    brightness = (split.images[..., 0] * away).sum((1, 2)) / away.sum((1, 2)) / 255
    correlation = np.corrcoef(brightness, split.shortcuts)[0, 1]
    # Independent variables correlate by 1/sqrt(300) = 0.058 by chance; the crop's own variation
    # (0.13 over a few grains of texture) leaves more than 0.8 where brightness is the shortcut.
    assert correlation > 0.8 if kind == "brightness" else abs(correlation) < 4 * 0.058


def test_data_errors_name_the_argument():
    with pytest.raises(ValueError, match="kind: expected one of texture, brightness, got 'smell'"):
        shortcut_digits.make(kind="smell")
    with pytest.raises(ValueError, match="train_images: expected 1 to 1200 digits, got 5000"):
        shortcut_digits.make(train_images=5000)
    with pytest.raises(ValueError, match=r"mapped: expected a share in 0..1, got 2"):
        shortcut_digits.make(mapped=2)


# Training.


def test_training_lowers_every_term(data_dir, tmp_path):
    run = train.train(config(data_dir, tmp_path, epochs=8, warmup_epochs=0))
    first, last = run["history"][0], run["history"][-1]
    assert last["loss"] < first["loss"]
    assert last["cross_entropy"] < first["cross_entropy"]
    assert last["harmonization"] < first["harmonization"]
    # The loss is not lowered by gradients that vanish: they grow away from the epsilon of 1e-5.
    assert last["saliency_std"] > max(1e-5, first["saliency_std"])
    # loss = cross entropy + lambda * harmonization, all float32.
    assert last["loss"] == pytest.approx(last["cross_entropy"] + last["harmonization"], rel=1e-5)


def test_harmonization_reaches_the_weights(data_dir, tmp_path):
    """With label, order and start the same, only the alignment term can make the difference."""
    step = {"epochs": 1, "batch_size": 96, "warmup_epochs": 0, "opt": "sgd", "lr": 0.1}
    runs = {
        factor: train.train(
            config(data_dir, tmp_path / str(factor), lambda_harmonization=factor, **step)
        )
        for factor in (0.0, 1.0, 2.0)
    }
    one, two = (weights(runs[f]) - weights(runs[0.0]) for f in (1.0, 2.0))
    assert runs[0.0]["history"][0]["harmonization"] == 0
    assert one.norm() > 1e-4 * weights(runs[0.0]).norm()
    # One step of SGD is linear in lambda: twice the factor moves the weights twice as far. Each
    # difference of float32 weights (up to 0.3) carries up to 2^-24 * 0.6 of rounding per element.
    torch.testing.assert_close(two, 2 * one, rtol=1e-3, atol=4e-7)


def test_same_seed_gives_the_same_network(data_dir, tmp_path):
    a, b, c = (
        train.train(config(data_dir, tmp_path / name, seed=seed))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert a["final"] == b["final"]
    torch.testing.assert_close(weights(a), weights(b), rtol=0, atol=0)
    assert not torch.equal(weights(a), weights(c))


def test_checkpoint_and_log(data_dir, tmp_path):
    asked = config(data_dir, tmp_path, epochs=3, val_interval=2, test_splits=("test",))
    run = train.train(asked)
    model, read = train.load_checkpoint(tmp_path / "checkpoint.pt")
    assert read == asked
    assert not model.training
    # The stored network is the one that was measured.
    assert (
        train.evaluate(model, train.load_split(data_dir, "test", CPU), read) == run["final"]["test"]
    )
    with (tmp_path / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert [row["test_alignment"] != "" for row in rows] == [False, True, True]
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["final"] == run["final"]
    assert not list(tmp_path.glob("*.tmp"))


def test_evaluation_measures_what_it_says(data_dir):
    """A network whose logit of class c is the sum of the pixels times a known map."""
    split = train.load_split(data_dir, "test", CPU)

    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = split.heatmaps[:1].double()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            score = (images.double().mean(1) * -self.map).sum((1, 2))
            return torch.stack([score] + [score * 0] * 9, 1)

    one = train.Split(*(tensor[:1] for tensor in split))._replace(labels=torch.tensor([0]))
    measures = train.evaluate(Linear(), one, train.Config())
    # The gradient is minus the human map: opposite with its sign, the same without.
    assert measures["alignment_signed"] == pytest.approx(-1, abs=1e-6)
    assert measures["alignment"] == pytest.approx(1, abs=1e-6)
    # Float32 images: the gradient is rounded to float32 on its way back.
    expected = (split.heatmaps[0].double() / 3).std(correction=0).item()
    assert measures["saliency_std"] == pytest.approx(expected, rel=1e-5)


def test_learning_rate_warms_up_and_falls():
    settings = train.Config(epochs=10, warmup_epochs=2, lr=1.0)
    rates = [train.learning_rate(step, 100, settings) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 20)
    assert rates[19] == rates[20] == 1.0
    assert rates[60] == pytest.approx(0.5)  # half way down the cosine
    assert np.all(np.diff(rates[20:]) < 0)
    flat = dataclasses.replace(settings, sched="none", warmup_epochs=0)
    assert {train.learning_rate(step, 100, flat) for step in range(100)} == {1.0}


@pytest.mark.parametrize("flags", [("--amp",), ("--channels-last",), ("--rows", "all")])
def test_options_train(data_dir, tmp_path, flags):
    base = ["--data-dir", data_dir, "--output", str(tmp_path), "--epochs", "1", "-b", "48"]
    plain = train.train(train.parse([*base, "--quiet", "--device", "cpu"]))["history"][0]
    changed = train.train(train.parse([*base, "--quiet", "--device", "cpu", *flags]))["history"][0]
    # The same training up to rounding: 2^-8 per operation in bfloat16, far less otherwise.
    assert changed["loss"] == pytest.approx(plain["loss"], rel=5e-2 if "--amp" in flags else 1e-3)


# Errors before the first step.


def test_command_line_reads_every_field():
    asked = train.parse(["-b", "8", "--clip-grad", "0.5", "--amp", "--test-splits", "a", "b"])
    assert (asked.batch_size, asked.clip_grad, asked.amp) == (8, 0.5, True)
    assert asked.test_splits == ("a", "b")
    assert train.parse([]) == train.Config()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", "0"], "epochs: expected a number >= 1, got 0"),
        (["--lambda-harmonization", "-1"], "lambda_harmonization: expected a number >= 0"),
        (["--lr", "nan"], "lr: expected a number >= 0, got nan"),
        (["--smoothing", "1"], "smoothing: expected less than 1"),
        (["--formulation", "papyrus"], "argument --formulation: invalid choice"),
        (["--amp-dtype", "float16"], "argument --amp-dtype: invalid choice"),
    ],
)
def test_command_line_refuses(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        train.parse(flags)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_data_say_how_to_make_them(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--data-dir", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match=r"expected the file .*nowhere/train.npz; .*shortcut_dig"):
        train.main()


def _write(directory, name, **changes):
    arrays = {
        "images": np.zeros((4, 16, 16, 3), np.uint8),
        "heatmaps": np.ones((4, 16, 16), np.float16),
        "labels": np.arange(4),
        "tokens": np.ones(4, np.float32),
    }
    np.savez(directory / f"{name}.npz", **(arrays | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((4, 3, 16, 16), np.uint8)}, r"expected images \(N, H, W, 3\) uint8"),
        ({"images": np.zeros((4, 16, 16, 3))}, r"expected images .*, got \(4, 16, 16, 3\) float64"),
        ({"heatmaps": np.ones((4, 8, 8))}, r"expected heatmaps \(4, 16, 16\), got \(4, 8, 8\)"),
        ({"labels": np.arange(3)}, r"expected labels \(4,\), got \(3,\)"),
        ({"labels": np.arange(4) - 1}, "all of them class indices >= 0"),
        ({"tokens": np.zeros(4)}, "tokens: expected a human map for some row"),
    ],
)
def test_bad_training_data_are_refused(tmp_path, changes, message):
    _write(tmp_path, "train", **changes)
    _write(tmp_path, "test")
    with pytest.raises(ValueError, match=message):
        train.train(config(str(tmp_path), tmp_path / "run", batch_size=2))
    assert not (tmp_path / "run").exists()


def test_test_data_must_fit_training_data(tmp_path):
    _write(tmp_path, "train")
    _write(tmp_path, "test", labels=np.arange(4) + 1)
    with pytest.raises(ValueError, match=r"labels below 4, as for train, got .* and 4"):
        train.train(config(str(tmp_path), tmp_path / "run", batch_size=2))


def test_unknown_model_and_too_large_batch(data_dir, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"batch_size: expected at most 96, .* got 97"):
        train.train(config(data_dir, tmp_path, batch_size=97))
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"model: 'resnet9000' needs timm .* pip install timm"):
        train.train(config(data_dir, tmp_path, model="resnet9000"))


def test_loss_that_is_not_finite_stops_the_run(data_dir, tmp_path):
    with pytest.raises(FloatingPointError, match=r"got (nan|inf) in epoch .; lower --lr"):
        train.train(config(data_dir, tmp_path, epochs=3, opt="sgd", lr=1e20, warmup_epochs=0))


# The demo.


def test_demo_in_miniature(tmp_path):
    results = demo.run(
        tmp_path / "demo",
        tmp_path / "data",
        seeds=(0, 1),
        epochs=1,
        train_images=64,
        test_images=12,
        panel_images=3,
        quiet=True,
    )
    assert json.loads((tmp_path / "demo" / "results.json").read_text()) == results
    for name, factor in (("baseline", 0.0), ("harmonized", 1.0)):
        network = results[name]
        assert 0 <= network["accuracy"] <= 1
        assert -1 <= network["alignment"] <= 1
        for key in ("accuracy", "alignment"):
            values = [row[key] for row in network["seeds"]]
            assert network[key] == pytest.approx(np.mean(values), rel=1e-12)
            assert network["spread"][key] == pytest.approx(np.std(values, ddof=1), rel=1e-9)
        for seed in (0, 1):
            run = json.loads((tmp_path / "demo" / f"{name}-seed{seed}/results.json").read_text())
            # Top-level figures are those of the split where the shortcut is broken.
            assert run["final"]["test"]["accuracy"] == network["seeds"][seed]["accuracy"]
            assert run["config"]["lambda_harmonization"] == factor
            assert run["config"]["seed"] == seed
    assert (tmp_path / "demo" / "panel.png").read_bytes().startswith(b"\x89PNG")
    text = demo.table(results)
    assert f"{results['harmonized']['accuracy']:.3f} ±" in text
    assert "50% of the training images have a human map" in text
