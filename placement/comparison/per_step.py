"""Several plans judged on the same steps: each one's figures per step, and how they differ.

Knows evaluations, steps and noise. Knows nothing of how plans were found or what is concluded.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...foundation.arrays import FloatArray
from ...foundation.parallel import Executor, LayerThreads
from ...traces.model_spec import ModelSpec
from ...traces.steps import Steps, StepSampler
from ...traces.trace import RoutingTrace
from ..cluster import Cluster
from ..cost.evaluate import Evaluation, check_model, check_slots, judge, resolve_dispatch
from ..cost.overlap import Overlap
from ..cost.step_loads import StepLoads, check_fit, step_loads
from ..cost.token_transfers import transfers_cost_bytes
from ..cost.unplanned import filled_shape, unplanned_us_W
from ..plan import DispatchSpec, Plan
from .bootstrap import CHANGE_TAILS, LEVEL_TAILS, redraw
from .intervals import band
from .noise_band import StepMix, mean_noise, step_mix

Noise = Callable[[FloatArray], "FloatArray | None"]


FEWEST_DRAWN_STEPS = 50      # below which draws need not be made: they have a step each at least


@dataclass(frozen=True, eq=False)
class Figure:
    """One figure of P plans in W steps. noise: of a weighted sum of the plans' means; None =
    cannot be told."""

    value_PW: FloatArray
    noise: Noise

    @property
    def mean_P(self) -> FloatArray:
        return np.asarray(self.value_PW.mean(axis=1), np.float64)

    def band(self, p: int) -> tuple[float, float]:
        """95 % band of plan p's mean."""
        return band(self.mean_P[p], self.noise(np.eye(len(self.value_PW))[p]))

    def change_percent(self, p: int, q: int) -> tuple[float, float, float]:
        """(plan p's mean against plan q's, low, high) in per cent of q's; 0 where that is 0.

        The band is of the ratio: other requests move what is changed and what it is a part of.
        """
        mean_P = self.mean_P
        whole = float(mean_P[q])
        if whole == 0.0:
            return 0.0, 0.0, 0.0
        ratio = float(mean_P[p]) / whole
        unit = np.eye(len(mean_P))
        low, high = band(ratio - 1.0, _scaled(self.noise(unit[p] - ratio * unit[q]), whole))
        return (ratio - 1.0) * 100, low * 100, high * 100

    def sign(self, p: int, q: int) -> int:
        """-1 where plan p's mean is the lesser beyond the noise, 1 the greater, 0 neither."""
        _, low, high = self.change_percent(p, q)
        return -1 if high < 0 else int(low > 0)


def _scaled(noise_B: FloatArray | None, whole: float) -> FloatArray | None:
    return None if noise_B is None else noise_B / whole


@dataclass(frozen=True, eq=False)
class Contest:
    """Plans on the same steps. metric decides, and where transfers count, they do within slack."""

    names: list[str]
    evaluations: dict[str, Evaluation]
    metric: Figure
    metric_name: str
    transfers: Figure | None
    transfers_name: str
    slack: float
    mix: StepMix
    steps: int
    resamples: int
    method: str

    def order(self, against: int) -> list[int]:
        """Plans, best first, ties to `against`, then to the first given."""
        mean_P = self.metric.mean_P

        def key(p: int) -> tuple[float, ...]:
            near = self.transfers is not None and mean_P[p] <= mean_P.min() + self.slack
            first = self.transfers.mean_P[p] if near and self.transfers is not None else mean_P[p]
            return (not near, first, mean_P[p], p != against, p)

        return sorted(range(len(self.names)), key=key)

    def difference(self, p: int, q: int) -> int:
        """-1 where plan p is better than q beyond the noise, 1 where worse, 0 = cannot be told."""
        sign = self.metric.sign(p, q)
        if self.transfers is None:
            return sign
        gap = float(self.metric.mean_P[p] - self.metric.mean_P[q])
        fewer = self.transfers.sign(p, q)
        if abs(gap) <= self.slack:
            return fewer or sign
        return sign or (fewer if fewer * gap > 0 else 0)


@dataclass(frozen=True)
class Bench:
    """What plans are judged by, but for the steps."""

    trace: RoutingTrace
    cluster: Cluster
    dispatch: str | DispatchSpec | None
    model: ModelSpec | None
    timed: bool                  # time decides
    overlap: Overlap | None
    executor: Executor | None

    @property
    def counts_transfers(self) -> bool:
        return not self.timed and transfers_cost_bytes(self.cluster)

    def judged(self, name: str, plan: Plan, steps: Steps, executor: Executor | None
               ) -> tuple[Evaluation, FloatArray, FloatArray]:
        """(evaluation, [W] what decides, [W] transfers per token); NaN for a step without tokens.

        `evaluate`, with each step's transfers kept. Raises InputError naming the plan.
        """
        check_slots(plan, self.cluster, f"plan {name}")
        check_fit(self.trace, plan, self.cluster, f"plan {name}")
        if self.model is not None:
            check_model(self.model, plan)
        model, spec = self.model, resolve_dispatch(self.dispatch, plan)
        loads = step_loads(
            self.trace, steps, plan, self.cluster, spec, executor=executor,
            expert_bytes_E=None if model is None else model.listed_bytes_E(),
            timed=model is not None,
        )
        rest_us_W = None if model is None else unplanned_us_W(
            self.trace, steps, filled_shape(plan), self.cluster, spec, model, self.overlap, executor
        )
        found = judge(loads, self.cluster, spec, steps.notes, model=model, overlap=self.overlap,
                      rest_us_W=rest_us_W)
        metric_W = found.step_time_us_W if self.timed else _mean_over_layers(found.peak_WL)
        assert metric_W is not None
        return found, metric_W, _transfers_W(loads, self.cluster)


