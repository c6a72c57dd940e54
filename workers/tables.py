"""Tables: the plan in force on a rank, under its epoch.

Knows slots and the dispatch policy. Knows nothing of weights, transfers or how a plan was found.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..placement.plan import DispatchSpec, Plan


@dataclass(frozen=True)
class Tables:
    """Which expert stands in which slot of which rank, all layers, and how tokens choose."""

    epoch: int
    slots_LGC: npt.NDArray[np.int16]
    num_experts: int
    dispatch: DispatchSpec

    @classmethod
    def of(cls, plan: Plan, epoch: int) -> Tables:
        """The tables of a plan."""
        return cls(epoch, plan.slots, plan.num_experts, plan.dispatch)

    def experts_of(self, rank: int) -> list[list[int]]:
        """Experts a rank must hold, by layer, ascending."""
        return [sorted({int(e) for e in row if e >= 0}) for row in self.slots_LGC[:, rank]]
