"""The grouped expert MLP on plain torch operations: any device, any float type, no packing.

The fallback where nothing faster is there. On the CPU rows run in blocks of few fixed sizes
(`cpu/row_blocks.py`); elsewhere all rows of a slot at once, and no promise is made of their bits.
Knows nothing of plans.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .activation import gate_rows_first, stored_tensors
from .backend import BlockSizes, SlotShape, SlotTensors
from .cpu.gates import gated_rows
from .cpu.row_blocks import compute_in_blocks


class TorchSlots:
    """Each slot's own tensors, gate rows first; one pair of products per block of rows."""

    name = "torch"

    def __init__(self, shape: SlotShape, block_sizes: BlockSizes) -> None:
        self.shape, self.block_sizes = shape, block_sizes
        # Tensors of their own, not parts of a large one: all begin at a cache line.
        self._experts: list[SlotTensors] = [shape.zero_expert()] * shape.slots

    def set_slot(self, slot: int, tensors: SlotTensors) -> None:
        activation = self.shape.activation
        self._experts[slot] = {
            name: (gate_rows_first(tensor, activation) if "gate_up" in name else tensor).clone(
                memory_format=torch.contiguous_format
            )
            for name, tensor in tensors.items()
        }

    def get_slot(self, slot: int) -> SlotTensors:
        tensors = {name: tensor.clone() for name, tensor in self._experts[slot].items()}
        return stored_tensors(tensors, self.shape.activation)

    def run(self, x_AH: Tensor, count_S: Tensor, out_AH: Tensor) -> None:
        if self.shape.device.type == "cpu":
            compute_in_blocks(x_AH, count_S.tolist(), self.block_sizes, self._block, out_AH)
            return
        start = 0
        for slot, count in enumerate(count_S.tolist()):
            if count:
                rows = slice(start, start + count)
                out_AH[rows] = self._block(slot, x_AH[rows])
                start += count

    def _block(self, slot: int, x: Tensor) -> Tensor:
        expert = self._experts[slot]
        gate_up = torch.mm(x, expert["gate_up"].T)
        if self.shape.bias:
            gate_up += expert["gate_up_bias"]
        act = gate_up.new_empty(len(gate_up), self.shape.intermediate)
        gated_rows(gate_up, self.shape.activation, act)
        y = torch.mm(act, expert["down"].T)
        if self.shape.bias:
            y += expert["down_bias"]
        return y
