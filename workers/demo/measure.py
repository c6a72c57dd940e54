"""What the demo measures, and what it predicts from measurements taken before.

Knows measured steps, recorded traces and plans. Serves nothing itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...placement.cluster import Cluster
from ...placement.comparison.intervals import CONFIDENCE, t_reach
from ...placement.cost.evaluate import evaluate
from ...placement.plan import Plan
from ...traces.model_spec import ModelSpec
from ...traces.steps import RECORDED
from ...traces.trace import RoutingTrace
from ..calibrate.expert_fit import critical_path_us_W
from ..coordinator.step_log import Measurements


@dataclass(frozen=True)
class Figures:
    """One column of the demo's table; None where it is not known."""

    imbalance_mean: float
    imbalance_p99: float
    remote_copies_per_token: float       # to other ranks, per token and layer
    critical_path_us: float              # sum over layers of the slowest rank's expert CPU time
    step_wall_us: float | None
    steps: int


def measured(steps: Measurements) -> Figures:
    """From live counters. Steps without a token in some layer do not count."""
    tokens_WLG = steps.tokens.astype(np.float64)
    busy_W = (tokens_WLG.sum(axis=2) > 0).all(axis=1)
    tokens_WLG = tokens_WLG[busy_W]
    imbalance_WL = tokens_WLG.max(axis=2) / tokens_WLG.mean(axis=2)
    rows = steps.rows[busy_W].sum()
    transfers = steps.remote_transfers[busy_W].sum() / steps.tokens.shape[1] / rows
    return Figures(
        float(imbalance_WL.mean()), float(np.quantile(imbalance_WL, 0.99)), float(transfers),
        float(steps.critical_us[busy_W].mean()), float(steps.step_wall_us[busy_W].mean()),
        int(busy_W.sum()),
    )


@dataclass(frozen=True)
class Gain:
    """How much shorter the slowest ranks' expert time got, as measured on paired steps."""

    share: float          # 0.1 = 10 % shorter
    band: float           # 95 %, either side
    pairs: int


def measured_gain(before: Measurements, after: Measurements) -> Gain:
    """Steps are paired by their order: the same prompts served under both plans, soon after one
    another. The band is Student's t on the logarithms of the ratios."""
    pairs = min(len(before.step), len(after.step))
    ratio_W = np.log(after.critical_us[:pairs] / before.critical_us[:pairs])
    return Gain(-float(np.expm1(ratio_W.mean())), t_reach(ratio_W), pairs)


def predicted(
    plan: Plan, trace: RoutingTrace, cluster: Cluster, model: ModelSpec, wall_us: float | None
) -> Figures:
    """Replay of recorded steps under a plan, with the machine's fitted times."""
    judged = evaluate(plan, trace, cluster, steps=RECORDED, model=model)
    path_us = float(critical_path_us_W(plan, trace, cluster, model).mean())
    return Figures(
        judged.imbalance_mean, judged.imbalance_p99, judged.remote_device_copies_per_token,
        path_us, wall_us, judged.steps,
    )


@dataclass(frozen=True)
class Overhead:
    """What recording costs, in shares of CPU time."""

    share: float
    upper_95: float
    pairs: int


def recording_overhead(on: list[Measurements], off: list[Measurements]) -> Overhead:
    """Paired blocks of steps served with recording on and off; CPU time per token."""
    ratio_N = np.log(
        [_cpu_per_token(a) / _cpu_per_token(b) for a, b in zip(on, off, strict=True)]
    )
    mean = float(ratio_N.mean())
    upper = mean + t_reach(ratio_N, CONFIDENCE)     # above alone
    return Overhead(float(np.expm1(mean)), float(np.expm1(upper)), len(ratio_N))


def _cpu_per_token(steps: Measurements) -> float:
    return float(steps.step_cpu_us.sum() / steps.rows.sum())
