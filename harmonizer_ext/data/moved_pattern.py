"""Pattern of blocks for an image and its map, and what two results say of where the blocks went.

The image with the blocks and the one without hold the same grey levels equally often: half of the
blocks are dark in the one and bright in the other, half the other way round. So whatever depends
on all grey levels, as an equalization does, does to both the same, and they differ at the blocks.
"""

from __future__ import annotations

import enum
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

#: Top and left of the blocks, in parts of the sides: no flip, quarter turn or exchange of halves
#: brings any of them to a place where there was one before.
_PLACES = ((0.27, 0.88), (0.88, 0.52), (0.88, 0.77), (0.40, 0.65), (0.15, 0.65), (0.53, 0.15))
_BLOCK = 0.08

#: Grey levels of a dark block and of a bright one: they differ by 65 or more however they are
#: inverted, and in their first bit.
_DARK, _BRIGHT = (0, 32), 128

#: Correlation of the image's difference with the map's from which on nothing has moved: a shift of
#: a pixel of the smallest blocks gives less.
_SAME = 0.95

#: Part of the area that a difference may seem to fill and still show where the blocks are. Blocks
#: fill 4 % and, in a crop, some times as much; independent noise fills nearly all.
_CLEAR = 0.3

#: Part of a clear difference's energy that lies elsewhere than in the map, by more than
#: ``_TOLERANCE``. A blur that leaves blocks clear takes 0.4 at most out of them.
_ELSEWHERE = 0.65

#: Correlation of both once they are blurred as widely as a block, from which on what seems to lie
#: elsewhere is but spread around its place.
_WIDE, _ALIKE = 3, 0.6

#: Pixels of the pattern by which an image may be moved against its map: they are resampled in two
#: ways, each of which rounds.
_TOLERANCE = 1.3

#: Correlation with a moved copy of the map from which on the copy explains the image.
_EXPLAINED = 0.9

#: Part of a difference's energy that must lie beside the map for a shift to be believed: what
#: covers a part of a block moves its middle, but shows nothing beside it.
_BESIDE = 0.06

#: Side of the pictures in which moved copies are looked for.
_FINE = 128


#: Image and map without the blocks, and with them.
Pair = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


class Shown(enum.Enum):
    """Kinds of what one draw shows of image and map."""

    NOTHING = "the image does not depend on the blocks"
    UNCLEAR = "the image differs, but at no clear place"
    TOGETHER = "the blocks of the map are those of the image"
    AROUND = "the image differs around the blocks of the map, and is no copy of it"
    SHIFTED = "a copy of the map moved by a little is where the image is"
    APART = "the blocks of the image are elsewhere than those of the map"
    INVERTED = "the map is low where it was high"


def pattern(height: int, width: int) -> Pair:
    """Image (3, H, W) uint8 and map (1, H, W) float32, without and with the blocks."""
    generator = torch.Generator("cpu").manual_seed(0)

    def noise(rows: int, columns: int, levels: tuple[int, int]) -> Tensor:
        shape = (1, rows, columns)
        return torch.randint(*levels, shape, generator=generator, device="cpu", dtype=torch.uint8)

    size_y, size_x = (max(2, round(_BLOCK * side)) for side in (height, width))
    images = [noise(height, width, (0, 256))]
    images.append(images[0].clone())
    dark = noise(size_y, size_x, _DARK)
    maps = [torch.full((1, height, width), 20.0, device="cpu") for _ in range(2)]
    for number, (top, left) in enumerate(_PLACES):
        y, x = round(top * height), round(left * width)
        place = (slice(None), slice(y, y + size_y), slice(x, x + size_x))
        images[number % 2][place] = dark
        images[1 - number % 2][place] = dark + _BRIGHT
        maps[1][place] = 220.0
    colours = [image.expand(3, -1, -1).contiguous() for image in images]
    return (colours[0], maps[0]), (colours[1], maps[1])


def shown(
    without: tuple[Tensor, Tensor],
    with_blocks: tuple[Tensor, Tensor],
    side: int,
    little: bool = True,
) -> Shown:
    """The place of the image's blocks against that of the map's, by two results of one draw.

    Args:
        without: image (C, H, W) and map (1, H, W) that came of the pattern without the blocks.
        with_blocks: those that came of the pattern with them.
        side: shorter side of the pattern.
        little: whether small shifts are looked for, which takes the most time.
    """
    if without[0].shape != with_blocks[0].shape:
        return Shown.NOTHING
    difference = _difference(with_blocks[0], without[0]).abs().mean(0)
    change = _difference(with_blocks[1], without[1]).mean(0)
    if not difference.any():
        return Shown.NOTHING
    gain, loss = (change.clamp(min=0).square().sum(), change.clamp(max=0).square().sum())
    if loss > 4 * gain:
        return Shown.INVERTED
    if _correlation(difference, change) > _SAME:
        return Shown.TOGETHER
    return _compared(*_coarse(difference, change), side, little)


def _difference(one: Tensor, other: Tensor) -> Tensor:
    return one.float().nan_to_num(0, 0, 0) - other.float().nan_to_num(0, 0, 0)


def _coarse(difference: Tensor, change: Tensor) -> tuple[Tensor, Tensor, float]:
    """Both with no side over ``_FINE``, and by how much they were made smaller."""
    height, width = difference.shape
    by = max(1.0, max(height, width) / _FINE)
    if by > 1:
        size = [max(8, round(side / by)) for side in (height, width)]
        both = torch.stack([difference, change])[None]
        difference, change = F.interpolate(both, size, mode="area")[0]
    return difference, change, by


