"""How long this machine takes for experts: the kernel timed alone, scaled to live ranks.

Knows the model's shape, measured steps and their trace. Turns them into a hardware profile that
`step_cost` prices with. Knows nothing of plans to come.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...foundation.arrays import FloatArray
from ...placement.cluster import Cluster
from ...placement.cost.step_cost import step_cost
from ...placement.cost.step_loads import step_loads
from ...placement.hardware import ComputeProfile, HardwareProfile
from ...placement.plan import Plan
from ...simulator.calibrate.fits import FitError
from ...simulator.calibrate.machine_profile import fit_expert_table
from ...traces.model_spec import ModelSpec
from ...traces.steps import RECORDED
from ...traces.trace import RoutingTrace
from ..coordinator.step_log import Measurements

# Tokens per expert, as decode and prefill have them; active experts of one call.
TIMED_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 768)
TIMED_ACTIVE = (4, 12)


@dataclass(frozen=True)
class ExpertFit:
    """CPU time of a rank's experts in one layer.

    Fitted to the kernel timed alone in this process, then scaled by what live ranks took for the
    same work (they share caches and cores): `live_factor`.
    """

    compute: ComputeProfile     # live factor applied
    kernel_error: float         # relative, median, of the fit on token counts left out of it
    live_factor: float = 1.0
    live_error: float = float("nan")     # relative, median, of steps' critical paths


def fit_kernel(model: ModelSpec) -> ExpertFit:
    """Time the grouped kernel on this machine at a served model's shape and type (2, 4 or 8 bytes
    per parameter); takes seconds."""
    dtype = {2.0: "bfloat16", 4.0: "float32", 8.0: "float64"}[model.bytes_per_parameter]
    compute, error = time_model_experts(
        model, dtype, tokens_per_expert=TIMED_TOKENS, active_experts=TIMED_ACTIVE, repeats=5
    )
    return ExpertFit(compute, error.median)


def time_model_experts(
    model: ModelSpec, dtype: str, **wanted: Any
) -> tuple[ComputeProfile, FitError]:
    """Experts of the model's shape, timed on one thread and fitted. wanted: see `time_experts`."""
    import torch

    from ...kernels.time_experts import time_experts

    assert model.hidden and model.intermediate
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = time_experts(
            model.hidden, model.intermediate, dtype=getattr(torch, dtype), **wanted
        )
    finally:
        torch.set_num_threads(threads)
    return fit_expert_table(
        [r.tokens_per_expert for r in rows], [r.active_experts for r in rows],
        [r.cpu_us for r in rows],
        flops_per_assignment=model.flops_per_assignment,
        expert_bytes=float(model.bytes_per_expert_E()[0]),
    )


def scale_to_live(
    fit: ExpertFit, steps: Measurements, trace: RoutingTrace, plan: Plan, cluster: Cluster,
    model: ModelSpec,
) -> ExpertFit:
    """The fit with the live factor; the trace holds exactly the measured steps, in order."""
    fitted = cluster.model_copy(update={"hardware": machine(fit, cluster.hardware)})
    ratio_W = steps.critical_us / critical_path_us_W(plan, trace, fitted, model)
    factor = float(np.median(ratio_W))
    return replace(
        fit, compute=slower(fit.compute, factor), live_factor=factor,
        live_error=float(np.median(np.abs(ratio_W / factor - 1.0))),
    )


def critical_path_us_W(
    plan: Plan, trace: RoutingTrace, cluster: Cluster, model: ModelSpec
) -> FloatArray:
    """[W] of the trace's recorded steps under a plan, by the cluster's times: the slowest rank's
    expert time, summed over layers. What `Measurements.critical_us` measures."""
    loads = step_loads(trace, RECORDED.sample(trace), plan, cluster)
    cost = step_cost(loads, model, cluster, dispatch=plan.dispatch)
    path_us_W: FloatArray = cost.compute_us_WLG.max(axis=2).sum(axis=1)
    return path_us_W


def slower(compute: ComputeProfile, factor: float) -> ComputeProfile:
    """The profile with every time multiplied."""
    return compute.model_copy(update={
        "start_us": compute.start_us * factor,
        "active_expert_us": compute.active_expert_us * factor,
        "hbm_bytes_per_s": compute.hbm_bytes_per_s / factor,
        "flops_per_s": compute.flops_per_s / factor,
        "expert_table_us": tuple(us * factor for us in compute.expert_table_us),
    })


def machine(fit: ExpertFit, exchange: HardwareProfile) -> HardwareProfile:
    """The fit as a hardware profile; links as the given profile has them."""
    return exchange.model_copy(update={
        "name": "this-machine", "compute": fit.compute,
        "source": f"experts timed on this machine; links: {exchange.source}",
        "error": f"kernel: median {fit.kernel_error:.1%}; live steps: median {fit.live_error:.1%}",
    })
