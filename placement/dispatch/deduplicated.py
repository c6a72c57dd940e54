"""`balanced` where copies to one place are sent once: tokens that cross anyway carry the balance.

Under `per_node` (place = node) and `per_rank` (place = rank) a token pays for the places it visits,
not for its experts. Knows one step's ids and home ranks and one layer's slots. Compiled, no
randomness.

The rule. 1. A token must visit its own place and the only place of every expert that has one.
Its remaining experts, in choice order, join a place it visits already; if there is none, the token
opens the place that serves most of its experts not yet served. 2. Its assignments are counted by
class: expert and the set of the expert's places it visits, free for it. 3. The flattest split sets
the caps; within them as few assignments as possible leave their free places (`flow.py`), one to
another node counting as three inside. So copies are given up only where balance needs it, and what
balances is first of all the choice among free places. 4. Every class's flow is divided among home
ranks, own slots first, then in turn; a rank's tokens of a class take, in order, a slot on a rank
they visit already, else the lowest with quota left.

A live rank can follow it: it classifies its own tokens (`count_classes`), all ranks gather the
counts by (home rank, class) in place of those by (home rank, expert), each divides alike
(`split_classes`) and places its own tokens (`assign_classes`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ...foundation.compiled import compiled
from .balanced import split_flat, total_over
from .dedup_classes import ClassTable, class_places, classify
from .min_max_flow import push_excess
from .water_filling import fill_flat

OPEN_NEAR, OPEN_FAR = 1, 3

IntArray = npt.NDArray[np.int32]
# Block of each class; a block's first option; each option's slot; quota by home rank and option.
ClassQuotas = tuple[IntArray, IntArray, IntArray, IntArray]


def count_classes(
    ids_TK: IntArray, home_T: IntArray, table: ClassTable
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(class of every assignment [T, K], tokens by home rank and class [G, X]).

    A live rank passes its own tokens and uses its own row.
    """
    class_TK = np.empty(ids_TK.shape, np.int64)
    classify(ids_TK, home_T, *table.places(), class_TK)
    counts_GX = np.zeros((len(table.node_G), table.num_classes), np.int64)
    _count(class_TK, home_T, counts_GX)
    return class_TK, counts_GX


def split_classes(
    counts_GX: npt.NDArray[np.int64],
    table: ClassTable,
    speed_G: npt.NDArray[np.float64],
    slack: float,
) -> ClassQuotas:
    """Quotas by home rank and (class, slot), from the counts of all ranks; for `assign_classes`."""
    quotas: ClassQuotas = _split(counts_GX, *table.slots(), speed_G, slack)
    return quotas


def assign_classes(
    ids_TK: IntArray,
    home_T: IntArray,
    class_TK: npt.NDArray[np.int64],
    table: ClassTable,
    quotas: ClassQuotas,
) -> IntArray:
    """The slot of every assignment; uses the quotas up."""
    slot_TK = np.empty(ids_TK.shape, np.int32)
    _assign(ids_TK, home_T, class_TK, table.start_E, table.slot_R, table.slots_per_device,
            len(table.node_G), *quotas, slot_TK)
    return slot_TK


def slot_quotas(
    counts_GX: npt.NDArray[np.int64], table: ClassTable, quotas: ClassQuotas
) -> IntArray:
    """[G, S] int32 what each home rank sends to each slot: the sizes of the exchange.

    quotas: fresh from `split_classes`, not yet used up.
    """
    _, _, slot_O, quota_GO = quotas
    quotas_GS = np.zeros((len(table.node_G), len(table.node_G) * table.slots_per_device), np.int32)
    np.add.at(quotas_GS.T, slot_O, quota_GO.T)
    for expert in np.flatnonzero(np.diff(table.start_E) == 1):
        classes = slice(*table.first_E[expert : expert + 2])
        quotas_GS[:, table.slot_R[table.start_E[expert]]] += counts_GX[:, classes].sum(axis=1)
    return quotas_GS


