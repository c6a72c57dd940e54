"""Time of a step: the device that is done last, and the exchanges around it.

Weights are read by every replica that gets a token, so a replica may cost more than it saves; moves
drop replicas as well as add them. Knows loads per sample and expert, devices and their times;
`token_split.py` keeps the splits. Knows nothing of how samples were made.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ....foundation.arrays import FloatArray, SlotArray
from ....foundation.compiled import RandomState, compiled_part_inline
from ...cost.token_transfers import no_transfers
from .annealer import (
    Change,
    Found,
    Held,
    Moves,
    Schedule,
    SearchSpace,
    anneal,
    begin,
    commit,
    copy_rows,
    copy_values,
    most_loaded,
    prepare,
    try_sample,
)
from .token_split import split_again, split_anew

ANY = 1 << 30               # every sample may be the one to aim at: the mean counts, not the tail
MOVES = Moves(
    aimed=0.7, dearest=ANY, grown=0.25, exchanged=0.6, dropped=0.4, probe=24, margin=3e-3
)
ROUNDS = 4                  # of the fullest device pouring again, per try
FLAT = 1e-3                 # above perfect balance: no rounds below this


class DeviceTimes(NamedTuple):
    """What a device's step takes: start + sum over its replicas with tokens, over its speed.

    A replica of expert e takes read_us_E[e] + tokens · token_us, or by its whole tokens what
    table_us lists, where that is not empty. link_us: of the exchanges, per token of the device with
    most. gather_us: paid where any expert has replicas. rule: how replicas share tokens.
    reference_us: the microseconds that count as 1.
    """

    start_us: float
    read_us_E: Any
    token_us: float
    table_us: Any
    link_us: float
    gather_us: float
    rule: int
    reference_us: float


class StepTime(NamedTuple):
    """Splits and times of every sample, as they are and as the change would have them."""

    times: DeviceTimes
    load_WE: Any        # [W, E] tokens
    speed_G: Any
    load_WG: Any
    flow_WS: Any        # [W, S] tokens of every slot
    us_WG: Any          # microseconds of every device's replicas
    last_W: Any         # int64 device that is done last
    cost_W: Any         # without gathering
    tried_WG: Any
    tried_WS: Any
    tried_us_WG: Any
    tried_last_W: Any
    tried_cost_W: Any
    spare_X: Any        # [2] replicas beyond one of each expert, now and after the change


def improve_step_time(
    space: SearchSpace,
    times: DeviceTimes,
    load_WE: FloatArray,
    slots_GC: SlotArray,
    schedule: Schedule,
    state: RandomState,
) -> Found:
    """Anneal one layer's slots on the mean time of samples, load_WE [W, E] in tokens."""
    samples, devices = len(load_WE), len(slots_GC)
    by_device, by_slot = (samples, devices), (samples, int(np.asarray(space.slots_G).sum()))
    objective = StepTime(
        times, np.ascontiguousarray(load_WE, np.float64), space.speed_G,
        np.zeros(by_device), np.zeros(by_slot), np.zeros(by_device),
        np.zeros(samples, np.int64), np.zeros(samples),
        np.zeros(by_device), np.zeros(by_slot), np.zeros(by_device),
        np.zeros(samples, np.int64), np.zeros(samples), np.zeros(2, np.int64),
    )
    weight_W = np.full(samples, 1.0 / samples)
    return anneal(
        space, objective, weight_W, slots_GC, MOVES, schedule, no_transfers(devices), state
    )


@begin.of(StepTime)
def _begin(objective: StepTime, held: Held, cost_W: Any) -> None:
    for e in range(len(held.replicas_E)):
        objective.spare_X[1] += max(held.replicas_E[e] - 1, 0)
    for w in range(len(cost_W)):
        split_anew(
            objective.times.rule, held, objective.speed_G, objective.load_WE[w],
            objective.tried_WG[w], objective.tried_WS[w], FLAT, 8 * ROUNDS,
        )
        for g in range(len(objective.speed_G)):
            objective.tried_us_WG[w, g] = _device_us(objective, held, w, g)
        cost_W[w] = _cost(objective, w) + _gather(objective)
    _keep(objective)


