"""The training program in this process: what it lowers, keeps, logs and refuses."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import resource
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm_networks
import torch
from tiny_training import values, weights
from torch import Tensor, nn

if timm_networks.why_no_timm() is not None:
    pytest.skip(timm_networks.why_no_timm() or "", allow_module_level=True)

import train
from training import checkpoint, config, data, evaluation
from training.networks import InputForm
from training.processes import StopRequest, World

import harmonizer_ext as hx

ALONE = World(0, 1, torch.device("cpu"))


def settings(digits: Path, output: Path, **changes: Any) -> config.Config:
    return config.Config(**values(digits, output, **changes))


def flat(output: str | Path) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in weights(output).values()])


def test_training_lowers_every_term(digits: Path, tmp_path: Path):
    run = train.train(settings(digits, tmp_path, epochs=8, cache=True))
    first, last = run["history"][0], run["history"][-1]
    assert last["loss"] < first["loss"]
    assert last["cross_entropy"] < first["cross_entropy"]
    assert last["harmonization"] < first["harmonization"]
    # The loss is not lowered by gradients that vanish: they grow away from the epsilon of 1e-5.
    assert last["saliency_std"] > max(1e-5, first["saliency_std"])
    # loss = cross entropy + lambda * harmonization, all float32.
    assert last["loss"] == pytest.approx(last["cross_entropy"] + last["harmonization"], rel=1e-5)


def test_harmonization_reaches_the_weights(digits: Path, tmp_path: Path):
    """The alignment term alone can make the difference: label, order and start are the same."""
    step = {"batch_size": 96, "opt": "sgd", "lr": 0.1, "weight_decay": 0.0}
    for factor in (0.0, 1.0, 2.0):
        asked = settings(digits, tmp_path / str(factor), lambda_harmonization=factor, **step)
        row = train.train(asked)["history"][0]
        assert (row["harmonization"] == 0) == (factor == 0)
    none, one, two = (flat(tmp_path / str(factor)) for factor in (0.0, 1.0, 2.0))
    assert (one - none).norm() > 1e-4 * none.norm()
    # One step of SGD is linear in lambda: twice the factor moves the weights twice as far. Each
    # difference of float32 weights (up to 0.3) carries up to 2^-24 * 0.6 of rounding per element.
    torch.testing.assert_close(two - none, 2 * (one - none), rtol=1e-3, atol=4e-7)


def test_same_seed_gives_the_same_network(digits: Path, tmp_path: Path):
    for name, seed, workers in (("a", 0, 0), ("b", 0, 2), ("c", 1, 0)):
        train.train(settings(digits, tmp_path / name, seed=seed, workers=workers, no_aug=False))
    a, b, c = (flat(tmp_path / name) for name in "abc")
    assert torch.equal(a, b)  # whoever decodes
    assert not torch.equal(a, c)


def test_output_directory(digits: Path, tmp_path: Path):
    asked = settings(digits, tmp_path, epochs=3, val_interval=2, panel_images=3, model_ema=True)
    run = train.train(asked)
    model, form, read = train.load_network(tmp_path / "last.pt")
    assert read == asked
    assert form == InputForm(64, (0.5,) * 3, (0.25,) * 3)
    assert not model.training
    # The stored network, its average, is the one that was measured.
    test = data.open_tests(read, form, ALONE)["test"]
    measures, _ = evaluation.evaluate(model, test, form, ALONE, classes=10)
    assert measures == run["final"]["test"]

    with (tmp_path / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert [row["test_alignment"] != "" for row in rows] == [False, True, True]
    best = max(float(row["test_alignment"]) for row in rows[1:])
    content = checkpoint.read(tmp_path / "best_alignment.pt")
    assert content["progress"]["best"]["alignment"] == best
    assert checkpoint.read(tmp_path / "best_accuracy.pt")["config"] == dataclasses.asdict(asked)
    assert json.loads((tmp_path / "results.json").read_text())["final"] == run["final"]
    assert config.parse(["--config", str(tmp_path / "config.json")]) == asked
    assert (tmp_path / "panel_test.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.partial*"))


def test_results_of_sets_whose_names_begin_alike(digits: Path, tmp_path: Path):
    sets = tuple(f"{name}={digits / 'clickme/test'}" for name in ("test", "test_again", "images"))
    final = train.train(settings(digits, tmp_path, clickme_val=sets))["final"]
    assert final.keys() == {"test", "test_again", "images"}
    assert final["test"] == final["test_again"] == final["images"]


def test_tensorboard_has_the_terms(digits: Path, tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train.train(settings(digits, tmp_path, epochs=2, log_interval=1, panel_images=2))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    terms = (*train.TERMS, "images_per_second", "waiting", "learning_rate")
    for term in terms:
        assert [event.step for event in events.Scalars(f"train/{term}")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("epoch/test_alignment")] == [2, 4]
    assert len(events.Images("panel_test")) >= 1


def test_saliency_std_is_a_mean_over_rows_with_a_map(digits: Path, tmp_path: Path):
    """Some batches of this epoch have one such row, some none: none counts as 0."""
    few = {"mapped_share": 1 / 24, "lr": 0.0, "cache": True}
    stds = []
    for batch_size, parts in ((48, 1), (6, 8)):
        asked = settings(
            digits, tmp_path / str(parts), batch_size=batch_size, grad_accum_steps=parts, **few
        )
        stds.append(train.train(asked)["history"][0]["saliency_std"])
    # The same network on the same rows: float32 sums in another order.
    assert stds[1] == pytest.approx(stds[0], rel=1e-5)


def test_evaluation_measures_what_it_says(digits: Path):
    """A network whose logit of class c is the sum of the pixels times a known map."""
    paths, anything = (str(digits / "clickme/test"),), config.Config(clickme=("any",))
    samples = data.open_clickme(paths, "clickme_val", anything, "released", None)
    human = samples[0].heatmap[0].double()

    class Linear(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            score = (images.double().mean(1) * -human).sum((1, 2))
            return torch.stack([score] + [score * 0] * 9, 1)

    batch = data.loader.collate([samples[0]._replace(label=0)])
    test = data.Test([batch], 1, True)  # type: ignore[arg-type]
    form = InputForm(224, (0.0,) * 3, (1.0,) * 3)
    measures, panel = evaluation.evaluate(Linear(), test, form, ALONE, classes=10, panel_images=1)
    # The gradient is minus the human map: opposite with its sign, the same without.
    assert measures["alignment_signed"] == pytest.approx(-1, abs=1e-6)
    assert measures["alignment"] == pytest.approx(1, abs=1e-6)
    # Float32 images: the gradient is rounded to float32 on its way back.
    expected = (human / 3).std(correction=0).item()
    assert measures["saliency_std"] == pytest.approx(expected, rel=1e-5)
    assert panel is not None
    torch.testing.assert_close(panel.human[0].double(), human, rtol=1e-6, atol=1e-4)


def test_constant_maps_are_excluded_and_counted(digits: Path):
    class Constant(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean((1, 2, 3))[:, None].expand(-1, 10)

    asked = settings(digits, Path("unused"))
    form = InputForm(64, (0.5,) * 3, (0.25,) * 3)
    test = data.open_tests(asked, form, ALONE)["test"]
    measures, _ = evaluation.evaluate(Constant(), test, form, ALONE, classes=10)
    assert measures["excluded"] == 24
    assert np.isnan(measures["alignment"])


@pytest.fixture(scope="module")
def plain(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The first epoch of a run without options."""
    asked = settings(digits, tmp_path_factory.mktemp("plain"), cache=True)
    return train.train(asked)["history"][0]


