"""One step's assignments to rows and tiles, on the device: allocates and launches.

Nothing here waits for the device: row counts stay there, and block sizes are picked from the
last histogram that has arrived. Knows slots and token counts; knows no weights.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...errors import InputError
from ..backend import SlotShape
from ..load_record import LoadRecord
from ..segment_table import DispatchTable
from . import routing_kernels as kernels
from .latest_histogram import HistogramWatch
from .tile_sizes import ALIGNED, TileKey, Tiles, choose_tiles, fit_tiles

# Cells (tokens x experts, tiles x segments) one program holds.
_SCAN_CELLS = 4096
_ROUTE_WARPS = 8
# Said at every launch with floating point: Triton's default is about to change.
FUSION = {"enable_fp_fusion": True}
# Rows are numbered in 32 bits, and the last tile may reach past them.
MOST_ROWS = 2**31 - 1024


class TileMap(NamedTuple):
    """The tiles that cover every segment's rows."""

    segment_slot: Tensor
    row_end: Tensor
    tile_segment: Tensor
    tile_row: Tensor
    tile_count: Tensor
    most_tiles: int
    choice: Tiles


class Routed(NamedTuple):
    """Where the assignments of one step lie, all on the device."""

    gate_TK: Tensor
    source_A: Tensor  # assignment of each row
    where_TK: Tensor  # assignment again, -1 where left out
    tiles: TileMap


class TritonRouter:
    """Routes the steps of one layer's slots; remembers how tokens fell, to pick blocks."""

    def __init__(self, shape: SlotShape) -> None:
        self._shape = shape
        self.watch = HistogramWatch()

    def route(
        self,
        logits_TE: Tensor | None,
        ids_TK: Tensor,
        gate_TK: Tensor,
        normalize: bool,
        table: DispatchTable,
        quota_P: Tensor | None,
        record: LoadRecord | None,
    ) -> Routed:
        """Gates and ids (where logits are given), and the row of every assignment."""
        (tokens, choices), device = ids_TK.shape, ids_TK.device
        if ids_TK.numel() > MOST_ROWS:
            raise InputError(f"{ids_TK.numel()} assignments in one step; at most {MOST_ROWS} fit")
        ids_TK = ids_TK.contiguous()
        experts = table.experts
        padded = padded_size(experts)
        block_tokens = max(min(_SCAN_CELLS // padded, 64), 8)
        blocks = -(-tokens // block_tokens)
        counts = torch.empty(blocks, padded, dtype=torch.int32, device=device)
        kernels.route[(blocks,)](
            gate_TK if logits_TE is None else logits_TE,
            ids_TK,
            gate_TK,
            counts,
            counts if record is None else record.logical_E,
            counts if record is None else record.enabled,
            tokens,
            experts,
            0 if logits_TE is None else logits_TE.stride(0),
            K=choices,
            KP=triton.next_power_of_2(choices),
            EP=padded,
            BLOCK_T=block_tokens,
            FROM_LOGITS=logits_TE is not None,
            NORMALIZE=normalize,
            RECORD=record is not None,
            num_warps=_ROUTE_WARPS,
            **FUSION,
        )
        totals = counts
        if blocks > 1:
            totals = torch.empty(padded, dtype=torch.int32, device=device)
            kernels.scan_blocks[(padded // 16,)](
                counts, totals, blocks, EP=padded, BLOCK_B=128, BLOCK_E=16
            )
        tiles, expert_start = self.scan(totals, ids_TK.numel(), table, quota_P, record)
        source = torch.empty(ids_TK.numel(), dtype=torch.int32, device=device)
        where = torch.empty_like(ids_TK, dtype=torch.int32)
        kernels.place[(blocks,)](
            ids_TK,
            counts,
            expert_start,
            source,
            where,
            tokens,
            experts,
            K=choices,
            EP=padded,
            BLOCK_T=block_tokens,
            ONE_BLOCK=blocks == 1,
            num_warps=_ROUTE_WARPS,
        )
        return Routed(gate_TK, source, where, tiles)

    def scan(
        self,
        totals: Tensor,
        rows: int,
        table: DispatchTable,
        quota_P: Tensor | None,
        record: LoadRecord | None,
    ) -> tuple[TileMap, Tensor]:
        """The tile map of this step, and the first row of every expert."""
        device, segments = totals.device, len(table.segment_slot)
        choice = self._choose_tiles(rows)
        most_tiles = -(-rows // choice.up.rows) + segments
        padded, segments_padded = padded_size(table.experts), padded_size(segments)
        block_tiles = max(min(_SCAN_CELLS // segments_padded, 64), 4)
        numbers = torch.empty(
            padded + segments_padded + 2 * most_tiles + 1, dtype=torch.int32, device=device
        )
        sizes = [padded, segments_padded, most_tiles, most_tiles, 1]
        expert_start, row_end, tile_segment, tile_row, tile_count = torch.split(numbers, sizes)
        kernels.scan[(-(-most_tiles // block_tiles),)](
            totals,
            totals if quota_P is None else quota_P,
            table.segment_expert,
            table.segment_first,
            table.segment_slot,
            expert_start,
            row_end,
            tile_segment,
            tile_row,
            tile_count,
            totals if record is None else record.physical_S,
            totals if record is None else record.enabled,
            segments,
            rows,
            EP=padded,
            SP=segments_padded,
            BLOCK_ROWS=choice.up.rows,
            BLOCK_TILES=block_tiles,
            HAS_QUOTAS=quota_P is not None,
            RECORD=record is not None,
        )
        self.watch.copy(totals.view(-1)[: table.experts])
        tiles = TileMap(
            table.segment_slot, row_end, tile_segment, tile_row, tile_count, most_tiles, choice
        )
        return tiles, expert_start

    def _choose_tiles(self, rows: int) -> Tiles:
        shape = self._shape
        active, rows_p90 = self.watch.bucket(rows, shape.slots)
        key = TileKey(
            device=_device_name(shape.device),
            triton=triton.__version__,
            dtype=str(shape.dtype).removeprefix("torch."),
            hidden=shape.hidden,
            intermediate=shape.intermediate,
            active_experts=active,
            rows_p90=rows_p90,
        )
        aligned = not (shape.hidden % ALIGNED or shape.intermediate % ALIGNED)
        return fit_tiles(choose_tiles(key), shape.dtype.itemsize, aligned=aligned)


def padded_size(count: int) -> int:
    """The power of two, 16 at least, that a kernel holds `count` things in."""
    return max(int(triton.next_power_of_2(count)), 16)


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
