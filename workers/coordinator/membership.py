"""Where experts go when ranks die for good or join.

Invariant: equal (plans, lost ranks, limit) give equal plans, whoever asks: no clock, no randomness,
no set order. Knows plans. Knows nothing of Ray, weights or load: a planner with a trace does better
afterwards; this one is for the moment in which there is none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ...placement.plan import EMPTY, Plan, Provenance
from ...placement.rebalancing.survivors import plan_without
from ..protocol.phase_plans import PhasePlans


def without_ranks(plans: PhasePlans, lost: Sequence[int], most_slots: int | None) -> PhasePlans:
    """The plans on the surviving ranks, in their old order, with every expert covered.

    What goes where says `placement/rebalancing/survivors.py`. most_slots: that a rank may use in a
    layer. Raises InfeasibleError, with the numbers, when the survivors have no room.
    """
    decode = plan_without(plans.decode, lost, most_slots) if plans.apart else None
    return PhasePlans.both(plan_without(plans.prefill, lost, most_slots), decode)


def with_more_ranks(plans: PhasePlans, ranks: int) -> PhasePlans:
    """The same plans with empty ranks added at the end, up to `ranks`."""

    def grown(plan: Plan) -> Plan:
        layers, devices, width = plan.slots.shape
        slots = np.full((layers, ranks, width), EMPTY, np.int16)
        slots[:, :devices] = plan.slots
        return dataclasses.replace(
            plan, slots=slots, cluster_digest="", evidence=None,
            provenance=Provenance(method="grown"),
        )

    return PhasePlans.both(grown(plans.prefill), grown(plans.decode) if plans.apart else None)
