"""Better packing of average loads by exchanges alone: the second half of `lpt_swap`.

Knows average loads of one layer under an even split, slots, speeds and bytes.
"""

from __future__ import annotations

import numpy as np

from ...foundation.arrays import FloatArray, SlotArray
from ...foundation.compiled import compiled


def swap_with_hottest(
    slots_GC: SlotArray,
    load_E: FloatArray,
    speed_G: FloatArray,
    *,
    size_E: FloatArray | None = None,
    capacity_G: FloatArray | None = None,
    most_swaps: int = 10_000,
) -> SlotArray:
    """Exchange slots between the hottest device and another while the worse of the two cools most.

    size_E, capacity_G: bytes, where memory limits too. Replica counts stay. Returns new slots.
    Ties: lower device, then lower slots. Deterministic.
    """
    slots_GC = slots_GC.copy()
    copies_E = np.bincount(slots_GC[slots_GC >= 0].astype(np.int64), minlength=len(load_E))
    share_E = np.asarray(load_E, np.float64) / np.maximum(copies_E, 1)
    size = np.zeros(len(load_E)) if size_E is None else np.asarray(size_E, np.float64)
    left_G = np.full(len(slots_GC), np.inf) if capacity_G is None else capacity_G - np.where(
        slots_GC >= 0, size[np.maximum(slots_GC, 0)], 0.0).sum(axis=1)
    _swap_with_hottest(
        slots_GC, share_E, np.asarray(speed_G, np.float64), size, left_G, most_swaps
    )
    return slots_GC


@compiled
def _held(slots_GC: SlotArray, g: int, expert: int) -> bool:
    for c in range(slots_GC.shape[1]):
        if slots_GC[g, c] == expert:
            return True
    return False


@compiled
def _swap_with_hottest(
    slots_GC: SlotArray, share_E: FloatArray, speed_G: FloatArray, size_E: FloatArray,
    left_G: FloatArray, most_swaps: int,
) -> None:
    devices, width = slots_GC.shape
    load_G = np.zeros(devices)
    for g in range(devices):
        for c in range(width):
            if slots_GC[g, c] >= 0:
                load_G[g] += share_E[slots_GC[g, c]]
    for _ in range(most_swaps):
        hot = int(np.argmax(load_G / speed_G))
        worst = load_G[hot] / speed_G[hot]
        best = worst * (1 - 1e-12)
        best_c, best_g, best_d = -1, -1, -1
        for c in range(width):
            e = slots_GC[hot, c]
            if e < 0:
                continue
            for g in range(devices):
                if g == hot or load_G[g] / speed_G[g] >= best or _held(slots_GC, g, e):
                    continue
                for d in range(width):
                    f = slots_GC[g, d]
                    if f < 0 or share_E[f] >= share_E[e]:
                        continue
                    if size_E[e] - size_E[f] > left_G[g] or size_E[f] - size_E[e] > left_G[hot]:
                        continue
                    gain = share_E[e] - share_E[f]
                    after = max(
                        (load_G[hot] - gain) / speed_G[hot], (load_G[g] + gain) / speed_G[g]
                    )
                    if after < best and not _held(slots_GC, hot, f):
                        best, best_c, best_g, best_d = after, c, g, d
        if best_c < 0:
            return
        e, f = slots_GC[hot, best_c], slots_GC[best_g, best_d]
        slots_GC[hot, best_c], slots_GC[best_g, best_d] = f, e
        load_G[hot] += share_E[f] - share_E[e]
        load_G[best_g] += share_E[e] - share_E[f]
        left_G[hot] += size_E[e] - size_E[f]
        left_G[best_g] += size_E[f] - size_E[e]
