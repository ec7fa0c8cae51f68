"""Every Triton kernel compiled for five GPUs without one, and what it may cost read from the code.

The launches are those that the host side would make for 224x224 (and 1024x1024, whose coarse levels
have kernels of their own), tiles, types and constants included. A change that passes a budget is
either a mistake or a decision: then the table changes with it.
"""

from __future__ import annotations

import functools
import os
import re
from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this process interprets its kernels", allow_module_level=True)

import triton_offline as offline

if TYPE_CHECKING:
    from triton_offline import Launch

#: Registers a thread and bytes of shared memory a program, on sm_80, sm_90 and sm_100, with Triton
#: 3.6 and 3.9 alike; no kernel may spill. An SM has 65,536 registers and up to 227 KiB to share.
#:
#: - A pass over full-size maps waits for memory: at 80 registers 24 warps hide that, more than a
#:   third of what an SM can hold; ``loss_columns`` keeps six sums of eight pixels each, and has 16.
#: - One program walks a whole sample with 16 warps: 128 registers is all there is for 512 threads.
#: - Shared memory is what Triton takes to turn a tile from one layout into another, and to add up:
#:   one tile of float32, two in the kernels that read and write full-size maps. At 8 KiB and 2 or
#:   4 warps it is registers that bind.
BUDGETS = {
    "loss_moments": (80, 8192),
    "loss_merge": (80, 0),
    "loss_columns": (128, 4096),
    "loss_rows": (80, 1024),
    "loss_coarse_released": (128, 4096),
    "loss_coarse_paper": (128, 4096),
    "loss_gradient": (80, 4096),
    # Large maps, where a tile takes all 25 taps at once: of both maps in ``loss_level_down``.
    "loss_level_down": (192, 1024),
    "loss_level_sums": (48, 1024),
    "loss_finish_level": (80, 0),
    "loss_level_up_paper": (80, 1024),
    "loss_level_up_released": (80, 1024),
    "loss_finish_released": (80, 0),
    # Building blocks; the last three with 8 warps, two programs at least on an SM.
    "pyramid_step": (128, 1024),
    "pyramid_adjoint_step": (80, 1024),
    "positive_part_mse_backward": (80, 8192),
    "positive_part_mse": (128, 8192),
    "standardize_cut": (128, 8192),
    "standardize_cut_backward": (128, 8192),
}

#: Vector registers a lane on gfx90a and gfx942: 128 leave four wavefronts on each SIMD.
VECTOR_REGISTERS = 128

#: Launches of the loss with its gradient: what every call pays however small its batch.
LAUNCHES = 6

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


@functools.cache
def _launches(target: str) -> list[Launch]:
    found = []
    for formulation in ("released", "paper"):
        found += offline.loss_launches(formulation, FLOAT32)
        if target in ("sm_90", "gfx942"):
            # Only the reading and the writing differ: two targets show that.
            found += offline.loss_launches(formulation, BFLOAT16)
    found += offline.building_block_launches(FLOAT32)
    if target == "sm_90":
        found += offline.building_block_launches(BFLOAT16)
        found += offline.loss_launches("paper", FLOAT32, distance="l2")
    # Of large maps only what other maps have no launch of.
    names = {launch.name for launch in found}
    for formulation in ("released", "paper"):
        large = offline.loss_launches(formulation, FLOAT32, size=1024, batch=8)
        found += [launch for launch in large if launch.name not in names]
    return list({launch.key: launch for launch in found}.values())


def test_every_kernel_has_a_budget_and_is_launched() -> None:
    assert {launch.name for launch in _launches("sm_90")} == set(BUDGETS)


@pytest.mark.parametrize("kernel", BUDGETS)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_cuda_budgets(target: str, kernel: str) -> None:
    registers, shared = BUDGETS[kernel]
    for launch in _launches(target):
        if launch.name != kernel:
            continue
        used = offline.resources(offline.compile_for(launch, offline.TARGETS[target]))
        what = f"{kernel} on {target} with {launch.constants}: {used}"
        assert used.stack == 0, f"{what} spills"
        assert used.registers <= registers, what
        assert used.shared <= shared, what


