"""The compiled loops of `traffic.py`: work per device and transfers per port.

Knows one layer at a time. The payload rules are stated in `traffic.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...foundation.compiled import compiled
from ..cluster import Cluster
from ..hardware import ComputeProfile, interpolate
from .max_min_rates import deals_fairly, fair_transfers_WX

NVLINK_OUT, NVLINK_IN, NIC_OUT, NIC_IN = 0, 1, 2, 3
PAIRS_AT_ONCE = 2**20


@dataclass(frozen=True, eq=False)
class LayerCounts:
    """One layer after dispatch."""

    tokens_WG: npt.NDArray[np.int64]
    active_WG: npt.NDArray[np.int64]
    bytes_WG: npt.NDArray[np.float64]
    table_us_WG: npt.NDArray[np.float64]
    extrapolated: bool
    ports_PWG: npt.NDArray[np.float64]      # NVLINK_OUT, NVLINK_IN, NIC_OUT, NIC_IN
    fair_WX: npt.NDArray[np.float64] | None     # as StepLoads.fair_copies_WLX
    gathers: int                            # of counts, before the dispatch


def count_layer(
    slot_AK: npt.NDArray[np.int32],
    from_AX: npt.NDArray[np.int32],
    offset_W: npt.NDArray[np.int64],
    slots_GC: npt.NDArray[np.int16],
    cluster: Cluster,
    expert_bytes_E: npt.NDArray[np.integer[Any]] | None,
    timed: bool,
    gathers: int,
) -> LayerCounts:
    """Work per device and transfers per port of one layer in every step.

    slot_AK: the slot of every assignment, -1 = none. from_AX: the ranks a token comes from, -1 =
    none; one column, its home, except under `coherent`. timed: whether exchanges will be priced.
    """
    devices, width = slots_GC.shape
    steps = len(offset_W) - 1
    slot_bytes_S = np.zeros(slots_GC.size)
    if expert_bytes_E is not None:
        filled = slots_GC.reshape(-1) >= 0
        slot_bytes_S[filled] = expert_bytes_E[slots_GC.reshape(-1)[filled]]
    tokens_WG = np.zeros((steps, devices), np.int64)
    active_WG = np.zeros((steps, devices), np.int64)
    bytes_WG = np.zeros((steps, devices))
    table_us_WG = np.zeros((steps, devices))
    profile = cluster.hardware.compute
    extrapolated = _count_work(
        slot_AK, offset_W, width, slot_bytes_S, _table_by_tokens(profile, offset_W, slot_AK),
        tokens_WG, active_WG, bytes_WG, table_us_WG,
        max(profile.expert_table_tokens, default=np.inf),
    )
    if not (timed and deals_fairly(cluster)):
        none_WGG = np.zeros((0, devices, devices))
        ports_PWG = _count_ports(slot_AK, from_AX, offset_W, width, cluster, none_WGG)
        return LayerCounts(
            tokens_WG, active_WG, bytes_WG, table_us_WG, bool(extrapolated), ports_PWG, None,
            gathers,
        )
    # A few steps at a time: all steps' matrices at once may not fit in memory.
    at_once = max(1, PAIRS_AT_ONCE // devices**2)
    parts, fair = [], []
    for first in range(0, max(steps, 1), at_once):
        part_W = offset_W[first : first + at_once + 1]
        far_WGG = np.zeros((len(part_W) - 1, devices, devices))
        parts.append(_count_ports(slot_AK, from_AX, part_W, width, cluster, far_WGG))
        fair.append(fair_transfers_WX(far_WGG, cluster))
    return LayerCounts(
        tokens_WG, active_WG, bytes_WG, table_us_WG, bool(extrapolated),
        np.concatenate(parts, axis=1), np.concatenate(fair), gathers,
    )


def _count_ports(
    slot_AK: npt.NDArray[np.int32],
    from_AX: npt.NDArray[np.int32],
    offset_W: npt.NDArray[np.int64],
    slots_per_device: int,
    cluster: Cluster,
    far_WGG: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """[4, W, G] transfers per port; those between nodes also by pair of devices, where wanted."""
    node_G, traffic = cluster.node_G, cluster.traffic
    ports_PWG = np.zeros((4, len(offset_W) - 1, cluster.num_devices))
    if traffic.mode == "allgather":
        _count_allgather(from_AX, offset_W, node_G, ports_PWG, far_WGG)
    elif traffic.mode == "coherent" or traffic.payload == "per_expert":
        _count_pairs(slot_AK, from_AX, offset_W, slots_per_device, node_G, ports_PWG, far_WGG)
    else:
        _count_merged(slot_AK, from_AX, offset_W, slots_per_device, node_G,
                      traffic.payload == "per_node", ports_PWG, far_WGG)
    return ports_PWG


def _table_by_tokens(
    profile: ComputeProfile, offset_W: npt.NDArray[np.int64], slot_AK: npt.NDArray[np.int32]
) -> npt.NDArray[np.float64]:
    """Time of one active expert by its whole number of tokens; empty without a table."""
    if not profile.expert_table_tokens:
        return np.zeros(0)
    most = int(np.diff(offset_W).max(initial=0)) * slot_AK.shape[1]
    return interpolate(np.arange(most + 1), profile.expert_table_tokens, profile.expert_table_us)[0]


@compiled
def _count_work(
    slot_AK: Any, offset_W: Any, slots_per_device: int, slot_bytes_S: Any, table_us: Any,
    tokens_WG: Any, active_WG: Any, bytes_WG: Any, table_us_WG: Any, table_end: float,
) -> bool:
    """Tokens, active slots, weights read and tabled time; whether a slot went past the table."""
    tokens_S = np.empty(len(slot_bytes_S), np.int64)
    past = False
    for w in range(len(offset_W) - 1):
        tokens_S[:] = 0
        for t in range(offset_W[w], offset_W[w + 1]):
            for k in range(slot_AK.shape[1]):
                if slot_AK[t, k] >= 0:
                    tokens_S[slot_AK[t, k]] += 1
        for s in range(len(tokens_S)):
            if tokens_S[s] > 0:
                tokens_WG[w, s // slots_per_device] += tokens_S[s]
                active_WG[w, s // slots_per_device] += 1
                bytes_WG[w, s // slots_per_device] += slot_bytes_S[s]
                if len(table_us) > 0:
                    table_us_WG[w, s // slots_per_device] += table_us[tokens_S[s]]
                    past = past or tokens_S[s] > table_end
    return past


@compiled
def _count_pairs(
    slot_AK: Any, from_AX: Any, offset_W: Any, slots_per_device: int, node_G: Any, ports_PWG: Any,
    far_WGG: Any,
) -> None:
    """One copy for each (rank the token comes from, expert) on different ranks.

    far_WGG, here and below: transfers between devices of different nodes; no steps = not wanted.
    """
    by_pair = len(far_WGG) > 0
    for w in range(len(offset_W) - 1):
        for t in range(offset_W[w], offset_W[w + 1]):
            for k in range(slot_AK.shape[1]):
                if slot_AK[t, k] < 0:
                    continue
                to = slot_AK[t, k] // slots_per_device
                for x in range(from_AX.shape[1]):
                    source = from_AX[t, x]
                    if source < 0 or source == to:
                        continue
                    near = node_G[source] == node_G[to]
                    ports_PWG[NVLINK_OUT if near else NIC_OUT, w, source] += 1
                    ports_PWG[NVLINK_IN if near else NIC_IN, w, to] += 1
                    if by_pair and not near:
                        far_WGG[w, source, to] += 1


@compiled
def _count_merged(
    slot_AK: Any, from_AX: Any, offset_W: Any, slots_per_device: int, node_G: Any, per_node: bool,
    ports_PWG: Any, far_WGG: Any,
) -> None:
    """One copy per (token, rank), and with `per_node` one per (token, other node) on the NICs."""
    devices, by_pair = len(node_G), len(far_WGG) > 0
    first_N, size_N = node_spans(node_G)
    rank_seen_G = np.zeros(devices, np.int64)      # last token to visit, counted from 1
    node_seen_N = np.zeros(len(first_N), np.int64)
    for w in range(len(offset_W) - 1):
        for t in range(offset_W[w], offset_W[w + 1]):
            home = from_AX[t, 0]
            own = node_G[home]
            for k in range(slot_AK.shape[1]):
                if slot_AK[t, k] < 0:
                    continue
                to = slot_AK[t, k] // slots_per_device
                if rank_seen_G[to] == t + 1:
                    continue
                rank_seen_G[to] = t + 1
                node = node_G[to]
                source = home
                if node != own and per_node:
                    # The rank with the home's place in that node receives and forwards.
                    source = first_N[node] + (home - first_N[own]) % size_N[node]
                    if node_seen_N[node] != t + 1:
                        node_seen_N[node] = t + 1
                        ports_PWG[NIC_OUT, w, home] += 1
                        ports_PWG[NIC_IN, w, source] += 1
                        if by_pair:
                            far_WGG[w, home, source] += 1
                elif node != own:
                    ports_PWG[NIC_OUT, w, home] += 1
                    ports_PWG[NIC_IN, w, to] += 1
                    if by_pair:
                        far_WGG[w, home, to] += 1
                    continue
                if source != to:
                    ports_PWG[NVLINK_OUT, w, source] += 1
                    ports_PWG[NVLINK_IN, w, to] += 1


@compiled
def _count_allgather(
    from_AX: Any, offset_W: Any, node_G: Any, ports_PWG: Any, far_WGG: Any
) -> None:
    """Every token to every rank; what enters a node is shared evenly by its NICs."""
    devices = len(node_G)
    first_N, size_N = node_spans(node_G)
    nodes = len(first_N)
    own_G = np.empty(devices, np.float64)
    own_N = np.empty(nodes, np.float64)
    for w in range(len(offset_W) - 1):
        own_G[:] = 0
        own_N[:] = 0
        for t in range(offset_W[w], offset_W[w + 1]):
            own_G[from_AX[t, 0]] += 1
            own_N[node_G[from_AX[t, 0]]] += 1
        total = float(offset_W[w + 1] - offset_W[w])
        for d in range(devices):
            n = node_G[d]
            arrives = (total - own_N[n]) / size_N[n]
            ports_PWG[NIC_OUT, w, d] = own_G[d] * (nodes - 1)
            ports_PWG[NIC_IN, w, d] = arrives
            ports_PWG[NVLINK_OUT, w, d] = (size_N[n] - 1) * (own_G[d] + arrives)
            ports_PWG[NVLINK_IN, w, d] = total - own_G[d] - arrives
            if len(far_WGG) > 0:
                for to in range(devices):
                    if node_G[to] != n:
                        far_WGG[w, d, to] = own_G[d] / size_N[node_G[to]]


@compiled
def node_spans(node_G: Any) -> Any:
    """(first rank, number of ranks) of every node; a node's ranks are consecutive."""
    nodes = node_G[len(node_G) - 1] + 1
    first_N = np.zeros(nodes, np.int64)
    size_N = np.zeros(nodes, np.int64)
    for d in range(len(node_G)):
        if size_N[node_G[d]] == 0:
            first_N[node_G[d]] = d
        size_N[node_G[d]] += 1
    return first_N, size_N
