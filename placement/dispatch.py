"""How a step's tokens choose among the replicas of their experts.

Policy: counts by home rank -> whole tokens per (home rank, slot), the quotas. Mechanism: ids and
quotas -> slots, in token order. Knows one layer's slots and the cluster's nodes and speeds. Knows
nothing of traces, time or payload rules. Deterministic; every policy places every token.

Policies (`POLICIES`): even, nearest (dispatch_local.py), balanced, fewest_active
(dispatch_balanced.py) and the engines' own (dispatch_engines.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError, UsageError
from .cluster import Cluster
from .compiled import compiled
from .dispatch_balanced import choose_fewest_active, counts_by_node, split_by_node
from .dispatch_engines import slots_by_position
from .dispatch_policies import (
    BALANCED,
    EVEN,
    FEWEST_ACTIVE,
    OFFSET_BY_RANK,
    POLICIES,
    SLACK,
    TRTLLM,
    parameter_vector,
    policy_of,
    split_cell,
)
from .plan import DispatchSpec
from .slot_table import SlotTable

__all__ = [
    "POLICIES", "assign", "count_tokens", "default_slack", "device_tokens", "needs_all_counts",
    "route", "sends_once", "split",
]

# Above the flattest split: what `balanced` may spend on keeping tokens near.
SLACK_ACROSS_NODES = 0.002
SLACK_SENT_ONCE = 0.02

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


def needs_all_counts(spec: DispatchSpec) -> bool:
    """Whether every rank must know the counts of all ranks before it can dispatch."""
    return policy_of(spec).needs_all_counts


def sends_once(cluster: Cluster) -> bool:
    """Whether a token's copies to one rank or one node are sent once."""
    return cluster.traffic.mode == "return_home" and cluster.traffic.payload != "per_expert"


def default_slack(cluster: Cluster) -> float:
    """How far above the flattest split `balanced` may go where the spec does not say.

    0 in one node under `per_expert`: nothing is to be had for it. 0.002 across nodes. 0.02 where
    copies are sent once, because there a token kept from crossing saves a whole message.
    """
    if sends_once(cluster):
        return SLACK_SENT_ONCE
    return SLACK_ACROSS_NODES if cluster.num_nodes > 1 else 0.0


def split(
    counts_GE: npt.NDArray[np.integer[Any]],
    slots_GC: npt.NDArray[np.integer[Any]],
    cluster: Cluster,
    spec: DispatchSpec,
) -> Int32Array:
    """Quotas [G, S] int32 of one step and layer: whole tokens from home rank to global slot.

    counts_GE: assignments by home rank and expert, >= 0. slots_GC: the layer's slots, -1 = empty;
    global slot s = g·C + c. Row sums per expert equal the counts. Ties are stated with each policy.
    Raises InputError when an expert with tokens has no slot or shapes disagree.
    """
    counts = np.ascontiguousarray(counts_GE, np.int32)
    table = _table(counts, slots_GC, cluster)
    quotas_GS = np.zeros((cluster.num_devices, slots_GC.size), np.int32)
    split_cell(
        policy_of(spec).code, counts, table.start_E, table.slot_R, table.start_unique_E,
        table.slot_unique_R, table.slots_per_device, cluster.node_G, cluster.num_nodes,
        cluster.speed_G, parameter_vector(spec, default_slack(cluster)), quotas_GS,
    )
    return quotas_GS


def device_tokens(
    counts_WGE: npt.NDArray[np.integer[Any]],
    slots_GC: npt.NDArray[np.integer[Any]],
    cluster: Cluster,
    spec: DispatchSpec,
) -> tuple[Int64Array, Int64Array]:
    """(tokens [W, G], active experts [W, G]) of one layer in each step.

    counts_WGE: [W, G, E] by home rank, or [W, 1, E] where the homes are not known: then `even`,
    `balanced` and `fewest_active` alone make sense, and locality plays no part. The numbers are
    those of `split`; under payloads that are sent once per rank or node, `step_loads` knows more.
    """
    counts = np.ascontiguousarray(counts_WGE, np.int32)
    if counts.ndim != 3:
        raise InputError(f"counts must be [steps, home ranks, experts]; got {list(counts.shape)}")
    policy = policy_of(spec)
    homeless = counts.shape[1] == 1 and cluster.num_devices > 1
    if homeless and policy.code not in (EVEN, BALANCED, FEWEST_ACTIVE):
        raise UsageError(f"dispatch {policy.name} needs counts by home rank, [W, G, E]")
    table = _table(counts.reshape(-1, counts.shape[2]), slots_GC, cluster, homeless)
    tokens_WG = np.zeros((counts.shape[0], cluster.num_devices), np.int64)
    active_WG = np.zeros_like(tokens_WG)
    _device_tokens(
        policy.code, counts, table.start_E, table.slot_R, table.start_unique_E,
        table.slot_unique_R, table.slots_per_device, slots_GC.size, cluster.node_G,
        1 if homeless else cluster.num_nodes, cluster.speed_G,
        parameter_vector(spec, default_slack(cluster)), tokens_WG, active_WG,
    )
    return tokens_WG, active_WG


