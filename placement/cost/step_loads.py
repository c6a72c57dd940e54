"""After dispatch: what each device computes and each port carries, step by step and layer by layer.

Knows routing, plans, dispatch and the payload rules of the traffic modes. Knows nothing of time:
`cost.py` turns these loads into microseconds.

Ports count token transfers (hidden vectors) in the dispatch direction; the combine is the mirror
image, out and in exchanged, except under `coherent`, which has none.

return_home/per_expert  one copy per (token, expert) from the home rank to the slot's rank; none
                        where they are the same. NVLink inside the node, NIC between nodes.
return_home/per_rank    one copy per (token, rank hit).
return_home/per_node    one copy per (token, other node hit) over the NICs, to the rank with the
                        home's place in that node, from there one NVLink copy per rank hit; inside
                        the home node one NVLink copy per rank hit.
allgather               every token to every rank: once into each other node, shared evenly by its
                        NICs, then over NVLink. Routing plays no part.
coherent                tokens stay where their experts are: every pair (expert of layer l, expert
                        of layer l + 1) on different ranks is one copy, as MoETuner and ExFlow
                        count. The first layer is reached from home. A token's home at layer l + 1
                        is the rank of its first choice at layer l.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ...foundation.arrays import FloatArray, IntArray
from ...foundation.parallel import Executor
from ...traces.steps import Steps
from ...traces.trace import RoutingTrace
from ..cluster import Cluster
from ..dispatch.assignment import counts_gathers, layer_dispatch, layers_draws, route_steps
from ..dispatch.fair_choice import Draws
from ..plan import DispatchSpec, Plan
from .count_traffic import LayerCounts, count_layer


@dataclass(frozen=True, eq=False)
class StepLoads:
    """Work and traffic after dispatch. Axes: W steps, L layers, G devices."""

    tokens_WLG: IntArray                # assignments computed
    active_WLG: IntArray                # slots with at least one token
    weight_bytes_WLG: FloatArray | None   # weights those slots read; None = sizes unknown
    nvlink_out_WLG: FloatArray          # transfers, dispatch direction
    nvlink_in_WLG: FloatArray
    nic_out_WLG: FloatArray
    nic_in_WLG: FloatArray
    tokens_W: IntArray                  # tokens in each step
    expert_us_WLG: FloatArray | None = None     # sum over slots of the hardware's expert table
    expert_us_extrapolated: bool = False        # some slot held more tokens than the table did
    gathers_L: tuple[int, ...] | None = None    # of counts, to choose replicas; None = unknown
    # [W, L, 2] dispatch and combine between nodes under fair sharing, in transfers through one NIC;
    # None where the most loaded port says it (fair_sharing.py).
    fair_transfers_WLX: FloatArray | None = None


def step_loads(
    trace: RoutingTrace,
    steps: Steps,
    plan: Plan,
    cluster: Cluster,
    dispatch: DispatchSpec | None = None,
    layers: Sequence[int] | None = None,
    *,
    expert_bytes_E: npt.NDArray[np.integer[Any]] | None = None,
    home_A: npt.NDArray[np.integer[Any]] | None = None,
    executor: Executor | None = None,
    timed: bool = True,
) -> StepLoads:
    """Dispatch every step of the trace under a plan and count work and traffic.

    dispatch None: the plan's own. layers: which of the plan's layers, all by default (`coherent`
    needs them all). expert_bytes_E: weight bytes of each expert, for weight_bytes_WLG. home_A: rank
    that each token of `steps` comes from; None = the trace's. timed False: the loads will not be
    priced, and no fair rates are needed.
    Raises InputError when plan, trace and cluster do not belong together.
    """
    check_fit(trace, plan, cluster)
    spec = dispatch or plan.dispatch
    chosen = list(range(plan.num_layers)) if layers is None else [int(i) for i in layers]
    if home_A is None:
        home_A = trace.home_rank_T(cluster.num_devices)[steps.token]
    from_A = home_A.astype(np.int32)
    if cluster.traffic.mode == "coherent":
        if layers is not None and chosen != list(range(plan.num_layers)):
            raise InputError("coherent traffic links layers: count all of them, not some")
        counted = _coherent(trace, steps, plan, from_A, cluster, spec, expert_bytes_E, timed)
    else:
        # Made one by one where nothing runs ahead: all layers' ids at once may not fit in memory.
        draws_L = layers_draws(plan.slots, plan.num_experts, cluster, spec, plan.layer_indices)
        jobs = (
            LayerJob(_layer_ids(trace, steps, i), from_A, steps.offset, plan.slots[i],
                     plan.num_experts, draws_L[i])
            for i in chosen
        )
        count = functools.partial(
            layer_loads, cluster=cluster, spec=spec, expert_bytes_E=expert_bytes_E, timed=timed
        )
        counted = list(map(count, jobs) if executor is None else executor.map(count, jobs))
    return _stack(
        counted, np.diff(steps.offset), expert_bytes_E is not None,
        bool(cluster.hardware.compute.expert_table_tokens),
    )


def check_fit(
    trace: RoutingTrace, plan: Plan, cluster: Cluster, what: str = "the plan"
) -> None:
    """Whether trace, plan and cluster speak of the same experts, layers and devices."""
    if plan.num_layers != trace.num_layers or plan.num_experts != trace.num_experts:
        raise InputError(
            f"{what} has {plan.num_layers} layers of {plan.num_experts} experts, the trace "
            f"{trace.num_layers} of {trace.num_experts}: they are of different models"
        )
    if plan.num_devices != cluster.num_devices:
        raise InputError(
            f"{what} is for {plan.num_devices} devices, the cluster has {cluster.num_devices}"
        )


@dataclass(frozen=True, eq=False)
class LayerJob:
    """One layer's share of the work, picklable."""

    ids_AK: npt.NDArray[np.int32]      # tokens in step order; -1 = choice that does not count
    home_A: npt.NDArray[np.int32]
    offset_W: IntArray                 # [W + 1]
    slots_GC: npt.NDArray[np.int16]
    num_experts: int
    draws_GX: Draws | None             # of `sglang_static`, where the layers before left them