@prepare.of(StepTime)
def _prepare(objective: StepTime, held: Held, change: Change) -> None:
    objective.spare_X[1] = objective.spare_X[0]
    if change.s2 < 0:
        objective.spare_X[1] += (change.e2 >= 0) - (change.e1 >= 0)


@try_sample.of(StepTime)
def _try_sample(objective: StepTime, held: Held, change: Change, w: int) -> float:
    load_E, load_G, tried_G = objective.load_WE[w], objective.load_WG[w], objective.tried_WG[w]
    copy_values(load_G, tried_G)
    copy_values(objective.flow_WS[w], objective.tried_WS[w])
    copy_values(objective.us_WG[w], objective.tried_us_WG[w])
    used = (change.e1 >= 0 and load_E[change.e1] > 0.0) or (
        change.e2 >= 0 and load_E[change.e2] > 0.0)
    if not used:
        objective.tried_last_W[w] = objective.last_W[w]
        objective.tried_cost_W[w] = objective.cost_W[w]
        return float(objective.cost_W[w] + _gather(objective))
    split_again(
        objective.times.rule, held, change, objective.speed_G, load_E, tried_G,
        objective.tried_WS[w], FLAT, ROUNDS if objective.spare_X[1] > 0 else 0,
    )
    for g in range(len(tried_G)):
        if tried_G[g] != load_G[g] or g == change.g1 or g == change.g2:
            objective.tried_us_WG[w, g] = _device_us(objective, held, w, g)
    return _cost(objective, w) + _gather(objective)


@commit.of(StepTime)
def _commit(objective: StepTime, held: Held, change: Change) -> None:
    _keep(objective)


@most_loaded.of(StepTime)
def _most_loaded(objective: StepTime, held: Held, w: int) -> int:
    return int(objective.last_W[w])


@compiled_part_inline
def _keep(objective: StepTime) -> None:
    """What was tried becomes what is."""
    copy_rows(objective.tried_WG, objective.load_WG)
    copy_rows(objective.tried_WS, objective.flow_WS)
    copy_rows(objective.tried_us_WG, objective.us_WG)
    copy_values(objective.tried_last_W, objective.last_W)
    copy_values(objective.tried_cost_W, objective.cost_W)
    objective.spare_X[0] = objective.spare_X[1]


@compiled_part_inline
def _gather(objective: StepTime) -> float:
    times = objective.times
    return times.gather_us / times.reference_us if objective.spare_X[1] > 0 else 0.0


@compiled_part_inline
def _cost(objective: StepTime, w: int) -> float:
    """Cost of the sample as tried; notes the device that is done last."""
    times, load_G, us_G = objective.times, objective.tried_WG[w], objective.tried_us_WG[w]
    last, longest, most = 0, 0.0, 0.0
    for g in range(len(load_G)):
        if load_G[g] < 1e-9:
            continue
        us = (us_G[g] + times.start_us * min(load_G[g], 1.0)) / objective.speed_G[g]
        most = max(most, load_G[g])
        if us > longest:
            last, longest = g, us
    objective.tried_last_W[w] = last
    objective.tried_cost_W[w] = (longest + times.link_us * most) / times.reference_us
    return float(objective.tried_cost_W[w])


@compiled_part_inline
def _device_us(objective: StepTime, held: Held, w: int, g: int) -> float:
    """What the replicas of one device take together."""
    us = 0.0
    for s in range(held.start_G[g], held.start_G[g + 1]):
        if objective.tried_WS[w, s] > 0.0:
            us += _slot_us(objective.times, held.expert_S[s], objective.tried_WS[w, s])
    return us


@compiled_part_inline
def _slot_us(times: DeviceTimes, e: int, tokens: float) -> float:
    """One replica's time. Below one token, that share of what one takes: tokens are whole."""
    whole = max(tokens, 1.0)
    if len(times.table_us) > 0:
        low = min(int(whole), len(times.table_us) - 2)
        us = times.table_us[low] + (whole - low) * (times.table_us[low + 1] - times.table_us[low])
    else:
        us = times.read_us_E[e] + whole * times.token_us
    return float(us * min(tokens, 1.0))