def assign(
    ids_TK: npt.NDArray[np.integer[Any]],
    home_T: npt.NDArray[np.integer[Any]],
    quotas_GS: npt.NDArray[np.integer[Any]],
    slots_GC: npt.NDArray[np.integer[Any]],
) -> Int32Array:
    """Slot of every assignment, [T, K] int32; negative ids stay -1.

    For each home rank and expert, assignments in token order fill the expert's slots in ascending
    slot order, each up to its quota: the rule of the live ranks. Raises InputError when quotas and
    ids disagree.
    """
    ids = np.ascontiguousarray(ids_TK, np.int32)
    quotas = np.ascontiguousarray(quotas_GS, np.int32)
    experts = int(max(ids.max(initial=-1), slots_GC.max(initial=-1))) + 1
    table = SlotTable.of(slots_GC, experts)
    slot_TK = np.empty(ids.shape, np.int32)
    left = assign_in_order(
        ids, np.ascontiguousarray(home_T, np.int32), quotas, table.start_E, table.slot_R, slot_TK
    )
    if left != 0:
        raise InputError(
            "quotas and ids disagree: " + (
                f"{left} quota tokens found no assignment" if left > 0
                else f"token {-left - 1} found no quota left"
            ) + "; compute the quotas from these ids"
        )
    return slot_TK


def route(
    ids_TK: npt.NDArray[np.integer[Any]],
    home_T: npt.NDArray[np.integer[Any]],
    slots_GC: npt.NDArray[np.integer[Any]],
    cluster: Cluster,
    spec: DispatchSpec,
    num_experts: int,
) -> Int32Array:
    """Slot of every assignment of one step, [T, K] int32: policy and mechanism in one.

    Exact for the engines' rules that go by position as well. Negative ids are left out.
    """
    ids = np.ascontiguousarray(ids_TK, np.int32)
    home = np.ascontiguousarray(home_T, np.int32)
    policy = policy_of(spec)
    if policy.by_position:
        parameters = parameter_vector(spec, default_slack(cluster))
        table = SlotTable.of(slots_GC, num_experts)
        slot_TK = np.empty(ids.shape, np.int32)
        slots_by_position(
            ids, home, cluster.num_devices, table.start_E, table.slot_R, policy.code == TRTLLM,
            parameters[OFFSET_BY_RANK] != 0, slot_TK,
        )
        return slot_TK
    counts_GE = count_tokens(ids, home, cluster.num_devices, num_experts)
    return assign(ids, home, split(counts_GE, slots_GC, cluster, spec), slots_GC)


def count_tokens(
    ids_TK: npt.NDArray[np.integer[Any]],
    home_T: npt.NDArray[np.integer[Any]],
    num_devices: int,
    num_experts: int,
) -> Int32Array:
    """[G, E] int32 assignments by home rank and expert; negative ids are left out."""
    counts_GE = np.zeros((num_devices, num_experts), np.int32)
    count_into(
        np.ascontiguousarray(ids_TK, np.int32), np.ascontiguousarray(home_T, np.int32), counts_GE
    )
    return counts_GE