def layer_loads(
    job: LayerJob,
    *,
    cluster: Cluster,
    spec: DispatchSpec,
    expert_bytes_E: npt.NDArray[np.integer[Any]] | None = None,
    timed: bool = True,
) -> LayerCounts:
    """Route and count one layer: the inner loop of `step_loads`, for searches."""
    layer = layer_dispatch(job.slots_GC, job.num_experts, cluster, spec, job.draws_GX)
    slot_AK = route_steps(layer, job.ids_AK, job.home_A, job.offset_W)
    return count_layer(
        slot_AK, job.home_A[:, None], job.offset_W, job.slots_GC, cluster, expert_bytes_E, timed,
        counts_gathers(layer, cluster),
    )


def _layer_ids(trace: RoutingTrace, steps: Steps, layer: int) -> npt.NDArray[np.int32]:
    """[A', K] the choices of one layer in step order, -1 where a choice does not count."""
    ids_TK = trace.ids[:, layer]
    # Rows that lie together, as in stored traces, are taken ten times as fast.
    together = ids_TK.flags.c_contiguous
    ids_AK = np.take(ids_TK, steps.token, axis=0) if together else ids_TK[steps.token]
    ids_AK = ids_AK.astype(np.int32)
    if trace.k_of_token is not None:
        k_A = trace.k_of_token[steps.token, layer]
        ids_AK[np.arange(trace.top_k) >= k_A[:, None]] = -1
    chosen: npt.NDArray[np.int32] = ids_AK
    return chosen


def _coherent(
    trace: RoutingTrace,
    steps: Steps,
    plan: Plan,
    home_A: npt.NDArray[np.int32],
    cluster: Cluster,
    spec: DispatchSpec,
    expert_bytes_E: npt.NDArray[np.integer[Any]] | None,
    timed: bool,
) -> list[LayerCounts]:
    """Layer after layer: each starts where the tokens ended up."""
    counted: list[LayerCounts] = []
    from_AX = home_A[:, None]
    draws_L = layers_draws(plan.slots, plan.num_experts, cluster, spec, plan.layer_indices)
    for i, slots_GC in enumerate(plan.slots):
        layer = layer_dispatch(slots_GC, plan.num_experts, cluster, spec, draws_L[i])
        slot_AK = route_steps(layer, _layer_ids(trace, steps, i), home_A, steps.offset)
        counted.append(count_layer(
            slot_AK, from_AX, steps.offset, slots_GC, cluster, expert_bytes_E, timed,
            counts_gathers(layer, cluster),
        ))
        rank_AK = np.where(slot_AK >= 0, slot_AK // plan.slots_per_device, -1).astype(np.int32)
        # A token that chose nobody here stays where it was.
        idle_A = (rank_AK < 0).all(axis=1)
        from_AX = rank_AK
        from_AX[idle_A, 0] = home_A[idle_A]
        home_A = np.where(rank_AK[:, 0] >= 0, rank_AK[:, 0], home_A).astype(np.int32)
    return counted


def _stack(
    counted: list[LayerCounts], tokens_W: IntArray, with_bytes: bool, with_table: bool
) -> StepLoads:
    """[W, L, G] arrays from per-layer [W, G] ones."""
    ports = np.stack([c.ports_PWG for c in counted], axis=2)
    table_us = np.stack([c.table_us_WG for c in counted], axis=1) if with_table else None
    fair_WX = [c.fair_WX for c in counted if c.fair_WX is not None]
    return StepLoads(
        tokens_WLG=np.stack([c.tokens_WG for c in counted], axis=1),
        active_WLG=np.stack([c.active_WG for c in counted], axis=1),
        weight_bytes_WLG=np.stack([c.bytes_WG for c in counted], axis=1) if with_bytes else None,
        nvlink_out_WLG=ports[0],
        nvlink_in_WLG=ports[1],
        nic_out_WLG=ports[2],
        nic_in_WLG=ports[3],
        tokens_W=np.asarray(tokens_W, np.int64),
        expert_us_WLG=table_us,
        expert_us_extrapolated=any(c.extrapolated for c in counted),
        gathers_L=tuple(c.gathers for c in counted),
        fair_transfers_WLX=np.stack(fair_WX, axis=1) if fair_WX else None,
    )
