"""DeepSeek's expert placement load balancer (EPLB), as a baseline.

Reproduces the published algorithm: replicas by largest load per replica, packing of equal counts by
longest processing time, and the hierarchical variant that first packs expert groups onto nodes.
Knows average loads only. Two replicas of an expert may share a device, as in the original.

Ties, which decide the result on equal loads: the original's descending sort is unstable from 17
items on; here it is stable, lower index first. On loads without ties the results are identical.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...errors import UsageError
from ...foundation.arrays import Float32Array, IntArray
from ...foundation.compiled import compiled


@dataclass(frozen=True)
class EplbMaps:
    """What the original returns. X = most replicas of any expert; unused entries are -1."""

    physical_to_logical_LS: IntArray
    logical_to_physical_LEX: IntArray   # in order of creation of the replicas, not of slots
    logical_count_LE: IntArray


def eplb(
    load_LE: npt.NDArray[np.floating], slots: int, groups: int, nodes: int, devices: int
) -> EplbMaps:
    """Place S = `slots` replicas per layer; hierarchical when `groups` divide over `nodes`.

    load_LE: [L, E] cast to float32 first, as the original does. slots and E must divide by
    devices and groups; devices by nodes. Raises UsageError where they do not.
    Like the original, groups that do not divide by nodes silently mean one group and one node.
    Source: deepseek-ai/EPLB.
    """
    experts = load_LE.shape[1]
    if groups % nodes:
        groups, nodes = 1, 1
    for what, count, divisor, name in (
        ("experts", experts, groups, "groups"),
        ("slots", slots, devices, "devices"),
        ("devices", devices, nodes, "nodes"),
    ):
        if count % divisor:
            raise UsageError(
                f"EPLB needs {what} divisible by {name}; {count} is not divisible by {divisor}: "
                "use greedy or auto, which take any numbers"
            )
    layers = [_layer(row, slots, groups, nodes, devices) for row in load_LE.astype(np.float32)]
    physical_LS = np.stack([expert_S for expert_S, _, _ in layers])
    count_LE = np.stack([count_E for _, _, count_E in layers])
    logical = np.full((len(layers), experts, int(count_LE.max())), -1, np.int64)
    for layer, (expert_S, rank_S, _) in enumerate(layers):
        logical[layer, expert_S, rank_S] = np.arange(slots)
    return EplbMaps(physical_LS, logical, count_LE)


def _layer(
    load_E: Float32Array, slots: int, groups: int, nodes: int, devices: int
) -> tuple[IntArray, IntArray, IntArray]:
    """One layer: expert and replica number of each slot [S], replicas of each expert [E]."""
    experts = len(load_E)
    # 1. Groups of experts to nodes; from here on an expert is known by its place in its node.
    group_load = load_E.reshape(groups, -1).sum(axis=1, dtype=np.float32)
    node_of_group, rank_of_group = _pack_equal_counts(group_load, nodes)
    groups_per_node, group_size = groups // nodes, experts // groups
    place_of_group = (node_of_group * groups_per_node + rank_of_group) * group_size
    place_E = (place_of_group[:, None] + np.arange(group_size)).reshape(-1)
    expert_at = np.argsort(place_E)
    per_node = experts // nodes
    expert_S, rank_S = np.empty(slots, np.int64), np.empty(slots, np.int64)
    count_E = np.empty(experts, np.int64)
    slots_per_node = slots // nodes
    for node in range(nodes):
        members = expert_at[node * per_node : (node + 1) * per_node]
        # 2. Replicas inside the node; 3. replicas to its devices.
        copy_of, rank_of, count = _replicate(load_E[members], slots_per_node)
        share = np.divide(load_E[members], count, dtype=np.float32)
        weight: Float32Array = share[copy_of]
        device_of, place_of = _pack_equal_counts(weight, devices // nodes)
        slot = node * slots_per_node + device_of * (slots // devices) + place_of
        expert_S[slot], rank_S[slot] = members[copy_of], rank_of
        count_E[members] = count
    return expert_S, rank_S, count_E


def _pack_equal_counts(weight_I: Float32Array, packs: int) -> tuple[IntArray, IntArray]:
    """Pack and position in the pack of each item; every pack gets equally many.

    One item per pack is the identity, without looking at weights, as in the original.
    """
    items = len(weight_I)
    if items == packs:
        return np.arange(items), np.zeros(items, np.int64)
    order = np.argsort(-weight_I, kind="stable")
    return _fill_lightest(weight_I, order, packs)


@compiled
def _fill_lightest(
    weight_I: Float32Array, order: IntArray, packs: int
) -> tuple[IntArray, IntArray]:
    items = len(weight_I)
    pack_I, position_I = np.empty(items, np.int64), np.empty(items, np.int64)
    # The original adds up in float32 too; in float64 near-ties would fall differently.
    total, count = np.zeros(packs, np.float32), np.zeros(packs, np.int64)
    for i in order:
        best = -1
        for p in range(packs):
            if count[p] < items // packs and (best < 0 or total[p] < total[best]):
                best = p
        pack_I[i], position_I[i] = best, count[best]
        count[best] += 1
        total[best] += weight_I[i]
    return pack_I, position_I


@compiled
def _replicate(load_E: Float32Array, slots: int) -> tuple[IntArray, IntArray, IntArray]:
    """Expert and number of each of S replicas, in order of creation; replicas per expert."""
    experts = len(load_E)
    copy_of, rank_of = np.arange(slots), np.zeros(slots, np.int64)
    count_E = np.ones(experts, np.int64)
    for s in range(experts, slots):
        best, best_load = 0, np.float32(-1.0)
        for e in range(experts):
            share = np.float32(load_E[e] / np.float32(count_E[e]))
            if share > best_load:
                best, best_load = e, share
        copy_of[s], rank_of[s] = best, count_E[best]
        count_E[best] += 1
    return copy_of, rank_of, count_E
