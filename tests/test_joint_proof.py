"""Image and map stay together, or the transform is refused: every class of v2, and one's own."""

from __future__ import annotations

import inspect
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm_networks
import torch
from torch import Tensor

pytest.importorskip("PIL", reason="Pillow (extra: train), which torchvision needs")
timm_networks.import_torchvision()
from torchvision import transforms as v1  # noqa: E402
from torchvision import tv_tensors  # noqa: E402
from torchvision.transforms import InterpolationMode, v2  # noqa: E402

from harmonizer_ext.clickme import ClickMeSample  # noqa: E402
from harmonizer_ext.data import joint_proof  # noqa: E402
from harmonizer_ext.data.augmentation import JointTransform  # noqa: E402
from harmonizer_ext.data.tv_heatmap import Heatmap  # noqa: E402

FLOAT = v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)
NEAREST = InterpolationMode.NEAREST

#: Classes of v2 that keep image and map together, each with what it takes.
TOGETHER: dict[str, Callable[[], Any]] = {
    "CenterCrop": lambda: v2.CenterCrop(60),
    "ClampBoundingBoxes": lambda: v2.ClampBoundingBoxes(),
    "ClampKeyPoints": lambda: v2.ClampKeyPoints(),
    "ColorJitter": lambda: v2.ColorJitter(0.5, 0.5, 0.5, 0.3),
    "Compose": lambda: v2.Compose([v2.RandomRotation(40), v2.ColorJitter(0.4), v2.Resize(48)]),
    "ConvertBoundingBoxFormat": lambda: v2.ConvertBoundingBoxFormat("XYXY"),
    "ConvertImageDtype": lambda: v2.ConvertImageDtype(torch.float32),
    "ElasticTransform": lambda: v2.ElasticTransform(30.0),
    "GaussianBlur": lambda: v2.GaussianBlur(7, (0.5, 3.0)),
    "GaussianNoise": lambda: v2.Compose([FLOAT, v2.GaussianNoise()]),
    "Grayscale": lambda: v2.Grayscale(3),
    "Identity": lambda: v2.Identity(),
    "JPEG": lambda: v2.JPEG((20, 90)),
    "Lambda": lambda: v2.Lambda(lambda x: x.flip(-1)),
    "Normalize": lambda: v2.Compose([FLOAT, v2.Normalize((0.5,) * 3, (0.2,) * 3)]),
    "PILToTensor": lambda: v2.PILToTensor(),
    "Pad": lambda: v2.Pad((3, 5, 9, 1), fill=200),
    "RGB": lambda: v2.RGB(),
    "RandomAdjustSharpness": lambda: v2.RandomAdjustSharpness(2.0, 1.0),
    "RandomAffine": lambda: v2.RandomAffine(30, (0.2, 0.1), (0.7, 1.3), 10, NEAREST, fill=9),
    "RandomApply": lambda: v2.RandomApply([v2.RandomRotation(90)], p=0.01),
    "RandomAutocontrast": lambda: v2.RandomAutocontrast(0.7),
    "RandomChannelPermutation": lambda: v2.RandomChannelPermutation(),
    "RandomChoice": lambda: v2.RandomChoice([v2.RandomRotation(90), v2.ColorJitter(0.9)]),
    "RandomCrop": lambda: v2.RandomCrop(50),
    "RandomEqualize": lambda: v2.RandomEqualize(0.7),
    "RandomErasing": lambda: v2.RandomErasing(0.9),
    "RandomGrayscale": lambda: v2.RandomGrayscale(0.7),
    "RandomHorizontalFlip": lambda: v2.RandomHorizontalFlip(0.3),
    "RandomInvert": lambda: v2.RandomInvert(0.6),
    "RandomOrder": lambda: v2.RandomOrder([v2.RandomRotation(40), v2.Pad(5), v2.ColorJitter(0.5)]),
    "RandomPerspective": lambda: v2.RandomPerspective(0.5, 0.8),
    "RandomPhotometricDistort": lambda: v2.RandomPhotometricDistort(),
    "RandomPosterize": lambda: v2.RandomPosterize(1, 0.8),
    "RandomResize": lambda: v2.RandomResize(40, 90),
    "RandomResizedCrop": lambda: v2.RandomResizedCrop(224, (0.05, 1.0)),
    "RandomRotation": lambda: v2.RandomRotation(180, NEAREST, expand=True),
    "RandomShortestSize": lambda: v2.RandomShortestSize([40, 60]),
    "RandomSolarize": lambda: v2.RandomSolarize(128, 0.7),
    "RandomVerticalFlip": lambda: v2.RandomVerticalFlip(0.3),
    "RandomZoomOut": lambda: v2.RandomZoomOut(side_range=(1.0, 2.0)),
    "Resize": lambda: v2.Resize((50, 130)),
    "ScaleJitter": lambda: v2.ScaleJitter((80, 80), (0.5, 1.5)),
    "ToDtype": lambda: FLOAT,
    "ToImage": lambda: v2.ToImage(),
    "ToPILImage": lambda: v2.Compose([v2.ToPILImage(), v2.RandomRotation(60), v2.ToImage()]),
    "ToPureTensor": lambda: v2.ToPureTensor(),
    "ToTensor": lambda: v2.ToTensor(),
}

