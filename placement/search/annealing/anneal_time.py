"""Annealing of one layer's placement on the mean time of its steps: the loop of `search_time.py`.

Moves swap two slots, drop a replica, or add one. `step_times.py` says what a step takes. Knows
numbers only.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ....foundation.compiled import RandomState, compiled, next_below, next_random
from .annealer import Annealing, SearchSpace, moves_price_change
from .step_time import ALIKE, DeviceTimes, Holders, Layout, split_afresh, step_cost, try_step

PROBED = 12                     # steps after which a move that lost so far is given up
PROBE_MARGIN = 3e-3             # what it may have lost by then, in units of the reference


@compiled
def _holds(layout: Layout, held: Holders, e: int, g: int) -> bool:
    for r in range(held.replicas_E[e]):
        if layout.device_S[held.slot_ER[e, r]] == g:
            return True
    return False


@compiled
def _turn(held: Holders, e: int, old: int, new: int) -> None:
    """Expert e's replica in slot `old` goes to `new`; old < 0 adds one, new < 0 removes it."""
    slot_R, replicas_E = held.slot_ER[e], held.replicas_E
    if old < 0:
        slot_R[replicas_E[e]] = new
        replicas_E[e] += 1
        return
    last = replicas_E[e] - 1
    for r in range(replicas_E[e]):
        if slot_R[r] == old:
            if new >= 0:
                slot_R[r] = new
            else:
                slot_R[r] = slot_R[last]
                replicas_E[e] = last
            return


@compiled
def _change(held: Holders, s1: int, e1: int, s2: int, e2: int) -> None:
    """Slot s1 turns from e1 to e2, and s2 (if any) from e2 to e1; -1 = empty."""
    held.expert_S[s1] = e2
    if s2 >= 0:
        held.expert_S[s2] = e1
    if e1 >= 0:
        _turn(held, e1, s1, s2)
    if e2 >= 0:
        _turn(held, e2, s2, s1)


@compiled
def _propose(layout: Layout, held: Holders, slowest: int, state: RandomState) -> Any:
    """(s1, e1, s2, e2) as for `_change`; it may break a rule.

    Begins at the slowest device of a step, seven times in ten. An expert there changes places with
    another (or an empty slot), loses this replica, or gets one more elsewhere, in an empty slot or
    instead of another's replica; an empty slot takes any expert.
    """
    g1 = slowest if next_random(state) < 0.7 else next_below(state, len(layout.speed_G))
    first, last = layout.start_G[g1], layout.start_G[g1 + 1]
    if first == last:      # no slots there: a change of nothing into itself, which no rule allows
        return 0, held.expert_S[0], -1, held.expert_S[0]
    s1 = first + next_below(state, last - first)
    e1 = held.expert_S[s1]
    if e1 < 0:
        return s1, e1, -1, next_below(state, len(held.replicas_E))
    kind = next_random(state)
    if held.replicas_E[e1] > 1 and kind < 0.3:
        return s1, e1, -1, -1
    s2 = next_below(state, len(held.expert_S))
    if kind < 0.55:
        return s2, held.expert_S[s2], -1, e1
    return s1, e1, s2, held.expert_S[s2]


@compiled
def _legal(
    space: SearchSpace, layout: Layout, held: Holders, room_G: Any, s1: int, e1: int, s2: int,
    e2: int,
) -> bool:
    """Whether a move keeps every expert somewhere, never twice on a device, and memory."""
    if e1 == e2:
        return False
    g1 = layout.device_S[s1]
    growth = (space.size_E[e2] if e2 >= 0 else 0.0) - (space.size_E[e1] if e1 >= 0 else 0.0)
    if growth > room_G[g1] or (e2 >= 0 and _holds(layout, held, e2, g1)):
        return False
    if s2 < 0:
        if e1 >= 0 and held.replicas_E[e1] == 1:
            return False
        return e2 < 0 or (held.replicas_E[e2] < held.slot_ER.shape[1] and (e1 >= 0 or space.fill))
    g2 = layout.device_S[s2]
    return g1 != g2 and -growth <= room_G[g2] and not (
        e1 >= 0 and _holds(layout, held, e1, g2)
    )