def hold_contest(
    bench: Bench, plans: dict[str, Plan], sampler: StepSampler, max_steps: int | None,
    slack: float, resamples: int, seed: int, until: float | None = None,
) -> Contest:
    """Judge every plan on the sampler's steps; where those cannot tell noise, on redrawn ones.

    until: time.monotonic() up to which there is time for those.
    """
    steps = sampler.sample(bench.trace, max_steps)
    began = time.monotonic()
    judged = [bench.judged(name, plan, steps, bench.executor) for name, plan in plans.items()]
    metric_PW = np.stack([metric_W for _, metric_W, _ in judged])
    transfers_PW = np.stack([transfers_W for _, _, transfers_W in judged])
    kept = ~np.isnan(metric_PW).any(axis=0)
    metric_PW, transfers_PW = metric_PW[:, kept], transfers_PW[:, kept]
    mix = step_mix(bench.trace, steps, np.flatnonzero(kept))
    method = "paired, 95 % bands by a parametric bootstrap over requests"

    def fitted(value_PW: FloatArray) -> Noise:
        return lambda weight_P: mean_noise(weight_P @ value_PW, mix, resamples, seed)

    noises = fitted(metric_PW), fitted(transfers_PW)
    each = (time.monotonic() - began) / max(len(steps), 1)
    left = None if until is None else (until - time.monotonic()) / each
    again = None if mix.tells else redrawn_noise(
        bench, plans, sampler, steps, seed, metric_PW.mean(axis=1), transfers_PW.mean(axis=1), left
    )
    if again is not None:
        *drawn, resamples, requests = again
        noises = drawn[0], drawn[1]
        method = f"paired, 95 % bands by redrawing {requests} requests, cut into steps anew"
    return Contest(
        list(plans), {n: found[0] for n, found in zip(plans, judged, strict=True)},
        Figure(metric_PW, noises[0]), _metric_name(bench),
        Figure(transfers_PW, noises[1]) if bench.counts_transfers else None,
        "device transfers" if bench.cluster.num_nodes == 1 else "node transfers",
        slack, mix, int(metric_PW.shape[1]), resamples, method,
    )


def redrawn_noise(
    bench: Bench, plans: dict[str, Plan], sampler: StepSampler, steps: Steps, seed: int,
    metric_P: FloatArray, transfers_P: FloatArray, most_steps: float | None = None,
) -> tuple[Noise, Noise, int, int] | None:
    """(noise of the metric, noise of transfers, draws, requests) by an ordinary bootstrap.

    metric_P, transfers_P: each plan's means over the judged steps. most_steps: for which there is
    time; None where the draws have more.
    """
    if most_steps is not None and most_steps < FEWEST_DRAWN_STEPS:
        return None
    redrawn = redraw(bench.trace, sampler, steps, seed)
    if redrawn is None or (most_steps is not None and len(redrawn.steps) > most_steps):
        return None
    threads = bench.executor or LayerThreads()
    judged = [bench.judged(name, plan, redrawn.steps, threads) for name, plan in plans.items()]
    metric_PW = np.stack([metric_W for _, metric_W, _ in judged])
    transfers_PW = np.stack([transfers_W for _, _, transfers_W in judged])

    def noise_of(value_PW: FloatArray, mean_P: FloatArray) -> Noise:
        def noise(weight_P: FloatArray) -> FloatArray:
            tails = CHANGE_TAILS if (weight_P < 0).any() else LEVEL_TAILS
            return redrawn.noise(weight_P @ value_PW, float(weight_P @ mean_P), tails)

        return noise

    return (
        noise_of(metric_PW, metric_P), noise_of(transfers_PW, transfers_P), redrawn.draws,
        redrawn.requests,
    )


def _metric_name(bench: Bench) -> str:
    if bench.timed:
        return "step_time_us"
    equal = len(set(bench.cluster.speed_G.tolist())) == 1
    return "imbalance_mean" if equal else "peak_mean"


def _mean_over_layers(value_WL: FloatArray) -> FloatArray:
    """[W] mean over the layers that held tokens; NaN where none did."""
    count_W = (~np.isnan(value_WL)).sum(axis=1)
    sum_W = np.nansum(value_WL, axis=1)
    return np.where(count_W > 0, sum_W / np.maximum(count_W, 1), np.nan)


def _transfers_W(loads: StepLoads, cluster: Cluster) -> FloatArray:
    """[W] remote transfers per token and layer, dispatch direction; between nodes if any."""
    crossing_WLG = loads.nic_out_WLG if cluster.num_nodes > 1 else loads.nvlink_out_WLG
    tokens_W = np.maximum(loads.tokens_W, 1) * crossing_WLG.shape[1]
    return np.asarray(crossing_WLG.sum(axis=(1, 2)) / tokens_W, np.float64)
