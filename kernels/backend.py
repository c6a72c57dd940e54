"""What every backend of the grouped expert MLP must offer, and the shape it is built for.

Knows the contract; knows no arithmetic. `grouped.py` checks inputs before it calls a backend, so
a backend may trust them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .activation import ExpertActivation
from .load_record import LoadRecord
from .segment_table import DispatchTable

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
        shapes: dict[str, tuple[int, ...]] = {
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }
        if self.bias:
            shapes["gate_up_bias"] = (2 * self.intermediate,)
            shapes["down_bias"] = (self.hidden,)
        return shapes


class RowOrder(NamedTuple):
    """Kept assignments sorted by slot, token order inside; all int64.

    order_A: assignment of each row. offset_S: [S + 1] first row of each slot. row_TK: row of each
    assignment, -1 where it is left out.
    """

    order_A: Tensor
    offset_S: Tensor
    row_TK: Tensor


class SlotBackend(Protocol):
    """Weights of S slots in the form one backend computes on."""

    name: str
    shape: SlotShape

    def set_slot(self, slot: int, tensors: SlotTensors) -> None:
        """Take over one expert; touches no other slot."""

    def get_slot(self, slot: int) -> SlotTensors:
        """The logical tensors of one slot, bit for bit, as new tensors."""

    def rearrange(self, source_S: Sequence[int]) -> None:
        """Slot s takes the expert of slot source_S[s]; copies no weights."""

    def run(self, x_AH: Tensor, count_S: Tensor, out_AH: Tensor) -> None:
        """Rows sorted by slot through their experts, unweighted, into `out_AH`."""


class HostBackend(SlotBackend, Protocol):
    """A backend whose rows `routing.py` sorts."""

    def layer(self, x_TH: Tensor, order: RowOrder, gate_TK: Tensor, out_TH: Tensor) -> None:
        """The whole sorted layer: gather, compute and combine into `out_TH`. gate_TK: float32."""


class RoutingBackend(SlotBackend, Protocol):
    """A backend that routes by itself, where its tensors live; nothing waits for the device."""

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
        """The whole layer from chosen experts; without a table they are slots."""

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
        """The whole layer from router logits."""
