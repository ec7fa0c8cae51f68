"""The CUDA kernels as nvcc compiled them, executed: values, order, races, barriers, addresses."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cuda_cases
import cuda_paths
import cuda_ptx_on_host as host
import ptx_on_host
import pytest
import test_loss as loss_tests
import test_positive_part_mse as mse_tests
import test_pyramid as pyramid_tests
import test_standardize as standardize_tests
import torch
from conftest import (
    FORMULATIONS,
    Case,
    Target,
    assert_agrees,
    conditioned,
    make_case,
)

from harmonizer_ext import backends

pytestmark = pytest.mark.skipif(
    host.why_not_here() is not None, reason=f"cuda ptx on host: {host.why_not_here()}"
)

TARGET = Target("cuda_ptx_on_host", "cpu")
#: Two GPUs that choose other paths; PTX of the general path is the same for both.
DEVICES = ("ampere", "hopper")
EACH_DEVICE = pytest.mark.parametrize("device", DEVICES)
EACH_FORMULATION = pytest.mark.parametrize(("formulation", "distance"), FORMULATIONS)


@pytest.fixture(autouse=True)
def _backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, f"harmonizer_ext.backends.{TARGET.backend}", host.backend)
    order = (*backends.PREFERENCE["cpu"], TARGET.backend)
    monkeypatch.setitem(backends.PREFERENCE, "cpu", order)
    monkeypatch.setattr(host.backend, "variant", 0)
    monkeypatch.setattr(host.backend, "device", {})
    yield
    backends.get.cache_clear()


# --- values ---------------------------------------------------------------------------------------


@dataclass
class Wanted:
    """A call of the loss and how it is asked for."""

    case: Case
    levels: int
    formulation: str
    distance: str
    variant: int = 0


def _agree(wanted: Sequence[Wanted], device: str) -> None:
    """All in one process, each element by element with the reference in float64."""
    calls = []
    for w in wanted:
        tokens = w.case.tokens if w.case.tokens is not None else torch.ones(len(w.case.saliency))
        maps = (w.case.saliency, w.case.heatmaps, tokens)
        options = {"levels": w.levels, "distance": w.distance, "variant": w.variant}
        calls.append(cuda_cases.loss_case(*maps, w.formulation, **options))
    results = host.run(calls, environment=cuda_paths.DEVICES[device])
    for w, result in zip(wanted, results, strict=True):
        rows, gradient = result.tensors["rows"], result.tensors["gradient"]
        # One map serves all channels.
        gradient = gradient.double().expand(-1, w.case.saliency.shape[1], -1, -1)
        assert_agrees(
            w.case,
            (rows.double(), gradient),
            conditioned(loss_tests.FLOAT32_RTOL, w.case, w.levels, w.formulation),
            levels=w.levels,
            formulation=w.formulation,
            distance=w.distance,
        )


@EACH_DEVICE
@pytest.mark.parametrize(
    ("height", "width", "channels"),
    [(1, 1, 3), (1, 7, 1), (5, 5, 4), (33, 31, 3), (64, 64, 1), (97, 130, 4)],
)
def test_loss(
    generator: torch.Generator, device: str, height: int, width: int, channels: int
) -> None:
    wanted = [
        Wanted(make_case(generator, height, width, channels=channels), levels, *formulation)
        for levels, formulation in itertools.product(range(1, 7), FORMULATIONS)
    ]
    _agree(wanted, device)


@pytest.mark.parametrize("levels", [5, 6])
def test_specializations(generator: torch.Generator, levels: int) -> None:
    wanted = []
    for variant in cuda_paths.variants(host.run):
        size, formulation = variant.size, variant.formulation
        distance = "l2" if formulation == "paper" and levels == 6 else "mse"
        case = make_case(generator, size, size, channels=3 if size < 384 else 1, batch=2)
        wanted.append(Wanted(case, levels, formulation, distance, variant.number))
    assert {variant.size for variant in cuda_paths.variants(host.run)} >= {112, 224, 512}
    # Two processes, each with every other.
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda part: _agree(part, "hopper"), (wanted[::2], wanted[1::2])))


@EACH_DEVICE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves(generator: torch.Generator, device: str, dtype: torch.dtype) -> None:
    host.backend.device = cuda_paths.DEVICES[device]
    for size in ((33, 20), (112, 112)):
        for formulation, distance in FORMULATIONS:
            loss_tests.test_half_precision(TARGET, generator, dtype, *size, formulation, distance)


@EACH_DEVICE
def test_strides(generator: torch.Generator, device: str) -> None:
    wanted = []
    for layout in loss_tests._strided(torch.zeros(1, 3, 2, 2)):
        for size, formulation in itertools.product(((17, 33), (112, 112)), FORMULATIONS[:2]):
            case = make_case(generator, *size)
            case.saliency = loss_tests._strided(case.saliency)[layout]
            wanted.append(Wanted(case, 5, *formulation))
    _agree(wanted, device)


@EACH_FORMULATION
def test_rows_without_token_and_nan(
    generator: torch.Generator, formulation: str, distance: str
) -> None:
    for device in DEVICES:
        host.backend.device = cuda_paths.DEVICES[device]
        loss_tests.test_row_without_token_is_not_read(TARGET, generator, formulation, distance)
        for value, where in ((torch.nan, "saliency"), (torch.inf, "heatmaps")):
            loss_tests.test_nan_poisons_its_own_row(
                TARGET, generator, value, where, formulation, distance
            )
        loss_tests.test_constant_maps(TARGET, generator, 0.3, 33, 31)


@EACH_DEVICE
def test_building_blocks(generator: torch.Generator, device: str) -> None:
    host.backend.device = cuda_paths.DEVICES[device]
    for size in ((7, 5), (97, 132)):
        standardize_tests.test_agrees_with_reference(TARGET, generator, *size, 1.0, torch.float32)
        mse_tests.test_agrees_with_reference(TARGET, generator, *size, torch.float16, torch.float32)
    pyramid_tests.test_adjoint_identity(TARGET, generator, 64, 33)


# --- order, races, barriers -----------------------------------------------------------------------


def _paths(largest: int) -> list[tuple[str, cuda_cases.Case]]:
    """Paths of a program for Ampere and Hopper, with maps in clusters that are read by fours."""
    paths = []
    for device, case in cuda_paths.every_path(host.backend, host.run, largest, batch=1):
        paths.append(("ampere" if device == "turing" else device, case))
        if device == "hopper" and case.operation == "loss" and case.options["variant"] < 0:
            paths.append(("ampere", case))
    generator = torch.Generator().manual_seed(1)
    maps, other = (torch.randn(1, 2, 96, 132, generator=generator) for _ in range(2))
    paths.append(("hopper", cuda_cases.Case("standardize", {"maps": maps})))
    paths.append(("hopper", cuda_cases.Case("standardize", {"maps": maps, "grad": other})))
    # One level alone is no matter for the kernel of small ones.
    paths.append(("hopper", cuda_cases.Case("pyramid", {"maps": maps}, {"levels": 2})))
    return paths


def _many_partial_moments() -> tuple[str, cuda_cases.Case]:
    """A map of so many pixels that their moments are merged before they are used."""
    case = make_case(torch.Generator().manual_seed(2), 364, 365, channels=1, batch=1)
    maps = (case.saliency, case.heatmaps, case.tokens)
    options = {"formulation": "released", "levels": 1, "with_gradient": False, "variant": -1}
    return "hopper", cuda_cases.loss_case(*maps, **options)


def _run(
    cases: Sequence[cuda_cases.Case], *, environment: Mapping[str, str]
) -> list[cuda_cases.Case]:
    return host.run(cases, environment=environment)


def test_order_of_blocks_and_threads_does_not_matter() -> None:
    paths = _paths(largest=256)
    expected = cuda_paths.run_paths(_run, paths)
    for order in ("1", "2"):
        got = cuda_paths.run_paths(_run, paths, HARMONIZER_PTX_ORDER=order)
        for (_, case), a, b in zip(paths, expected, got, strict=True):
            assert cuda_paths.same_bits(a, b), case.operation
            # What was never written is NaN.
            assert not any(tensor.isnan().any() for tensor in a.values()), case.operation


@dataclass
class Launched:
    """A kernel, and the paths in which it is launched, the largest maps last."""

    name: str
    text: str
    paths: list[int]


def _launched(paths: list[tuple[str, cuda_cases.Case]], folder: Path) -> list[Launched]:
    found: dict[tuple[str, str], Launched] = {}

    def look(number: int) -> None:
        dump = folder / str(number)
        dump.mkdir()
        cuda_paths.run_paths(_run, [paths[number]], HARMONIZER_PTX_DUMP=str(dump))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(look, range(len(paths))))
    texts: dict[str, str] = {}
    for number in range(len(paths)):
        for listed in sorted((folder / str(number)).glob("*.launched")):
            text = listed.with_suffix(".ptx").read_text()
            text = texts.setdefault(text, text)
            for name in listed.read_text().split():
                found.setdefault((name, text), Launched(name, text, [])).paths.append(number)
    for launched in found.values():
        launched.paths.sort(key=lambda number: _pixels(paths[number][1]))
    return list(found.values())


def _pixels(case: cuda_cases.Case) -> int:
    return max(tensor.numel() for tensor in case.tensors.values())


GROUPS = {
    "clusters": r"loss_(released|paper)I",
    "coarse": r"loss_coarse",
    "levels": r"loss_level",
    "rest": r"^(?!.*(loss_(released|paper)I|loss_coarse|loss_level))",
}


@dataclass
class Whole:
    """Every path with all barriers in place: what it computes, and the kernels that do it."""

    paths: list[tuple[str, cuda_cases.Case]]
    results: list[dict[str, torch.Tensor]]
    kernels: list[Launched]


def _kernels(text: str) -> set[str]:
    """Names in the source of the kernels of PTX, whatever their templates' arguments."""
    mangled = re.findall(r"\.entry (\w+)\(", text)
    name = re.compile(r"4cuda(?:\d+_GLOBAL_\w+_cu_[0-9a-f]{8})?\d+([a-z_]+)[EI]")
    found = [name.search(each) for each in mangled]
    assert all(found), mangled
    return {each[1] for each in found if each}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    paths = [*_paths(largest=112), _many_partial_moments()]
    results = cuda_paths.run_paths(_run, paths)
    return Whole(paths, results, _launched(paths, tmp_path_factory.mktemp("whole")))


