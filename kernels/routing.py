"""Assignments to rows and back: sorted by slot before the experts, combined after them.

Tensors in, tensors out. Knows the slot of every assignment, and nothing of how it was chosen.
Slots are sorted on the CPU, where dispatch is decided; rows are combined where they lie.

Axes: T tokens, K experts chosen per token, A = T * K assignments in token order (flat index
t * K + k), S slots, H hidden. A negative slot marks an assignment that is left out: it is not
sorted, not computed and adds nothing.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .cpu import loops
from .cpu.gates import COMPILED_DTYPES
from .cpu.scalars import as_array

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_integers(name: str, tensor: Tensor) -> None:
    """Refuse slots or rows that a conversion would cut to whole numbers."""
    if tensor.dtype not in _INTEGERS:
        raise InputError(f"{name} are {tensor.dtype}; they must be integers, as int32 or int64")


def sort_by_slot(slot_TK: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order the kept assignments by slot, token order inside a slot; all int64 on the CPU.

    Returns order_A (flat assignment indices; only those with slot >= 0), count_S, and row_TK: the
    row of every assignment in that order, -1 where it is left out. Raises InputError for a slot
    past the table.
    """
    check_integers("slots", slot_TK)
    slots = slot_TK.detach().cpu().long().contiguous()
    if slots.numel() and int(slots.max()) >= num_slots:
        raise InputError(f"slot {int(slots.max())} is past the table of {num_slots} slots")
    order_A, row_TK = torch.empty(slots.numel(), dtype=torch.int64), torch.empty_like(slots)
    offset_S = torch.empty(num_slots + 1, dtype=torch.int64)
    loops.sort_slots(
        as_array(slots.view(-1)), as_array(order_A), as_array(offset_S), as_array(row_TK.view(-1))
    )
    return order_A[: int(offset_S[-1])], offset_S.diff(), row_TK


def combine(y_TKH: Tensor, gate_TK: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Sum every token's expert outputs with its gates, in the token's own order: [T, H].

    y_TKH: expert outputs [T, K, H] in flat (t, k) order; rows of assignments that were left out
    must be finite and have gate 0. See `combine_rows`, which needs neither.
    """
    if y_TKH.dim() != 3 or tuple(gate_TK.shape) != tuple(y_TKH.shape[:2]):
        raise InputError(
            f"combine needs y [T, K, H] and gates [T, K]; got {tuple(y_TKH.shape)} "
            f"and {tuple(gate_TK.shape)}"
        )
    rows = torch.arange(gate_TK.numel(), device=gate_TK.device).view(gate_TK.shape)
    return combine_rows(y_TKH.flatten(0, 1), rows, gate_TK, out=out)


def combine_rows(
    y_AH: Tensor, row_TK: Tensor, gate_TK: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """Sum every token's expert outputs from wherever they lie: [T, H] in y's dtype.

    row_TK: the row of y that answers choice k of token t, negative = nothing to add (its gate is
    not read); a row past y is refused on the CPU and adds nothing on a GPU. Sums in float32,
    choice 0 first, and rounds once; a token's bits depend on its own rows and gates only, and NaN
    stays in its token.
    """
    if y_AH.dim() != 2 or row_TK.dim() != 2 or gate_TK.shape != row_TK.shape:
        raise InputError(
            f"combine needs y [A, H], rows [T, K] and gates [T, K]; got {tuple(y_AH.shape)}, "
            f"{tuple(row_TK.shape)} and {tuple(gate_TK.shape)}"
        )
    check_integers("rows", row_TK)
    hidden = y_AH.shape[1]
    if y_AH.device.type == "cpu" and row_TK.numel() and int(row_TK.max()) >= len(y_AH):
        raise InputError(f"row {int(row_TK.max())} is past the {len(y_AH)} rows of y")
    if out is None:
        out = torch.empty(len(row_TK), hidden, dtype=y_AH.dtype, device=y_AH.device)
    elif tuple(out.shape) != (len(row_TK), hidden) or out.dtype != y_AH.dtype:
        raise InputError(
            f"out is {tuple(out.shape)} {out.dtype}; it must be "
            f"{(len(row_TK), hidden)} {y_AH.dtype}"
        )
    if y_AH.device.type == "cpu" and y_AH.dtype in COMPILED_DTYPES:
        loops.combine_rows(
            as_array(y_AH.detach().contiguous()),
            as_array(row_TK.long().contiguous()),
            as_array(gate_TK.detach().float().contiguous()),
            np.empty(hidden, np.float32),
            as_array(out),
        )
        return out
    if y_AH.device.type == "cuda" and _reduced_on_device(y_AH, row_TK, gate_TK, out):
        return out
    wide = torch.promote_types(torch.float32, y_AH.dtype)
    total = torch.zeros(len(row_TK), hidden, dtype=wide, device=y_AH.device)
    rows = row_TK.long()
    for k in range(rows.shape[1] if len(y_AH) else 0):
        real = (rows[:, k] >= 0) & (rows[:, k] < len(y_AH))
        term = y_AH[torch.where(real, rows[:, k], 0)].to(wide) * gate_TK[:, k, None].to(wide)
        total += torch.where(real[:, None], term, 0.0)
    return out.copy_(total)


def _reduced_on_device(y_AH: Tensor, row_TK: Tensor, gate_TK: Tensor, out: Tensor) -> bool:
    """The Triton kernel, where it runs on this device."""
    try:
        from .gpu.backend import reduce_rows, triton_available
    except ImportError:
        return False
    if not triton_available(y_AH.device) or y_AH.dtype == torch.float64:
        return False
    reduce_rows(y_AH, row_TK, gate_TK.detach().float(), out)
    return True
