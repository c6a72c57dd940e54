"""The grouped expert MLP on Triton: allocates, picks blocks, launches.

Nothing here waits for the device: row counts stay there, blocks are picked from the last
histogram that has arrived, and applying a plan swaps a small table. On a machine without a GPU
the same code runs under Triton's interpreter (TRITON_INTERPRET=1), for tests. Knows slots and
token counts; knows nothing of plans or ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import triton_kernels as kernels
from .activation import gate_rows_first, stored_rows
from .backend import SlotShape, SlotTensors
from .dispatch_table import DispatchTable
from .load_record import LoadRecord
from .slot_table import SlotTable
from .tile_configs import (
    SHARED_BYTES,
    Tile,
    TileKey,
    Tiles,
    choose_tiles,
    fit_tiles,
    rows_percentile,
)

INTERPRETED: bool = not isinstance(kernels.route, triton.runtime.jit.JITFunction)
# Cells (tokens x experts, tiles x segments) one program of the routing kernels holds.
_SCAN_CELLS = 4096
_ROUTE_WARPS = 8
# Said at every launch with floating point: Triton's default is about to change.
_FUSION = {"enable_fp_fusion": True}


def triton_available(device: torch.device) -> bool:
    """Whether this device runs the kernels: Hopper or newer, or anything when interpreted."""
    if INTERPRETED:
        return True
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


class Routed(NamedTuple):
    """Where the assignments of one step lie, all on the device."""

    gate_TK: Tensor
    source_A: Tensor  # assignment of each row
    where_TK: Tensor  # assignment again, -1 where left out
    tiles: TileMap


class TileMap(NamedTuple):
    """The tiles that cover every segment's rows."""

    segment_slot: Tensor
    row_end: Tensor
    tile_segment: Tensor
    tile_row: Tensor
    tile_count: Tensor
    most_tiles: int
    choice: Tiles


