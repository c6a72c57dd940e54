"""Which slots hold an expert: the index every dispatch rule reads.

Knows one layer's slots. Knows nothing of tokens, policies or links. Compiled, because the planner
builds it anew for every candidate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...foundation.arrays import Int32Array
from ...foundation.compiled import compiled


@compiled
def index_slots(slots_S: Any, num_experts: int) -> Any:
    """(start [E + 1], slot [R]) int32: expert e sits in slot[start[e]:start[e + 1]], ascending.

    slots_S: [S] expert in each global slot, negative = empty.
    """
    start = np.zeros(num_experts + 1, np.int32)
    for expert in slots_S:
        if expert >= 0:
            start[expert + 1] += 1
    for expert in range(num_experts):
        start[expert + 1] += start[expert]
    slot = np.empty(start[num_experts], np.int32)
    cursor = start[:num_experts].copy()
    for s in range(len(slots_S)):
        expert = slots_S[s]
        if expert >= 0:
            slot[cursor[expert]] = s
            cursor[expert] += 1
    return start, slot


@compiled
def distinct_devices(start: Any, slot: Any, slots_per_device: int) -> Any:
    """(start [E + 1], slot [R']) with one slot per (expert, device): the lowest.

    A second replica on one device can take no token that the first could not.
    """
    experts = len(start) - 1
    first = np.zeros(experts + 1, np.int32)
    kept = np.empty(len(slot), np.int32)
    count = 0
    for expert in range(experts):
        last_device = -1
        for r in range(start[expert], start[expert + 1]):
            device = slot[r] // slots_per_device
            if device != last_device:
                kept[count] = slot[r]
                count += 1
                last_device = device
        first[expert + 1] = count
    return first, kept[:count]


@dataclass(frozen=True)
class ReplicaTable:
    """One layer's replicas by expert. `start`, `slot`: all of them; `*_unique`: one per device."""

    slots_per_device: int
    start_E: Int32Array
    slot_R: Int32Array
    start_unique_E: Int32Array
    slot_unique_R: Int32Array

    @classmethod
    def of(cls, slots_GC: npt.NDArray[Any], num_experts: int) -> ReplicaTable:
        """Index one layer of a plan. slots_GC: [G, C] expert per slot, -1 = empty."""
        width = int(slots_GC.shape[1])
        slots_S = np.ascontiguousarray(slots_GC, np.int16).reshape(-1)
        start, slot = index_slots(slots_S, num_experts)
        unique = distinct_devices(start, slot, width)
        return cls(width, start, slot, *unique)

    def arrays(self) -> tuple[Int32Array, Int32Array, Int32Array, Int32Array, int]:
        """What the compiled policies take, in their order."""
        return (self.start_E, self.slot_R, self.start_unique_E, self.slot_unique_R,
                self.slots_per_device)
