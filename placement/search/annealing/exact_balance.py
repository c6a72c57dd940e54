"""Step-aware search for up to ten devices, on the exact best split of every step.

With few devices the best fluid split of a step has a closed form: the largest, over device subsets
Q, of the load of experts whose replicas all lie in Q, over the speed of Q (max-flow/min-cut). Each
step keeps that load for all 2^G subsets; a move changes one or two experts' device sets, so the new
table is the old one plus two terms. Annealing over swaps and re-replications.

Knows per-step loads of one layer, devices' slots, speeds and room, and what transfers cost
(`search_copies.py`). Knows nothing of traces or how its steps were made (`scenarios.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ....foundation.arrays import Float32Array, FloatArray, IntArray, SlotArray
from ....foundation.compiled import RandomState, compiled, compiled_finite, next_below, next_random
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

MOST_DEVICES = 10
NOT_LEGAL = (-1, -1, -1, -1, -1, -1)     # a device without slots in this layer was drawn


def exact_split(load_WE: FloatArray, slots_GC: SlotArray, speed_G: FloatArray) -> FloatArray:
    """[W] the least possible maximum over devices of load/speed, in units of perfect balance.

    load_WE [W, E] tokens; slots_GC [G, C] one layer. 1 = perfect; steps without load give 1.
    Exact for fluid splits. Memory and time O(W·2^G).
    """
    masks_E = device_masks(slots_GC, load_WE.shape[1])
    values = _split_values(
        np.ascontiguousarray(load_WE, np.float64), masks_E, subset_speed(speed_G), len(speed_G)
    )
    total_W = load_WE.sum(axis=1)
    ideal_W = np.where(total_W > 0, total_W / speed_G.sum(), 1.0)
    return np.where(total_W > 0, values / ideal_W, 1.0)


def device_masks(slots_GC: SlotArray, experts: int) -> IntArray:
    """[E] bit g is set where device g holds the expert."""
    masks_E = np.zeros(experts, np.int64)
    for g, held in enumerate(slots_GC):
        masks_E[held[held >= 0]] |= 1 << g
    return masks_E


def subset_speed(speed_G: FloatArray) -> FloatArray:
    """[2^G] total speed of every device subset; a huge one for the empty set."""
    bits = (np.arange(1 << len(speed_G))[:, None] >> np.arange(len(speed_G))) & 1
    speed_Q = np.asarray(bits @ speed_G, np.float64)
    speed_Q[0] = np.finfo(np.float32).max
    return speed_Q


def improve_few_devices(
    space: SearchSpace,
    load_WE: FloatArray,
    weight_W: FloatArray,
    slots_GC: SlotArray,
    annealing: Annealing,
    replicas: TransferModel,
    state: RandomState,
) -> Found:
    """Anneal one layer's placement on exact splits of given steps.

    load_WE [W, E]: every step scaled so that perfect balance is 1 (its sum is the speeds' sum).
    """
    require_slots(space, slots_GC)
    rate_Q = (1.0 / subset_speed(space.speed_G)).astype(np.float32)
    devices = len(space.speed_G)
    bits = (np.arange(1 << devices)[:, None] >> np.arange(devices)) & 1
    place_Q = np.bitwise_or.reduce(bits << replicas.place_G, axis=1)
    cost, best, last = _anneal(
        space, np.ascontiguousarray(load_WE, np.float32), np.asarray(weight_W, np.float64),
        rate_Q, place_Q.astype(np.int64), device_masks(slots_GC, load_WE.shape[1]),
        np.ascontiguousarray(slots_GC, np.int16), annealing, replicas, state,
    )
    return Found(float(cost), best, last)


@compiled
def _split_values(
    load_WE: FloatArray, masks_E: IntArray, speed_Q: FloatArray, devices: int
) -> FloatArray:
    steps, experts = load_WE.shape
    subsets = 1 << devices
    value_W = np.empty(steps)
    table_Q = np.empty(subsets)
    for w in range(steps):
        table_Q[:] = 0.0
        for e in range(experts):
            table_Q[masks_E[e]] += load_WE[w, e]
        _add_up_subsets(table_Q, devices)
        worst = 0.0
        for q in range(1, subsets):
            worst = max(worst, table_Q[q] / speed_Q[q])
        value_W[w] = worst
    return value_W


@compiled
def _add_up_subsets(table_Q: npt.NDArray[np.floating[Any]], devices: int) -> None:
    """In place: every cell becomes the sum over the subsets of its device set."""
    for g in range(devices):
        bit = 1 << g
        for q in range(1 << devices):
            if q & bit:
                table_Q[q] += table_Q[q ^ bit]


@compiled
def _fill_tables(
    load_WE: Float32Array, masks_E: IntArray, devices: int, table_WQ: Float32Array
) -> None:
    for w in range(len(load_WE)):
        row = table_WQ[w]
        row[:] = 0.0
        for e in range(len(masks_E)):
            row[masks_E[e]] += load_WE[w, e]
        _add_up_subsets(row, devices)


@compiled_finite
def _worst_subset(
    row_Q: Float32Array, first_Q: Float32Array, second_Q: Float32Array, first: Any, second: Any,
    rate_Q: Float32Array,
) -> Any:
    """Largest load over speed after adding first·first_Q + second·second_Q to a step's table."""
    worst = np.float32(0.0)
    for q in range(len(row_Q)):
        value = (row_Q[q] + first * first_Q[q] + second * second_Q[q]) * rate_Q[q]
        worst = max(worst, value)
    return worst


@compiled
def _mark_change(change_Q: Float32Array, before: int, after: int) -> None:
    """change_Q[q] = [after ⊆ q] − [before ⊆ q]."""
    for q in range(len(change_Q)):
        change_Q[q] = np.float32((q & after) == after) - np.float32((q & before) == before)


@compiled
def _propose(
    space: SearchSpace, slots_GC: SlotArray, masks_E: IntArray, replicas_E: IntArray,
    room_G: FloatArray, state: RandomState,
) -> Any:
    """(g1, c1, g2, c2, e1, e2) of a legal move, or g1 = -1.

    g2 >= 0: slots (g1, c1) of e1 and (g2, c2) of e2 (or empty) change contents. g2 = -1: slot
    (g1, c1) turns from e1, which has other replicas (or was empty), to e2.
    """
    devices = len(space.slots_G)
    g1 = next_below(state, devices)
    if space.slots_G[g1] == 0:
        return NOT_LEGAL
    c1 = next_below(state, space.slots_G[g1])
    e1 = slots_GC[g1, c1]
    if e1 >= 0 and (replicas_E[e1] == 1 or next_random(state) < 0.5):
        g2 = next_below(state, devices)
        if space.slots_G[g2] == 0:
            return NOT_LEGAL
        c2 = next_below(state, space.slots_G[g2])
        e2 = slots_GC[g2, c2]
        if g1 == g2 or e1 == e2 or (masks_E[e1] >> g2) & 1 or (
            e2 >= 0 and (masks_E[e2] >> g1) & 1
        ):
            return -1, c1, g2, c2, e1, e2
        growth = space.size_E[e1] - (space.size_E[e2] if e2 >= 0 else 0.0)
        if growth > room_G[g2] or -growth > room_G[g1]:
            return -1, c1, g2, c2, e1, e2
        return g1, c1, g2, c2, e1, e2
    e2 = next_below(state, len(masks_E))
    growth = space.size_E[e2] - (space.size_E[e1] if e1 >= 0 else 0.0)
    if e2 == e1 or (masks_E[e2] >> g1) & 1 or growth > room_G[g1] or (e1 < 0 and not space.fill):
        return -1, c1, -1, -1, e1, e2
    return g1, c1, -1, -1, e1, e2


@compiled
def _masks_after(masks_E: IntArray, g1: int, g2: int, e1: int, e2: int) -> Any:
    """Device sets of e1 and e2 after the move; 0 for an expert that is none."""
    after1, after2 = 0, 0
    if e1 >= 0:
        after1 = masks_E[e1] ^ (1 << g1)
        if g2 >= 0:
            after1 |= 1 << g2
    if e2 >= 0:
        after2 = masks_E[e2] | (1 << g1)
        if g2 >= 0:
            after2 ^= 1 << g2
    return after1, after2


@compiled
def _apply(
    space: SearchSpace, slots_GC: SlotArray, masks_E: IntArray, replicas_E: IntArray,
    room_G: FloatArray, move: Any, after1: int, after2: int,
) -> None:
    """Carry a move out on everything but the tables."""
    g1, c1, g2, c2, e1, e2 = move
    slots_GC[g1, c1] = e2
    if g2 >= 0:
        slots_GC[g2, c2] = e1
    growth = 0.0
    if e1 >= 0:
        masks_E[e1] = after1
        growth -= space.size_E[e1]
        if g2 < 0:
            replicas_E[e1] -= 1
    if e2 >= 0:
        masks_E[e2] = after2
        growth += space.size_E[e2]
        if g2 < 0:
            replicas_E[e2] += 1
    room_G[g1] -= growth
    if g2 >= 0:
        room_G[g2] += growth


@compiled
def _anneal(
    space: SearchSpace, load_WE: Float32Array, weight_W: FloatArray, rate_Q: Float32Array,
    place_Q: IntArray, masks_E: IntArray, slots_GC: SlotArray, annealing: Annealing,
    replicas: TransferModel, state: RandomState,
) -> Any:
    """(best cost, best slots, last slots). A candidate is dropped once its cost is too high."""
    steps, experts = load_WE.shape
    devices, subsets = len(space.slots_G), len(rate_Q)
    slots_GC = slots_GC.copy()
    replicas_E, room_G = np.zeros(experts, np.int64), space.room_G.copy()
    for g in range(devices):
        for e in slots_GC[g]:
            if e >= 0:
                replicas_E[e] += 1
                room_G[g] -= space.size_E[e]
    places_E = place_Q[masks_E]
    price_T = all_prices(replicas, places_E)
    table_WQ = np.empty((steps, subsets), np.float32)
    _fill_tables(load_WE, masks_E, devices, table_WQ)
    first_Q, second_Q = np.zeros(subsets, np.float32), np.zeros(subsets, np.float32)
    nothing = np.float32(0.0)
    cost_W, tried_W = np.empty(steps), np.empty(steps)
    for w in range(steps):
        value = _worst_subset(table_WQ[w], first_Q, second_Q, nothing, nothing, rate_Q)
        cost_W[w] = weight_W[w] * penalty(annealing, value)
    order_W = np.argsort(-cost_W)
    cost = cost_W.sum() + (replicas.weight * price_T.mean() if len(price_T) else 0.0)
    best_cost, best_GC = cost, slots_GC.copy()
    cooling = (annealing.cold / annealing.hot) ** (1.0 / max(annealing.moves - 1, 1))
    temperature, accepted = annealing.hot, 0
    moved = moves_price(space, slots_GC)
    for _ in range(annealing.moves):
        temperature *= cooling
        move = _propose(space, slots_GC, masks_E, replicas_E, room_G, state)
        g1, _c1, g2, _c2, e1, e2 = move
        if g1 < 0:
            continue
        more_moved = moves_price_change(space, g1, g2, e1, e2)
        if more_moved > 0.0 and moved + more_moved > space.move_budget:
            continue
        after1, after2 = _masks_after(masks_E, g1, g2, e1, e2)
        allowed = cost - temperature * np.log(1.0 - next_random(state))
        base = cost - cost_W.sum() + price_change(
            replicas, places_E, price_T, e1, place_Q[after1], e2, place_Q[after2], False
        )
        total = base
        first, second = nothing, nothing
        if e1 >= 0:
            _mark_change(first_Q, masks_E[e1], after1)
        if e2 >= 0:
            _mark_change(second_Q, masks_E[e2], after2)
        for w in order_W:
            if total > allowed:
                break
            first = load_WE[w, e1] if e1 >= 0 else nothing
            second = load_WE[w, e2] if e2 >= 0 else nothing
            value = _worst_subset(table_WQ[w], first_Q, second_Q, first, second, rate_Q)
            tried_W[w] = weight_W[w] * penalty(annealing, value)
            total += tried_W[w]
        if total > allowed:
            continue
        price_change(replicas, places_E, price_T, e1, place_Q[after1], e2, place_Q[after2], True)
        for w in range(steps):
            first = load_WE[w, e1] if e1 >= 0 else nothing
            second = load_WE[w, e2] if e2 >= 0 else nothing
            for q in range(subsets):
                table_WQ[w, q] += first * first_Q[q] + second * second_Q[q]
        moved += more_moved
        _apply(space, slots_GC, masks_E, replicas_E, room_G, move, after1, after2)
        cost_W[:] = tried_W
        cost = total
        accepted += 1
        if cost < best_cost:
            best_cost = cost
            best_GC[:] = slots_GC
        if accepted % 32 == 0:
            order_W = np.argsort(-cost_W)
    return best_cost, best_GC, slots_GC
