"""Every path through the CUDA kernels once, as small cases for a program that runs them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import torch
from conftest import make_case
from cuda_cases import FORMULATIONS, Backend, Case, loss_case

#: Devices that take other paths through the kernels than an H200, the default. No GPU has as little
#: shared memory and cache as the last: it takes at small sizes the paths that are there for large
#: ones.
DEVICES: dict[str, dict[str, str]] = {
    "hopper": {},
    "ampere": {
        "HARMONIZER_HOST_ARCH": "80",
        "HARMONIZER_HOST_MULTIPROCESSORS": "108",
        "HARMONIZER_HOST_SHARED": "166912",
        "HARMONIZER_HOST_L2": "41943040",
    },
    "turing": {
        "HARMONIZER_HOST_ARCH": "75",
        "HARMONIZER_HOST_MULTIPROCESSORS": "40",
        "HARMONIZER_HOST_SHARED": "65536",
        "HARMONIZER_HOST_L2": "4194304",
    },
    "tiny": {
        "HARMONIZER_HOST_ARCH": "80",
        "HARMONIZER_HOST_MULTIPROCESSORS": "2",
        "HARMONIZER_HOST_SHARED": "6144",
        "HARMONIZER_HOST_L2": "65536",
    },
}


class Run(Protocol):
    """Runs cases with settings of the machine."""

    def __call__(self, cases: Sequence[Case], *, environment: Mapping[str, str]) -> list[Case]: ...


class Variant(NamedTuple):
    """A specialization of the loss, as csrc/cuda/loss.cu lists them."""

    number: int
    name: str
    size: int
    formulation: str
    cluster: int
    threads: int


def variants(run: Run) -> list[Variant]:
    """Every specialization, by number."""
    (result,) = run([Case("variants")], environment={})
    found = []
    for text, number in sorted(result.options.items(), key=lambda item: item[1]):
        *name, size, formulation, cluster, threads, _shared = text.split()
        numbers = int(cluster), int(threads)
        found.append(
            Variant(number, " ".join(name), int(size), FORMULATIONS[int(formulation)], *numbers)
        )
    return found


def every_path(
    backend: Backend, run: Run, largest: int = 512, batch: int = 3
) -> list[tuple[str, Case]]:
    """(device, case): every kernel, small, with the specializations up to a size."""
    generator = torch.Generator().manual_seed(0)
    paths: list[tuple[str, Case]] = []
    for device, height, width, dtype in (
        ("hopper", 33, 31, torch.float32),
        ("hopper", 20, 20, torch.bfloat16),
        ("tiny", 97, 130, torch.float32),
        ("tiny", 36, 52, torch.float16),
        ("tiny", 1, 1, torch.float32),
    ):
        for formulation, levels in itertools.product(FORMULATIONS, (2, 7)):
            case = make_case(generator, height, width, dtype=dtype, scale=1.0, batch=batch)
            if dtype == torch.bfloat16:
                case.saliency = case.saliency.to(memory_format=torch.channels_last)
            maps = (case.saliency, case.heatmaps, case.tokens)
            for gradient in (True, False) if levels == 7 else (True,):
                options = {"formulation": formulation, "with_gradient": gradient, "variant": -1}
                paths.append((device, loss_case(*maps, levels=levels, **options)))
    for number, _, size, formulation, _, _ in variants(run):
        if size > largest:
            continue
        # One channel and one row: what there is more of is done in the same way.
        case = make_case(generator, size, size, channels=1, batch=1)
        maps = (case.saliency, case.heatmaps, case.tokens)
        paths.append(("hopper", loss_case(*maps, formulation, variant=number, prefetch=1)))
    for device in ("hopper", "turing"):
        for size, dtype in (((33, 31), torch.float32), ((97, 130), torch.float16)):
            for shape in ((batch, 2, *size), (1, 1, size[0] + 3, size[1] + 1)):
                maps = torch.randn(shape, generator=generator).to(dtype)
                other = torch.randn(shape, generator=generator)
                named = {"maps": maps, "grad": other.to(dtype)}
                paths.append((device, Case("standardize", {"maps": maps})))
                paths.append((device, Case("standardize", named)))
                pair = {"a": maps[:, 0], "b": other[:, 0]}
                paths.append((device, Case("positive_part_mse", pair)))
                pair = pair | {"grad": torch.ones(shape[0])}
                paths.append((device, Case("positive_part_mse", pair)))
                paths.append((device, Case("pyramid", {"maps": maps}, {"levels": 5})))
                levels = backend.pyramid(maps, 5)
                named = {f"gradient{level}": value for level, value in enumerate(levels, 1)}
                options = {"height": shape[2], "width": shape[3]}
                paths.append((device, Case("pyramid_adjoint", named, options)))
    return paths


def run_paths(
    run: Run, paths: list[tuple[str, Case]], **settings: str
) -> list[dict[str, torch.Tensor]]:
    """The outputs of paths, those of each device in one process."""

    def run_device(device: str) -> dict[int, dict[str, torch.Tensor]]:
        mine = [number for number, path in enumerate(paths) if path[0] == device]
        cases = [paths[number][1] for number in mine]
        results = run(cases, environment=DEVICES[device] | settings)
        return {number: result.tensors for number, result in zip(mine, results, strict=True)}

    with ThreadPoolExecutor(2) as pool:
        devices = dict.fromkeys(device for device, _ in paths)
        merged = {number: r for part in pool.map(run_device, devices) for number, r in part.items()}
    return [merged[number] for number in range(len(paths))]


def same_bits(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return got.keys() == expected.keys() and all(
        torch.equal(got[name].view(torch.uint8), expected[name].view(torch.uint8)) for name in got
    )