def _table(
    counts_XE: Int32Array,
    slots_GC: npt.NDArray[np.integer[Any]],
    cluster: Cluster,
    homeless: bool = False,
) -> SlotTable:
    """The slot index, after checking that shapes agree and every used expert has a slot."""
    devices, experts = cluster.num_devices, counts_XE.shape[-1]
    if counts_XE.ndim != 2 or (not homeless and counts_XE.shape[0] % devices):
        raise InputError(
            f"counts {list(counts_XE.shape)} must be [{devices} home ranks, experts]"
        )
    if slots_GC.ndim != 2 or slots_GC.shape[0] != devices:
        raise InputError(f"slots {list(slots_GC.shape)} must be [{devices} devices, slots each]")
    if int(slots_GC.max(initial=-1)) >= experts:
        raise InputError(f"a slot names expert {int(slots_GC.max())}, counts know {experts}")
    table = SlotTable.of(slots_GC, experts)
    homeless_E = np.flatnonzero(np.diff(table.start_E) == 0)
    if len(homeless_E) and counts_XE[:, homeless_E].any():
        expert = homeless_E[counts_XE[:, homeless_E].any(axis=0)][0]
        raise InputError(f"expert {expert} has tokens but no slot: complete the plan")
    return table


@compiled
def count_into(ids_TK: Any, home_T: Any, counts_GE: Any) -> None:
    """Add assignments by home rank and expert; negative ids are left out."""
    for t in range(ids_TK.shape[0]):
        g = home_T[t]
        for k in range(ids_TK.shape[1]):
            e = ids_TK[t, k]
            if e >= 0:
                counts_GE[g, e] += 1


@compiled
def assign_in_order(
    ids_TK: Any, home_T: Any, quotas_GS: Any, start_E: Any, slot_R: Any, slot_TK: Any
) -> int:
    """Fill slot_TK; returns the quota left over, or -(t + 1) where token t found none left."""
    homes = quotas_GS.shape[0]
    experts = len(start_E) - 1
    left_GS = quotas_GS.copy()
    cursor_GE = np.empty((homes, experts), np.int32)
    cursor_GE[:] = start_E[:experts]
    for t in range(ids_TK.shape[0]):
        g = home_T[t]
        for k in range(ids_TK.shape[1]):
            e = ids_TK[t, k]
            if e < 0:
                slot_TK[t, k] = -1
                continue
            r = cursor_GE[g, e]
            while r < start_E[e + 1] and left_GS[g, slot_R[r]] == 0:
                r += 1
            cursor_GE[g, e] = r
            if r == start_E[e + 1]:
                return -(t + 1)
            slot_TK[t, k] = slot_R[r]
            left_GS[g, slot_R[r]] -= 1
    return int(left_GS.sum())


@compiled
def _device_tokens(
    code: int, counts_WGE: Any, start_E: Any, slot_R: Any, start_unique_E: Any, slot_unique_R: Any,
    slots_per_device: int, slots: int, node_G: Any, nodes: int, speed_G: Any, parameters: Any,
    tokens_WG: Any, active_WG: Any,
) -> None:
    steps, homes, experts = counts_WGE.shape
    quotas_GS = np.zeros((homes, slots), np.int32)
    for w in range(steps):
        if code == BALANCED:
            counts_NE = counts_by_node(counts_WGE[w], node_G, nodes)
            _expert_B, _node_B, _start_B, slot_O, flow_O, load_G = split_by_node(
                counts_NE, start_unique_E, slot_unique_R, slots_per_device, node_G, speed_G,
                parameters[SLACK],
            )
            tokens_WG[w] = load_G
            used_S = np.zeros(slots, np.bool_)
            for o in range(len(slot_O)):
                if flow_O[o] > 0:
                    used_S[slot_O[o]] = True
            for e in range(experts):
                if start_unique_E[e + 1] - start_unique_E[e] == 1 and counts_NE[:, e].sum() > 0:
                    used_S[slot_unique_R[start_unique_E[e]]] = True
            for s in range(slots):
                active_WG[w, s // slots_per_device] += used_S[s]
        elif code == FEWEST_ACTIVE:
            total_E = counts_by_node(counts_WGE[w], node_G, 1)[0]
            slot_E = choose_fewest_active(
                total_E, start_unique_E, slot_unique_R, slots_per_device, speed_G
            )
            for e in range(experts):
                if slot_E[e] >= 0:
                    tokens_WG[w, slot_E[e] // slots_per_device] += total_E[e]
                    active_WG[w, slot_E[e] // slots_per_device] += 1
        else:
            quotas_GS[:] = 0
            split_cell(code, counts_WGE[w], start_E, slot_R, start_unique_E, slot_unique_R,
                       slots_per_device, node_G, nodes, speed_G, parameters, quotas_GS)
            for s in range(slots):
                tokens = quotas_GS[:, s].sum()
                tokens_WG[w, s // slots_per_device] += tokens
                active_WG[w, s // slots_per_device] += 1 if tokens > 0 else 0
