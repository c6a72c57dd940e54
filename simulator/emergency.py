"""The plan for the moment after devices are lost: every expert on a survivor, fewest weights moved.

Knows slots. Knows nothing of time or traffic. Equal (plan, lost devices) give equal slots, so all
survivors can compute it alone.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from ..errors import InfeasibleError
from ..placement.cluster import Cluster
from ..placement.plan import EMPTY, Plan, Provenance


def survivors_plan(plan: Plan, lost: frozenset[int], cluster: Cluster) -> Plan:
    """Keep what the survivors hold; put each orphaned expert into one more slot.

    Lost devices' slots become empty. Orphans go, in order of their number, to the survivor that
    holds the fewest orphans so far (ties to the lower device): into an empty slot, else over a
    copy of the expert with the most copies left. Raises InfeasibleError when the survivors have
    fewer slots than experts.
    """
    slots = plan.slots.copy()
    slots[:, sorted(lost)] = EMPTY
    for layer in range(plan.num_layers):
        _cover_layer(slots[layer], plan, layer, lost, cluster)
    return dataclasses.replace(
        plan, slots=slots, evidence=None,
        provenance=Provenance(method="survivors", notes=(f"lost devices {sorted(lost)}",)),
    )


def _cover_layer(
    slots_GC: npt.NDArray[np.int16],
    plan: Plan,
    layer: int,
    lost: frozenset[int],
    cluster: Cluster,
) -> None:
    """Fill one layer's orphans in place."""
    alive = np.array([g for g in range(plan.num_devices) if g not in lost], np.int64)
    copies_E = np.bincount(slots_GC[slots_GC >= 0], minlength=plan.num_experts)
    taken_G = np.zeros(plan.num_devices, np.int64)
    for orphan in np.flatnonzero(copies_E == 0).tolist():
        at = _roomiest(slots_GC, alive, copies_E, taken_G, cluster.slots_G)
        if at is None:
            raise InfeasibleError(
                f"layer {layer}: {len(alive)} surviving devices hold {int((copies_E > 0).sum())} "
                f"of {plan.num_experts} experts and have no slot left: plan with more slots, or "
                "bring devices back"
            )
        device, slot = at
        if slots_GC[device, slot] >= 0:
            copies_E[slots_GC[device, slot]] -= 1
        slots_GC[device, slot] = orphan
        copies_E[orphan] += 1
        taken_G[device] += 1


def _roomiest(
    slots_GC: npt.NDArray[np.int16],
    alive: npt.NDArray[np.int64],
    copies_E: npt.NDArray[np.int64],
    taken_G: npt.NDArray[np.int64],
    slots_G: npt.NDArray[np.int64],
) -> tuple[int, int] | None:
    """The slot to give up: on the survivor with fewest orphans; empty first, then spare copies."""
    for device in sorted(alive.tolist(), key=lambda g: (taken_G[g], g)):
        held_C = slots_GC[device, : slots_G[device]]
        empty = np.flatnonzero(held_C == EMPTY)
        if len(empty):
            return device, int(empty[0])
        spare = np.where(copies_E[held_C] > 1, copies_E[held_C], 0)
        if spare.max(initial=0) > 0:
            return device, int(np.argmax(spare))
    return None