def test_no_kernel_is_left_out(whole: Whole) -> None:
    texts = {kernel.text for kernel in whole.kernels}
    launched = set().union(*(_kernels(f".entry {kernel.name}(") for kernel in whole.kernels))
    assert set().union(*map(_kernels, texts)) == launched
    # A module for each source, and none for its host alone.
    host_alone = {"launch.cu", "loss.cu"}
    sources = {path.name for path in (host.ROOT / "csrc" / "cuda").glob("*.cu")}
    assert len(texts) >= len(sources - host_alone)


@pytest.mark.parametrize("group", GROUPS)
def test_every_barrier_is_needed(group: str, whole: Whole, tmp_path: Path) -> None:
    kernels = [kernel for kernel in whole.kernels if re.search(GROUPS[group], kernel.name)]
    assert kernels

    def noticed(job: tuple[int, Launched, str]) -> bool:
        number, kernel, edited = job
        file = tmp_path / f"{number}.ptx"
        file.write_text(edited)
        for path, order in itertools.product(kernel.paths, "01"):
            settings = {"HARMONIZER_PTX_EDITED": str(file), "HARMONIZER_PTX_ORDER": order}
            try:
                (got,) = cuda_paths.run_paths(_run, [whole.paths[path]], **settings)
            except AssertionError:
                return True
            if not cuda_paths.same_bits(got, whole.results[path]):
                return True
        return False

    jobs, places = [], []
    for kernel in kernels:
        alone = ptx_on_host.kernel_text(kernel.text, kernel.name)
        for where, edited in ptx_on_host.without_each_barrier(alone):
            jobs.append((len(jobs), kernel, edited))
            places.append(f"{kernel.name}, {where}")
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(noticed, jobs))
    idle = [place for place, needed in zip(places, results, strict=True) if not needed]
    assert not idle


