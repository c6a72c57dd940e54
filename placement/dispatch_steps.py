"""The slot of every assignment, step by step, under any policy and payload.

Policy and mechanism in one, for everything that replays tokens: traffic, the simulator, tests.
Knows one layer at a time. Every step is dispatched by itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from .cluster import Cluster
from .compiled import compiled
from .dispatch_engines import slots_by_position
from .dispatch_mechanism import assign_in_order, count_into
from .dispatch_merged import route_merged
from .dispatch_policies import (
    BALANCED,
    OFFSET_BY_RANK,
    SLACK,
    TRTLLM,
    parameter_vector,
    policy_of,
    sends_once,
    split_cell,
)
from .merged_classes import ClassTable
from .plan import DispatchSpec
from .slot_table import SlotTable

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
    policy, parameters = policy_of(spec), parameter_vector(spec, cluster)
    slot_AK = np.empty(ids_AK.shape, np.int32)
    if policy.code == BALANCED and sends_once(cluster):
        classes = ClassTable.of(table, cluster)
        _route_merged(
            ids_AK, home_A, offset_W, classes.start_E, classes.slot_R, classes.slots_per_device,
            classes.place_G, classes.node_G, classes.node_P, classes.spot_R, classes.place_R,
            classes.count_E, classes.first_E, classes.groups, cluster.speed_G, parameters[SLACK],
            slot_AK,
        )
    elif policy.by_position:
        _route_by_position(ids_AK, home_A, offset_W, cluster.num_devices, table.start_E,
                           table.slot_R, policy.code == TRTLLM, parameters[OFFSET_BY_RANK] != 0,
                           slot_AK)
    else:
        _route_by_quotas(policy.code, ids_AK, home_A, offset_W, *table.arrays(), slots_GC.size,
                         cluster.node_G, cluster.num_nodes, cluster.speed_G, parameters, slot_AK)
    return slot_AK


@compiled
def _route_by_quotas(
    code: int, ids_AK: Any, home_A: Any, offset_W: Any, start_E: Any, slot_R: Any,
    start_unique_E: Any, slot_unique_R: Any, slots_per_device: int, slots: int, node_G: Any,
    nodes: int, speed_G: Any, parameters: Any, slot_AK: Any,
) -> None:
    counts_GE = np.empty((len(node_G), len(start_E) - 1), np.int32)
    quotas_GS = np.empty((len(node_G), slots), np.int32)
    for w in range(len(offset_W) - 1):
        first, last = offset_W[w], offset_W[w + 1]
        counts_GE[:] = 0
        quotas_GS[:] = 0
        count_into(ids_AK[first:last], home_A[first:last], counts_GE)
        split_cell(code, counts_GE, start_E, slot_R, start_unique_E, slot_unique_R,
                   slots_per_device, node_G, nodes, speed_G, parameters, quotas_GS)
        assign_in_order(ids_AK[first:last], home_A[first:last], quotas_GS, start_E, slot_R,
                        slot_AK[first:last])


@compiled
def _route_by_position(
    ids_AK: Any, home_A: Any, offset_W: Any, homes: int, start_E: Any, slot_R: Any,
    round_robin: bool, offset_by_rank: bool, slot_AK: Any,
) -> None:
    for w in range(len(offset_W) - 1):
        first, last = offset_W[w], offset_W[w + 1]
        slots_by_position(ids_AK[first:last], home_A[first:last], homes, start_E, slot_R,
                          round_robin, offset_by_rank, slot_AK[first:last])


@compiled
def _route_merged(
    ids_AK: Any, home_A: Any, offset_W: Any, start_E: Any, slot_R: Any, slots_per_device: int,
    place_G: Any, node_G: Any, node_P: Any, spot_R: Any, place_R: Any, count_E: Any, first_E: Any,
    groups: int, speed_G: Any, slack: float, slot_AK: Any,
) -> None:
    for w in range(len(offset_W) - 1):
        first, last = offset_W[w], offset_W[w + 1]
        route_merged(ids_AK[first:last], home_A[first:last], start_E, slot_R, slots_per_device,
                     place_G, node_G, node_P, spot_R, place_R, count_E, first_E, groups, speed_G,
                     slack, slot_AK[first:last])
