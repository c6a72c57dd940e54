"""The grouped expert MLP on the CPU in one compiled pass, with weights held as panels.

Against two calls of oneDNN for every expert (`cpu_packed.py`), measured on Zen 4: a 128 x 64
expert with one row takes 2 us instead of 36; large experts with few rows stream from memory 1.5 to
2 times as fast; with many rows both reach what the processor can multiply. On Zen 2, where oneDNN
has no bfloat16, a layer of 64 experts takes an eighth of what torch needs. Knows nothing of plans.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..activation import gate_rows_first, stored_rows
from ..backend import BlockSizes, SlotShape, SlotTensors
from .gates import compiled_activation
from .panel_loops import CHUNK_ROWS, expert_rows
from .panel_matrix import Panels, factor_dtype, narrowed, panels_available
from .scalars import as_array
from .scratch import SCRATCH
from .tiles import HAS_MATRIX_UNITS, PANEL, TILE_ROWS, padded_columns

# Largest hidden x intermediate held as panels where oneDNN multiplies large matrices faster than
# they do: with matrix units. The choice may not depend on rows: a token's bits would then depend
# on its batch.
LARGEST_SMALL = 1 << 17


def panels_preferred(hidden: int, intermediate: int, dtype: torch.dtype) -> bool:
    """Whether experts of this size are best held as panels; depends on nothing else."""
    if not panels_available(dtype):
        return False
    units = dtype == torch.bfloat16 and HAS_MATRIX_UNITS
    return not units or hidden * intermediate <= LARGEST_SMALL


class PanelSlots:
    """Panels per slot. Gate columns are padded apart from up columns."""

    name = "panels"

    def __init__(self, shape: SlotShape, block_sizes: BlockSizes = (TILE_ROWS,)) -> None:
        self.shape, self.block_sizes = shape, block_sizes
        self._half = padded_columns(shape.intermediate)
        self._up = Panels(shape.slots, 2 * self._half, shape.hidden, shape.dtype)
        self._down = Panels(shape.slots, shape.hidden, shape.intermediate, shape.dtype)

    def set_slot(self, slot: int, tensors: SlotTensors) -> None:
        shape = self.shape
        self._up.set(slot, self._apart(gate_rows_first(tensors["gate_up"], shape.activation)))
        self._down.set(slot, tensors["down"])
        if shape.bias:
            bias = self._apart(gate_rows_first(tensors["gate_up_bias"], shape.activation))
            self._up.bias[slot] = bias.float().numpy()
            self._down.bias[slot, : shape.hidden] = tensors["down_bias"].float().numpy()

    def get_slot(self, slot: int) -> SlotTensors:
        shape = self.shape
        gate_up = self._together(self._up.get(slot, 2 * self._half))
        tensors = {
            "gate_up": stored_rows(gate_up, shape.activation),
            "down": self._down.get(slot, shape.hidden),
        }
        if shape.bias:
            bias = self._together(narrowed(self._up.bias[slot], shape.dtype))
            tensors["gate_up_bias"] = stored_rows(bias, shape.activation)
            down_bias = self._down.bias[slot, : shape.hidden]
            tensors["down_bias"] = narrowed(down_bias, shape.dtype)
        return tensors

    def run(self, x_AH: Tensor, count_S: Tensor, out_AH: Tensor) -> None:
        offset_S = np.zeros(self.shape.slots + 1, np.int64)
        np.cumsum(as_array(count_S), out=offset_S[1:])
        y_AH = out_AH if out_AH.is_contiguous() else torch.empty(x_AH.shape, dtype=x_AH.dtype)
        up, down, dtype = self._up, self._down, factor_dtype(self.shape.dtype)
        scratch = (
            SCRATCH.take_array("panel_x", CHUNK_ROWS, up.row_elements, dtype),
            SCRATCH.take_array("panel_gate_up", CHUNK_ROWS, 2 * PANEL, torch.float32),
            SCRATCH.take_array("panel_block", CHUNK_ROWS, PANEL, dtype),
            SCRATCH.take_array("panel_act", CHUNK_ROWS, down.row_elements, dtype),
        )
        expert_rows(
            as_array(x_AH.contiguous()),
            offset_S,
            (up.values, up.bias),
            (down.values, down.bias),
            compiled_activation(self.shape.activation),
            scratch,
            as_array(y_AH),
        )
        if y_AH is not out_AH:
            out_AH.copy_(y_AH)

    def _apart(self, gate_first: Tensor) -> Tensor:
        """Gate and up rows, each padded with zeros to whole panels."""
        intermediate = self.shape.intermediate
        padded = gate_first.new_zeros(2 * self._half, *gate_first.shape[1:])
        padded[:intermediate] = gate_first[:intermediate]
        padded[self._half : self._half + intermediate] = gate_first[intermediate:]
        return padded

    def _together(self, padded: Tensor) -> Tensor:
        """The inverse of `_apart`."""
        intermediate = self.shape.intermediate
        up = padded[self._half : self._half + intermediate]
        return torch.cat((padded[:intermediate], up))
