"""Image and human map under the same geometry: every functional, whole transforms, one's own."""

from __future__ import annotations

from typing import Any

import pytest
import timm_networks
import torch

pytest.importorskip("PIL", reason="Pillow (extra: train), which torchvision needs")
timm_networks.import_torchvision()
from torchvision import tv_tensors  # noqa: E402
from torchvision.transforms import InterpolationMode, v2  # noqa: E402
from torchvision.transforms.v2 import functional as F  # noqa: E402

from harmonizer_ext.clickme import ClickMeSample  # noqa: E402
from harmonizer_ext.data.augmentation import (  # noqa: E402
    JointTransform,
    evaluation_transform,
    training_transform,
)
from harmonizer_ext.data.tv_heatmap import Heatmap  # noqa: E402

#: Grey levels. The image is uint8: resampling rounds it at the end (half a level), and along both
#: axes in between (half a level more), with weights in fixed point of at least 2**-8 x 255 / 2.
TOLERANCE = 2.0


def sample(generator: torch.Generator, height: int = 48, width: int = 40) -> ClickMeSample:
    """An image whose channels are its map: smooth, of all grey levels."""
    coarse = torch.rand(1, 1, 6, 5, generator=generator)
    map_ = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]
    map_ = (255 * (map_ - map_.min()) / (map_.max() - map_.min())).round()
    return ClickMeSample(map_.expand(3, -1, -1).byte(), map_, 3, torch.ones(()))


def assert_moved_alike(result: ClickMeSample) -> None:
    assert result.image.dtype == torch.uint8
    assert result.heatmap.dtype == torch.float32
    assert type(result.image) is type(result.heatmap) is torch.Tensor
    for channel in result.image:
        assert (channel.float() - result.heatmap[0]).abs().max() <= TOLERANCE


GEOMETRY = {
    "training": training_transform(32, scale=(0.2, 1.0)),
    "training, rotation": training_transform(32, scale=(0.2, 1.0), rotation=30),
    "training, larger": training_transform(64, hflip=1.0),
    "evaluation": evaluation_transform(24),
    "affine": JointTransform(
        v2.RandomAffine(20, (0.1, 0.1), (0.8, 1.2), 5, interpolation=InterpolationMode.BILINEAR)
    ),
    "own": JointTransform(
        v2.Compose([
            v2.RandomVerticalFlip(0.5),
            v2.Pad(3),
            v2.RandomCrop(30),
            v2.RandomPerspective(0.3, p=1.0),
        ])
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GEOMETRY)
def test_an_image_that_is_its_map_stays_so(name: str, generator: torch.Generator) -> None:
    moved = 0
    for seed in range(12):
        before = sample(generator)
        torch.manual_seed(seed)
        after = GEOMETRY[name](before)
        assert_moved_alike(after)
        assert (after.label, float(after.token)) == (3, 1)
        moved += after.image.shape != before.image.shape or not torch.equal(
            after.image, before.image
        )
    assert moved >= 6


FUNCTIONALS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "horizontal_flip": (F.horizontal_flip, (), {}),
    "vertical_flip": (F.vertical_flip, (), {}),
    "crop": (F.crop, (5, -3, 20, 21), {}),
    "center_crop": (F.center_crop, ([30, 52],), {}),
    "pad": (F.pad, ([1, 2, 3, 4],), {"fill": 0}),
    "resize": (F.resize, ([31, 57],), {"antialias": True}),
    "resized_crop": (F.resized_crop, (3, 4, 20, 25, [33, 31]), {"antialias": True}),
    "rotate": (F.rotate, (17.0,), {"interpolation": InterpolationMode.BILINEAR}),
    "affine": (
        F.affine,
        (10.0, [2.0, 3.0], 1.1, [4.0, 0.0]),
        {"interpolation": InterpolationMode.BILINEAR},
    ),
    "perspective": (
        F.perspective,
        ([[0, 0], [39, 0], [39, 47], [0, 47]], [[3, 2], [36, 4], [38, 44], [1, 45]]),
        {"interpolation": InterpolationMode.BILINEAR},
    ),
    "elastic": (F.elastic, (), {"interpolation": InterpolationMode.BILINEAR}),
}


@pytest.mark.parametrize("name", FUNCTIONALS)
def test_every_functional(name: str, generator: torch.Generator) -> None:
    """The map moves as torchvision moves it as a float image of one channel."""
    functional, arguments, options = FUNCTIONALS[name]
    if name == "elastic":
        options = {**options, "displacement": 0.05 * torch.rand(1, 48, 40, 2, generator=generator)}
    before = sample(generator)
    after = functional(Heatmap(before.heatmap), *arguments, **options)
    assert type(after) is Heatmap
    expected = functional(tv_tensors.Image(before.heatmap), *arguments, **options)
    assert torch.equal(after.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor))
    assert after.shape[1:] != before.heatmap.shape[1:] or not torch.equal(
        after.as_subclass(torch.Tensor), before.heatmap
    )


