"""Set plans side by side on the same steps, with bands, and say whether the difference is real.

Knows evaluations, not how plans were found. Every plan sees the same steps, so differences are
paired.

Bands (`bands.py`): a parametric bootstrap over requests, because neighbouring steps share theirs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..traces.spec import ModelSpec
from ..traces.steps import Steps, StepSampler
from ..traces.trace import RoutingTrace
from .bands import CONFIDENCE, band, mean_noise, step_mix
from .cluster import Cluster
from .evaluate import Evaluation, evaluate
from .overlap import Overlap
from .plan import DispatchSpec, Plan
from .traffic import Executor

FloatArray = npt.NDArray[np.float64]



@dataclass(frozen=True)
class ComparisonRow:
    """One plan. `metric` is the step time in us with a model, else the mean imbalance.

    change_percent: metric against the reference plan's, negative = better, with its paired band.
    Bands are infinite where the steps cannot tell: too few, or the same requests throughout.
    """

    name: str
    metric: float
    metric_low: float
    metric_high: float
    change_percent: float
    change_low_percent: float
    change_high_percent: float
    best: bool                   # the least metric
    indistinguishable: bool      # from the best: the paired band of the difference holds zero


@dataclass(frozen=True, eq=False)
class Comparison:
    """Plans ranked (best first; ties to the reference), with bands, and a one-sentence verdict."""

    metric_name: str             # "step_time_us" or "imbalance_mean"
    reference: str               # what changes are relative to: `current`, or the first plan
    rows: tuple[ComparisonRow, ...]
    verdict: str
    evaluations: dict[str, Evaluation]
    steps: int
    independent_steps: float
    resamples: int
    method: str
    notes: tuple[str, ...]

    @property
    def ranking(self) -> tuple[str, ...]:
        """Names, best first."""
        return tuple(row.name for row in self.rows)

    def row(self, name: str) -> ComparisonRow:
        """The row of one plan."""
        return next(row for row in self.rows if row.name == name)

    def worse_than_reference(self, name: str) -> bool:
        """Whether this plan is worse than the reference, beyond the band."""
        return self.row(name).change_low_percent > 0

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
    resamples: int = 1000,
    seed: int = 0,
    current: str | None = None,
    max_steps: int | None = None,
    overlap: Overlap | None = None,
    executor: Executor | None = None,
) -> Comparison:
    """Judge several plans on the same steps of one trace.

    plans: name -> plan; ties rank the reference first, then in the order given. current: the plan
    in force, what the verdict is about; None = the first. dispatch None: each plan under its own.
    Raises UsageError without plans or for an unknown `current`.
    """
    if not plans:
        raise UsageError("compare needs at least one plan")
    reference = next(iter(plans)) if current is None else current
    if reference not in plans:
        raise UsageError(f"no plan is called {reference!r}; there are: {', '.join(plans)}")
    if resamples < 1:
        raise UsageError(f"resamples {resamples} must be at least 1")
    sampled = steps.sample(trace, max_steps)
    evaluations = {
        name: evaluate(plan, trace, cluster, steps=sampled, dispatch=dispatch, model=model,
                       overlap=overlap, executor=executor)
        for name, plan in plans.items()
    }
    return rank(evaluations, trace, sampled, reference=reference, resamples=resamples, seed=seed)


def rank(
    evaluations: dict[str, Evaluation],
    trace: RoutingTrace,
    steps: Steps,
    *,
    reference: str,
    resamples: int = 1000,
    seed: int = 0,
) -> Comparison:
    """A Comparison of evaluations made on the same `steps` of `trace`."""
    timed = all(e.step_time_us is not None for e in evaluations.values())
    names = list(evaluations)
    value_PW = np.stack([_per_step(evaluations[n], timed) for n in names])
    kept = ~np.isnan(value_PW).any(axis=0)
    mix = step_mix(trace, steps, np.flatnonzero(kept))
    value_PW = value_PW[:, kept]
    mean_P = value_PW.mean(axis=1)
    against = names.index(reference)
    order = sorted(range(len(names)), key=lambda p: (mean_P[p], p != against, p))
    best = order[0]
    rows = []
    for p in order:
        scale = 100 / mean_P[against]
        low, high = band(mean_P[p], mean_noise(value_PW[p], mix, resamples, seed))
        to_reference = (value_PW[p] - value_PW[against]) * scale
        change = band(to_reference.mean(), mean_noise(to_reference, mix, resamples, seed))
        to_best = value_PW[p] - value_PW[best]
        least = band(to_best.mean(), mean_noise(to_best, mix, resamples, seed))[0]
        rows.append(ComparisonRow(
            names[p], float(mean_P[p]), low, high, float(to_reference.mean()), *change,
            p == best, least <= 0,
        ))
    metric = "step_time_us" if timed else "imbalance_mean"
    notes = tuple(dict.fromkeys(n for e in evaluations.values() for n in e.notes))
    return Comparison(
        metric, reference, tuple(rows), _verdict(rows, reference, metric), evaluations,
        int(value_PW.shape[1]), mix.distinct_mixes, resamples,
        "paired, 95 % bands by a parametric bootstrap over requests", notes,
    )


def _per_step(evaluation: Evaluation, timed: bool) -> FloatArray:
    """[W] the metric of each step; NaN for a step without tokens."""
    if timed:
        assert evaluation.step_time_us_W is not None
        return evaluation.step_time_us_W
    used_WL = ~np.isnan(evaluation.imbalance_WL)
    count_W = used_WL.sum(axis=1)
    sum_W = np.nansum(evaluation.imbalance_WL, axis=1)
    return np.where(count_W > 0, sum_W / np.maximum(count_W, 1), np.nan)


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no infinity: None where a band has no end."""
    return {k: None if isinstance(v, float) and math.isinf(v) else v for k, v in row.items()}


def _verdict(rows: list[ComparisonRow], reference: str, metric: str) -> str:
    """One sentence about the reference plan."""
    what = "step time" if metric == "step_time_us" else "imbalance"
    best = rows[0]
    own = next(row for row in rows if row.name == reference)
    if len(rows) == 1:
        return f"{reference}: {what} {_figure(best.metric, metric)}"
    reach = (best.change_high_percent - best.change_low_percent) / 2
    gain = -best.change_percent
    if math.isinf(own.metric_high):
        return (
            f"not enough data: {best.name} came out best ({what} {_figure(best.metric, metric)}), "
            "but too few steps, or the same requests in all of them: no telling how far that may "
            "be off; record more requests"
        )
    if best.name == reference:
        second = rows[1]
        if second.indistinguishable:
            return f"{reference} is fine here: {second.name} cannot be told apart from it"
        return (
            f"{reference} is best: {what} {_figure(own.metric, metric)}; {second.name} is "
            f"{second.change_percent:.1f} % worse"
        )
    if best.change_high_percent >= 0:
        return (
            f"{reference} is fine here: the gain of {best.name}, {gain:.1f} %, is below the noise "
            f"of {reach:.1f} %"
        )
    others = [row.name for row in rows[1:] if row.indistinguishable and row.name != reference]
    also = f"; {', '.join(others)} cannot be told apart from it" if others else ""
    return (
        f"{best.name} is better than {reference}: {what} {_figure(own.metric, metric)} -> "
        f"{_figure(best.metric, metric)} (-{gain:.1f} % ± {reach:.1f}){also}"
    )


def _figure(value: float, metric: str) -> str:
    return f"{value:,.0f} us" if metric == "step_time_us" else f"{value:.3f}"
