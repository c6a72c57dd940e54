"""Step-aware search where replicas share an expert's tokens by a rule that is blind to load.

`even` and most engines' rules split an expert's tokens over all its replicas alike, or nearly so
over many tokens; `nearest` sends each home rank's tokens to the replicas nearest to it, alike;
SGLang's static table to the first replica in the node, so that further ones there serve their own
rank alone. Either way a device gets a share of the expert that depends on who holds it, a step's
load is a sum of shares, and a move changes the shares of the touched experts. Annealing on the
maximum of every step.

Knows per-step loads of one layer, devices' slots, speeds, nodes and room, and what transfers cost.
Homes count as spread evenly. Knows nothing of traces or how its steps were made.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ....foundation.arrays import FloatArray, SlotArray
from ....foundation.compiled import RandomState, compiled, next_below, next_random
from ...cost.token_transfers import TransferModel, all_prices, places_of, price_change
from .annealer import (
    Annealing,
    Found,
    SearchSpace,
    moves_price,
    moves_price_change,
    penalty,
    require_slots,
)

NEAREST_RULES = ("nearest", "sglang_static")
ALIKE, NEAREST, FIRST_NEAR = 0, 1, 2       # how replicas share
NOT_LEGAL = (-1, -1, -1, -1, -1, -1)       # a device without slots in this layer was drawn


def improve_fixed_shares(
    space: SearchSpace,
    load_WE: FloatArray,
    weight_W: FloatArray,
    slots_GC: SlotArray,
    annealing: Annealing,
    replicas: TransferModel,
    state: RandomState,
    *,
    node_G: npt.NDArray[np.int64] | None = None,
    first_near: bool = False,
) -> Found:
    """Anneal one layer's placement where replicas share alike (node_G None) or nearest first.

    first_near: of several replicas in a node that the home rank does not hold, only the first
    serves.

    load_WE [W, E]: every step scaled so that perfect balance is 1 (its sum is the speeds' sum).
    """
    require_slots(space, slots_GC)
    cost, best, last = _anneal(
        space, np.ascontiguousarray(load_WE, np.float64), np.asarray(weight_W, np.float64),
        np.ascontiguousarray(slots_GC, np.int16),
        ALIKE if node_G is None else FIRST_NEAR if first_near else NEAREST,
        np.zeros(len(slots_GC), np.int64) if node_G is None else np.asarray(node_G, np.int64),
        annealing, replicas, state,
    )
    return Found(float(cost), best, last)


@compiled
def _shares(holder_G: Any, rule: int, node_G: Any, share_G: Any) -> None:
    """[G] the part of an expert's tokens each device computes; sums to 1."""
    devices = len(holder_G)
    share_G[:] = 0.0
    replicas = 0
    for g in range(devices):
        replicas += holder_G[g]
    if rule == ALIKE:
        for g in range(devices):
            if holder_G[g]:
                share_G[g] = 1.0 / replicas
        return
    for home in range(devices):
        if holder_G[home]:
            share_G[home] += 1.0 / devices
            continue
        near = 0
        for g in range(devices):
            near += holder_G[g] and node_G[g] == node_G[home]
        for g in range(devices):
            if holder_G[g] and (near == 0 or node_G[g] == node_G[home]):
                if near > 0 and rule == FIRST_NEAR:
                    share_G[g] += 1.0 / devices
                    break
                share_G[g] += 1.0 / devices / (near if near > 0 else replicas)


@compiled
def _peak(load_G: Any, speed_G: Any) -> float:
    worst = 0.0
    for g in range(len(load_G)):
        worst = max(worst, load_G[g] / speed_G[g])
    return worst


@compiled
def _tried_peak(
    load_G: Any, load_E: Any, e1: int, change1_G: Any, e2: int, change2_G: Any, speed_G: Any,
    tried_G: Any,
) -> float:
    """Peak of one step after the shares of e1 and e2 (-1 = none) changed; fills tried_G."""
    first = load_E[e1] if e1 >= 0 else 0.0
    second = load_E[e2] if e2 >= 0 else 0.0
    for g in range(len(load_G)):
        tried_G[g] = load_G[g] + first * change1_G[g] + second * change2_G[g]
    return _peak(tried_G, speed_G)


@compiled
def _propose(
    space: SearchSpace, slots_GC: Any, holder_EG: Any, replicas_E: Any, room_G: Any, hottest: int,
    state: RandomState,
) -> Any:
    """(g1, c1, g2, c2, e1, e2) as in the other searches; g1 = -1 where the move is not legal."""
    devices = len(space.slots_G)
    g1 = hottest if next_random(state) < 0.4 else next_below(state, devices)
    if space.slots_G[g1] == 0:
        return NOT_LEGAL
    c1 = next_below(state, space.slots_G[g1])
    e1 = slots_GC[g1, c1]
    if e1 >= 0 and (replicas_E[e1] == 1 or next_random(state) < 0.7):
        g2 = next_below(state, devices)
        if space.slots_G[g2] == 0:
            return NOT_LEGAL
        c2 = next_below(state, space.slots_G[g2])
        e2 = slots_GC[g2, c2]
        if g1 == g2 or e1 == e2 or holder_EG[e1, g2] or (e2 >= 0 and holder_EG[e2, g1]):
            return -1, c1, g2, c2, e1, e2
        growth = space.size_E[e1] - (space.size_E[e2] if e2 >= 0 else 0.0)
        if growth > room_G[g2] or -growth > room_G[g1]:
            return -1, c1, g2, c2, e1, e2
        return g1, c1, g2, c2, e1, e2
    e2 = next_below(state, len(replicas_E))
    growth = space.size_E[e2] - (space.size_E[e1] if e1 >= 0 else 0.0)
    if e1 == e2 or holder_EG[e2, g1] or growth > room_G[g1] or (e1 < 0 and not space.fill):
        return -1, c1, -1, -1, e1, e2
    return g1, c1, -1, -1, e1, e2


@compiled
def _hold(holder_EG: Any, replicas_E: Any, move: Any, sign: int) -> None:
    """Carry the move out on the tables of who holds what (sign 1), or take it back (-1)."""
    g1, _c1, g2, _c2, e1, e2 = move
    if e1 >= 0:
        holder_EG[e1, g1] = sign < 0
        if g2 >= 0:
            holder_EG[e1, g2] = sign > 0
        else:
            replicas_E[e1] -= sign
    if e2 >= 0:
        holder_EG[e2, g1] = sign > 0
        if g2 >= 0:
            holder_EG[e2, g2] = sign < 0
        else:
            replicas_E[e2] += sign


@compiled
def _anneal(
    space: SearchSpace, load_WE: Any, weight_W: Any, slots_GC: Any, rule: int, node_G: Any,
    annealing: Annealing, replicas: TransferModel, state: RandomState,
) -> Any:
    """(best cost, best slots, last slots). A candidate is dropped once its cost is too high."""
    steps, experts = load_WE.shape
    devices = len(space.slots_G)
    slots_GC = slots_GC.copy()
    holder_EG = np.zeros((experts, devices), np.bool_)
    replicas_E, room_G = np.zeros(experts, np.int64), space.room_G.copy()
    for g in range(devices):
        for e in slots_GC[g]:
            if e >= 0:
                holder_EG[e, g] = True
                replicas_E[e] += 1
                room_G[g] -= space.size_E[e]
    priced = len(replicas.home_T) > 0
    places_E = np.zeros(experts, np.int64)
    share_EG = np.zeros((experts, devices))
    for e in range(experts):
        _shares(holder_EG[e], rule, node_G, share_EG[e])
        if priced:
            places_E[e] = places_of(np.flatnonzero(holder_EG[e]), replicas.place_G)
    price_T = all_prices(replicas, places_E)
    load_WG = np.zeros((steps, devices))
    for w in range(steps):
        for e in range(experts):
            load_WG[w] += load_WE[w, e] * share_EG[e]
    tried_WG = load_WG.copy()
    new1_G, new2_G = np.zeros(devices), np.zeros(devices)
    change1_G, change2_G = np.zeros(devices), np.zeros(devices)
    cost_W, tried_W = np.zeros(steps), np.zeros(steps)
    for w in range(steps):
        cost_W[w] = weight_W[w] * penalty(annealing, _peak(load_WG[w], space.speed_G))
    order_W = np.argsort(-cost_W)
    cost = cost_W.sum() + (replicas.weight * price_T.mean() if priced else 0.0)
    best_cost, best_GC = cost, slots_GC.copy()
    cooling = (annealing.cold / annealing.hot) ** (1.0 / max(annealing.moves - 1, 1))
    temperature, accepted = annealing.hot, 0
    moved = moves_price(space, slots_GC)
    for _ in range(annealing.moves):
        temperature *= cooling
        worst = order_W[next_below(state, min(steps, 8))]
        hottest = int(np.argmax(load_WG[worst] / space.speed_G))
        move = _propose(space, slots_GC, holder_EG, replicas_E, room_G, hottest, state)
        g1, c1, g2, c2, e1, e2 = move
        if g1 < 0:
            continue
        more_moved = moves_price_change(space, g1, g2, e1, e2)
        if more_moved > 0.0 and moved + more_moved > space.move_budget:
            continue
        allowed = cost - temperature * np.log(1.0 - next_random(state))
        total = cost - cost_W.sum()
        _hold(holder_EG, replicas_E, move, 1)
        places1, places2 = 0, 0
        if e1 >= 0:
            _shares(holder_EG[e1], rule, node_G, new1_G)
            change1_G[:] = new1_G - share_EG[e1]
        if e2 >= 0:
            _shares(holder_EG[e2], rule, node_G, new2_G)
            change2_G[:] = new2_G - share_EG[e2]
        if priced:
            if e1 >= 0:
                places1 = places_of(np.flatnonzero(holder_EG[e1]), replicas.place_G)
            if e2 >= 0:
                places2 = places_of(np.flatnonzero(holder_EG[e2]), replicas.place_G)
            total += price_change(replicas, places_E, price_T, e1, places1, e2, places2, False)
        for w in order_W:
            if total > allowed:
                break
            peak = _tried_peak(load_WG[w], load_WE[w], e1, change1_G, e2, change2_G,
                               space.speed_G, tried_WG[w])
            tried_W[w] = weight_W[w] * penalty(annealing, peak)
            total += tried_W[w]
        if total > allowed:
            _hold(holder_EG, replicas_E, move, -1)
            continue
        moved += more_moved
        growth = 0.0
        if e1 >= 0:
            share_EG[e1] = new1_G
            growth -= space.size_E[e1]
        if e2 >= 0:
            share_EG[e2] = new2_G
            growth += space.size_E[e2]
        if priced:
            price_change(replicas, places_E, price_T, e1, places1, e2, places2, True)
        room_G[g1] -= growth
        slots_GC[g1, c1] = e2
        if g2 >= 0:
            room_G[g2] += growth
            slots_GC[g2, c2] = e1
        load_WG, tried_WG = tried_WG, load_WG
        cost_W[:] = tried_W
        cost = total
        accepted += 1
        if cost < best_cost:
            best_cost = cost
            best_GC[:] = slots_GC
        if accepted % 32 == 0:
            order_W = np.argsort(-cost_W)
    return best_cost, best_GC, slots_GC
