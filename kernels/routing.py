"""From router output to slots and back: which rows go where, in what order, how many.

Tensors in, tensors out. Knows token counts per slot (quotas) but nothing of how they were
chosen, nothing of devices' load, networks or plans. CPU tensors take compiled loops, others
torch operations; integers agree exactly, gates to the last bits.

Axes: T tokens, K experts chosen per token, A = T * K assignments in token order (flat index
t * K + k), E experts, S slots, H hidden. A negative id or slot marks an assignment that is left
out everywhere: not counted, not sorted, not computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .backend import RowOrder
from .cpu import loops
from .cpu.gates import COMPILED_DTYPES
from .cpu.scalars import as_array
from .load_record import LoadRecord

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def top_k(logits_TE: Tensor, k: int, *, normalize: bool) -> tuple[Tensor, Tensor]:
    """Choose the k best experts of every token.

    Returns gate_TK float32 and ids_TK int64, best expert first; equal logits go to the lower
    expert id. Gates are the softmax over all experts; with `normalize` the chosen ones are
    rescaled to sum to one (the softmax over the chosen alone). NaN logits give NaN gates, in
    their token only.
    """
    if logits_TE.dim() != 2 or not 1 <= k <= logits_TE.shape[1]:
        raise InputError(
            f"top_k needs logits [T, E] and 1 <= k <= E; got {tuple(logits_TE.shape)} and k={k}"
        )
    logits = logits_TE.detach().float().contiguous()
    if logits.device.type == "cpu":
        gate_TK = torch.empty(len(logits), k)
        ids_TK = torch.empty(len(logits), k, dtype=torch.int64)
        loops.choose_top_k(as_array(logits), normalize, as_array(gate_TK), as_array(ids_TK))
        return gate_TK, ids_TK
    # A stable descending sort keeps the lower id first among equals; torch.topk promises nothing.
    sorted_TE, order_TE = torch.sort(logits, dim=1, descending=True, stable=True)
    ids_TK = order_TE[:, :k].contiguous()
    if normalize:
        return torch.softmax(sorted_TE[:, :k], dim=1), ids_TK
    return torch.softmax(logits, dim=1).gather(1, ids_TK), ids_TK


def check_integers(name: str, tensor: Tensor) -> None:
    """Refuse ids or slots that a conversion would cut to whole numbers."""
    if tensor.dtype not in _INTEGERS:
        raise InputError(f"{name} are {tensor.dtype}; they must be integers, as int32 or int64")


def histogram(ids_TK: Tensor, num_experts: int, *, k_of_token: Tensor | None = None) -> Tensor:
    """Count the tokens of every expert: count_E int64, exact.

    ids outside [0, num_experts) are left out. k_of_token [T]: only the first k_of_token[t]
    choices of token t count.
    """
    if ids_TK.dim() != 2 or (k_of_token is not None and k_of_token.shape != ids_TK.shape[:1]):
        lengths = None if k_of_token is None else tuple(k_of_token.shape)
        raise InputError(
            f"histogram needs ids [T, K] and k_of_token [T]; got {tuple(ids_TK.shape)} "
            f"and {lengths}"
        )
    check_integers("ids", ids_TK)
    ids = ids_TK.long()
    count_E = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    if k_of_token is None:
        k_of_token = torch.full(ids.shape[:1], ids.shape[1], device=ids.device)
    if ids.device.type == "cpu":
        loops.count_ids(
            as_array(ids), as_array(k_of_token.long()), as_array(count_E[:num_experts])
        )
        return count_E[:num_experts]
    choice_K = torch.arange(ids.shape[1], device=ids.device)
    counted = (ids >= 0) & (ids < num_experts) & (choice_K < k_of_token[:, None])
    # One bin beyond the experts collects what is left out: no data-dependent shape, so no sync.
    bins = torch.where(counted, ids, num_experts).flatten()
    return count_E.index_add_(0, bins, torch.ones_like(bins))[:num_experts]


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


@dataclass(frozen=True)
class Routing:
    """Where the assignments of one step go, in every order anyone asks for.

    slot_TK: slot of each, -1 = left out. order_A: flat assignment of each row, slot by slot,
    token order inside. row_TK: row of each assignment in that order, -1 = left out. offset_S:
    [S + 1] first row of each slot. logical_E, physical_S: tokens per expert and per slot.
    All int64.
    """

    slot_TK: Tensor
    order_A: Tensor
    row_TK: Tensor
    offset_S: Tensor
    logical_E: Tensor
    physical_S: Tensor


def route(
    ids_TK: Tensor,
    slot_expert_S: Tensor,
    *,
    quota_S: Tensor | None = None,
    num_experts: int | None = None,
    record: LoadRecord | None = None,
) -> Routing:
    """Everything between chosen experts and sorted rows, in one pass on the host.

    Without quota_S every expert's tokens go to its first slot. record: adds the step's counts
    where its flag is set. See `assign_slots` for the order, the ids left out and the errors.
    """
    device = ids_TK.device
    ids, table, quota, experts = _checked_ids(ids_TK, slot_expert_S, quota_S, num_experts)
    if record is not None:
        record.check(experts, len(table), device)
    slot, order, row = (torch.empty_like(ids) for _ in range(3))
    offset_S = torch.empty(len(table) + 1, dtype=torch.int64)
    logical_E = torch.empty(experts, dtype=torch.int64)
    wrong = loops.route_step(
        as_array(ids.view(-1)),
        as_array(quota),
        as_array(table),
        as_array(logical_E),
        as_array(slot.view(-1)),
        as_array(order.view(-1)),
        as_array(row.view(-1)),
        as_array(offset_S),
    )
    if wrong >= 0:
        raise _quota_error(wrong, ids, quota, table)
    routing = Routing(
        slot_TK=slot.to(device),
        order_A=order.view(-1)[: int(offset_S[-1])].to(device),
        row_TK=row.to(device),
        offset_S=offset_S.to(device),
        logical_E=logical_E.to(device),
        physical_S=offset_S.diff().to(device),
    )
    if record is not None and int(record.enabled):
        record.logical_E += routing.logical_E
        record.physical_S += routing.physical_S
    return routing


def _checked_ids(
    ids_TK: Tensor, slot_expert_S: Tensor, quota_S: Tensor | None, num_experts: int | None
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Ids, slot table and quotas (none: empty) as int64 on the host, and the expert count."""
    if slot_expert_S.dim() != 1 or (quota_S is not None and quota_S.shape != slot_expert_S.shape):
        quotas = None if quota_S is None else tuple(quota_S.shape)
        raise InputError(
            f"quotas {quotas} and slot table {tuple(slot_expert_S.shape)} must both be [slots]"
        )
    check_integers("ids", ids_TK)
    check_integers("experts of the slot table", slot_expert_S)
    if quota_S is not None:
        check_integers("quotas", quota_S)
    ids = ids_TK.detach().cpu().long().contiguous()
    table = slot_expert_S.cpu().long().contiguous()
    experts = max(int(table.max()) + 1 if len(table) else 0, 0)
    if num_experts is None and ids.numel() and int(ids.max()) >= experts:
        raise InputError(f"id {int(ids.max())} is past the slot table's {experts} experts")
    experts = experts if num_experts is None else num_experts
    if quota_S is None:
        return ids, table, torch.empty(0, dtype=torch.int64), experts
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
    placed = int(quota[table == expert].sum()) if len(quota) else 0
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
    slots = slot_TK.long().contiguous()
    if slots.numel() and int(slots.max()) >= num_slots:
        raise InputError(f"slot {int(slots.max())} is past the table of {num_slots} slots")
    order_A, offset_S, row_TK = row_order(slots, num_slots)
    return order_A, offset_S.diff(), row_TK


