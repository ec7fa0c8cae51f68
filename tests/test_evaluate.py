"""The evaluation against plain loops, the authors' evaluate_clickme, and what it must refuse."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import extras
import numpy as np
import pytest
import timm_networks
import torch
from torch import Tensor

if (reason := extras.why_no_train()) is not None:
    pytest.skip(reason, allow_module_level=True)

import evaluate as program
import released
from evaluating import data, networks, scoring, summary
from evaluating.data import ImageSet
from evaluations import Blind, Small, network, rho, run, write_folder, write_shards
from scipy.stats import spearmanr

import harmonizer_ext as hx
from harmonizer_ext import alignment
from harmonizer_ext.explanations import Attribution, InputGradient

IMAGES = 10


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("clickme"), IMAGES)


@pytest.fixture(scope="module")
def plain(shards: Path) -> scoring.Evaluation:
    pair = [network("first"), network("second", seed=1)]
    return run(pair, ImageSet(shards), pairs=[("first", "second")], reducers=(4,))


# --- the numbers ----------------------------------------------------------------------------------


def test_equals_a_plain_loop_over_images(shards: Path, plain: scoring.Evaluation) -> None:
    images = hx.clickme.ClickMe(shards, preprocess="released")
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    for name, seed in (("first", 0), ("second", 1)):
        model = Small(seed=seed)
        expected, correct = [], []
        for sample in images:
            pixels = ((sample.image / 255 - mean) / std)[None].requires_grad_()
            logits = model(pixels)
            (gradient,) = torch.autograd.grad(logits[0, sample.label], pixels)
            saliency = gradient[0].abs().max(0).values
            expected.append(spearmanr(saliency.flatten(), sample.heatmap.flatten()).statistic)
            correct.append(float(logits.argmax() == sample.label))
        result = plain.by_name(name)
        # Convolutions of one image and of four round differently: 1e-7 of a value exchanges
        # neighbours among 50,176 ranks, which moves the correlation by far less than 1e-5.
        np.testing.assert_allclose(result.values.values["spearman"], expected, atol=1e-5)
        assert result.correct.tolist() == correct
        numbers = next(r for r in summary.summarize(plain)["networks"] if r["name"] == name)
        assert numbers["spearman"]["mean"] == pytest.approx(np.mean(expected), abs=1e-5)
        assert numbers["alignment"]["mean"] == pytest.approx(np.mean(expected) / 0.65753, abs=2e-5)
        assert numbers["top1"]["mean"] == np.mean(correct)


@pytest.mark.skipif(released.why_not() is not None, reason=str(released.why_not()))
def test_equals_the_released_evaluate_clickme(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The authors' reader, blur and metrics; the explainer is handed to it as it wants one."""
    pytest.importorskip("simplejpeg", reason="decodes as TensorFlow does")
    code = released.load()
    for name in ("xplique", "xplique.attributions"):  # its default explainer, not used here
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["xplique.attributions"].Saliency = None
    common = sys.modules["_released_float32.common"]
    monkeypatch.setattr(common, "load_clickme_val", None, raising=False)
    module = importlib.import_module("_released_float32.evaluation.clickme")
    tested = network()

    def explainer(images: Any, labels: Any) -> Any:
        pixels = torch.from_numpy(images.numpy()).permute(0, 3, 1, 2)
        pixels = tested.form(pixels, False).requires_grad_()
        scores = tested.model(pixels) * torch.from_numpy(labels.numpy())
        (gradient,) = torch.autograd.grad(scores.sum(), pixels)
        return code.tensorflow.constant(gradient.abs().amax(1).numpy())

    files = sorted(str(path) for path in shards.iterdir())
    theirs = module.evaluate_clickme(None, explainer, code.load_clickme(files, batch_size=1))
    ours = run([tested], ImageSet(shards, decoder="simplejpeg-fast"))
    values = ours.results[0].values.values
    # Maps differ by some 1e-4 grey levels (see PIXEL_TOLERANCE), which exchanges few ranks. Several
    # files are read there in an order of its own.
    for metric, atol in (("spearman", 1e-4), ("dice", 2e-3), ("iou", 2e-3)):
        np.testing.assert_allclose(sorted(values[metric]), sorted(theirs[metric]), atol=atol)
    score = summary.summarize(ours)["networks"][0]["alignment"]["mean"]
    assert score == pytest.approx(theirs["alignment_score"], abs=1e-4)


