"""Calls of every public name, by subject: the scenarios that test_defaults.py runs."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm_networks
import torch
from small_networks import Through, Transformer, make_batch
from torch import Tensor, nn

import harmonizer_ext as hx
from harmonizer_ext import alignment, clickme, data, explanations, map_losses, revealed_stimuli
from harmonizer_ext.data import sources

#: Made under ordinary defaults; what it returns is called under the others.
Scenario = Callable[[Path], Callable[[], Any]]
SCENARIOS: dict[str, Scenario] = {}

#: Those that need what the extra "train" installs.
WITH_TRAIN: set[str] = set()


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


def with_train(function: Scenario) -> Scenario:
    WITH_TRAIN.add(function.__name__)
    return scenario(function)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def step_batch() -> dict[str, Tensor]:
    return make_batch(seeded(), 4, 8) | {"tokens": torch.tensor([1.0, 0.0, 0.5, 1.0])}


def network(kind: Callable[[], nn.Module] = Transformer) -> nn.Module:
    torch.manual_seed(0)
    return kind()


def trained(model: nn.Module, loss: Tensor) -> list[Tensor | None]:
    model.zero_grad()
    loss.backward()
    return [p.grad for p in model.parameters()]


@scenario
def losses(_: Path) -> Callable[[], Any]:
    maps, human = torch.randn(3, 2, 9, 8, generator=seeded()), torch.rand(3, 9, 8)
    tokens = torch.tensor([1.0, 0.0, 0.5])
    names = hx.available_backends()
    options = [
        {"formulation": f, "distance": d, "reduction": r, "backend": b}
        for f, d in (("released", "mse"), ("paper", "mse"), ("paper", "l2"))
        for r in ("mean", "mean_valid", "sum", "none")
        for b in (*names, None)
    ]

    def run() -> Any:
        results: list[Any] = [hx.available_backends("cpu")]
        for chosen in options:
            leaf = maps.detach().requires_grad_()
            for given in (tokens, None):
                value = hx.HarmonizationLoss(**chosen)(leaf, human, given)
                results += [value, *torch.autograd.grad(value.sum(), leaf)]
        for dtype in (torch.float64, torch.float16, torch.bfloat16):
            leaf = maps.to(dtype).requires_grad_()
            value = hx.harmonization_loss(leaf, human.to(dtype), tokens)
            results += [value, *torch.autograd.grad(value, leaf)]
        empty = torch.zeros_like(maps)[:0].requires_grad_()
        results.append(hx.harmonization_loss(empty, human[:0]))
        return [*results, hx.HarmonizationLoss().extra_repr()]

    return run


@scenario
def building_blocks(_: Path) -> Callable[[], Any]:
    x, y = torch.randn(2, 3, 9, 8, generator=seeded()), torch.rand(6, 9, 8)

    def run() -> Any:
        results = []
        for backend in (*hx.available_backends(), None):
            a, b = x.detach().requires_grad_(), y.detach().requires_grad_()
            pyramid = hx.gaussian_pyramid(a, 3, backend=backend)
            cut = hx.standardize_cut(a, backend=backend)
            error = hx.positive_part_mse(a.flatten(0, 1), b, backend=backend)
            total = sum(level.sum() for level in pyramid) + cut.sum() + error.sum()
            results += [*pyramid, cut, error, *torch.autograd.grad(total, (a, b))]
        return results

    return run


@scenario
def steps(_: Path) -> Callable[[], Any]:
    batch = step_batch()
    options: list[dict[str, Any]] = [
        {}, {"rows": "all", "gradient_norms": True}, {"formulation": "paper", "distance": "l2"},
        {"reduction": "mean_valid"}, {"alignment": map_losses.BinaryCrossEntropy()},
        {"explain": explanations.GradCAM("first")}, {"second_order": "finite_difference"},
    ]  # fmt: skip
    kinds = [lambda: Through(nn.GELU()), lambda: Through(nn.BatchNorm2d(4)), Transformer]
    models = [[network(kind) for kind in kinds] for _ in options]
    callables = [network(lambda: Through(nn.Tanh())) for _ in range(2)]

    def run() -> Any:
        results: list[Any] = []
        for chosen, pair in zip(options, models, strict=True):
            for model in pair:
                if isinstance(model, Transformer) and "explain" in chosen:
                    continue
                if "second_order" in chosen and any(
                    isinstance(m, nn.BatchNorm2d) for m in model.modules()
                ):
                    continue
                step = hx.HarmonizerLoss(model, lambda_harmonization=3.0, **chosen)
                out = step(*batch.values())
                results += [dataclasses.replace(out, loss=out.loss.detach()), step.extra_repr()]
                results.append(trained(model, out.loss))
                results.append(hx.weight_penalty(model))
        without = {k: v for k, v in batch.items() if k != "tokens"}
        model = callables[0]
        out = hx.harmonizer_loss(lambda x: model(x), **without)
        results.append(trained(model, out.loss))
        none = batch | {"tokens": torch.zeros_like(batch["tokens"])}
        results.append(hx.harmonizer_loss(callables[1], **none).loss)
        return results

    return run


@scenario
def saliencies(_: Path) -> Callable[[], Any]:
    batch, model = step_batch(), network()
    gated = network(lambda: Through(nn.Hardsigmoid()))
    soft = torch.rand(4, 4, generator=seeded())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def run() -> Any:
        images, labels = batch["images"], batch["labels"]
        results: list[Any] = []
        for targets in (labels, soft, lambda logits: logits[:, 1]):
            for graph in (False, True):
                results += hx.input_gradient(model, images, targets, create_graph=graph)
        with hx.exact_attention():
            results.append(model(images))
        results += hx.input_gradient(model, images, labels, create_graph=True, scaler=scaler)
        results.append(hx.make_twice_differentiable(gated))
        results += hx.input_gradient(gated, images, labels, create_graph=True)
        for explain in (None, hx.input_gradient):
            found = hx.check_gradients(gated, images, labels, explain=explain)
            results += [found, str(found)]
        return results

    return run


@scenario
def explained(_: Path) -> Callable[[], Any]:
    batch, model = step_batch(), network(lambda: Through(nn.GELU()))

    def by_numpy(images: Tensor, labels: Tensor) -> Any:
        return images.detach().numpy().mean(1)

    chosen = [
        explanations.InputGradient("l2"), explanations.GradientTimesInput(),
        explanations.SmoothGrad(2), explanations.SmoothGrad(2, seed=None),
        explanations.IntegratedGradients(2), explanations.GradCAM("first"),
        explanations.IntegratedGradients(2, torch.ones(3, 1, 1)),
        explanations.Attribution(by_numpy),
    ]  # fmt: skip

    def run() -> Any:
        results: list[Any] = []
        for explain in chosen:
            made = explanations.importance_maps(
                explain, model, batch["images"], batch["labels"], undefined="keep"
            )
            results += made
            results += explain(model, batch["images"], batch["labels"], create_graph=False)
        return [*results, explanations.reduce_channels(batch["images"], "abs_max")]

    return run


@scenario
def alignments(_: Path) -> Callable[[], Any]:
    maps, human = torch.randn(3, 7, 6, generator=seeded()), torch.rand(3, 7, 6)

    def run() -> Any:
        results: list[Any] = [map_losses.min_max(maps)]
        for compare in (
            map_losses.MinMaxError(), map_losses.CosineDistance(), map_losses.PixelCrossEntropy(),
            map_losses.PixelCrossEntropy(hard=True), map_losses.BinaryCrossEntropy(masked=True),
        ):  # fmt: skip
            leaf = maps.detach().requires_grad_()
            rows = compare(leaf, human)
            results += [rows, *torch.autograd.grad(rows.sum(), leaf)]
        return results

    return run


@scenario
def metrics(_: Path) -> Callable[[], Any]:
    a, b = torch.randn(6, 1, 8, 8, generator=seeded()), torch.rand(6, 8, 8, generator=seeded(1))
    whole = (b * 9).to(torch.uint8)
    people = [torch.rand(n, 8, 8, generator=seeded(n)) for n in (1, 3, 4, 9)]
    number = torch.arange(6)

    def run() -> Any:
        results: list[Any] = []
        for x, y in ((a, b), (a.double(), b), (a, whole), (whole.long(), b.half())):
            results += [getattr(alignment, name)(x, y) for name in ("spearman", "pearson")]
            results += [alignment.dice(x, y, 20), alignment.iou(x, y)]
        results.append(alignment.alignment_score(a, b))
        results.append(alignment.score_correlations(alignment.spearman(a, b)))
        results.append(alignment.summarize(alignment.spearman(a, b)))
        results += [alignment.reduce_resolution(m, 2) for m in (b, whole)]
        meter = alignment.AlignmentMeter(metrics=("spearman", "pearson", "dice", "iou"),
                                         reducers=(1, 2))  # fmt: skip
        results.append(meter.compute())
        meter.update(a, b, indices=number)
        values = meter.compute()
        results += [values, values.summaries(), values.score(), meter.names]
        meter.reset()
        meter.update(a.flip(0), b, indices=number)
        results.append(alignment.compare(values, meter.compute()))
        results.append(alignment.center_bias(b))
        results.append(alignment.split_half_ceiling(people, splits=5))
        results.append(alignment.split_half_ceiling(people, splits=50, spearman_brown=True))
        return results

    return run


@scenario
def stimuli(_: Path) -> Callable[[], Any]:
    image = (255 * torch.rand(3, 24, 20, generator=seeded())).byte()
    importance = torch.rand(24, 20, generator=seeded(1)) - 0.5
    logits, correct = torch.randn(3, 1000), torch.rand(8, 3, generator=seeded(2)) > 0.4
    people = torch.tensor([0.5, 0.7, 0.9])

    def run() -> Any:
        count = revealed_stimuli.important_pixels(importance)
        made = revealed_stimuli.revealed_stimuli(image, importance, [5, count], seed=3)
        return [
            count, made, revealed_stimuli.reveal_levels(4),
            revealed_stimuli.phase_scrambled(image, seeded()),
            revealed_stimuli.animal_probability(logits), revealed_stimuli.decision_curve(correct),
            revealed_stimuli.correlate_curves(correct, people, resamples=20),
        ]  # fmt: skip

    return run


# --- data -----------------------------------------------------------------------------------------


def samples(count: int = 6) -> list[clickme.ClickMeSample]:
    pixels = (255 * torch.rand(count, 3, 20, 20, generator=seeded())).byte()
    maps = 255 * torch.rand(count, 1, 20, 20, generator=seeded(1))
    return [
        clickme.ClickMeSample(pixels[row], maps[row], row, torch.tensor(float(row % 2)))
        for row in range(count)
    ]


@scenario
def batches(_: Path) -> Callable[[], Any]:
    mapped = samples()
    unmapped = [(s.image, s.label) for s in samples(9)]
    rows = next(iter(data.MixedBatchSampler(6, 9, 6, mapped_share=0.5)))

    def run() -> Any:
        results: list[Any] = [data.collate(mapped), data.InMemory(mapped, threads=1)[2]]
        results.append(sources.without_map({"image": mapped[0].image, "label": 3}))
        sampler = data.MixedBatchSampler(6, 9, 6, mapped_share=0.5, seed=3)
        sampler.set_epoch(1)
        results.append(list(sampler))
        mixed = data.MixedDataset(mapped, unmapped, on_error="mark")
        results += [mixed[rows[0]], mixed.read(rows[-1]), mixed.skipped]
        for workers in (0, 1):
            results += list(data.create_loader(mixed, sampler, workers=workers))
        results += list(data.MixedStream(mapped, unmapped, mapped_share=0.3))
        images, heatmaps, labels, tokens = data.collate(mapped)
        assert isinstance(labels, Tensor)
        for step in range(3):
            mixup = data.Mixup(0.2, 10, prob=0.6)
            results += mixup(images, heatmaps, labels, tokens, step=step)
        return results

    return run


@scenario
def released_files(folder: Path) -> Callable[[], Any]:
    if importlib.util.find_spec("PIL") is None:
        pytest.skip("Pillow (extra: train) makes the JPEGs")
    import clickme_shards

    records = [clickme_shards.framed(clickme_shards.record(seed)) for seed in range(4)]
    (folder / "a.tfrecords").write_bytes(b"".join(records[:2]))
    (folder / "b.tfrecords").write_bytes(records[2] + b"x" * 40 + records[3])
    one = {"image": clickme_shards.picture(0), "heatmap": clickme_shards.click_map(0)[..., None]}
    np.savez(folder / "0.npz", label=7, **one)

    def run() -> Any:
        written = io.BytesIO()
        results: list[Any] = []
        for preprocess in (None, "released", "released-heatmap"):
            read = clickme.ClickMe(
                folder / "*.tfrecords", preprocess=preprocess, decoder="pillow", on_error="skip"
            )
            results += [read[0], read.read(1), read.label(0), read.locate(0)[1], read[2]]
            results.append([offset for _, offset in read.skipped])
        files = clickme.ClickMeFiles(folder / "*.npz", preprocess="released")
        results += [files[0], files.label(0), files.locate(0)[1], files.skipped, files.read(0)]
        results.append(clickme.released_preprocessing(*read[0][:2]))
        with contextlib.suppress(TypeError):
            clickme.write_records(written, records)
        return results

    return run


@with_train
def streams(folder: Path) -> Callable[[], Any]:
    import clickme_convert
    import clickme_shards

    records = [clickme_shards.framed(clickme_shards.record(seed)) for seed in range(3)]
    (folder / "a.tfrecords").write_bytes(b"".join(records))

    def run() -> Any:
        clickme_convert.convert_shard(folder / "a.tfrecords", folder / "a.tar")
        stream = clickme.ClickMeWebDataset(folder / "a.tar", preprocess="released")
        stream.set_epoch(2)
        found = clickme_convert.verify_tar(folder / "a.tar")
        assert [problem.rpartition(" ")[2][-13:] for problem in found.problems] == ["manifest.json"]
        return [list(stream), stream.skipped]

    return run


@with_train
def augmented(_: Path) -> Callable[[], Any]:
    timm_networks.import_torchvision()
    from torchvision.transforms import v2

    from harmonizer_ext.data import augmentation, tv_heatmap

    chosen = samples(2)

    def run() -> Any:
        transforms = [
            augmentation.training_transform(16, rotation=20.0),
            augmentation.evaluation_transform(12),
            augmentation.JointTransform(v2.RandomPerspective(0.3, p=1.0)),
        ]
        results = [transform(sample) for transform in transforms for sample in chosen]
        heatmap = tv_heatmap.Heatmap(chosen[0].heatmap)
        return [*results, v2.functional.rotate(heatmap, 20.0).as_subclass(Tensor)]

    return run


# --- helpers of the programs ----------------------------------------------------------------------


@with_train
def evaluations(folder: Path) -> Callable[[], Any]:
    import evaluations as shared
    from evaluating import data as evaluating_data
    from evaluating import figures, networks, pictures, report, summary

    shards = shared.write_shards(folder / "shards", 4)
    pairs = shared.write_folder(folder / "folder", 4)
    chosen = [shared.network("first"), shared.network("second", seed=1)]
    small = shared.network("third", size=32)

    def run() -> Any:
        images = evaluating_data.ImageSet(shards, decoder="pillow")
        found = shared.run(chosen, images, gallery=True, reducers=(1, 4),
                           pairs=[("first", "second")])  # fmt: skip
        numbers = summary.summarize(found)
        summary.write_json(numbers, folder / "numbers.json")
        summary.write_images(found, folder / "images.csv")
        report.write(found, folder / "report.html")
        other = evaluating_data.ImageSet(pairs, max_images=3)
        again = shared.run([small], other)
        values = [result.values for result in (*found.results, *again.results)]
        sample = other.at(32)[1]
        return [
            values, [r.correct for r in found.results],
            summary.pareto_front(found, numbers["networks"]),
            summary.names_of_pairs(found), found.by_name("first").size, other.preprocessing,
            sample, summary.table(numbers) != "",
            summary.cell({"mean": 0.5, "standard_error": 0.1}),
            len(figures.scatter(found, numbers)) > 0,
            len(figures.distributions(found)) > 0, pictures.picture(sample.image.byte()),
            pictures.heat(sample.heatmap[0]), small.parameters,
            networks.explanation("smoothgrad", small.model, samples=2),
        ]  # fmt: skip

    return run


@with_train
def training_helpers(folder: Path) -> Callable[[], Any]:
    import shortcut_digits
    from training import config, ema, evaluation, networks, panels, processes
    from training import data as training_data

    images, heatmaps, labels, tokens = data.collate(samples(4))
    assert isinstance(labels, Tensor)
    model = network(lambda: Through(nn.GELU()))
    twin = copy.deepcopy(model)
    form = networks.InputForm(20, (0.5, 0.4, 0.3), (0.2, 0.2, 0.3))
    alone = processes.World(0, 1, torch.device("cpu"))
    settings = config.Config(output="", mixup=0.3, num_classes=10, clickme=(str(folder),))
    sampler = data.MixedBatchSampler(4, 4, 4)
    batch = clickme.ClickMeSample(images, heatmaps, labels, tokens)
    test = training_data.Test([batch], 4, object())  # type: ignore[arg-type]

    def run() -> Any:
        on_device = training_data.to_device(batch, 10, torch.device("cpu"))
        average = ema.WeightAverage(twin, 0.5)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(2)
        average.update()
        with average.swapped_in():
            averaged = [p.clone() for p in twin.parameters()]
        average.take()
        labels_of_four = batch._replace(label=labels % 4)
        measures, panel = evaluation.evaluate(
            model, test._replace(batches=[labels_of_four]), form, alone, classes=4, panel_images=2
        )
        assert panel is not None
        panels.draw(panel, folder / "panel.png", "title")
        mixup = training_data.create_mixup(settings)
        assert mixup is not None
        digits = shortcut_digits.make(train_images=20, test_images=10)
        return [
            on_device, averaged, measures, panel, form(images, False),
            list(training_data.MicroBatches(sampler, 2)),
            mixup(images, heatmaps, labels, tokens, step=1),
            [dataclasses.astuple(split) for split in digits.values()],
            alone.total(torch.tensor([1], device="cpu")), alone.gather(3),
            networks.training_mode(model, settings),
        ]  # fmt: skip

    return run
