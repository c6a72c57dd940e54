"""Balance on many devices, by splits that are kept and corrected rather than solved anew.

Knows loads per sample and expert, and devices; `token_split.py` keeps the splits. Knows nothing of
how samples were made.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ....foundation.arrays import FloatArray, SlotArray
from ....foundation.compiled import RandomState
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
    copy_rows,
    copy_values,
    most_loaded,
    overload_cost,
    prepare,
    try_sample,
)
from .token_split import LEVEL, fullest_device, split_again, split_anew

MOVES = Moves(aimed=0.7, dearest=8, grown=0.1, exchanged=0.8)
ROUNDS = 8                  # of the fullest device pouring again, per try
FLAT = 1e-4                 # above perfect balance: no rounds below this


class WaterFilled(NamedTuple):
    """Splits of every sample, as they are and as the change would have them."""

    load_WE: Any
    speed_G: Any
    overload: Overload
    load_WG: Any
    flow_WS: Any        # [W, S] tokens of every slot
    tried_WG: Any
    tried_WS: Any


def improve_water_filled(
    space: SearchSpace,
    load_WE: FloatArray,
    weight_W: FloatArray,
    slots_GC: SlotArray,
    schedule: Schedule,
    overload: Overload,
    transfers: TransferModel,
    state: RandomState,
) -> Found:
    """Anneal one layer's slots on splits of given samples.

    load_WE [W, E]: every sample scaled so that perfect balance is 1 (its sum is the speeds' sum).
    """
    by_device = (len(load_WE), len(slots_GC))
    by_slot = (len(load_WE), int(np.asarray(space.slots_G).sum()))
    objective = WaterFilled(
        np.ascontiguousarray(load_WE, np.float64), space.speed_G, overload,
        np.zeros(by_device), np.zeros(by_slot), np.zeros(by_device), np.zeros(by_slot),
    )
    return anneal(space, objective, weight_W, slots_GC, MOVES, schedule, transfers, state)


@begin.of(WaterFilled)
def _begin(objective: WaterFilled, held: Held, cost_W: Any) -> None:
    for w in range(len(cost_W)):
        peak = split_anew(
            LEVEL, held, objective.speed_G, objective.load_WE[w], objective.load_WG[w],
            objective.flow_WS[w], FLAT, 4 * ROUNDS,
        )
        cost_W[w] = overload_cost(objective.overload, peak)


@prepare.of(WaterFilled)
def _prepare(objective: WaterFilled, held: Held, change: Change) -> None:
    pass


@try_sample.of(WaterFilled)
def _try_sample(objective: WaterFilled, held: Held, change: Change, w: int) -> float:
    copy_values(objective.load_WG[w], objective.tried_WG[w])
    copy_values(objective.flow_WS[w], objective.tried_WS[w])
    peak = split_again(
        LEVEL, held, change, objective.speed_G, objective.load_WE[w], objective.tried_WG[w],
        objective.tried_WS[w], FLAT, ROUNDS,
    )
    return overload_cost(objective.overload, peak)


@commit.of(WaterFilled)
def _commit(objective: WaterFilled, held: Held, change: Change) -> None:
    copy_rows(objective.tried_WG, objective.load_WG)
    copy_rows(objective.tried_WS, objective.flow_WS)


@most_loaded.of(WaterFilled)
def _most_loaded(objective: WaterFilled, held: Held, w: int) -> int:
    return fullest_device(objective.load_WG[w], objective.speed_G)
