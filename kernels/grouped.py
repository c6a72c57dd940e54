"""The one entry to the grouped gated expert MLP; chooses the backend.

Knows the weights of one layer's local slots and rows sorted by slot; knows nothing of experts'
names, plans, ranks or networks. Callers never name a backend, except to test one.

Axes: A rows (one per assignment), S local slots, H hidden, I intermediate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from .activation import ExpertActivation
from .dispatch_table import DispatchTable
from .load_record import LoadRecord
from .routing import check_integers, route, top_k
from .weights import BACKENDS, ExpertWeights

__all__ = [
    "BACKENDS",
    "DispatchTable",
    "ExpertActivation",
    "ExpertWeights",
    "LoadRecord",
    "grouped_experts",
    "moe_layer",
    "moe_layer_from_logits",
]


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
    out = _output_like(x_AH, out)
    if len(x_AH):
        weights.run(x_AH.detach(), count_S, out)
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

    ids_TK: the experts chosen; gate_TK: their weights. slot_TK: the slot of every assignment
    (`assign_slots`); without it expert e stands in slot e. Negative ids or slots, and an id
    equal to the number of slots (transformers' mark for an expert that lives elsewhere), are
    left out: they add nothing to their token.
    """
    _check_rows(x_TH, weights)
    if ids_TK.dim() != 2 or len(ids_TK) != len(x_TH) or gate_TK.shape != ids_TK.shape:
        raise InputError(
            f"x is {tuple(x_TH.shape)}, ids {tuple(ids_TK.shape)}, gates {tuple(gate_TK.shape)}; "
            "ids and gates must both be [T, K]"
        )
    check_integers("ids", ids_TK)
    if slot_TK is None:
        slot_TK = torch.where(ids_TK == weights.slots, -1, ids_TK)
    if slot_TK.shape != ids_TK.shape:
        raise InputError(f"slot_TK is {tuple(slot_TK.shape)}; it must be {tuple(ids_TK.shape)}")
    check_integers("slots", slot_TK)
    if slot_TK.device.type == "cpu" and slot_TK.numel() and int(slot_TK.max()) >= weights.slots:
        raise InputError(
            f"slot {int(slot_TK.max())} is past the table of {weights.slots} slots"
        )
    out = _output_like(x_TH, out)
    gate = gate_TK.detach().float().contiguous()
    weights.run_layer(x_TH.detach(), slot_TK.long().contiguous(), gate, out)
    return out


def moe_layer_from_logits(
    x_TH: Tensor,
    logits_TE: Tensor,
    weights: ExpertWeights,
    *,
    k: int,
    normalize: bool,
    table: DispatchTable | None = None,
    quota_S: Tensor | None = None,
    record: LoadRecord | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`moe_layer` from router logits: top-k, replicas, counts and the layer. Returns [T, H].

    table: the expert of every slot; without it expert e stands in slot e. quota_S: [slots] tokens
    of this step for every slot, needed where an expert has several. record: adds this step's
    tokens per expert and per slot where its flag is set. On a GPU nothing waits for the device;
    quotas that do not add up are settled by an expert's last slot there, refused on the CPU.
    """
    _check_rows(x_TH, weights)
    if logits_TE.dim() != 2 or len(logits_TE) != len(x_TH) or not 1 <= k <= logits_TE.shape[1]:
        raise InputError(
            f"x is {tuple(x_TH.shape)} and logits {tuple(logits_TE.shape)}; logits must be [T, E] "
            f"and k from 1 to E, not {k}"
        )
    experts = weights.slots if table is None else table.experts
    listed = weights.slots if table is None else len(table.slot_expert_S)
    if experts != logits_TE.shape[1] or listed != weights.slots:
        raise InputError(
            f"the slot table holds {experts} experts in {listed} slots; the logits name "
            f"{logits_TE.shape[1]} experts and the weights {weights.slots} slots"
        )
    if quota_S is None and table is not None and table.has_replicas:
        raise InputError("an expert stands in several slots: give quota_S, the tokens of each")
    if quota_S is not None and tuple(quota_S.shape) != (weights.slots,):
        raise InputError(f"quota_S is {tuple(quota_S.shape)}; it must be [{weights.slots}]")
    out = _output_like(x_TH, out)
    x_TH, logits_TE = x_TH.detach(), logits_TE.detach()
    if weights.run_from_logits(x_TH, logits_TE, k, normalize, table, quota_S, record, out):
        return out
    gate_TK, ids_TK = top_k(logits_TE, k, normalize=normalize)
    slot_expert = list(range(weights.slots)) if table is None else table.slot_expert_S
    routing = route(ids_TK, torch.tensor(slot_expert), quota_S=quota_S, record=record)
    weights.run_layer(x_TH, routing.slot_TK, gate_TK, out)
    return out


def _output_like(x: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.shape != x.shape or out.dtype != x.dtype or out.device != x.device:
        raise InputError(
            f"out is {tuple(out.shape)} {out.dtype} on {out.device}; "
            f"it must be {tuple(x.shape)} {x.dtype} on {x.device}"
        )
    return out


def _check_rows(x: Tensor, weights: ExpertWeights) -> None:
    if x.dim() != 2 or x.shape[1] != weights.hidden:
        raise InputError(f"rows are {tuple(x.shape)}; they must be [rows, {weights.hidden}]")
    if x.dtype != weights.dtype or x.device != weights.device:
        raise InputError(
            f"rows are {x.dtype} on {x.device} but the weights {weights.dtype} on "
            f"{weights.device}; convert one of them"
        )
