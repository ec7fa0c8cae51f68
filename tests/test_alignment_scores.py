"""Means, standard errors and comparisons of models; the meter on one process and on several."""

from __future__ import annotations

import math
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from harmonizer_ext import alignment

stats = pytest.importorskip("scipy.stats", reason="scipy (extra: test) is the oracle here")

# Of single correlations; test_alignment_metrics.py has it too, with the reason.
RANK_TOLERANCE = 1e-12


def random_maps(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scipy_spearman(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    pairs = zip(a.double().numpy(), b.double().numpy(), strict=True)
    return np.array([stats.spearmanr(x.flatten(), y.flatten()).statistic for x, y in pairs])


# ---------------------------------------------------------------------------- the score


def test_alignment_score_excludes_and_counts_undefined_pairs() -> None:
    model, human = random_maps(24, 6, 16, 16), random_maps(25, 6, 16, 16)
    human = human + model
    model[2] = 0.0
    human[4] = 1.0
    kept = [0, 1, 3, 5]
    mean = scipy_spearman(model[kept], human[kept]).mean()
    score = alignment.alignment_score(model[:, None], human)
    assert score.maps == 4
    assert score.excluded == 2
    assert score.ceiling == 0.65753
    assert score.spearman == pytest.approx(mean, abs=RANK_TOLERANCE)
    assert score.score == pytest.approx(mean / 0.65753, abs=2 * RANK_TOLERANCE)
    other = alignment.alignment_score(model, human, ceiling=0.44223)
    assert other.score == pytest.approx(mean / 0.44223, abs=4 * RANK_TOLERANCE)


@pytest.mark.parametrize("count", [50, 20000])
def test_standard_error_is_that_of_the_mean(count: int) -> None:
    values = torch.tanh(random_maps(26, count))
    result = alignment.score_correlations(values, ceiling=0.5, resamples=1000)
    expected = values.std(correction=0).item() / math.sqrt(count) / 0.5
    # A standard deviation estimated from R resamples varies by 1 / sqrt(2 R), 2.2 %; five of them.
    assert result.standard_error == pytest.approx(expected, rel=0.112)


def test_standard_error_follows_its_seed() -> None:
    values = random_maps(27, 40)
    errors = [alignment.score_correlations(values, seed=seed).standard_error for seed in (0, 0, 1)]
    assert errors[0] == errors[1] != errors[2]
    shuffled_state = torch.random.get_rng_state()
    alignment.score_correlations(values)
    assert torch.equal(torch.random.get_rng_state(), shuffled_state)  # the global one is untouched


def test_batches_summarize_to_the_whole() -> None:
    model, human = random_maps(28, 6, 8, 8), random_maps(29, 6, 8, 8)
    parts = torch.cat([alignment.spearman(model[i : i + 2], human[i : i + 2]) for i in (0, 2, 4)])
    assert alignment.score_correlations(parts) == alignment.alignment_score(model, human)


def test_one_pair_has_no_standard_error_and_none_has_no_score() -> None:
    model, human = random_maps(30, 1, 8, 8), random_maps(31, 1, 8, 8)
    one = alignment.alignment_score(model, human)
    assert math.isnan(one.standard_error)
    assert one.maps == 1
    assert not math.isnan(one.score)
    none = alignment.alignment_score(model * 0, human)
    assert math.isnan(none.score)
    assert math.isnan(none.spearman)
    assert (none.maps, none.excluded) == (0, 1)


def test_score_arguments_are_checked() -> None:
    values = random_maps(32, 4)
    with pytest.raises(ValueError, match="ceiling must be positive, got 0"):
        alignment.score_correlations(values, ceiling=0)
    with pytest.raises(ValueError, match="resamples must be at least 1, got 0"):
        alignment.score_correlations(values, resamples=0)
    with pytest.raises(ValueError, match=r"correlations must have the shape \(n,\).*\(2, 2\)"):
        alignment.score_correlations(values.reshape(2, 2))


def test_standard_error_is_scipys() -> None:
    values = torch.tanh(random_maps(33, 60))
    expected = stats.bootstrap(
        (values.numpy(),), np.mean, n_resamples=4000, rng=np.random.default_rng(0)
    ).standard_error
    got = alignment.summarize(values, resamples=4000).standard_error
    # Both vary by 1 / sqrt(2 R), 1.1 %; five times their difference.
    assert got == pytest.approx(expected, rel=5 * 1.1e-2 * math.sqrt(2))


# ---------------------------------------------------------------------------- comparisons


def compared(values: torch.Tensor, indices: torch.Tensor | None) -> alignment.AlignmentValues:
    return alignment.AlignmentValues({"spearman": values}, indices)


def test_paired_difference_is_surer_than_two_means() -> None:
    hard = random_maps(34, 400)
    first, second = hard + 0.1 * random_maps(35, 400), hard - 0.05 + 0.1 * random_maps(36, 400)
    first[7] = math.nan
    second[9] = math.nan
    indices = torch.arange(400)
    result = alignment.compare(compared(first, indices), compared(second, indices))
    both = (first - second)[[i for i in range(400) if i not in (7, 9)]]
    assert result.maps == 398
    assert result.excluded == 2
    assert result.mean == pytest.approx(both.mean().item(), abs=1e-15)
    # 2.2 % is the spread of a standard deviation of 1000 resamples; five of them.
    expected = both.std(correction=0).item() / math.sqrt(398)
    assert result.standard_error == pytest.approx(expected, rel=0.112)
    assert result.standard_error < alignment.summarize(first).standard_error / 5


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (compared(torch.zeros(3), None), compared(torch.zeros(4), None)),
        (compared(torch.zeros(3), None), compared(torch.zeros(3), torch.arange(3))),
        (compared(torch.zeros(3), torch.arange(3)), compared(torch.zeros(3), torch.arange(1, 4))),
    ],
)
def test_only_the_same_images_are_compared(
    first: alignment.AlignmentValues, second: alignment.AlignmentValues
) -> None:
    with pytest.raises(ValueError, match=r"first and second must be of the same images, got first"):
        alignment.compare(first, second)


