"""Replicas of experts onto devices, heaviest first, never two of one expert on a device.

Knows weights of replicas, slots and speeds of devices. Knows nothing of steps, dispatch or search.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...foundation.arrays import FloatArray, IntArray, SlotArray
from ...foundation.compiled import compiled

EMPTY = -1


def pack_heaviest_first(
    load_E: FloatArray,
    replicas_E: IntArray,
    slots_G: IntArray,
    speed_G: FloatArray | None = None,
    *,
    size_E: FloatArray | None = None,
    capacity_G: FloatArray | None = None,
) -> SlotArray:
    """Place every replica of one layer by the longest-processing-time rule.

    load_E [E] tokens, split evenly over replicas_E [E]; slots_G [G] slots per device; speed_G [G]
    relative speeds (1 where None); size_E [E] bytes and capacity_G [G] bytes where memory limits
    too. Returns slots_GC [G, max slots] int16, EMPTY where a slot holds nothing. The heaviest
    replica goes to the device that would finish first, among devices with a free slot, enough
    capacity and no replica of that expert; ties go to the lower expert id, then the lower device.
    Where no device qualifies, another expert is moved out of the way; if that fails too the replica
    is left out. Where that leaves an expert without any, memory is short: then every expert is
    placed once, largest first, before any second replica. An expert missing even so fits nowhere by
    this rule, and the caller must refuse. Cost O(S·G). Source: Graham (1969) with a count limit per
    device.
    """
    experts, devices = len(load_E), len(slots_G)
    weight_E = np.asarray(load_E, np.float64) / np.maximum(replicas_E, 1)
    order = np.lexsort((np.arange(experts), -weight_E)).astype(np.int64)
    speed = np.ones(devices) if speed_G is None else np.asarray(speed_G, np.float64)
    size = np.zeros(experts) if size_E is None else np.asarray(size_E, np.float64)
    room = np.full(devices, np.inf) if capacity_G is None else np.asarray(capacity_G, np.float64)
    replicas, slots = np.asarray(replicas_E, np.int64), np.asarray(slots_G, np.int64)
    packed = _pack(weight_E, replicas, order[:0], order, slots, speed, size, room.copy())
    if len(np.unique(packed[packed >= 0])) < experts:
        largest = np.lexsort((np.arange(experts), -weight_E, -size)).astype(np.int64)
        packed = _pack(weight_E, replicas, largest, order, slots, speed, size, room.copy())
    return packed


@compiled
def _pack(
    weight_E: FloatArray,
    replicas_E: IntArray,
    first_order: IntArray,
    order: IntArray,
    slots_G: IntArray,
    speed_G: FloatArray,
    size_E: FloatArray,
    capacity_G: FloatArray,
) -> SlotArray:
    """Experts in `order`, all replicas of each; before that, one each in `first_order` if given."""
    devices = len(slots_G)
    slots_GC = np.full((devices, slots_G.max()), EMPTY, np.int16)
    held_EG = np.zeros((len(weight_E), devices), np.bool_)
    load_G, used_G = np.zeros(devices), np.zeros(devices, np.int64)
    placed_E = np.zeros(len(weight_E), np.int64)
    free = slots_G.sum()  # every expert that waits still needs one of these
    waiting = len(order)
    firsts = len(first_order) > 0
    for turn in range(2 if firsts else 1):
        for e in first_order if firsts and turn == 0 else order:
            if placed_E[e] == 0:
                waiting -= 1
            most = 1 if firsts and turn == 0 else replicas_E[e]
            while placed_E[e] < most:
                if placed_E[e] > 0 and free <= waiting:
                    break
                best, best_load = -1, np.inf
                for g in range(devices):
                    if held_EG[e, g] or used_G[g] >= slots_G[g] or size_E[e] > capacity_G[g]:
                        continue
                    finish = (load_G[g] + weight_E[e]) / speed_G[g]
                    if finish < best_load:
                        best, best_load = g, finish
                if best < 0:
                    best = _evict(
                        e, slots_GC, held_EG, used_G, slots_G, load_G, weight_E, size_E, capacity_G
                    )
                if best < 0:
                    break
                slots_GC[best, used_G[best]] = e
                used_G[best] += 1
                load_G[best] += weight_E[e]
                capacity_G[best] -= size_E[e]
                held_EG[e, best] = True
                placed_E[e] += 1
                free -= 1
    return slots_GC


@compiled
def _evict(
    e: int,
    slots_GC: SlotArray,
    held_EG: npt.NDArray[np.bool_],
    used_G: IntArray,
    slots_G: IntArray,
    load_G: FloatArray,
    weight_E: FloatArray,
    size_E: FloatArray,
    capacity_G: FloatArray,
) -> int:
    """Move the lightest possible expert from a full device to one with a free slot.

    Returns the device that can now hold e, or -1.
    """
    best_to, best_from, best_slot, best_weight = -1, -1, -1, np.inf
    for to in range(len(slots_G)):
        if used_G[to] >= slots_G[to]:
            continue
        for source in range(len(slots_G)):
            if source == to or held_EG[e, source]:
                continue
            for c in range(used_G[source]):
                f = slots_GC[source, c]
                if held_EG[f, to] or size_E[f] > capacity_G[to]:
                    continue
                if size_E[e] > capacity_G[source] + size_E[f]:
                    continue
                if weight_E[f] < best_weight:
                    best_to, best_from, best_slot, best_weight = to, source, c, weight_E[f]
    if best_to < 0:
        return -1
    f = slots_GC[best_from, best_slot]
    used_G[best_from] -= 1
    slots_GC[best_from, best_slot] = slots_GC[best_from, used_G[best_from]]
    slots_GC[best_from, used_G[best_from]] = EMPTY
    slots_GC[best_to, used_G[best_to]] = f
    used_G[best_to] += 1
    held_EG[f, best_from], held_EG[f, best_to] = False, True
    load_G[best_from] -= weight_E[f]
    load_G[best_to] += weight_E[f]
    capacity_G[best_from] += size_E[f]
    capacity_G[best_to] -= size_E[f]
    return best_from