def test_top_1_where_some_are_recognized(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, 9)
    tested = network(size=32)
    tested.model = Small(classes=3)
    samples = [ImageSet(folder).at(32)[i] for i in range(9)]
    expected = [
        float(tested.model(tested.form(s.image[None], False)).argmax() == s.label) for s in samples
    ]
    assert 0 < sum(expected) < 9
    evaluation = run([tested], ImageSet(folder))
    assert evaluation.results[0].correct.tolist() == expected


def test_metrics_are_those_of_the_library(shards: Path, plain: scoring.Evaluation) -> None:
    """Dice, IoU and a lower resolution, of the maps of the whole set at once."""
    images = hx.clickme.ClickMe(shards, preprocess="released")
    tested = network("first")
    pixels = tested.form(torch.stack([s.image for s in images]), False)
    labels = torch.tensor([s.label for s in images])
    _, maps = InputGradient("abs_max")(tested.model, pixels, labels, create_graph=False)
    human = torch.stack([s.heatmap[0] for s in images])
    values = plain.by_name("first").values.values
    for name, metric in (("dice", alignment.dice), ("iou", alignment.iou)):
        torch.testing.assert_close(values[name], metric(maps, human), rtol=0, atol=1e-3)
    small, small_human = (alignment.reduce_resolution(m, 4) for m in (maps, human))
    expected = alignment.spearman(small, small_human)
    torch.testing.assert_close(values["spearman/4"], expected, rtol=0, atol=1e-4)


def test_control_and_pairs(shards: Path, plain: scoring.Evaluation) -> None:
    human = torch.stack([s.heatmap[0] for s in hx.clickme.ClickMe(shards, preprocess="released")])
    expected = alignment.center_bias(human)
    (control,) = plain.controls
    torch.testing.assert_close(
        control.values.values["spearman"], expected.values["spearman"], rtol=0, atol=1e-6
    )
    (pair,) = summary.summarize(plain)["pairs"]
    difference = rho(plain, "second") - rho(plain, "first")
    assert pair["spearman"]["mean"] == pytest.approx(difference.mean().item(), abs=1e-12)
    error = difference.std(correction=0).item() / math.sqrt(IMAGES)
    assert pair["spearman"]["standard_error"] == pytest.approx(error, rel=0.15)
    assert pair["alignment"]["mean"] == pytest.approx(pair["spearman"]["mean"] / 0.65753)


@pytest.mark.parametrize("options", [{"batch_size": 3}, {"batch_size": 64}, {"workers": 2}])
def test_batches_and_workers_change_nothing(
    options: dict[str, int], shards: Path, plain: scoring.Evaluation
) -> None:
    again = run([network("first")], ImageSet(shards), **options)
    torch.testing.assert_close(rho(again, "first"), rho(plain, "first"), rtol=0, atol=1e-5)


def test_fewer_images_are_taken_at_equal_distances(shards: Path, plain: scoring.Evaluation) -> None:
    images = ImageSet(shards, max_images=4)
    assert images.rows == [0, 2, 5, 7]
    few = run([network("first")], images)
    torch.testing.assert_close(
        rho(few, "first"), rho(plain, "first")[images.rows], rtol=0, atol=1e-5
    )
    with pytest.raises(ValueError, match="max_images: expected 1 or more, got 0"):
        ImageSet(shards, max_images=0)


