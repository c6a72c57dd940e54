"""The grouped expert MLP on Triton: holds the weights, allocates, launches.

Nothing in a step waits for the device, and applying a plan swaps a small table. On a machine
without a GPU the same code runs under Triton's interpreter (TRITON_INTERPRET=1), for tests. Knows
slots and token counts; knows nothing of plans or ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from ..activation import gate_rows_first, stored_rows
from ..backend import SlotShape, SlotTensors
from ..load_record import LoadRecord
from ..segment_table import DispatchTable
from ..slot_rows import SlotTable
from . import product_kernels as kernels
from .routing import FUSION, Routed, TileMap, TritonRouter, padded_size
from .tile_sizes import ALIGNED, GROUP_TILES, Tile

INTERPRETED: bool = not isinstance(kernels.reduce, triton.runtime.jit.JITFunction)


def triton_available(device: torch.device) -> bool:
    """Whether this device runs the kernels: Hopper or newer, or anything when interpreted."""
    if INTERPRETED:
        return True
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


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
        self._router = TritonRouter(shape)

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
        x_AH = self._aligned_rows(x_AH)
        if count_S.device.type == "cpu":
            self._router.watch.saw(count_S.tolist())
        totals = torch.zeros(padded_size(self.shape.slots), dtype=torch.int32, device=x_AH.device)
        # Capped while 64 bits wide: what counts say may not wrap into something that fits.
        totals[: self.shape.slots] = count_S.clamp(0, len(x_AH))
        tiles, _ = self._router.scan(totals, len(x_AH), self._identity, None, None)
        y_AH = out_AH if out_AH.stride(1) == 1 else torch.empty_like(x_AH)
        self._products(x_AH, None, 1, tiles, y_AH)
        if count_S.device.type != "cpu":  # elsewhere the entry saw that the counts add up
            clear_tail(y_AH, tiles.row_end)
        if y_AH is not out_AH:
            out_AH.copy_(y_AH)

    def layer_from_ids(
        self,
        x_TH: Tensor,
        ids_TK: Tensor,
        gate_TK: Tensor,
        table: DispatchTable | None,
        quota_S: Tensor | None,
        record: LoadRecord | None,
        out_TH: Tensor,
    ) -> None:
        """Replicas by quota, counts and the whole layer without leaving the device."""
        if not ids_TK.numel():
            out_TH.zero_()
            return
        table = self._identity if table is None else table
        quota_P = _segment_quotas(quota_S, table, ids_TK.numel())
        routed = self._router.route(None, ids_TK, gate_TK, False, table, quota_P, record)
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
        quota_P = _segment_quotas(quota_S, table, ids_TK.numel())
        logits_TE = _inner_contiguous(logits_TE)
        routed = self._router.route(logits_TE, ids_TK, gate_TK, normalize, table, quota_P, record)
        self._routed_layer(x_TH, routed, out_TH)

    def _aligned_rows(self, x: Tensor) -> Tensor:
        """Rows that are loaded as the blocks expect (`fit_tiles`); copied where they lie askew."""
        if self.shape.hidden % ALIGNED or self.shape.intermediate % ALIGNED:
            return _inner_contiguous(x)
        askew = x.stride(-1) != 1 or x.stride(0) % ALIGNED or x.data_ptr() % 16
        return x.clone(memory_format=torch.contiguous_format) if askew else x

    def _routed_layer(self, x_TH: Tensor, routed: Routed, out_TH: Tensor) -> None:
        choices = routed.where_TK.shape[1]
        y_AH = torch.empty(
            routed.where_TK.numel(), self.shape.hidden, dtype=x_TH.dtype, device=x_TH.device
        )
        self._products(self._aligned_rows(x_TH), routed.source_A, choices, routed.tiles, y_AH)
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
            "GROUP": GROUP_TILES,
            **FUSION,
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
        len(y_AH),
        hidden,
        y_AH.stride(0),
        target.stride(0),
        K=choices,
        BLOCK_H=block,
        **FUSION,
    )
    if target is not out_TH:
        out_TH.copy_(target)


def clear_tail(y_AH: Tensor, row_end: Tensor) -> None:
    """Zero what lies past the last segment's rows, without reading where that is."""
    kernels.clear_tail[(-(-len(y_AH) // 64),)](
        y_AH,
        row_end,
        len(y_AH),
        len(row_end),
        y_AH.shape[1],
        y_AH.stride(0),
        BLOCK_ROWS=64,
        BLOCK_H=128,
    )


def _segment_quotas(quota_S: Tensor | None, table: DispatchTable, rows: int) -> Tensor | None:
    """Quotas in the table's order; no segment takes more than all rows, whatever its quota says."""
    if quota_S is None:
        return None
    return quota_S.clamp(0, rows).to(torch.int32)[table.segment_slot.long()]


def _grid(x: Tensor, tile: Tile, weight_tiles: int, most_tiles: int, columns: int) -> tuple[int]:
    """As many programs as the device holds at once, or fewer where there is less to do."""
    work = most_tiles * -(-columns // tile.columns)
    resident = tile.resident(weight_tiles, x.element_size())
    return (max(min(work, _processors(x.device) * resident), 1),)


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 3  # interpreted: few, so that programs do walk several tiles
    return torch.cuda.get_device_properties(device).multi_processor_count


def _inner_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