class TritonSlots:
    """Stacked weights, gate rows first, read through a slot table on the device."""

    name = "triton"

    def __init__(self, shape: SlotShape) -> None:
        self.shape = shape
        self._table = SlotTable(shape.slots)
        self._slot_row = torch.arange(shape.slots, dtype=torch.int32, device=shape.device)
        self._identity = DispatchTable(list(range(shape.slots)), shape.device)
        self._stacked = {
            name: torch.zeros(shape.slots, *size, dtype=shape.dtype, device=shape.device)
            for name, size in shape.tensor_shapes().items()
        }
        self._watch = HistogramWatch()

    def set_slot(self, slot: int, tensors: SlotTensors) -> None:
        row = self._table.row_to_write(slot)
        for name, tensor in tensors.items():
            if name.startswith("gate_up"):
                tensor = gate_rows_first(tensor, self.shape.activation)
            self._stacked[name][row].copy_(tensor, non_blocking=True)
        self._slot_row.copy_(torch.tensor(self._table.rows, dtype=torch.int32))

    def get_slot(self, slot: int) -> SlotTensors:
        row = self._table.rows[slot]
        tensors = {name: stacked[row].clone() for name, stacked in self._stacked.items()}
        return {
            name: stored_rows(tensor, self.shape.activation) if "gate_up" in name else tensor
            for name, tensor in tensors.items()
        }

    def rearrange(self, source_S: Sequence[int]) -> None:
        self._table.rearrange(source_S)
        self._slot_row.copy_(torch.tensor(self._table.rows, dtype=torch.int32))

    def run(self, x_AH: Tensor, count_S: Tensor, out_AH: Tensor) -> None:
        x_AH = _inner_contiguous(x_AH)
        if count_S.device.type == "cpu":
            self._watch.saw(count_S.tolist())
        totals = torch.zeros(_padded(self.shape.slots), dtype=torch.int32, device=x_AH.device)
        totals[: self.shape.slots] = count_S
        tiles, _ = self._scan(totals, len(x_AH), self._identity, None, None)
        self._products(x_AH, None, 1, tiles, out_AH)

    def layer(self, x_TH: Tensor, slot_TK: Tensor, gate_TK: Tensor, out_TH: Tensor) -> None:
        if not slot_TK.numel():
            out_TH.zero_()
            return
        routed = self._route(None, slot_TK, gate_TK, False, self._identity, None, None)
        self._routed_layer(x_TH, routed, out_TH)

    def layer_from_logits(
        self,
        x_TH: Tensor,
        logits_TE: Tensor,
        k: int,
        normalize: bool,
        table: DispatchTable | None,
        quota_S: Tensor | None,
        record: LoadRecord | None,
        out_TH: Tensor,
    ) -> None:
        """Top-k, replicas by quota, counts and the whole layer without leaving the device."""
        if not len(x_TH):
            return
        table = self._identity if table is None else table
        ids_TK = torch.empty(len(x_TH), k, dtype=torch.int32, device=x_TH.device)
        gate_TK = torch.empty(len(x_TH), k, dtype=torch.float32, device=x_TH.device)
        quota_P = None
        if quota_S is not None:
            quota_P = quota_S.to(torch.int32)[table.segment_slot.long()]
        logits_TE = _inner_contiguous(logits_TE)
        routed = self._route(logits_TE, ids_TK, gate_TK, normalize, table, quota_P, record)
        self._routed_layer(x_TH, routed, out_TH)

    def _route(
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
        experts = table.experts
        padded = _padded(experts)
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
            **_FUSION,
        )
        totals = counts
        if blocks > 1:
            totals = torch.empty(padded, dtype=torch.int32, device=device)
            kernels.scan_blocks[(padded // 16,)](
                counts, totals, blocks, EP=padded, BLOCK_B=128, BLOCK_E=16
            )
        tiles, expert_start = self._scan(totals, ids_TK.numel(), table, quota_P, record)
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

    def _scan(
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
        padded, segments_padded = _padded(table.experts), _padded(segments)
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
        self._watch.copy(totals.view(-1)[: table.experts])
        tiles = TileMap(
            table.segment_slot, row_end, tile_segment, tile_row, tile_count, most_tiles, choice
        )
        return tiles, expert_start

    def _routed_layer(self, x_TH: Tensor, routed: Routed, out_TH: Tensor) -> None:
        choices = routed.where_TK.shape[1]
        y_AH = torch.empty(
            routed.where_TK.numel(), self.shape.hidden, dtype=x_TH.dtype, device=x_TH.device
        )
        self._products(_inner_contiguous(x_TH), routed.source_A, choices, routed.tiles, y_AH)
        reduce_rows(y_AH, routed.where_TK, routed.gate_TK, out_TH)

    def _products(
        self, x: Tensor, source_A: Tensor | None, choices: int, tiles: TileMap, y_AH: Tensor
    ) -> None:
        """Both products; with source_A, rows are gathered from tokens and scattered back."""
        shape, stacked = self.shape, self._stacked
        act = torch.empty(len(y_AH), shape.intermediate, dtype=x.dtype, device=x.device)
        moves = tiles.tile_row if source_A is None else source_A
        common = (
            tiles.segment_slot,
            self._slot_row,
            tiles.row_end,
            tiles.tile_segment,
            tiles.tile_row,
            tiles.tile_count,
            shape.hidden,
            shape.intermediate,
        )
        flags = {
            "HAS_BIAS": shape.bias,
            "UPCAST": INTERPRETED,
            # float32 on tensor cores would mean tf32.
            "PRECISION": "ieee",
            **_FUSION,
        }
        up, down = tiles.choice.up, tiles.choice.down
        kernels.up_swiglu[_grid(x, up, 2, tiles.most_tiles, shape.intermediate)](
            x,
            stacked["gate_up"],
            stacked.get("gate_up_bias", x),
            act,
            moves,
            *common,
            x.stride(0),
            float(shape.activation.limit or 0.0),
            float(shape.activation.alpha or 0.0),
            K=choices,
            KIND=shape.activation.kind,
            GATHER=source_A is not None,
            EVEN=shape.hidden % up.depth == 0,
            BLOCK_ROWS=up.rows,
            BLOCK_N=up.columns,
            BLOCK_K=up.depth,
            num_warps=up.warps,
            num_stages=up.stages,
            **flags,
        )
        kernels.down_scatter[_grid(x, down, 1, tiles.most_tiles, shape.hidden)](
            act,
            stacked["down"],
            stacked.get("down_bias", x),
            y_AH,
            moves,
            *common,
            y_AH.stride(0),
            SCATTER=source_A is not None,
            EVEN=shape.intermediate % down.depth == 0,
            BLOCK_ROWS=down.rows,
            BLOCK_N=down.columns,
            BLOCK_K=down.depth,
            num_warps=down.warps,
            num_stages=down.stages,
            **flags,
        )

    def _choose_tiles(self, rows: int) -> Tiles:
        shape = self.shape
        active, rows_p90 = self._watch.bucket(rows, shape.slots)
        key = TileKey(
            device=_device_name(shape.device),
            triton=triton.__version__,
            dtype=str(shape.dtype).removeprefix("torch."),
            hidden=shape.hidden,
            intermediate=shape.intermediate,
            active_experts=active,
            rows_p90=rows_p90,
        )
        return fit_tiles(choose_tiles(key), shape.dtype.itemsize)


class HistogramWatch:
    """The latest rows per expert that have reached the host, without ever waiting for them.

    Blocks picked from a histogram a step old are as right as any: they change speed, not bits.
    """

    def __init__(self) -> None:
        self._seen: list[int] | None = None
        self._arriving: Tensor | None = None
        self._arrived: Any = None  # torch.cuda.Event, which has no types

    def saw(self, counts: list[int]) -> None:
        """Take over counts the host already has."""
        self._seen = counts

    def copy(self, count_E: Tensor) -> None:
        """Start copying a step's counts, unless an earlier copy is still under way."""
        if count_E.device.type != "cuda":
            self._seen = count_E.tolist()
            return
        if torch.cuda.is_current_stream_capturing():
            return
        if self._arrived is not None and not self._arrived.query():
            return
        self._collect()
        self._arriving = torch.empty(count_E.shape, dtype=count_E.dtype, pin_memory=True)
        self._arriving.copy_(count_E, non_blocking=True)
        event: Any = torch.cuda.Event
        self._arrived = event()
        self._arrived.record()

    def bucket(self, rows: int, slots: int) -> tuple[int, int]:
        """(active experts, 90th percentile of rows), scaled to a step of `rows` rows.

        Before the first histogram: an even spread over all slots.
        """
        self._collect()
        if self._seen is None or not sum(self._seen):
            return min(rows, slots), -(-rows // slots)
        active, rows_p90 = rows_percentile(self._seen)
        return active, -(-rows_p90 * rows // sum(self._seen))

    def _collect(self) -> None:
        if self._arrived is None or torch.cuda.is_current_stream_capturing():
            return  # an event may not be asked while a graph is being captured
        if self._arriving is not None and self._arrived.query():
            self._seen, self._arriving, self._arrived = self._arriving.tolist(), None, None


def reduce_rows(y_AH: Tensor, where_TK: Tensor, gate_TK: Tensor, out_TH: Tensor) -> None:
    """`routing.combine_rows` on the device: out[t] = sum of gate * y[where], in order of k."""
    tokens, choices = where_TK.shape
    if not tokens:
        return
    hidden = out_TH.shape[1]
    block = min(triton.next_power_of_2(hidden), 1024)
    target = out_TH if out_TH.stride(1) == 1 else torch.empty_like(out_TH).contiguous()
    y_AH = _inner_contiguous(y_AH)
    kernels.reduce[(tokens, -(-hidden // block))](
        y_AH,
        where_TK.contiguous(),
        gate_TK.contiguous(),
        target,
        hidden,
        y_AH.stride(0),
        target.stride(0),
        K=choices,
        BLOCK_H=block,
        **_FUSION,
    )
    if target is not out_TH:
        out_TH.copy_(target)


def _grid(x: Tensor, tile: Tile, weight_tiles: int, most_tiles: int, columns: int) -> tuple[int]:
    """As many programs as the device holds at once, or fewer where there is less to do."""
    work = most_tiles * -(-columns // tile.columns)
    shared = max(tile.shared_bytes(weight_tiles, x.element_size()), 1)
    per_processor = max(min(SHARED_BYTES // shared, 8 // tile.warps), 1)
    return (max(min(work, _processors(x.device) * per_processor), 1),)


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 3  # interpreted: few, so that programs do walk several tiles
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


def _padded(count: int) -> int:
    return max(int(triton.next_power_of_2(count)), 16)


def _inner_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