@compiled
def _spare_replicas(held: Holders) -> int:
    """Replicas beyond one of each expert."""
    spare = 0
    for replicas in held.replicas_E:
        spare += max(replicas - 1, 0)
    return spare


@compiled
def anneal(
    space: SearchSpace, times: DeviceTimes, layout: Layout, load_WE: Any, weight_W: Any,
    expert_S: Any, moved: float, annealing: Annealing, state: RandomState,
) -> Any:
    """(best cost, best slots): mean step time over the reference, least seen.

    load_WE: tokens. A move that lost more than a margin on the first steps is given up.
    """
    steps, experts = load_WE.shape
    slots, devices = len(expert_S), len(space.speed_G)
    held = Holders(
        expert_S.copy(), np.full((experts, devices), -1, np.int64), np.zeros(experts, np.int64)
    )
    room_G = space.room_G.copy()
    for s in range(slots):
        if expert_S[s] >= 0:
            _turn(held, expert_S[s], -1, s)
            room_G[layout.device_S[s]] -= space.size_E[expert_S[s]]
    spare = _spare_replicas(held)
    row_WX = np.zeros((steps, 3 * devices + 2 * slots))
    cost_W, slowest_W = np.zeros(steps), np.zeros(steps, np.int64)
    for w in range(steps):
        split_afresh(times, layout, held, load_WE[w], row_WX[w])
        cost_W[w], slowest_W[w] = step_cost(times, layout, row_WX[w])
    tried_WX, tried_W, tried_slowest_W = row_WX.copy(), cost_W.copy(), slowest_W.copy()
    gather = times.gather_us / times.reference_us
    cost = (weight_W * cost_W).sum() + (gather if spare > 0 else 0.0)
    best_cost, best_S = cost, expert_S.copy()
    cooling = (annealing.cold / annealing.hot) ** (1.0 / max(annealing.moves - 1, 1))
    temperature, first = annealing.hot, 0
    for _ in range(annealing.moves):
        temperature *= cooling
        s1, e1, s2, e2 = _propose(layout, held, slowest_W[next_below(state, steps)], state)
        if not _legal(space, layout, held, room_G, s1, e1, s2, e2):
            continue
        g1, g2 = layout.device_S[s1], (layout.device_S[s2] if s2 >= 0 else -1)
        more_moved = moves_price_change(space, g1, g2, e1, e2)
        if more_moved > 0.0 and moved + more_moved > space.move_budget:
            continue
        change = 0 if s2 >= 0 else (1 if e2 >= 0 else 0) - (1 if e1 >= 0 else 0)
        worse = -temperature * np.log(1.0 - next_random(state))
        base = (gather if spare + change > 0 else 0.0) - (gather if spare > 0 else 0.0)
        delta, weighed = 0.0, 0.0
        _change(held, s1, e1, s2, e2)
        first = (first + 1) % steps
        given_up = False
        for i in range(steps):
            if i == PROBED and steps > 2 * PROBED and delta > (worse + PROBE_MARGIN) * weighed:
                given_up = True
                break
            w = (first + i) % steps
            weighed += weight_W[w]
            tried_W[w], tried_slowest_W[w] = cost_W[w], slowest_W[w]
            tried_WX[w] = row_WX[w]
            if (e1 >= 0 and load_WE[w, e1] > 0.0) or (e2 >= 0 and load_WE[w, e2] > 0.0):
                tried_W[w], tried_slowest_W[w] = try_step(
                    times, layout, held, load_WE[w], tried_WX[w], s1, e1, e2,
                    times.rule != ALIKE and spare + change > 0,
                )
                delta += weight_W[w] * (tried_W[w] - cost_W[w])
        if given_up or delta + base > worse:
            _change(held, s1, e2, s2, e1)
            continue
        growth = (space.size_E[e2] if e2 >= 0 else 0.0) - (space.size_E[e1] if e1 >= 0 else 0.0)
        room_G[g1] -= growth
        if s2 >= 0:
            room_G[g2] += growth
        moved += more_moved
        spare += change
        row_WX, tried_WX = tried_WX, row_WX
        cost_W, tried_W = tried_W, cost_W
        slowest_W, tried_slowest_W = tried_slowest_W, slowest_W
        cost += delta + base
        if cost < best_cost - 1e-12:
            best_cost = cost
            best_S[:] = held.expert_S
    return best_cost, best_S
