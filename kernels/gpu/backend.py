"""The grouped expert MLP on Triton: holds the weights, allocates, launches.

Nothing in a step waits for the device. On a machine without a GPU the same code runs under
Triton's interpreter (TRITON_INTERPRET=1), for tests. Knows slots and token counts; knows nothing
of plans or ranks.
"""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from ..activation import gate_rows_first, stored_tensors
from ..backend import BlockSizes, SlotShape, SlotTensors
from . import product_kernels as kernels
from .tile_map import map_tiles
from .tile_sizes import (
    ALIGNED,
    GROUP_TILES,
    Tile,
    TileKey,
    Tiles,
    choose_tiles,
    fit_tiles,
    rows_percentile,
)

# Said at every launch with floating point: Triton's default is about to change.
FUSION = {"enable_fp_fusion": True}
INTERPRETED: bool = not isinstance(kernels.reduce, triton.runtime.jit.JITFunction)


def triton_available(device: torch.device) -> bool:
    """Whether this device runs the kernels: Hopper or newer, or anything when interpreted."""
    if INTERPRETED:
        return True
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


class TritonSlots:
    """Stacked weights, gate rows first."""

    name = "triton"
    block_sizes: BlockSizes = ()

    def __init__(self, shape: SlotShape) -> None:
        self.shape = shape
        self._stacked = {
            name: torch.zeros(shape.slots, *size, dtype=shape.dtype, device=shape.device)
            for name, size in shape.tensor_shapes().items()
        }

    def set_slot(self, slot: int, tensors: SlotTensors) -> None:
        for name, tensor in tensors.items():
            if name.startswith("gate_up"):
                tensor = gate_rows_first(tensor, self.shape.activation)
            self._stacked[name][slot].copy_(tensor, non_blocking=True)

    def get_slot(self, slot: int) -> SlotTensors:
        tensors = {name: stacked[slot].clone() for name, stacked in self._stacked.items()}
        return stored_tensors(tensors, self.shape.activation)

    def run(self, x_AH: Tensor, count_S: Tensor, out_AH: Tensor) -> None:
        x_AH, counts = self._aligned_rows(x_AH), count_S.tolist()
        y_AH = out_AH if out_AH.stride(1) == 1 else torch.empty_like(x_AH)
        self._products(x_AH, counts, self._choose_tiles(counts), y_AH)
        if y_AH is not out_AH:
            out_AH.copy_(y_AH)

    def _choose_tiles(self, counts: list[int]) -> Tiles:
        shape = self.shape
        active, rows_p90 = rows_percentile(counts)
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

    def _aligned_rows(self, x: Tensor) -> Tensor:
        """Rows that are loaded as the blocks expect (`fit_tiles`); copied where they lie askew."""
        if self.shape.hidden % ALIGNED or self.shape.intermediate % ALIGNED:
            return _inner_contiguous(x)
        askew = x.stride(-1) != 1 or x.stride(0) % ALIGNED or x.data_ptr() % 16
        return x.clone(memory_format=torch.contiguous_format) if askew else x

    def _products(
        self, x_AH: Tensor, counts: list[int], blocks: Tiles, y_AH: Tensor
    ) -> None:
        shape, stacked = self.shape, self._stacked
        act = torch.empty(len(y_AH), shape.intermediate, dtype=x_AH.dtype, device=x_AH.device)
        tiles = map_tiles(counts, blocks.up.rows, x_AH.device)
        common = (
            tiles.row_end_S,
            tiles.tile_slot,
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
        up, down = blocks.up, blocks.down
        kernels.up_gated[_grid(x_AH, up, 2, tiles.tiles, shape.intermediate)](
            x_AH,
            stacked["gate_up"],
            stacked.get("gate_up_bias", x_AH),
            act,
            *common,
            x_AH.stride(0),
            float(shape.activation.limit or 0.0),
            float(shape.activation.alpha or 0.0),
            KIND=shape.activation.kind,
            EVEN=shape.hidden % up.depth == 0,
            BLOCK_ROWS=up.rows,
            BLOCK_N=up.columns,
            BLOCK_K=up.depth,
            num_warps=up.warps,
            num_stages=up.stages,
            **flags,
        )
        kernels.down[_grid(x_AH, down, 1, tiles.tiles, shape.hidden)](
            act,
            stacked["down"],
            stacked.get("down_bias", x_AH),
            y_AH,
            *common,
            y_AH.stride(0),
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


def _grid(x: Tensor, tile: Tile, weight_tiles: int, tiles: int, columns: int) -> tuple[int]:
    """As many programs as the device holds at once, or fewer where there is less to do."""
    work = tiles * -(-columns // tile.columns)
    resident = tile.resident(weight_tiles, x.element_size())
    return (max(min(work, _processors(x.device) * resident), 1),)


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 3  # interpreted: few, so that programs do walk several tiles
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


def _inner_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
