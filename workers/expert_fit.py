"""How long this machine takes for experts: the kernel timed alone, scaled to live ranks.

Knows the model's shape, measured steps and their trace. Turns them into a hardware profile that
`step_cost` prices with. Knows nothing of plans to come.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..placement.cluster import Cluster
from ..placement.hardware import ComputeProfile, HardwareProfile
from ..placement.plan import Plan
from ..placement.traffic import step_loads
from ..traces.spec import ModelSpec
from ..traces.steps import StepSampler
from ..traces.trace import RoutingTrace
from .step_log import Measurements

FloatArray = npt.NDArray[np.float64]
RECORDED = StepSampler(order="recorded")
TIMED_TOKENS = (1, 4, 16, 64, 256, 768)     # tokens per expert, as decode and prefill have them
TIMED_ACTIVE = (4, 8, 12)            # active experts


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