@pytest.mark.parametrize(
    "changes", [{"amp": True}, {"channels_last": True}, {"rows": "all"}, {"torchcompile": True}]
)
def test_options_train_the_same_network(
    digits: Path, tmp_path: Path, plain: dict[str, Any], changes: dict[str, Any]
):
    changed = train.train(settings(digits, tmp_path, cache=True, **changes))["history"][0]
    # The same training up to rounding: 2^-8 per operation in bfloat16, far less otherwise.
    assert changed["loss"] == pytest.approx(plain["loss"], rel=5e-2 if "amp" in changes else 1e-3)


@pytest.mark.parametrize("preset", [name for name in config.PRESETS if name != "none"])
def test_presets_run(digits: Path, tmp_path: Path, preset: str):
    """Every recipe as it is, but for a smaller network, smaller batches and no download."""
    given = values(digits, tmp_path)
    paths = (
        "clickme",
        "clickme_val",
        "data_dir",
        "class_map",
        "val_split",
        "num_classes",
        "output",
    )
    small = {"model": "resnet18", "img_size": 32, "batch_size": 12, "global_batch_size": 24}
    asked = config.with_preset(
        preset,
        **{key: given[key] for key in (*paths, "workers", "device", "quiet")},
        **small,
        pretrained=False,
        mapped_share=0.5,
        epochs=1,
        panel_images=0,
    )
    row = train.train(asked)["history"][0]
    assert row["update"] == 4
    assert row["harmonization"] > 0
    assert np.isfinite(row["loss"])
    assert 0 <= row["test_accuracy"] <= 1


def test_frozen_norm_keeps_its_statistics(digits: Path, tmp_path: Path):
    network = {"model": "resnet18", "img_size": 32, "freeze_norm": True}
    train.train(settings(digits, tmp_path, **network))
    for name, tensor in weights(tmp_path).items():
        if name.endswith("running_mean"):
            assert not tensor.any()
        elif name.endswith("running_var"):
            assert (tensor == 1).all()
    with pytest.raises(ValueError, match="freeze_norm: expected BatchNorm in the network"):
        train.train(settings(digits, tmp_path / "none", freeze_norm=True))