def row_order(slot_TK: Tensor, num_slots: int) -> RowOrder:
    """`sort_rows` of checked int64 slots."""
    offset_S = torch.zeros(num_slots + 1, dtype=torch.int64, device=slot_TK.device)
    if slot_TK.device.type == "cpu":
        order_A, row_TK = torch.empty(slot_TK.numel(), dtype=torch.int64), torch.empty_like(slot_TK)
        loops.sort_slots(
            as_array(slot_TK.view(-1)), as_array(order_A), as_array(offset_S),
            as_array(row_TK.view(-1)),
        )
        return RowOrder(order_A[: int(offset_S[-1])], offset_S, row_TK)
    row_TK = torch.full_like(slot_TK, -1)
    order_A = torch.argsort(slot_TK.view(-1), stable=True)
    order_A = order_A[int((slot_TK < 0).sum()) :]
    row_TK.view(-1)[order_A] = torch.arange(len(order_A), device=slot_TK.device)
    offset_S[1:] = torch.bincount(slot_TK[slot_TK >= 0], minlength=num_slots).cumsum(0)
    return RowOrder(order_A, offset_S, row_TK)


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
    """The kernel that ends a fused layer, so that rows from other ranks round alike."""
    try:
        from .gpu.backend import reduce_rows, triton_available
    except ImportError:
        return False
    if not triton_available(y_AH.device) or y_AH.dtype == torch.float64:
        return False
    reduce_rows(y_AH, row_TK, gate_TK.detach().float(), out)
    return True
