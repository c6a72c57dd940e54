"""The nearest plan that an engine can hold: the fewest slots changed.

Knows slots. Knows nothing of loads, so a dropped or added replica is chosen by counting replicas
alone.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ...foundation.arrays import IntArray
from ..plan import EMPTY, Plan

Step = tuple[int, int, int]      # layer, device, and the expert to drop or the slots to fill


def nearest_plan(plan: Plan, *, duplicates: bool, uneven: bool) -> Plan:
    """`plan` made holdable. duplicates, uneven: whether the engine takes those as they are.

    Second replicas on a device go first. Then replicas are dropped or added until all devices fill
    as many slots in every layer (`even_steps`); added is the expert with fewest replicas among
    those the device lacks, ties to the lower id. A changed plan has no evidence.
    """
    slots_LGC = plan.slots.astype(np.int64)
    if not duplicates:
        _drop_duplicates_inplace(slots_LGC)
    if not uneven:
        _, drops, fills = even_steps(slots_LGC, plan.num_experts)
        for layer, device, expert in drops:
            row = slots_LGC[layer, device]
            row[np.flatnonzero(row == expert)[-1]] = EMPTY
        for layer, device, count in fills:
            _fill_inplace(slots_LGC[layer], device, count, plan.num_experts)
    if np.array_equal(slots_LGC, plan.slots):
        return plan
    return dataclasses.replace(
        plan, slots=closed_up(slots_LGC).astype(np.int16), evidence=None
    )


def even_steps(slots_LGC: IntArray, num_experts: int) -> tuple[int, list[Step], list[Step]]:
    """(C, drops, fills): the fewest replicas to drop and slots to fill until every device holds C.

    Ties: the lower C. A dropped replica is never an expert's last. Filling every device like the
    fullest needs no drop, so there always is an answer.
    """
    filled_LG = (slots_LGC >= 0).sum(axis=2)
    by_cost = sorted(
        (int(np.abs(filled_LG - target).sum()), int(target)) for target in np.unique(filled_LG)
    )
    tried = ((target, _drops(slots_LGC, num_experts, target)) for _, target in by_cost)
    target, drops = next((target, drops) for target, drops in tried if drops is not None)
    fills = [
        (int(layer), int(device), target - int(filled_LG[layer, device]))
        for layer, device in np.argwhere(filled_LG < target)
    ]
    return target, drops, fills


def closed_up(slots_LGC: IntArray) -> IntArray:
    """Empty slots moved behind the filled ones, whose order is kept."""
    order = np.argsort(slots_LGC < 0, axis=2, kind="stable")
    return np.take_along_axis(slots_LGC, order, axis=2)


def _drops(slots_LGC: IntArray, num_experts: int, target: int) -> list[Step] | None:
    """Replicas to drop so that no device holds more than `target`; None where too few can go."""
    drops = []
    filled_LG = (slots_LGC >= 0).sum(axis=2)
    for layer in np.flatnonzero((filled_LG > target).any(axis=1)):
        held_GE = np.zeros((slots_LGC.shape[1], num_experts), np.int64)
        device, slot = np.nonzero(slots_LGC[layer] >= 0)
        np.add.at(held_GE, (device, slots_LGC[layer, device, slot]), 1)
        dropped_GE = _layer_drops(held_GE, np.maximum(filled_LG[layer] - target, 0))
        if dropped_GE is None:
            return None
        drops += [
            (int(layer), int(device), int(expert))
            for device, expert in np.argwhere(dropped_GE)
            for _ in range(dropped_GE[device, expert])
        ]
    return drops


def _layer_drops(held_GE: IntArray, excess_G: IntArray) -> IntArray | None:
    """[G, E] replicas to drop, `excess_G` from each device, no expert's last; None where
    impossible.

    A flow: source -> device (its excess) -> expert (replicas held) -> sink (all replicas but one).
    """
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import maximum_flow

    devices, experts = held_GE.shape
    sink = 1 + devices + experts
    capacity = np.zeros((sink + 1, sink + 1), np.int32)
    capacity[0, 1 : 1 + devices] = excess_G
    capacity[1 : 1 + devices, 1 + devices : sink] = held_GE
    capacity[1 + devices : sink, sink] = np.maximum(held_GE.sum(axis=0) - 1, 0)
    found = maximum_flow(csr_matrix(capacity), 0, sink)
    if found.flow_value < excess_G.sum():
        return None
    flow: IntArray = found.flow[1 : 1 + devices, 1 + devices : sink].toarray()
    return flow


def _fill_inplace(slots_GC: IntArray, device: int, count: int, num_experts: int) -> None:
    """Fill the first `count` empty slots of the device."""
    replicas_E = np.bincount(slots_GC[slots_GC >= 0], minlength=num_experts)
    for slot in np.flatnonzero(slots_GC[device] == EMPTY)[:count]:
        lacks_E = ~np.isin(np.arange(num_experts), slots_GC[device])
        candidates = lacks_E if lacks_E.any() else np.ones(num_experts, bool)
        expert = int(np.where(candidates, replicas_E, np.iinfo(np.int64).max).argmin())
        slots_GC[device, slot] = expert
        replicas_E[expert] += 1


def _drop_duplicates_inplace(slots_LGC: IntArray) -> None:
    """Empty every second replica of an expert on a device; the first slot keeps it."""
    for row in slots_LGC.reshape(-1, slots_LGC.shape[2]):
        again = np.ones(len(row), bool)
        again[np.unique(row, return_index=True)[1]] = False
        row[again] = EMPTY
