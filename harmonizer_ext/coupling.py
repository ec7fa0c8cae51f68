"""Whether one row's logits depend on the other rows of the batch, found out by trying.

Splitting a batch is exact where every row goes through the network as if it were alone, and where a
second forward pass leaves nothing behind that a single one would not. Neither can be read from the
names of classes. A few forward passes show both, once for a network in its present mode: what they
change is put back, and so are the generators of random numbers.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from harmonizer_ext import contract, distributed, fingerprint, network
from harmonizer_ext.fingerprint import Fingerprint, Memory
from harmonizer_ext.random_numbers import RandomNumbers
from harmonizer_ext.state import State
from harmonizer_ext.trial import FAILURES, Trial, coarsest, other_images, scatter

Model = Callable[..., Any]

#: Two batches of one size run through the same kernels, and a row's numbers are the same to the bit
#: unless a kernel adds in no fixed order: some units in the last place of float32 or float64.
_ROUNDINGS = 16

#: Batches of two sizes run through other kernels, whose sums round differently in every layer.
_SIZES_APART = {torch.float64: 1e-6, torch.float32: 1e-2}
_SIZES_APART_IN_HALF = 0.25


@dataclass(frozen=True)
class Coupling:
    """The result of looking for rows that depend on each other.

    Attributes:
        reason: why rows must stay together, as the end of "because ..."; None where they need not.
        certain: whether another batch would show the same, so that it can be remembered.
        least: the number of rows that a part must have at least. A network that ends in
            ``squeeze()`` takes any number but one.
    """

    reason: str | None
    certain: bool = True
    least: int = 1


def declared(model: object, modules: Sequence[nn.Module] | None = None) -> str | None:
    """Name of a module that says it couples rows, by a true attribute ``couples_rows``.

    Args:
        model: maps images to logits.
        modules: all of its modules, where they are known.
    """
    modules = list(network.modules(model)) if modules is None else modules
    # Not getattr of the module: it is slow where there is no such attribute.
    saying = {kind for kind in set(map(type, modules)) if getattr(kind, "couples_rows", False)}
    maybe = [m for m in modules if "couples_rows" in m.__dict__ or type(m) in saying]
    for module in maybe:
        if module.couples_rows:
            names = {id(part): name for name, part in network.named_modules(model)}
            return names.get(id(module)) or type(module).__name__
    return None


# --- forward passes that leave no trace -----------------------------------------------------------


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    """Compiled parts run as they are written: no shape is compiled for what runs once."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


class _Passes:
    """A network that is run, and put back as often as one likes.

    Args:
        model: maps images to logits.
        images: (B, C, H, W), what it is run on.
    """

    def __init__(self, model: Model, images: Tensor) -> None:
        # A pass through a wrapper is an affair of all processes, and counted.
        self.model = distributed.unwrapped(model)
        self.images = images.detach()
        self._trial = Trial(model, images.device)
        self.records = torch.is_grad_enabled() and not distributed.is_wrapped(self.model)
        self.drew = self.drew_at_all = False

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """A context in which the network may be run; afterwards it is as it was."""
        torch.clear_autocast_cache()
        try:
            if self._trial.whole:
                scatter(network.parameters(self.model))
            self.start = self._trial.now(self._trial.state)
            with _eager():
                yield
        finally:
            self._trial.put_back()

    def state(self, before: State) -> State:
        return self._trial.now(before)

    def logits(self, images: Tensor) -> Tensor | None:
        """(B, classes) of a pass with the random numbers of every other; None if there are none."""
        out = self.with_graph(images)
        return None if out is None else out.detach()

    def with_graph(self, images: Tensor) -> Tensor | None:
        """The same with its graph, where one is recorded at all."""
        self._trial.random.put_back()
        with torch.set_grad_enabled(self.records):
            out = self.model(images)
        self.drew = self._trial.random != RandomNumbers(self.images.device)
        self.drew_at_all = self.drew or self.start.has_drawn()
        return out if isinstance(out, Tensor) and out.ndim else None


# --- what the passes show -------------------------------------------------------------------------


