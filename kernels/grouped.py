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
from .backend import RowOrder
from .load_record import LoadRecord
from .routing import check_integers, route, row_order, top_k
from .segment_table import DispatchTable
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
    Returns y [A, H], rows in the same order, not weighted. On the CPU backends and in bfloat16 a
    row's bits depend on the row and its expert only, as in float32 on panels and packed weights
    (tested over plans, splits and batch sizes); on plain torch that is tested from 8 rows up, to
    which it pads; on a GPU it is what the kernels are written for, and
    `benchmarks/kernels_gpu.py` checks it there. Raises InputError when shapes, dtypes or counts do
    not fit. Counts on a GPU are not read back: there they are cut to the rows given, and rows that
    no count reaches come out as zeros.
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
    table: DispatchTable | None = None,
    quota_S: Tensor | None = None,
    record: LoadRecord | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One whole expert layer in one process: route, compute, combine. Returns [T, H].

    ids_TK: the experts chosen; gate_TK: their weights. table, quota_S, record: as in
    `moe_layer_from_logits`. slot_TK instead of these: the slot of every assignment
    (`assign_slots`). Negative ids or slots, and an id equal to the number of experts
    (transformers' mark for one that lives elsewhere), are left out: they add nothing to their
    token. What lies past that is refused on the CPU and left out on a GPU, where nothing is read
    back.
    """
    _check_rows(x_TH, weights)
    if ids_TK.dim() != 2 or len(ids_TK) != len(x_TH) or gate_TK.shape != ids_TK.shape:
        raise InputError(
            f"x is {tuple(x_TH.shape)}, ids {tuple(ids_TK.shape)}, gates {tuple(gate_TK.shape)}; "
            "ids and gates must both be [T, K]"
        )
    check_integers("ids", ids_TK)
    experts = _check_table(weights, table, quota_S, record)
    if slot_TK is None:
        _check_range("id", ids_TK, experts + 1, f"{experts} experts")
    else:
        if table is not None or quota_S is not None or record is not None:
            raise InputError("give slot_TK, or what slots are made from: table, quota_S, record")
        if slot_TK.shape != ids_TK.shape:
            raise InputError(f"slot_TK is {tuple(slot_TK.shape)}; it must be {tuple(ids_TK.shape)}")
        check_integers("slots", slot_TK)
        _check_range("slot", slot_TK, experts, f"{experts} slots")
        ids_TK = slot_TK
    out = _output_like(x_TH, out)
    x_TH, gate_TK = x_TH.detach(), gate_TK.detach().float().contiguous()
    if weights.router is not None:
        weights.router.layer_from_ids(x_TH, ids_TK, gate_TK, table, quota_S, record, out)
    else:
        order = _order_on_host(ids_TK.long(), weights, experts, table, quota_S, record)
        weights.run_layer(x_TH, order, gate_TK, out)
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
    experts = _check_table(weights, table, quota_S, record)
    if experts != logits_TE.shape[1]:
        raise InputError(
            f"the slot table holds {experts} experts in {weights.slots} slots; the logits name "
            f"{logits_TE.shape[1]} experts"
        )
    out = _output_like(x_TH, out)
    x_TH, logits_TE = x_TH.detach(), logits_TE.detach()
    if weights.router is not None:
        weights.router.layer_from_logits(
            x_TH, logits_TE, k, normalize, table, quota_S, record, out
        )
        return out
    gate_TK, ids_TK = top_k(logits_TE, k, normalize=normalize)
    order = _order_on_host(ids_TK, weights, experts, table, quota_S, record)
    weights.run_layer(x_TH, order, gate_TK, out)
    return out


def _order_on_host(
    ids_TK: Tensor,
    weights: ExpertWeights,
    experts: int,
    table: DispatchTable | None,
    quota_S: Tensor | None,
    record: LoadRecord | None,
) -> RowOrder:
    """Sort checked int64 ids once, by slot; through the table where there is one."""
    if table is None and quota_S is None and record is None:
        return row_order(torch.where(ids_TK >= experts, -1, ids_TK).contiguous(), experts)
    slot_expert = list(range(experts)) if table is None else table.slot_expert_S
    routing = route(
        ids_TK, torch.tensor(slot_expert), quota_S=quota_S, num_experts=experts, record=record
    )
    return RowOrder(routing.order_A, routing.offset_S, routing.row_TK)


def _check_table(
    weights: ExpertWeights,
    table: DispatchTable | None,
    quota_S: Tensor | None,
    record: LoadRecord | None,
) -> int:
    """Table, quotas and record fit the weights and stand where they do; returns the experts."""
    experts = weights.slots if table is None else table.experts
    if table is not None and len(table.slot_expert_S) != weights.slots:
        raise InputError(
            f"the slot table holds {experts} experts in {len(table.slot_expert_S)} slots; "
            f"the weights have {weights.slots} slots"
        )
    if table is not None and table.segment_slot.device != weights.device:
        raise InputError(
            f"the slot table is on {table.segment_slot.device}, the weights on {weights.device}"
        )
    if quota_S is None and table is not None and table.has_replicas:
        raise InputError("an expert stands in several slots: give quota_S, the tokens of each")
    if quota_S is not None:
        check_integers("quotas", quota_S)
        if tuple(quota_S.shape) != (weights.slots,) or quota_S.device != weights.device:
            raise InputError(
                f"quota_S is {tuple(quota_S.shape)} on {quota_S.device}; "
                f"it must be [{weights.slots}] on {weights.device}"
            )
    if record is not None:
        record.check(experts, weights.slots, weights.device)
    return experts


def _check_range(name: str, number_TK: Tensor, limit: int, table: str) -> None:
    if number_TK.device.type != "cpu" or not number_TK.numel():
        return
    if int(number_TK.max()) >= limit:
        raise InputError(f"{name} {int(number_TK.max())} is past the table of {table}")


def _output_like(x: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.shape != x.shape or out.dtype != x.dtype or out.device != x.device:
        raise InputError(
            f"out is {tuple(out.shape)} {out.dtype} on {out.device}; "
            f"it must be {tuple(x.shape)} {x.dtype} on {x.device}"
        )
    if out.requires_grad:
        raise InputError("out requires grad; the layer has no backward: give out.detach()")
    if any(size > 1 and not step for size, step in zip(out.shape, out.stride(), strict=True)):
        raise InputError("out is expanded: its rows share memory; give one that owns its rows")
    return out


def _check_rows(x: Tensor, weights: ExpertWeights) -> None:
    if x.dim() != 2 or x.shape[1] != weights.hidden:
        raise InputError(f"rows are {tuple(x.shape)}; they must be [rows, {weights.hidden}]")
    if x.dtype != weights.dtype or x.device != weights.device:
        raise InputError(
            f"rows are {x.dtype} on {x.device} but the weights {weights.dtype} on "
            f"{weights.device}; convert one of them"
        )
