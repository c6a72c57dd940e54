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
TIMED_TOKENS = (8, 64, 256, 768)     # tokens per expert
TIMED_ACTIVE = (4, 8, 12)            # active experts


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
    from scipy import stats

    pairs = min(len(before.step), len(after.step))
    ratio_W = np.log(after.critical_us[:pairs] / before.critical_us[:pairs])
    spread = float(ratio_W.std(ddof=1)) / np.sqrt(pairs)
    reach = float(stats.t.ppf(0.975, pairs - 1)) * spread
    return Gain(-float(np.expm1(ratio_W.mean())), reach, pairs)


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
    """CPU time of a rank's experts in one layer: start + active experts + tokens.

    Fitted to the kernel timed alone in this process, then scaled by what live ranks took for the
    same work (they share caches and cores): `live_factor`.
    """

    start_us: float
    active_us: float
    token_us: float
    kernel_error: float         # relative, median, of the fit on the timed points
    live_factor: float
    live_error: float           # relative, median, of steps' critical paths, factor applied


def fit_kernel(model: ModelSpec) -> ExpertFit:
    """Time the grouped kernel on this machine at the model's shape; takes seconds."""
    import torch

    from ..kernels.bench import time_experts

    assert model.hidden and model.intermediate
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = time_experts(
            model.hidden, model.intermediate, tokens_per_expert=TIMED_TOKENS,
            active_experts=TIMED_ACTIVE, repeats=5,
        )
    finally:
        torch.set_num_threads(threads)
    us = np.array([r.cpu_us for r in rows])
    active = np.array([r.active_experts for r in rows], np.float64)
    tokens = active * np.array([r.tokens_per_expert for r in rows])
    terms = np.stack([np.ones_like(us), active, tokens], axis=1)
    found = _relative_least_squares(terms, us)
    error = float(np.median(np.abs(terms @ found / us - 1.0)))
    return ExpertFit(float(found[0]), float(found[1]), float(found[2]), error, 1.0, float("nan"))


def scale_to_live(
    fit: ExpertFit, steps: Measurements, trace: RoutingTrace, plan: Plan, cluster: Cluster
) -> ExpertFit:
    """The fit with the live factor; the trace holds exactly the measured steps, in order."""
    loads = step_loads(trace, RECORDED.sample(trace), plan, cluster)
    guess_WLG = (
        fit.start_us + fit.active_us * loads.active_WLG + fit.token_us * loads.tokens_WLG
    )
    ratio_W = steps.critical_us / guess_WLG.max(axis=2).sum(axis=1)
    factor = float(np.median(ratio_W))
    error = float(np.median(np.abs(ratio_W / factor - 1.0)))
    return ExpertFit(
        fit.start_us * factor, fit.active_us * factor, fit.token_us * factor, fit.kernel_error,
        factor, error,
    )


def _relative_least_squares(terms: FloatArray, us: FloatArray) -> FloatArray:
    """Non-negative coefficients that minimise the squared relative error."""
    from scipy.optimize import nnls

    scaled = terms / us[:, None]
    size = np.abs(scaled).max(axis=0)
    found: FloatArray = nnls(scaled / size, np.ones(len(us)))[0] / size
    return found


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
        "source": f"experts timed on this machine; links: {exchange.source}",
        "error": f"kernel: median {fit.kernel_error:.1%}; live steps: median {fit.live_error:.1%}",
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
