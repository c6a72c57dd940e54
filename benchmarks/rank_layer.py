"""One expert layer of a rank that holds every expert: sort, gather, grouped experts, combine.

What a live rank does on either side of its exchange, with nothing between. Benchmarks time it and
tests check it as a layer; no rank runs it, for a rank always exchanges.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loadmaster.kernels.grouped import ExpertWeights, grouped_experts
from loadmaster.kernels.routing import combine_rows, sort_by_slot


def rank_layer(x_TH: Tensor, slot_TK: Tensor, gate_TK: Tensor, weights: ExpertWeights) -> Tensor:
    """The layer's output [T, H]. slot_TK: the slot of every assignment, negative = left out."""
    order_A, count_S, row_TK = sort_by_slot(slot_TK, weights.shape.slots)
    token_A = order_A.div(max(slot_TK.shape[1], 1), rounding_mode="floor")
    x_AH = x_TH.index_select(0, token_A.to(x_TH.device))
    y_AH = grouped_experts(x_AH, count_S, weights)
    return combine_rows(y_AH, row_TK.to(x_TH.device), gate_TK)


def choose_experts(logits_TE: Tensor, choices: int) -> tuple[Tensor, Tensor]:
    """gate_TK float32 and ids_TK int64: the best experts and the softmax over them alone."""
    best_TK, ids_TK = torch.topk(logits_TE.float(), choices, dim=1)
    return torch.softmax(best_TK, dim=1), ids_TK


def count_tokens(ids_TK: Tensor, num_experts: int) -> Tensor:
    """[E] int64 tokens of every expert, on the CPU."""
    return torch.bincount(ids_TK.flatten().cpu(), minlength=num_experts)
