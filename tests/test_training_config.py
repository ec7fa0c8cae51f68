"""The configuration of train.py: defaults, then preset, file and flags; and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest
from training import config

DATA = ["--clickme", "shards", "--data-dir", "images"]


def test_flags_and_fields_are_the_same():
    asked = config.parse([*DATA, "-b", "8", "--clip-grad", "0.5", "--amp", "--scale", "0.5", "1"])
    assert (asked.batch_size, asked.clip_grad, asked.amp) == (8, 0.5, True)
    assert asked.scale == (0.5, 1.0)
    assert asked.clickme == ("shards",)
    changed = {"batch_size", "clip_grad", "amp", "scale", "clickme", "data_dir"}
    for field in dataclasses.fields(config.Config):
        if field.name not in changed:
            assert getattr(asked, field.name) == field.default


def test_preset_file_and_flags_in_that_order(tmp_path):
    paper = config.parse(["--preset", "paper", *DATA])
    assert paper == config.with_preset("paper", clickme=("shards",), data_dir="images")
    # The recipe of the paper, section 3.
    assert (paper.opt, paper.momentum, paper.lr, paper.global_batch_size) == (
        "momentum",
        0.9,
        0.3,
        512,
    )
    assert (paper.epochs, paper.warmup_epochs, paper.decay_milestones) == (90, 5, (30, 50, 80))
    assert paper.smoothing > 0
    assert paper.mixup > 0
    assert paper.hflip == 0.5

    file = tmp_path / "config.json"
    file.write_text(json.dumps(dataclasses.asdict(paper)))
    assert config.parse(["--config", str(file)]) == paper
    assert config.parse(["--config", str(file), "--lr", "0.1"]) == dataclasses.replace(
        paper, lr=0.1
    )
    tuned = config.parse(["--config", str(file), "--preset", "finetune", "--no-pretrained"])
    assert (tuned.opt, tuned.pretrained, tuned.clickme) == ("adamw", False, ("shards",))


@pytest.mark.parametrize("preset", config.PRESETS)
def test_presets_are_valid(preset):
    made = config.with_preset(preset, clickme=("shards",))
    assert config.from_dict(json.loads(json.dumps(dataclasses.asdict(made)))) == made


def test_accumulation_makes_the_global_batch():
    paper = config.with_preset("paper", clickme=("shards",), batch_size=64)
    assert [paper.accumulation(processes) for processes in (1, 2, 8)] == [8, 4, 1]
    with pytest.raises(
        ValueError, match=r"global_batch_size: expected a multiple of 192 .*, got 512"
    ):
        paper.accumulation(3)


def test_what_may_differ_after_a_resume():
    old = config.Config(clickme=("shards",))
    free = dataclasses.replace(old, output="elsewhere", workers=0, quiet=True, clickme=("moved",))
    assert config.differences(old, free) == []
    assert config.differences(old, dataclasses.replace(old, lr=0.1)) == ["lr: 0.001 -> 0.1"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", "0"], "epochs: expected a number >= 1, got 0"),
        (["--lambda-harmonization", "-1"], "lambda_harmonization: expected a number >= 0"),
        (["--lr", "nan"], "lr: expected a number >= 0, got nan"),
        (["--smoothing", "1"], "smoothing: expected a number in 0..0.999, got 1"),
        (["--formulation", "papyrus"], "argument --formulation: invalid choice"),
        (["--amp-dtype", "float16"], "argument --amp-dtype: invalid choice"),
        (["--scale", "0.5", "0.1"], "scale: expected 0 < MIN <= MAX"),
        (["--cache"], "cache: expected --no-aug"),
        (["--global-batch-size", "64", "--grad-accum-steps", "2"], "grad_accum_steps: expected 1"),
        (["--torchcompile", "--fsdp"], "torchcompile: expected False with --fsdp"),
        (["--config", "nowhere.json"], "config: nowhere.json cannot be read"),
    ],
)
def test_command_line_refuses(flags: list[str], message: str, capsys: Any):
    with pytest.raises(SystemExit) as caught:
        config.parse([*DATA, *flags])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_run_needs_images_and_maps():
    with pytest.raises(ValueError, match=r"clickme, data_dir: expected images to train on"):
        config.Config()
    with pytest.raises(ValueError, match=r"clickme: expected images with human maps"):
        config.Config(data_dir="images")
    config.Config(data_dir="images", lambda_harmonization=0.0)  # a baseline


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"lr": "0.1"}', "lr: expected float, got '0.1'"),
        ('{"clickme": "shards"}', "clickme: expected tuple.*, got 'shards'"),
        ('{"scale": [0.1]}', r"scale: expected tuple.*, got \(0.1,\)"),
        ('{"epochs": 1.5}', "epochs: expected int, got 1.5"),
        ('{"amp": 1}', "amp: expected bool, got 1"),
        ("[1]", "config: expected an object in "),
        ("{", "cannot be read"),
    ],
)
def test_files_written_by_hand(tmp_path: Any, text: str, message: str, capsys: Any):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SystemExit):
        config.parse(["--config", str(tmp_path / "config.json"), "--data-dir", "images"])
    assert re.search(message, capsys.readouterr().err)


def test_unknown_fields_of_a_file_are_named():
    with pytest.raises(
        ValueError, match=r"expected fields of train.py's configuration, got \['learn"
    ):
        config.from_dict({"learn": 1})


def test_help_has_every_flag_with_its_text(capsys: Any):
    with pytest.raises(SystemExit):
        config.parse(["--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(config.Config):
        assert "--" + field.name.replace("_", "-") in text
    for group in config.GROUPS:
        assert f"\n{group}:\n" in text
    for name in config.PRESETS:
        assert name in text
    assert max(map(len, text.splitlines())) <= 100