@pytest.mark.parametrize("kernel", BUDGETS)
@pytest.mark.parametrize("target", ["gfx90a", "gfx942"])
def test_hip_budgets(target: str, kernel: str) -> None:
    for launch in _launches(target):
        if launch.name != kernel:
            continue
        compiled = offline.compile_for(launch, offline.TARGETS[target])
        assert compiled.asm["hsaco"]
        counts = {
            name: int(count)
            for name, count in re.findall(
                r"\.(vgpr_count|vgpr_spill_count): +(\d+)", compiled.asm["amdgcn"]
            )
        }
        # Scalar registers spill to lanes of vector ones, which are counted.
        assert counts["vgpr_spill_count"] == 0, counts
        assert counts["vgpr_count"] <= VECTOR_REGISTERS, counts


@pytest.mark.parametrize("formulation", ["released", "paper"])
def test_launches_of_a_call(formulation: str) -> None:
    assert len(offline.loss_launches(formulation, FLOAT32)) == LAUNCHES
    # One allocation for the workspace, and no copy of the saliency whatever its strides.
    saliency = offline.maps(224, 224, FLOAT32).to(memory_format=torch.channels_last)
    weights = torch.empty(saliency.shape[0], device="meta")
    launches = offline.launches(
        lambda: offline.backend.harmonization(
            saliency, saliency[:, 0], weights, formulation, 5, "mse", True
        )
    )
    assert len(launches) == LAUNCHES


def _sum_layouts(saliency: torch.Tensor, heatmaps: torch.Tensor) -> set[str]:
    weights = torch.empty(saliency.shape[0], device="meta")
    moments = offline.launches(
        lambda: offline.backend.harmonization(
            saliency, heatmaps, weights, "released", 5, "mse", True
        )
    )[0]
    code = offline.compile_for(moments, offline.TARGETS["sm_90"]).asm["ttgir"]
    layouts = dict(re.findall(r"(#\w+) = (#ttg\.blocked<.*>)", code))
    # A sum over everything is one over a reshaped tile: the layout before counts as well.
    pattern = r"allow_reorder : tensor<\w+, (#\w+)> -> tensor<(\w+), (#\w+)>"
    sums = re.findall(pattern, code)
    assert len(sums) == 6
    return {f"{layouts[before]} {shape} {layouts[after]}" for before, shape, after in sums}


def test_order_of_a_sum_does_not_follow_the_strides() -> None:
    # On a GPU the order of a sum is the layout of its registers: the same for maps of any strides.
    dense = offline.maps(224, 224, FLOAT32)
    wide = offline.maps(224, 448, FLOAT32)
    expected = _sum_layouts(dense, dense[:, 0].contiguous())
    assert len(expected) == 1
    for maps in (
        dense.to(memory_format=torch.channels_last),
        dense.transpose(2, 3),
        wide[..., ::2],
        wide[..., 3:227],
        dense[:, :1].expand(-1, 3, -1, -1),
    ):
        assert _sum_layouts(maps, maps[:, 0]) == expected


def _carried(ir: str) -> list[int]:
    """How many values each loop of an IR carries from one turn to the next."""
    loops = re.findall(r"scf\.for [^\n]*", ir)
    return [
        len(re.findall(r"%\w+ = ", found[1]))
        if (found := re.search(r"iter_args\((.*?)\) ->", loop))
        else 0
        for loop in loops
    ]


@pytest.mark.parametrize("kernel", BUDGETS)
def test_loops_and_barriers_are_the_same_on_amd(kernel: str) -> None:
    # What is compiled for NVIDIA is executed in test_triton_compiled.py. For AMD, whose code is
    # not, Triton's own IR is compared: which values its loops carry, and where all threads wait.
    for launch in _launches("gfx942"):
        if launch.name != kernel:
            continue
        nvidia = offline.compile_for(launch, offline.TARGETS["sm_90"]).asm
        amd = offline.compile_for(launch, offline.TARGETS["gfx942"]).asm
        assert _carried(amd["ttir"]) == _carried(nvidia["ttir"])
        waits = [asm["ttgir"].count("ttg.barrier") for asm in (amd, nvidia)]
        assert waits[0] == waits[1]
        assert amd["amdgcn"].count("s_barrier") >= waits[0]
