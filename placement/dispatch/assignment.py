"""The slot of every assignment, step by step, under any policy and payload.

Policy and mechanism in one, for everything that replays tokens: traffic, the simulator, tests.
Knows one layer at a time. Every step is dispatched by itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ..cluster import Cluster
from ..plan import DispatchSpec
from .dedup_classes import ClassTable
from .deduplicated import route_merged
from .mechanism import assign_in_order, count_into
from .policies import (
    BALANCED,
    OFFSET_BY_RANK,
    SLACK,
    TRTLLM,
    parameter_vector,
    policy_of,
    sends_once,
    split_cell,
)
from .replica_table import SlotTable
from .serving_engines import slots_by_position

Int32Array = npt.NDArray[np.int32]


def route_steps(
    ids_AK: Int32Array,
    home_A: Int32Array,
    offset_W: npt.NDArray[np.int64],
    slots_GC: npt.NDArray[np.integer[Any]],
    num_experts: int,
    cluster: Cluster,
    spec: DispatchSpec,
) -> Int32Array:
    """[A, K] int32 slots; step w holds tokens offset_W[w]:offset_W[w + 1]; negative ids stay -1.

    Quotas and then token order (`assign`), except: the engines' rules by position see the tokens,
    and `balanced` under per_rank and per_node follows `dispatch_merged.py`.
    Raises InputError when an expert with tokens has no slot.
    """
    table = SlotTable.of(slots_GC, num_experts)
    unused_E = np.flatnonzero(np.diff(table.start_E) == 0)
    if len(unused_E) and (missing := unused_E[np.isin(unused_E, ids_AK)]).size:
        raise InputError(f"expert {missing[0]} has tokens but no slot: complete the plan")
    slot_AK = np.empty(ids_AK.shape, np.int32)
    route_step = _router(table, slots_GC.size, num_experts, cluster, spec)
    for first, last in itertools.pairwise(offset_W.tolist()):
        route_step(ids_AK[first:last], home_A[first:last], slot_AK[first:last])
    return slot_AK


def _router(
    table: SlotTable, slots: int, num_experts: int, cluster: Cluster, spec: DispatchSpec
) -> Callable[[Int32Array, Int32Array, Int32Array], None]:
    """The function that fills one step's slot_TK from its ids_TK and home_T."""
    policy, parameters = policy_of(spec), parameter_vector(spec, cluster)
    if policy.code == BALANCED and sends_once(cluster):
        c = ClassTable.of(table, cluster)
        return lambda ids_TK, home_T, slot_TK: route_merged(
            ids_TK, home_T, c.start_E, c.slot_R, c.slots_per_device, c.place_G, c.node_G, c.node_P,
            c.spot_R, c.place_R, c.count_E, c.first_E, c.groups, cluster.speed_G,
            parameters[SLACK], slot_TK,
        )
    if policy.by_position:
        return lambda ids_TK, home_T, slot_TK: slots_by_position(
            ids_TK, home_T, cluster.num_devices, table.start_E, table.slot_R,
            policy.code == TRTLLM, parameters[OFFSET_BY_RANK] != 0, slot_TK,
        )
    counts_GE = np.empty((cluster.num_devices, num_experts), np.int32)
    quotas_GS = np.empty((cluster.num_devices, slots), np.int32)

    def by_quotas(ids_TK: Int32Array, home_T: Int32Array, slot_TK: Int32Array) -> None:
        counts_GE[:] = 0
        quotas_GS[:] = 0
        count_into(ids_TK, home_T, counts_GE)
        split_cell(policy.code, counts_GE, *table.arrays(), cluster.node_G, cluster.num_nodes,
                   cluster.speed_G, parameters, quotas_GS)
        assign_in_order(ids_TK, home_T, quotas_GS, table.start_E, table.slot_R, slot_TK)

    return by_quotas
