"""Networks, wrappers and options that two processes train with, and that must equal one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import harmonizer_ext as hx

PROCESSES, ROWS, CLASSES, SIZE = 2, 8, 5, 12
#: Which of the eight rows have a human map, one line an iteration; each process has four of them.
TOKENS = (
    (1, 0, 1, 1, 0, 0.5, 0, 0),
    (0, 0, 0, 0, 1, 0, 0, 1),  # no map on the first process
    (1, 1, 0.5, 1, 0, 0, 0, 0),  # nothing but maps on the first, none on the second
    (0, 0, 0, 0, 0, 0, 0, 0),
    (1, 1, 1, 1, 1, 1, 1, 1),
)

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


class BatchMean(nn.Module):
    """Couples rows, and keeps no state that would show it."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


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
    "batch mean": lambda: Convolutional(BatchMean),
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


AUTO: dict[str, Any] = {"rows": "auto"}
MAPPED: dict[str, Any] = {"rows": "mapped"}
MEAN_VALID: dict[str, Any] = {"rows": "mapped", "reduction": "mean_valid"}
WORLD = "world"  # in place of a process group, which exists on the processes alone
FULL = (TOKENS[0], TOKENS[1], TOKENS[-1])

SCENARIOS: dict[str, Scenario] = {
    "ddp": Scenario("ddp", step={"rows": "all"}, tokens=FULL),
    "ddp mapped": Scenario("ddp", step=MAPPED, evaluate=True),
    # Tried out first: where a pass waits for others, by all processes in the same step.
    "ddp auto": Scenario("ddp", step=AUTO, evaluate=True),
    "ddp within auto": Scenario("ddp within", step=AUTO, evaluate=True),
    "fsdp2 auto": Scenario("fsdp2", step=AUTO, evaluate=True),
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
    "fsdp2 batch mean": Scenario("fsdp2", network="batch mean", step=AUTO, tokens=FULL),
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

#: With what is refused, when nobody refuses it.
UNGUARDED = Scenario("ddp", {"static_graph": True}, step={"rows": "all"}, tokens=FULL)

ALL: dict[str, Scenario] = SCENARIOS | APART | DIFFERENCES

# --- wrappers -------------------------------------------------------------------------------------


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
