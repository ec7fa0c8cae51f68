"""PyTorch's default device and dtype change nothing: every public name is run to show it.

Tensors are made beside others all the time. One that is made where the default says lies on another
device, or has another dtype; a native kernel would write through its address all the same. Here
every public function and method runs under other defaults, and its results are those of the
ordinary ones to the bit. Which functions run is watched: a public name that nothing in
`public_calls` runs fails the last test.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import random
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import extras
import numpy as np
import pytest
import torch
from public_calls import SCENARIOS, WITH_TRAIN
from torch import Tensor

NO_TRAIN = extras.why_no_train()

# --- the defaults ---------------------------------------------------------------------------------


@contextlib.contextmanager
def other_device() -> Iterator[None]:
    """A device without values: whatever is made there and read is an error."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def other_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "meta": other_device,
    "float64": functools.partial(other_dtype, torch.float64),
    "bfloat16": functools.partial(other_dtype, torch.bfloat16),
    "float16": functools.partial(other_dtype, torch.float16),
}

# --- compared -------------------------------------------------------------------------------------


def assert_same(got: Any, want: Any) -> None:
    assert type(got) is type(want)
    if isinstance(want, Tensor):
        assert (got.device, got.dtype, got.shape) == (want.device, want.dtype, want.shape)
        assert torch.equal(got.nan_to_num(7.25), want.nan_to_num(7.25))
        assert torch.equal(got.isnan(), want.isnan())
    elif isinstance(want, np.ndarray):
        np.testing.assert_array_equal(got, want)
    elif dataclasses.is_dataclass(want) and not isinstance(want, type):
        for field in dataclasses.fields(want):
            assert_same(getattr(got, field.name), getattr(want, field.name))
    elif isinstance(want, dict):
        assert got.keys() == want.keys()
        for key in want:
            assert_same(got[key], want[key])
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            assert_same(a, b)
    elif isinstance(want, float):
        assert got == want or (got != got and want != want)
    else:
        assert got == want


#: Code that ran under other defaults, and of which scenarios, in this process.
RAN: set[types.CodeType] = set()
DONE: set[str] = set()


@contextlib.contextmanager
def watched() -> Iterator[None]:
    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            RAN.add(frame.f_code)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(before)


def prepared(name: str, folder: Path) -> Callable[[], Any]:
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    return SCENARIOS[name](folder)


@functools.cache
def ordinary(name: str, folder: Path) -> Any:
    run = prepared(name, folder)
    torch.manual_seed(1)
    return run()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("defaults")


def run_under(name: str, defaults: str, folders: Path) -> Any:
    DONE.add(name)
    run = prepared(name, folders / f"{name} {defaults}")
    torch.manual_seed(1)
    with warnings.catch_warnings(), DEFAULTS[defaults](), watched():
        warnings.simplefilter("ignore")
        return run()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("defaults", DEFAULTS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_defaults_change_nothing(name: str, defaults: str, folders: Path) -> None:
    if name in WITH_TRAIN and NO_TRAIN is not None:
        pytest.skip(NO_TRAIN)
    want = ordinary(name, folders / name)
    assert_same(run_under(name, defaults, folders), want)


# --- and nothing is forgotten ---------------------------------------------------------------------

PACKAGES = (
    *("harmonizer_ext", "harmonizer_ext.alignment", "harmonizer_ext.clickme"),
    *("harmonizer_ext.data", "harmonizer_ext.explanations", "harmonizer_ext.map_losses"),
    *("harmonizer_ext.revealed_stimuli", "harmonizer_ext.data.sources"),
    *("harmonizer_ext.data.augmentation", "harmonizer_ext.data.tv_heatmap"),
)
PYTHON = Path(__file__).parent.parent / "python"

#: Programs, and what only they call: they run with the defaults that Python starts with.
PROGRAMS = {
    *("train", "evaluate", "demo", "check_networks", "prepare_clickme", "clickme_download"),
    *("reveal_experiment", "timm_networks"),
    *("training.checkpoint", "training.config", "training.logbook", "training.presets"),
}
NOT_RUN = {
    "harmonizer_ext.clickme.ClickMeWebDataset.samples": "part of iterating over it",
    "evaluating.networks.load": "loads a network as the program does",
    "evaluating.tar_shards.TarShards": "its tensors are made by ClickMe's reader",
    "clickme_convert.verify_tfrecord": "reads bytes",
    "clickme_http": "reads bytes",
    "command_line": "text",
    "classifiers": "no tensor is made",
    "shortcut_digits.save": "writes bytes",
    "shortcut_digits.main": "a program",
    "training.networks.create": "makes a network where the defaults say",
    "training.networks.load_weights": "no tensor is made",
    "training.networks.prepare": "of the program",
    "training.networks.with_loss": "of the program",
    "training.networks.without_exchange": "of the program",
    "training.images": "of the program; decodes pictures, and makes no tensor",
    "training.data.readable": "of the program",
    "training.panels.file_name": "text",
    "training.data.open_clickme": "of the program; its data sets are run here",
    "training.data.open_training": "of the program; its data sets are run here",
    "training.data.open_tests": "of the program; its data sets are run here",
    "training.data.Training": "of the program",
    "training.data.Test": "a property of one line",
    "training.processes": "between processes",
}


def own(thing: Any, module: str) -> bool:
    return getattr(thing, "__module__", "").startswith(module)


def codes(module: types.ModuleType, names: list[str]) -> Iterator[tuple[str, types.CodeType]]:
    """Public functions and methods of a module with their code."""
    for name in names:
        thing = getattr(module, name)
        path = f"{module.__name__}.{name}"
        if inspect.isclass(thing):
            root = module.__name__.partition(".")[0]
            for key in {k for c in thing.__mro__ if c.__module__.startswith(root) for k in vars(c)}:
                if key.startswith("_") and key not in ("__call__", "__getitem__", "__iter__"):
                    continue
                member = inspect.getattr_static(thing, key)
                function = getattr(member, "fget", getattr(member, "__func__", member))
                function = inspect.unwrap(function) if callable(function) else function
                if isinstance(function, types.FunctionType):
                    yield f"{path}.{key}", function.__code__
        elif isinstance(inspect.unwrap(thing) if callable(thing) else thing, types.FunctionType):
            yield path, inspect.unwrap(thing).__code__


def public_names() -> dict[str, types.CodeType]:
    found: dict[str, types.CodeType] = {}
    for name in PACKAGES:
        module = importlib.import_module(name)
        found |= codes(module, [n for n in module.__all__ if not n.startswith("__")])
    for path in sorted(PYTHON.rglob("*.py")):
        name = ".".join(path.relative_to(PYTHON).with_suffix("").parts).removesuffix(".__init__")
        if name in PROGRAMS:
            continue
        module = importlib.import_module(name)
        own_names = [
            n for n, thing in vars(module).items()
            if not n.startswith("_") and getattr(thing, "__module__", None) == name
        ]  # fmt: skip
        found |= codes(module, own_names)
    return found


@pytest.mark.filterwarnings("ignore")
def test_every_public_name_is_run(folders: Path) -> None:
    if NO_TRAIN is not None:
        pytest.skip(NO_TRAIN)
    for name in SCENARIOS.keys() - DONE:  # which another process has run, or nobody
        run_under(name, "float64", folders)
    missing = [
        name for name, code in public_names().items()
        if code not in RAN and not any(name.startswith(known) for known in NOT_RUN)
    ]  # fmt: skip
    assert not missing, f"no scenario of public_calls.py runs {', '.join(missing)}"