def test_networks_of_different_sizes(shards: Path) -> None:
    chosen = [network("large"), network("small", size=96)]
    evaluation = run(chosen, ImageSet(shards))
    assert [control.size for control in evaluation.controls] == [224, 96]
    sample = ImageSet(shards).at(96)[3]
    pixels = chosen[1].form(sample.image[None], False)
    _, maps = InputGradient()(
        chosen[1].model, pixels, torch.tensor([sample.label]), create_graph=False
    )
    expected = spearmanr(maps.flatten(), sample.heatmap.flatten()).statistic
    assert rho(evaluation, "small")[3].item() == pytest.approx(expected, abs=1e-5)


def test_constant_maps_are_left_out_and_counted(shards: Path) -> None:
    evaluation = run([network("blind", kind=Blind)], ImageSet(shards), gallery=True)
    (row,) = summary.summarize(evaluation)["networks"]
    assert row["excluded"] == IMAGES
    assert all(math.isnan(row[key]["mean"]) for key in ("spearman", "alignment", "dice", "iou"))

    def half(images: Tensor, labels: Tensor) -> Tensor:
        maps = images.mean(1)
        maps[0] = 1.0
        return maps

    tested = network("half")
    tested.explain = Attribution(half)
    evaluation = run([tested], ImageSet(shards), batch_size=5)
    (row,) = summary.summarize(evaluation)["networks"]
    assert row["excluded"] == 2
    assert rho(evaluation, "half").isnan().nonzero().flatten().tolist() == [0, 5]
    defined = evaluation.results[0].values.values["dice"][[1, 2, 3, 4, 6, 7, 8, 9]]
    assert row["dice"]["mean"] == pytest.approx(defined.mean().item())


def test_networks_are_left_as_they_were(shards: Path) -> None:
    tested = network()
    tested.model.train()
    run([tested], ImageSet(shards, max_images=2), center_bias=False)
    assert tested.model.training
    assert all(p.grad is None and p.requires_grad for p in tested.model.parameters())


def test_works_in_inference_mode(shards: Path, plain: scoring.Evaluation) -> None:
    tested = network("first")
    with torch.inference_mode():
        again = run([tested], ImageSet(shards))
    torch.testing.assert_close(rho(again, "first"), rho(plain, "first"), rtol=0, atol=1e-5)


def test_the_gallery_shows_what_it_says(shards: Path) -> None:
    chosen = [network("first"), network("second", seed=1)]
    evaluation = run(chosen, ImageSet(shards), gallery=True)
    random, first, _ = evaluation.galleries
    assert [len(panels) for panels in random.groups.values()] == [9]
    order = rho(evaluation, "first").argsort().tolist()
    assert [p.row for p in first.groups["best"]] == order[::-1][:3]
    assert [p.row for p in first.groups["worst"]] == order[:3]
    assert [p.row for p in first.groups["median"]] == order[3:6]
    for panel in first.groups["best"]:
        for name in ("first", "second"):
            shown = spearmanr(panel.maps[name].flatten(), panel.human.flatten()).statistic
            assert panel.correlations[name] == pytest.approx(shown, abs=1e-5)
    few = ImageSet(shards, max_images=5)
    (panels,) = run(chosen, few, gallery=True).galleries[0].groups.values()
    for panel in panels:
        assert panel.label == hx.clickme.ClickMe(shards)[panel.row].label
        assert panel.row in few.rows


def test_the_front_by_brute_force() -> None:
    generator = np.random.default_rng(0)
    rows = [
        {"name": str(i), "accuracy": x, "alignment": {"mean": y}}
        for i, (x, y) in enumerate(generator.integers(0, 8, (30, 2)) / 8)
    ]
    # Harmonized networks would be the front, were they not left out of it.
    rows[0] |= {"accuracy": 2.0}
    rows[2]["alignment"]["mean"] = 2.0
    fake = types.SimpleNamespace(pairs=[("1", "0"), ("3", "2")])
    front = summary.pareto_front(fake, rows)
    places = {(r["accuracy"], r["alignment"]["mean"]) for r in rows if r["name"] not in ("0", "2")}
    expected = {
        (x, y)
        for x, y in places
        if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in places)
    }
    found = [(r["accuracy"], r["alignment"]["mean"]) for n in front for r in rows if r["name"] == n]
    assert set(found) == expected
    assert found == sorted(found, reverse=True)


