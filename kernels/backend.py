"""What every backend of the grouped expert MLP must offer, and the shape it is built for.

Knows the contract; knows no arithmetic. `grouped.py` checks inputs before it calls a backend, so
a backend may trust them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .activation import ExpertActivation

BlockSizes = tuple[int, ...]
"""Rows that a backend computes together: no call of it has another number. () = no promise."""

SlotTensors = dict[str, Tensor]
"""One expert: `gate_up` [2I, H] and `down` [H, I]; with biases, `gate_up_bias` and `down_bias`."""


@dataclass(frozen=True, kw_only=True)
class SlotShape:
    """The sizes and kinds of one layer's local slots."""

    slots: int
    hidden: int
    intermediate: int
    dtype: torch.dtype
    device: torch.device
    activation: ExpertActivation
    bias: bool

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of the tensors of one expert, in a fixed order."""
        return expert_shapes(self.hidden, self.intermediate, self.bias)

    def zero_expert(self) -> SlotTensors:
        """One expert, all zero."""
        return {
            name: torch.zeros(size, dtype=self.dtype, device=self.device)
            for name, size in self.tensor_shapes().items()
        }


def expert_shapes(hidden: int, intermediate: int, bias: bool) -> dict[str, tuple[int, ...]]:
    """Name and shape of the tensors of one expert, in a fixed order."""
    shapes: dict[str, tuple[int, ...]] = {
        "gate_up": (2 * intermediate, hidden),
        "down": (hidden, intermediate),
    }
    if bias:
        shapes["gate_up_bias"] = (2 * intermediate,)
        shapes["down_bias"] = (hidden,)
    return shapes


class SlotBackend(Protocol):
    """Weights of S slots in the form one backend computes on."""

    name: str
    shape: SlotShape
    block_sizes: BlockSizes

    def set_slot(self, slot: int, tensors: SlotTensors) -> None:
        """Take over one expert; touches no other slot."""

    def get_slot(self, slot: int) -> SlotTensors:
        """The logical tensors of one slot, bit for bit, as new tensors."""

    def run(self, x_AH: Tensor, count_S: Tensor, out_AH: Tensor) -> None:
        """Rows sorted by slot through their experts, unweighted, into `out_AH`.

        Counts stand on the CPU.
        """
