"""How many of a step's tokens go from each home rank to each replica: quotas from counts.

The face of the policies (`POLICIES`) for whoever has counts and no tokens. Knows one layer's slots
and the cluster's nodes and speeds. Knows nothing of traces, time or payloads: where tokens are at
hand, `assignment.py` sends each to its slot, under the payload's rule too. Deterministic; every
policy assigns every token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import InputError, UsageError
from ...foundation.arrays import Int32Array, IntArray
from ...foundation.compiled import compiled
from ..cluster import Cluster
from ..plan import DispatchSpec
from .assignment import count_into, layer_dispatch, route_steps
from .balanced import counts_by_node, split_by_node, total_over
from .fewest_active import choose_fewest_active
from .policies import (
    BALANCED,
    EVEN,
    FEWEST_ACTIVE,
    POLICIES,
    SGLANG_DYNAMIC,
    SGLANG_ROWS,
    SLACK,
    TRTLLM,
    VLLM_HASH,
    Policy,
    default_slack,
    fixed_slots,
    parameter_vector,
    policy_of,
    split_cell,
)
from .replica_table import ReplicaTable

__all__ = [
    "POLICIES", "count_tokens", "default_slack", "device_tokens", "needs_all_counts", "route",
    "split",
]

MOST_TOKENS = 1 << 53                               # beyond it floats skip whole numbers
TOKEN_BY_TOKEN = (SGLANG_DYNAMIC, SGLANG_ROWS, VLLM_HASH, TRTLLM)   # rules that look at every token


def needs_all_counts(spec: DispatchSpec) -> bool:
    """Whether every rank must know the counts of all ranks before it can dispatch."""
    return policy_of(spec).needs_all_counts


def split(
    counts_GE: npt.NDArray[np.integer[Any]],
    slots_GC: npt.NDArray[np.integer[Any]],
    cluster: Cluster,
    spec: DispatchSpec,
) -> IntArray | Int32Array:
    """Quotas [G, S] of one step and layer: whole tokens from home rank to global slot.

    counts_GE: assignments by home rank and expert, >= 0. slots_GC: the layer's slots, -1 = empty;
    global slot s = g·C + c. Row sums per expert equal the counts. Ties are stated with each policy.
    int32 where the counts fit, else int64. Raises InputError when an expert with tokens has no
    slot, shapes disagree, or there are more tokens than can be counted.
    """
    policy = policy_of(spec)
    counts = _whole_counts(counts_GE, policy)
    table = _table(counts, slots_GC, cluster)
    quotas_GS = np.zeros((cluster.num_devices, slots_GC.size), counts.dtype)
    parameters = parameter_vector(spec, cluster)
    split_cell(
        policy.code, counts, *table.arrays(), cluster.node_G, cluster.num_nodes, cluster.speed_G,
        parameters, fixed_slots(policy.code, table, cluster, parameters), quotas_GS,
    )
    return quotas_GS


def device_tokens(
    counts_WGE: npt.NDArray[np.integer[Any]],
    slots_GC: npt.NDArray[np.integer[Any]],
    cluster: Cluster,
    spec: DispatchSpec,
) -> tuple[IntArray, IntArray]:
    """(tokens [W, G], active experts [W, G]) of one layer in each step.

    counts_WGE: [W, G, E] by home rank, or [W, 1, E] where the homes are not known: then `even`,
    `balanced` and `fewest_active` alone make sense, and locality plays no part. The numbers are
    those of `split`; under payloads that are sent once per rank or node, `step_loads` knows more.
    """
    policy = policy_of(spec)
    counts = _whole_counts(counts_WGE, policy)
    if counts.ndim != 3:
        raise InputError(f"counts must be [steps, home ranks, experts]; got {list(counts.shape)}")
    homeless = counts.shape[1] == 1 and cluster.num_devices > 1
    if homeless and policy.code not in (EVEN, BALANCED, FEWEST_ACTIVE):
        raise UsageError(f"dispatch {policy.name} needs counts by home rank, [W, G, E]")
    table = _table(counts.reshape(-1, counts.shape[2]), slots_GC, cluster, homeless)
    parameters = parameter_vector(spec, cluster)
    nodes = 1 if homeless else cluster.num_nodes
    tokens_WS = np.zeros((counts.shape[0], slots_GC.size), np.int64)
    if policy.code in (BALANCED, FEWEST_ACTIVE):
        _slot_tokens(
            policy.code == BALANCED, counts, table.start_unique_E, table.slot_unique_R,
            table.slots_per_device, cluster.node_G, nodes, cluster.speed_G, parameters[SLACK],
            tokens_WS,
        )
    else:
        quotas_GS = np.empty((counts.shape[1], slots_GC.size), counts.dtype)
        fixed_GE = fixed_slots(policy.code, table, cluster, parameters)
        for w in range(len(counts)):
            quotas_GS[:] = 0
            split_cell(policy.code, counts[w], *table.arrays(), cluster.node_G, nodes,
                       cluster.speed_G, parameters, fixed_GE, quotas_GS)
            quotas_GS.sum(axis=0, out=tokens_WS[w])
    tokens_WGC = tokens_WS.reshape(len(counts), *slots_GC.shape)
    return tokens_WGC.sum(axis=2), (tokens_WGC > 0).sum(axis=2)


def route(
    ids_TK: npt.NDArray[np.integer[Any]],
    home_T: npt.NDArray[np.integer[Any]],
    slots_GC: npt.NDArray[np.integer[Any]],
    cluster: Cluster,
    spec: DispatchSpec,
    num_experts: int,
) -> Int32Array:
    """Slot of every assignment of one step of a layer alone, [T, K] int32; see `assignment.py`.

    Negative ids are left out.
    """
    ids = np.ascontiguousarray(ids_TK, np.int32)
    home = np.ascontiguousarray(home_T, np.int32)
    whole = np.array([0, len(ids)], np.int64)
    return route_steps(layer_dispatch(slots_GC, num_experts, cluster, spec), ids, home, whole)


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


def _whole_counts(
    counts: npt.NDArray[np.integer[Any]], policy: Policy
) -> IntArray | Int32Array:
    """Counts as the compiled loops take them: int32 where all fit, else int64.

    Raises InputError where they are negative, or too many for the rule or for whole numbers.
    """
    if np.asarray(counts).dtype == np.int32:
        return np.ascontiguousarray(counts, np.int32)
    least, most = int(np.min(counts, initial=0)), int(np.max(counts, initial=0))
    if least < 0:
        raise InputError(f"counts must be at least 0; there is {least}")
    if most <= np.iinfo(np.int32).max:
        return np.ascontiguousarray(counts, np.int32)
    total = float(np.sum(counts, dtype=np.float64))
    if policy.code in TOKEN_BY_TOKEN or total > MOST_TOKENS:
        limit = np.iinfo(np.int32).max if policy.code in TOKEN_BY_TOKEN else MOST_TOKENS
        raise InputError(
            f"{total:.3g} tokens in a step are more than {policy.name} can split one by one "
            f"(at most {limit:,}): scale the counts down"
        )
    return np.ascontiguousarray(counts, np.int64)


def _table(
    counts_XE: IntArray | Int32Array,
    slots_GC: npt.NDArray[np.integer[Any]],
    cluster: Cluster,
    homeless: bool = False,
) -> ReplicaTable:
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
    table = ReplicaTable.of(slots_GC, experts)
    homeless_E = np.flatnonzero(np.diff(table.start_E) == 0)
    if len(homeless_E) and counts_XE[:, homeless_E].any():
        expert = homeless_E[counts_XE[:, homeless_E].any(axis=0)][0]
        raise InputError(f"expert {expert} has tokens but no slot: complete the plan")
    return table


@compiled
def _slot_tokens(
    balanced: bool, counts_WGE: Any, start_E: Any, slot_R: Any, slots_per_device: int, node_G: Any,
    nodes: int, speed_G: Any, slack: float, tokens_WS: Any,
) -> None:
    """tokens_WS: tokens of each slot under `balanced` or `fewest_active`, without quotas."""
    for w in range(counts_WGE.shape[0]):
        if balanced:
            counts_NE = counts_by_node(counts_WGE[w], node_G, nodes)
            blocks = split_by_node(
                counts_NE, start_E, slot_R, slots_per_device, node_G, speed_G, slack
            )
            slot_O, flow_O = blocks[3], blocks[4]
            for o in range(len(slot_O)):
                tokens_WS[w, slot_O[o]] += flow_O[o]
            total_E = total_over(counts_NE)
            for e in range(len(total_E)):
                if start_E[e + 1] - start_E[e] == 1:
                    tokens_WS[w, slot_R[start_E[e]]] += total_E[e]
        else:
            total_E = total_over(counts_WGE[w])
            slot_E = choose_fewest_active(
                total_E, start_E, slot_R, slots_per_device, speed_G
            )
            for e in range(len(total_E)):
                if slot_E[e] >= 0:
                    tokens_WS[w, slot_E[e]] += total_E[e]
