"""advise: several methods on one trace, judged on requests they have not seen, with a verdict.

What `loadmaster plan` answers. Knows plans and traces. Prints nothing, runs nothing live.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError, UsageError
from ..traces.spec import ModelSpec
from ..traces.steps import StepSampler
from ..traces.trace import RoutingTrace
from .cluster import Cluster
from .comparison import Comparison, compare
from .plan import DispatchSpec, Plan
from .planner import Executor, PlanResult, plan

CURRENT = "current"
HELD_BACK = 0.3          # share of requests that only judge
MethodProgress = Callable[[str, int, int, float], None]   # method, layers done, layers, gap


@dataclass(frozen=True, eq=False)
class Advice:
    """The plan to use, and why. `chosen` may be the current plan: leave it alone."""

    verdict: str
    chosen: str
    comparison: Comparison
    results: dict[str, PlanResult]
    plans: dict[str, Plan]
    judged_on: str

    @property
    def plan(self) -> Plan:
        """The plan the verdict names."""
        return self.plans[self.chosen]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the comparison, with bound, gap and seconds of each method."""
        out = self.comparison.to_dict()
        for row in out["rows"]:
            result = self.results.get(row["name"])
            row["chosen"] = row["name"] == self.chosen
            row["bound"] = None if result is None else result.evidence.bound
            row["gap"] = None if result is None else result.evidence.gap
            row["seconds"] = None if result is None else result.seconds
            row["truncated"] = False if result is None else result.truncated
        return out | {"verdict": self.verdict, "chosen": self.chosen, "judged_on": self.judged_on}


def advise(
    trace: RoutingTrace,
    cluster: Cluster,
    *,
    methods: Sequence[str] = ("auto", "eplb", "greedy", "contiguous"),
    current: Plan | None = None,
    dispatch: str | DispatchSpec = "balanced",
    steps: StepSampler = StepSampler(),  # noqa: B008  (frozen)
    model: ModelSpec | None = None,
    seed: int = 0,
    executor: Executor | None = None,
    progress: MethodProgress | None = None,
    **options: Any,
) -> Advice:
    """Plan by every method on 70 % of the requests, judge on the rest, choose.

    The reference is `current`, else contiguous. It is chosen unless the best plan beats it beyond
    the noise: a switch must earn its place. `options` go to `plan` (objective, effort, ...).
    Where the trace is too short to hold requests back, judged where planned, and said.
    """
    if not methods:
        raise UsageError("name at least one method")
    planning, judging, judged_on = hold_back(trace, steps, seed)
    results: dict[str, PlanResult] = {}
    for method in dict.fromkeys(methods):
        def layer_done(done: int, layers: int, gap: float, method: str = method) -> None:
            if progress is not None:
                progress(method, done, layers, gap)

        results[method] = plan(
            planning, cluster, method=method, dispatch=dispatch, steps=steps, model=model,
            seed=seed, executor=executor, progress=layer_done, current=current, **options,
        )
    plans = {name: result.plan for name, result in results.items()}
    if current is not None:
        plans = {CURRENT: current, **plans}
    reference = CURRENT if current is not None else _reference(plans)
    comparison = compare(
        plans, judging, cluster, steps=steps, dispatch=dispatch, model=model, seed=seed,
        current=reference,
    )
    best = comparison.rows[0]
    beats = best.change_high_percent < 0 and best.name != reference
    return Advice(
        comparison.verdict, best.name if beats else reference, comparison, results, plans,
        judged_on,
    )


def hold_back(
    trace: RoutingTrace, steps: StepSampler, seed: int
) -> tuple[RoutingTrace, RoutingTrace, str]:
    """(plan on, judge on, what that means in words)."""
    if len(np.unique(trace.request_T())) >= 2:
        planning, judging = trace.split(1.0 - HELD_BACK, seed=seed)
        try:
            count = len(steps.sample(judging))
            steps.sample(planning)
        except InputError:
            count = 0
        if count >= 2:
            said = f"{count} steps of {HELD_BACK:.0%} of the requests, held back from planning"
            return planning, judging, said
    return trace, trace, "the planning steps themselves: too few requests to hold any back"


def _reference(plans: dict[str, Plan]) -> str:
    return "contiguous" if "contiguous" in plans else next(iter(plans))