# ---------------------------------------------------------------------------- the meter

SETTINGS: dict[str, Any] = {
    "metrics": ("dice", "spearman", "pearson", "iou"),
    "reducers": (1, 4, 16),
    "percentile": 20,
}


def images() -> tuple[torch.Tensor, torch.Tensor]:
    model, human = random_maps(37, 11, 64, 64), random_maps(38, 11, 64, 64)
    human = (human + model).clamp(min=0)
    model[3] = 0.0
    human[5, 2, 2] = math.nan
    return model, human


def test_meter_gives_every_metric_of_every_image() -> None:
    model, human = images()
    meter = alignment.AlignmentMeter(**SETTINGS)
    for rows in (slice(0, 4), slice(4, 5), slice(5, 11)):
        meter.update(model[rows, None], human[rows])
    result = meter.compute()
    assert result.indices is None
    functions = {
        "spearman": alignment.spearman,
        "pearson": alignment.pearson,
        "dice": lambda a, b: alignment.dice(a, b, 20),
        "iou": lambda a, b: alignment.iou(a, b, 20),
    }
    assert set(result.values) == {name + end for name in functions for end in ("", "/4", "/16")}
    for name, values in result.values.items():
        metric, _, reducer = name.partition("/")
        pair = (alignment.reduce_resolution(maps, int(reducer or 1)) for maps in (model, human))
        torch.testing.assert_close(
            values, functions[metric](*pair), rtol=0, atol=0, equal_nan=True, msg=name
        )
    summaries = result.summaries()
    assert summaries["spearman"].excluded == 2  # the constant and the NaN
    assert summaries["dice"].excluded == 1  # the NaN; a constant has no pixels to agree on
    assert summaries["spearman"] == alignment.summarize(result.values["spearman"])
    kept = [i for i in range(11) if i not in (3, 5)]
    expected = scipy_spearman(model[kept], human[kept]).mean() / 0.4
    assert result.score(ceiling=0.4).score == pytest.approx(expected, abs=3 * RANK_TOLERANCE)
    quarter = result.score(name="spearman/4")
    assert quarter == alignment.score_correlations(result.values["spearman/4"])
    with pytest.raises(KeyError, match="spearman/2"):
        result.score(name="spearman/2")


def test_meter_counts_every_image_once() -> None:
    model, human = images()
    meter = alignment.AlignmentMeter()
    for rows in ([8, 1, 10], [0, 1, 2, 3], [7, 8, 9, 4, 5, 6]):
        meter.update(model[rows], human[rows], indices=torch.tensor(rows))
    result = meter.compute()
    assert result.indices is not None
    assert result.indices.tolist() == list(range(11))
    whole = alignment.spearman(model, human)
    torch.testing.assert_close(result.values["spearman"], whole, rtol=0, atol=0, equal_nan=True)
    meter.reset()
    assert meter.compute().values["spearman"].shape == (0,)
    assert math.isnan(meter.compute().summaries()["dice"].mean)


def test_meter_keeps_no_maps() -> None:
    meter = alignment.AlignmentMeter()
    for seed in range(5):
        meter.update(random_maps(seed, 2, 64, 64), random_maps(seed + 5, 2, 64, 64))
    kept = sum(t.untyped_storage().nbytes() for t in meter._values)
    assert kept == 5 * 2 * 3 * 8


