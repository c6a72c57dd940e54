"""Step-aware search for up to ten devices, on the exact best split of every step.

With few devices the best fluid split of a step has a closed form: the largest, over device subsets
Q, of the load of experts whose copies all lie in Q, over the speed of Q (max-flow/min-cut). Each
step keeps that load for all 2^G subsets; a move changes one or two experts' device sets, so the new
table is the old one plus two terms. Annealing over swaps and re-replications.

Knows per-step loads of one layer and devices' slots and speeds. Knows nothing of traces, traffic
or how its steps were made (`scenarios.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .compiled import RandomState, compiled, compiled_finite, next_below, next_random

FloatArray = npt.NDArray[np.float64]
Float32Array = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
SlotArray = npt.NDArray[np.int16]

MOST_DEVICES = 10


@dataclass(frozen=True)
class Annealing:
    """How long and how hot: `moves` tried while the temperature falls geometrically."""

    moves: int
    hot: float
    cold: float


def exact_split(load_WE: FloatArray, slots_GC: SlotArray, speed_G: FloatArray) -> FloatArray:
    """[W] the least possible maximum over devices of load/speed, in units of perfect balance.

    load_WE [W, E] tokens; slots_GC [G, C] one layer. 1 = perfect; steps without load give 1.
    Exact for fluid splits. Memory and time O(W·2^G).
    """
    devices = len(speed_G)
    masks_E = device_masks(slots_GC, load_WE.shape[1])
    values = _split_values(
        np.ascontiguousarray(load_WE, np.float64), masks_E, subset_speed(speed_G), devices
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
    """[2^G] total speed of every device subset; infinite for the empty one."""
    bits = (np.arange(1 << len(speed_G))[:, None] >> np.arange(len(speed_G))) & 1
    speed_Q = bits @ speed_G
    speed_Q[0] = np.finfo(np.float32).max
    return np.asarray(speed_Q, np.float64)


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
def _add_up_subsets(table_Q: npt.NDArray[np.floating], devices: int) -> None:
    """In place: every cell becomes the sum over the subsets of its device set."""
    for g in range(devices):
        bit = 1 << g
        for q in range(1 << devices):
            if q & bit:
                table_Q[q] += table_Q[q ^ bit]


@compiled
def _fill_tables(load_WE: Float32Array, masks_E: IntArray, table_WQ: Float32Array) -> None:
    steps, subsets = table_WQ.shape
    devices = 0
    while (1 << devices) < subsets:
        devices += 1
    for w in range(steps):
        row = table_WQ[w]
        row[:] = 0.0
        for e in range(len(masks_E)):
            row[masks_E[e]] += load_WE[w, e]
        _add_up_subsets(row, devices)


@compiled_finite
def _row_value(
    row_Q: Float32Array,
    first_Q: Float32Array,
    second_Q: Float32Array,
    first: np.float32,
    second: np.float32,
    rate_Q: Float32Array,
) -> np.float32:
    """Worst subset after adding first·first_Q + second·second_Q to a step's table."""
    worst = np.float32(0.0)
    for q in range(len(row_Q)):
        value = (row_Q[q] + first * first_Q[q] + second * second_Q[q]) * rate_Q[q]
        worst = max(worst, value)
    return worst


@compiled
def _penalty(value: float, bend: float) -> float:
    """Cost of one step: overload, and its square so that the tail weighs more."""
    over = max(value - 1.0, 0.0)
    return over + bend * over * over


@compiled
def _mark_change(change_Q: Float32Array, before: int, after: int) -> None:
    """change_Q[q] = [after ⊆ q] − [before ⊆ q]."""
    for q in range(len(change_Q)):
        change_Q[q] = np.float32((q & after) == after) - np.float32((q & before) == before)


