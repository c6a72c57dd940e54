"""How long an exchange between nodes takes when every flow gets a fair rate of its links.

The most loaded port says how long an exchange takes as long as it works without a pause. A busy
device behind an oversubscribed spine does not: at first all flows of its node get equal shares, and
its own bytes are left over at the end, alone on the NIC. So here the rates are max-min fair,
again whenever flows end: exactly behind a shared spine. Without one, ends within MERGED of the port
bound are dealt as one, at the first of them: with the port bound as floor the price is then up to 3
% low on random traffic, 2 % on traces. Knows transfers from device to device and rates of links.
Knows nothing of plans, experts or steps; `benchmarks/oracles/flows.py` is the slow, plain form of
it, and its oracle (benchmarks/simulator.py, `oracle`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...foundation.arrays import FloatArray
from ...foundation.compiled import compiled
from ..cluster import Cluster
from ..hardware import ExchangeProfile

# Dealing one exchange takes 0.1 to 1 ms on 16 devices; on 64 3 ms at 512 tokens, 50 at 16,384.
MOST_DEALT = 64
# Without a shared spine: 0.1 ms, by dealing rates once for ends this near each other.
MOST_DEALT_ANYWAY, MERGED = 16, 0.02


def shares_a_spine(profile: ExchangeProfile, cluster: Cluster) -> bool:
    """Whether devices of a node contend for a spine that carries less than their NICs."""
    if profile.spine_bytes_per_s is None or cluster.num_nodes < 2:
        return False
    most = int(np.bincount(cluster.node_G).max())
    return most > 1 and profile.spine_bytes_per_s < most * profile.nic_bytes_per_s


def deals_fairly(cluster: Cluster) -> bool:
    """Whether exchanges between this cluster's nodes are priced by fair sharing.

    Behind a shared spine, where ports are far from it; without one, where it costs next to nothing
    (the most loaded port is exact in the median there, and a few exchanges take 3 to 8 % longer).
    """
    if cluster.num_nodes < 2:
        return False
    most = MOST_DEALT if _any_shared_spine(cluster) else MOST_DEALT_ANYWAY
    return cluster.num_devices <= most


def _any_shared_spine(cluster: Cluster) -> bool:
    legs = (cluster.hardware.dispatch, cluster.hardware.combine)
    return any(shares_a_spine(profile, cluster) for profile in legs)


def fair_transfers_WX(transfers_WGG: FloatArray, cluster: Cluster) -> FloatArray:
    """[W, 2] how long dispatch and combine take between nodes, in transfers through one NIC.

    transfers_WGG: transfers from device to device in the dispatch direction; those inside a node do
    not count. The combine is the mirror image, which takes equally long over the same links.
    """
    hardware, merged = cluster.hardware, 0.0 if _any_shared_spine(cluster) else MERGED
    spine = [_spine_in_nics(profile, cluster) for profile in (hardware.dispatch, hardware.combine)]
    dispatch_W = _finish_W(transfers_WGG, cluster.node_G, spine[0], merged)
    same = spine[0] == spine[1]
    combine_W = dispatch_W if same else _finish_W(transfers_WGG, cluster.node_G, spine[1], merged)
    return np.stack([dispatch_W, combine_W], axis=1)


def _spine_in_nics(profile: ExchangeProfile, cluster: Cluster) -> float:
    """What a node's spine carries, in NICs; where it has none, more than they can send."""
    if profile.spine_bytes_per_s is None:
        return float(cluster.num_devices)
    return profile.spine_bytes_per_s / profile.nic_bytes_per_s


