"""The grouped expert MLP on the CPU for experts so small that calling a product costs more than it.

One compiled pass over all experts instead of two oneDNN calls for each (about 35 us an expert,
against 1.4 us here for one row of a 128 x 64 expert). Weights are held as float32 panels; the
arithmetic is float32 and rounds once, at the end. Knows nothing of plans or routing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .activation import compiled_activation, gate_rows_first, stored_rows
from .backend import SlotShape, SlotTensors
from .cpu_float import as_array
from .cpu_loops import combine_rows
from .cpu_panels import (
    CHUNK_ROWS,
    HAS_FUSED_PRODUCTS,
    PANEL,
    expert_rows,
    from_panels,
    padded_columns,
    to_panels,
)
from .routing import sort_on_host
from .scratch import SCRATCH
from .slot_table import SlotTable

# Largest hidden x intermediate that takes this backend. Measured on Zen 4 against packed oneDNN:
# float32 wins at every row count up to here; bfloat16, which oneDNN multiplies faster, up to 50
# rows per expert at the limit and 85 at half of it. The choice may not depend on rows: a token's
# bits would then depend on its batch.
LARGEST_EXPERT = {torch.float32: 1 << 17, torch.bfloat16: 1 << 15}


def small_available(dtype: torch.dtype) -> bool:
    """Whether this machine runs the panels and they hold `dtype` exactly."""
    return HAS_FUSED_PRODUCTS and dtype in LARGEST_EXPERT


def small_preferred(hidden: int, intermediate: int, dtype: torch.dtype) -> bool:
    """Whether experts of this size are best computed here; depends on nothing else."""
    return small_available(dtype) and hidden * intermediate <= LARGEST_EXPERT[dtype]


class _Panels:
    """One matrix [columns, depth] per slot as panels, and its bias (zero where there is none)."""

    def __init__(self, slots: int, columns: int, depth: int) -> None:
        self.columns = columns
        self.bias = np.zeros((slots, padded_columns(columns)), np.float32)
        self.values = np.zeros((slots, padded_columns(columns) // PANEL, depth, PANEL), np.float32)


class SmallSlots:
    """Panels per slot, read through a slot table."""

    name = "small"

    def __init__(self, shape: SlotShape) -> None:
        self.shape = shape
        self._table = SlotTable(shape.slots)
        self._row_S = np.arange(shape.slots)
        self._up = _Panels(shape.slots, 2 * shape.intermediate, shape.hidden)
        self._down = _Panels(shape.slots, shape.hidden, shape.intermediate)

    def set_slot(self, slot: int, tensors: SlotTensors) -> None:
        row, activation = self._table.row_to_write(slot), self.shape.activation
        self._row_S = np.array(self._table.rows)
        to_panels(_widened(gate_rows_first(tensors["gate_up"], activation)), self._up.values[row])
        to_panels(_widened(tensors["down"]), self._down.values[row])
        if self.shape.bias:
            bias = gate_rows_first(tensors["gate_up_bias"], activation)
            self._up.bias[row, : self._up.columns] = _widened(bias)
            self._down.bias[row, : self._down.columns] = _widened(tensors["down_bias"])

    def get_slot(self, slot: int) -> SlotTensors:
        row, shape = self._table.rows[slot], self.shape

        def narrowed(values: NDArray[np.float32]) -> Tensor:
            return _narrowed(values, shape.dtype)

        gate_up = from_panels(self._up.values[row], self._up.columns)
        down = from_panels(self._down.values[row], self._down.columns)
        tensors = {
            "gate_up": stored_rows(narrowed(gate_up), shape.activation),
            "down": narrowed(down),
        }
        if shape.bias:
            bias = narrowed(self._up.bias[row, : self._up.columns].copy())
            tensors["gate_up_bias"] = stored_rows(bias, shape.activation)
            tensors["down_bias"] = narrowed(self._down.bias[row, : self._down.columns].copy())
        return tensors

    def rearrange(self, source_S: Sequence[int]) -> None:
        self._table.rearrange(source_S)
        self._row_S = np.array(self._table.rows)

    def run(self, x_AH: Tensor, count_S: Tensor, out_AH: Tensor) -> None:
        offset_S = np.zeros(self.shape.slots + 1, np.int64)
        np.cumsum(as_array(count_S), out=offset_S[1:])
        y_AH = out_AH if out_AH.is_contiguous() else torch.empty(x_AH.shape, dtype=x_AH.dtype)
        self._expert_rows(x_AH, np.arange(len(x_AH)), 1, offset_S, y_AH)
        if y_AH is not out_AH:
            out_AH.copy_(y_AH)

    def layer(self, x_TH: Tensor, slot_TK: Tensor, gate_TK: Tensor, out_TH: Tensor) -> None:
        order_A, offset_S, row_TK = sort_on_host(slot_TK, self.shape.slots)
        y_AH = SCRATCH.take("y", len(order_A), self.shape.hidden, self.shape.dtype)
        self._expert_rows(x_TH, as_array(order_A), max(slot_TK.shape[1], 1), offset_S, y_AH)
        sum_H = np.empty(self.shape.hidden, np.float32)
        combine_rows(as_array(y_AH), as_array(row_TK), as_array(gate_TK), sum_H, as_array(out_TH))

    def _expert_rows(
        self, x: Tensor, order_A: NDArray[Any], choices: int, offset_S: NDArray[Any], y_AH: Tensor
    ) -> None:
        up, down = self._up, self._down
        scratch = (
            _chunk("panel_x", self.shape.hidden),
            _chunk("panel_gate_up", up.bias.shape[1]),
            _chunk("panel_act", self.shape.intermediate),
            _chunk("panel_y", down.bias.shape[1]),
        )
        expert_rows(
            as_array(x.contiguous()),
            order_A,
            choices,
            offset_S,
            self._row_S,
            (up.values, up.bias),
            (down.values, down.bias),
            compiled_activation(self.shape.activation),
            scratch,
            as_array(y_AH),
        )


def _chunk(name: str, columns: int) -> NDArray[np.float32]:
    chunk: NDArray[np.float32] = SCRATCH.take(name, CHUNK_ROWS, columns, torch.float32).numpy()
    return chunk


def _widened(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.float().numpy()
    return array


def _narrowed(values: NDArray[np.float32], dtype: torch.dtype) -> Tensor:
    """What `_widened` was given, bit for bit: bfloat16 is the upper half of a float32."""
    tensor = torch.from_numpy(values)
    if dtype == torch.float32:
        return tensor
    return (tensor.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
