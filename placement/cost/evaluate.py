"""Judge one plan on a trace: cut it into steps, dispatch, count, and price what sizes allow.

Knows plans, traces, clusters and dispatch. Knows nothing of how a plan was found. Judge on traffic
the plan has not seen; `comparison.py` sets several plans side by side.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ...foundation.arrays import FloatArray
from ...foundation.parallel import Executor
from ...traces.model_spec import ModelSpec
from ...traces.steps import Steps, StepSampler
from ...traces.trace import RoutingTrace
from ..cluster import Cluster
from ..dispatch.policies import policy_of
from ..memory import memory_notes
from ..plan import DispatchSpec, Plan
from .overlap import Overlap
from .step_cost import step_cost
from .step_loads import StepLoads, step_loads
from .unplanned import UNPLANNED_PRICED, filled_shape, layers_of, unplanned_layers, unplanned_us_W


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How a plan did. Imbalance: busiest device over mean device, per step and layer (1 = flat).

    peak_mean: what plans are compared by, busiest device over what perfect balance would give every
    device; the same as imbalance_mean where devices are equally fast (see `peak_of`).
    Means are over steps and layers that held tokens. Transfers are those that leave a rank (or a
    node), per token and layer, dispatch direction. Times are None without a model.
    """

    imbalance_mean: float
    imbalance_p99: float
    imbalance_worst: float
    peak_mean: float
    balancedness: float                    # mean of mean device over busiest device
    remote_device_copies_per_token: float
    remote_node_copies_per_token: float
    active_experts_per_device: float
    step_time_us: float | None
    layer_time_us: FloatArray | None       # [L] mean over steps
    imbalance_L: FloatArray                # [L] mean over steps; NaN for a layer nobody used
    steps: int
    dispatch: str
    notes: tuple[str, ...]
    imbalance_WL: FloatArray               # NaN where a step left a layer without tokens
    peak_WL: FloatArray                    # likewise
    step_time_us_W: FloatArray | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON, without the per-step arrays."""
        out: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name in ("imbalance_WL", "peak_WL", "step_time_us_W"):
                continue
            if isinstance(value, np.ndarray):
                value = [None if np.isnan(v) else float(v) for v in value]
            out[f.name] = list(value) if isinstance(value, tuple) else value
        return out


def evaluate(
    plan: Plan,
    trace: RoutingTrace,
    cluster: Cluster,
    *,
    steps: StepSampler | Steps = StepSampler(),  # noqa: B008  (frozen)
    dispatch: str | DispatchSpec | None = None,
    model: ModelSpec | None = None,
    max_steps: int | None = None,
    overlap: Overlap | None = None,
    executor: Executor | None = None,
) -> Evaluation:
    """Serve the trace's steps under the plan and report balance, transfers and, with a model, time.

    dispatch: a policy's name or spec; None = the plan's own; the plan's own name keeps the plan's
    parameters. steps: how to cut the trace, or steps already cut from it.
    Raises InputError when trace, plan, cluster and model do not belong together, when the plan
    fills more slots than the cluster has, or no step fits.
    """
    check_slots(plan, cluster, "the plan")
    sampled = steps if isinstance(steps, Steps) else steps.sample(trace, max_steps)
    if model is not None:
        check_model(model, plan)
    spec = resolve_dispatch(dispatch, plan)
    sizes = None if model is None else model.listed_bytes_E()
    loads = step_loads(
        trace, sampled, plan, cluster, spec, expert_bytes_E=sizes, executor=executor,
        timed=model is not None,
    )
    notes = (*sampled.notes, *memory_notes(plan, cluster, model))
    rest_us_W = None if model is None else unplanned_us_W(
        trace, sampled, filled_shape(plan), cluster, spec, model, overlap, executor
    )
    return judge(loads, cluster, spec, notes, model=model, overlap=overlap, rest_us_W=rest_us_W)


def resolve_dispatch(dispatch: str | DispatchSpec | None, plan: Plan) -> DispatchSpec:
    """The dispatch to judge under; a bare name equal to the plan's policy means the plan's own."""
    if dispatch is None or dispatch == plan.dispatch.policy:
        spec = plan.dispatch
    else:
        spec = DispatchSpec(policy=dispatch) if isinstance(dispatch, str) else dispatch
    policy_of(spec)
    return spec


def check_model(model: ModelSpec, plan: Plan) -> None:
    """Whether the plan is for this model, or for some of its layers. Raises InputError."""
    unplanned_layers(model, layers_of(plan), plan.num_experts, "the plan")
    if plan.model_digest and plan.model_digest != model.digest():
        raise InputError(
            f"the plan was made for model {plan.model_digest}, this one is {model.digest()}: "
            "plan again for this model"
        )


def check_slots(plan: Plan, cluster: Cluster, what: str) -> None:
    """Whether every device has the slots that the plan fills. Raises InputError."""
    if plan.num_devices != cluster.num_devices:
        raise InputError(
            f"{what} is for {plan.num_devices} devices, the cluster has {cluster.num_devices}"
        )
    filled_LG = (plan.slots >= 0).sum(axis=2)
    over = np.argwhere(filled_LG > cluster.slots_G)
    if len(over):
        layer, g = over[0].tolist()
        raise InputError(
            f"{what} fills {filled_LG[layer, g]} slots of device {g} in layer {layer}, the cluster "
            f"has {cluster.slots_G[g]} there ({len(over)} such places): give the cluster the plan "
            "was made for"
        )


def imbalance_of(tokens_WLG: npt.NDArray[Any], cluster: Cluster) -> FloatArray:
    """[W, L] busiest device over mean device, of tokens over speed; NaN where nobody had tokens.

    For telling; where speeds differ the mean depends on who got the tokens, so that all tokens on
    the slowest device look as good as all on the fastest. `peak_of` is what decides.
    """
    level_WLG = tokens_WLG / cluster.speed_G
    mean_WL = level_WLG.mean(axis=2)
    with np.errstate(invalid="ignore", divide="ignore"):
        imbalance: FloatArray = np.where(mean_WL > 0, level_WLG.max(axis=2) / mean_WL, np.nan)
    return imbalance


def peak_of(tokens_WLG: npt.NDArray[Any], cluster: Cluster) -> FloatArray:
    """[W, L] busiest device's tokens/speed over all tokens / all speed; NaN where nobody had any.

    How many times longer the busiest device computes than all would in perfect balance. The same
    as `imbalance_of` where devices are equally fast.
    """
    busiest_WL = (tokens_WLG / cluster.speed_G).max(axis=2)
    ideal_WL = tokens_WLG.sum(axis=2) / cluster.speed_G.sum()
    with np.errstate(invalid="ignore", divide="ignore"):
        peak: FloatArray = np.where(ideal_WL > 0, busiest_WL / ideal_WL, np.nan)
    return peak


def judge(
    loads: StepLoads,
    cluster: Cluster,
    spec: DispatchSpec,
    notes: tuple[str, ...] = (),
    *,
    model: ModelSpec | None = None,
    overlap: Overlap | None = None,
    rest_us_W: FloatArray | None = None,
) -> Evaluation:
    """An Evaluation from loads already counted. rest_us_W: of layers the plan does not hold."""
    imbalance_WL = imbalance_of(loads.tokens_WLG, cluster)
    peak_WL = peak_of(loads.tokens_WLG, cluster)
    used = imbalance_WL[~np.isnan(imbalance_WL)]
    if not used.size:
        raise InputError("no step holds a token: nothing to judge the plan on")
    lines = list(notes)
    if used.size < imbalance_WL.size:
        empty = imbalance_WL.size - used.size
        lines.append(f"{empty} of {imbalance_WL.size} (step, layer) cells had no tokens: left out")
    cost, step_us_W = None, None
    if model is not None and model.knows_sizes:
        cost = step_cost(loads, model, cluster, dispatch=spec, overlap=overlap)
        lines.extend(cost.notes)
        step_us_W = cost.step_us_W
        if rest_us_W is not None:
            step_us_W = step_us_W + rest_us_W
            lines.append(UNPLANNED_PRICED)
    token_layers = float(loads.tokens_W.sum()) * imbalance_WL.shape[1]
    node_copies = float(loads.nic_out_WLG.sum())
    layers_used = ~np.isnan(imbalance_WL).all(axis=0)
    imbalance_L = np.full(imbalance_WL.shape[1], np.nan)
    imbalance_L[layers_used] = np.nanmean(imbalance_WL[:, layers_used], axis=0)
    return Evaluation(
        imbalance_mean=float(used.mean()),
        imbalance_p99=float(np.quantile(used, 0.99)),
        imbalance_worst=float(used.max()),
        peak_mean=float(np.nanmean(peak_WL)),
        balancedness=float((1.0 / used).mean()),
        remote_device_copies_per_token=(
            node_copies + float(loads.nvlink_out_WLG.sum())
        ) / token_layers,
        remote_node_copies_per_token=node_copies / token_layers,
        active_experts_per_device=float(loads.active_WLG.mean()),
        step_time_us=None if step_us_W is None else float(step_us_W.mean()),
        layer_time_us=None if cost is None else cost.layer_us_WL.mean(axis=0),
        imbalance_L=imbalance_L,
        steps=len(loads.tokens_W),
        dispatch=spec.policy,
        notes=tuple(lines),
        imbalance_WL=imbalance_WL,
        peak_WL=peak_WL,
        step_time_us_W=step_us_W,
    )