def _compared(difference: Tensor, change: Tensor, by: float, side: int, little: bool) -> Shown:
    smooth = _smoothed(difference, 1)
    smooth = (smooth - smooth.median()).clamp(min=0)
    clear = _filled(smooth) < _CLEAR
    pixels = _TOLERANCE * max(1.0, _width(change) / (_BLOCK * side / by)) / by
    if clear and _elsewhere(smooth, change, pixels) > _ELSEWHERE:
        blurred = _smoothed(torch.stack([difference, change]), _WIDE)
        if _correlation(*blurred) < _ALIKE:
            return Shown.APART
    beside = _elsewhere((difference - difference.median()).clamp(min=0), change, 0)
    if little and beside > _BESIDE and _moved_by_a_little(difference, change, max(pixels, 0.5)):
        return Shown.SHIFTED
    return Shown.AROUND if clear else Shown.UNCLEAR


def _correlation(one: Tensor, other: Tensor) -> float:
    one, other = one - one.mean(), other - other.mean()
    scale = one.norm() * other.norm()
    return float((one * other).sum() / scale) if scale > 0 else 0.0


def _smoothed(picture: Tensor, radius: int) -> Tensor:
    """Means of means over squares, of a picture or several, which leave the size as it is."""
    rows, columns = (_means(side, radius) for side in picture.shape[-2:])
    smooth: Tensor = rows @ picture @ columns.T
    return smooth


@functools.lru_cache(32)
def _means(side: int, radius: int) -> Tensor:
    """Means of means of so many neighbours, as a matrix: on a CPU the fastest for so few."""
    places = torch.arange(side, device="cpu")
    near = (places[:, None] - places).abs() <= radius
    means = near / near.sum(1, keepdim=True)
    return means @ means


def _filled(picture: Tensor) -> float:
    """Part of the area that a picture's mass fills: 1 where it is the same everywhere."""
    energy = picture.square().mean()
    return float(picture.mean().square() / energy) if energy > 0 else 1.0


def _width(change: Tensor) -> float:
    """Width of the blocks in a map, from their area and their edges."""
    edges = change.diff(dim=0).abs().sum() + change.diff(dim=1).abs().sum()
    return float(4 * change.abs().sum() / edges) if edges > 0 else 0.0


def _elsewhere(difference: Tensor, change: Tensor, pixels: float) -> float:
    """Part of the image's difference that is farther than so many pixels from the map's."""
    largest = change.amax()
    if largest <= change.median():
        return 1.0
    near = (change > largest / 2).float()
    radius = round(pixels)
    near = F.max_pool2d(near[None], 2 * radius + 1, stride=1, padding=radius)[0]
    energy = difference.square()
    return float((energy * (1 - near)).sum() / energy.sum())


# --- copies of the map, moved by a little ---------------------------------------------------------


def _moved_by_a_little(difference: Tensor, change: Tensor, pixels: float) -> bool:
    """Whether the map explains the image well once it is moved by more than so many pixels.

    The affine motion is found by least squares, first between smooth pictures, then between
    sharper ones.
    """
    change = change - change.median()
    motion = torch.zeros(2, 3, device=change.device)
    for radius in (4, 1):
        image, before = _smoothed(torch.stack([difference, change]), radius)
        for _ in range(3):
            motion = motion + _step(image, before, motion)
            if not motion.isfinite().all() or motion.abs().max() > 0.5:
                return False
    after = _warped(before, motion)
    fits = [_correlation(image, copy) for copy in (before, after)]
    if fits[1] < _EXPLAINED or 1 - fits[1] > (1 - fits[0]) / 2:
        return False
    height, width = image.shape
    x, y = _coordinates(image)
    moved = torch.einsum("ij,jhw->ihw", motion, torch.stack([x, y, torch.ones_like(x)]))
    squares = (moved[0] * width / 2).square() + (moved[1] * height / 2).square()
    weight = after.clamp(min=0)
    return float((squares * weight).sum() / weight.sum()) > pixels**2


def _coordinates(picture: Tensor) -> tuple[Tensor, Tensor]:
    """Column and row of every pixel, from -1 to 1."""
    rows, columns = (
        (torch.arange(side, device=picture.device) * 2 + 1) / side - 1 for side in picture.shape
    )
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return x, y


def _warped(picture: Tensor, motion: Tensor) -> Tensor:
    x, y = _coordinates(picture)
    moved = torch.einsum("ij,jhw->hwi", motion, torch.stack([x, y, torch.ones_like(x)]))
    grid = torch.stack([x, y], -1) + moved
    return F.grid_sample(picture[None, None], grid[None], align_corners=False)[0, 0]


def _step(image: Tensor, change: Tensor, motion: Tensor) -> Tensor:
    """Least-squares improvement (2, 3) of a motion, in halves of the sides."""
    now = _warped(change, motion)
    down, right = torch.gradient(now)
    height, width = now.shape
    across, along = right * width / 2, down * height / 2
    x, y = _coordinates(now)
    columns = [now, torch.ones_like(now)]
    for slope in (across, along):
        columns += [slope * x, slope * y, slope]
    design = torch.stack(columns).flatten(1).double()
    design_scale = design.norm(dim=1, keepdim=True).clamp(min=1e-12)
    design = design / design_scale
    gram = design @ design.T + 1e-6 * torch.eye(8, dtype=torch.float64, device=design.device)
    found = torch.linalg.solve(gram, design @ image.flatten().double()) / design_scale[:, 0]
    if found[0] <= 0:
        return torch.full((2, 3), torch.nan, device=image.device)
    step: Tensor = (found[2:] / found[0]).reshape(2, 3)
    return step.to(image.dtype)
