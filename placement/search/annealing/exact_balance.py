"""Balance on up to ten devices, by the exact best split of every sample.

With few devices the best fluid split of a sample has a closed form: the largest, over device
subsets Q, of the load of experts whose replicas all lie in Q, over the speed of Q (max-flow and
min-cut). Each sample keeps that load for all 2^G subsets; a move changes one or two experts' device
sets, so the new table is the old one plus two terms.

Knows loads per sample and expert, and devices. Knows nothing of how samples were made.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ....foundation.arrays import FloatArray, SlotArray
from ....foundation.compiled import (
    RandomState,
    compiled_finite,
    compiled_part,
    compiled_part_inline,
)
from ...cost.token_transfers import TransferModel
from .annealer import (
    Change,
    Found,
    Held,
    Moves,
    Overload,
    Schedule,
    SearchSpace,
    anneal,
    begin,
    commit,
    most_loaded,
    overload_cost,
    prepare,
    try_sample,
)

MOST_DEVICES = 10
MOVES = Moves(aimed=0.0, dearest=1, exchanged=0.5)   # the peak is a set's: no device to aim at


class ExactBalance(NamedTuple):
    """Q = 2^G device subsets, as bit masks."""

    load_WE: Any        # [W, E] float32
    rate_Q: Any         # [Q] float32, 1 over the subset's speed
    overload: Overload
    table_WQ: Any       # [W, Q] float32 load of experts whose devices all lie in the subset
    mask_E: Any         # [E] int64 devices of each expert
    change_XQ: Any      # [2, Q] float32 what the change of e1, e2 adds to a row, per token


def improve_exact_balance(
    space: SearchSpace,
    load_WE: FloatArray,
    weight_W: FloatArray,
    slots_GC: SlotArray,
    schedule: Schedule,
    overload: Overload,
    transfers: TransferModel,
    state: RandomState,
) -> Found:
    """Anneal one layer's slots on exact splits of given samples.

    load_WE [W, E]: every sample scaled so that perfect balance is 1 (its sum is the speeds' sum).
    """
    samples, experts = load_WE.shape
    speed_Q = subset_speed(space.speed_G)
    objective = ExactBalance(
        np.ascontiguousarray(load_WE, np.float32), (1.0 / speed_Q).astype(np.float32), overload,
        np.zeros((samples, len(speed_Q)), np.float32), np.zeros(experts, np.int64),
        np.zeros((2, len(speed_Q)), np.float32),
    )
    return anneal(space, objective, weight_W, slots_GC, MOVES, schedule, transfers, state)


def subset_speed(speed_G: FloatArray) -> FloatArray:
    """[2^G] total speed of every device subset; a huge one for the empty set."""
    bits = (np.arange(1 << len(speed_G))[:, None] >> np.arange(len(speed_G))) & 1
    speed_Q = np.asarray(bits @ speed_G, np.float64)
    speed_Q[0] = np.finfo(np.float32).max
    return speed_Q


@begin.of(ExactBalance)
def _begin(objective: ExactBalance, held: Held, cost_W: Any) -> None:
    nothing = np.float32(0.0)
    for e in range(len(objective.mask_E)):
        objective.mask_E[e] = _mask(held, e)
    for w in range(len(cost_W)):
        _fill_table(objective.load_WE[w], objective.mask_E, objective.table_WQ[w])
        cost_W[w] = _row_cost(objective, w, nothing, nothing)


@prepare.of(ExactBalance)
def _prepare(objective: ExactBalance, held: Held, change: Change) -> None:
    if change.e1 >= 0:
        _mark_change(objective.change_XQ[0], objective.mask_E[change.e1], _mask(held, change.e1))
    if change.e2 >= 0:
        _mark_change(objective.change_XQ[1], objective.mask_E[change.e2], _mask(held, change.e2))


@try_sample.of(ExactBalance)
def _try_sample(objective: ExactBalance, held: Held, change: Change, w: int) -> float:
    first = objective.load_WE[w, change.e1] if change.e1 >= 0 else np.float32(0.0)
    second = objective.load_WE[w, change.e2] if change.e2 >= 0 else np.float32(0.0)
    return _row_cost(objective, w, first, second)


@commit.of(ExactBalance)
def _commit(objective: ExactBalance, held: Held, change: Change) -> None:
    first_Q, second_Q = objective.change_XQ[0], objective.change_XQ[1]
    for w in range(len(objective.load_WE)):
        first = objective.load_WE[w, change.e1] if change.e1 >= 0 else np.float32(0.0)
        second = objective.load_WE[w, change.e2] if change.e2 >= 0 else np.float32(0.0)
        for q in range(len(first_Q)):
            objective.table_WQ[w, q] += first * first_Q[q] + second * second_Q[q]
    if change.e1 >= 0:
        objective.mask_E[change.e1] = _mask(held, change.e1)
    if change.e2 >= 0:
        objective.mask_E[change.e2] = _mask(held, change.e2)


@most_loaded.of(ExactBalance)
def _most_loaded(objective: ExactBalance, held: Held, w: int) -> int:
    return 0


@compiled_part_inline
def _row_cost(objective: ExactBalance, w: int, first: Any, second: Any) -> float:
    peak = _worst_subset(
        objective.table_WQ[w], objective.change_XQ[0], objective.change_XQ[1], first, second,
        objective.rate_Q,
    )
    return overload_cost(objective.overload, peak)


@compiled_finite
def _worst_subset(
    row_Q: Any, first_Q: Any, second_Q: Any, first: Any, second: Any, rate_Q: Any
) -> Any:
    """Largest load over speed after adding first·first_Q + second·second_Q to a sample's row."""
    worst = np.float32(0.0)
    for q in range(len(row_Q)):
        value = (row_Q[q] + first * first_Q[q] + second * second_Q[q]) * rate_Q[q]
        worst = max(worst, value)
    return worst


@compiled_part
def _mask(held: Held, e: int) -> int:
    """Bit g is set where device g holds expert e."""
    mask = 0
    for r in range(held.replicas_E[e]):
        mask |= 1 << held.device_S[held.slot_ER[e, r]]
    return mask


@compiled_part
def _fill_table(load_E: Any, mask_E: Any, row_Q: Any) -> None:
    for e in range(len(mask_E)):
        row_Q[mask_E[e]] += load_E[e]
    bit = 1
    while bit < len(row_Q):         # every cell becomes the sum over its device set's subsets
        for q in range(len(row_Q)):
            if q & bit:
                row_Q[q] += row_Q[q ^ bit]
        bit <<= 1


@compiled_part
def _mark_change(change_Q: Any, before: int, after: int) -> None:
    """change_Q[q] = [after ⊆ q] − [before ⊆ q]."""
    for q in range(len(change_Q)):
        change_Q[q] = np.float32((q & after) == after) - np.float32((q & before) == before)
