"""The table of dispatch policies and the one compiled switch over them.

Knows every policy's name, code, parameters and their defaults. Knows nothing of plans or traces.
`quotas.py` and `assignment.py` are the entries; loops over many steps call `split_cell`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import UsageError
from ...foundation.arrays import Int32Array
from ...foundation.compiled import compiled
from ..cluster import Cluster
from ..plan import DispatchSpec
from .balanced import split_balanced
from .even_nearest import split_even, split_nearest
from .fair_choice import Draws, first_draws
from .fewest_active import split_fewest_active
from .replica_table import ReplicaTable
from .serving_engines import (
    BY_ROW,
    HASH,
    ROUND_ROBIN,
    fixed_slots_ascend,
    fixed_slots_sglang,
    split_by_position,
    split_fixed,
    split_random,
)

EVEN, NEAREST, BALANCED, FEWEST_ACTIVE = 0, 1, 2, 3
SGLANG_STATIC, SGLANG_DYNAMIC, VLLM_HASH, TRTLLM, ASCEND, SGLANG_ROWS = 4, 5, 6, 7, 8, 9

# Places in the parameter vector that compiled code reads.
SLACK, SEED, OFFSET_BY_RANK, TENSOR_PARALLEL = 0, 1, 2, 3

# Above the flattest split: what `balanced` may spend on keeping tokens near.
SLACK_ACROSS_NODES = 0.002
SLACK_SENT_ONCE = 0.02


@dataclass(frozen=True)
class Policy:
    """What a dispatch policy is called and needs."""

    name: str
    code: int
    needs_all_counts: bool       # one all-gather of counts before each dispatch
    by_position: bool            # depends on a token's position, not only on counts
    parameters: tuple[tuple[str, int, float], ...] = ()   # (name, index, default)


POLICIES: dict[str, Policy] = {
    p.name: p
    for p in (
        Policy("even", EVEN, False, False),
        Policy("nearest", NEAREST, False, False),
        Policy("balanced", BALANCED, True, False, (("slack", SLACK, -1.0),)),
        Policy("fewest_active", FEWEST_ACTIVE, True, False),
        Policy("sglang_static", SGLANG_STATIC, False, False, (("seed", SEED, 42),)),
        Policy("sglang_dynamic", SGLANG_DYNAMIC, False, False, (("seed", SEED, 0),)),
        Policy("sglang_rows", SGLANG_ROWS, False, True),
        Policy("vllm_hash", VLLM_HASH, False, True),
        Policy("trtllm_round_robin", TRTLLM, False, True,
               (("offset_by_rank", OFFSET_BY_RANK, 0),)),
        Policy("ascend_fixed", ASCEND, False, False, (("tensor_parallel", TENSOR_PARALLEL, 1),)),
    )
}

NEAREST_RULES = ("nearest", "sglang_static")    # who shares an expert's tokens depends on nearness


def policy_of(spec: DispatchSpec) -> Policy:
    """The policy a spec names. UsageError on an unknown policy or parameter, or on its value."""
    policy = POLICIES.get(spec.policy)
    if policy is None:
        raise UsageError(
            f"unknown dispatch {spec.policy!r}; there are: {', '.join(POLICIES)}"
        )
    known = [name for name, _, _ in policy.parameters]
    for name in spec.parameters:
        if name not in known:
            raise UsageError(
                f"dispatch {spec.policy} has no parameter {name!r}; "
                f"it takes: {', '.join(known) or 'none'}"
            )
        given = spec.parameters[name]
        if isinstance(given, str) or not np.isfinite(given):
            raise UsageError(f"dispatch {spec.policy}: {name} must be a number, not {given!r}")
        if given < 0 or (name == "tensor_parallel" and given < 1):
            raise UsageError(f"dispatch {spec.policy}: {name} {given} is too small")
    return policy


def sends_once(cluster: Cluster) -> bool:
    """Whether a token travels once to each rank or node, not once per expert."""
    return cluster.traffic.mode == "return_home" and cluster.traffic.payload != "per_expert"


def default_slack(cluster: Cluster) -> float:
    """How far above the flattest split `balanced` may go where the spec does not say.

    0 in one node under `per_expert`: nothing is to be had for it. 0.002 across nodes. 0.02 where
    a token travels once per rank or node, because there each one kept from crossing saves a whole
    message.
    """
    if sends_once(cluster):
        return SLACK_SENT_ONCE
    return SLACK_ACROSS_NODES if cluster.num_nodes > 1 else 0.0


def parameter_vector(spec: DispatchSpec, cluster: Cluster) -> npt.NDArray[np.float64]:
    """The numbers compiled code reads. UsageError as `policy_of`."""
    policy = policy_of(spec)
    vector = np.array([default_slack(cluster), 0.0, 0.0, 1.0])
    for name, index, default in policy.parameters:
        given = float(spec.parameters.get(name, default))
        if index != SLACK or given >= 0:
            vector[index] = given
    return vector


def fixed_slots(
    code: int,
    table: ReplicaTable,
    cluster: Cluster,
    parameters: npt.NDArray[np.float64],
    draws_GX: Draws | None = None,
) -> Int32Array:
    """[G, E] the slot each home rank always uses for each expert; [0, 0] under other policies.

    draws_GX: where the ranks' draws stand, moved on; None = at the start.
    """
    if code == SGLANG_STATIC:
        if draws_GX is None:
            draws_GX = first_draws(int(parameters[SEED]), cluster.num_devices)
        fixed_GE: Int32Array = fixed_slots_sglang(
            table.start_E, table.slot_R, table.slots_per_device, cluster.node_G, draws_GX
        )
    elif code == ASCEND:
        fixed_GE = fixed_slots_ascend(
            cluster.num_devices, table.start_E, table.slot_R, int(parameters[TENSOR_PARALLEL])
        )
    else:
        fixed_GE = np.zeros((0, 0), np.int32)
    return fixed_GE


@compiled
def split_cell(
    code: int, counts_GE: Any, start_E: Any, slot_R: Any, start_unique_E: Any, slot_unique_R: Any,
    slots_per_device: int, node_G: Any, nodes: int, speed_G: Any, parameters: Any, fixed_GE: Any,
    quotas_GS: Any,
) -> None:
    """Quotas of one step and layer under the policy with this code; quotas_GS comes in zero.

    fixed_GE: what `fixed_slots` says.
    """
    if code == EVEN:
        split_even(counts_GE, start_E, slot_R, quotas_GS)
    elif code == NEAREST:
        split_nearest(counts_GE, start_E, slot_R, slots_per_device, node_G, quotas_GS)
    elif code == BALANCED:
        split_balanced(counts_GE, start_unique_E, slot_unique_R, slots_per_device, node_G, nodes,
                       speed_G, parameters[SLACK], quotas_GS)
    elif code == FEWEST_ACTIVE:
        split_fewest_active(counts_GE, start_unique_E, slot_unique_R, slots_per_device, speed_G,
                            quotas_GS)
    elif code in (SGLANG_STATIC, ASCEND):
        split_fixed(counts_GE, fixed_GE, quotas_GS)
    elif code == SGLANG_DYNAMIC:
        split_random(counts_GE, start_E, slot_R, int(parameters[SEED]), quotas_GS)
    else:
        rule = ROUND_ROBIN if code == TRTLLM else BY_ROW if code == SGLANG_ROWS else HASH
        split_by_position(rule, counts_GE, start_E, slot_R, parameters[OFFSET_BY_RANK] != 0,
                          quotas_GS)