@compiled
def route_merged(
    ids_TK: Any, home_T: Any, start_E: Any, slot_R: Any, slots_per_device: int, place_G: Any,
    node_G: Any, node_P: Any, spot_R: Any, place_R: Any, count_E: Any, first_E: Any, groups: int,
    speed_G: Any, slack: float, slot_TK: Any,
) -> None:
    """The three functions above for one step and all ranks, in one compiled call."""
    class_TK = np.empty(ids_TK.shape, np.int64)
    classify(ids_TK, home_T, start_E, place_G, node_G, node_P, spot_R, place_R, count_E, first_E,
             groups, class_TK)
    counts_GX = np.zeros((len(node_G), first_E[len(first_E) - 1]), np.int64)
    _count(class_TK, home_T, counts_GX)
    block_X, start_B, slot_O, quota_GO = _split(
        counts_GX, start_E, slot_R, slots_per_device, node_G, place_R, count_E, first_E, groups,
        speed_G, slack,
    )
    _assign(ids_TK, home_T, class_TK, start_E, slot_R, slots_per_device, len(node_G), block_X,
            start_B, slot_O, quota_GO, slot_TK)


@compiled
def _count(class_TK: Any, home_T: Any, counts_GX: Any) -> None:
    for t in range(class_TK.shape[0]):
        for k in range(class_TK.shape[1]):
            if class_TK[t, k] >= 0:
                counts_GX[home_T[t], class_TK[t, k]] += 1


@compiled
def _split(
    counts_GX: Any, start_E: Any, slot_R: Any, slots_per_device: int, node_G: Any, place_R: Any,
    count_E: Any, first_E: Any, groups: int, speed_G: Any, slack: float,
) -> Any:
    """(block_X, start_B, slot_O, quota_GO): a block per class with tokens, its slots and quotas."""
    counts_X = total_over(counts_GX)
    total_E = np.zeros(len(count_E), np.int64)
    for e in range(len(count_E)):
        for x in range(first_E[e], first_E[e + 1]):
            total_E[e] += counts_X[x]
    flat = split_flat(total_E, start_E, slot_R, slots_per_device, speed_G, slack)
    load_G, cap_G = flat[4], flat[6]
    class_B, expert_B = _blocks(counts_X, start_E, first_E)
    start_B = np.zeros(len(class_B) + 1, np.int32)
    for b in range(len(class_B)):
        start_B[b + 1] = start_B[b] + start_E[expert_B[b] + 1] - start_E[expert_B[b]]
    slot_O = np.empty(start_B[len(class_B)], np.int32)
    cost_O = np.zeros(len(slot_O), np.int32)
    end_B = np.empty(len(class_B), np.int32)
    tokens_B = np.empty(len(class_B), np.int64)
    for b in range(len(class_B)):
        tokens_B[b] = counts_X[class_B[b]]
        free, node = class_places(class_B[b], expert_B[b], count_E, first_E, groups)
        end_B[b] = _list_options(
            start_B[b], start_E[expert_B[b]], start_E[expert_B[b] + 1], free, node, slot_R,
            slots_per_device, place_R, node_G, slot_O, cost_O,
        )
    flow_O = np.zeros(len(slot_O), np.int64)
    device_O = slot_O // np.int32(slots_per_device)
    fill_flat(tokens_B, start_B, end_B, device_O, flow_O, load_G, speed_G, cap_G)
    push_excess(start_B, device_O, cost_O, flow_O, load_G, cap_G)
    block_X = np.empty(len(counts_X), np.int32)      # read for classes in class_B only
    for b in range(len(class_B)):
        block_X[class_B[b]] = b
    quota_GO = np.zeros((len(node_G), len(slot_O)), np.int32)
    _divide(counts_GX, class_B, expert_B, start_B, slot_O, flow_O, slots_per_device, quota_GO)
    return block_X, start_B, slot_O, quota_GO


