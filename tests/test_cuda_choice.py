"""Which kernels a call takes, where clusters of blocks fit and where they do not."""

from __future__ import annotations

import functools

import cuda_cases
import cuda_on_host as host
import cuda_paths
import pytest
import torch
from conftest import make_case

pytestmark = pytest.mark.skipif(
    host.why_not_here() is not None, reason=f"cuda on host: {host.why_not_here()}"
)


def _numbers(formulation: str, size: int) -> dict[str, int]:
    """Numbers of the specializations by name, the general path's among them."""
    (result,) = host.run([cuda_cases.Case("variants")])
    found = {"general": -1}
    for described, number in result.options.items():
        name, of_size, of_formulation = described.rsplit(maxsplit=5)[:3]
        if (of_size, cuda_cases.FORMULATIONS[int(of_formulation)]) == (str(size), formulation):
            found[name] = number
    return found


@functools.cache
def _bits(formulation: str, size: int) -> dict[str, dict[str, torch.Tensor]]:
    """The result of each specialization, where all of them fit."""
    numbers = _numbers(formulation, size)
    results = host.run([_path_case(formulation, size, number) for number in numbers.values()])
    return dict(zip(numbers, (result.tensors for result in results), strict=True))


def _path_case(formulation: str, size: int, variant: int) -> cuda_cases.Case:
    case = make_case(torch.Generator().manual_seed(0), size, size, channels=1, batch=1)
    maps = (case.saliency, case.heatmaps, case.tokens)
    return cuda_cases.loss_case(*maps, formulation, variant=variant)


@pytest.mark.parametrize(
    ("formulation", "size", "largest", "expected"),
    [
        ("released", 112, 16, "112/2x4"),
        ("released", 112, 2, "112/2x4"),
        ("released", 112, 1, "general"),
        ("released", 224, 4, "224/4x2"),
        ("released", 224, 2, "general"),
        ("released", 256, 4, "general"),
        ("paper", 112, 2, "112/2x3"),
        ("paper", 112, -1, "general"),
        ("paper", 224, 16, "224/8x3"),
        ("paper", 224, 4, "224/4x1 three slabs"),
        ("paper", 224, 2, "general"),
        # One block on a multiprocessor, compared with the general path by nobody yet.
        *(
            (formulation, size, 16, "general")
            for formulation in cuda_cases.FORMULATIONS
            for size in (384, 448, 512)
        ),
    ],
)
def test_automatic_choice(formulation: str, size: int, largest: int, expected: str) -> None:
    """The choice is seen by the bits of its result, which clusters of one size share alone."""
    bits = _bits(formulation, size)
    assert len(bits) > 1
    limited = {"HARMONIZER_HOST_LARGEST_CLUSTER": str(largest)}
    # Twice: the device is asked once, and the stand-in of the runtime answers no second time.
    twice = [_path_case(formulation, size, 0)] * 2
    for chosen in host.run(twice, environment=limited):
        same = [
            name for name, of_name in bits.items() if cuda_paths.same_bits(chosen.tensors, of_name)
        ]
        assert expected in same
        assert {name.partition("x")[0] for name in same} == {expected.partition("x")[0]}


@pytest.mark.parametrize("largest", ["4", "-4"])
def test_a_named_specialization_that_does_not_fit_is_an_error(largest: str) -> None:
    environment = {"HARMONIZER_HOST_LARGEST_CLUSTER": largest}
    numbers = _numbers("released", 224)
    fits = [_path_case("released", 224, numbers[name]) for name in ("224/4x2", "general")]
    host.run(fits, environment=environment)
    with pytest.raises(
        AssertionError,
        match=r"variant 224/8x4: the GPU has no room for one cluster of it .*variant 0",
    ):
        host.run([_path_case("released", 224, numbers["224/8x4"])], environment=environment)


@pytest.mark.parametrize("with_gradient", [False, True])
def test_standardize_where_no_cluster_fits(generator: torch.Generator, with_gradient: bool) -> None:
    # More pixels than one block holds, which a cluster would share.
    maps = torch.randn(2, 1, 97, 130, generator=generator)
    named = {"maps": maps, "grad": torch.randn(maps.shape, generator=generator)}
    case = cuda_cases.Case("standardize", named if with_gradient else {"maps": maps})
    shared, twice = host.run([case] * 2)
    for largest in ("1", "-1"):
        environment = {"HARMONIZER_HOST_LARGEST_CLUSTER": largest}
        for alone in host.run([case] * 2, environment=environment):
            assert not cuda_paths.same_bits(alone.tensors, shared.tensors)
            torch.testing.assert_close(
                alone.tensors["output"], shared.tensors["output"], rtol=2e-5, atol=2e-6
            )
    assert cuda_paths.same_bits(shared.tensors, twice.tensors)