# --- the program ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    timm = timm_networks.import_timm()
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "test_vit.pth"
    torch.save(timm.create_model("test_vit").state_dict(), path)
    return path


def test_the_program(
    shards: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "imagenet.csv").write_text("model,top1\ntest_vit,41.5\nb,43.25\n")
    numbers = program.main(
        ["--data", str(shards), "--model", "a=test_vit", "b=test_vit", "--pair", "a:b"]
        + ["--checkpoint", str(weights), str(weights), "--output", str(tmp_path / "out")]
        + ["--explanation", "grad-cam", "--layer", "blocks.4", "blocks.5.norm1", "--workers", "0"]
        + ["--accuracy", str(tmp_path / "imagenet.csv"), "--device", "cpu", "--quiet"]
    )
    a, b = numbers["networks"]
    assert (a["input_size"], a["accuracy"], b["accuracy"]) == (160, 0.415, 0.4325)
    assert a["explanation"] == "GradCAM(layer='blocks.4', relu=True)"
    assert numbers["settings"]["explanation"] == f"{a['explanation']}, {b['explanation']}"
    assert a["spearman"] != b["spearman"]
    stored = json.loads((tmp_path / "out/results.json").read_text())
    assert stored["networks"][0]["spearman"] == a["spearman"]
    assert "--explanation grad-cam" in stored["provenance"]["command"]
    with (tmp_path / "out/images.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["network"] == "a"]
    mean = np.mean([float(row["spearman"]) for row in rows])
    assert mean == pytest.approx(a["spearman"]["mean"], abs=1e-6)
    assert (tmp_path / "out/report.html").is_file()
    printed = capsys.readouterr().out
    assert f"{a['spearman']['mean']:.3f}".replace("-", "\N{MINUS SIGN}") in printed


def test_a_checkpoint_of_the_training_program(shards: Path, tmp_path: Path) -> None:
    from training import checkpoint
    from training.config import Config

    config = Config(model="small", img_size=48, clickme=(str(shards),))
    model, form = networks.training_networks.create(config)
    state = {
        "version": checkpoint.VERSION,
        "config": dataclasses.asdict(config),
        "input": form._asdict(),
        "model": model.state_dict(),
    }
    (tmp_path / "run").mkdir()
    torch.save(state, tmp_path / "run/last.pt")
    loaded = networks.load(str(tmp_path / "run/last.pt"))
    assert (loaded.name, loaded.form.size) == ("run", 48)
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    assert not loaded.model.training
    evaluation = run([loaded], ImageSet(shards, max_images=3))
    assert not rho(evaluation, "run").isnan().any()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gradient", hx.explanations.InputGradient),
        ("gradient-times-input", hx.explanations.GradientTimesInput),
        ("smoothgrad", hx.explanations.SmoothGrad),
        ("integrated-gradients", hx.explanations.IntegratedGradients),
        ("evaluations:network", Attribution),
    ],
)
def test_explanations_by_name(name: str, expected: type, monkeypatch: pytest.MonkeyPatch) -> None:
    import evaluations

    monkeypatch.setattr(evaluations, "network", lambda model: lambda images, labels: images)
    assert isinstance(networks.explanation(name, Small(), reduce="mean"), expected)


# --- what is refused ------------------------------------------------------------------------------


