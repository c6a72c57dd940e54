"""What the demo measures, and what it predicts from measurements taken before.

Knows measured steps, recorded traces and plans. Serves nothing itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..placement.cluster import Cluster
from ..placement.cost import step_cost
from ..placement.evaluate import evaluate
from ..placement.hardware import ComputeProfile, HardwareProfile
from ..placement.plan import Plan
from ..placement.traffic import step_loads
from ..traces.spec import ModelSpec
from ..traces.steps import StepSampler
from ..traces.trace import RoutingTrace
from .step_log import Measurements

FloatArray = npt.NDArray[np.float64]
RECORDED = StepSampler(order="recorded")


@dataclass(frozen=True)
class Figures:
    """One column of the demo's table; None where it cannot be said."""

    imbalance_mean: float
    imbalance_p99: float
    remote_copies_per_token: float       # to other ranks, per token and layer
    critical_path_us: float              # sum over layers of the slowest rank's expert CPU time
    step_wall_us: float | None
    steps: int

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def measured(steps: Measurements) -> Figures:
    """From live counters. Steps without a token in some layer do not count."""
    tokens_WLG = steps.tokens.astype(np.float64)
    busy_W = (tokens_WLG.sum(axis=2) > 0).all(axis=1)
    tokens_WLG = tokens_WLG[busy_W]
    imbalance_WL = tokens_WLG.max(axis=2) / tokens_WLG.mean(axis=2)
    rows = steps.rows[busy_W].sum()
    copies = steps.remote_copies[busy_W].sum() / steps.tokens.shape[1] / rows
    return Figures(
        float(imbalance_WL.mean()), float(np.quantile(imbalance_WL, 0.99)), float(copies),
        float(critical_path_us(steps)[busy_W].mean()), float(steps.step_wall_us[busy_W].mean()),
        int(busy_W.sum()),
    )


def critical_path_us(steps: Measurements) -> FloatArray:
    """[W] sum over layers of the slowest rank's expert CPU time."""
    path: FloatArray = steps.expert_cpu_us.max(axis=2).sum(axis=1)
    return path


def predicted(
    plan: Plan, trace: RoutingTrace, cluster: Cluster, model: ModelSpec, wall_us: float | None
) -> Figures:
    """Replay of recorded steps under a plan, with the machine's fitted times."""
    judged = evaluate(plan, trace, cluster, steps=RECORDED, model=model)
    steps = RECORDED.sample(trace)
    loads = step_loads(trace, steps, plan, cluster)
    cost = step_cost(loads, model, cluster, dispatch=plan.dispatch)
    path_us = float(cost.compute_us_WLG.max(axis=2).sum(axis=1).mean())
    return Figures(
        judged.imbalance_mean, judged.imbalance_p99, judged.remote_device_copies_per_token,
        path_us, wall_us, judged.steps,
    )


@dataclass(frozen=True)
class ExpertFit:
    """CPU time of a rank's experts in one layer: start + active experts + tokens."""

    start_us: float
    active_us: float
    token_us: float
    median_error: float          # relative, of a step's critical path, on steps not fitted
    steps: int


def fit_experts(
    steps: Measurements, trace: RoutingTrace, plan: Plan, cluster: Cluster
) -> ExpertFit:
    """Least squares of the relative error on every other step; judged on the steps between.

    The trace holds exactly the measured steps, in order.
    """
    from scipy.optimize import nnls

    loads = step_loads(trace, RECORDED.sample(trace), plan, cluster)
    us = np.maximum(steps.expert_cpu_us, 1.0)
    terms = np.stack([np.ones_like(us), loads.active_WLG, loads.tokens_WLG], axis=-1)
    even = np.arange(len(us)) % 2 == 0
    scaled = terms[even].reshape(-1, 3) / us[even].reshape(-1, 1)
    size = np.maximum(np.abs(scaled).max(axis=0), 1e-12)
    coefficients = nnls(scaled / size, np.ones(len(scaled)))[0] / size
    guess_WLG = terms[~even] @ coefficients
    truth = steps.expert_cpu_us[~even].max(axis=2).sum(axis=1)
    error = np.abs(guess_WLG.max(axis=2).sum(axis=1) / truth - 1.0)
    start, active, token = map(float, coefficients)
    return ExpertFit(start, active, token, float(np.median(error)), len(us))


def machine(fit: ExpertFit, model: ModelSpec, exchange: HardwareProfile) -> HardwareProfile:
    """The fit as a hardware profile; links as the given profile has them."""
    expert_bytes = float(model.bytes_per_expert_E()[0])
    token_us = max(fit.token_us, 1e-9)
    compute = ComputeProfile(
        start_us=fit.start_us,
        hbm_bytes_per_s=expert_bytes / max(fit.active_us, 1e-9) * 1e6,
        flops_per_s=model.flops_per_assignment / token_us * 1e6,
    )
    return exchange.model_copy(update={
        "name": "this-machine", "compute": compute,
        "source": f"experts fitted to {fit.steps} live steps; links: {exchange.source}",
        "error": f"critical path of unseen steps: median {fit.median_error:.1%}",
    })


@dataclass(frozen=True)
class Overhead:
    """What recording costs, in shares of CPU time."""

    share: float
    upper_95: float
    pairs: int


def recording_overhead(on: list[Measurements], off: list[Measurements]) -> Overhead:
    """Paired blocks of steps served with recording on and off; CPU time per token."""
    from scipy import stats

    ratio = np.array([_cpu_per_token(a) / _cpu_per_token(b) for a, b in zip(on, off, strict=True)])
    mean, pairs = float(np.log(ratio).mean()), len(ratio)
    spread = float(np.log(ratio).std(ddof=1)) / np.sqrt(pairs)
    upper = mean + float(stats.t.ppf(0.95, pairs - 1)) * spread
    return Overhead(float(np.expm1(mean)), float(np.expm1(upper)), pairs)


def _cpu_per_token(steps: Measurements) -> float:
    return float(steps.step_cpu_us.sum() / steps.rows.sum())