@pytest.mark.parametrize("formulation", ["released", "paper"])
def test_an_address_that_is_off_by_a_row_is_noticed(
    generator: torch.Generator, formulation: str, tmp_path: Path
) -> None:
    case = make_case(generator, 112, 112)
    maps = (case.saliency, case.heatmaps, case.tokens)
    path = ("hopper", cuda_cases.loss_case(*maps, formulation))
    (expected,) = cuda_paths.run_paths(_run, [path])
    for kernel in _launched([path], tmp_path):
        alone = ptx_on_host.kernel_text(kernel.text, kernel.name)
        # Of single precision: those of halves are in branches that this case does not take.
        loads = list(re.finditer(r"ld\.global\S*f32 [^;\[]*\[%rd\d+(\+\d+)?\];", alone))
        assert loads
        for load in (loads[0], loads[-1]):
            offset = int((load[1] or "+0")[1:]) + 4 * 112
            edited = re.sub(r"(\[%rd\d+)(\+\d+)?\]", rf"\1+{offset}]", load[0])
            file = tmp_path / "edited.ptx"
            file.write_text(alone[: load.start()] + edited + alone[load.end() :])
            try:
                (got,) = cuda_paths.run_paths(_run, [path], HARMONIZER_PTX_EDITED=str(file))
            except AssertionError:
                continue
            assert not cuda_paths.same_bits(got, expected), load[0]
