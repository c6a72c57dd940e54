"""Flows that share links fairly: the slow, detailed answer to "how long does this exchange take?".

Max-min fairness: every flow gets the largest rate that takes nothing from a slower one; rates are
dealt again whenever a flow ends. Knows flows and links. Knows nothing of experts or steps.
`step_cost` uses the most loaded port and, between nodes of few enough devices, the compiled form of
these rates (`placement/cost/max_min_rates.py`); this is the oracle of both, for tests and
benchmarks.

The port bound is never above the fair makespan. It is far below where senders split their rate
between a hot receiver and others at first, and the receiver's port alone is left at the end: m
senders with `a` units for one receiver and one unit for each of a(m - 1) others take nearly twice
the bound (`tests/oracles/test_flows.py`: 1.56 times at m = a = 4).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loadmaster.errors import InputError
from loadmaster.foundation.arrays import FloatArray, IntArray
from loadmaster.placement.cluster import Cluster
from loadmaster.placement.hardware import ExchangeProfile

NO_LINK = -1


@dataclass(frozen=True, eq=False)
class Network:
    """Links of a cluster: X rates, and for any pair of devices the links a flow crosses."""

    bytes_per_s_X: FloatArray
    node_G: IntArray
    has_spine: bool

    @classmethod
    def of(cls, cluster: Cluster, profile: ExchangeProfile) -> Network:
        """Per device NVLink out, in, NIC out, in; per node spine out, in where there is a spine."""
        devices, nodes = cluster.num_devices, cluster.num_nodes
        near, far = profile.nvlink_bytes_per_s, profile.nic_bytes_per_s
        rates = [near] * (2 * devices) + [far] * (2 * devices)
        spine = profile.spine_bytes_per_s
        if spine is not None:
            rates += [spine] * (2 * nodes)
        return cls(np.array(rates), cluster.node_G, spine is not None)

    def links_FP(self, source_F: IntArray, target_F: IntArray) -> IntArray:
        """[F, 4] links each flow crosses, NO_LINK where fewer."""
        devices = len(self.node_G)
        nodes = int(self.node_G[-1]) + 1
        from_node, to_node = self.node_G[source_F], self.node_G[target_F]
        near = from_node == to_node
        links = np.full((len(source_F), 4), NO_LINK, np.int64)
        links[:, 0] = np.where(near, source_F, 2 * devices + source_F)
        links[:, 1] = np.where(near, devices + target_F, 3 * devices + target_F)
        if self.has_spine:
            links[:, 2] = np.where(near, NO_LINK, 4 * devices + from_node)
            links[:, 3] = np.where(near, NO_LINK, 4 * devices + nodes + to_node)
        return links


@dataclass(frozen=True, eq=False)
class Flows:
    """F flows: bytes, and the links each crosses (NO_LINK = none)."""

    bytes_F: FloatArray
    links_FP: IntArray

    @classmethod
    def of_matrix(cls, bytes_GG: FloatArray, network: Network) -> Flows:
        """One flow per pair of different devices that has bytes to send."""
        if bytes_GG.shape != (len(network.node_G),) * 2 or (bytes_GG < 0).any():
            raise InputError(f"traffic {bytes_GG.shape} must be [G, G] bytes >= 0")
        source, target = np.nonzero(bytes_GG * (1 - np.eye(len(bytes_GG))))
        return cls(bytes_GG[source, target], network.links_FP(source, target))


def port_bound_s(flows: Flows, network: Network) -> float:
    """Seconds that the most loaded link needs; no schedule of the flows is faster."""
    if not len(flows.bytes_F):
        return 0.0
    load_X = np.zeros(len(network.bytes_per_s_X) + 1)
    for links_F in flows.links_FP.T:
        np.add.at(load_X, links_F, flows.bytes_F)     # NO_LINK falls on the last, unused place
    return float((load_X[:-1] / network.bytes_per_s_X).max())


def fair_finish_s(flows: Flows, network: Network) -> FloatArray:
    """[F] seconds until each flow ends, all starting together. Cost: O(F) dealings of rates."""
    left, finish = flows.bytes_F.astype(np.float64).copy(), np.zeros(len(flows.bytes_F))
    alive = left > 0
    now = 0.0
    while alive.any():
        active = np.flatnonzero(alive)
        rate = fair_rates(flows.links_FP[active], network.bytes_per_s_X)
        needs = left[active] / rate
        shortest = float(needs.min())
        now += shortest
        left[active] -= rate * shortest
        ended = active[needs <= shortest * (1 + 1e-12)]
        alive[ended], finish[ended] = False, now
    return finish


def fair_rates(links_FP: IntArray, bytes_per_s_X: FloatArray) -> FloatArray:
    """[F] max-min fair rates: the link with the smallest share fixes its flows, and so on.

    Ties go to the lower link; the rates do not depend on the tie.
    """
    flows, links = len(links_FP), len(bytes_per_s_X)
    crosses_FX = np.zeros((flows, links + 1), bool)
    np.put_along_axis(crosses_FX, links_FP, True, axis=1)
    crosses_FX = crosses_FX[:, :-1]
    rate_F, fixed_F = np.zeros(flows), np.zeros(flows, bool)
    residual_X = bytes_per_s_X.astype(np.float64).copy()
    while not fixed_F.all():
        open_X = crosses_FX[~fixed_F].sum(axis=0)
        share_X = np.where(open_X > 0, residual_X / np.maximum(open_X, 1), np.inf)
        link = int(np.argmin(share_X))
        chosen = crosses_FX[:, link] & ~fixed_F
        rate_F[chosen] = share_X[link]
        fixed_F |= chosen
        residual_X = np.maximum(
            residual_X - share_X[link] * crosses_FX[chosen].sum(axis=0), 0.0
        )
    return rate_F
