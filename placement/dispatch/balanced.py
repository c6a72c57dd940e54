"""`balanced`: the flattest split of a step's tokens, and the one that keeps most of them near.

Knows one layer's slots, nodes and speeds, and one step's counts of all ranks. Knows nothing of
token ids or payload rules. Built on `min_max_flow.py`; compiled, no randomness.

The highest level (tokens over speed) of any device is as low as whole tokens allow, or up to
`slack` above that; among such splits as few tokens as possible leave their node; and a rank's own
slots are filled by its own tokens first.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...foundation.compiled import compiled
from .min_max_flow import fill_flat, flattest, push_excess


@compiled
def replicated_blocks(
    total_E: Any, start_E: Any, slot_R: Any, slots_per_device: int, load_G: Any
) -> Any:
    """(expert_B, start_B, slot_O): one block per used expert that lies on several devices.

    start_E, slot_R: one slot per (expert, device). Tokens of experts that lie on one device only
    are added to load_G at once.
    """
    blocks = 0
    options = 0
    for e in range(len(total_E)):
        replicas = start_E[e + 1] - start_E[e]
        if replicas == 1:
            load_G[slot_R[start_E[e]] // slots_per_device] += total_E[e]
        elif replicas > 1 and total_E[e] > 0:
            blocks += 1
            options += replicas
    expert_B = np.empty(blocks, np.int32)
    start_B = np.zeros(blocks + 1, np.int32)
    slot_O = np.empty(options, np.int32)
    b = 0
    o = 0
    for e in range(len(total_E)):
        if start_E[e + 1] - start_E[e] > 1 and total_E[e] > 0:
            expert_B[b] = e
            b += 1
            for r in range(start_E[e], start_E[e + 1]):
                slot_O[o] = slot_R[r]
                o += 1
            start_B[b] = o
    return expert_B, start_B, slot_O


@compiled
def split_flat(
    total_E: Any, start_E: Any, slot_R: Any, slots_per_device: int, speed_G: Any, slack: float
) -> Any:
    """The flattest split, wherever the tokens come from.

    Returns (expert_B, start_B, slot_O, flow_O, fixed_G, load_G, cap_G): what each block sends to
    its slots, the load before and after, and the caps kept.
    """
    fixed_G = np.zeros(len(speed_G), np.int64)
    expert_B, start_B, slot_O = replicated_blocks(
        total_E, start_E, slot_R, slots_per_device, fixed_G
    )
    tokens_B = np.empty(len(expert_B), np.int64)
    for b in range(len(expert_B)):
        tokens_B[b] = total_E[expert_B[b]]
    device_O = slot_O // np.int32(slots_per_device)
    flow_O = np.zeros(len(slot_O), np.int64)
    cost_O = np.zeros(len(slot_O), np.int32)
    load_G = fixed_G.copy()
    cap_G = np.empty(len(speed_G), np.int64)
    flattest(tokens_B, start_B, device_O, cost_O, flow_O, load_G, speed_G, slack, cap_G)
    return expert_B, start_B, slot_O, flow_O, fixed_G, load_G, cap_G


@compiled
def total_over(counts_XE: Any) -> Any:
    """[E] sums over the first axis."""
    total_E = np.zeros(counts_XE.shape[1], np.int64)
    for x in range(counts_XE.shape[0]):
        for e in range(counts_XE.shape[1]):
            total_E[e] += counts_XE[x, e]
    return total_E


@compiled
def split_by_node(
    counts_NE: Any, start_E: Any, slot_R: Any, slots_per_device: int, node_G: Any, speed_G: Any,
    slack: float,
) -> Any:
    """The flattest split that keeps most tokens in the node they come from.

    counts_NE: tokens by source node; N = 1 means that the source plays no part.
    Returns (expert_B, node_B, start_B, slot_O, flow_O, load_G); blocks are (source node, expert).
    """
    nodes = counts_NE.shape[0]
    expert_X, start_X, slot_X, flow_X, load_G, flat_G, cap_G = split_flat(
        total_over(counts_NE), start_E, slot_R, slots_per_device, speed_G, slack
    )
    if nodes == 1:
        return expert_X, np.zeros(len(expert_X), np.int32), start_X, slot_X, flow_X, flat_G
    expert_B, node_B, start_B, end_B, slot_O = _blocks_by_node(
        counts_NE, expert_X, start_X, slot_X, node_G, slots_per_device
    )
    tokens_B = np.empty(len(expert_B), np.int64)
    for b in range(len(expert_B)):
        tokens_B[b] = counts_NE[node_B[b], expert_B[b]]
    device_O = slot_O // np.int32(slots_per_device)
    cost_O = np.zeros(len(slot_O), np.int32)
    for b in range(len(expert_B)):
        for o in range(start_B[b], start_B[b + 1]):
            if node_G[device_O[o]] != node_B[b]:
                cost_O[o] = 1
    flow_O = np.zeros(len(slot_O), np.int64)
    fill_flat(tokens_B, start_B, end_B, device_O, flow_O, load_G, speed_G, cap_G)
    push_excess(start_B, device_O, cost_O, flow_O, load_G, cap_G)
    return expert_B, node_B, start_B, slot_O, flow_O, load_G


@compiled
def _blocks_by_node(
    counts_NE: Any, expert_X: Any, start_X: Any, slot_X: Any, node_G: Any, slots_per_device: int
) -> Any:
    """Blocks (node, expert) with tokens; a block's own-node slots first, start_B:end_B.

    Where the node holds no replica every slot is as good as another and end_B covers them all.
    """
    nodes = counts_NE.shape[0]
    blocks = 0
    options = 0
    for x in range(len(expert_X)):
        for n in range(nodes):
            if counts_NE[n, expert_X[x]] > 0:
                blocks += 1
                options += start_X[x + 1] - start_X[x]
    expert_B = np.empty(blocks, np.int32)
    node_B = np.empty(blocks, np.int32)
    start_B = np.zeros(blocks + 1, np.int32)
    end_B = np.empty(blocks, np.int32)
    slot_O = np.empty(options, np.int32)
    b = 0
    o = 0
    for x in range(len(expert_X)):
        for n in range(nodes):
            if counts_NE[n, expert_X[x]] == 0:
                continue
            expert_B[b] = expert_X[x]
            node_B[b] = n
            for i in range(start_X[x], start_X[x + 1]):
                if node_G[slot_X[i] // slots_per_device] == n:
                    slot_O[o] = slot_X[i]
                    o += 1
            own = o
            for i in range(start_X[x], start_X[x + 1]):
                if node_G[slot_X[i] // slots_per_device] != n:
                    slot_O[o] = slot_X[i]
                    o += 1
            end_B[b] = own if own > start_B[b] else o
            b += 1
            start_B[b] = o
    return expert_B, node_B, start_B, end_B, slot_O


@compiled
def counts_by_node(counts_GE: Any, node_G: Any, nodes: int) -> Any:
    """[N, E] tokens by source node from counts by home rank."""
    counts_NE = np.zeros((nodes, counts_GE.shape[1]), np.int64)
    for g in range(counts_GE.shape[0]):
        n = node_G[g] if nodes > 1 else 0
        for e in range(counts_GE.shape[1]):
            counts_NE[n, e] += counts_GE[g, e]
    return counts_NE


@compiled
def split_balanced(
    counts_GE: Any, start_E: Any, slot_R: Any, slots_per_device: int, node_G: Any, nodes: int,
    speed_G: Any, slack: float, quotas_GS: Any,
) -> None:
    """`balanced` quotas of one step; quotas_GS comes in zero."""
    counts_NE = counts_by_node(counts_GE, node_G, nodes)
    expert_B, node_B, start_B, slot_O, flow_O, _load_G = split_by_node(
        counts_NE, start_E, slot_R, slots_per_device, node_G, speed_G, slack
    )
    homes = counts_GE.shape[0]
    for e in range(counts_GE.shape[1]):
        if start_E[e + 1] - start_E[e] == 1:
            slot = slot_R[start_E[e]]
            for g in range(homes):
                quotas_GS[g, slot] = counts_GE[g, e]
    left_O = flow_O.copy()
    left_G = np.empty(homes, np.int64)
    for b in range(len(expert_B)):
        first, last = homes_of_node(node_B[b], node_G, nodes, homes)
        for g in range(first, last):
            left_G[g] = counts_GE[g, expert_B[b]]
        share_homes(
            first, last, expert_B[b], start_B[b], start_B[b + 1], slot_O, left_O, left_G,
            slots_per_device, quotas_GS,
        )


@compiled
def homes_of_node(node: int, node_G: Any, nodes: int, homes: int) -> Any:
    """(first, last) ranks of a node; all ranks where there is one node."""
    if nodes == 1:
        return 0, homes
    first = 0
    while node_G[first] != node:
        first += 1
    last = first
    while last < homes and node_G[last] == node:
        last += 1
    return first, last


@compiled
def share_homes(
    first: int, last: int, expert: int, start: int, end: int, slot_O: Any, left_O: Any,
    left_G: Any, slots_per_device: int, quotas_GS: Any,
) -> None:
    """Divide one block's slot flows among home ranks first..last, own slots first.

    left_G: tokens each home has in the block, left_O: tokens each slot takes; both go to zero.
    The rest is dealt from a home that turns with the expert, so no rank is always last (the last
    ones get the remote slots).
    """
    for o in range(start, end):
        home = slot_O[o] // slots_per_device
        if first <= home < last:
            own = min(left_O[o], left_G[home])
            quotas_GS[home, slot_O[o]] += own
            left_O[o] -= own
            left_G[home] -= own
    o = start
    span = last - first
    for i in range(span):
        home = first + (i + expert) % span
        while left_G[home] > 0:
            while left_O[o] == 0:
                o += 1
            amount = min(left_O[o], left_G[home])
            quotas_GS[home, slot_O[o]] += amount
            left_O[o] -= amount
            left_G[home] -= amount