@compiled
def _blocks(counts_X: Any, start_E: Any, first_E: Any) -> Any:
    """(class_B, expert_B): the classes with tokens and a choice of slots."""
    class_B = np.empty(len(counts_X), np.int64)
    expert_B = np.empty(len(counts_X), np.int32)
    count = 0
    for e in range(len(start_E) - 1):
        if start_E[e + 1] - start_E[e] < 2:
            continue
        for x in range(first_E[e], first_E[e + 1]):
            if counts_X[x] > 0:
                class_B[count] = x
                expert_B[count] = e
                count += 1
    return class_B[:count], expert_B[:count]


@compiled
def _list_options(
    at: int, first: int, last: int, free: int, node: int, slot_R: Any, slots_per_device: int,
    place_R: Any, node_G: Any, slot_O: Any, cost_O: Any,
) -> int:
    """Write one block's slots from option `at` on, free ones first; returns where those end."""
    o = at
    for r in range(first, last):
        if (free >> place_R[r]) & 1:
            slot_O[o] = slot_R[r]
            o += 1
    end = o
    for r in range(first, last):
        if not (free >> place_R[r]) & 1:
            slot_O[o] = slot_R[r]
            near = node < 0 or node_G[slot_R[r] // slots_per_device] == node
            cost_O[o] = OPEN_NEAR if near else OPEN_FAR
            o += 1
    return end


@compiled
def _divide(
    counts_GX: Any, class_B: Any, expert_B: Any, start_B: Any, slot_O: Any, flow_O: Any,
    slots_per_device: int, quota_GO: Any,
) -> None:
    """Each class's flow among home ranks: own slots first, then the rest in turn."""
    homes = counts_GX.shape[0]
    left_G = np.empty(homes, np.int64)
    left_O = flow_O.copy()
    for b in range(len(class_B)):
        for g in range(homes):
            left_G[g] = counts_GX[g, class_B[b]]
        for o in range(start_B[b], start_B[b + 1]):
            home = slot_O[o] // slots_per_device
            own = min(left_O[o], left_G[home])
            quota_GO[home, o] += own
            left_G[home] -= own
            left_O[o] -= own
        o = start_B[b]
        for i in range(homes):
            home = (i + expert_B[b]) % homes
            while left_G[home] > 0:
                while left_O[o] == 0:
                    o += 1
                amount = min(left_O[o], left_G[home])
                quota_GO[home, o] += amount
                left_G[home] -= amount
                left_O[o] -= amount


@compiled
def _assign(
    ids_TK: Any, home_T: Any, class_TK: Any, start_E: Any, slot_R: Any, slots_per_device: int,
    devices: int, block_X: Any, start_B: Any, slot_O: Any, quota_GO: Any, slot_TK: Any,
) -> None:
    """Tokens in order: experts without a choice first, then a slot on a rank already visited."""
    visited_G = np.zeros(devices, np.int64)      # last token to visit, counted from 1
    for t in range(ids_TK.shape[0]):
        home = home_T[t]
        visited_G[home] = t + 1
        for k in range(ids_TK.shape[1]):
            e = ids_TK[t, k]
            slot_TK[t, k] = -1
            if e >= 0 and start_E[e + 1] - start_E[e] == 1:
                slot_TK[t, k] = slot_R[start_E[e]]
                visited_G[slot_R[start_E[e]] // slots_per_device] = t + 1
        for k in range(ids_TK.shape[1]):
            if class_TK[t, k] < 0 or slot_TK[t, k] >= 0:
                continue
            b = block_X[class_TK[t, k]]
            chosen = -1
            for o in range(start_B[b], start_B[b + 1]):
                if quota_GO[home, o] > 0:
                    if visited_G[slot_O[o] // slots_per_device] == t + 1:
                        chosen = o
                        break
                    if chosen < 0:
                        chosen = o
            quota_GO[home, chosen] -= 1
            slot_TK[t, k] = slot_O[chosen]
            visited_G[slot_O[chosen] // slots_per_device] = t + 1
