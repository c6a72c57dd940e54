"""advise: several methods on one trace, judged on requests they have not seen, with a verdict.

What `loadmaster plan` answers. Knows plans and traces. Prints nothing, runs nothing live.
Average loads without a trace: `advise_loads.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...errors import InputError
from ...traces.model_spec import ModelSpec
from ...traces.steps import StepSampler
from ...traces.trace import RoutingTrace
from ..cluster import Cluster
from ..comparison.compare import Comparison, ComparisonRow, compare, step_times
from ..comparison.promise import with_promise
from ..comparison.steps_in_time import steps_in_time
from ..comparison.verdict import deciding, metric_text, verdict_of
from ..cost.evaluate import check_slots
from ..held_back import ADVICE_SHARE
from ..plan import DispatchSpec, Plan
from ..planning.planner import PlanResult
from .one_more_slot import one_more_slot
from .switch_payback import HORIZON_STEPS, Moving, price_moves
from .trial_plans import REBALANCE, USUAL_METHODS, TimeLimit, attempt

CURRENT = "current"
PLANNING_SHARE = 0.75        # of a time limit; the rest is for judging
# A gain below this is not worth moved experts, nor memory for replicas, that nothing prices.
LEAST_GAIN_PERCENT = 1.0


@dataclass(frozen=True, eq=False)
class Advice:
    """The plan to use, and why. `chosen` may be the current plan: leave it alone.

    cannot: methods that found no plan, and why. moving: by plan, what coming to it from the current
    one takes; empty without one.
    """

    verdict: str
    chosen: str
    comparison: Comparison
    results: dict[str, PlanResult]
    plans: dict[str, Plan]
    judged_on: str
    cannot: dict[str, str] = field(default_factory=dict)
    moving: dict[str, Moving] = field(default_factory=dict)
    horizon_steps: float = HORIZON_STEPS
    assumes: str = ""

    @property
    def plan(self) -> Plan:
        """The plan the verdict names."""
        return self.plans[self.chosen]

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know besides the table."""
        fired = [name for name, result in self.results.items() if result.truncated]
        shown = {self.chosen, REBALANCE}
        return (
            f"judged on {self.judged_on}",
            *([self.assumes] if self.assumes else []),
            *(f"{name}: cannot ({why})" for name, why in self.cannot.items()),
            *([f"time limit fired: {', '.join(fired)} may improve with more time"] if fired
              else []),
            *(n for name, r in self.results.items() if name in shown for n in r.evidence.notes),
            *self.comparison.notes,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the comparison, with bound, gap and seconds of each method."""
        out = self.comparison.to_dict()
        for row in out["rows"]:
            result, moving = self.results.get(row["name"]), self.moving.get(row["name"])
            row["chosen"] = row["name"] == self.chosen
            row["bound"] = None if result is None else result.evidence.bound
            row["gap"] = None if result is None else result.evidence.gap
            row["seconds"] = None if result is None else result.seconds
            row["truncated"] = False if result is None else result.truncated
            row |= {} if moving is None else moving.to_dict()
            if result is not None and result.moves:
                row["ordered_moves"] = [list(move) for move in result.moves]
        return out | {
            "verdict": self.verdict, "chosen": self.chosen, "judged_on": self.judged_on,
            "cannot": self.cannot, "notes": list(self.notes),
            "horizon_steps": self.horizon_steps if self.moving else None,
        }


def advise(
    trace: RoutingTrace,
    cluster: Cluster,
    *,
    methods: Sequence[str] = USUAL_METHODS,
    current: Plan | None = None,
    max_moves: int | None = None,
    max_bytes: int | None = None,
    horizon_steps: float = HORIZON_STEPS,
    dispatch: str | DispatchSpec = "balanced",
    steps: StepSampler = StepSampler(),  # noqa: B008  (frozen)
    model: ModelSpec | None = None,
    objective: str | None = None,
    balance_slack: float | None = None,
    seed: int = 0,
    time_limit_s: float | None = None,
    **options: Any,
) -> Advice:
    """Plan by every method on 70 % of the requests, judge on the rest, choose.

    The reference is `current`, else contiguous. It is chosen unless a plan beats it beyond the
    noise and, with sizes known, pays back its moves within `horizon_steps`: a switch must pay back
    its place. Where moves, or memory for more replicas, have no price, a gain below
    LEAST_GAIN_PERCENT does not pay for them. The plan chosen carries what was found of it, its
    promise. max_moves, max_bytes: instead of `methods`, the best plan within such a budget from
    `current`. `options` go to `attempt` (effort, executor, progress). time_limit_s: of planning and
    judging together; the plans are the best so far, and judged on as many steps as it leaves.
    Judged where planned, which the verdict says, where the trace is too short to hold requests
    back. Raises UsageError on a budget without `current`, InfeasibleError where no method finds a
    plan.
    """
    if current is not None:
        check_slots(current, cluster, "the current plan")
    planning, judging, judged_on = hold_back(trace, steps, seed)
    asked: dict[str, Any] = dict(dispatch=dispatch, steps=steps, model=model, seed=seed,
                                 objective=objective, balance_slack=balance_slack)
    clock = TimeLimit.start(time_limit_s)
    tried = attempt(planning, cluster, methods, current, (max_moves, max_bytes),
                    time_limit_s=clock.part(PLANNING_SHARE), **asked, **options)
    plans = {} if current is None else {CURRENT: current}
    plans |= {name: result.plan for name, result in tried.results.items()}
    reference = CURRENT if current is not None else _reference(plans)
    most = steps_in_time(plans, judging, cluster, steps, dispatch, model, clock.share())
    if most is not None:
        judged_on += f", the first {most} of them: the time limit left no more"
    table = compare(plans, judging, cluster, current=reference, max_steps=most,
                    time_left_s=clock.share(), **asked)
    moving = {} if current is None else _moving(table, plans, cluster, model)
    if judging is trace:
        chosen, verdict = _judged_where_planned(table)
    else:
        chosen, verdict = _choice(table, plans, moving, horizon_steps)
    if chosen == reference and not clock.expired():
        verdict += one_more_slot(table, chosen, planning, judging, cluster, asked)
    plans[chosen] = _promised(plans[chosen], table, chosen, steps, judging, trace)
    return Advice(verdict, chosen, table, tried.results, plans, judged_on, tried.cannot, moving,
                  horizon_steps, "" if judging is trace else _assumes(table, judging, steps))


def _promised(
    plan: Plan, table: Comparison, chosen: str, steps: StepSampler, judging: RoutingTrace,
    whole: RoutingTrace,
) -> Plan:
    """The plan with what the verdict was made from; the current one keeps its own promise."""
    if chosen == CURRENT or judging is whole:
        return plan
    row = table.row(chosen)
    reach = (row.metric_high - row.metric_low) / 2
    return with_promise(plan, table.metric_name, row.metric, reach, steps, judging, whole)


def _assumes(table: Comparison, judging: RoutingTrace, steps: StepSampler) -> str:
    """What the bands are bands of."""
    if not table.significant:
        return ""
    cut = "as recorded" if steps.order == "recorded" else (
        f"of {steps.tokens} tokens with {steps.concurrency} in flight"
    )
    requests = len(np.unique(judging.request_T()))
    return (
        f"bands: how far other requests of the same kind as these {requests} may differ, in steps "
        f"{cut}; they say nothing of other traffic (`evaluate` on it does)"
    )


def _moving(
    table: Comparison, plans: dict[str, Plan], cluster: Cluster, model: ModelSpec | None
) -> dict[str, Moving]:
    """What coming from the current plan to each other one takes, and gains per step."""
    now = table.evaluations[CURRENT].step_time_us
    found = {}
    for row in table.rows:
        if row.name == CURRENT:
            continue
        new, gain_us, significant_us = table.evaluations[row.name].step_time_us, None, None
        if now is not None and new is not None:
            gain_us = now - new
            if table.metric_name == "step_time_us" and table.significant:
                significant_us = -row.change_high_percent / 100 * table.row(CURRENT).metric
        found[row.name] = price_moves(
            plans[CURRENT], plans[row.name], cluster, model, gain_us, significant_us
        )
    return found


def _judged_where_planned(table: Comparison) -> tuple[str, str]:
    """(the plan to use, the verdict) where no requests could be held back: any plan looks good on
    what it was made from, so an active plan stays."""
    best = table.rows[0]
    said = (
        f"{best.name} came out best on the very steps that were planned on "
        f"({metric_text(best.metric, table.metric_name)}); how it does on other requests is not "
        "known, record more"
    )
    if table.reference == CURRENT:
        return CURRENT, f"not enough data: {said}"
    return best.name, said


def _choice(
    table: Comparison, plans: dict[str, Plan], moving: dict[str, Moving], horizon_steps: float
) -> tuple[str, str]:
    """(the plan to use, the verdict)."""
    best, reference = table.rows[0], table.reference
    if not table.significant and reference != CURRENT:
        return best.name, (
            f"{best.name} came out best ({metric_text(best.metric, table.metric_name)}); how "
            "sure that is is not known: so few requests cannot tell, record more"
        )
    refused = ""
    for row in table.rows:
        if row.name == reference or not row.better:
            continue
        taken, text = moving.get(row.name), _better_text(table, row)
        why = None if taken is None else taken.refusal(horizon_steps)
        why = why or _not_worth(table, row, plans, taken)
        if why is None:
            instead = f"; {refused}" if refused else ""
            return row.name, text + (f"; {taken}" if taken else "") + instead
        refused = refused or f"{text}, but {why}"
    if refused:
        return reference, f"leave it: {refused}"
    if REBALANCE in moving and not moving[REBALANCE].moves:
        return reference, (
            "leave it: no moves within the budget show a gain on requests they were not searched on"
        )
    return reference, table.verdict


def _not_worth(
    table: Comparison, row: ComparisonRow, plans: dict[str, Plan], moving: Moving | None
) -> str | None:
    """Why a gain beyond the noise does not pay for what it takes; None where it may."""
    change, _ = deciding(table.row(table.reference), row, table.balance_slack)
    if -change >= LEAST_GAIN_PERCENT:
        return None
    more = plans[row.name].spare_slots - plans[table.reference].spare_slots
    unpriced = moving is not None and moving.moves and moving.us is None
    if more <= 0 and not unpriced:
        return None
    taken = [f"memory for {more:,} more replicas"] if more > 0 else []
    if moving is not None and unpriced:
        taken.append(f"{moving.moves:,} experts to move ({moving.share:.1%} of slots)")
    return f"it takes {' and '.join(taken)}, for less than {LEAST_GAIN_PERCENT:g} %"


def _better_text(table: Comparison, row: ComparisonRow) -> str:
    """That this plan is better than the reference, and by how much."""
    if row.best:
        return table.verdict
    return verdict_of(
        (row, table.row(table.reference)), table.reference, table.metric_name,
        table.transfers_name, table.balance_slack, step_times(table.evaluations),
    )


def hold_back(
    trace: RoutingTrace, steps: StepSampler, seed: int
) -> tuple[RoutingTrace, RoutingTrace, str]:
    """(plan on, judge on, what that means in words).

    Raises InputError where the trace does not fill one step.
    """
    if len(np.unique(trace.request_T())) >= 2:
        planning, judging = trace.split(1.0 - ADVICE_SHARE, seed=seed)
        try:
            count = len(steps.sample(judging))
            steps.sample(planning)
        except InputError:
            count = 0
        if count >= 2:
            claim = f"{count} steps of {ADVICE_SHARE:.0%} of the requests, held back from planning"
            return planning, judging, claim
    steps.sample(trace)  # a trace too short for one step fails here, not after planning
    return trace, trace, "the planning steps themselves: too few requests to hold any back"


def _reference(plans: dict[str, Plan]) -> str:
    return "contiguous" if "contiguous" in plans else next(iter(plans))
