"""Features are no classes: networks without a classifier, or with others, are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import extras
import pytest
import torch
from torch import Tensor, nn

if (reason := extras.why_no_train()) is not None:
    pytest.skip(reason, allow_module_level=True)

import classifiers
import evaluate as program
import timm
from evaluating import networks
from evaluating.data import ImageSet
from evaluations import Small, network, run, write_folder, write_shards
from training import networks as training_networks
from training.config import Config

HEADLESS = r"model: expected a network with a classifier, got '{name}', which gives {n} features"


@pytest.fixture
def without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's networks as they are built, without a download."""
    create = timm.create_model

    def built(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", built)


@pytest.mark.usefixtures("without_weights")
@pytest.mark.parametrize(
    ("name", "features"),
    [("vit_small_patch14_dinov2", 384), ("vit_small_patch16_224.dino", 384)],
)
def test_networks_of_features(name: str, features: int) -> None:
    with pytest.raises(ValueError, match=HEADLESS.format(name=name, n=features)):
        networks.load(name)
    with pytest.raises(ValueError, match="--checkpoint FILE --num-classes N"):
        networks.load(f"own={name}")


@pytest.mark.parametrize(("name", "features"), [("resnet10t", 512), ("test_vit", 64)])
def test_heads_that_are_left_out(name: str, features: int, tmp_path: Path) -> None:
    """Heads of weights from a file, asked for without classes."""
    torch.manual_seed(0)
    for classes in (0, 7):
        model = timm.create_model(name, num_classes=classes)
        torch.save(model.state_dict(), tmp_path / "weights.pth")
        options: dict[str, Any] = {"checkpoint_path": tmp_path / "weights.pth"}
        if classes == 0:
            with pytest.raises(ValueError, match=HEADLESS.format(name=name, n=features)):
                networks.load(name, num_classes=0, **options)
        else:
            loaded = networks.load(name, num_classes=7, **options)
            assert loaded.model(torch.zeros(1, 3, 160, 160)).shape == (1, 7)


@pytest.mark.usefixtures("without_weights")
def test_a_classifier_that_timm_would_make_up() -> None:
    """Another number of classes than the weights have leaves the classifier random."""
    with pytest.raises(ValueError, match=r"expected 1000, the classes of timm's .* got 10, for"):
        networks.load("test_vit", num_classes=10)
    with pytest.raises(ValueError, match="would be random; name weights of 1000 classes"):
        networks.load("vit_small_patch14_dinov2", num_classes=1000)
    assert networks.load("test_vit", num_classes=1000).parameters > 0


def test_the_program_says_it(tmp_path: Path, without_weights: None) -> None:
    shards = write_shards(tmp_path / "shards", 4)
    line = ["--data", str(shards), "--model", "vit_small_patch14_dinov2", "--device", "cpu"]
    with pytest.raises(ValueError, match="expected a network with a classifier"):
        program.main([*line, "--output", str(tmp_path / "out"), "--quiet"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["test_vit", "resnet10t", "levit_128s", "deit_tiny_distilled_patch16_224"]
)
def test_networks_with_a_classifier(name: str) -> None:
    classifiers.check_classifier(timm.create_model(name, num_classes=10), name)
    classifiers.check_classifier(Small(10), "of one's own")


@pytest.mark.parametrize("head", [nn.Flatten(), nn.Sequential(), nn.Dropout(0.1)])
@pytest.mark.parametrize("within", [False, True])
def test_heads_that_pass_on_what_they_are_given(head: nn.Module, within: bool) -> None:
    model = timm.create_model("resnet10t", num_classes=10)
    model.fc = head
    with pytest.raises(ValueError, match=HEADLESS.format(name="own", n=512)):
        classifiers.check_classifier(nn.Sequential(model) if within else model, "own")


@pytest.mark.usefixtures("without_weights")
def test_embeddings_are_no_classes(tmp_path: Path) -> None:
    """Number 17 of 512 that CLIP gives is no class."""
    images = ImageSet(write_shards(tmp_path / "shards", 4), decoder="pillow")
    clip = networks.load("vit_xsmall_patch16_clip_224.tinyclip_yfcc15m")
    with pytest.raises(ValueError, match=r"give 512 numbers that are none.*--checkpoint FILE"):
        run([clip], images)
    torch.save(clip.model.state_dict(), tmp_path / "w.pth")
    trained = networks.load("vit_xsmall_patch16_clip_224", checkpoint_path=tmp_path / "w.pth")
    assert trained.imagenet
    assert networks.load("test_vit").imagenet


# --- other classes than the data's ----------------------------------------------------------------


@pytest.mark.parametrize("classes", [1001, 11821, 21843])
def test_classes_of_other_numbers(classes: int, tmp_path: Path) -> None:
    """Class 17 of ImageNet-21k is not that of ImageNet-1k, and with a background it is the 16th."""
    images = ImageSet(write_shards(tmp_path / "shards", 4), decoder="pillow")
    other = network("other")
    other.model = Small(classes).eval()
    with pytest.raises(ValueError, match=f"1000 classes, or of fewer .* got other with {classes}:"):
        run([other], images)
    run([network("own")], images)


def test_labels_that_the_network_has_not(tmp_path: Path) -> None:
    images = ImageSet(write_shards(tmp_path / "shards", 4), decoder="pillow")
    few = network("few")
    few.model = Small(10).eval()  # the labels are multiples of 37
    with pytest.raises(ValueError, match="expected labels from 0 to 9, the classes of few, got"):
        run([few], images)


def test_folders_that_list_other_classes(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", 6)
    (folder / "classes.txt").write_text("2\n0\n1\n")
    images = ImageSet(folder)
    three = network("three", size=32)
    three.model = Mean(3)
    run([three], images)
    with pytest.raises(
        ValueError, match=r"a line for each of the 1000 classes .* got 3, which are"
    ):
        run([network("small")], images)


class Mean(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 5, stride=4), nn.Tanh())
        self.head = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean((2, 3)))


def test_folders_of_wordnets_names(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", 6)
    names = timm.data.ImageNetInfo().label_names()[:3]
    for part in ("images", "maps"):
        for number, name in enumerate(names):
            (folder / part / str(number)).rename(folder / part / name)
    images = ImageSet(folder)
    assert images.imagenet
    large = network("large", size=32)
    large.model = Mean(21843)
    with pytest.raises(ValueError, match="got large with 21843"):
        run([large], images)


# --- training -------------------------------------------------------------------------------------


def test_training_a_network_without_a_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(model="test_vit", num_classes=10, clickme=("x",), output="")
    assert training_networks.create(config)[0].num_classes == 10
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, **o: create(name, **(o | {"num_classes": 0}))
    )
    with pytest.raises(ValueError, match=HEADLESS.format(name="test_vit", n=64)):
        training_networks.create(config)