@compiled
def _finish_W(transfers_WGG: Any, node_G: Any, spine: float, merged: float) -> Any:
    devices = len(node_G)
    nodes = node_G[devices - 1] + 1
    # NIC out and in of every device, spine out and in of every node; what cannot bind is left out.
    binds = spine < devices
    rate_X = np.ones(2 * devices + (2 * nodes if binds else 0))
    rate_X[2 * devices :] = spine
    finish_W = np.zeros(len(transfers_WGG))
    for w in range(len(transfers_WGG)):
        flows = 0
        for source in range(devices):
            for target in range(devices):
                if node_G[source] != node_G[target] and transfers_WGG[w, source, target] > 0:
                    flows += 1
        link_FP = np.empty((flows, 4 if binds else 2), np.int32)
        left_F = np.empty(flows)
        f = 0
        for source in range(devices):
            for target in range(devices):
                if node_G[source] != node_G[target] and transfers_WGG[w, source, target] > 0:
                    link_FP[f, 0], link_FP[f, 1] = source, devices + target
                    if binds:
                        link_FP[f, 2] = 2 * devices + node_G[source]
                        link_FP[f, 3] = 2 * devices + nodes + node_G[target]
                    left_F[f] = transfers_WGG[w, source, target]
                    f += 1
        finish_W[w] = _finish(left_F, link_FP, rate_X, merged)
    return finish_W


@compiled
def _finish(left_F: Any, link_FP: Any, rate_X: Any, merged: float) -> float:
    """When the last flow ends. left_F comes in with what each has to carry and goes out used up."""
    flows, per_flow = link_FP.shape
    links = len(rate_X)
    load_X, alive_X = np.zeros(links), np.zeros(links, np.int32)
    for f in range(flows):
        for p in range(per_flow):
            load_X[link_FP[f, p]] += left_F[f]
            alive_X[link_FP[f, p]] += 1
    together = merged * (load_X / rate_X).max()
    begin_X = np.zeros(links + 1, np.int32)      # of each link's flows in `crossing`
    begin_X[1:] = np.cumsum(alive_X)
    crossing = np.empty(begin_X[links], np.int32)
    next_X = begin_X[:-1].copy()
    for f in range(flows):
        for p in range(per_flow):
            crossing[next_X[link_FP[f, p]]] = f
            next_X[link_FP[f, p]] += 1
    alive = np.arange(flows)
    share_F, open_X, spare_X = np.empty(flows), np.empty(links, np.int32), np.empty(links)
    now = 0.0
    while len(alive) > 0:
        open_X[:] = alive_X
        spare_X[:] = rate_X
        share_F[:] = -1.0
        _deal_rates(left_F, link_FP, begin_X, crossing, len(alive), open_X, spare_X, share_F)
        first = np.inf
        for f in alive:
            first = min(first, left_F[f] / share_F[f])
        now += first
        last = first * (1.0 + 1e-12) + together
        kept = 0
        for f in alive:
            if left_F[f] > share_F[f] * last:
                left_F[f] -= share_F[f] * first
                alive[kept] = f
                kept += 1
            else:
                left_F[f] = 0.0
                for p in range(per_flow):
                    alive_X[link_FP[f, p]] -= 1
        alive = alive[:kept]
    return now


@compiled
def _deal_rates(
    left_F: Any, link_FP: Any, begin_X: Any, crossing: Any, waiting: int, open_X: Any,
    spare_X: Any, share_F: Any,
) -> None:
    """Max-min fair rates: the link with the least share for each fixes its flows, and so on.

    open_X: flows without a rate on each link, spare_X: rate left on it; both are used up.
    """
    while waiting > 0:
        least, at = np.inf, 0
        for x in range(len(open_X)):
            if open_X[x] > 0 and spare_X[x] < least * open_X[x]:
                least, at = spare_X[x] / open_X[x], x
        for i in range(begin_X[at], begin_X[at + 1]):
            f = crossing[i]
            if share_F[f] < 0 and left_F[f] > 0:
                share_F[f] = least
                waiting -= 1
                for p in range(link_FP.shape[1]):
                    open_X[link_FP[f, p]] -= 1
                    spare_X[link_FP[f, p]] = max(spare_X[link_FP[f, p]] - least, 0.0)