def _only(kept: int, images: Tensor, others: Tensor) -> Tensor:
    """The images, of which all but one row are others."""
    mixed = others.clone()
    mixed[kept] = images[kept]
    return mixed


def _apart(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value; infinite where but one is finite."""
    if a.shape != b.shape:
        return float("inf")
    a, b = (x.to(contract.accumulation_dtype(x)) for x in (a, b))
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return float("inf")
    difference = torch.where(finite, a - b, 0).abs().amax()
    size = torch.where(finite, a, 0).abs().amax()
    return float(difference / size) if difference > 0 else 0.0


def _first_that_differs(trial: _Passes, mixed: Tensor, row: int) -> str | None:
    """Name of the innermost module after which the row is another one in the second batch."""
    names = {id(module): name for name, module in network.named_modules(trial.model)}
    count = trial.images.shape[0]
    runs: list[list[tuple[nn.Module, Tensor | None]]] = []
    for images in (trial.images, mixed):
        trial.start.put_back()
        outputs: list[tuple[nn.Module, Tensor | None]] = []

        def after(module: nn.Module, output: Any, outputs: Any = outputs) -> None:
            rowwise = isinstance(output, Tensor) and output.ndim > 0 and len(output) == count
            outputs.append((module, output[row].detach().clone() if rowwise else None))

        with network.watched(lambda module: None, after):
            trial.logits(images)
        runs.append(outputs)
    for (module, first), (again, second) in zip(*runs, strict=False):
        if module is not again:
            return None
        if first is not None and second is not None and not torch.equal(first, second):
            return names.get(id(module)) or type(module).__name__
    return None


def _failed(error: Exception) -> str:
    return f"{type(error).__name__}: " + str(error).strip().partition("\n")[0][:200]


def _by_content(trial: _Passes, base: Tensor, mixed: Tensor, row: int) -> Coupling | None:
    """Whether the row's logits change with the other rows; None where they do not."""
    trial.start.put_back()
    try:
        changed = trial.logits(mixed)
    except FAILURES as error:
        return Coupling(f"it cannot be tried on other images ({_failed(error)})")
    if changed is None or changed.shape != base.shape:
        return Coupling("its output is of another form on other images")
    apart = _apart(base[row], changed[row])
    unit = torch.finfo(contract.accumulation_dtype(base)).eps
    if apart > _ROUNDINGS * unit:
        trial.start.put_back()
        again = trial.logits(trial.images)
        if again is None or apart <= 4 * _apart(base[row], again[row]):
            return Coupling("the same images give other logits every time", certain=False)
        name = _first_that_differs(trial, mixed, row) or "the network"
        return Coupling(f"{name} lets rows depend on each other")
    others = [other for other in range(base.shape[0]) if other != row]
    if _apart(base[others], changed[others]) == 0 or bool(base.isnan().any()):
        return Coupling("its logits are the same for all images, or NaN", certain=False)
    return None


def _drawing(trial: _Passes) -> list[nn.Module]:
    """The modules that draw random numbers, and have no part that does."""
    before: list[RandomNumbers] = []
    drew: list[nn.Module] = []

    def enter(module: nn.Module) -> None:
        before.append(RandomNumbers(trial.images.device))

    def leave(module: nn.Module, output: Any) -> None:
        if before.pop() != RandomNumbers(trial.images.device):
            drew.append(module)

    with network.watched(enter, leave):
        trial.logits(trial.images)
    drawing = {id(module) for module in drew}
    return [
        module
        for module in drew
        if not any(id(part) in drawing for part in fingerprint.walk(module) if part is not module)
    ]


def _by_place(trial: _Passes, base: Tensor) -> Coupling | None:
    """Whether a row's logits change with its place in the batch.

    The order is turned around, so that every row but the middle one has another place and other
    neighbours before it: what goes by place, or is dealt out until it is used up, shows. Networks
    that draw random numbers are left out, as a draw goes by place too.
    """
    trial.start.put_back()
    if trial.drew_at_all:
        return None
    try:
        turned = trial.logits(trial.images.flip(0))
    except FAILURES as error:
        return Coupling(f"it cannot be tried in another order ({_failed(error)})", certain=False)
    if turned is None or turned.shape != base.shape:
        return Coupling("its output is of another form in another order", certain=False)
    # Kernels take places together in their own ways, and round as differently as for sizes.
    dtype = coarsest(trial.images, base)
    apart = _apart(base, turned.flip(0))
    if apart > _SIZES_APART.get(dtype, _SIZES_APART_IN_HALF):
        trial.start.put_back()
        again = trial.logits(trial.images)
        if again is None or apart <= 4 * _apart(base, again):
            return Coupling("the same images give other logits every time", certain=False)
        return Coupling("its logits depend on the order of the rows")
    return None


def _by_gradient(trial: _Passes, row: int) -> Coupling | None:
    """Whether the gradient of one row's logits changes with what flows back through other rows.

    One forward pass and two backward passes: from all rows, and from this one alone. A layer may
    divide by the norm of the batch's gradient, and show nothing of it in its forward pass.
    """
    trial.start.put_back()
    if not trial.records:
        return None
    images = trial.images.clone().requires_grad_()
    try:
        logits = trial.with_graph(images)
        if logits is None or not logits.requires_grad:
            return None
        weights = torch.linspace(0.5, 1.5, logits[0].numel(), device=logits.device)
        scores = (logits.flatten(1) * weights.to(logits.dtype)).sum(1)
        # Four times the others, so that the largest gradient is not this row's own.
        total = 4 * scores.sum() - 3 * scores[row]
        (every,) = torch.autograd.grad(total, images, retain_graph=True)
        (alone,) = torch.autograd.grad(scores[row], images)
    except FAILURES:  # reentrant checkpoints, values that are used once: said elsewhere, by name
        return None
    if not bool(every[row].isfinite().all() & alone[row].isfinite().all()):
        return None
    dtype = coarsest(trial.images, logits)
    if _apart(every[row], alone[row]) > _SIZES_APART.get(dtype, _SIZES_APART_IN_HALF):
        return Coupling("the gradient of a row depends on those of other rows")
    return None


_NO_PART = "it does not take a part of the batch by itself"


def _by_size(trial: _Passes, base: Tensor) -> Coupling | None:
    """Whether the logits depend on how many rows there are: half of them, or one alone."""
    quiet: list[nn.Module] = []
    trial.start.put_back()
    try:
        if trial.drew:  # for another shape other numbers are drawn, and nothing could be compared
            quiet = _drawing(trial)
            whole = _of_rows(trial, trial.images, quiet)
            assert whole is not None
            base = whole
        if trial.drew:
            return None
    except FAILURES as error:
        return Coupling(f"{_NO_PART} ({_failed(error)})")
    half = max(1, trial.images.shape[0] // 2)
    found, alone = (_of_a_part(trial, base[:count], quiet) for count in (half, 1))
    if half > 1 and found is None and alone is not None and not alone.certain:
        return Coupling(None, least=2)
    found = found or alone
    if found is None or half == 1:  # a larger batch may show that two rows are a part
        return found
    return Coupling(found.reason)


def _of_rows(trial: _Passes, images: Tensor, quiet: list[nn.Module]) -> Tensor | None:
    """Logits of some images, from the start, with modules that would draw in eval mode."""
    trial.start.put_back()
    for module in quiet:
        module.training = False
    return trial.logits(images)


def _of_a_part(trial: _Passes, base: Tensor, quiet: list[nn.Module]) -> Coupling | None:
    """Whether the first rows have other logits by themselves; not certain where they have none."""
    try:
        part = _of_rows(trial, trial.images[: base.shape[0]], quiet)
    except FAILURES as error:
        return Coupling(f"{_NO_PART} ({_failed(error)})", certain=False)
    if part is None or part.shape != base.shape:
        return Coupling(_NO_PART, certain=False)
    dtype = coarsest(trial.images, base)
    if _apart(base, part) > _SIZES_APART.get(dtype, _SIZES_APART_IN_HALF):
        return Coupling("its logits depend on the number of rows")
    return None


def _by_state(trial: _Passes, mixed: Tensor) -> tuple[Coupling | None, Tensor | None]:
    """Whether a pass changes what later ones find; and the logits of the first."""
    base = trial.logits(trial.images)
    if base is None or base.shape[0] != trial.images.shape[0]:
        return Coupling("its output is no tensor of logits", certain=False), None
    # What the first pass fills, a cache or a layer that starts with its first batch, the second one
    # finds. What a second pass still changes goes on for ever.
    first = trial.state(trial.start)
    with contextlib.suppress(*FAILURES):
        trial.logits(mixed)
        moved = first.changed_to(trial.state(first))
        if moved:
            return Coupling(f"every forward pass changes {moved[0]}"), base
    return None, base


def _try(model: Model, images: Tensor, together: bool) -> Coupling:
    if images.shape[0] == 1:
        images = torch.cat([images, images])
    trial = _Passes(model, images)
    others = other_images(trial.images)
    last = images.shape[0] - 1
    with trial.running():
        found, base = _by_state(trial, _only(0, trial.images, others))
        if base is None:
            return found or Coupling(None)
        for test in (
            lambda: _by_content(trial, base, _only(0, trial.images, others), 0),
            lambda: _by_content(trial, base, _only(last, trial.images, others), last),
            lambda: _by_place(trial, base),
            lambda: _by_gradient(trial, 0),
            lambda: _by_size(trial, base),
        ):
            # Where a pass is an affair of all processes, all run as many.
            if found is None or together:
                found = found or test()
        return found or Coupling(None)


# --- once for a network in a mode -----------------------------------------------------------------


_known: Memory[Coupling] = Memory()


def _agreed(found: Coupling, images: Tensor) -> Coupling:
    """The same answer on every process: where they run different numbers of passes, all wait."""
    answer = torch.tensor(
        [found.reason is not None, not found.certain, found.least],
        dtype=torch.int32,
        device=images.device,
    )
    torch.distributed.all_reduce(answer, torch.distributed.ReduceOp.MAX)
    couples, uncertain, least = answer.tolist()
    reason = found.reason or ("another process found so" if couples else None)
    return Coupling(reason, not uncertain, least)


def of(model: Model, images: Tensor) -> Coupling:
    """Whether rows couple in a network as it is now: tried once for a mode, then remembered.

    A network without state and without random numbers costs eight forward passes and two backward
    ones, one that keeps state two. Tried again: where the answer was not certain, at the first,
    second, fourth, eighth ... such call, and where values of the callable or settings of its
    modules have changed, as ``Memory`` says. In between, rows stay together where a setting has
    changed, and are independent as before where a number of the callable has, or a tensor.

    Not seen is what shows by chance alone, for other images, or in the second derivative: a layer
    that mixes rows in some passes only, an expert that is never full here.

    Args:
        model: maps images to logits.
        images: (B, C, H, W) of the batch at hand.
    """
    if images.shape[0] == 0:
        return Coupling("there are no rows to try", certain=False)
    modules = list(network.modules(model))
    name = declared(model, modules)
    if name is not None:
        return Coupling(f"{name} lets rows depend on each other")
    behind = network.behind(model)
    kind = (torch.is_grad_enabled(),)
    call = Fingerprint(model, *behind.roots, kind=kind, settings=True, modules=modules)
    # Several processes must try it in the same step.
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        call.forget_versions()
    found = _known.get(call)
    return _found_out(model, images, behind, call) if found is None else found


def _found_out(model: Model, images: Tensor, behind: network.Behind, call: Fingerprint) -> Coupling:
    if any(nn.parameter.is_lazy(p) for p in network.parameters(model)):
        return Coupling("it makes its parameters in this pass", certain=False)
    if not behind.roots or behind.orphans:
        return Coupling("it is no module, and what it remembers cannot be seen")
    latest = _known.latest(call)
    if latest is not None and latest.reason is not None:  # its settings may be what a pass changes
        return latest
    if not _known.is_due(call):
        if latest is not None and _known.moved_by_measures(call):
            return latest
        return Coupling("its settings change from call to call", certain=False)
    together = distributed.runs_together(model)
    found = _try(model, images, together)
    if together:
        found = _agreed(found, images)
    if found.certain:
        _known.put(call, found)
    else:
        _known.postpone(call)
    return found
