"""Who sends how much to whom: token transfers per (source, target) device, step by step.

Knows routing, a plan and dispatch. Knows nothing of time. Transfers as under
`return_home/per_expert`, the dispatch direction; the combine is the transpose.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...foundation.arrays import IntArray
from ...placement.cluster import Cluster
from ...placement.cost.step_loads import check_fit
from ...placement.dispatch.quotas import route
from ...placement.plan import DispatchSpec, Plan
from ...traces.steps import Steps
from ...traces.trace import RoutingTrace


def transfers_GG(
    trace: RoutingTrace,
    tokens: IntArray,
    plan: Plan,
    cluster: Cluster,
    layer: int,
    dispatch: DispatchSpec | None = None,
) -> IntArray:
    """[G, G] transfers of one step and layer, home rank to computing rank; the diagonal stays."""
    check_fit(trace, plan, cluster)
    devices = cluster.num_devices
    ids_TK = trace.ids[tokens, layer].astype(np.int32)
    if trace.k_of_token is not None:
        k_T = trace.k_of_token[tokens, layer]
        ids_TK[np.arange(trace.top_k) >= k_T[:, None]] = -1
    home_T = trace.home_rank_T(devices)[tokens]
    slot_TK = route(
        ids_TK, home_T, plan.slots[layer], cluster, dispatch or plan.dispatch, plan.num_experts
    )
    pair_TK = home_T[:, None].astype(np.int64) * devices + slot_TK // plan.slots_per_device
    counts = np.bincount(pair_TK[slot_TK >= 0], minlength=devices * devices)
    return counts.reshape(devices, devices)


def mean_transfers_GG(
    trace: RoutingTrace,
    steps: Steps,
    plan: Plan,
    cluster: Cluster,
    dispatch: DispatchSpec | None = None,
    *,
    max_steps: int = 16,
) -> npt.NDArray[np.float64]:
    """[G, G] transfers per step, all layers together, over `max_steps` steps spread evenly."""
    chosen = np.unique(np.linspace(0, len(steps) - 1, max_steps).astype(np.int64))
    total = np.zeros((cluster.num_devices, cluster.num_devices))
    for w in chosen.tolist():
        for layer in range(plan.num_layers):
            total += transfers_GG(trace, steps.tokens_of(w), plan, cluster, layer, dispatch)
    return total / len(chosen)