def test_learning_rate_of_the_paper():
    paper = config.with_preset("paper", clickme=("shards",))
    model = nn.Linear(2, 2)
    optimizer, set_learning_rate = train.create_optimizer(model, paper, updates_per_epoch=10)
    rates = []
    for update in range(900):
        set_learning_rate(update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert np.all(np.diff(rates[:51]) > 0)  # five epochs of warm-up
    # timm takes the step one update early.
    steps = {50: 0.3, 298: 0.3, 300: 0.03, 498: 0.03, 500: 0.003, 798: 0.003, 800: 0.0003}
    for update, rate in steps.items():
        assert rates[update] == pytest.approx(rate)


def test_recipes_of_the_authors():
    """Recipes of the paper's section "Training", and of run.py in serre-lab/Harmonization-old."""
    made = {name: config.with_preset(name, clickme=("s",)) for name in ("paper", "paper-code")}
    for name, nesterov in (("paper", False), ("paper-code", True)):
        optimizer, _ = train.create_optimizer(nn.Linear(2, 2), made[name], 10)
        assert type(optimizer) is torch.optim.SGD
        for group in optimizer.param_groups:
            assert (group["nesterov"], group["momentum"]) == (nesterov, 0.9)
    paper, code = made.values()
    assert (paper.global_batch_size, paper.mixup > 0, paper.hflip, paper.levels) == (
        512,
        True,
        0.5,
        5,
    )
    assert (code.global_batch_size, code.mixup, code.levels, code.epochs) == (1024, 0, 6, 200)
    assert code.decay_milestones == (30, 60, 80)
    assert 10 <= code.lambda_harmonization <= 50
    for each in (paper, code):
        assert (each.smoothing, each.warmup_epochs, each.mapped_share) == (0.1, 5, 0.2)


def test_baseline_without_human_maps(digits: Path, tmp_path: Path):
    asked = settings(digits, tmp_path, clickme=(), lambda_harmonization=0.0, batch_size=24)
    row = train.train(asked)["history"][0]
    assert row["update"] == 2
    assert row["harmonization"] == 0


def test_weights_of_another_run(digits: Path, tmp_path: Path):
    train.train(settings(digits, tmp_path / "first"))
    asked = settings(
        digits, tmp_path / "second", lr=0.0, initial_checkpoint=str(tmp_path / "first/last.pt")
    )
    train.train(asked)
    assert torch.equal(flat(tmp_path / "first"), flat(tmp_path / "second"))


def test_files_of_one_image_each(digits: Path, tmp_path: Path):
    """The same images as .npz files are the same training set."""
    shards = hx.clickme.ClickMe(digits / "clickme/train", preprocess=None)
    for number in range(len(shards)):
        sample = shards[number]
        arrays = {"image": sample.image.permute(1, 2, 0).numpy(), "label": sample.label}
        np.savez(tmp_path / f"{number}.npz", heatmap=sample.heatmap[0].numpy(), **arrays)
    for name, path in (("shards", digits / "clickme/train"), ("files", tmp_path)):
        train.train(settings(digits, tmp_path / name, clickme=(str(path),)))
    assert torch.equal(flat(tmp_path / "shards"), flat(tmp_path / "files"))


def stopped(monkeypatch: pytest.MonkeyPatch, asked: config.Config, after: int) -> None:
    """Trains for so many updates."""
    updates = itertools.count(1)
    told = lambda stop: 15 * (next(updates) == after)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "after_update", told)
        assert train.train(asked)["stopped_by"] == 15


@pytest.mark.parametrize("opt", ["adamw", "lookahead_adamw", "adafactorbv"])
def test_every_optimizer_goes_on_to_the_bit(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opt: str
):
    """Optimizers whose state is more than tensors for each weight do too."""
    common = {"opt": opt, "epochs": 4, "batch_size": 24}
    train.train(settings(digits, tmp_path / "whole", **common))
    asked = settings(digits, tmp_path / "stopped", **common)
    for after in (3, 6):
        stopped(monkeypatch, asked, after)
    train.train(asked)
    assert torch.equal(flat(tmp_path / "whole"), flat(tmp_path / "stopped"))


