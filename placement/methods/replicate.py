"""How many replicas each expert gets, and how many slots each layer.

Knows loads and slot counts. Knows nothing of devices' contents (`pack.py` places the replicas) and
nothing of steps or dispatch beyond "an expert's replicas share its load evenly".
"""

from __future__ import annotations

import heapq

import numpy as np

from ...errors import InfeasibleError
from ...foundation.arrays import FloatArray, IntArray
from ...foundation.compiled import compiled


def replicas_by_load(load_E: FloatArray, slots: int, most_replicas: int) -> IntArray:
    """Replicas of each expert so that the heaviest replica is as light as possible.

    load_E: [E] finite, >= 0. slots: S >= E replicas to hand out. most_replicas: no expert gets more
    (the number of devices, since two replicas on one device are waste). Returns replicas_E [E]
    int64, each in 1..most_copies, summing to min(S, E·most_replicas). Gives one replica at a time
    to the largest load per replica; this is optimal for max load/replicas. Ties go to the expert
    with fewer replicas, then to the lower id, so a layer that nobody used spreads its spare slots
    evenly. Raises InfeasibleError if S < E. Cost O(S log E).
    """
    experts = len(load_E)
    if slots < experts:
        raise InfeasibleError(
            f"{slots} slots cannot hold {experts} experts: {experts - slots} slots short; add "
            "devices or slots per device"
        )
    spare = min(slots, experts * most_replicas) - experts
    return _hand_out(np.ascontiguousarray(load_E, np.float64), spare, most_replicas)


@compiled
def _hand_out(load_E: FloatArray, spare: int, most_replicas: int) -> IntArray:
    """Spare replicas one by one from a heap ordered by (-load per replica, replicas, id)."""
    replicas_E = np.ones(len(load_E), np.int64)
    if spare == 0 or most_replicas == 1:
        return replicas_E
    heap = [(-load_E[e], 1, e) for e in range(len(load_E))]
    heapq.heapify(heap)
    for _ in range(spare):
        _, replicas, e = heap[0]
        replicas_E[e] = replicas + 1
        if replicas + 1 < most_replicas:
            heapq.heapreplace(heap, (-load_E[e] / (replicas + 1), replicas + 1, e))
        else:
            heapq.heappop(heap)
    return replicas_E


def lightest_heaviest_replica(
    load_E: FloatArray, most_spare: int, most_replicas: int
) -> FloatArray:
    """[R+1] load of the heaviest replica with 0..R = most_spare spare slots; see
    `replicas_by_load`."""
    load = np.ascontiguousarray(load_E, np.float64)
    return _heaviest_by_spare(load, most_spare, most_replicas)


@compiled
def _heaviest_by_spare(load_E: FloatArray, most_spare: int, most_replicas: int) -> FloatArray:
    heap = [(-load_E[e], 1, e) for e in range(len(load_E))]
    heapq.heapify(heap)
    heaviest_R, capped = np.zeros(most_spare + 1), 0.0
    for spare in range(most_spare + 1):
        heaviest_R[spare] = max(capped, -heap[0][0] if len(heap) > 0 else 0.0)
        if len(heap) == 0:
            continue
        load, replicas, e = heap[0]
        if replicas < most_replicas:
            heapq.heapreplace(heap, (-load_E[e] / (replicas + 1), replicas + 1, e))
        else:
            capped = max(capped, -load)
            heapq.heappop(heap)
    return heaviest_R


def share_slots_between_layers(cost_LR: FloatArray, budget: int) -> IntArray:
    """Spare slots per layer under one budget for all layers, by marginal benefit.

    cost_LR: [L, R+1] cost of layer l with r spare slots (any unit, added over layers); inf = not
    allowed. budget: spare slots in all. Returns spare_L [L] int64 in 0..R.
    Works on each layer's lower convex envelope, so a benefit that comes only after several slots
    is found; steps that would overshoot the budget are skipped. Slots that bring nothing stay
    unused. Ties go to the lower layer. Source: the knapsack of marginal benefit in CRAFT.
    """
    layers, widest = cost_LR.shape
    spare_L, left = np.zeros(layers, np.int64), budget
    heap: list[tuple[float, int, int]] = []
    for layer in range(layers):
        _push_best_step(heap, cost_LR[layer], layer, 0, widest)
    while heap and left > 0:
        _, layer, target = heapq.heappop(heap)
        step = target - int(spare_L[layer])
        if step > left:
            continue
        spare_L[layer] = target
        left -= step
        _push_best_step(heap, cost_LR[layer], layer, target, widest)
    return spare_L


def _push_best_step(
    heap: list[tuple[float, int, int]], cost_R: FloatArray, layer: int, at: int, widest: int
) -> None:
    """The step along the convex envelope from `at`: the steepest fall per slot, if any."""
    if at + 1 >= widest:
        return
    slope = (cost_R[at + 1 :] - cost_R[at]) / np.arange(1, widest - at)
    best = int(np.argmin(slope))
    if slope[best] < 0:
        heapq.heappush(heap, (float(slope[best]), layer, at + 1 + best))
