"""What the control loop is told, and what it needs of a group.

Knows names and numbers. Knows nothing of how a decision comes about: what it answers, an `Entry`,
is `placement/rebalancing/proposal.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from ...placement.plan import Plan
from ...placement.rebalancing.policy import Policy
from ...placement.rebalancing.proposal import Candidates, CandidateSearch
from ...traces.model_spec import ModelSpec
from ...traces.steps import RECORDED
from ...traces.trace import RoutingTrace
from ..coordinator.step_log import Measurements
from ..protocol.phase_plans import PhasePlans
from ..protocol.plan_switch import ApplyReport


class ControlledGroup(Protocol):
    """What the controller needs of a group; `workers.group.Group` is one."""

    @property
    def model_spec(self) -> ModelSpec: ...

    def status(self) -> dict[str, Any]: ...

    def record(self, on: bool) -> None: ...

    def trace(self, *, take: bool = False) -> RoutingTrace: ...

    def measurements(self, after_step: int = 0) -> Measurements: ...

    def apply(self, plan: Plan, decode: Plan | None = None, *, epoch: int | None = None
              ) -> ApplyReport: ...


@dataclass(frozen=True)
class ActiveGroup:
    """What is active in a group, all of one moment."""

    plans: PhasePlans
    epoch: int
    step: int

    @classmethod
    def of(cls, group: ControlledGroup) -> ActiveGroup:
        """Ask the group."""
        status = group.status()
        plans = PhasePlans.both(status["plan"], status["decode_plan"])
        return cls(plans, int(status["epoch"]), int(status["step"]))


@dataclass(frozen=True)
class Control:
    """How the loop runs.

    window_steps: steps per window. windows_kept: how many windows a plan is made from at most;
    those before the newest only where traffic has not drifted since. candidates: `rebalance` moves
    a few experts from the active plan, `replan` starts from scratch. max_moves: budget of one
    switch; None = rebalance's own. planning_shares_cores: what looking takes (measuring, planning,
    comparing; CPU time of this process) is taken from the ranks (one machine), so a switch must pay
    for it too. worse_by: share of a step by which a switch may measure worse than promised before
    it is undone. advise_only: decide and log, change nothing.
    """

    policy: Policy = field(default_factory=Policy)
    window_steps: int = 32
    windows_kept: int = 2
    candidates: Candidates = "rebalance"
    max_moves: int | None = None
    effort: str = "fast"
    planning_shares_cores: bool = False
    worse_by: float = 0.01
    advise_only: bool = False
    seed: int = 0

    @property
    def search(self) -> CandidateSearch:
        """How a candidate is looked for: planned for the steps that ran, and judged on them."""
        return CandidateSearch(
            self.candidates, max_moves=self.max_moves, steps=RECORDED, effort=self.effort,
            seed=self.seed,
        )