#: Classes that move the image alone, or give something else than an image and a map.
MOVED = "after which the map is not where its image is"
ALONE = "moves the image alone"
CROPS = r"returns an image \(C, H, W\) and a map \(1, H, W\)"
APART: dict[str, tuple[Callable[[], Any], str]] = {
    "AugMix": (lambda: v2.AugMix(severity=1), ALONE),
    "AutoAugment": (lambda: v2.AutoAugment(), ALONE),
    "RandAugment": (lambda: v2.RandAugment(1, 1), ALONE),
    "TrivialAugmentWide": (lambda: v2.TrivialAugmentWide(), ALONE),
    "FiveCrop": (lambda: v2.FiveCrop(40), CROPS),
    "TenCrop": (lambda: v2.TenCrop(40), CROPS),
}

#: Classes that take no single image with a map: refused, or they fail at the call as ever.
OF_OTHER_THINGS: dict[str, Callable[[], Any]] = {
    "CutMix": lambda: v2.CutMix(num_classes=4),
    "LinearTransformation": lambda: v2.LinearTransformation(torch.eye(12), torch.zeros(12)),
    "MixUp": lambda: v2.MixUp(num_classes=4),
    "RandomIoUCrop": lambda: v2.RandomIoUCrop(),
    "SanitizeBoundingBoxes": lambda: v2.SanitizeBoundingBoxes(),
    "SanitizeKeyPoints": lambda: v2.SanitizeKeyPoints(),
    "SetClampingMode": lambda: v2.SetClampingMode("soft"),
    "UniformTemporalSubsample": lambda: v2.UniformTemporalSubsample(2),
}


def sample(side: int = 64) -> ClickMeSample:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 1, 6, 5, generator=generator)
    map_ = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")[0]
    map_ = 255 * (map_ - map_.min()) / (map_.max() - map_.min())
    return ClickMeSample(map_.expand(3, -1, -1).byte(), map_, 3, torch.ones(()))


def test_no_class_is_forgotten() -> None:
    classes = {
        name
        for name, thing in vars(v2).items()
        if inspect.isclass(thing) and issubclass(thing, torch.nn.Module) and name != "Transform"
    }
    known = TOGETHER.keys() | APART.keys() | OF_OTHER_THINGS.keys()
    assert classes <= known, sorted(classes - known)


def made(name: str, factory: Callable[[], Any]) -> Any:
    if not hasattr(v2, name):
        pytest.skip(f"this torchvision has no v2.{name}")
    transform = factory()
    if name == "JPEG":
        try:
            transform(torch.zeros(3, 16, 16, dtype=torch.uint8))
        except RuntimeError as error:
            pytest.skip(f"torchvision was built without JPEG: {error}")
    return transform


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TOGETHER)
def test_what_keeps_image_and_map_together(name: str) -> None:
    joint = JointTransform(made(name, TOGETHER[name]))
    for seed in range(3):
        torch.manual_seed(seed)
        result = joint(sample(96))
        assert result.image.shape[-2:] == result.heatmap.shape[-2:]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", APART)
def test_what_does_not_is_refused(name: str) -> None:
    factory, text = APART[name]
    with pytest.raises(ValueError, match=rf"transform: expected one that (.|\n)*{text}"):
        JointTransform(made(name, factory))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OF_OTHER_THINGS)
def test_what_is_of_other_things_never_passes_in_silence(name: str) -> None:
    """They are refused, fail at the call, or leave both where they were."""
    transform = made(name, OF_OTHER_THINGS[name])
    before = sample()
    try:
        after = JointTransform(transform)(before)
    except (ValueError, TypeError, RuntimeError, IndexError):
        return
    assert torch.equal(after.image, before.image)
    assert torch.equal(after.heatmap, before.heatmap)


# --- within others --------------------------------------------------------------------------------


