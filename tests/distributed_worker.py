"""The work of the processes of test_distributed.py, and of one process in their place.

The same training loop serves the processes, each on its rows under its wrapper, and one process on
all rows without any.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from distributed_scenarios import (
    ALL,
    APART,
    CLASSES,
    NETWORKS,
    PROCESSES,
    ROWS,
    SCENARIOS,
    SIZE,
    UNGUARDED,
    WORLD,
    WRAPPERS,
    Scenario,
    fsdp2,
    gradients_at_two_images,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import harmonizer_ext as hx
from harmonizer_ext import distributed, double_backward

#: Seconds that a process waits for another before it gives up: more than any scenario takes.
PATIENCE = 60

# --- training -------------------------------------------------------------------------------------

Result = dict[str, Any]


def whole_batch(scenario: Scenario, iteration: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(iteration)
    tokens = torch.tensor(scenario.tokens[iteration])
    heatmaps = torch.rand(ROWS, SIZE, SIZE, generator=generator).to(scenario.dtype)
    heatmaps[tokens == 0] = torch.nan  # and is not read
    return {
        "images": torch.randn(ROWS, 3, SIZE, SIZE, generator=generator).to(scenario.dtype),
        "labels": torch.randint(0, CLASSES, (ROWS,), generator=generator),
        "heatmaps": heatmaps,
        "tokens": tokens,
    }


def rows_of(rank: int) -> slice:
    return slice(rank * ROWS // PROCESSES, (rank + 1) * ROWS // PROCESSES)


def network_of(scenario: Scenario) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[scenario.network]().to(scenario.dtype)


def _whole(tensor: Tensor) -> Tensor:
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().clone()


def _sharded(tensor: Tensor | None) -> bool:
    return hasattr(tensor, "full_tensor")


@contextlib.contextmanager
def _accumulating(model: nn.Module, last: bool) -> Iterator[None]:
    for part in model.modules():
        if hasattr(part, "set_requires_gradient_sync"):
            part.set_requires_gradient_sync(last)
    with contextlib.ExitStack() as stack:
        if isinstance(model, DistributedDataParallel) and not last:
            stack.enter_context(model.no_sync())
        yield


def _average_by_hand(parameters: list[nn.Parameter]) -> None:
    for p in parameters:
        dist.all_reduce(p.grad)
        p.grad /= PROCESSES


def _gradients(model: nn.Module, network: nn.Module) -> dict[str, Tensor]:
    whole: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if distributed.is_fsdp1(model):
        whole = type(model).summon_full_params(model, with_grads=True)  # type: ignore[attr-defined]
    with whole:
        return {name: _whole(p.grad) for name, p in network.named_parameters()}


def train(scenario: Scenario, rank: int | None, wrap: str | None = None) -> Result:
    """Trains on the rows of a process, or on all.

    Args:
        scenario: what to train.
        rank: which process this is; None is one process on all rows.
        wrap: in place of the scenario's wrapper; "nothing" without a rank.
    """
    network = network_of(scenario)
    wrap = wrap or ("nothing" if rank is None else scenario.wrap)
    own = wrap == scenario.wrap
    options: dict[str, Any] = {"lambda_harmonization": 3.0, "lambda_weights": 0.01} | scenario.step
    if options.get("process_group") == WORLD:
        options["process_group"] = None if rank is None else dist.group.WORLD
    step: Callable[..., hx.HarmonizerOutput]
    if wrap == "ddp of module":
        module = hx.HarmonizerLoss(network, **options, **scenario.module)
        model = step = DistributedDataParallel(module, **scenario.wrap_options)
    else:
        model = WRAPPERS[wrap](network, **(scenario.wrap_options if own else {}))
        step = functools.partial(hx.harmonizer_loss, model, **options)
        if wrap == "module of fsdp2":
            step = hx.HarmonizerLoss(model, **options)
    # Sharded weights are other objects than those that the network had, and than those that it has
    # while it is whole: it is these that the optimizer holds.
    parameters = list(network.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    rows = slice(None) if rank is None else rows_of(rank)
    result: Result = {"gradients": [], "losses": [], "evaluated": [], "norms": []}
    result |= {"same parameters": [], "sharded": []}
    for iteration in range(len(scenario.tokens)):
        batch = {k: v[rows] for k, v in whole_batch(scenario, iteration).items()}
        if scenario.evaluate:
            with torch.no_grad():
                result["evaluated"].append(step(**batch).loss)
        parts = scenario.micro_batches if own else 1
        pieces = {k: v.chunk(parts) for k, v in batch.items()}
        losses = []
        for part in range(parts):
            with _accumulating(model, last=part == parts - 1):
                loss = step(**{k: v[part] for k, v in pieces.items()}).loss / parts
                loss.backward()
            losses.append(loss.detach())
        result["losses"].append(sum(losses))
        if wrap == "by hand":
            _average_by_hand(parameters)
        if scenario.clip is not None:
            norm = nn.utils.clip_grad_norm_(parameters, scenario.clip)
            result["norms"].append(_whole(norm))
        result["same parameters"].append(
            all(p is held for p, held in zip(network.parameters(), parameters, strict=True))
        )
        result["sharded"].append(
            all(_sharded(p) and _sharded(p.grad) for p in network.parameters())
        )
        result["gradients"].append(_gradients(model, network))
        optimizer.step()
        optimizer.zero_grad()
    if not distributed.is_fsdp1(model):
        result["parameters"] = {name: _whole(p) for name, p in network.named_parameters()}
    return result


# --- what is refused, and what happens without the refusal ----------------------------------------


def _refusal(scenario: Scenario, rank: int) -> Result:
    try:
        train(scenario, rank)
    except (RuntimeError, ValueError) as error:
        return {"type": type(error).__name__, "text": str(error)}
    return {"type": None, "text": "no error"}


def static_graph(rank: int) -> Result:
    return _refusal(Scenario("ddp", {"static_graph": True}), rank)


def static_graph_unguarded(rank: int) -> Result:
    with mock.patch.object(double_backward, "check_model"):
        return train(UNGUARDED, rank)


def fsdp1_refused(rank: int) -> Result:
    return _refusal(Scenario("fsdp1"), rank)


def fsdp1_weight_penalty(rank: int) -> Result:
    return _refusal(Scenario("fsdp1", step={"second_order": "finite_difference"}), rank)


def synchronized_batch_norm(rank: int) -> Result:
    network = nn.SyncBatchNorm.convert_sync_batchnorm(network_of(APART["batch norm"]))
    batch = whole_batch(APART["batch norm"], 0)
    result: Result = {}
    try:
        hx.harmonizer_loss(network, **batch)
    except RuntimeError as error:
        result = {"type": type(error).__name__, "text": str(error)}
    # With its statistics frozen it is an ordinary layer.
    result["frozen"] = hx.harmonizer_loss(network.eval(), **batch).loss.detach()
    return result


def mean_valid_without_group(rank: int) -> Result:
    batch = whole_batch(SCENARIOS["ddp"], 0)
    step = hx.HarmonizerLoss(network_of(SCENARIOS["ddp"]), reduction="mean_valid")
    result: Result = {}
    try:
        DistributedDataParallel(step)(**batch)
    except ValueError as error:
        result["text"] = str(error)
    with torch.no_grad():  # an evaluation may run on one process alone
        result["evaluated"] = step(**batch).loss
    return result


def compiled_around_wrapper(rank: int) -> Result:
    texts = []
    for wrap in ("ddp", "ddp within", "fsdp2"):
        try:
            hx.HarmonizerLoss(WRAPPERS[wrap](network_of(SCENARIOS["ddp"])), compile=True)
        except ValueError as error:
            texts.append(str(error))
    return {"texts": texts}


def fsdp2_unguarded(rank: int) -> Result:
    with mock.patch.object(distributed, "whole_until_second_backward", contextlib.nullcontext):
        return _refusal(Scenario("fsdp2"), rank)


def fsdp2_two_passes(rank: int) -> Result:
    return _refusal(Scenario("fsdp2", step={"explain": gradients_at_two_images}), rank)


def fsdp2_flags(rank: int) -> Result:
    """The owner's settings stay set, module by module, also after an error and with no loss."""
    model = fsdp2(network_of(SCENARIOS["ddp"]))
    blocks = list(model.blocks)  # type: ignore[arg-type]
    blocks[0].set_reshard_after_backward(False)
    batch = whole_batch(SCENARIOS["ddp"], 0)

    def flags() -> list[bool]:
        return [group.reshard_after_backward for group in distributed._parameter_groups(model)]

    def shards() -> list[bool]:
        return [_sharded(next(m.parameters())) for m in (model.stem, *blocks, model.head)]

    result: Result = {"before": flags()}
    out = hx.harmonizer_loss(model, **batch)
    result["after step"], result["shards after step"] = flags(), shards()
    out.loss.backward()
    result["after backward"], result["shards after backward"] = flags(), shards()
    with mock.patch.object(torch.autograd, "grad", side_effect=RuntimeError("wrong")):
        try:
            hx.harmonizer_loss(model, **batch)
        except RuntimeError as error:
            result["error"] = str(error)
    result["after error"] = flags()
    return result


