"""From router output to slots and back: which rows go where, in what order, how many.

Tensors in, tensors out. Knows token counts per slot (quotas) but nothing of how they were
chosen, nothing of devices' load, networks or plans.

Axes: T tokens, K experts chosen per token, A = T * K assignments in token order (flat index
t * K + k), E experts, S slots, H hidden. A negative id or slot marks an assignment that is left
out everywhere: not counted, not sorted, not computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError


def top_k(logits_TE: Tensor, k: int, *, normalize: bool) -> tuple[Tensor, Tensor]:
    """Choose the k best experts of every token.

    Returns gate_TK float32 and ids_TK int64, best expert first; equal logits go to the lower
    expert id. Gates are the softmax over all experts; with `normalize` the chosen ones are
    rescaled to sum to one (the softmax over the chosen alone).
    """
    if logits_TE.dim() != 2 or not 1 <= k <= logits_TE.shape[1]:
        raise InputError(
            f"top_k needs logits [T, E] and 1 <= k <= E; got {tuple(logits_TE.shape)} and k={k}"
        )
    logits = logits_TE.float()
    # A stable descending sort keeps the lower id first among equals; torch.topk promises nothing.
    sorted_TE, order_TE = torch.sort(logits, dim=1, descending=True, stable=True)
    ids_TK = order_TE[:, :k].contiguous()
    if normalize:
        return torch.softmax(sorted_TE[:, :k], dim=1), ids_TK
    return torch.softmax(logits, dim=1).gather(1, ids_TK), ids_TK


def histogram(ids_TK: Tensor, num_experts: int, *, k_of_token: Tensor | None = None) -> Tensor:
    """Count the tokens of every expert: count_E int64.

    ids outside [0, num_experts) are left out. k_of_token [T]: only the first k_of_token[t]
    choices of token t count.
    """
    ids = ids_TK.long()
    counted = (ids >= 0) & (ids < num_experts)
    if k_of_token is not None:
        choice_K = torch.arange(ids.shape[1], device=ids.device)
        counted &= choice_K < k_of_token[:, None]
    # One bin beyond the experts collects what is left out: no data-dependent shape, so no sync.
    bins = torch.where(counted, ids, num_experts).flatten()
    count = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    return count.index_add_(0, bins, torch.ones_like(bins))[:num_experts]


def assign_slots(
    ids_TK: Tensor, quota_S: Tensor, slot_expert_S: Tensor, *, num_experts: int | None = None
) -> Tensor:
    """Give every assignment of one home rank the slot that computes it: slot_TK int64.

    quota_S: [S] whole tokens this home rank sends to each slot. slot_expert_S: [S] the expert in
    each slot, -1 = empty. Within an expert, assignments in token order fill its slots in
    ascending slot order. Negative ids, and ids >= num_experts where that is given, get -1.
    Raises InputError unless the quotas of every expert sum to its assignments.
    """
    if quota_S.shape != slot_expert_S.shape or quota_S.dim() != 1:
        raise InputError(
            f"quotas {tuple(quota_S.shape)} and slot table {tuple(slot_expert_S.shape)} "
            "must both be [slots]"
        )
    ids = ids_TK.flatten().long()
    kept = ids >= 0 if num_experts is None else (ids >= 0) & (ids < num_experts)
    assignment = kept.nonzero().flatten()
    by_expert = assignment[torch.argsort(ids[assignment], stable=True)]
    # Slots ordered by expert, each repeated quota times, line up with assignments by expert.
    slot_order = torch.argsort(slot_expert_S, stable=True)
    slot_order = slot_order[slot_expert_S[slot_order] >= 0]
    filled = torch.repeat_interleave(slot_order, quota_S[slot_order].long())
    if len(filled) != len(by_expert) or not torch.equal(
        slot_expert_S[filled].long(), ids[by_expert]
    ):
        raise InputError(
            f"quotas place {int(quota_S.sum())} tokens but do not match the {len(by_expert)} "
            "assignments expert by expert; compute the quotas from these ids"
        )
    slot = torch.full_like(ids, -1)
    slot[by_expert] = filled
    return slot.view(ids_TK.shape)


def sort_by_slot(slot_TK: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """Order the kept assignments by slot, token order inside a slot.

    Returns order_A int64 (flat assignment indices; only those with slot >= 0) and count_S int64.
    Raises InputError for a slot past the table.
    """
    slots = slot_TK.flatten().long()
    if slots.numel() and int(slots.max()) >= num_slots:
        raise InputError(f"slot {int(slots.max())} is past the table of {num_slots} slots")
    order = torch.argsort(slots, stable=True)
    left_out = int((slots < 0).sum())
    return order[left_out:], histogram(slot_TK, num_slots)


def combine(y_TKH: Tensor, gate_TK: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Sum every token's expert outputs with its gates, in the token's own order: [T, H].

    y_TKH: expert outputs [T, K, H] in flat (t, k) order. Sums in float32, choice 0 first, then
    rounds once to y's dtype; a token's bits depend on nothing but its own row. NaN stays in its
    token. Rows of assignments that were left out must be zero.
    """
    if y_TKH.dim() != 3 or tuple(gate_TK.shape) != tuple(y_TKH.shape[:2]):
        raise InputError(
            f"combine needs y [T, K, H] and gates [T, K]; got {tuple(y_TKH.shape)} "
            f"and {tuple(gate_TK.shape)}"
        )
    tokens, choices, hidden = y_TKH.shape
    total = torch.zeros(tokens, hidden, dtype=torch.float32, device=y_TKH.device)
    gate = gate_TK.float()
    for k in range(choices):
        total += y_TKH[:, k].float() * gate[:, k, None]
    if out is None:
        return total.to(y_TKH.dtype)
    return out.copy_(total)