def test_refusals(shards: Path, weights: Path, tmp_path: Path) -> None:
    images = ImageSet(shards, max_images=2)
    with pytest.raises(ValueError, match=r"networks: expected one or more of different names"):
        run([network("a"), network("a")], images)
    with pytest.raises(ValueError, match="pair: expected names of networks, a; got 'b'"):
        run([network("a")], images, pairs=[("a", "b")])
    few = network("few")
    few.model = Small(classes=5)
    with pytest.raises(
        ValueError, match="data: expected labels from 0 to 4, the classes of few, got"
    ):
        run([few], ImageSet(shards))
    with pytest.raises(ValueError, match=r"model: expected a file, or a name in timm.*near it: "):
        networks.load("resnet5")
    with pytest.raises(ValueError, match="model: expected NAME=MODEL or MODEL, got '=resnet18'"):
        networks.load("=resnet18")
    with pytest.raises(ValueError, match="checkpoint: expected a timm name in front of it"):
        networks.load(str(weights), checkpoint_path=weights)
    with pytest.raises(
        ValueError, match=r"layer: grad-cam expects the name of a layer.*layers, hea"
    ):
        networks.explanation("grad-cam", Small())
    with pytest.raises(ValueError, match="explanation: expected one of gradient"):
        networks.explanation("saliency", Small())
    chosen = [networks.Network("a", Small(), few.form, "resnet18, weights")]
    (tmp_path / "wrong.csv").write_text("model,acc\nresnet18,70\n")
    with pytest.raises(ValueError, match="accuracy: expected columns model,top1"):
        program.read_accuracy(str(tmp_path / "wrong.csv"), chosen)
    (tmp_path / "other.csv").write_text("model,top1\nresnet50,80\n")
    with pytest.raises(ValueError, match="accuracy: expected a row for 'a'"):
        program.read_accuracy(str(tmp_path / "other.csv"), chosen)


def test_weights_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = timm_networks.import_timm()
    without = next(name for name in timm.list_models() if not timm.is_model_pretrained(name))
    with pytest.raises(ValueError, match=f"weights of, got '{without}'; --checkpoint takes them"):
        networks.load(without)

    def offline(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("no connection")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(OSError, match=r"of 'resnet18' could not be fetched: no con.*--checkpoint"):
        networks.load("resnet18")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "x", "y"], "--checkpoint: expected one for each of 1 models, got 2"),
        (["--pair", "a"], "--pair: expected BASELINE:HARMONIZED, got 'a'"),
        (["--layer", "a", "b"], "--layer: expected one, or one for each of 1 models, got 2"),
    ],
)
def test_bad_command_lines(
    arguments: list[str], message: str, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        program.main(["--data", str(shards), "--model", "test_vit", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ceiling", "0"], "ceiling must be positive, got 0"),
        (["--ceiling", "nan"], "ceiling must be positive, got nan"),
        (["--batch-size", "0"], "batch_size: expected 1 or more, got 0"),
        (["--accuracy", "accuracy.csv"], "accuracy: expected a row for 'test_vit'"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(
    arguments: list[str],
    message: str,
    shards: Path,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def too_late(*_: Any) -> None:
        raise AssertionError("a network has run")

    monkeypatch.setattr(scoring, "_pass", too_late)
    monkeypatch.chdir(tmp_path)
    Path("accuracy.csv").write_text("model,top1\nresnet50,80\n")
    command = ["--data", str(shards), "--model", "test_vit", "--checkpoint", str(weights)]
    with pytest.raises(ValueError, match=message):
        program.main([*command, "--quiet", "--device", "cpu", *arguments])


def test_kinds_of_data_are_not_mixed(shards: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", 2)
    with pytest.raises(ValueError, match="of one kind, got 1 folder and 2 tfrecords in"):
        ImageSet([shards, folder])
    with pytest.raises(ValueError, match="data: expected one folder of images and maps"):
        ImageSet([folder, folder])
    assert data.find_data(str(shards / "*.tfrecords"))[0] == "tfrecords"
