"""The grouped expert MLP on plain torch operations: runs anywhere, right before it is fast.

Knows slots as rows of two stacked matrices; knows nothing of routing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .activation import ExpertActivation, gate_rows_first, gated_inplace, stored_rows

# Plain fp32 products of fewer rows take another code path with other bits.
_LEAST_ROWS = 8


class TorchSlots:
    """Stacked weights, gate rows first; one pair of products per slot that has rows."""

    name = "torch"

    def __init__(
        self,
        slots: int,
        hidden: int,
        intermediate: int,
        dtype: torch.dtype,
        device: torch.device,
        activation: ExpertActivation,
        bias: bool,
    ) -> None:
        self.slots, self.hidden, self.intermediate = slots, hidden, intermediate
        self.dtype, self.device, self.activation, self.bias = dtype, device, activation, bias
        self._gate_up = torch.zeros(slots, 2 * intermediate, hidden, dtype=dtype, device=device)
        self._down = torch.zeros(slots, hidden, intermediate, dtype=dtype, device=device)
        width = (2 * intermediate, hidden) if bias else (0, 0)
        self._gate_up_bias = torch.zeros(slots, width[0], dtype=dtype, device=device)
        self._down_bias = torch.zeros(slots, width[1], dtype=dtype, device=device)

    def set_slot(
        self,
        slot: int,
        gate_up: Tensor,
        down: Tensor,
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
    ) -> None:
        self._gate_up[slot] = gate_rows_first(gate_up, self.activation)
        self._down[slot] = down
        if gate_up_bias is not None and down_bias is not None:
            self._gate_up_bias[slot] = gate_rows_first(gate_up_bias, self.activation)
            self._down_bias[slot] = down_bias

    def get_slot(self, slot: int) -> dict[str, Tensor]:
        tensors = {
            "gate_up": stored_rows(self._gate_up[slot], self.activation).clone(),
            "down": self._down[slot].clone(),
        }
        if self.bias:
            tensors["gate_up_bias"] = stored_rows(
                self._gate_up_bias[slot], self.activation
            ).clone()
            tensors["down_bias"] = self._down_bias[slot].clone()
        return tensors

    def run(self, x_AH: Tensor, count_S: Tensor, out_AH: Tensor) -> None:
        start = 0
        for slot, count in enumerate(count_S.tolist()):
            if count:
                rows = slice(start, start + count)
                out_AH[rows] = self._run_slot(x_AH[rows], slot)[:count]
                start += count

    def _run_slot(self, x_AH: Tensor, slot: int) -> Tensor:
        if len(x_AH) < _LEAST_ROWS:
            padding = x_AH.new_zeros(_LEAST_ROWS - len(x_AH), self.hidden)
            x_AH = torch.cat((x_AH, padding))
        gate_up = torch.mm(x_AH, self._gate_up[slot].T)
        if self.bias:
            gate_up += self._gate_up_bias[slot]
        gate, up = gate_up[:, : self.intermediate], gate_up[:, self.intermediate :]
        y_AH = torch.mm(gated_inplace(gate, up, self.activation), self._down[slot].T)
        if self.bias:
            y_AH += self._down_bias[slot]
        return y_AH
