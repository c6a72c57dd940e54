"""From chosen experts to slots and back: which rows go where, in what order, how many.

Tensors in, tensors out. Knows token counts per slot (quotas) but nothing of how they were
chosen, nothing of devices' load, networks or plans. Ids and slots are sorted on the CPU, where
dispatch is decided; rows are combined where they lie.

Axes: T tokens, K experts chosen per token, A = T * K assignments in token order (flat index
t * K + k), E experts, S slots, H hidden. A negative id or slot marks an assignment that is left
out everywhere: not counted, not sorted, not computed.
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
    """Refuse ids or slots that a conversion would cut to whole numbers."""
    if tensor.dtype not in _INTEGERS:
        raise InputError(f"{name} are {tensor.dtype}; they must be integers, as int32 or int64")


def histogram(ids_TK: Tensor, num_experts: int) -> Tensor:
    """Count the tokens of every expert: count_E int64 on the CPU, exact.

    ids outside [0, num_experts) are left out.
    """
    if ids_TK.dim() != 2:
        raise InputError(f"histogram needs ids [T, K]; got {tuple(ids_TK.shape)}")
    check_integers("ids", ids_TK)
    count_E = torch.zeros(num_experts, dtype=torch.int64)
    loops.count_ids(as_array(ids_TK.detach().cpu().long().flatten()), as_array(count_E))
    return count_E


def assign_slots(
    ids_TK: Tensor, quota_S: Tensor, slot_expert_S: Tensor, *, num_experts: int | None = None
) -> Tensor:
    """Give every assignment of one home rank the slot that computes it: slot_TK int64.

    quota_S: [S] whole tokens this home rank sends to each slot. slot_expert_S: [S] the expert in
    each slot, -1 = empty. Within an expert, assignments in token order fill its slots in
    ascending slot order. Negative ids, and ids >= num_experts where that is given, get -1; without
    it an id past the table's experts is refused. Runs on the CPU, where quotas are made. Raises
    InputError unless the quotas of every expert sum to its assignments.
    """
    ids, table, quota, experts = _checked_ids(ids_TK, slot_expert_S, quota_S, num_experts)
    slot_TK = torch.empty_like(ids)
    wrong = loops.fill_slots(
        as_array(ids.view(-1)),
        as_array(quota),
        as_array(table),
        experts,
        as_array(slot_TK.view(-1)),
    )
    if wrong >= 0:
        raise _quota_error(wrong, ids, quota, table)
    return slot_TK.to(ids_TK.device)


def _checked_ids(
    ids_TK: Tensor, slot_expert_S: Tensor, quota_S: Tensor, num_experts: int | None
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Ids, slot table and quotas as int64 on the CPU, and the number of experts."""
    if slot_expert_S.dim() != 1 or quota_S.shape != slot_expert_S.shape:
        raise InputError(
            f"quotas {tuple(quota_S.shape)} and slot table {tuple(slot_expert_S.shape)} must both "
            "be [slots]"
        )
    check_integers("ids", ids_TK)
    check_integers("experts of the slot table", slot_expert_S)
    check_integers("quotas", quota_S)
    ids = ids_TK.detach().cpu().long().contiguous()
    table = slot_expert_S.cpu().long().contiguous()
    experts = max(int(table.max()) + 1 if len(table) else 0, 0)
    if num_experts is None and ids.numel() and int(ids.max()) >= experts:
        raise InputError(f"id {int(ids.max())} is past the slot table's {experts} experts")
    experts = experts if num_experts is None else num_experts
    quota = quota_S.cpu().long().contiguous()
    _check_quotas(quota, table, experts)
    return ids, table, quota, experts


def _check_quotas(quota: Tensor, table: Tensor, experts: int) -> None:
    """Quotas stand on slots that hold an expert of the layer, and are not negative."""
    misplaced = (quota < 0) | ((quota > 0) & ((table < 0) | (table >= experts)))
    if misplaced.any():
        slot = int(misplaced.nonzero()[0, 0])
        raise InputError(
            f"slot {slot} has a quota of {int(quota[slot])} but holds expert {int(table[slot])} of "
            f"{experts} (-1: none); quotas are >= 0, and 0 where no such expert stands"
        )


def _quota_error(expert: int, ids: Tensor, quota: Tensor, table: Tensor) -> InputError:
    placed = int(quota[table == expert].sum())
    return InputError(
        f"expert {expert} has {int((ids == expert).sum())} assignments but quotas for {placed}; "
        "compute the quotas from these ids"
    )


def sort_by_slot(slot_TK: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """Order the kept assignments by slot, token order inside a slot.

    Returns order_A int64 (flat assignment indices; only those with slot >= 0) and count_S int64.
    Raises InputError for a slot past the table.
    """
    order_A, count_S, _ = sort_rows(slot_TK, num_slots)
    return order_A, count_S


def sort_rows(slot_TK: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """`sort_by_slot`, and row_TK: the row of every assignment in that order, -1 if left out."""
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
