"""The active plans on the ranks, under their epoch: one for prompts, one for new tokens.

Knows slots and the dispatch policy. Knows nothing of weights, transfers or how a plan was found.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...placement.plan import DispatchSpec, Plan
from ...traces.trace import DECODE


@dataclass(frozen=True)
class PhasePlans:
    """The plan of prefill steps and the plan of decode steps; mostly the same one."""

    prefill: Plan
    decode: Plan

    @classmethod
    def both(cls, plan: Plan, decode: Plan | None = None) -> PhasePlans:
        """One plan for everything, or one for each phase."""
        return cls(plan, plan if decode is None else decode)

    @property
    def apart(self) -> bool:
        """Whether the phases run under different plans, and so in different steps."""
        return not (
            self.prefill.same_slots(self.decode) and self.prefill.dispatch == self.decode.dispatch
        )

    def of(self, phase: int) -> Plan:
        """The plan of a phase (traces.trace.PREFILL or DECODE)."""
        return self.decode if phase == DECODE else self.prefill

    def wanted_LG(self) -> list[list[frozenset[int]]]:
        """Experts each rank must hold, by layer and rank."""
        rows = []
        for prefill_GC, decode_GC in zip(self.prefill.slots, self.decode.slots, strict=True):
            pairs = zip(prefill_GC, decode_GC, strict=True)
            rows.append([frozenset(int(e) for e in (*a, *b) if e >= 0) for a, b in pairs])
        return rows


@dataclass(frozen=True)
class Tables:
    """Which expert is in which slot of which rank, all layers, and how tokens choose."""

    epoch: int
    slots_PLGC: tuple[npt.NDArray[np.int16], npt.NDArray[np.int16]]    # by phase
    dispatch_P: tuple[DispatchSpec, DispatchSpec]
    num_experts: int
    layer_indices: tuple[int, ...] = ()      # the model's own; () = not known

    @classmethod
    def of(cls, plans: PhasePlans | Plan, epoch: int) -> Tables:
        """The tables of these plans."""
        both = PhasePlans.both(plans) if isinstance(plans, Plan) else plans
        pair = (both.prefill, both.decode)
        return cls(
            epoch,
            (pair[0].slots, pair[1].slots),
            (pair[0].dispatch, pair[1].dispatch),
            pair[0].num_experts,
            pair[0].layer_indices,
        )

    def experts_of(self, rank: int) -> list[list[int]]:
        """Experts a rank must hold, by layer, ascending."""
        prefill, decode = (slots[:, rank] for slots in self.slots_PLGC)
        return [
            sorted({int(e) for e in (*a, *b) if e >= 0})
            for a, b in zip(prefill, decode, strict=True)
        ]
