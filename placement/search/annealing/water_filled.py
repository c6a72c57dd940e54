"""Step-aware search for any number of devices, on a warm-started split of every step.

Each step keeps its split (tokens per slot). A move takes the tokens of the touched experts off,
puts them back level by level (water-filling), and lets the hottest devices hand tokens on until
nothing gains; the split is near the best one, never better than it, so a plan is never flattered.
Moves start at the hottest devices of the worst steps, because only there can they help.

Knows per-step loads of one layer, devices' slots, speeds and room, and what transfers cost
(`search_copies.py`). Knows nothing of traces or how its steps were made (`scenarios.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ....foundation.arrays import FloatArray, SlotArray
from ....foundation.compiled import RandomState, compiled, next_below, next_random
from ...cost.token_transfers import TransferModel, all_prices, price_change
from .annealer import (
    Annealing,
    Found,
    SearchSpace,
    moves_price,
    moves_price_change,
    penalty,
    require_slots,
)

HAND_ON_ROUNDS = 8          # of the hottest device handing tokens on, per trial
FLAT_ENOUGH = 1e-4          # above perfect balance: no rounds below this


def improve_many_devices(
    space: SearchSpace,
    load_WE: FloatArray,
    weight_W: FloatArray,
    slots_GC: SlotArray,
    annealing: Annealing,
    replicas: TransferModel,
    state: RandomState,
) -> Found:
    """Anneal one layer's placement on warm-started splits of given steps.

    load_WE [W, E]: every step scaled so that perfect balance is 1 (its sum is the speeds' sum).
    """
    require_slots(space, slots_GC)
    slots_G = np.asarray(space.slots_G)
    device_S = np.repeat(np.arange(len(slots_G)), slots_G)
    start_G = np.concatenate(([0], np.cumsum(slots_G)))
    held = np.arange(slots_GC.shape[1]) < slots_G[:, None]
    cost, best_S, last_S = _anneal(
        space, np.ascontiguousarray(load_WE, np.float64), np.asarray(weight_W, np.float64),
        slots_GC[held].astype(np.int64), device_S, start_G, moves_price(space, slots_GC),
        annealing, replicas, state,
    )
    found = []
    for expert_S in (best_S, last_S):
        slots = np.full(slots_GC.shape, -1, np.int16)
        slots[held] = expert_S
        found.append(slots)
    return Found(float(cost), found[0], found[1])


@compiled
def _fill(
    tokens: float, slot_R: Any, replicas: int, device_S: Any, load_G: Any, speed_G: Any, flow_S: Any
) -> None:
    """Put one expert's tokens on its slots so that their devices' levels are flat."""
    if replicas == 1:
        flow_S[slot_R[0]] = tokens
        load_G[device_S[slot_R[0]]] += tokens
        return
    if replicas == 2:
        a, b = slot_R[0], slot_R[1]
        ga, gb = device_S[a], device_S[b]
        share = speed_G[ga] / (speed_G[ga] + speed_G[gb])
        amount = (tokens + load_G[ga] + load_G[gb]) * share - load_G[ga]
        amount = min(tokens, max(0.0, amount))
        flow_S[a], flow_S[b] = amount, tokens - amount
        load_G[ga] += amount
        load_G[gb] += tokens - amount
        return
    # The level of all replicas' devices; those above it drop out, which lowers it.
    level = np.inf
    for _ in range(replicas):
        below_load, below_speed = tokens, 0.0
        for r in range(replicas):
            g = device_S[slot_R[r]]
            if load_G[g] <= level * speed_G[g]:
                below_load += load_G[g]
                below_speed += speed_G[g]
        if below_speed == 0.0 or below_load >= level * below_speed:
            break
        level = below_load / below_speed
    for r in range(replicas):
        g = device_S[slot_R[r]]
        amount = max(0.0, level * speed_G[g] - load_G[g])
        flow_S[slot_R[r]] = amount
        load_G[g] += amount


@compiled
def _lift(slot_R: Any, replicas: int, device_S: Any, load_G: Any, flow_S: Any) -> None:
    """Take one expert's tokens off its devices."""
    for r in range(replicas):
        s = slot_R[r]
        load_G[device_S[s]] -= flow_S[s]
        flow_S[s] = 0.0


@compiled
def _hottest(load_G: Any, speed_G: Any) -> int:
    hottest = 0
    for g in range(1, len(load_G)):
        if load_G[g] * speed_G[hottest] > load_G[hottest] * speed_G[g]:
            hottest = g
    return hottest


@compiled
def _hand_on(
    load_E: Any, expert_S: Any, slot_ER: Any, replicas_E: Any, device_S: Any, start_G: Any,
    speed_G: Any, load_G: Any, flow_S: Any, rounds: int,
) -> float:
    """Let the hottest device refill its replicated experts, again and again; returns the peak."""
    hottest = _hottest(load_G, speed_G)
    peak = load_G[hottest] / speed_G[hottest]
    for _ in range(rounds):
        if peak <= 1.0 + FLAT_ENOUGH:
            break
        for s in range(start_G[hottest], start_G[hottest + 1]):
            e = expert_S[s]
            if e >= 0 and replicas_E[e] > 1 and flow_S[s] > 0.0:
                _lift(slot_ER[e], replicas_E[e], device_S, load_G, flow_S)
                _fill(load_E[e], slot_ER[e], replicas_E[e], device_S, load_G, speed_G, flow_S)
        before = peak
        hottest = _hottest(load_G, speed_G)
        peak = float(load_G[hottest] / speed_G[hottest])
        if peak > before - 1e-5:
            break
    return float(peak)


@compiled
def _index(expert_S: Any, experts: int, devices: int) -> Any:
    """(slot_ER, replicas_E): slots of each expert in ascending order."""
    replicas_E = np.zeros(experts, np.int64)
    for s in range(len(expert_S)):
        if expert_S[s] >= 0:
            replicas_E[expert_S[s]] += 1
    widest = min(devices, len(expert_S) - experts + 1)
    slot_ER = np.full((experts, max(widest, replicas_E.max())), -1, np.int32)
    replicas_E[:] = 0
    for s in range(len(expert_S)):
        e = expert_S[s]
        if e >= 0:
            slot_ER[e, replicas_E[e]] = s
            replicas_E[e] += 1
    return slot_ER, replicas_E


@compiled
def _split_afresh(
    load_E: Any, expert_S: Any, slot_ER: Any, replicas_E: Any, device_S: Any, start_G: Any,
    speed_G: Any, load_G: Any, flow_S: Any,
) -> float:
    """Split one step from nothing: single replicas first, then replicated ones, heaviest first."""
    load_G[:] = 0.0
    flow_S[:] = 0.0
    for e in range(len(load_E)):
        if replicas_E[e] == 1:
            _fill(load_E[e], slot_ER[e], 1, device_S, load_G, speed_G, flow_S)
    for e in np.argsort(-load_E):
        if replicas_E[e] > 1:
            _fill(load_E[e], slot_ER[e], replicas_E[e], device_S, load_G, speed_G, flow_S)
    return _hand_on(load_E, expert_S, slot_ER, replicas_E, device_S, start_G, speed_G, load_G,
                    flow_S, 4 * HAND_ON_ROUNDS)


@compiled
def _holds(slot_ER: Any, replicas_E: Any, device_S: Any, e: int, g: int) -> bool:
    for r in range(replicas_E[e]):
        if device_S[slot_ER[e, r]] == g:
            return True
    return False


@compiled
def _replace_slot(slot_ER: Any, replicas_E: Any, e: int, old: int, new: int) -> None:
    """Expert e's replica in slot `old` goes to `new`; old < 0 adds one, new < 0 removes it."""
    if old < 0:
        slot_ER[e, replicas_E[e]] = new
        replicas_E[e] += 1
        return
    last = replicas_E[e] - 1
    for r in range(replicas_E[e]):
        if slot_ER[e, r] == old:
            if new >= 0:
                slot_ER[e, r] = new
            else:
                slot_ER[e, r] = slot_ER[e, last]
                slot_ER[e, last] = -1
                replicas_E[e] = last
            return


@compiled
def _change(
    expert_S: Any, slot_ER: Any, replicas_E: Any, s1: int, e1: int, s2: int, e2: int
) -> None:
    """Slot s1 turns from e1 to e2, and s2 (if any) from e2 to e1."""
    expert_S[s1] = e2
    if s2 >= 0:
        expert_S[s2] = e1
    if e1 >= 0:
        _replace_slot(slot_ER, replicas_E, e1, s1, s2)
    if e2 >= 0:
        _replace_slot(slot_ER, replicas_E, e2, s2, s1)


@compiled
def _propose(
    space: SearchSpace, expert_S: Any, slot_ER: Any, replicas_E: Any, device_S: Any, start_G: Any,
    room_G: Any, load_WG: Any, order_W: Any, state: RandomState,
) -> Any:
    """(s1, e1, s2, e2) of a legal move, or s1 = -1. s2 = -1: e2 gains a replica in e1's place."""
    devices = len(space.slots_G)
    if next_random(state) < 0.7:
        w = order_W[next_below(state, min(len(order_W), 8))]
        g1 = _hottest(load_WG[w], space.speed_G)
        if space.slots_G[g1] > 0 and next_random(state) < 0.3:
            # A neighbour of the hottest: what that one sheds goes there.
            s = start_G[g1] + next_below(state, start_G[g1 + 1] - start_G[g1])
            e = expert_S[s]
            if e >= 0 and replicas_E[e] > 1:
                g1 = device_S[slot_ER[e, next_below(state, replicas_E[e])]]
    else:
        g1 = next_below(state, devices)
    if space.slots_G[g1] == 0:
        return -1, -1, -1, -1
    s1 = start_G[g1] + next_below(state, space.slots_G[g1])
    e1 = expert_S[s1]
    if e1 >= 0 and (replicas_E[e1] == 1 or next_random(state) < 0.5):
        s2 = next_below(state, len(expert_S))
        e2 = expert_S[s2]
        g2 = device_S[s2]
        if g1 == g2 or e1 == e2 or _holds(slot_ER, replicas_E, device_S, e1, g2) or (
            e2 >= 0 and _holds(slot_ER, replicas_E, device_S, e2, g1)
        ):
            return -1, e1, s2, e2
        growth = space.size_E[e1] - (space.size_E[e2] if e2 >= 0 else 0.0)
        if growth > room_G[g2] or -growth > room_G[g1]:
            return -1, e1, s2, e2
        return s1, e1, s2, e2
    e2 = next_below(state, len(replicas_E))
    growth = space.size_E[e2] - (space.size_E[e1] if e1 >= 0 else 0.0)
    if (
        e1 == e2 or replicas_E[e2] >= slot_ER.shape[1] or growth > room_G[g1]
        or (e1 < 0 and not space.fill) or _holds(slot_ER, replicas_E, device_S, e2, g1)
    ):
        return -1, e1, -1, e2
    return s1, e1, -1, e2


@compiled
def _place_set(slot_ER: Any, replicas_E: Any, device_S: Any, place_G: Any, e: int) -> int:
    """Bit set of the places of expert e; 0 for none."""
    places = 0
    if e >= 0:
        for r in range(replicas_E[e]):
            places |= 1 << place_G[device_S[slot_ER[e, r]]]
    return places


@compiled
def _try_step(
    load_E: Any, space: SearchSpace, expert_S: Any, slot_ER: Any, replicas_E: Any, device_S: Any,
    start_G: Any, s1: int, first: int, second: int, load_G: Any, flow_S: Any,
) -> float:
    """Peak of one step after the tables changed: refill both experts, then hand on."""
    _lift(slot_ER[first], replicas_E[first], device_S, load_G, flow_S)
    if second >= 0:
        _lift(slot_ER[second], replicas_E[second], device_S, load_G, flow_S)
    # The slot an expert left for an empty one is in nobody's list any more.
    load_G[device_S[s1]] -= flow_S[s1]
    flow_S[s1] = 0.0
    _fill(load_E[first], slot_ER[first], replicas_E[first], device_S, load_G, space.speed_G, flow_S)
    if second >= 0:
        _fill(load_E[second], slot_ER[second], replicas_E[second], device_S, load_G, space.speed_G,
              flow_S)
    return _hand_on(load_E, expert_S, slot_ER, replicas_E, device_S, start_G, space.speed_G, load_G,
                    flow_S, HAND_ON_ROUNDS)


@compiled
def _anneal(
    space: SearchSpace, load_WE: Any, weight_W: Any, expert_S: Any, device_S: Any, start_G: Any,
    moved: float, annealing: Annealing, replicas: TransferModel, state: RandomState,
) -> Any:
    """(best cost, best slots, last slots). A candidate is dropped once its cost is too high."""
    steps, experts = load_WE.shape
    slots, devices = len(expert_S), len(space.speed_G)
    expert_S = expert_S.copy()
    slot_ER, replicas_E = _index(expert_S, experts, devices)
    room_G = space.room_G.copy()
    for s in range(slots):
        if expert_S[s] >= 0:
            room_G[device_S[s]] -= space.size_E[expert_S[s]]
    priced = len(replicas.home_T) > 0
    places_E = np.zeros(experts, np.int64)
    if priced:
        for e in range(experts):
            places_E[e] = _place_set(slot_ER, replicas_E, device_S, replicas.place_G, e)
    price_T = all_prices(replicas, places_E)
    load_WG, flow_WS = np.zeros((steps, devices)), np.zeros((steps, slots))
    trial_WG, trial_WS = np.zeros((steps, devices)), np.zeros((steps, slots))
    cost_W, tried_W = np.zeros(steps), np.zeros(steps)
    for w in range(steps):
        peak = _split_afresh(load_WE[w], expert_S, slot_ER, replicas_E, device_S, start_G,
                             space.speed_G, load_WG[w], flow_WS[w])
        cost_W[w] = weight_W[w] * penalty(annealing, peak)
    order_W = np.argsort(-cost_W)
    cost = cost_W.sum() + (replicas.weight * price_T.mean() if priced else 0.0)
    best_cost, best_S = cost, expert_S.copy()
    cooling = (annealing.cold / annealing.hot) ** (1.0 / max(annealing.moves - 1, 1))
    temperature, accepted = annealing.hot, 0
    for _ in range(annealing.moves):
        temperature *= cooling
        s1, e1, s2, e2 = _propose(space, expert_S, slot_ER, replicas_E, device_S, start_G, room_G,
                                  load_WG, order_W, state)
        if s1 < 0:
            continue
        more_moved = moves_price_change(
            space, device_S[s1], device_S[s2] if s2 >= 0 else -1, e1, e2
        )
        if more_moved > 0.0 and moved + more_moved > space.move_budget:
            continue
        allowed = cost - temperature * np.log(1.0 - next_random(state))
        # Both experts' slots are the same set before and after, so lifting may follow the change.
        _change(expert_S, slot_ER, replicas_E, s1, e1, s2, e2)
        after1, after2 = 0, 0
        total = cost - cost_W.sum()
        if priced:
            after1 = _place_set(slot_ER, replicas_E, device_S, replicas.place_G, e1)
            after2 = _place_set(slot_ER, replicas_E, device_S, replicas.place_G, e2)
            total += price_change(replicas, places_E, price_T, e1, after1, e2, after2, False)
        first, second = e1, e2
        if e1 < 0 or (e2 >= 0 and replicas_E[e2] < replicas_E[e1]):
            first, second = e2, e1
        for w in order_W:
            if total > allowed:
                break
            trial_WG[w] = load_WG[w]
            trial_WS[w] = flow_WS[w]
            peak = _try_step(load_WE[w], space, expert_S, slot_ER, replicas_E, device_S, start_G,
                             s1, first, second, trial_WG[w], trial_WS[w])
            tried_W[w] = weight_W[w] * penalty(annealing, peak)
            total += tried_W[w]
        if total > allowed:
            _change(expert_S, slot_ER, replicas_E, s1, e2, s2, e1)
            continue
        if priced:
            price_change(replicas, places_E, price_T, e1, after1, e2, after2, True)
        moved += more_moved
        growth = (space.size_E[e2] if e2 >= 0 else 0.0) - (space.size_E[e1] if e1 >= 0 else 0.0)
        room_G[device_S[s1]] -= growth
        if s2 >= 0:
            room_G[device_S[s2]] += growth
        load_WG, trial_WG = trial_WG, load_WG
        flow_WS, trial_WS = trial_WS, flow_WS
        cost_W[:] = tried_W
        cost = total
        accepted += 1
        if cost < best_cost:
            best_cost = cost
            best_S[:] = expert_S
        if accepted % 16 == 0:
            order_W = np.argsort(-cost_W)
        if best_cost <= 0.0:
            break
    return best_cost, best_S, expert_S
