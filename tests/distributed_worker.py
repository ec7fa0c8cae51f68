"""What the processes of test_distributed.py run, and what one process runs in their place.

A scenario is a network, how it is wrapped, and the options of the step. The same training loop
serves the processes, each on its rows, and one process on all rows without any wrapper.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import harmonizer_ext as hx
from harmonizer_ext import distributed, double_backward

PROCESSES, ROWS, CLASSES, SIZE = 2, 8, 5, 12
#: Which of the eight rows have a human map, one line an iteration; each process has four of them.
TOKENS = (
    (1, 0, 1, 1, 0, 0.5, 0, 0),
    (0, 0, 0, 0, 1, 0, 0, 1),  # no map on the first process
    (1, 1, 0.5, 1, 0, 0, 0, 0),  # nothing but maps on the first, none on the second
    (0, 0, 0, 0, 0, 0, 0, 0),
    (1, 1, 1, 1, 1, 1, 1, 1),
)
#: Seconds that a process waits for another before it gives up: more than any scenario takes.
PATIENCE = 60

# --- networks -------------------------------------------------------------------------------------


class Convolutional(nn.Module):
    """Convolutions with GroupNorm, or BatchNorm, and a buffer, which wrappers hand round."""

    def __init__(
        self, norm: Callable[[], nn.Module] = lambda: nn.GroupNorm(2, 6), depth: int = 2
    ) -> None:
        super().__init__()
        self.register_buffer("offset", torch.full((3, 1, 1), 0.1))
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), norm(), nn.SiLU()) for _ in range(depth)
        )
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x - self.offset.to(x.dtype))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm(x)).unflatten(-1, (2, -1)).transpose(1, 2)
        q, k, v = heads.chunk(3, -1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.mlp(x)


class Transformer(nn.Module):
    """A small vision transformer with PyTorch's fused attention."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.blocks = nn.ModuleList(Attention(8) for _ in range(2))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(x.mean(1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "convolutional": Convolutional,
    "batch norm": lambda: Convolutional(lambda: nn.BatchNorm2d(6)),
    "small": lambda: Convolutional(depth=1),  # compiles in half the time
    "transformer": Transformer,
    "checkpointed transformer": lambda: Transformer(checkpointed=True),
}


def gradients_at_two_images(
    model: nn.Module, images: Tensor, targets: Tensor, *, create_graph: bool
) -> tuple[Tensor, Tensor]:
    """An explanation that runs the model twice, as SmoothGrad does."""
    logits, maps = hx.input_gradient(model, images, targets, create_graph=create_graph)
    _, more = hx.input_gradient(model, 0.9 * images, targets, create_graph=create_graph)
    return logits, (maps + more) / 2


def gradient_by_itself(
    model: nn.Module, images: Tensor, targets: Tensor, *, create_graph: bool
) -> tuple[Tensor, Tensor]:
    """An explanation that takes nothing from this package."""
    with torch.enable_grad():
        pixels = images.detach().requires_grad_()
        logits = model(pixels)
        scores = logits.gather(1, targets[:, None]).sum()
        (maps,) = torch.autograd.grad(scores, pixels, create_graph=create_graph)
    return logits, maps


