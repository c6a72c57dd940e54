"""Where experts go when ranks die for good or join.

Invariant: equal (plans, lost ranks, limit) give equal plans, whoever asks: no clock, no randomness,
no set order. Knows plans. Knows nothing of Ray, weights or load: a planner with a trace does better
afterwards; this one is for the moment in which there is none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..errors import InfeasibleError
from ..placement.plan import EMPTY, Plan, Provenance
from .tables import PhasePlans

SlotArray = npt.NDArray[np.int16]


def without_ranks(plans: PhasePlans, lost: Sequence[int], most_slots: int | None) -> PhasePlans:
    """The plans on the surviving ranks, in their old order, with every expert covered.

    Experts that lost their last copy go, in order, to a free slot; else, where `most_slots` allows
    it, to a new slot; else over a replica that is not needed: each time on the rank with the
    fewest distinct experts that can take it, ties to the lower rank.
    Raises InfeasibleError, with the numbers, when the survivors have no room.
    """
    decode = _plan_without(plans.decode, lost, most_slots) if plans.apart else None
    return PhasePlans.both(_plan_without(plans.prefill, lost, most_slots), decode)


def with_more_ranks(plans: PhasePlans, ranks: int) -> PhasePlans:
    """The same plans with empty ranks added at the end, up to `ranks`."""

    def grown(plan: Plan) -> Plan:
        layers, devices, width = plan.slots.shape
        slots = np.full((layers, ranks, width), EMPTY, np.int16)
        slots[:, :devices] = plan.slots
        return _remade(plan, slots, "grown")

    return PhasePlans.both(grown(plans.prefill), grown(plans.decode) if plans.apart else None)


def _plan_without(plan: Plan, lost: Sequence[int], most_slots: int | None) -> Plan:
    survivors = [g for g in range(plan.num_devices) if g not in set(lost)]
    if not survivors:
        raise InfeasibleError("no rank is left: start the group again")
    layers = [
        _cover(plan.slots[layer, survivors], plan.num_experts, most_slots, layer)
        for layer in range(plan.num_layers)
    ]
    width = max(rows.shape[1] for rows in layers)
    slots = np.full((plan.num_layers, len(survivors), width), EMPTY, np.int16)
    for layer, rows in enumerate(layers):
        slots[layer, :, : rows.shape[1]] = rows
    return _remade(plan, slots, "emergency")


def _cover(slots_GC: SlotArray, experts: int, most_slots: int | None, layer: int) -> SlotArray:
    """One layer's surviving slots with every expert in at least one of them."""
    rows = [[int(e) for e in row] for row in slots_GC]
    copies = np.bincount(slots_GC[slots_GC >= 0], minlength=experts)
    limit = most_slots if most_slots is not None else experts
    missing = np.flatnonzero(copies == 0).tolist()
    for expert in missing:
        place = _place_for(rows, copies, limit)
        if place is None:
            room = len(rows) * limit
            raise InfeasibleError(
                f"layer {layer}: {len(rows)} surviving ranks have {room} slots for {experts} "
                f"experts: {experts - room} short; add a rank, or allow more slots per rank"
            )
        rank, slot = place
        if slot == len(rows[rank]):
            rows[rank].append(EMPTY)
        if rows[rank][slot] != EMPTY:
            copies[rows[rank][slot]] -= 1
        rows[rank][slot] = expert
        copies[expert] += 1
    width = max(len(r) for r in rows)
    padded = [r + [EMPTY] * (width - len(r)) for r in rows]
    return np.array(padded, np.int16)


def _place_for(
    rows: list[list[int]], copies: npt.NDArray[np.int64], limit: int
) -> tuple[int, int] | None:
    """(rank, slot) that takes one more expert; a slot past the row's end is a new one."""
    order = sorted(range(len(rows)), key=lambda g: (len({e for e in rows[g] if e >= 0}), g))
    for rank in order:
        if EMPTY in rows[rank]:
            return rank, rows[rank].index(EMPTY)
    for rank in order:
        if len(rows[rank]) < limit:
            return rank, len(rows[rank])
    for rank in order:
        for slot, expert in enumerate(rows[rank]):
            if copies[expert] > 1:
                return rank, slot
    return None


def _remade(plan: Plan, slots: SlotArray, method: str) -> Plan:
    return dataclasses.replace(
        plan, slots=slots, cluster_digest="", evidence=None, provenance=Provenance(method=method)
    )
