"""Stimuli that reveal important pixels: what they show and where; the curve of decisions."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import extras
import numpy as np
import pytest
import timm_networks
import torch
from clickme_shards import click_map, framed, picture, record

from harmonizer_ext import revealed_stimuli as stimuli

SIZE = 48


def image(seed: int) -> torch.Tensor:
    return torch.tensor(picture(seed, SIZE)).permute(2, 0, 1)


def importance(seed: int) -> torch.Tensor:
    """Clicks away from the middle, with many ties, and nothing in most places."""
    clicks = torch.zeros(SIZE, SIZE)
    generator = torch.Generator().manual_seed(seed)
    clicks[4:20, 22:40] = torch.randint(0, 4, (16, 18), generator=generator).float()
    return clicks


# ---------------------------------------------------------------------------- levels and noise


def test_levels_are_evenly_spaced_on_a_logarithmic_scale() -> None:
    levels = stimuli.reveal_levels(10)
    np.testing.assert_allclose(levels, np.logspace(-2, 0, 10), rtol=1e-14)
    assert stimuli.reveal_levels(2, 0.1) == (0.1, 1.0)
    for arguments in ((1,), (5, 0.0), (5, 1.0)):
        with pytest.raises(ValueError, match=r"(count|lowest) must"):
            stimuli.reveal_levels(*arguments)


@pytest.mark.parametrize("seed", range(4))
def test_scrambling_keeps_amplitudes_and_mean_colour_and_nothing_else(seed: int) -> None:
    original = image(0).double()
    scrambled = stimuli.phase_scrambled(image(0), torch.Generator().manual_seed(seed))
    before, after = np.fft.fft2(original.numpy()), np.fft.fft2(scrambled.numpy())
    # Of 2304 pixels of up to 255: 1e-16 of the largest amplitude, and a few roundings.
    np.testing.assert_allclose(np.abs(after), np.abs(before), rtol=0, atol=1e-8)
    np.testing.assert_allclose(scrambled.mean((1, 2)), original.mean((1, 2)), atol=1e-10)
    # The same phases are added to every channel.
    turned = np.angle(after / before)
    np.testing.assert_allclose(np.exp(1j * turned[0]), np.exp(1j * turned[2]), atol=1e-6)
    # And they are random: a resultant of n random directions is about sqrt(n) long.
    assert np.abs(np.exp(1j * turned[0]).mean()) < 4 / SIZE
    assert np.corrcoef(scrambled.flatten(), original.flatten())[0, 1] < 0.99
    other = stimuli.phase_scrambled(image(0), torch.Generator().manual_seed(seed + 1))
    assert (other - scrambled).abs().max() > 1


# ---------------------------------------------------------------------------- stimuli


def test_the_most_important_pixels_are_revealed_and_centred() -> None:
    picture_, clicks = image(1), importance(1)
    counts = [1, 10, 60, stimuli.important_pixels(clicks)]
    made = stimuli.revealed_stimuli(picture_, clicks, counts, seed=3)
    # Only the background: everything is revealed of a picture that is the background itself.
    generator = torch.Generator().manual_seed(3)
    background = stimuli.phase_scrambled(picture_, generator).round().clamp(0, 255).byte()
    shown_before: set[tuple[int, int]] = set()
    for count, stimulus in zip(counts, made, strict=True):
        assert stimulus.pixels == count
        assert stimulus.image.dtype == torch.uint8
        down, right = stimulus.shift
        moved = torch.roll(picture_, (down, right), (1, 2))
        from_picture = (stimulus.image == moved).all(0)
        from_background = (stimulus.image == background).all(0)
        assert (from_picture | from_background).all()
        shown = torch.roll(from_picture & ~from_background, (-down, -right), (0, 1))
        # All but pixels that look the same in both.
        alike = (picture_ == torch.roll(background, (-down, -right), (1, 2))).all(0)
        threshold = clicks.flatten().sort(descending=True).values[count - 1]
        assert (clicks[shown] >= threshold).all()
        assert (shown | alike)[clicks > threshold].all()
        assert count - int(alike.sum()) <= int(shown.sum()) <= count
        where = {(int(y), int(x)) for y, x in shown.nonzero()}
        assert {p for p in shown_before if not alike[p]} <= where
        shown_before = where
        y, x = (shown.nonzero().double().mean(0) + torch.tensor(stimulus.shift)).tolist()
        if not alike.any():
            assert abs(y - (SIZE - 1) / 2) <= 0.5
            assert abs(x - (SIZE - 1) / 2) <= 0.5


def test_no_revealed_pixel_leaves_the_image() -> None:
    # Most in a corner, one in the opposite: the mean cannot come to the middle.
    clicks = torch.zeros(SIZE, SIZE)
    clicks[:4, :4] = 1
    clicks[-3, -2] = 1
    (stimulus,) = stimuli.revealed_stimuli(image(2), clicks, [17], seed=0)
    assert stimulus.shift == (2, 1)
    assert torch.equal(stimulus.image[:, 2:6, 1:5], image(2)[:, :4, :4])
    assert torch.equal(stimulus.image[:, -1, -1], image(2)[:, -3, -2])


def test_the_seed_makes_the_stimulus() -> None:
    counts = [5, 40]
    first, again, other = (
        stimuli.revealed_stimuli(image(3), importance(3), counts, seed=seed) for seed in (7, 7, 8)
    )
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a.image, b.image)
        assert a.shift == b.shift
        assert not torch.equal(a.image, c.image)


def test_what_cannot_be_revealed_is_refused() -> None:
    clicks = importance(4)
    available = stimuli.important_pixels(clicks)
    for counts in ([0], [available + 1]):
        with pytest.raises(ValueError, match=f"pixels must lie between 1 and {available}"):
            stimuli.revealed_stimuli(image(4), clicks, counts, seed=0)
    with pytest.raises(ValueError, match=r"\(3, H, W\) and \(H, W\), got .*\(48, 40\)"):
        stimuli.revealed_stimuli(image(4), clicks[:, :40], [1], seed=0)
    clicks[0, 0] = math.nan
    with pytest.raises(ValueError, match="got a NaN"):
        stimuli.revealed_stimuli(image(4), clicks, [1], seed=0)


# ---------------------------------------------------------------------------- decisions


def test_animal_probability_is_that_of_the_first_398_classes() -> None:
    logits = torch.full((3, 1000), -50.0)
    logits[0, 397] = logits[1, 398] = 0.0
    logits[2, [0, 999]] = 0.0
    expected = [1.0, 0.0, 0.5]
    # The other classes have exp(-50) each, 2e-22, and there are a thousand.
    assert stimuli.animal_probability(logits).tolist() == pytest.approx(expected, abs=1e-15)
    with pytest.raises(
        ValueError, match=r"\(B, 1000\), those of the ImageNet classes, got \(3, 10\)"
    ):
        stimuli.animal_probability(logits[:, :10])


def test_curves_and_their_correlation() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy (extra: test) is the oracle here")
    generator = torch.Generator().manual_seed(0)
    chance = torch.tensor([0.5, 0.55, 0.6, 0.75, 0.9, 0.95])
    correct = (torch.rand(300, 6, generator=generator) < chance).double()
    human = torch.tensor([0.5, 0.52, 0.7, 0.8, 0.9, 0.97])
    curve = stimuli.decision_curve(correct)
    accuracy = correct.mean(0)
    assert [point.mean for point in curve] == pytest.approx(accuracy.tolist(), abs=1e-15)
    for point, p in zip(curve, accuracy, strict=True):
        # 2.2 % is the spread of a standard deviation of 1000 resamples; five of them.
        assert point.standard_error == pytest.approx(math.sqrt(p * (1 - p) / 300), rel=0.112)
    result = stimuli.correlate_curves(correct, human)
    h = human.double()
    assert result.pearson == pytest.approx(stats.pearsonr(accuracy, h).statistic, abs=1e-12)
    assert result.spearman == pytest.approx(stats.spearmanr(accuracy, h).statistic, abs=1e-12)
    rng = np.random.default_rng(0)
    drawn = [correct[rng.integers(0, 300, 300)].mean(0) for _ in range(1000)]
    resampled = np.std([stats.pearsonr(c, h).statistic for c in drawn])
    # Both vary by 2.2 %.
    assert result.pearson_error == pytest.approx(resampled, rel=0.16)
    assert math.isnan(stimuli.correlate_curves(torch.ones(4, 6), human).pearson)
    with pytest.raises(ValueError, match=r"got \(300, 6\) and \(5,\)"):
        stimuli.correlate_curves(correct, human[:5])


# ---------------------------------------------------------------------------- the program


@pytest.fixture
def program():  # type: ignore[no-untyped-def]
    if (reason := extras.why_no_train()) is not None:
        pytest.skip(reason)
    import reveal_experiment

    return reveal_experiment


def table(folder: Path, labels: list[int]) -> Path:
    from PIL import Image

    with (folder / "images.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "importance", "label"])
        for number, label in enumerate(labels):
            names = f"{number}.png", f"{number}-map.png"
            Image.fromarray(picture(number, SIZE)).save(folder / names[0])
            Image.fromarray(importance(number).byte().numpy()).save(folder / names[1])
            writer.writerow([*names, label])
    return folder / "images.csv"


def test_program_makes_stimuli_and_runs_a_network(program, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    timm = timm_networks.import_timm()
    source = table(tmp_path, [0, 397, 398, 1])
    arguments = ["make", str(source), "--levels", "4"]
    for name in ("once", "again"):
        assert program.main([*arguments, "--output", str(tmp_path / name)]) == 0
    manifest = json.loads((tmp_path / "once" / "manifest.json").read_text())
    least = min(stimuli.important_pixels(importance(n)) for n in range(4))
    assert manifest["pixels"] == [round(least * 10 ** (-2 + 2 * i / 3)) for i in range(4)]
    assert [e["animal"] for e in manifest["stimuli"][::4]] == [True, True, False, True]
    for path in sorted((tmp_path / "once").iterdir()):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    assert len(list((tmp_path / "once").glob("*.png"))) == 16

    torch.manual_seed(0)
    network = timm.create_model("test_resnet", pretrained=False)
    with torch.no_grad():  # animals all, by a hair
        network.get_classifier().bias[:398] += 20
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    levels = [round(level, 4) for level in manifest["levels"]]
    human = {"levels": levels, "accuracy": [0.5, 0.6, 0.8, 0.9]}
    (tmp_path / "human.json").write_text(json.dumps(human))
    command = ["run", str(tmp_path / "once"), "--model", "test_resnet"]
    command += ["--weights", str(tmp_path / "weights.pt"), "--output", str(tmp_path / "curve")]
    command += ["--device", "cpu", "--batch-size", "3"]
    assert program.main([*command, "--human", str(tmp_path / "human.json")]) == 0
    curve = json.loads((tmp_path / "curve.json").read_text())
    assert curve["network"] == f"test_resnet, weights of {tmp_path / 'weights.pt'}"
    assert curve["accuracy"] == [0.75] * 4  # right for three of four images
    assert curve["human"]["pearson"] is None  # a flat curve
    assert min(min(p) for p in curve["animal_probability"].values()) > 0.9
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"

    with torch.no_grad():  # 398 of 1000 classes are less than half
        for parameter in network.get_classifier().parameters():
            parameter.zero_()
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    assert program.main(command) == 0
    curve = json.loads((tmp_path / "curve.json").read_text())
    assert curve["accuracy"] == [0.25] * 4
    assert curve["animal_probability"]["2"] == pytest.approx([0.398] * 4, abs=1e-12)

    changed = tmp_path / "once" / manifest["stimuli"][5]["file"]
    changed.write_bytes(changed.read_bytes() + b"x")
    capsys.readouterr()
    assert program.main(command) == 1
    assert "is not the file that manifest.json describes" in capsys.readouterr().err


def test_program_reads_clickme(program, tmp_path) -> None:  # type: ignore[no-untyped-def]
    shard = tmp_path / "val-0.tfrecords"
    shard.write_bytes(b"".join(framed(record(n, label=n % 2 * 999)) for n in range(5)))
    output = tmp_path / "stimuli"
    command = ["make", str(shard), "--output", str(output), "--levels", "2", "--images", "4"]
    assert program.main([*command, "--pixels", "50"]) == 0
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["pixels"] == [1, 50]
    assert [e["animal"] for e in manifest["stimuli"]] == [True] * 4 + [False] * 4
    assert click_map(0).shape == (256, 256)


def test_program_reads_what_the_evaluation_reads(program, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    from evaluations import write_folder, write_shards

    folder = write_folder(tmp_path / "folder", 6)
    output = tmp_path / "stimuli"
    assert program.main(["make", str(folder), "--output", str(output), "--levels", "3"]) == 0
    manifest = json.loads((output / "manifest.json").read_text())
    assert [e["image"] for e in manifest["stimuli"][::3]] == [
        f"{n % 3}-{n}" for n in (0, 3, 1, 4, 2, 5)
    ]
    assert [e["label"] for e in manifest["stimuli"][::3]] == [0, 0, 1, 1, 2, 2]
    for part in ("images", "maps"):
        (folder / part / "0").rename(folder / part / "zebra")
    assert program.main(["make", str(folder), "--output", str(output)]) == 1
    assert "expected ImageNet's class numbers" in capsys.readouterr().err
    # Tar files and TFRecords of the same images give the same stimuli.
    import prepare_clickme

    write_shards(tmp_path / "tfrecords", 4)
    arguments = ["convert", str(tmp_path / "tfrecords"), "--output", str(tmp_path / "tar")]
    assert prepare_clickme.main(arguments) == 0
    for kind in ("tfrecords", "tar"):
        arguments = ["make", str(tmp_path / kind), "--output", str(tmp_path / f"of-{kind}")]
        assert program.main([*arguments, "--levels", "2"]) == 0
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / f"of-{kind}").iterdir()}
        for kind in ("tfrecords", "tar")
    )
    assert len(first) == 9
    assert first == second


def test_outputs_keep_the_dots_of_their_names(program, tmp_path) -> None:  # type: ignore[no-untyped-def]
    timm = timm_networks.import_timm()
    source = table(tmp_path, [0, 500])
    stimuli_ = str(tmp_path / "stimuli")
    assert program.main(["make", str(source), "--output", stimuli_, "--levels", "2"]) == 0
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.pt")
    for name in ("resnet.a1_in1k", "resnet.tv_in1k"):
        arguments = ["run", stimuli_, "--model", "test_resnet", "--device", "cpu"]
        arguments += ["--weights", str(tmp_path / "weights.pt"), "--output", str(tmp_path / name)]
        assert program.main(arguments) == 0
        assert (tmp_path / f"{name}.json").is_file()
        assert (tmp_path / f"{name}.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--images", "8"], "--images: expected 4 animals and 4 others, the source has 2 and 1"),
        (["--pixels", "9999"], "expected two usable images or more of different names, got 0"),
        (["--pixels", "0"], "--pixels: expected 1 or more, got 0"),
        (["--levels", "1"], "count must be at least 2, got 1"),
    ],
)
def test_program_says_what_is_wrong(  # type: ignore[no-untyped-def]
    program, tmp_path, capsys, arguments: list[str], said: str
) -> None:
    source = table(tmp_path, [0, 1, 500])
    assert program.main(["make", str(source), "--output", str(tmp_path / "x"), *arguments]) == 1
    assert said in capsys.readouterr().err


def test_program_leaves_out_images_with_too_few_pixels(program, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    source = table(tmp_path, [0, 1, 500])
    available = [stimuli.important_pixels(importance(n)) for n in range(3)]
    wanted = min(available) + 1
    output = tmp_path / "stimuli"
    assert (
        program.main(["make", str(source), "--output", str(output), "--pixels", str(wanted)]) == 0
    )
    left_out = f"{available.index(min(available))} is left out: {min(available)} important pixels"
    assert left_out in capsys.readouterr().err
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["pixels"][-1] == wanted
    assert len(manifest["stimuli"]) == 20


def test_program_refuses_labels_beyond_imagenet(program, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    source = table(tmp_path, [0, 1000])
    assert program.main(["make", str(source), "--output", str(tmp_path / "x")]) == 1
    assert "label must lie between 0 and 999, got 1000" in capsys.readouterr().err


def test_program_refuses_human_curves_of_other_levels(program, tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "human.json"
    path.write_text(json.dumps({"levels": [0.01, 0.5], "accuracy": [0.5, 0.9]}))
    with pytest.raises(ValueError, match=r"expected levels \[0\.01, 1\.0\], got \[0\.01, 0\.5\]"):
        program.read_human_curve(path, [0.01, 1.0])
    assert program.read_human_curve(path, [0.01, 0.5]).tolist() == [0.5, 0.9]
    path.write_text(json.dumps({"levels": [0.01, 0.5], "accuracy": [50, 90]}))
    with pytest.raises(ValueError, match=r"expected accuracies from 0 to 1, got \[50, 90\]"):
        program.read_human_curve(path, [0.01, 0.5])
    path.write_text("[0.5, 0.9]")
    with pytest.raises(ValueError, match=r'expected \{"levels": \[\.\.\.\], .*got \[0\.5, 0\.9\]'):
        program.read_human_curve(path, [0.01, 0.5])