def test_meter_arguments_are_checked() -> None:
    for metrics in ((), "spearman", ("dice", "dice"), ("spearman", "auc")):
        with pytest.raises(ValueError, match="metrics"):
            alignment.AlignmentMeter(metrics=metrics)
    with pytest.raises(ValueError, match="reducers must be a sequence of different values"):
        alignment.AlignmentMeter(reducers=(1, 4, 1))
    meter, maps = alignment.AlignmentMeter(), random_maps(39, 2, 8, 8)
    with pytest.raises(
        ValueError, match=r"got model_maps: \(2, 8, 8\) and human_maps: \(1, 8, 8\)"
    ):
        meter.update(maps, maps[:1])
    with pytest.raises(
        TypeError, match=r"indices must be a tensor of integers, got torch\.float32"
    ):
        meter.update(maps, maps, indices=torch.zeros(2))
    with pytest.raises(ValueError, match=r"indices must have the shape \(2,\).*got \(3,\)"):
        meter.update(maps, maps, indices=torch.arange(3))
    assert meter.compute().values["spearman"].shape == (0,)  # a refused batch leaves nothing
    meter.update(maps, maps)
    with pytest.raises(ValueError, match="every batch or with none, got some after 1 batches with"):
        meter.update(maps, maps, indices=torch.arange(2))


# ---------------------------------------------------------------------------- several processes

#: Which images each process has, in which batches; DistributedSampler has repeated image 0, and
#: the third process has none.
SHARES = ([[4, 0, 8], [2, 6, 10]], [[1, 3, 5, 7, 9, 0]], [])
PATIENCE = 60  # seconds


def process(rank: int, rendezvous: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=len(SHARES))
    model, human = images()
    results: dict[str, Any] = {}
    numbered, counted = alignment.AlignmentMeter(**SETTINGS), alignment.AlignmentMeter()
    for rows in SHARES[rank]:
        numbered.update(model[rows], human[rows], indices=torch.tensor(rows))
        counted.update(model[rows], human[rows])
    for name, meter in (("numbered", numbered), ("counted", counted)):
        result = meter.compute()
        results[name] = (result.values, result.indices, result.score())
    results["alone"] = counted.compute(gather=False).values["spearman"]
    pair = dist.new_group([0, 1])
    if rank < 2:
        of_pair = alignment.AlignmentMeter(process_group=pair)
        of_pair.update(model[: rank + 1], human[: rank + 1])
        results["pair"] = len(of_pair.compute().values["spearman"])
    different = alignment.AlignmentMeter(percentile=10 + rank)
    mixed = alignment.AlignmentMeter()
    mixed.update(model[:1], human[:1], indices=torch.tensor([rank]) if rank else None)
    for name, meter in (("different", different), ("mixed", mixed)):
        try:
            meter.compute()
        except RuntimeError as error:
            results[name] = str(error)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("PyTorch is built without gloo")
    folder = tmp_path_factory.mktemp("processes")
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=process, args=(rank, str(folder / "rendezvous"), str(folder)))
        for rank in range(len(SHARES))
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(PATIENCE)
        if worker.is_alive():
            worker.kill()
    assert [worker.exitcode for worker in workers] == [0] * len(workers)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(len(SHARES))]


def test_processes_agree_with_one(processes: list[dict[str, Any]]) -> None:
    model, human = images()
    meter = alignment.AlignmentMeter(**SETTINGS)
    meter.update(model, human, indices=torch.arange(11))
    expected = meter.compute()
    for result in processes:
        values, indices, score = result["numbered"]
        assert torch.equal(indices, torch.arange(11))
        torch.testing.assert_close(values, expected.values, rtol=0, atol=0, equal_nan=True)
        assert score == expected.score()  # to the last bit, standard error and all


def test_without_indices_every_row_counts(processes: list[dict[str, Any]]) -> None:
    model, human = images()
    order = [row for share in SHARES for batch in share for row in batch]
    expected = alignment.spearman(model, human)[order]
    for rank, result in enumerate(processes):
        values, indices, score = result["counted"]
        assert indices is None
        torch.testing.assert_close(values["spearman"], expected, rtol=0, atol=0, equal_nan=True)
        assert score.maps == 10
        assert score.excluded == 2
        assert len(result["alone"]) == sum(map(len, SHARES[rank]))


def test_a_group_gathers_its_own(processes: list[dict[str, Any]]) -> None:
    assert [result.get("pair") for result in processes] == [3, 3, None]


def test_processes_must_measure_the_same(processes: list[dict[str, Any]]) -> None:
    for result in processes:
        assert "expected the same metrics, reducers and percentile" in result["different"]
        assert "got them on 2 of 3 processes" in result["mixed"]
