"""A harmonized step on two processes equals the step of one process on all their rows.

The processes are started once and both run each scenario of distributed_scenarios.py; the tests
read what they saved. Gradients are compared element by element at every iteration, with an
optimizer's step in between.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path

import distributed_worker as worker
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from distributed_scenarios import (
    ALL,
    APART,
    DIFFERENCES,
    PROCESSES,
    SCENARIOS,
    UNGUARDED,
    InBfloat16,
    Scenario,
)
from distributed_worker import Result
from torch import Tensor

import harmonizer_ext as hx

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="this PyTorch is built without torch.distributed and gloo",
)

#: Seconds for all scenarios together. They take twenty; a hang must end, with a word on where.
DEADLINE = 400

Gradients = dict[str, Tensor]


def _start(directory: Path, names: list[str], end: float) -> str:
    """Runs scenarios on all processes until they are done or dead; says how they ended."""
    context = mp.spawn(worker.work, (str(directory), names), nprocs=PROCESSES, join=False)
    try:
        while not context.join(timeout=1):
            if time.monotonic() > end:
                return f"the processes were still running after {DEADLINE} s"
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        return str(error)
    finally:
        for process in context.processes:
            process.kill()
    return "the processes ended"


def _run(directory: Path, names: list[str]) -> dict[str, str]:
    """Runs all scenarios; says of each that did not finish how the processes ended."""
    end = time.monotonic() + DEADLINE
    endings = {}
    while names and time.monotonic() < end:
        ending = _start(directory, names, end)
        # Gloo ends a process whose messages are not those it waits for. The next go on without.
        files = {n: [worker.result_file(directory, n, r) for r in range(PROCESSES)] for n in names}
        names = [n for n in names if not all(file.exists() for file in files[n])]
        endings[names[0] if names else ""] = ending
        names = names[1:]
    return endings


@pytest.fixture(scope="module")
def finished(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], list[Result]]:
    """Runs what the selected tests want, and gives the results of all processes by name."""
    items = [item for item in request.session.items if item.path == request.path]
    params = [item.callspec.params for item in items if hasattr(item, "callspec")]
    names = list(dict.fromkeys(p["processes"] for p in params if "processes" in p))
    directory = tmp_path_factory.mktemp("distributed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        endings = _run(directory, names)

    def results(name: str) -> list[Result]:
        loaded = []
        for rank in range(PROCESSES):
            path = worker.result_file(directory, name, rank)
            ending = endings.get(name, f"not started within {DEADLINE} s")
            assert path.exists(), f"{name!r} did not finish on process {rank}: {ending}"
            loaded.append(torch.load(path))
        failed = [result["failed"] for result in loaded if "failed" in result]
        assert not failed, "\n".join(failed)
        return loaded

    return results


@pytest.fixture
def processes(
    request: pytest.FixtureRequest, finished: Callable[[str], list[Result]]
) -> list[Result]:
    """Results that each process saved for the scenario of the test."""
    return finished(request.param)


def of(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("processes", names, indirect=True)


def _name(request: pytest.FixtureRequest) -> str:
    name: str = request.node.callspec.params["processes"]
    return name


# --- tolerances -----------------------------------------------------------------------------------


def error(got: Gradients, want: Gradients) -> dict[str, float]:
    """Largest error of an element, for each parameter, relative to its largest element."""
    assert got.keys() == want.keys()
    return {n: float((got[n] - want[n]).abs().max() / want[n].abs().max()) for n in want}


def assert_close(
    got: list[Gradients], want: list[Gradients], bounds: list[dict[str, float]]
) -> None:
    """Element by element, at every iteration."""
    assert len(got) == len(want) > 0
    for iteration, (a, b, bound) in enumerate(zip(got, want, bounds, strict=True)):
        for name, wrong in error(a, b).items():
            assert wrong <= bound[name], (
                f"iteration {iteration}: the gradient of {name} is off by {wrong:.1e} of its "
                f"largest element, allowed {bound[name]:.1e}"
            )


@functools.cache
def _one_process(scenario_name: str, dtype: torch.dtype | None = None) -> Result:
    scenario = ALL[scenario_name]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return worker.train(dataclasses.replace(scenario, dtype=dtype or scenario.dtype), None)
    finally:
        torch.set_num_threads(threads)


def expected(name: str) -> tuple[Result, list[dict[str, float]]]:
    """One process on all rows, in float64, and how far from it the processes may be.

    In float64 only the order of sums differs: rounding of 1e-16, times the hundreds of terms of a
    gradient, times the 1e3 by which standardization divides by the small spread of a map. In
    float32 the bound is what float32 costs one process, four times, because the processes round
    other partial sums.
    """
    want = _one_process(name, torch.float64)
    if SCENARIOS[name].dtype == torch.float64:
        return want, [dict.fromkeys(g, 1e-10) for g in want["gradients"]]
    single = _one_process(name)
    bounds = [
        dict.fromkeys(b, 4 * max(error(a, b).values()))
        for a, b in zip(single["gradients"], want["gradients"], strict=True)
    ]
    assert all(max(bound.values()) < 1e-4 for bound in bounds)  # bounds that bound
    return want, bounds


def test_the_alignment_is_a_large_part_of_what_is_compared() -> None:
    scenario = SCENARIOS["ddp"]
    without = dataclasses.replace(scenario, step=scenario.step | {"lambda_harmonization": 0.0})
    first = worker.train(without, None)["gradients"][0]
    apart = error(first, _one_process("ddp")["gradients"][0])
    assert apart.pop("head.bias") == 0  # no saliency depends on it
    assert min(apart.values()) > 0.01  # against bounds of 1e-10


# --- equal to one process -------------------------------------------------------------------------


@of(*SCENARIOS)
def test_equals_one_process(processes: list[Result], request: pytest.FixtureRequest) -> None:
    scenario = SCENARIOS[_name(request)]
    want, bounds = expected(_name(request))
    for result in processes:
        assert_close(result["gradients"], want["gradients"], bounds)
        # The weights have moved by the gradients that were compared, and by no more.
        moved = {name: max(b[name] for b in bounds) for name in bounds[0]}
        assert_close([result["parameters"]], [want["parameters"]], [moved])
    # Each process has the loss of its rows: their mean is that of all rows.
    rtol = 1e-12 if scenario.dtype == torch.float64 else 1e-5
    for kind in ("losses", "evaluated"):
        assert len(processes[0][kind]) == len(want[kind])
        for *losses, loss in zip(*(r[kind] for r in processes), want[kind], strict=True):
            mean = torch.stack(losses).mean().to(loss.dtype)
            torch.testing.assert_close(mean, loss, rtol=rtol, atol=0)
    for *norms, norm in zip(*(r["norms"] for r in processes), want["norms"], strict=True):
        assert norm > 2 * (scenario.clip or 0)  # or nothing was clipped
        for n in norms:
            torch.testing.assert_close(n, norm, rtol=1e-12, atol=0)


@of(*(name for name in SCENARIOS if "fsdp2" in name))
def test_weights_are_sharded_again_after_backward(processes: list[Result]) -> None:
    for result in processes:
        assert all(result["sharded"])
        assert all(result["same parameters"])  # those that the optimizer holds


# --- equal to the mean of two that know nothing of each other -------------------------------------


def _mean_of_two(scenario: Scenario) -> list[Gradients]:
    """Gradients of every iteration, averaged by hand over the rows of each process."""
    networks = [worker.network_of(scenario) for _ in range(PROCESSES)]
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.1, momentum=0.9) for n in networks]
    gradients = []
    for iteration in range(len(scenario.tokens)):
        batch = worker.whole_batch(scenario, iteration)
        for rank, network in enumerate(networks):
            model = InBfloat16(network) if "bfloat16" in scenario.wrap else network
            rows = {k: v[worker.rows_of(rank)] for k, v in batch.items()}
            options = {"lambda_harmonization": 3.0, "lambda_weights": 0.01} | scenario.step
            hx.harmonizer_loss(model, **rows, **options).loss.backward()
        of_all = [dict(n.named_parameters()) for n in networks]
        gradients.append({})
        for name in of_all[0]:
            mean = torch.stack([p[name].grad for p in of_all]).mean(0)
            gradients[-1][name] = mean
            for parameters in of_all:
                parameters[name].grad = mean.clone()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return gradients


@of("batch norm", "batch norm mapped", "fsdp2 batch mean")
@pytest.mark.filterwarnings("ignore:rows=")
def test_rows_that_couple_are_those_of_each_process(
    processes: list[Result], request: pytest.FixtureRequest
) -> None:
    want = _mean_of_two(APART[_name(request)])
    bounds = [dict.fromkeys(g, 1e-10) for g in want]  # as in expected()
    for result in processes:
        assert_close(result["gradients"], want, bounds)


@of("fsdp2 bfloat16")
def test_mixed_precision_of_fsdp2(processes: list[Result]) -> None:
    want = _mean_of_two(APART["fsdp2 bfloat16"])
    # The same operations on the same bfloat16 numbers, but for the order in which the gradients of
    # the two parts of the batch are added and rounded to 2**-9. (One iteration: weights that differ
    # by a rounding of bfloat16 lead elsewhere.)
    bounds = [dict.fromkeys(g, 4 * 2**-9) for g in want]
    for result in processes:
        assert_close(result["gradients"], want, bounds)
        assert all(result["sharded"])


@of(*DIFFERENCES)
def test_finite_differences(processes: list[Result], request: pytest.FixtureRequest) -> None:
    # Exact to the square of the step, 5e-6 in float64, and to 1e-16 over the step; each times the
    # few units to which the third derivatives of this network come.
    scenario = DIFFERENCES[_name(request)]
    step = scenario.step | {"second_order": "exact"}
    exact = worker.train(dataclasses.replace(scenario, step=step), None)["gradients"]
    for result in processes:
        assert_close(result["gradients"], exact, [dict.fromkeys(g, 1e-8) for g in exact])


# --- what is refused, and why ---------------------------------------------------------------------


@of("static_graph")
def test_static_graph_is_refused(processes: list[Result]) -> None:
    for result in processes:
        assert result["type"] == "SecondDerivativeError"
        assert "DistributedDataParallel without static_graph=True" in result["text"]


@of("static_graph_unguarded")
def test_static_graph_would_not_average_and_not_say_so(processes: list[Result]) -> None:
    """The reason for the refusal. If this fails, PyTorch averages now and the refusal may go."""
    for rank, result in enumerate(processes):
        alone = worker.train(UNGUARDED, rank, "nothing")["gradients"]
        assert_close(result["gradients"], alone, [dict.fromkeys(g, 1e-10) for g in alone])
        averaged = _one_process("ddp")["gradients"]
        for a, b in zip(result["gradients"], averaged, strict=True):
            assert min(error(a, b).values()) > 0.01


@of("synchronized_batch_norm")
def test_synchronized_batch_norm_is_refused_while_it_trains(processes: list[Result]) -> None:
    for result in processes:
        assert result["type"] == "SecondDerivativeError"
        assert result["text"].startswith("model.blocks.0.1: expected layers with a second derivati")
        assert "got SyncBatchNorm in training mode" in result["text"]
        assert result["frozen"].isfinite()


@of("fsdp1_refused")
def test_fsdp1_is_refused(processes: list[Result]) -> None:
    for result in processes:
        assert result["type"] == "SecondDerivativeError"
        assert "got FullyShardedDataParallel (FSDP1)" in result["text"]
        assert "fully_shard(model) (FSDP2)" in result["text"]


@of("fsdp1_weight_penalty")
def test_fsdp1_takes_no_weight_penalty(processes: list[Result]) -> None:
    for result in processes:
        assert result["type"] == "ValueError"
        assert "lambda_weights: expected 0 with FullyShardedDataParallel" in result["text"]


@of("mean_valid_without_group")
def test_mean_valid_wants_to_know_who_averages(processes: list[Result]) -> None:
    for result in processes:
        assert result["text"].startswith("process_group: expected one with reduction")
        assert result["evaluated"].isfinite()


@of("compiled_around_wrapper")
def test_a_compiled_step_goes_inside_the_wrapper(processes: list[Result]) -> None:
    for result in processes:
        assert len(result["texts"]) == 3
        for text in result["texts"]:
            assert "DistributedDataParallel(HarmonizerLoss(network, compile=True))" in text


# --- FSDP2 ----------------------------------------------------------------------------------------


@of("fsdp2_flags")
def test_fsdp2_reshards_as_its_owner_has_set(processes: list[Result]) -> None:
    for result in processes:
        assert sorted(result["before"]) == [False, True, True]
        assert result["error"] == "wrong"
        for moment in ("after step", "after backward", "after error"):
            assert result[moment] == result["before"], moment
        # Stem, two blocks, head; the owner keeps the first block whole.
        assert result["shards after step"] == [False, False, False, False]
        assert result["shards after backward"] == [True, False, True, True]


@of("fsdp2_unguarded")
def test_fsdp2_would_free_the_weights_too_early(processes: list[Result]) -> None:
    """The reason for whole_until_second_backward. If this fails, FSDP2 waits by itself now."""
    for result in processes:
        assert result["type"] == "RuntimeError"
        assert "its data is not allocated yet" in result["text"]


@of("fsdp2_two_passes")
def test_fsdp2_refuses_an_explanation_of_several_passes(processes: list[Result]) -> None:
    for result in processes:
        assert result["type"] == "ValueError"
        assert "explain: expected one forward pass of a model that FSDP2 shards" in result["text"]


@of("fsdp2_abandoned_step")
def test_fsdp2_forgets_a_step_without_backward(processes: list[Result]) -> None:
    want, bounds = expected("fsdp2 mapped")
    for result in processes:
        assert_close(result["gradients"], want["gradients"][:1], bounds[:1])
