"""Balance of average loads under an even split: squared overload, in units of perfect balance.

One number per device matters, the sum of its replicas' even shares over its speed, and a move
changes few of them. Knows average loads of one layer, and devices. Knows nothing of samples.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ....foundation.arrays import FloatArray, SlotArray
from ....foundation.compiled import RandomState, compiled_part_inline
from ...cost.token_transfers import no_transfers
from .annealer import (
    Change,
    Held,
    Moves,
    Schedule,
    SearchSpace,
    anneal,
    begin,
    commit,
    copy_values,
    most_loaded,
    prepare,
    try_sample,
)

MOVES = Moves(aimed=0.5, dearest=1, grown=0.2, exchanged=0.7)
ENOUGH = 1e-8               # squared overload of a device on average: nothing left to win
HOT, COLD = 4e-3, 1e-7      # of squared overload; a lower start leaves replica counts as they are
BUDGET_HOT = 3e-5           # within a budget of moves: most hot moves would break it


class EvenAverage(NamedTuple):
    """One sample: the average loads."""

    load_E: Any         # 1 per unit of speed = perfect balance
    speed_G: Any
    load_G: Any         # what each device computes
    tried_G: Any        # the same between tries
    cost_X: Any         # [1]
    fullest_X: Any      # [1] device


def improve_average(
    space: SearchSpace, slots_GC: SlotArray, load_E: FloatArray, moves: int, state: RandomState,
    deadline: float = np.inf,
) -> SlotArray:
    """Anneal one layer's slots on its average loads."""
    total, devices = float(np.sum(load_E)), len(slots_GC)
    objective = EvenAverage(
        np.asarray(load_E, np.float64) * (float(np.sum(space.speed_G)) / max(total, 1e-300)),
        space.speed_G, np.zeros(devices), np.zeros(devices), np.zeros(1), np.zeros(1, np.int64),
    )
    budgeted = len(space.current_EG) > 0
    return anneal(
        space, objective, np.ones(1), slots_GC, MOVES._replace(enough=ENOUGH * devices),
        Schedule(moves, BUDGET_HOT if budgeted else HOT, COLD, deadline),
        no_transfers(devices), state,
        descend=budgeted,
    ).best_GC


@begin.of(EvenAverage)
def _begin(objective: EvenAverage, held: Held, cost_W: Any) -> None:
    for g in range(len(objective.load_G)):
        objective.load_G[g] = 0.0
    for e in range(len(objective.load_E)):
        for r in range(held.replicas_E[e]):
            g = held.device_S[held.slot_ER[e, r]]
            objective.load_G[g] += objective.load_E[e] / held.replicas_E[e]
    copy_values(objective.load_G, objective.tried_G)
    _note(objective)
    cost_W[0] = objective.cost_X[0]


@prepare.of(EvenAverage)
def _prepare(objective: EvenAverage, held: Held, change: Change) -> None:
    pass


@try_sample.of(EvenAverage)
def _try_sample(objective: EvenAverage, held: Held, change: Change, w: int) -> float:
    _share_again(objective, held, change)
    cost = objective.cost_X[0] + _put_back(objective, change.g1)
    if change.s2 >= 0:
        return float(cost + _put_back(objective, change.g2))
    for e in (change.e1, change.e2):
        if e >= 0:
            for r in range(held.replicas_E[e]):
                cost += _put_back(objective, held.device_S[held.slot_ER[e, r]])
    return float(cost)


@commit.of(EvenAverage)
def _commit(objective: EvenAverage, held: Held, change: Change) -> None:
    _share_again(objective, held, change)
    copy_values(objective.tried_G, objective.load_G)
    _note(objective)


@most_loaded.of(EvenAverage)
def _most_loaded(objective: EvenAverage, held: Held, w: int) -> int:
    return int(objective.fullest_X[0])


@compiled_part_inline
def _share_again(objective: EvenAverage, held: Held, change: Change) -> None:
    """tried_G after a change that `held` has made."""
    load_E, tried_G, e1, e2 = objective.load_E, objective.tried_G, change.e1, change.e2
    if change.s2 >= 0:
        less = load_E[e1] / held.replicas_E[e1]
        if e2 >= 0:
            less -= load_E[e2] / held.replicas_E[e2]
        tried_G[change.g1] -= less
        tried_G[change.g2] += less
        return
    if e1 >= 0:
        replicas = held.replicas_E[e1]
        before, after = load_E[e1] / (replicas + 1), load_E[e1] / replicas
        tried_G[change.g1] -= before
        for r in range(replicas):
            tried_G[held.device_S[held.slot_ER[e1, r]]] += after - before
    if e2 >= 0:
        replicas = held.replicas_E[e2]
        before, after = load_E[e2] / (replicas - 1), load_E[e2] / replicas
        tried_G[change.g1] += before
        for r in range(replicas):
            tried_G[held.device_S[held.slot_ER[e2, r]]] += after - before


@compiled_part_inline
def _put_back(objective: EvenAverage, g: int) -> float:
    """What device g adds to the cost of the try, once: tried_G is load_G there again."""
    tried, load, speed = objective.tried_G[g], objective.load_G[g], objective.speed_G[g]
    objective.tried_G[g] = load
    return _square_over(tried, speed) - _square_over(load, speed)


@compiled_part_inline
def _square_over(load: float, speed: float) -> float:
    over = load / speed - 1.0
    return over * over if over > 0.0 else 0.0


@compiled_part_inline
def _note(objective: EvenAverage) -> None:
    """Cost and fullest device of the loads as they are."""
    load_G, speed_G = objective.load_G, objective.speed_G
    cost, fullest = 0.0, 0
    for g in range(len(load_G)):
        cost += _square_over(load_G[g], speed_G[g])
        if load_G[g] * speed_G[fullest] > load_G[fullest] * speed_G[g]:
            fullest = g
    objective.cost_X[0], objective.fullest_X[0] = cost, fullest
