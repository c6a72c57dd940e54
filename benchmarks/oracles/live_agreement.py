"""Predicted against measured: does the cost model say what live ranks do, and rank plans right?

Takes arrays measured by whoever ran the ranks, and plans. Knows nothing of Ray or of how time was
taken. The rule that decides whether a plan may be applied on a prediction: the order of plans that
differ by more than the band must come out right.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from loadmaster.errors import InputError
from loadmaster.foundation.arrays import FloatArray
from loadmaster.placement.cluster import Cluster
from loadmaster.placement.comparison.intervals import NORMAL_REACH, standard_error
from loadmaster.placement.cost.step_cost import step_cost
from loadmaster.placement.cost.step_loads import step_loads
from loadmaster.placement.hardware import ComputeProfile, HardwareProfile
from loadmaster.placement.plan import Plan
from loadmaster.simulator.calibrate.fits import FitError, relative_nnls
from loadmaster.simulator.random_streams import stream
from loadmaster.traces.model_spec import ModelSpec
from loadmaster.traces.steps import Steps
from loadmaster.traces.trace import RoutingTrace

DRAWS = 32     # residuals tried for each step and layer


@dataclass(frozen=True, eq=False)
class RankTimeFit:
    """Time of a rank's experts in one layer: start + active experts + tokens, times a residual.

    residual_MG: measured over fitted of every (step, layer) of the fitted steps, all ranks of one
    together. Ranks vary, and a layer waits for the slowest: leaving the residuals out would promise
    too short a path wherever ranks are level. error: of the critical path on the steps held back.
    """

    start_us: float
    active_us: float
    token_us: float
    residual_MG: FloatArray
    error: FitError

    def critical_us(self, rank_us_WLG: FloatArray, *, seed: int = 0) -> FloatArray:
        """[W] expected sum over layers of the slowest rank, residuals drawn row by row."""
        steps, layers, ranks = rank_us_WLG.shape
        if ranks != self.residual_MG.shape[1]:
            raise InputError(f"fitted on {self.residual_MG.shape[1]} ranks, asked about {ranks}")
        rows = stream(seed, "residuals").integers(0, len(self.residual_MG), (DRAWS, steps, layers))
        total = np.zeros(steps)
        for drawn_WL in rows:
            total += (rank_us_WLG * self.residual_MG[drawn_WL]).max(axis=2).sum(axis=1)
        return total / DRAWS

    def profile(self, model: ModelSpec, base: HardwareProfile) -> HardwareProfile:
        """The fit as a hardware profile; links and memory as `base` has them."""
        expert_bytes = float(model.bytes_per_expert_E().mean())
        compute = ComputeProfile(
            start_us=self.start_us,
            hbm_bytes_per_s=expert_bytes * 1e6 / max(self.active_us, 1e-9),
            flops_per_s=model.flops_per_assignment * 1e6 / max(self.token_us, 1e-9),
        )
        return base.model_copy(update={
            "name": "this-machine", "compute": compute,
            "source": f"experts fitted to live steps; links: {base.source}",
            "error": f"critical path of held-back steps: {self.error}",
        })


def fit_rank_time(
    expert_us_WLG: FloatArray,
    active_WLG: npt.NDArray[np.integer[Any]],
    tokens_WLG: npt.NDArray[np.integer[Any]],
) -> RankTimeFit:
    """Fit measured expert times to what each rank computed; judged on the steps left out.

    Raises InputError when shapes disagree or there are fewer than 4 steps.
    """
    if not expert_us_WLG.shape == active_WLG.shape == tokens_WLG.shape or len(active_WLG) < 4:
        raise InputError(
            f"measured {expert_us_WLG.shape}, counted {active_WLG.shape} and {tokens_WLG.shape}: "
            "need the same [steps, layers, ranks], at least 4 steps"
        )
    us = np.maximum(expert_us_WLG, 1.0)
    terms = np.stack([np.ones_like(us), active_WLG, tokens_WLG], axis=-1)
    fitted = np.arange(len(us)) % 2 == 0
    coefficients = relative_nnls(terms[fitted].reshape(-1, 3), us[fitted].reshape(-1))
    start, active, token = (float(c) for c in coefficients)
    modelled = terms @ coefficients
    residual_MG = (us[fitted] / modelled[fitted]).reshape(-1, us.shape[2])
    blank = FitError(0, 0.0, 0.0, 0.0)
    fit = RankTimeFit(start, active, token, residual_MG, blank)
    truth = us[~fitted].max(axis=2).sum(axis=1)
    error = FitError.of(fit.critical_us(modelled[~fitted]), truth)
    return dataclasses.replace(fit, error=error)


def predict_critical_us(
    plans: Mapping[str, Plan],
    trace: RoutingTrace,
    steps: Steps,
    cluster: Cluster,
    model: ModelSpec,
    fit: RankTimeFit,
) -> dict[str, FloatArray]:
    """[W] of each plan: sum over layers of the slowest rank's expert time, same steps for all."""
    cluster = cluster.model_copy(update={"hardware": fit.profile(model, cluster.hardware)})
    predicted = {}
    for name, plan in plans.items():
        loads = step_loads(trace, steps, plan, cluster,
                           expert_bytes_E=model.bytes_per_expert_E())
        cost = step_cost(loads, model, cluster, dispatch=plan.dispatch)
        predicted[name] = fit.critical_us(cost.compute_us_WLG)
    return predicted


@dataclass(frozen=True)
class Agreement:
    """Predicted against measured means, plan by plan.

    pairs: plans whose measured means differ by more than the band; misordered: those of them that
    the prediction puts the other way round.
    """

    errors: dict[str, float]
    median_error: float
    pairs: int
    misordered: tuple[tuple[str, str], ...]
    too_close: int

    def to_dict(self) -> dict[str, Any]:
        """All figures by name."""
        return vars(self) | {"misordered": [list(pair) for pair in self.misordered]}


def agreement(
    predicted_us: Mapping[str, FloatArray], measured_us: Mapping[str, FloatArray]
) -> Agreement:
    """Compare step by step; steps of all plans are the same work in the same order.

    The band of a pair is NORMAL_REACH standard errors of the paired logarithms. Raises InputError
    when plans differ or nothing was measured.
    """
    if set(predicted_us) != set(measured_us) or not measured_us:
        raise InputError(
            f"predicted plans {sorted(predicted_us)}, measured {sorted(measured_us)}: need the "
            "same plans"
        )
    errors = {
        name: float(predicted_us[name].mean() / measured_us[name].mean() - 1.0)
        for name in measured_us
    }
    pairs, close, wrong = 0, 0, []
    for a, b in itertools.combinations(measured_us, 2):
        count = min(len(measured_us[a]), len(measured_us[b]))
        ratio = np.log(measured_us[a][:count] / measured_us[b][:count])
        band = NORMAL_REACH * standard_error(ratio) if count > 1 else np.inf
        if abs(float(ratio.mean())) <= band:
            close += 1
            continue
        pairs += 1
        guess = float(np.log(predicted_us[a].mean() / predicted_us[b].mean()))
        if guess * float(ratio.mean()) <= 0:
            wrong.append((a, b))
    return Agreement(
        errors, float(np.median(np.abs(list(errors.values())))), pairs, tuple(wrong), close
    )
