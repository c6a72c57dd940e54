"""What a report shows of one plan: who computes how much, who sends to whom.

Knows routing, plans and dispatch. Knows nothing of HTML or time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ...foundation.arrays import FloatArray
from ...placement.cluster import Cluster
from ...placement.cost.evaluate import resolve_dispatch
from ...placement.cost.step_loads import step_loads
from ...placement.plan import DispatchSpec, Plan
from ...traces.steps import StepSampler
from ...traces.trace import RoutingTrace
from .traffic_matrix import mean_transfers_GG

SHOWN_STEPS = 16


@dataclass(frozen=True, eq=False)
class PlanView:
    """One plan's load and traffic on the same steps as the others'.

    load_LG: tokens of each device over the layer's mean (1 = level). traffic_GG: token transfers
    per step from each rank to each device, all layers together, the diagonal stays at home.
    """

    name: str
    load_LG: FloatArray
    traffic_GG: FloatArray


def plan_views(
    plans: Mapping[str, Plan],
    trace: RoutingTrace,
    cluster: Cluster,
    *,
    steps: StepSampler | None = None,
    dispatch: DispatchSpec | None = None,
) -> list[PlanView]:
    """Views of several plans, over up to 16 steps spread evenly over the trace."""
    cut = (steps or StepSampler()).sample(trace)
    shown = cut.take(np.unique(np.linspace(0, len(cut) - 1, SHOWN_STEPS).astype(np.int64)))
    views = []
    for name, plan in plans.items():
        loads = step_loads(trace, shown, plan, cluster, dispatch, timed=False)
        busy_LG = (loads.tokens_WLG / cluster.speed_G).mean(axis=0)
        mean_L = busy_LG.mean(axis=1, keepdims=True)
        load_LG = np.divide(busy_LG, mean_L, out=np.ones_like(busy_LG), where=mean_L > 0)
        traffic = mean_transfers_GG(trace, shown, plan, cluster, dispatch, max_steps=SHOWN_STEPS)
        views.append(PlanView(name, load_LG, traffic))
    return views


def views_of(
    plans: dict[str, Plan], routing: RoutingTrace, cluster: Cluster,
    dispatch: str | DispatchSpec | None, steps: StepSampler | None = None,
) -> list[PlanView]:
    """Each plan's loads and traffic, under the dispatch it serves with.

    steps: as the plans were judged; None = steps of 512 tokens, or of all where there are fewer.
    """
    usual = StepSampler()
    sampler = steps or replace(usual, tokens=min(usual.tokens, routing.num_tokens))
    return [
        view for name, plan in plans.items()
        for view in plan_views({name: plan}, routing, cluster, steps=sampler,
                               dispatch=resolve_dispatch(dispatch, plan))
    ]
