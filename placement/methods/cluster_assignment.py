"""MoETuner's second integer program, repaired: clusters of experts onto devices, layer after layer.

Tokens stay near from layer to layer when clusters that follow each other share a device or a node
(arXiv 2502.06643, ILP 2). The printed program nests its sums inside the maximum and multiplies
variables; the repaired form, far too large for real cases, certifies this search in the tests.
Physical only where tokens stay at their expert (`coherent` traffic); elsewhere it changes nothing
but device labels.

Knows traffic between clusters and link weights. Knows nothing of experts, loads or devices' slots.
"""

from __future__ import annotations

import itertools
import time
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from ...foundation.arrays import FloatArray, IntArray
from ...foundation.compiled import clock, compiled

Worst = Literal["max", "sum"]

EXACT_DEVICES = 6           # G! states a layer: 720 at 6
RESTARTS = 4


def cluster_traffic(
    transition_LEE: npt.NDArray[np.integer], cluster_LE: IntArray, clusters: int
) -> FloatArray:
    """[L-1, C, C] tokens from cluster to cluster of the next layer."""
    layers = len(cluster_LE)
    traffic = np.zeros((max(layers - 1, 0), clusters, clusters))
    for layer in range(layers - 1):
        pair = cluster_LE[layer][:, None] * clusters + cluster_LE[layer + 1][None, :]
        weights = transition_LEE[layer].reshape(-1).astype(np.float64)
        traffic[layer] = np.bincount(pair.reshape(-1), weights, clusters * clusters).reshape(
            clusters, clusters
        )
    return traffic


def chain_cost(
    traffic_LCC: FloatArray, device_LC: IntArray, weight_GG: FloatArray, worst: Worst
) -> float:
    """Cost of clusters on devices: per layer the worst device pair or the sum over all pairs.

    max:  sum_l  max_{g1 != g2}  weight[g1, g2] · tokens from g1 to g2
    sum:  sum_l  sum_{g1, g2}    weight[g1, g2] · tokens from g1 to g2      (weight[g, g] = 0)
    """
    total = 0.0
    for layer in range(len(traffic_LCC)):
        cost = weight_GG[np.ix_(device_LC[layer], device_LC[layer + 1])] * traffic_LCC[layer]
        total += float(cost.max() if worst == "max" else cost.sum())
    return total


def place_clusters(
    traffic_LCC: FloatArray,
    weight_GG: FloatArray,
    worst: Worst = "max",
    seed: int = 0,
    *,
    deadline: float | None = None,
) -> tuple[IntArray, bool]:
    """ILP 2: (device_LC, proved optimal). Exact by dynamic programming to 6 devices.

    With one cluster per device and layer the program's cost couples neighbouring layers only:
    V_{l+1}(q) = min_p V_l(p) + cost_l(p, q) over permutations p, q of clusters to devices. Above
    six devices: assignment descent from several starts, then pair swaps under the true objective.
    deadline: time.time() after which the best so far is taken, at least clusters by number.
    """
    devices, until = len(weight_GG), np.inf if deadline is None else deadline
    if devices <= EXACT_DEVICES:
        exact = _viterbi(traffic_LCC, weight_GG, worst, until)
        if exact is not None:
            return exact, True
    return _descend(traffic_LCC, weight_GG, worst, seed, until), False


def _viterbi(
    traffic_LCC: FloatArray, weight_GG: FloatArray, worst: Worst, until: float
) -> IntArray | None:
    """The best of all; None where the time is up before it is known."""
    clusters = traffic_LCC.shape[1] if len(traffic_LCC) else len(weight_GG)
    states = np.array(list(itertools.permutations(range(clusters))), np.int64)   # [P, C]
    layers = len(traffic_LCC) + 1
    value_P = np.zeros(len(states))
    came_LP = np.zeros((layers, len(states)), np.int64)
    for layer in range(layers - 1):
        if time.time() > until:
            return None
        cost_PQ = _transition_costs(traffic_LCC[layer], weight_GG, states, worst)
        whole = value_P[:, None] + cost_PQ
        came_LP[layer + 1] = np.argmin(whole, axis=0)      # ties: the first permutation
        value_P = whole[came_LP[layer + 1], np.arange(len(states))]
    at = int(np.argmin(value_P))
    path = [at]
    for layer in range(layers - 1, 0, -1):
        at = int(came_LP[layer, at])
        path.append(at)
    return states[path[::-1]]


