"""Set plans side by side on the same steps, with bands, and say whether the difference is real.

Knows evaluations, not how plans were found. Every plan sees the same steps, so differences are
paired.

Bands: a dependent wild bootstrap over requests. Each resample draws one normal number per request;
a step's weight is the sum of its requests' numbers, each times the square root of the request's
share of the step, so steps that share requests move together and the weights have variance one.
The statistic moves by the mean of weight times (step's value - mean). Widened by sqrt(n / (n - 1))
and Student's t, n = W^2 / sum of squared overlaps being what W overlapping steps are worth. All
plans get the same draws.
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
from .cluster import Cluster
from .evaluate import Evaluation, evaluate
from .overlap import Overlap
from .plan import DispatchSpec, Plan
from .traffic import Executor

FloatArray = npt.NDArray[np.float64]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class ComparisonRow:
    """One plan. `metric` is the step time in us with a model, else the mean imbalance.

    change_percent: metric against the reference plan's, negative = better, with its paired band.
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
            "rows": [vars(row) | self.evaluations[row.name].to_dict() for row in self.rows],
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
    weight_BW, independent = request_weights(trace, steps, np.flatnonzero(kept), resamples, seed)
    value_PW = value_PW[:, kept]
    mean_P = value_PW.mean(axis=1)
    noise_PB = (value_PW - mean_P[:, None]) @ weight_BW.T / value_PW.shape[1]
    noise_PB *= _widening(independent)
    against = names.index(reference)
    order = sorted(range(len(names)), key=lambda p: (mean_P[p], p != against, p))
    best = order[0]
    rows = []
    for p in order:
        low, high = _band(mean_P[p], noise_PB[p])
        change = 100 * (mean_P[p] - mean_P[against]) / mean_P[against]
        change_noise = 100 * (noise_PB[p] - noise_PB[against]) / mean_P[against]
        change_low, change_high = _band(change, change_noise)
        to_best = _band(mean_P[p] - mean_P[best], noise_PB[p] - noise_PB[best])
        rows.append(ComparisonRow(
            names[p], float(mean_P[p]), low, high, float(change), change_low, change_high,
            p == best, bool(to_best[0] <= 0),
        ))
    metric = "step_time_us" if timed else "imbalance_mean"
    notes = tuple(dict.fromkeys(n for e in evaluations.values() for n in e.notes))
    return Comparison(
        metric, reference, tuple(rows), _verdict(rows, reference, metric), evaluations,
        int(value_PW.shape[1]), independent, resamples,
        "dependent wild bootstrap over requests, paired, 95 %", notes,
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


def request_weights(
    trace: RoutingTrace, steps: Steps, kept: npt.NDArray[np.int64], resamples: int, seed: int
) -> tuple[FloatArray, float]:
    """(weight [B, W] of each kept step in each resample, how many independent steps W is worth).

    Weights have mean 0 and variance 1; two steps' weights correlate by how far they share requests
    (sum over requests of the root of the product of shares).
    """
    from scipy import sparse  # slow to import, and only comparisons need it

    request = np.unique(trace.request_T()[steps.token], return_inverse=True)[1]
    step_of_token = steps.step_of_token()
    shape = (len(steps), int(request.max()) + 1)
    tokens_WR = sparse.coo_matrix(
        (np.ones(len(request)), (step_of_token, request)), shape=shape
    ).tocsr()[kept]
    sizes_W = np.asarray(tokens_WR.sum(axis=1)).ravel()
    root_WR = sparse.diags(1.0 / np.sqrt(sizes_W)) @ tokens_WR.sqrt()
    overlap_WW = root_WR @ root_WR.T
    independent = len(kept) ** 2 / float(overlap_WW.multiply(overlap_WW).sum())
    rng = np.random.default_rng(seed)
    weight_WB = root_WR @ rng.standard_normal((shape[1], resamples))
    return np.ascontiguousarray(weight_WB.T), independent


def _widening(independent: float) -> float:
    """Small-sample factor: the mean was estimated from the same few steps."""
    from scipy import stats

    freedom = max(independent - 1.0, 1.0)
    quantile = 0.5 + CONFIDENCE / 2
    student = float(stats.t.ppf(quantile, freedom) / stats.norm.ppf(quantile))
    return student * math.sqrt((freedom + 1.0) / freedom)


def _band(centre: float, noise_B: FloatArray) -> tuple[float, float]:
    """Central band of `centre + noise`, symmetric by the noise's spread around zero."""
    reach = float(np.quantile(np.abs(noise_B), CONFIDENCE))
    return float(centre) - reach, float(centre) + reach


def _verdict(rows: list[ComparisonRow], reference: str, metric: str) -> str:
    """One sentence about the reference plan."""
    what = "step time" if metric == "step_time_us" else "imbalance"
    best = rows[0]
    own = next(row for row in rows if row.name == reference)
    if len(rows) == 1:
        return f"{reference}: {what} {_figure(best.metric, metric)}"
    reach = (best.change_high_percent - best.change_low_percent) / 2
    gain = -best.change_percent
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