def fsdp2_abandoned_step(rank: int) -> Result:
    """A loss that is never differentiated leaves nothing behind that the next step would see."""
    scenario = SCENARIOS["fsdp2 mapped"]
    model = fsdp2(network_of(scenario))
    held = dict(model.named_parameters())
    for iteration in (1, 0):
        batch = {k: v[rows_of(rank)] for k, v in whole_batch(scenario, iteration).items()}
        out = hx.harmonizer_loss(
            model, **batch, **scenario.step, lambda_harmonization=3.0, lambda_weights=0.01
        )
    out.loss.backward()
    return {"gradients": [{n: _whole(p.grad) for n, p in held.items()}]}


SPECIAL: dict[str, Callable[[int], Result]] = {
    function.__name__: function
    for function in (
        static_graph,
        static_graph_unguarded,
        fsdp1_refused,
        fsdp1_weight_penalty,
        synchronized_batch_norm,
        mean_valid_without_group,
        compiled_around_wrapper,
        fsdp2_unguarded,
        fsdp2_two_passes,
        fsdp2_flags,
        fsdp2_abandoned_step,
    )
}

# --- processes ------------------------------------------------------------------------------------


def result_file(directory: str | Path, name: str, rank: int) -> Path:
    return Path(directory) / f"{name.replace(' ', '-')}.{rank}.pt"


def _wait_for_all(store: dist.Store, name: str, rank: int) -> None:
    store.set(f"{name}/{rank}", "here")
    # One that failed at once may have to wait for one that was kept waiting by it.
    store.wait([f"{name}/{r}" for r in range(PROCESSES)], datetime.timedelta(seconds=3 * PATIENCE))


def work(rank: int, directory: str, names: list[str]) -> None:
    """Runs scenarios one after the other, each in a process group of its own; saves each result."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name may not resolve
    shared = dist.FileStore(str(Path(directory) / f"store before {names[0]}"), PROCESSES)
    for name in names:
        _wait_for_all(shared, name, rank)
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore(f"group of {name}", shared),
            rank=rank,
            world_size=PROCESSES,
            timeout=datetime.timedelta(seconds=PATIENCE),
        )
        try:
            result = SPECIAL[name](rank) if name in SPECIAL else train(ALL[name], rank)
        except Exception:  # noqa: BLE001 - reported by the test that reads the result
            result = {"failed": traceback.format_exc()}
        torch.save(result, result_file(directory, name, rank))
        dist.destroy_process_group()