def _transition_costs(
    traffic_CC: FloatArray, weight_GG: FloatArray, states: IntArray, worst: Worst
) -> FloatArray:
    """[P, Q] cost of clusters placed by p in this layer and by q in the next."""
    out = np.zeros((len(states), len(states)))
    for c1, c2 in itertools.product(range(len(traffic_CC)), repeat=2):
        part = weight_GG[states[:, c1][:, None], states[:, c2]] * traffic_CC[c1, c2]
        if worst == "max":
            np.maximum(out, part, out=out)
        else:
            out += part
    return out


def _descend(
    traffic_LCC: FloatArray, weight_GG: FloatArray, worst: Worst, seed: int, until: float
) -> IntArray:
    layers, devices = len(traffic_LCC) + 1, len(weight_GG)
    rng = np.random.default_rng(seed)
    starts = [np.tile(np.arange(devices), (layers, 1))]
    starts += [
        np.stack([rng.permutation(devices) for _ in range(layers)]) for _ in range(RESTARTS)
    ]
    best, best_cost = starts[0], np.inf
    for start in starts:
        if np.isfinite(best_cost) and time.time() > until:
            break
        device_LC = _assignment_sweeps(traffic_LCC, weight_GG, start, until)
        _pair_swaps(traffic_LCC, weight_GG, device_LC, worst == "max", until)
        cost = chain_cost(traffic_LCC, device_LC, weight_GG, worst)
        if cost < best_cost:
            best, best_cost = device_LC, cost
    return best


def _assignment_sweeps(
    traffic_LCC: FloatArray, weight_GG: FloatArray, device_LC: IntArray, until: float
) -> IntArray:
    """With its neighbours fixed, a layer of the sum objective is a linear assignment problem."""
    device_LC = device_LC.copy()
    layers = len(device_LC)
    cost = chain_cost(traffic_LCC, device_LC, weight_GG, "sum")
    while True:
        for layer in (*range(layers), *range(layers - 2, -1, -1)):
            if time.time() > until:
                return device_LC
            price_CG = np.zeros((device_LC.shape[1], len(weight_GG)))
            if layer > 0:
                price_CG += traffic_LCC[layer - 1].T @ weight_GG[device_LC[layer - 1]]
            if layer < layers - 1:
                price_CG += traffic_LCC[layer] @ weight_GG.T[device_LC[layer + 1]]
            device_LC[layer] = linear_sum_assignment(price_CG)[1]
        after = chain_cost(traffic_LCC, device_LC, weight_GG, "sum")
        if after >= cost * (1 - 1e-9):
            return device_LC
        cost = after


@compiled
def _pair_swaps(
    traffic_LCC: Any, weight_GG: Any, device_LC: Any, maximum: bool, until: float
) -> None:
    """Exchange two clusters of a layer while the true objective falls. Changes device_LC."""
    layers, clusters = device_LC.shape
    improved = True
    while improved:
        improved = False
        for layer in range(layers):
            before = _around(traffic_LCC, weight_GG, device_LC, layer, maximum)
            for a in range(clusters):
                if until < np.inf and clock() > until:
                    return
                for b in range(a + 1, clusters):
                    first, second = device_LC[layer, a], device_LC[layer, b]
                    device_LC[layer, a], device_LC[layer, b] = second, first
                    after = _around(traffic_LCC, weight_GG, device_LC, layer, maximum)
                    if after < before * (1 - 1e-12):
                        before, improved = after, True
                    else:
                        device_LC[layer, a], device_LC[layer, b] = first, second


@compiled
def _around(
    traffic_LCC: Any, weight_GG: Any, device_LC: Any, layer: int, maximum: bool
) -> float:
    """Cost of the transitions into and out of a layer."""
    clusters, total = device_LC.shape[1], 0.0
    for transition in range(max(layer - 1, 0), min(layer + 1, len(traffic_LCC))):
        worst, added = 0.0, 0.0
        for i in range(clusters):
            for j in range(clusters):
                cost = (
                    weight_GG[device_LC[transition, i], device_LC[transition + 1, j]]
                    * traffic_LCC[transition, i, j]
                )
                added += cost
                worst = max(worst, cost)
        total += worst if maximum else added
    return total