def test_killed_between_two_checkpoints_of_an_epoch(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """last.pt never claims a best checkpoint that is not there."""

    def killed(*_: Any) -> None:
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", killed)
        with pytest.raises(OSError, match="killed"):
            train.train(settings(digits, tmp_path))
    assert checkpoint.read(tmp_path / "last.pt")["progress"]["best"] == {}
    best = train.train(settings(digits, tmp_path))["final"]["test"]
    for key in ("accuracy", "alignment"):
        content = checkpoint.read(tmp_path / f"best_{key}.pt")
        assert content["progress"]["best"][key] == best[key]
    assert not list(tmp_path.glob("*.partial*"))


# Errors before the first update.


def test_room_for_the_checkpoints_to_come(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**7, 10**7 - 10**6, 10**6))
    with pytest.raises(OSError, match=r"output: expected room for 3 more .* of 0.8 MB .* 1.0 MB"):
        train.train(settings(digits, tmp_path))
    assert checkpoint.read(tmp_path / "last.pt")["progress"]["update"] == 0


def test_processes_that_do_not_share_their_storage(digits: Path, tmp_path: Path):
    class Two(World):
        def gather(self, value: Any) -> list[Any]:
            return [value, True]  # the other one finds a checkpoint

    asked = settings(digits, tmp_path)
    model = nn.Linear(1, 1)
    run = checkpoint.Run(
        asked, Two(0, 2, torch.device("cpu")), InputForm(64, (), ()), 48, model,
        torch.optim.SGD(model.parameters()), None,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"output: expected storage .* but 1 of 2 processes find"):
        train.resume(run)


def test_resume_refuses_another_configuration(digits: Path, tmp_path: Path):
    train.train(settings(digits, tmp_path))
    with pytest.raises(
        ValueError, match=r"resume: .*last.pt is of a run with another .*lr: 0.002 -> "
    ):
        train.train(settings(digits, tmp_path, lr=0.1))
    with pytest.raises(ValueError, match=r"images of an update: 48 -> 96"):
        train.train(settings(digits, tmp_path, batch_size=96))
    more = tuple(str(digits / "clickme" / name) for name in ("train", "test"))
    with pytest.raises(
        ValueError, match=r"images with and without a human map: \(48, 48\) -> \(72, 48\)"
    ):
        train.train(settings(digits, tmp_path, clickme=more))
    with pytest.raises(ValueError, match=r"resume: .*last.pt exists already"):
        train.train(settings(digits, tmp_path, resume="none"))
    # With the same configuration there is nothing left to do, and the result is the same.
    stored = json.loads((tmp_path / "results.json").read_text())
    assert train.train(settings(digits, tmp_path, workers=1))["final"] == stored["final"]


def test_missing_and_misfit_data(digits: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"clickme: expected .tfrecords.* found none at "):
        train.train(settings(digits, tmp_path, clickme=(str(tmp_path),)))
    (tmp_path / "0.tar").touch()
    with pytest.raises(ValueError, match=r"clickme: expected files with random access, got .tar"):
        train.train(settings(digits, tmp_path, clickme=(str(tmp_path),)))
    with pytest.raises(ValueError, match=r"num_classes: expected more than \d, the highest label"):
        train.train(settings(digits, tmp_path / "out", num_classes=2, clickme_val=()))
    with pytest.raises(
        ValueError, match=r"batch_size: expected an epoch of at least one batch, got batches of 97"
    ):
        train.train(settings(digits, tmp_path, batch_size=97))
    with pytest.raises(ValueError, match=r"model: expected 'small' or a name in timm.list_models"):
        train.train(settings(digits, tmp_path, model="resnet9000"))
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"initial_checkpoint: .* does not fit the network"):
        train.train(settings(digits, tmp_path, initial_checkpoint=str(tmp_path / "other.pt")))
    assert not (tmp_path / "last.pt").exists()


def test_a_full_disk_is_told(tmp_path: Path):
    """A limit on the size of files stands for the disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**4, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoint.write({"weight": torch.zeros(10**5)}, tmp_path / "last.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not list(tmp_path.iterdir())


def test_an_error_on_the_command_line_is_one_line(tmp_path: Path, monkeypatch: Any):
    line = ["train.py", "--clickme", str(tmp_path / "nowhere"), "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*line, "--model", "small"])
    with pytest.raises(
        SystemExit, match=r"train.py: error: clickme: expected .*prepare_clickme.py"
    ):
        train.main()


def test_weights_and_biases_need_a_key(digits: Path, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"log_wandb: .* pip install wandb"):
        train.train(settings(digits, tmp_path, log_wandb=True))


def test_loss_that_is_not_finite_stops_the_run(digits: Path, tmp_path: Path):
    # Logged or not, and with a checkpoint after each update: none has what went wrong.
    for changes in ({}, {"log_interval": 1}, {"checkpoint_interval": 1}):
        output = tmp_path / "_".join(["run", *changes])
        with pytest.raises(FloatingPointError, match=r"update \d.*; lower --lr.*is from before"):
            train.train(settings(digits, output, epochs=3, opt="sgd", lr=1e20, **changes))
        content = checkpoint.read(output / "last.pt")
        assert all(tensor.isfinite().all() for tensor in content["model"].values())
        assert np.isfinite(content["progress"]["sums"]).all()