class OfTwo(torch.nn.Module):
    def __init__(self, *parts: torch.nn.Module) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(parts)

    def forward(self, *inputs: Any) -> Any:
        for part in self.parts:
            inputs = part(*inputs)
        return inputs


NESTED: dict[str, Callable[[Any], Any]] = {
    "Compose": lambda bad: v2.Compose([v2.RandomHorizontalFlip(0.5), bad, v2.ColorJitter(0.5)]),
    "RandomApply": lambda bad: v2.RandomApply([bad], p=0.01),
    "RandomChoice": lambda bad: v2.RandomChoice([v2.Identity(), bad], p=[0.999, 0.001]),
    "RandomOrder": lambda bad: v2.RandomOrder([bad, v2.RandomVerticalFlip(0.5)]),
    "deep": lambda bad: v2.Compose(
        [v2.RandomApply([v2.RandomChoice([v2.Compose([bad]), v2.GaussianBlur(3)])], p=0.05)]
    ),
    "module": lambda bad: OfTwo(v2.RandomApply([bad], p=0.02)),
    "after a crop": lambda bad: v2.Compose([v2.RandomResizedCrop(64, (0.2, 1.0)), bad]),
    "before a resize": lambda bad: v2.Compose([bad, v2.Resize(40)]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bad", ["TrivialAugmentWide", "RandAugment", "AutoAugment", "AugMix"])
@pytest.mark.parametrize("name", NESTED)
def test_whatever_it_stands_in(name: str, bad: str) -> None:
    with pytest.raises(ValueError, match=f"whose {bad} {ALONE}"):
        JointTransform(NESTED[name](getattr(v2, bad)()))


@pytest.mark.parametrize("name", NESTED)
def test_what_stands_together_in_others(name: str) -> None:
    JointTransform(NESTED[name](v2.RandomAffine(20, (0.1, 0.1))))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bad", ["TrivialAugmentWide", "RandAugment", "AutoAugment"])
@pytest.mark.parametrize("name", NESTED)
def test_by_what_it_does_where_its_name_is_not_seen(name: str, bad: str) -> None:
    inner = getattr(v2, bad)()

    class Hidden(v2.Transform):
        def forward(self, *inputs: Any) -> Any:
            return inner(*inputs)

    with pytest.raises(ValueError, match=MOVED):
        JointTransform(NESTED[name](Hidden()))


# --- one's own ------------------------------------------------------------------------------------


class OwnFlip:
    """A flip by one draw for both, or by two."""

    def __init__(self, together: bool, by: str = "torch") -> None:
        self.together = together
        self.by = by

    def draw(self) -> bool:
        if self.by == "python":
            return random.random() < 0.5
        if self.by == "numpy":
            return bool(np.random.rand() < 0.5)
        return bool(torch.rand(()) < 0.5)

    def __call__(self, image: Tensor, heatmap: Tensor | None = None) -> Any:
        first = self.draw()
        second = first if self.together else self.draw()
        image = image.flip(-1) if first else image
        if heatmap is None:
            return image
        return image, heatmap.flip(-1) if second else heatmap


@pytest.mark.parametrize("by", ["torch", "python", "numpy"])
def test_functions_of_ones_own(by: str) -> None:
    JointTransform(OwnFlip(True, by))
    with pytest.raises(ValueError, match=MOVED):
        JointTransform(OwnFlip(False, by))


def covered(image: Tensor) -> Tensor:
    image = image.clone()
    image[..., 20:60, 10:70] = 0
    return image


OWN_TOGETHER: dict[str, Any] = {
    "nothing": lambda image, heatmap: (image, heatmap),
    "cutout": lambda image, heatmap: (covered(image), heatmap),
    "darker": lambda image, heatmap: (image // 3, heatmap),
    "map in 0..1": lambda image, heatmap: (image, heatmap / 255),
    "blurred map": lambda image, heatmap: (
        image,
        v2.functional.gaussian_blur_image(heatmap.as_subclass(Tensor), [9, 9]),
    ),
    "shifted": lambda image, heatmap: (image.roll(7, -1), heatmap.roll(7, -1)),
    "list": lambda image, heatmap: [image.float(), heatmap],
}
OWN_APART: dict[str, tuple[Any, str]] = {
    "shifted image": (lambda image, heatmap: (image.roll(9, -1), heatmap), MOVED),
    "shifted map": (lambda image, heatmap: (image, heatmap.roll(9, -2)), MOVED),
    "turned": (lambda image, heatmap: (image.mT, heatmap), MOVED),
    "no map": (lambda image, heatmap: (image, 0 * heatmap), MOVED),
    "another map": (lambda image, heatmap: (image, heatmap.flip(-1)), MOVED),
    "black": (lambda image, heatmap: (0 * image, heatmap), "leaves nothing of the image"),
    "one input": (lambda image: image, r"transform\(image, heatmap\), got .* does not"),
    "one output": (lambda image, heatmap: image, r"returns an image \(C, H, W\) and a map"),
    "crop": (lambda image, heatmap: (image[..., :50], heatmap), "of one size after the transform"),
}


@pytest.mark.parametrize("name", OWN_TOGETHER)
def test_lambdas_that_keep_together(name: str) -> None:
    JointTransform(OWN_TOGETHER[name])(sample(96))


@pytest.mark.parametrize("name", OWN_APART)
def test_lambdas_that_do_not(name: str) -> None:
    transform, text = OWN_APART[name]
    with pytest.raises(ValueError, match=f"transform: expected .*{text}"):
        JointTransform(transform)


@pytest.mark.parametrize(
    "transform",
    [
        v1.RandomHorizontalFlip(),
        v1.Compose([v1.RandomResizedCrop(32), v1.ColorJitter(0.3)]),
        v2.Compose([v2.RandomHorizontalFlip(), v1.RandomRotation(20)]),
        v1.TrivialAugmentWide(),
    ],
    ids=lambda transform: type(transform).__module__ + "." + type(transform).__name__,
)
def test_the_first_version_of_torchvision(transform: Any) -> None:
    with pytest.raises(ValueError, match=r"got .* of torchvision\.transforms, which takes an im"):
        JointTransform(transform)


# --- how colours change, and by how little the image moves --------------------------------------

SOLARIZED = [v2.RandomSolarize(128), v2.RandomEqualize()]
JITTER = v2.ColorJitter(0.4, 0.4, 0.4)


def alone(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def changed(image: Tensor, heatmap: Tensor | None = None) -> Any:
        result = tv_tensors.Image(change(image.as_subclass(Tensor)))
        return result if heatmap is None else (result, heatmap)

    return changed


def convolved(image: Tensor) -> Tensor:
    return torch.nn.functional.conv2d(image.float()[None], torch.randn(3, 3, 7, 7), padding=3)[0]


def noisy(generator: np.random.Generator) -> Callable[[Tensor], Tensor]:
    def added(image: Tensor) -> Tensor:
        noise = torch.from_numpy(generator.normal(0, 90, tuple(image.shape)))
        return (image + noise).clamp(0, 255).to(torch.uint8)

    return added


def partly_covered(image: Tensor) -> Tensor:
    kept = torch.rand(1, 1, 14, 14) > 0.7
    kept = torch.nn.functional.interpolate(kept.float(), image.shape[-2:])
    return (image * kept[0]).to(torch.uint8)


COLOURS: dict[str, Any] = {
    "recommended": [JITTER, v2.RandomPosterize(4), *SOLARIZED],
    "jitter, solarized": [JITTER, *SOLARIZED],
    "distorted, solarized": [v2.RandomPhotometricDistort(), *SOLARIZED],
    "with geometry": [v2.RandomAffine(15, (0.1, 0.1), (0.8, 1.2)), JITTER, *SOLARIZED],
    "crop": [v2.RandomResizedCrop(96, (0.08, 1.0)), JITTER, v2.RandomPosterize(2), *SOLARIZED],
    "wide blur": [v2.GaussianBlur(37, (6.0, 6.0))],
    "convolved": [alone(convolved)],
    "own noise": [alone(noisy(np.random.default_rng(0)))],
    "crop, partly covered": [v2.RandomResizedCrop(96, (0.08, 1.0)), alone(partly_covered)],
    "map doubled": [lambda image, heatmap: (image, 2 * heatmap)],
}


@pytest.mark.parametrize("name", COLOURS)
def test_colours_leave_the_map_where_it_is(name: str) -> None:
    """However they change: what shows no clear place for the blocks is no evidence."""
    JointTransform(v2.Compose(COLOURS[name]))(sample(96))


def rotated(image: Tensor, angle: float) -> Tensor:
    return v2.functional.rotate_image(image, angle)


def zoomed(image: Tensor, by: float) -> Tensor:
    return v2.functional.affine_image(image, 0.0, [0, 0], by, [0.0, 0.0])


SMALL: dict[str, Callable[[Tensor], Tensor]] = {
    "3 degrees": lambda image: rotated(image, 3),
    "5 degrees": lambda image: rotated(image, 5),
    "8 degrees": lambda image: rotated(image, 8),
    "within 5 degrees": lambda image: rotated(image, random.uniform(-5, 5)),
    "zoom": lambda image: zoomed(image, 1.1),
    "zoom out": lambda image: zoomed(image, 0.93),
    "shear": lambda image: v2.functional.affine_image(image, 0.0, [0, 0], 1.0, [8.0, 0.0]),
    "2 pixels": lambda image: image.roll(2, -2),
    "3 pixels": lambda image: image.roll(3, -1),
    "transposed": lambda image: image.mT,
}


@pytest.mark.parametrize("name", SMALL)
def test_small_motions_of_the_image_alone(name: str) -> None:
    with pytest.raises(ValueError, match=MOVED):
        JointTransform(alone(SMALL[name]))


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.roll(int(0.02 * image.shape[-1]), -1),
        lambda image: image.flip(-1) if image.shape[-1] > 200 else image,
        lambda image: rotated(image, 2) if image.shape[-1] > 200 else image,
    ],
    ids=["part of the width", "large ones flipped", "large ones turned"],
)
def test_motions_that_depend_on_the_size(change: Callable[[Tensor], Tensor]) -> None:
    joint = JointTransform(alone(change))
    joint(sample(90))
    with pytest.raises(ValueError, match=MOVED):
        joint(sample(224))


@pytest.mark.parametrize("p", [1.0, 0.3])
def test_a_map_turned_upside_down(p: float) -> None:
    def inverted(image: Tensor, heatmap: Tensor) -> Any:
        return image, 255 - heatmap if random.random() < p else heatmap

    with pytest.raises(ValueError, match="the map is low where it was high"):
        JointTransform(inverted)
    JointTransform(lambda image, heatmap: (image, (heatmap - heatmap.mean()) / heatmap.std()))


# --- sizes, state and random numbers --------------------------------------------------------------


def test_transforms_of_one_size_are_tried_at_the_call() -> None:
    def of_one_size(image: Tensor, heatmap: Tensor | None = None) -> Any:
        assert tuple(image.shape[-2:]) == (72, 72)
        return image if heatmap is None else (image.flip(-1), heatmap.flip(-1 if good else -2))

    good = True
    first = JointTransform(of_one_size)(sample(72))
    assert torch.equal(first.heatmap, sample(72).heatmap.flip(-1))
    good = False
    joint = JointTransform(of_one_size)
    for _ in range(2):
        with pytest.raises(ValueError, match=MOVED):
            joint(sample(72))


def test_a_crop_larger_than_the_pattern() -> None:
    assert joint_proof.prove(v2.RandomCrop(224))
    assert joint_proof.prove(v2.RandomCrop(300))


class Counting:
    calls = 0

    def __call__(self, image: Tensor, heatmap: Tensor) -> Any:
        self.calls += 1
        return image, heatmap


def test_trying_leaves_no_trace() -> None:
    before = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    counting = Counting()
    joint = JointTransform(v2.Compose([counting, v2.RandomRotation(20), OwnFlip(True, "numpy")]))
    assert counting.calls == 0
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert repr(np.random.get_state()) == before[2]
    joint(sample())
    assert counting.calls == 1


def test_it_is_tried_once_at_sizes_that_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    joint = JointTransform(v2.RandomRotation(20))
    tried = []
    monkeypatch.setattr(joint_proof, "prove", lambda _, size: tried.append(size))
    for side in (64, 64, 90, 130, 64):
        joint(sample(side))
    pickle.loads(pickle.dumps(joint))(sample())
    assert tried == [(64, 64), (130, 130)]


def test_what_is_erased_is_no_map() -> None:
    """Nobody can have looked where nothing is left of the image."""
    erase = JointTransform(v2.RandomErasing(1.0, (0.1, 0.2), value=200))
    for seed in range(5):
        torch.manual_seed(seed)
        before = sample()._replace(heatmap=torch.ones(1, 64, 64))
        after = erase(before)
        erased = (after.image == 200).all(0) & (before.image != 200).any(0)
        assert erased.any()
        assert not after.heatmap[0][erased].any()
        assert after.heatmap[0][~(after.image == 200).all(0)].all()
        assert torch.equal(before.heatmap, torch.ones(1, 64, 64))
    kept = v2.functional.erase(Heatmap(torch.ones(1, 4, 4)), 1, 1, 2, 2, torch.ones(3, 2, 2))
    assert type(kept) is Heatmap
    assert kept.sum() == 12
