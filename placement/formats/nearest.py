"""The nearest plan an engine can hold.

Changes only what it must: empty slots are filled and second copies on one device replaced. Each
such slot gets the expert with fewest copies in its layer among those its device lacks (ties: the
lowest expert). Every other slot stays.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from ...errors import InfeasibleError
from ..plan import EMPTY, Plan


def nearest_plan(plan: Plan, *, duplicates: bool, uneven: bool) -> Plan:
    """`plan` made holdable. duplicates, uneven: whether the engine takes those as they are.

    Raises InfeasibleError when a device has more slots than there are experts to tell apart.
    """
    slots = plan.slots.astype(np.int64)
    for layer in range(plan.num_layers):
        if not duplicates:
            _clear_duplicates_inplace(slots[layer])
        if not uneven or not duplicates:
            _fill_inplace(slots[layer], plan, layer, keep_empty=uneven)
    if np.array_equal(slots, plan.slots):
        return plan
    return dataclasses.replace(plan, slots=slots.astype(np.int16), evidence=None)


def _clear_duplicates_inplace(slots_GC: npt.NDArray[np.int64]) -> None:
    """Empty every second copy of an expert on a device; the lowest slot keeps it."""
    for row in slots_GC:
        seen: set[int] = set()
        for c, expert in enumerate(row):
            if expert != EMPTY and int(expert) in seen:
                row[c] = EMPTY
            seen.add(int(expert))


def _fill_inplace(
    slots_GC: npt.NDArray[np.int64], plan: Plan, layer: int, *, keep_empty: bool
) -> None:
    """Fill empty slots; with keep_empty only those that were filled in the plan."""
    experts = plan.num_experts
    copies_E = np.bincount(slots_GC[slots_GC >= 0], minlength=experts)
    for device, c in np.argwhere(slots_GC == EMPTY):
        if keep_empty and plan.slots[layer, device, c] == EMPTY:
            continue
        held = np.isin(np.arange(experts), slots_GC[device])
        if held.all():
            raise InfeasibleError(
                f"device {device} has more slots ({slots_GC.shape[1]}) than experts ({experts}): "
                "plan with fewer slots"
            )
        chosen = int(np.argmin(np.where(held, np.iinfo(np.int64).max, copies_E)))
        slots_GC[device, c] = chosen
        copies_E[chosen] += 1
