"""The one entry to the grouped gated expert MLP; chooses the backend.

Knows the weights of one layer's local slots and rows sorted by slot; knows nothing of experts'
names, plans, ranks or networks. Callers never name a backend, except to test one.

Axes: A rows (one per assignment), S local slots, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import InputError
from .activation import ExpertActivation
from .routing import combine, sort_by_slot
from .torch_backend import TorchSlots

__all__ = ["ExpertActivation", "ExpertWeights", "grouped_experts", "moe_layer"]


class ExpertWeights:
    """The expert weights of one layer's slots on one rank, in the form its backend computes on."""

    def __init__(self, slots: TorchSlots) -> None:
        self._slots = slots

    @classmethod
    def allocate(
        cls,
        slots: int,
        hidden: int,
        intermediate: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        activation: ExpertActivation,
        bias: bool = False,
        backend: str = "auto",
    ) -> ExpertWeights:
        """Room for `slots` experts, all zero until `set_slot` fills them."""
        if backend not in ("auto", "torch"):
            raise InputError(f"backend {backend!r} is not known; use 'auto' or 'torch'")
        if min(slots, hidden, intermediate) < 1:
            raise InputError(
                f"slots, hidden and intermediate must be >= 1; got {slots}, {hidden}, "
                f"{intermediate}"
            )
        return cls(
            TorchSlots(slots, hidden, intermediate, dtype, torch.device(device), activation, bias)
        )

    @property
    def slots(self) -> int:
        return self._slots.slots

    @property
    def hidden(self) -> int:
        return self._slots.hidden

    @property
    def intermediate(self) -> int:
        return self._slots.intermediate

    @property
    def dtype(self) -> torch.dtype:
        return self._slots.dtype

    @property
    def device(self) -> torch.device:
        return self._slots.device

    @property
    def activation(self) -> ExpertActivation:
        return self._slots.activation

    @property
    def bias(self) -> bool:
        return self._slots.bias

    @property
    def backend(self) -> str:
        return self._slots.name

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of one expert's logical tensors: what a move between ranks sends."""
        numbers = 3 * self.hidden * self.intermediate
        if self.bias:
            numbers += 2 * self.intermediate + self.hidden
        return numbers * self.dtype.itemsize

    def set_slot(
        self,
        slot: int,
        gate_up: Tensor,
        down: Tensor,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> None:
        """Fill one slot with an expert; packs this slot only.

        gate_up [2I, H] in the row order the activation names, down [H, I], biases [2I] and [H]
        exactly when the weights were allocated with `bias`.
        """
        self._check_slot(slot)
        shapes = {
            "gate_up": (gate_up, (2 * self.intermediate, self.hidden)),
            "down": (down, (self.hidden, self.intermediate)),
        }
        if self.bias:
            if gate_up_bias is None or down_bias is None:
                raise InputError(f"slot {slot} needs both biases: its weights were allocated so")
            shapes["gate_up_bias"] = (gate_up_bias, (2 * self.intermediate,))
            shapes["down_bias"] = (down_bias, (self.hidden,))
        elif gate_up_bias is not None or down_bias is not None:
            raise InputError(f"slot {slot} takes no bias: its weights were allocated without")
        for name, (tensor, shape) in shapes.items():
            if tuple(tensor.shape) != shape or tensor.dtype != self.dtype:
                raise InputError(
                    f"{name} for slot {slot} is {tuple(tensor.shape)} {tensor.dtype}; "
                    f"it must be {shape} {self.dtype}"
                )
        self._slots.set_slot(slot, gate_up, down, gate_up_bias, down_bias)

    def get_slot(self, slot: int) -> dict[str, Tensor]:
        """One slot's logical tensors, bit for bit as `set_slot` got them (new tensors)."""
        self._check_slot(slot)
        return self._slots.get_slot(slot)

    def copy_slot(self, source: int, target: int) -> None:
        """Give slot `target` the expert of slot `source`."""
        self.load_slot(target, self.get_slot(source))

    def load_slot(self, slot: int, tensors: Mapping[str, Tensor]) -> None:
        """`set_slot` from what `get_slot` returned."""
        self.set_slot(
            slot,
            tensors["gate_up"],
            tensors["down"],
            tensors.get("gate_up_bias"),
            tensors.get("down_bias"),
        )

    def run(self, x_AH: Tensor, count_S: Tensor, out_AH: Tensor) -> None:
        """Compute checked rows into `out_AH`; callers use `grouped_experts`."""
        self._slots.run(x_AH, count_S, out_AH)

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.slots:
            raise InputError(f"slot {slot} is past the table of {self.slots} slots")


def grouped_experts(
    x_AH: Tensor, count_S: Tensor, weights: ExpertWeights, *, out: Tensor | None = None
) -> Tensor:
    """Run every row through the expert of its slot.

    x_AH: [A, H] rows sorted by slot. count_S: [S] rows of each slot, summing to A.
    Returns y [A, H], rows in the same order, not weighted. A row's bits depend on the row and
    its expert only. Raises InputError when shapes, dtypes or counts do not fit.
    """
    _check_rows(x_AH, weights)
    if tuple(count_S.shape) != (weights.slots,) or count_S.dtype not in (torch.int32, torch.int64):
        raise InputError(
            f"count_S is {tuple(count_S.shape)} {count_S.dtype}; "
            f"it must be [{weights.slots}] int32 or int64"
        )
    if count_S.device.type == "cpu":
        counts = count_S.tolist()
        if min(counts) < 0 or sum(counts) != len(x_AH):
            raise InputError(
                f"count_S holds {sum(counts)} rows (lowest count {min(counts)}) for the "
                f"{len(x_AH)} rows given; counts must be >= 0 and sum to the rows"
            )
    if out is None:
        out = torch.empty_like(x_AH, memory_format=torch.contiguous_format)
    elif out.shape != x_AH.shape or out.dtype != x_AH.dtype:
        raise InputError(
            f"out is {tuple(out.shape)} {out.dtype}; it must be {tuple(x_AH.shape)} {x_AH.dtype}"
        )
    weights.run(x_AH, count_S, out)
    return out


def moe_layer(
    x_TH: Tensor,
    ids_TK: Tensor,
    gate_TK: Tensor,
    weights: ExpertWeights,
    *,
    slot_TK: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One whole expert layer in one process: sort, compute, combine. Returns [T, H].

    ids_TK: the experts chosen; gate_TK: their weights, float32. slot_TK: the slot of every
    assignment (`assign_slots`); without it expert e stands in slot e. Negative ids or slots, and
    an id equal to the number of slots (transformers' mark for an expert that lives elsewhere),
    are left out: they add nothing to their token.
    """
    _check_rows(x_TH, weights)
    if ids_TK.dim() != 2 or len(ids_TK) != len(x_TH) or gate_TK.shape != ids_TK.shape:
        raise InputError(
            f"x is {tuple(x_TH.shape)}, ids {tuple(ids_TK.shape)}, gates {tuple(gate_TK.shape)}; "
            "ids and gates must both be [T, K]"
        )
    if slot_TK is None:
        slot_TK = torch.where(ids_TK == weights.slots, -1, ids_TK)
    order_A, count_S = sort_by_slot(slot_TK, weights.slots)
    choices = ids_TK.shape[1]
    y_AH = grouped_experts(x_TH[order_A // max(choices, 1)], count_S, weights)
    y_TKH = torch.zeros(ids_TK.numel(), weights.hidden, dtype=x_TH.dtype, device=x_TH.device)
    y_TKH[order_A] = y_AH
    return combine(y_TKH.view(*ids_TK.shape, weights.hidden), gate_TK, out=out)


def _check_rows(x: Tensor, weights: ExpertWeights) -> None:
    if x.dim() != 2 or x.shape[1] != weights.hidden:
        raise InputError(f"rows are {tuple(x.shape)}; they must be [rows, {weights.hidden}]")
    if x.dtype != weights.dtype or x.device != weights.device:
        raise InputError(
            f"rows are {x.dtype} on {x.device} but the weights {weights.dtype} on "
            f"{weights.device}; convert one of them"
        )
