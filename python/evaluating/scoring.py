"""Networks on images with human maps: one pass over the data for each of them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import classifiers
import torch
from torch import Tensor
from tqdm import tqdm

from evaluating.data import ImageSet
from evaluating.networks import Network
from harmonizer_ext import alignment
from harmonizer_ext.explanations import InputGradient, importance_maps
from harmonizer_ext.files.text import shown
from harmonizer_ext.saliency import Explain

#: How many images a network's gallery shows of its best, of its median and of its worst; and
#: how many the random one.
EXTREMES = 3
RANDOM = 9


@dataclasses.dataclass
class Result:
    """One network, or the control, on all images.

    Attributes:
        name, description: of the network.
        size: side of its images and maps.
        parameters: number of them; 0 of the control.
        explanation: how its maps were made.
        values: metrics per image.
        correct: (n,) float64, 1 where the highest logit is the label's; None of the control.
        seconds: of the pass over the data.
        classes: of the network; 0 of the control.
    """

    name: str
    description: str
    size: int
    parameters: int
    explanation: str
    values: alignment.AlignmentValues
    correct: Tensor | None
    seconds: float
    classes: int = 0


@dataclasses.dataclass
class Panel:
    """An image with its maps.

    Attributes:
        row: number of the image in the data set.
        label: its class.
        image: (3, H, W) in 0..255.
        human: (H, W).
        maps: (H, W) by the name of the network.
        correlations: Spearman's, by the name of the network.
    """

    row: int
    label: int
    image: Tensor
    human: Tensor
    maps: dict[str, Tensor]
    correlations: dict[str, float]


@dataclasses.dataclass
class Gallery:
    """Panels and the rule that chose them.

    Attributes:
        title: what they show.
        networks: names of those whose maps are shown.
        groups: panels by what they are: "best", "median", "worst", or "random".
    """

    title: str
    networks: list[str]
    groups: dict[str, list[Panel]]


@dataclasses.dataclass
class Evaluation:
    """All networks on one set of images.

    Attributes:
        data: the images.
        results: of the networks, in their order.
        controls: what the mean map of all other images reaches, one for each size of maps.
        pairs: names of (baseline, harmonized).
        ceiling: agreement between people, a Spearman correlation.
        reducers: resolutions that were compared.
        galleries: random images first, then one for each network.
        settings: how it was made, in words; for report and JSON.
        accuracy: top-1 by name from elsewhere, as a part of 1; empty where there is none.
    """

    data: ImageSet
    results: list[Result]
    controls: list[Result]
    pairs: list[tuple[str, str]]
    ceiling: float
    reducers: tuple[int, ...]
    galleries: list[Gallery]
    settings: dict[str, Any]
    accuracy: dict[str, float] = dataclasses.field(default_factory=dict)

    def by_name(self, name: str) -> Result:
        return next(result for result in self.results if result.name == name)


def evaluate(
    networks: Sequence[Network],
    data: ImageSet,
    *,
    explain: Explain | None = None,
    pairs: Sequence[tuple[str, str]] = (),
    ceiling: float = alignment.CLICKME_CEILING,
    reducers: Sequence[int] = (1,),
    batch_size: int = 64,
    workers: int | None = None,
    device: str | torch.device = "cpu",
    channels_last: bool = False,
    center_bias: bool = True,
    gallery: bool = True,
    seed: int = 0,
    quiet: bool = False,
) -> Evaluation:
    """Measures how far the networks look where people look.

    The map of an image explains the logit of its true class. All metrics are those of
    ``harmonizer_ext.alignment``; pairs with a constant map are left out of them and counted.

    Args:
        networks: of different names; each is on ``device`` while it is its turn.
        data: images with human maps.
        explain: None is the absolute input gradient, its largest value over channels, as in the
            released ``evaluate_clickme``. A network's own goes before it.
        pairs: names of a baseline and of the same network harmonized.
        ceiling: of the alignment score.
        reducers: resolutions to compare at, each a division of the size. 1 is always among them.
        batch_size: of images at a time.
        workers: processes that decode; None is 2, on a CPU 0, where the network wants every core.
        device: where the networks run.
        channels_last: memory format of networks and images.
        center_bias: whether to measure the mean map of all other images as a control. Keeps the
            human maps in memory, 200 KB for an image of 224x224.
        gallery: whether to keep images and maps to show.
        seed: of the choice of random images and of the bootstrap.
        quiet: no progress bars.

    Raises:
        ValueError: no networks, two of one name, a pair of unknown names, a ceiling or a batch size
            that is not positive, or labels that a network has no logit for.
    """
    names = [network.name for network in networks]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"networks: expected one or more of different names, got {names}")
    for name in {name for pair in pairs for name in pair}:
        if name not in names:
            raise ValueError(f"pair: expected names of networks, {', '.join(names)}; got {name!r}")
    # Said before hours of work.
    if not ceiling > 0:
        raise ValueError(f"ceiling must be positive, got {ceiling}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected 1 or more, got {batch_size}")
    reducers = tuple(dict.fromkeys((1, *reducers)))
    explain = explain or InputGradient("abs_max")
    device = torch.device(device)
    if workers is None:
        workers = 0 if device.type == "cpu" else 2
    results: list[Result] = []
    human_maps: dict[int, list[Tensor]] = {}
    for network in networks:
        size = network.form.size
        wanted = center_bias and size not in human_maps
        kept: list[Tensor] | None = human_maps.setdefault(size, []) if wanted else None
        meter = alignment.AlignmentMeter(reducers=reducers)
        with _on(network, device, channels_last):
            batches = data.batches(
                size, batch_size, workers=workers, pin_memory=device.type == "cuda"
            )
            start = time.perf_counter()
            correct, classes = _pass(
                network, network.explain or explain, _progress(batches, network.name, quiet),
                meter, data, kept, device, channels_last,
            )  # fmt: skip
        results.append(
            Result(
                network.name,
                network.description,
                size,
                network.parameters,
                repr(network.explain or explain),
                meter.compute(gather=False),
                correct,
                time.perf_counter() - start,
                classes,
            )
        )
    controls = [
        _control(size, maps, reducers, device)
        for size, maps in human_maps.items()
        if sum(map(len, maps)) > 1
    ]
    galleries: list[Gallery] = []
    if gallery:
        explained = {network.name: network.explain or explain for network in networks}
        galleries = _galleries(
            networks, results, pairs, data, explained, device, channels_last, seed
        )
    return Evaluation(
        data=data,
        results=results,
        controls=controls,
        pairs=list(pairs),
        ceiling=ceiling,
        reducers=reducers,
        galleries=galleries,
        settings={
            "explanation": ", ".join(dict.fromkeys(result.explanation for result in results)),
            "seed": seed,
            "batch_size": batch_size,
            "device": str(device),
        },
    )


class _on:  # noqa: N801 - used as a verb, like contextlib's
    """A network in eval mode on a device, and back on the CPU in its own mode."""

    def __init__(self, network: Network, device: torch.device, channels_last: bool) -> None:
        self.model, self.device = network.model, device
        self.format = torch.channels_last if channels_last else torch.preserve_format

    def __enter__(self) -> None:
        self.training = self.model.training
        self.model.eval().to(device=self.device, memory_format=self.format)

    def __exit__(self, *error: object) -> None:
        self.model.train(self.training).to("cpu" if self.device.type != "cpu" else self.device)


def _progress(batches: Any, name: str, quiet: bool) -> Iterator[Any]:
    return tqdm(batches, desc=shown(name), unit="batch", disable=quiet, dynamic_ncols=True)


def _pass(
    network: Network,
    explain: Explain,
    batches: Iterator[Any],
    meter: alignment.AlignmentMeter,
    data: ImageSet,
    kept: list[Tensor] | None,
    device: torch.device,
    channels_last: bool,
) -> tuple[Tensor, int]:
    """Feeds the meter, keeps the human maps where asked to.

    Returns:
        1 for each image that is recognized, else 0; and the number of classes.
    """
    correct: list[Tensor] = []
    classes = 0
    numbers = torch.tensor(data.rows, dtype=torch.int64, device="cpu")
    done = 0
    for batch in batches:
        if kept is not None:
            # A batch from a worker is in shared memory, of which there may be little.
            kept.append(batch.heatmap[:, 0].clone())
        images, human, labels = (
            tensor.to(device, non_blocking=True)
            for tensor in (batch.image, batch.heatmap, batch.label)
        )
        pixels = network.form(images, channels_last)
        if not correct:
            with torch.no_grad():
                classes = network.model(pixels[:1]).shape[-1]
            if data.imagenet:
                classifiers.check_imagenet(classes, network.name, network.imagenet)
            if data.listed not in (None, classes):
                raise ValueError(
                    f"data: expected a line for each of the {classes} classes of {network.name} in "
                    f"classes.txt, got {data.listed}, which are then other classes"
                )
            if data.alphabetical not in (None, classes):
                raise ValueError(
                    f"data: expected a folder for each of the {classes} classes of {network.name}, "
                    f"got {data.alphabetical}, whose alphabetical order says nothing about the "
                    f"network's; labels.csv or classes.txt beside images/ gives their numbers"
                )
        # On the CPU: a device would not say which label it was.
        lowest, highest = int(batch.label.min()), int(batch.label.max())
        if lowest < 0 or highest >= classes:
            raise ValueError(
                f"data: expected labels from 0 to {classes - 1}, the classes of {network.name}, "
                f"got {lowest if lowest < 0 else highest}; are the data labelled for this network?"
            )
        logits, maps = importance_maps(explain, network.model, pixels, labels, undefined="keep")
        meter.update(maps.float(), human, indices=numbers[done : done + len(labels)])
        correct.append((logits.argmax(1) == labels).double())
        done += len(labels)
    return torch.cat(correct).cpu(), classes


class _Moved:
    """Human maps that are brought to a device batch by batch, as often as they are read."""

    def __init__(self, batches: list[Tensor], device: torch.device) -> None:
        self.batches, self.device = batches, device

    def __iter__(self) -> Iterator[Tensor]:
        return (batch.to(self.device) for batch in self.batches)


def _control(
    size: int, human_maps: list[Tensor], reducers: Sequence[int], device: torch.device
) -> Result:
    start = time.perf_counter()
    values = alignment.center_bias(
        _Moved(human_maps, device), meter=alignment.AlignmentMeter(reducers=reducers)
    )
    seconds = time.perf_counter() - start
    text = "mean human map of all other images"
    return Result("Centre-bias control", text, size, 0, text, values, None, seconds)


# --- galleries ------------------------------------------------------------------------------------

#: With more networks than these a network's gallery shows its own maps and its partner's only.
_MOST_COLUMNS = 6


def _galleries(
    networks: Sequence[Network],
    results: list[Result],
    pairs: Sequence[tuple[str, str]],
    data: ImageSet,
    explained: dict[str, Explain],
    device: torch.device,
    channels_last: bool,
    seed: int,
) -> list[Gallery]:
    """Chooses images, and explains these few again: no map is kept during the pass."""
    names = [network.name for network in networks]
    generator = torch.Generator("cpu").manual_seed(seed)
    chosen = torch.randperm(len(data), generator=generator, device="cpu")[:RANDOM]
    plans = [("Images drawn at random", names, {"random": sorted(chosen.tolist())})]
    for result in results:
        partners = [name for pair in pairs if result.name in pair for name in pair]
        shown = names
        if len(names) > _MOST_COLUMNS:
            shown = [name for name in names if name == result.name or name in partners]
        groups = _extremes(result.values.values["spearman"])
        if groups:
            plans.append((result.name, shown, groups))
    wanted = sorted(
        {place for _, _, groups in plans for places in groups.values() for place in places}
    )
    panels = _panels(networks, results, data, explained, wanted, device, channels_last)
    return [
        Gallery(title, shown, {key: [panels[p] for p in places] for key, places in groups.items()})
        for title, shown, groups in plans
    ]


def _extremes(correlations: Tensor) -> dict[str, list[int]]:
    """Places of the highest, middle and lowest correlations, each image once."""
    order = correlations.nan_to_num(nan=torch.inf).argsort()
    order = order[: int((~correlations.isnan()).sum())].tolist()
    count = min(EXTREMES, len(order) // 3)
    middle = (len(order) - count) // 2
    groups = {
        "best": order[::-1][:count],
        "median": order[middle : middle + count],
        "worst": order[:count],
    }
    return groups if count else {}


def _panels(
    networks: Sequence[Network],
    results: list[Result],
    data: ImageSet,
    explained: dict[str, Explain],
    places: list[int],
    device: torch.device,
    channels_last: bool,
) -> dict[int, Panel]:
    panels: dict[int, Panel] = {}
    sets = {network.form.size: data.at(network.form.size) for network in networks}
    for network, result in zip(networks, results, strict=True):
        size = network.form.size
        with _on(network, device, channels_last):
            for place in places:
                sample = sets[size][data.rows[place]]
                if place not in panels:
                    panels[place] = Panel(
                        data.rows[place],
                        sample.label,
                        sample.image.float(),
                        sample.heatmap[0],
                        {},
                        {},
                    )
                pixels = network.form(sample.image[None].to(device), channels_last)
                label = torch.tensor([sample.label], device=device)
                _, maps = importance_maps(
                    explained[network.name], network.model, pixels, label, undefined="keep"
                )
                panels[place].maps[network.name] = maps[0].float().cpu()
                correlation = result.values.values["spearman"][place].item()
                panels[place].correlations[network.name] = correlation
    return panels
