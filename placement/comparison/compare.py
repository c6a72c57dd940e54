"""Set plans side by side on the same steps, with bands, and say whether the difference is real.

Knows evaluations, not how plans were found. Every plan sees the same steps, so differences are
paired. One key ranks plans everywhere, the planner's own (`search.choose`): the least time; without
times the least imbalance, and where transfers cost bytes, the fewest transfers among those within
slack.

Bands: `intervals` says which and why; here `noise_band`, and `bootstrap` where requests turn over
too little for that.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

from ...errors import UsageError
from ...foundation.parallel import Executor
from ...traces.model_spec import ModelSpec
from ...traces.steps import StepSampler
from ...traces.trace import RoutingTrace
from ..cluster import Cluster
from ..cost.evaluate import Evaluation
from ..cost.overlap import Overlap
from ..dispatch.quotas import default_slack
from ..memory import memory_notes
from ..plan import DispatchSpec, Plan
from .intervals import CONFIDENCE
from .per_step import Bench, Contest, hold_contest
from .promise import kept
from .verdict import verdict_of


@dataclass(frozen=True)
class ComparisonRow:
    """One plan. `metric` is the step time in us with a model, else the mean imbalance (`peak_mean`
    of its evaluation).

    change_percent: metric against the reference plan's, negative = better, with its paired band.
    transfers: remote ones per token, between nodes if there are any; None where they do not count.
    Bands are infinite where too few requests were recorded to tell.
    """

    name: str
    metric: float
    metric_low: float
    metric_high: float
    change_percent: float
    change_low_percent: float
    change_high_percent: float
    best: bool                   # ranked first
    indistinguishable: bool      # from the best: nothing that decides differs beyond the noise
    better: bool = False         # than the reference, beyond the noise, in what decides
    worse: bool = False          # likewise
    transfers: float | None = None
    transfers_change_percent: float | None = None
    transfers_change_low_percent: float | None = None
    transfers_change_high_percent: float | None = None


@dataclass(frozen=True, eq=False)
class Comparison:
    """Plans ranked (best first; ties to the reference), with bands, and a one-sentence verdict."""

    metric_name: str             # "step_time_us"; "imbalance_mean", "peak_mean" if speeds differ
    reference: str               # what changes are relative to: `current`, or the first plan
    rows: tuple[ComparisonRow, ...]
    verdict: str
    evaluations: dict[str, Evaluation]
    steps: int
    independent_steps: float
    resamples: int
    method: str
    notes: tuple[str, ...]
    balance_slack: float = 0.0   # imbalances so close count as equal where transfers count
    transfers_name: str = ""        # "node transfers" or "device transfers", where they count

    @property
    def ranking(self) -> tuple[str, ...]:
        """Names, best first."""
        return tuple(row.name for row in self.rows)

    def row(self, name: str) -> ComparisonRow:
        """The row of one plan."""
        return next(row for row in self.rows if row.name == name)

    @property
    def significant(self) -> bool:
        """Whether the bands have ends."""
        return all(math.isfinite(row.metric_high) for row in self.rows)

    def worse_than_reference(self, name: str) -> bool:
        """Whether this plan is worse than the reference, beyond the band."""
        return self.row(name).worse

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "verdict": self.verdict,
            "metric": self.metric_name,
            "reference": self.reference,
            "rows": [_finite(vars(row)) | self.evaluations[row.name].to_dict()
                     for row in self.rows],
            "steps": self.steps,
            "independent_steps": self.independent_steps,
            "resamples": self.resamples,
            "confidence": CONFIDENCE,
            "method": self.method,
            "balance_slack": self.balance_slack,
            "notes": list(self.notes),
        }


def compare(
    plans: dict[str, Plan],
    trace: RoutingTrace,
    cluster: Cluster,
    *,
    steps: StepSampler = StepSampler(),  # noqa: B008  (frozen)
    dispatch: str | DispatchSpec | None = None,
    model: ModelSpec | None = None,
    objective: str | None = None,
    balance_slack: float | None = None,
    resamples: int = 1000,
    seed: int = 0,
    current: str | None = None,
    max_steps: int | None = None,
    overlap: Overlap | None = None,
    executor: Executor | None = None,
    time_left_s: float | None = None,
) -> Comparison:
    """Judge several plans on the same steps of one trace.

    plans: name -> plan; ties rank the reference first, then in the order given. current: the plan
    active, what the verdict is about; None = the first. dispatch None: each plan under its own.
    objective: what ranks, "time" (default with a model of known sizes) or "balance", with the
    planner's balance_slack. time_left_s: where bands need steps redrawn and these take longer,
    there are no bands. Raises UsageError without plans or for an unknown `current`.
    """
    if not plans:
        raise UsageError("compare needs at least one plan")
    reference = next(iter(plans)) if current is None else current
    if reference not in plans:
        raise UsageError(f"no plan is called {reference!r}; there are: {', '.join(plans)}")
    if resamples < 1:
        raise UsageError(f"resamples {resamples} must be at least 1")
    sized = model is not None and model.knows_sizes
    if objective not in (None, "balance", "time") or (objective == "time" and not sized):
        raise UsageError(f"objective {objective!r} is balance, or time with a model of known sizes")
    slack = default_slack(cluster) if balance_slack is None else balance_slack
    bench = Bench(trace, cluster, dispatch, model, sized and objective != "balance", overlap,
                  executor)
    until = None if time_left_s is None else time.monotonic() + time_left_s
    contest = hold_contest(bench, plans, steps, max_steps, slack, resamples, seed, until)
    table = _ranked(contest, reference)
    memory = (
        f"{n}: {x}" for n, plan in plans.items() for x in memory_notes(plan, cluster, model)
    )
    promises = _promises(table, plans, trace, steps)
    return replace(table, notes=(*table.notes, *memory, *promises))


def _promises(
    table: Comparison, plans: dict[str, Plan], trace: RoutingTrace, steps: StepSampler
) -> tuple[str, ...]:
    """What was promised of each plan, where it is not what was found."""
    if not any(plan.provenance.trace_digest for plan in plans.values()):
        return ()
    digest = trace.digest()
    notes: list[str] = []
    for row in table.rows:
        reach = (row.metric_high - row.metric_low) / 2
        notes += kept(row.name, plans[row.name], table.metric_name, row.metric, reach, steps,
                      digest)
    return tuple(notes)


def _ranked(contest: Contest, reference: str) -> Comparison:
    """The contest's figures as rows, best first."""
    against = contest.names.index(reference)
    order = contest.order(against)
    rows = tuple(_row(contest, p, order[0], against) for p in order)
    notes = tuple(dict.fromkeys(n for e in contest.evaluations.values() for n in e.notes))
    return Comparison(
        contest.metric_name, reference, rows,
        verdict_of(rows, reference, contest.metric_name, contest.transfers_name, contest.slack,
                   step_times(contest.evaluations)),
        contest.evaluations, contest.steps, contest.mix.distinct_mixes, contest.resamples,
        contest.method, notes,
        *((contest.slack, contest.transfers_name) if contest.transfers else ()),
    )


def step_times(evaluations: dict[str, Evaluation]) -> dict[str, float]:
    """Each plan's step time, where sizes tell it."""
    return {n: e.step_time_us for n, e in evaluations.items() if e.step_time_us is not None}


def _row(contest: Contest, p: int, best: int, against: int) -> ComparisonRow:
    metric, transfers = contest.metric, contest.transfers
    current_plan = contest.difference(p, against)
    change = metric.change_percent(p, against)
    fewer = (None, None, None) if transfers is None else transfers.change_percent(p, against)
    return ComparisonRow(
        contest.names[p], float(metric.mean_P[p]), *metric.band(p), *change,
        best=p == best, indistinguishable=contest.difference(p, best) == 0,
        better=current_plan < 0, worse=current_plan > 0,
        transfers=None if transfers is None else float(transfers.mean_P[p]),
        transfers_change_percent=fewer[0], transfers_change_low_percent=fewer[1],
        transfers_change_high_percent=fewer[2],
    )


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no infinity: None where a band has no end."""
    return {k: None if isinstance(v, float) and math.isinf(v) else v for k, v in row.items()}
