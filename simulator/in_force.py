"""What is in force in each serving group: plan, slowness, links.

Plan switches and faults change it, step timers read it. Knows nothing of when or why.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from ..placement.plan import Plan
from .routed import Condition, StepRouter
from .streams import stream

FloatArray = npt.NDArray[np.float64]


class InForce:
    """Numbered conditions, and which one holds in which group."""

    def __init__(self, router: StepRouter, plan: Plan, *, groups: int, seed: int) -> None:
        router.check(plan)
        self.router = router
        self.conditions = [Condition(plan)]
        self.number_of_group = [0] * groups
        self.jitter_G: FloatArray | None = None
        self._jitter_stream = stream(seed, "jitter")

    def of(self, group: int) -> Condition:
        """The condition of a group."""
        return self.conditions[self.number_of_group[group]]

    def switch_plan(self, group: int, plan: Plan) -> None:
        """Put a plan in force. Raises InputError if it is for another model or cluster."""
        self.router.check(plan)
        self._set(group, dataclasses.replace(self.of(group), plan=plan))

    def set_slowdown(self, group: int, slowdown_G: FloatArray | None) -> None:
        """How many times as long each device computes; None = all at full speed."""
        self._set(group, dataclasses.replace(self.of(group), slowdown_G=slowdown_G))

    def set_nic_share(self, group: int, nic_share_G: FloatArray | None) -> None:
        """What is left of each device's network port; None = all whole."""
        self._set(group, dataclasses.replace(self.of(group), nic_share_G=nic_share_G))

    def jitter_us(self, compute_LG: npt.NDArray[np.float32]) -> float:
        """What this step's random slowness adds; the draws depend on the step's number alone.

        Each device takes exp(jitter x |normal|) times as long, the same over the step's layers.
        """
        if self.jitter_G is None:
            return 0.0
        normal_G = np.abs(self._jitter_stream.standard_normal(len(self.jitter_G)))
        slow_LG = compute_LG * np.exp(self.jitter_G * normal_G)
        return float((slow_LG.max(axis=1) - compute_LG.max(axis=1)).sum())

    def _set(self, group: int, condition: Condition) -> None:
        self.conditions.append(condition)
        self.number_of_group[group] = len(self.conditions) - 1
