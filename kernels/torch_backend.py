"""The grouped expert MLP on plain torch operations: any device, any float type, no packing.

The fallback where nothing faster is there. Knows stacked weights and rows sorted by slot;
knows nothing of plans.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .activation import gate_rows_first, stored_rows
from .backend import SlotShape, SlotTensors
from .cpu.gates import gated_rows
from .slot_rows import SlotTable

# A product of fewer rows takes other code with other bits (measured on torch 2.13 CPU: float32
# below 4 rows, bfloat16 a single row where H >= 2048), so blocks are padded up to this.
LEAST_ROWS = 8


class TorchSlots:
    """Stacked weights, gate rows first; one pair of products per slot that has rows."""

    name = "torch"

    def __init__(self, shape: SlotShape) -> None:
        self.shape = shape
        self._table = SlotTable(shape.slots)
        self._stacked = {
            name: torch.zeros(shape.slots, *size, dtype=shape.dtype, device=shape.device)
            for name, size in shape.tensor_shapes().items()
        }

    def set_slot(self, slot: int, tensors: SlotTensors) -> None:
        row = self._table.row_to_write(slot)
        for name, tensor in tensors.items():
            if name.startswith("gate_up"):
                tensor = gate_rows_first(tensor, self.shape.activation)
            self._stacked[name][row] = tensor

    def get_slot(self, slot: int) -> SlotTensors:
        row = self._table.rows[slot]
        tensors = {name: stacked[row].clone() for name, stacked in self._stacked.items()}
        return {
            name: stored_rows(tensor, self.shape.activation) if "gate_up" in name else tensor
            for name, tensor in tensors.items()
        }

    def run(self, x_AH: Tensor, count_S: Tensor, out_AH: Tensor) -> None:
        start = 0
        for slot, count in enumerate(count_S.tolist()):
            if count:
                rows = slice(start, start + count)
                out_AH[rows] = self._run_slot(x_AH[rows], self._table.rows[slot])[:count]
                start += count

    def _run_slot(self, x_AH: Tensor, row: int) -> Tensor:
        if len(x_AH) < LEAST_ROWS:
            padding = x_AH.new_zeros(LEAST_ROWS - len(x_AH), self.shape.hidden)
            x_AH = torch.cat((x_AH, padding))
        gate_up = torch.mm(x_AH, self._stacked["gate_up"][row].T)
        if self.shape.bias:
            gate_up += self._stacked["gate_up_bias"][row]
        act = gate_up.new_empty(len(gate_up), self.shape.intermediate)
        gated_rows(gate_up, self.shape.activation, act)
        y_AH = torch.mm(act, self._stacked["down"][row].T)
        if self.shape.bias:
            y_AH += self._stacked["down_bias"][row]
        return y_AH
