"""What is active in each serving group: plan, slowness, links, lost devices.

Plan switches and faults change it, step timers read it. Checks at every change that a plan covers
every expert on the devices that are there. Knows nothing of when or why.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from ...errors import InfeasibleError, LoadmasterError
from ...foundation.arrays import FloatArray
from ...placement.plan import EMPTY, Plan
from ..pricing.memory import MemorySpec, kv_tokens_per_device
from ..pricing.step_router import Condition, StepRouter
from ..random_streams import stream


class ActiveState:
    """Numbered conditions, and which one holds in which group."""

    def __init__(
        self, router: StepRouter, plan: Plan, *, groups: int, seed: int,
        memory: MemorySpec | None = None,
    ) -> None:
        router.check(plan)
        self.router, self.memory = router, memory
        self.conditions: list[Condition] = []
        self._number_of: dict[tuple[object, ...], int] = {}
        self.number_of(Condition(plan))
        self.number_of_group = [0] * groups
        self.whole_plan = [plan] * groups     # with every device there: what lost ones come back to
        self.exchange_us_of_group = [0.0] * groups     # of all steps so far
        self._seed = seed
        self._jitters: list[tuple[FloatArray, np.random.Generator]] = []
        self._causes = itertools.count()
        self._slow: list[dict[int, FloatArray]] = [{} for _ in range(groups)]
        self._nic: list[dict[int, FloatArray]] = [{} for _ in range(groups)]
        self._lost: list[Counter[int]] = [Counter() for _ in range(groups)]
        self._uncovered = [0] * groups

    def of(self, group: int) -> Condition:
        """The condition of a group."""
        return self.conditions[self.number_of_group[group]]

    def require_cover(self, group: int) -> None:
        """Raises LoadmasterError when a step would run while an expert has no live replica."""
        if self._uncovered[group]:
            raise LoadmasterError(
                f"{self._uncovered[group]} experts have no replica on a live device: no step runs"
            )

    def switch_plan(self, group: int, plan: Plan) -> None:
        """Activate the part of a plan that is on the devices that are there.

        Raises InputError if it is for another model or cluster, InfeasibleError if it leaves an
        expert without a replica on the devices that are there, or leaves too little for the KV
        cache.
        """
        self.router.check(plan)
        current_plan = self.current_plan(group, plan)
        self.kv_capacity_G(current_plan)
        self._set(group, dataclasses.replace(self.of(group), plan=current_plan))
        if current_plan is not plan or not self.of(group).lost:
            self.whole_plan[group] = plan

    def kv_capacity_G(self, plan: Plan) -> tuple[int, ...] | None:
        """[G] tokens of KV cache that a plan's experts leave; None = memory is not counted.

        Raises InfeasibleError when the experts and other weights alone are too much.
        """
        if self.memory is None:
            return None
        return kv_tokens_per_device(plan, self.router.cluster, self.router.model, self.memory)

    def current_plan(self, group: int, plan: Plan) -> Plan:
        """The plan with the slots of lost devices empty; itself where they are.

        Raises InfeasibleError if that leaves an expert without a replica.
        """
        lost = sorted(self.of(group).lost)
        if not (plan.slots[:, lost] != EMPTY).any():
            return plan
        if missing := Condition(plan, lost=frozenset(lost)).uncovered():
            raise InfeasibleError(
                f"the new plan leaves {missing} experts without a replica on a live device: keep "
                "replicas on other nodes, or bring devices back"
            )
        slots = plan.slots.copy()
        slots[:, lost] = EMPTY
        return dataclasses.replace(plan, slots=slots, evidence=None)

    def lose(self, group: int, devices: Collection[int]) -> int:
        """Devices are gone; returns how many experts now lack a live replica."""
        self._lost[group].update(devices)
        self._set(group, dataclasses.replace(self.of(group), lost=self.of(group).lost | {*devices}))
        return self._uncovered[group]

    def regain(self, group: int, devices: Collection[int]) -> frozenset[int]:
        """A loss is over; returns the devices that no other loss keeps away. They are empty."""
        self._lost[group].subtract(devices)
        back = frozenset(g for g in devices if self._lost[group][g] <= 0)
        self._set(group, dataclasses.replace(self.of(group), lost=self.of(group).lost - back))
        return back

    def new_cause(self) -> int:
        """A number for something that slows or throttles; equal faults are two causes."""
        return next(self._causes)

    def slow(self, group: int, cause: int, slowdown_G: FloatArray | None) -> None:
        """A cause slows devices (None = no longer); causes multiply."""
        slowdown = _combined(self._slow[group], cause, slowdown_G)
        self._set(group, dataclasses.replace(self.of(group), slowdown_G=slowdown))

    def throttle(self, group: int, cause: int, nic_share_G: FloatArray | None) -> None:
        """A cause takes part of devices' network ports (None = no longer); causes multiply."""
        share = _combined(self._nic[group], cause, nic_share_G)
        self._set(group, dataclasses.replace(self.of(group), nic_share_G=share))

    def add_jitter(self, sigma_G: FloatArray) -> None:
        """One more cause of random slowness, with draws of its own; causes multiply."""
        self._jitters.append((sigma_G, stream(self._seed, "jitter", len(self._jitters))))

    def jitter_us(self, compute_LG: npt.NDArray[np.float32]) -> float:
        """What this step's random slowness adds; the draws depend on the step's number alone.

        Each device takes exp(sigma x |normal|) times as long, the same over the step's layers.
        """
        if not self._jitters:
            return 0.0
        slow_LG = compute_LG.astype(np.float64)
        for sigma_G, draws in self._jitters:
            slow_LG = slow_LG * np.exp(sigma_G * np.abs(draws.standard_normal(len(sigma_G))))
        return float((slow_LG.max(axis=1) - compute_LG.max(axis=1)).sum())

    def _set(self, group: int, condition: Condition) -> None:
        self.number_of_group[group] = self.number_of(condition)
        self._uncovered[group] = condition.uncovered()

    def number_of(self, condition: Condition) -> int:
        """The condition's number: what comes again is what it was, not one more.

        Plans count as one where they are one object; `conditions` keeps each alive.
        """
        slow_G, share_G = condition.slowdown_G, condition.nic_share_G
        key = (
            id(condition.plan), condition.lost,
            None if slow_G is None else slow_G.tobytes(),
            None if share_G is None else share_G.tobytes(),
        )
        number = self._number_of.setdefault(key, len(self.conditions))
        if number == len(self.conditions):
            self.conditions.append(condition)
        return number


def _combined(
    causes: dict[int, FloatArray], cause: int, value_G: FloatArray | None
) -> FloatArray | None:
    """Set or drop one cause; the product of those that are left, None when there are none."""
    if value_G is None:
        causes.pop(cause, None)
    else:
        causes[cause] = value_G
    if not causes:
        return None
    product: FloatArray = np.prod([causes[c] for c in sorted(causes)], axis=0)
    return product
