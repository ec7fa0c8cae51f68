"""The launches of the fused loss: six for ordinary maps, one level at a time for large ones.

====================  ============================================================================
``moments``           channel mean, and the statistics of tiles
``statistics``        those of a map; one program a sample
``columns``, ``rows``  level 0's sums and level 1, one axis after the other
``coarse``            the levels below, down and back up, and the row loss; one program a sample
``gradient``          the gradient of the saliency, which by (14) and (15) needs no more sums
====================  ============================================================================
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from harmonizer_ext import contract
from harmonizer_ext.backends.triton_kernels import launch
from harmonizer_ext.backends.triton_kernels.launch import Tiling, ceil


class FusedLoss:
    """One call on one batch: its geometry, its workspace, its stages.

    Args:
        saliency, heatmaps, weights: (B, C, H, W), (B, H, W) and (B,), at least one row.
        rows, std: (B,) float32, written.
        gradient: (B, 1, H, W), written, or None.
        paper: the formulation; else the released one.
        l2: the paper's distance.
    """

    def __init__(
        self,
        saliency: Tensor,
        heatmaps: Tensor,
        weights: Tensor,
        rows: Tensor,
        std: Tensor,
        gradient: Tensor | None,
        paper: bool,
        levels: int,
        l2: bool,
    ) -> None:
        self.saliency, self.heatmaps, self.weights = saliency, heatmaps, weights
        self.out_rows, self.out_std, self.out_gradient = rows, std, gradient
        self.paper, self.levels, self.l2 = paper, levels, l2
        self.tuning = launch.current()
        self.batch, self.channels, self.height, self.width = saliency.shape
        self.pixels = self.height * self.width
        self.share = 1.0 / self.channels
        self.options = {"GRADIENT": gradient is not None}

        # Levels: sizes, pixels, and where each begins in a sample's plane of the coarse ones.
        self.sizes = contract.level_sizes(self.height, self.width, levels)
        self.counts = [h * w for h, w in self.sizes]
        self.offsets = [0, *itertools.accumulate(self.counts[1:], initial=0)]
        self.plane = sum(self.counts[1:])
        # The first level that one program walks; the coarsest always is.
        self.first = 1
        while self.first < levels - 1 and self.counts[self.first] > self.tuning.coarse_pixels:
            self.first += 1

        t = self.tuning
        self.moments_block = min(t.moments, launch.power_of_two(self.pixels))
        self.moments_tiles = ceil(self.pixels, self.moments_block)
        self.columns_tiling = launch.tiling((self.height + 1) // 2, self.width, t.columns)
        self.tilings = [launch.tiling(h, w, t.rows) for h, w in self.sizes]
        # Sums: of level 0's tiles; released, of large levels' tiles and of what one program walks.
        large = sum(tiling.tiles for tiling in self.tilings[1 : self.first])
        self.slots = self.columns_tiling.tiles
        if not paper and self.first > 1:
            self.slots += large + 1
        self._allocate()

    def _allocate(self) -> None:
        batch, paper, has_gradient = self.batch, self.paper, self.out_gradient is not None
        s_y, s_x, s_flat = launch.layout(self.saliency)
        h_y, h_x, h_flat = launch.layout(self.heatmaps)
        dense = s_flat and s_x == 1 and self.saliency.dtype == torch.float32
        store_m = self.channels > 1 or not dense
        store_h = not (h_flat and h_x == 1)
        self.reading = {
            "S_FLAT": s_flat,
            "H_FLAT": h_flat,
            "STORE_M": store_m,
            "STORE_H": store_h,
            "WIDE": launch.wide(self.saliency, self.heatmaps),
        }
        self.strides = (*self.saliency.stride()[:2], s_y, s_x, self.heatmaps.stride(0), h_y, h_x)
        # In a gradient of float32 the channel mean needs no room of its own: the last kernel reads
        # a tile before it writes there.
        in_gradient = has_gradient and self.saliency.dtype == torch.float32
        has_coarse = self.levels > 1
        half = batch * self.columns_tiling.height * self.width if has_coarse else 0
        level_1 = batch * self.counts[1] if has_coarse else 0
        plane = batch * self.plane
        both, dots = paper or has_gradient, has_gradient and not paper
        tiles = [self.moments_tiles]
        if paper:
            tiles += [tiling.tiles for tiling in self.tilings[1 : self.first + 1]]
        (
            m,
            h,
            self.moments_of_tiles,
            self.sums,
            self.level_sums,
            self.records,
            self.coefficients,
            distances,
            self.column_a,
            self.column_b,
            column_mask,
            self.planes_a,
            self.planes_b,
            level_mask,
        ) = launch.pieces(
            self.saliency.device,
            [
                batch * self.pixels if store_m and not in_gradient else 0,
                batch * self.pixels if store_h else 0,
                9 * batch * max(tiles),
                3 * batch * self.slots,
                3 * batch * max(tiles[1:-1], default=0),
                8 * batch * (self.levels if paper else 1),
                4 * batch * (self.levels if paper else 1),
                2 * batch * self.levels if paper else 0,
                half,
                half if both else 0,
                ceil(half, 2) if dots else 0,
                plane,
                (plane if paper else level_1) if both else 0,
                ceil(level_1, 2) if dots else 0,
            ],
        )
        self.distances = distances.view(torch.float64)
        self.column_mask = column_mask.view(torch.float16)
        self.level_mask = level_mask.view(torch.float16)
        # Where the later kernels find the channel mean and the human map, densely: (tensor, stride
        # of a sample).
        self.m, self.m_stride = m, self.pixels
        if not store_m:
            self.m, self.m_stride = self.saliency, self.saliency.stride(0)
        elif self.out_gradient is not None and in_gradient:
            self.m = self.out_gradient
        self.h, self.h_stride = self.heatmaps, self.heatmaps.stride(0)
        if store_h:
            self.h, self.h_stride = h.view(self.heatmaps.dtype), self.pixels

    def run(self) -> None:
        """All launches, in order."""
        self.moments()
        self.statistics(0)
        self.columns()
        if self.levels > 1:
            self.rows()
        for level in range(1, self.first):
            self.large_level_down(level)
        self.coarse()
        for level in range(self.first - 1, 0, -1):
            self.large_level_up(level)
        if self.first > 1 and not self.paper:
            self.finish_released()
        if self.out_gradient is not None:
            self.gradient()

    # --- pieces of what a launch is given

    def _level(self, planes: Tensor, level: int) -> Tensor:
        return planes[self.offsets[level] :]

    def _record(self, level: int) -> Tensor:
        return self.records[8 * self.batch * level :]

    def _coefficients(self, level: int) -> Tensor:
        return self.coefficients[4 * self.batch * level :]

    def _tiles(self, tiling: Tiling) -> dict[str, Any]:
        return {
            "BLOCK_Y": tiling.block_y,
            "BLOCK_X": tiling.block_x,
            "warps": self.tuning.rows_warps,
        }

    # --- stages

    def moments(self) -> None:
        launch.launch(
            launch.kernels("statistics").loss_moments,
            self.moments_tiles * self.batch,
            self.saliency, self.heatmaps, self.weights, self.m, self.h, self.moments_of_tiles,
            self.batch * self.moments_tiles, self.channels, self.pixels, self.width,
            self.moments_tiles, self.share, *self.strides,
            CHANNELS=self.channels if self.channels <= 4 else 0, BLOCK=self.moments_block,
            warps=self.tuning.moments_warps, **self.reading,
        )  # fmt: skip

    def statistics(self, level: int) -> None:
        tiles = self.tilings[level].tiles if level else self.moments_tiles
        launch.launch(
            launch.kernels("statistics").loss_merge,
            self.batch,
            self.moments_of_tiles, self.weights, self._record(level), self.out_std,
            self.batch * tiles, tiles,
            RELEASED=not self.paper, FIRST=level == 0, BLOCK=self.tuning.merge, warps=1,
        )  # fmt: skip

    def columns(self) -> None:
        tiling = self.columns_tiling
        launch.launch(
            launch.kernels("loss").loss_columns,
            tiling.tiles * self.batch,
            self.m, self.h, self.weights, self.records, self.column_a, self.column_b,
            self.column_mask, self.sums, self.batch * self.slots, self.m_stride, self.h_stride,
            self.height, self.width, tiling.tiles_x, tiling.tiles, self.slots,
            PAPER=self.paper, COARSE=self.levels > 1, BEFORE=1 + self.height % 2,
            BLOCK_Y=tiling.block_y, BLOCK_X=tiling.block_x, warps=self.tuning.columns_warps,
            **self.options,
        )  # fmt: skip

    def rows(self) -> None:
        tiling = self.tilings[1]
        launch.launch(
            launch.kernels("loss").loss_rows,
            tiling.tiles * self.batch,
            self.column_a, self.column_b, self.column_mask, self.weights, self.planes_a,
            self.planes_b, self.level_mask, self.moments_of_tiles, self.batch * tiling.tiles,
            self.plane, self.plane if self.paper else self.counts[1], self.height, self.width,
            tiling.tiles_x, tiling.tiles,
            PAPER=self.paper, BEFORE=1 + self.width % 2, **self._tiles(tiling), **self.options,
        )  # fmt: skip

    def large_level_down(self, level: int) -> None:
        if self.paper:
            self.statistics(level)
            self._large_level_sums(level)
        tiling = self.tilings[level + 1]
        b = self.planes_b if self.paper else self.planes_a
        launch.launch(
            launch.kernels("loss_large").loss_level_down,
            tiling.tiles * self.batch,
            self._level(self.planes_a, level), self._level(b, level),
            self._level(self.planes_a, level + 1), self._level(b, level + 1), self.weights,
            self.moments_of_tiles, self.batch * tiling.tiles, self.plane, *self.sizes[level],
            tiling.tiles_x, tiling.tiles,
            PAPER=self.paper, **self._tiles(tiling),
        )  # fmt: skip

    def _large_level_sums(self, level: int) -> None:
        tiles, stride = self.tilings[level].tiles, self.batch * self.tilings[level].tiles
        launch.launch(
            launch.kernels("loss_large").loss_level_sums,
            stride,
            self._level(self.planes_a, level), self._level(self.planes_b, level), self.weights,
            self._record(level), self.level_sums, stride, self.plane, self.counts[level], tiles,
            BLOCK=launch.power_of_two(ceil(self.counts[level], tiles)),
            warps=self.tuning.rows_warps,
        )  # fmt: skip
        launch.launch(
            launch.kernels("loss_large").loss_finish_level,
            self.batch,
            self.weights, self._record(level), self._coefficients(level), self.level_sums,
            self.distances[self.batch * (level - 1) :], stride, self.counts[level], tiles,
            self.share,
            L2=self.l2, BLOCK=self.tuning.merge, warps=1,
        )  # fmt: skip

    def coarse(self) -> None:
        t, first = self.tuning, self.first
        # One tile for all levels: the one that walks them in the fewest steps.
        walked = self.sizes[min(first, self.levels - 1) :]
        walk = min(
            (launch.tiling(h, w, t.coarse) for h, w in walked),
            key=lambda tile: sum(ceil(h, tile.block_y) * ceil(w, tile.block_x) for h, w in walked),
        )
        options = {
            **self._tiles(walk),
            **self.options,
            "warps": t.coarse_warps,
            "BLOCK": t.merge,
        }
        if self.paper:
            tiles = self.tilings[first].tiles if self.levels > 1 else 0
            launch.launch(
                launch.kernels("loss_paper").loss_coarse_paper,
                self.batch,
                self.planes_a, self.planes_b, self.weights, self.records, self.coefficients,
                self.distances, self.moments_of_tiles, self.sums, self.out_rows,
                self.batch * tiles, self.batch * self.slots, self.plane, self.batch, self.height,
                self.width, self.levels, first, self.offsets[first], tiles, self.slots, self.share,
                L2=self.l2, **options,
            )  # fmt: skip
        else:
            launch.launch(
                launch.kernels("loss_released").loss_coarse_released,
                self.batch,
                self.planes_a, self.planes_b, self.level_mask, self.weights, self.records,
                self.coefficients, self.sums, self.out_rows, self.batch * self.slots, self.plane,
                self.height, self.width, self.levels, first, self.offsets[first],
                self.columns_tiling.tiles, self.slots, self.share,
                FINISH=first == 1, **options,
            )  # fmt: skip

    def large_level_up(self, level: int) -> None:
        tiling = self.tilings[level]
        here, below = self._level(self.planes_a, level), self._level(self.planes_a, level + 1)
        if not self.paper:
            slot = self.columns_tiling.tiles
            slot += sum(tiling.tiles for tiling in self.tilings[1:level])
            launch.launch(
                launch.kernels("loss_large").loss_level_up_released,
                tiling.tiles * self.batch,
                here, below, self.planes_b, self.level_mask, self.weights, self.sums,
                self.batch * self.slots, self.plane, *self.sizes[level], self.levels,
                tiling.tiles_x, tiling.tiles, self.slots, slot,
                DOTS=level == 1, **self._tiles(tiling), **self.options,
            )  # fmt: skip
        elif self.out_gradient is not None:
            launch.launch(
                launch.kernels("loss_large").loss_level_up_paper,
                tiling.tiles * self.batch,
                here, self._level(self.planes_b, level), below, self.weights, self._record(level),
                self._coefficients(level), self.plane, *self.sizes[level], tiling.tiles_x,
                tiling.tiles,
                **self._tiles(tiling),
            )  # fmt: skip

    def finish_released(self) -> None:
        launch.launch(
            launch.kernels("loss_released").loss_finish_released,
            self.batch,
            self.weights, self.records, self.coefficients, self.sums, self.out_rows,
            self.batch * self.slots, self.height, self.width, self.levels,
            self.columns_tiling.tiles, self.slots, self.share,
            BLOCK=self.tuning.merge, warps=1,
        )  # fmt: skip

    def gradient(self) -> None:
        t = self.tuning
        tiling = launch.tiling((self.height + 1) // 2, (self.width + 1) // 2, t.gradient)
        launch.launch(
            launch.kernels("loss").loss_gradient,
            tiling.tiles * self.batch,
            self.m, self.h, self.weights, self.records, self.coefficients, self.planes_a,
            self.out_gradient, self.m_stride, self.h_stride, self.plane, self.height, self.width,
            tiling.tiles_x, tiling.tiles,
            PAPER=self.paper, COARSE=self.levels > 1, IN_PLACE=self.m is self.out_gradient,
            BEFORE_Y=1 + self.height % 2, BEFORE_X=1 + self.width % 2, BLOCK_Y=tiling.block_y,
            BLOCK_X=tiling.block_x, warps=t.gradient_warps,
        )  # fmt: skip