@compiled
def anneal(
    load_WE: Float32Array,
    weight_W: FloatArray,
    rate_Q: Float32Array,
    slots_GC: SlotArray,
    slots_G: IntArray,
    moves: int,
    hot: float,
    cold: float,
    bend: float,
    state: RandomState,
) -> tuple[float, SlotArray]:
    """Improve a placement in place of one layer; returns (cost, slots [G, C]) of the best seen.

    load_WE: [W, E], every step scaled so that perfect balance is 1. rate_Q: 1 / subset speed,
    scaled alike. cost = sum of weight · (overload + bend · overload²). A candidate is dropped as
    soon as its cost so far exceeds what would be accepted; steps that are worst now come first.
    """
    steps, experts = load_WE.shape
    devices, subsets = len(slots_G), len(rate_Q)
    slots_GC = slots_GC.copy()
    masks_E, copies_E = np.zeros(experts, np.int64), np.zeros(experts, np.int64)
    for g in range(devices):
        for c in range(slots_G[g]):
            if slots_GC[g, c] >= 0:
                masks_E[slots_GC[g, c]] |= 1 << g
                copies_E[slots_GC[g, c]] += 1
    table_WQ = np.empty((steps, subsets), np.float32)
    _fill_tables(load_WE, masks_E, table_WQ)
    first_Q, second_Q = np.zeros(subsets, np.float32), np.zeros(subsets, np.float32)
    cost_W, tried_W = np.empty(steps), np.empty(steps)
    for w in range(steps):
        value = _row_value(
            table_WQ[w], first_Q, second_Q, np.float32(0.0), np.float32(0.0), rate_Q
        )
        cost_W[w] = weight_W[w] * _penalty(value, bend)
    order = np.argsort(-cost_W)
    cost = cost_W.sum()
    best_cost, best_GC = cost, slots_GC.copy()
    cooling = (cold / hot) ** (1.0 / max(moves - 1, 1))
    temperature = hot
    for move in range(moves):
        temperature *= cooling
        g1 = next_below(state, devices)
        c1 = next_below(state, slots_G[g1])
        e1 = slots_GC[g1, c1]
        g2, c2, e2 = -1, -1, -1
        if e1 >= 0 and (copies_E[e1] == 1 or next_random(state) < 0.5):
            # Swap with, or move into, a slot of another device.
            g2 = next_below(state, devices)
            c2 = next_below(state, slots_G[g2])
            e2 = slots_GC[g2, c2]
            if g2 == g1 or e2 == e1 or (masks_E[e1] >> g2) & 1:
                continue
            if e2 >= 0 and (masks_E[e2] >> g1) & 1:
                continue
        else:
            # Give the slot to an expert the device does not hold.
            e2 = next_below(state, experts)
            if e2 == e1 or (masks_E[e2] >> g1) & 1:
                continue
        after1, after2 = 0, 0
        if e1 >= 0:
            after1 = masks_E[e1] ^ (1 << g1)
            if g2 >= 0:
                after1 |= 1 << g2
            _mark_change(first_Q, masks_E[e1], after1)
        if e2 >= 0:
            after2 = masks_E[e2] | (1 << g1)
            if g2 >= 0:
                after2 ^= 1 << g2
            _mark_change(second_Q, masks_E[e2], after2)
        allowed = cost - temperature * np.log(1.0 - next_random(state))
        total, dropped = 0.0, False
        for i in range(steps):
            w = order[i]
            first = load_WE[w, e1] if e1 >= 0 else np.float32(0.0)
            second = load_WE[w, e2] if e2 >= 0 else np.float32(0.0)
            value = _row_value(table_WQ[w], first_Q, second_Q, first, second, rate_Q)
            tried_W[w] = weight_W[w] * _penalty(value, bend)
            total += tried_W[w]
            if total > allowed:
                dropped = True
                break
        if dropped:
            continue
        for w in range(steps):
            first = load_WE[w, e1] if e1 >= 0 else np.float32(0.0)
            second = load_WE[w, e2] if e2 >= 0 else np.float32(0.0)
            cost_W[w] = tried_W[w]
            for q in range(subsets):
                table_WQ[w, q] += first * first_Q[q] + second * second_Q[q]
        slots_GC[g1, c1] = e2
        if e1 >= 0:
            masks_E[e1] = after1
        if e2 >= 0:
            masks_E[e2] = after2
        if g2 >= 0:
            slots_GC[g2, c2] = e1
        else:
            copies_E[e2] += 1
            if e1 >= 0:
                copies_E[e1] -= 1
        cost = total
        if cost < best_cost:
            best_cost, best_GC = cost, slots_GC.copy()
        if move % 64 == 0:
            order = np.argsort(-cost_W)
    return best_cost, best_GC
