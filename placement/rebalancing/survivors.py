"""Survivors: the plan for the moment after devices are lost.

Every expert covered on the devices that are left, with the fewest weights sent: one for each expert
that lost its last replica, nothing else moved. No trace is asked for, so nothing here knows load or
time; a planner with a trace does better afterwards. Equal (plan, lost devices, limits) give equal
slots, so that all survivors can compute it alone. Knows slots and, with a model, bytes
(`survivors_memory.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ...errors import InfeasibleError
from ...foundation.arrays import IntArray, SlotArray
from ...traces.model_spec import ModelSpec
from ..cluster import Cluster
from ..memory import NOT_COUNTED, held_bytes_G
from ..plan import EMPTY, Plan, Provenance
from .spare_memory import cover_within


def survivors_plan(
    plan: Plan, lost: frozenset[int], cluster: Cluster, model: ModelSpec | None = None
) -> Plan:
    """The plan on the same devices with the lost ones' slots empty and every expert covered.

    See `cover_layer` for what goes where; where that takes more than a device's
    expert_memory_bytes, `cover_within`. Without a model sizes are unknown, and the plan's notes say
    that memory was not counted. Raises InfeasibleError where the survivors have fewer slots than
    experts, or not the memory.
    """
    alive = _alive(plan, lost)
    width = max(plan.slots_per_device, int(cluster.slots_G.max()))
    slots = np.full((plan.num_layers, plan.num_devices, width), EMPTY, np.int16)
    for layer in range(plan.num_layers):
        covered = cover_layer(
            plan.slots[layer, alive], plan.num_experts, cluster.slots_G[alive], layer
        )
        slots[layer, alive, : covered.shape[1]] = covered
    notes = [f"lost devices {sorted(lost)}"]
    memory = [cluster.devices[g].expert_memory_bytes for g in alive.tolist()]
    if model is not None and model.knows_bytes:
        most_G = np.array([np.inf if own is None else own for own in memory])
        size_E = model.bytes_per_expert_E()
        if (held_bytes_G(slots[:, alive], size_E) > most_G).any():
            held_LGC = np.full_like(slots[:, alive], EMPTY)
            held_LGC[:, :, : plan.slots_per_device] = plan.slots[:, alive]
            slots[:, alive] = cover_within(held_LGC, cluster.slots_G[alive], size_E, most_G, alive)
    elif any(own is not None for own in memory):
        notes.append(NOT_COUNTED)
    return dataclasses.replace(
        plan, slots=slots, evidence=None,
        provenance=Provenance(method="survivors", notes=tuple(notes)),
    )


def plan_without(plan: Plan, lost: Sequence[int], most_slots: int | None = None) -> Plan:
    """The same for a group that goes on smaller: only the survivors' rows, in their old order.

    most_slots: that a device may use in a layer; None = as many as there are experts. Raises
    InfeasibleError where the survivors cannot hold it.
    """
    alive = _alive(plan, frozenset(lost))
    limit = plan.num_experts if most_slots is None else most_slots
    layers = [
        cover_layer(
            plan.slots[layer, alive], plan.num_experts, np.full(len(alive), limit), layer
        )
        for layer in range(plan.num_layers)
    ]
    width = max(rows.shape[1] for rows in layers)
    slots = np.full((plan.num_layers, len(alive), width), EMPTY, np.int16)
    for layer, rows in enumerate(layers):
        slots[layer, :, : rows.shape[1]] = rows
    return dataclasses.replace(
        plan, slots=slots, cluster_digest="", evidence=None,
        provenance=Provenance(method="survivors", notes=(f"lost devices {sorted(lost)}",)),
    )


def _alive(plan: Plan, lost: frozenset[int]) -> IntArray:
    alive = [g for g in range(plan.num_devices) if g not in lost]
    if not alive:
        raise InfeasibleError(
            f"all {plan.num_devices} devices are lost: nothing is left to serve on; start again"
        )
    return np.array(alive, np.int64)


def cover_layer(
    slots_GC: SlotArray, experts: int, most_slots_G: npt.NDArray[np.int64], layer: int
) -> SlotArray:
    """One layer's surviving slots [G, C] with every expert in at least one: [G, C' >= C].

    Orphans go, in order of their number, into an empty slot of the plan, else into one that the
    device has beyond the plan's, else over a replica: each time on the device that took fewest
    orphans so far, then holds fewest experts, then the lower one. Of replicas the expert with most
    replicas loses one. most_slots_G: limit of each device. Raises InfeasibleError when all limits
    together are below the number of experts.
    """
    held_S = slots_GC[slots_GC >= 0]
    replicas_E = np.bincount(held_S, minlength=experts)
    # Slots in use stay usable even where a limit is below them.
    capacity_G = np.maximum(most_slots_G, (slots_GC >= 0).sum(axis=1))
    width = max(slots_GC.shape[1], int(capacity_G.max()))
    wide_GC = np.full((len(slots_GC), width), EMPTY, np.int16)
    wide_GC[:, : slots_GC.shape[1]] = slots_GC
    taken_G = np.zeros(len(slots_GC), np.int64)
    orphans = np.flatnonzero(replicas_E == 0).tolist()
    if int(capacity_G.sum()) < experts:
        raise InfeasibleError(
            f"layer {layer}: {len(slots_GC)} surviving devices have {int(capacity_G.sum())} slots "
            f"for {experts} experts: {experts - int(capacity_G.sum())} short; bring devices back, "
            "or allow more slots on each"
        )
    for orphan in orphans:
        device, slot = _place_for(wide_GC, slots_GC.shape[1], capacity_G, replicas_E, taken_G)
        if wide_GC[device, slot] >= 0:
            replicas_E[wide_GC[device, slot]] -= 1
        wide_GC[device, slot] = orphan
        replicas_E[orphan] += 1
        taken_G[device] += 1
    used = np.flatnonzero((wide_GC >= 0).any(axis=0))
    return wide_GC[:, : max(slots_GC.shape[1], int(used[-1]) + 1)]


def _place_for(
    wide_GC: SlotArray, planned: int, capacity_G: IntArray, replicas_E: IntArray, taken_G: IntArray
) -> tuple[int, int]:
    """(device, slot) that takes one more expert. There is one: more slots than experts."""
    held_G = (wide_GC >= 0).sum(axis=1)
    order = np.lexsort((np.arange(len(wide_GC)), held_G, taken_G)).tolist()
    for width in (planned, wide_GC.shape[1]):
        for device in order:
            if held_G[device] < capacity_G[device]:
                empty = np.flatnonzero(wide_GC[device, :width] == EMPTY)
                if len(empty):
                    return device, int(empty[0])
    for device in order:
        held_C = wide_GC[device]
        spare_C = np.where(held_C >= 0, replicas_E[held_C], 0)
        if spare_C.max() > 1:
            return device, int(np.argmax(spare_C))
    raise AssertionError("room for every expert was counted before")