@pytest.mark.parametrize("name", ["rotate", "affine", "perspective", "elastic", "pad"])
def test_what_comes_in_from_outside_is_no_map(name: str, generator: torch.Generator) -> None:
    """The image may be filled with anything, and resampled in any way."""
    functional, arguments, options = FUNCTIONALS[name]
    if name == "elastic":
        options = {**options, "displacement": torch.full((1, 48, 40, 2), 0.2)}
    ones = Heatmap(torch.ones(1, 48, 40))
    plain = functional(ones, *arguments, **{**options, "fill": 0})
    assert plain.min() == 0
    filled = {**options, "fill": 77.0}
    if "interpolation" in filled:
        filled["interpolation"] = InterpolationMode.NEAREST
    assert torch.equal(functional(ones, *arguments, **filled), plain)


@pytest.mark.parametrize(
    "colour",
    [
        v2.ColorJitter(0.5, 0.5, 0.5, 0.2),
        v2.RandomGrayscale(1.0),
        v2.RandomInvert(1.0),
        v2.RandomSolarize(100, 1.0),
        v2.RandomPosterize(2, 1.0),
        v2.GaussianBlur(5),
    ],
    ids=lambda transform: type(transform).__name__,
)
def test_colour_leaves_the_map_alone(colour: Any, generator: torch.Generator) -> None:
    before = sample(generator)
    image = torch.randint(256, before.image.shape, generator=generator, dtype=torch.uint8)
    after = JointTransform(colour)(before._replace(image=image))
    assert torch.equal(after.heatmap, before.heatmap)
    assert not torch.equal(after.image, image)


def test_geometry_and_colour_of_ones_own(generator: torch.Generator) -> None:
    transform = JointTransform(
        v2.Compose([v2.RandomResizedCrop(24, antialias=True), v2.ColorJitter(0.9), v2.ToDtype(
            {tv_tensors.Image: torch.float32, "others": None}, scale=True
        )])
    )  # fmt: skip
    after = transform(sample(generator))
    assert after.image.dtype == torch.float32
    assert after.image.max() <= 1
    assert after.image.shape == (3, 24, 24)
    assert after.heatmap.shape == (1, 24, 24)
    assert after.heatmap.max() > 1
    assert "ColorJitter" in repr(transform)


def test_without_a_map(generator: torch.Generator) -> None:
    """The image is cropped as it would be with one, and its map stays empty."""
    with_map = sample(generator)
    for seed in range(5):
        torch.manual_seed(seed)
        expected = training_transform(20)(with_map)
        torch.manual_seed(seed)
        nothing = torch.zeros(1, 1, 1).expand_as(with_map.heatmap)
        got = training_transform(20)(with_map._replace(heatmap=nothing, token=torch.zeros(())))
        assert torch.equal(got.image, expected.image)
        assert got.heatmap.shape == (1, 20, 20)
        assert got.heatmap.dtype == torch.float32
        assert not got.heatmap.any()


def test_crops_are_those_of_torchvision(generator: torch.Generator) -> None:
    before = sample(generator)
    for seed in range(5):
        torch.manual_seed(seed)
        got = training_transform(20, scale=(0.3, 0.9), ratio=(0.8, 1.2), hflip=0)(before)
        torch.manual_seed(seed)
        crop = v2.RandomResizedCrop(20, scale=(0.3, 0.9), ratio=(0.8, 1.2), antialias=True)
        assert torch.equal(
            got.image, crop(tv_tensors.Image(before.image)).as_subclass(torch.Tensor)
        )


def test_images_and_maps_of_two_sizes(generator: torch.Generator) -> None:
    before = sample(generator)
    with pytest.raises(ValueError, match=r'got \(3, 48, 40\) and \(1, 9, 9\).*"released-heatmap"'):
        training_transform(20)(before._replace(heatmap=torch.ones(1, 9, 9)))

    def crooked(image: torch.Tensor, heatmap: torch.Tensor) -> Any:
        return image[:, :8], heatmap

    with pytest.raises(ValueError, match="image and map of one size after the transform"):
        JointTransform(crooked)(before)


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (5, 300), (31, 40), (32, 32), (33, 200)])
def test_samples_of_any_size(generator: torch.Generator, size: tuple[int, int]) -> None:
    small = sample(generator, *size)
    result = JointTransform(v2.Compose([v2.Resize((40, 40)), v2.RandomHorizontalFlip()]))(small)
    assert result.image.shape == (3, 40, 40)
    assert result.heatmap.shape == (1, 40, 40)