# --- scenarios ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """One way to train on several processes that must equal training on one.

    Attributes:
        wrap: a key of ``WRAPPERS``, and its keyword arguments.
        network: a key of ``NETWORKS``.
        step: options of the step, other than its factors.
        module: options of ``HarmonizerLoss`` alone, where the wrapper makes one.
        micro_batches: parts of a process's rows whose gradients are accumulated.
        clip: norm to which the gradient is clipped.
        evaluate: also compute the loss under no_grad before every iteration.
        tokens: which rows have a human map, one line an iteration.
        dtype: float64, whose rounding is far below any error; float32 for attention's own kernels.
    """

    wrap: str
    wrap_options: dict[str, Any] = field(default_factory=dict)
    network: str = "convolutional"
    step: dict[str, Any] = field(default_factory=dict)
    module: dict[str, Any] = field(default_factory=dict)
    micro_batches: int = 1
    clip: float | None = None
    evaluate: bool = False
    tokens: tuple[tuple[float, ...], ...] = TOKENS
    dtype: torch.dtype = torch.float64


MAPPED: dict[str, Any] = {"rows": "mapped"}
MEAN_VALID: dict[str, Any] = {"rows": "mapped", "reduction": "mean_valid"}
WORLD = "world"  # in place of a process group, which exists on the processes alone
FULL = (TOKENS[0], TOKENS[1], TOKENS[-1])

SCENARIOS: dict[str, Scenario] = {
    "ddp": Scenario("ddp", step={"rows": "all"}, tokens=FULL),
    "ddp mapped": Scenario("ddp", step=MAPPED, evaluate=True),
    "ddp find_unused_parameters": Scenario("ddp", {"find_unused_parameters": True}, step=MAPPED),
    "ddp gradient_as_bucket_view": Scenario("ddp", {"gradient_as_bucket_view": True}, step=MAPPED),
    "ddp no_sync": Scenario("ddp", step=MAPPED, micro_batches=2),
    "ddp no_sync all": Scenario("ddp", step={"rows": "all"}, micro_batches=2, tokens=FULL),
    "ddp mean_valid": Scenario("ddp", step=MEAN_VALID, evaluate=True),
    "ddp clip": Scenario("ddp", step=MAPPED, clip=0.1),
    "ddp explain twice": Scenario("ddp", step=MAPPED | {"explain": gradients_at_two_images}),
    "ddp within": Scenario("ddp within", step=MEAN_VALID),
    "ddp transformer": Scenario(
        "ddp", network="transformer", step=MAPPED, dtype=torch.float32, tokens=FULL
    ),
    "ddp checkpointed": Scenario(
        "ddp", network="checkpointed transformer", step=MAPPED, dtype=torch.float32, tokens=FULL
    ),
    "by hand mean_valid": Scenario("by hand", step=MEAN_VALID | {"process_group": WORLD}),
    "module": Scenario("ddp of module", step=MAPPED),
    "module find_unused_parameters": Scenario(
        "ddp of module", {"find_unused_parameters": True}, step=MAPPED
    ),
    "module mean_valid": Scenario("ddp of module", step=MEAN_VALID | {"process_group": WORLD}),
    "module compiled": Scenario(
        "ddp of module",
        network="small",
        step=MEAN_VALID | {"process_group": WORLD},
        # One shape on both processes: two rows on the saliency path, two beside it.
        module={"compile": {"backend": "aot_eager"}, "row_multiple": 2},
        tokens=((1, 0, 0, 0, 1, 0, 0.5, 0), (0, 0, 0, 0, 0, 1, 0, 0)),
    ),
    "module of fsdp2": Scenario("module of fsdp2", step=MAPPED),
    "fsdp2 all": Scenario("fsdp2", step={"rows": "all"}, tokens=FULL),
    "fsdp2 mapped": Scenario("fsdp2", step=MAPPED, evaluate=True),
    "fsdp2 mean_valid": Scenario("fsdp2", step=MEAN_VALID, evaluate=True),
    "fsdp2 keep after forward": Scenario("fsdp2", {"reshard_after_forward": False}, step=MAPPED),
    "fsdp2 root alone": Scenario("fsdp2 root", step=MAPPED),
    "fsdp2 accumulation": Scenario("fsdp2", step=MAPPED, micro_batches=2),
    "fsdp2 clip": Scenario("fsdp2", step=MAPPED, clip=0.1),
    "fsdp2 explain by itself": Scenario("fsdp2", step=MAPPED | {"explain": gradient_by_itself}),
    "fsdp2 transformer": Scenario(
        "fsdp2", network="transformer", step=MAPPED, dtype=torch.float32, tokens=FULL
    ),
    "fsdp2 checkpointed": Scenario(
        "fsdp2", network="checkpointed transformer", step=MAPPED, dtype=torch.float32, tokens=FULL
    ),
}

#: Where each process sees other numbers than one process would: statistics of its own rows, or
#: weights in another dtype.
APART: dict[str, Scenario] = {
    "batch norm": Scenario("ddp", network="batch norm", step={"rows": "auto"}, tokens=FULL),
    "batch norm mapped": Scenario("ddp", network="batch norm", step=MAPPED, tokens=TOKENS[:1] * 3),
    "fsdp2 bfloat16": Scenario(
        "fsdp2 bfloat16",
        step=MAPPED | {"lambda_weights": 0},
        dtype=torch.float32,
        tokens=TOKENS[:1],
    ),
}

DIFFERENCES: dict[str, Scenario] = {
    f"finite difference {wrap}": Scenario(
        wrap, step=MAPPED | {"second_order": "finite_difference", "lambda_weights": 0}
    )
    for wrap in ("ddp", "fsdp1", "fsdp2")
}


def fsdp1(network: nn.Module, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(
        network, device_id=torch.device("cpu"), use_orig_params=True, **options
    )


def fsdp2(network: nn.Module, blocks: bool = True, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (PROCESSES,))
    for block in network.blocks if blocks else ():
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(network, mesh=mesh, **options)


def fsdp2_bfloat16(network: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return fsdp2(network, mp_policy=policy)


class InBfloat16(nn.Module):
    """A network in float32 that computes in bfloat16, as under FSDP2's mixed precision."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        low = {name: p.bfloat16() for name, p in self.network.named_parameters()}
        return torch.func.functional_call(self.network, low, x.bfloat16())


#: What ``harmonizer_loss`` is given.
WRAPPERS: dict[str, Callable[..., nn.Module]] = {
    "ddp": DistributedDataParallel,
    "ddp within": lambda network: nn.Sequential(nn.Identity(), DistributedDataParallel(network)),
    "by hand": lambda network: network,
    "fsdp1": fsdp1,
    "fsdp2": fsdp2,
    "fsdp2 root": lambda network: fsdp2(network, blocks=False),
    "fsdp2 bfloat16": fsdp2_bfloat16,
    "module of fsdp2": lambda network: fsdp2(network),
    "nothing": lambda network: network,
    "bfloat16": InBfloat16,
}

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


UNGUARDED = Scenario("ddp", {"static_graph": True}, step={"rows": "all"}, tokens=FULL)


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
    """What the owner has set stays set, module by module, also after an error and with no loss."""
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
ALL: dict[str, Scenario] = SCENARIOS | APART | DIFFERENCES

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
