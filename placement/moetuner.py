"""MoETuner's two integer programs, repaired, as a method of its own (arXiv 2502.06643).

Stage 1 clusters each layer's experts by load; stage 2 places the clusters on devices so that tokens
stay near from layer to layer. The printed programs lack an assignment constraint, nest their sums
wrongly and multiply variables; the repaired forms are in the docstrings. Stage 2 is physical only
where tokens stay at their expert (`coherent` traffic); elsewhere it changes nothing but labels.

Knows loads, transition counts and link weights. Knows nothing of replicas, steps or dispatch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pulp
from scipy.optimize import linear_sum_assignment

from ..errors import InfeasibleError
from .ilp import OnGap, Solved, binary_grid, continuous, largest_in_rows, set_start, solve

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Spread = Literal["makespan", "deviation"]
Worst = Literal["max", "sum"]

EXACT_DEVICES = 6           # G! states a layer: 720 at 6
RESTARTS = 4


@dataclass(frozen=True)
class Clusters:
    """Stage 1 of one layer: the cluster of each expert, and how good the solver says it is."""

    cluster_E: IntArray
    solved: Solved


def cluster_layer(
    load_E: FloatArray,
    sizes: Sequence[tuple[int, int]],
    *,
    spread: Spread = "makespan",
    nodes: int = 20_000,
    gap: float = 1e-6,
    on_gap: OnGap | None = None,
) -> Clusters:
    """ILP 1, repaired: cluster one layer's experts so that clusters carry alike.

    x[e][c] = 1 if expert e is in cluster c.   E experts, C clusters, T_c = sum_e load[e] x[e][c].
    minimise  z                          (makespan)
              sum_c d_c                  (deviation from the mean load)
    (1) sum_c x[e][c] = 1                each e      every expert in exactly one cluster
    (2) least_c <= sum_e x[e][c] <= most_c   each c  sizes[c]: equal, or free between bounds
    (3) z >= T_c                         each c
        d_c >= T_c − mean, d_c >= mean − T_c
    (4) clusters of equal size bounds are interchangeable: the heaviest expert goes to the first.
    Starts from longest-processing-time with swaps. Loads are scaled to a mean cluster of 1.
    Raises InfeasibleError when the sizes cannot hold the experts.
    """
    experts, clusters = len(load_E), len(sizes)
    if not sum(a for a, _ in sizes) <= experts <= sum(b for _, b in sizes):
        raise InfeasibleError(
            f"{experts} experts do not fit {clusters} clusters of sizes {list(sizes)}: "
            "change the slots per device"
        )
    total = float(np.sum(load_E))
    scaled = np.asarray(load_E, np.float64) * (clusters / total if total > 0 else 1.0)
    start = _lpt_with_swaps(scaled, sizes)
    problem = pulp.LpProblem("clusters", pulp.LpMinimize)
    x = binary_grid("x", experts, clusters)
    load_c = [pulp.lpSum(scaled[e] * x[e][c] for e in range(experts)) for c in range(clusters)]
    mean = float(scaled.sum()) / clusters
    z = continuous("z", 1 if spread == "makespan" else clusters)
    problem += pulp.lpSum(z)
    for e in range(experts):
        problem += pulp.lpSum(x[e]) == 1, f"placed_{e}"                              # (1)
    for c, (least, most) in enumerate(sizes):
        count = pulp.lpSum(x[e][c] for e in range(experts))
        problem += count >= least, f"least_{c}"                                      # (2)
        problem += count <= most, f"most_{c}"
        if spread == "makespan":
            problem += z[0] >= load_c[c], f"load_{c}"                                # (3)
        else:
            problem += z[c] >= load_c[c] - mean, f"above_{c}"
            problem += z[c] >= mean - load_c[c], f"below_{c}"
    if len(set(sizes)) == 1:
        heaviest = int(np.argmax(scaled))
        start = _rename_first(start, int(start[heaviest]))
        problem += x[heaviest][0] == 1, "heaviest_first"                             # (4)
    set_start(x, start)
    for c, variable in enumerate(z):
        sums = np.bincount(start, scaled, clusters)
        variable.setInitialValue(
            float(sums.max()) if spread == "makespan" else float(abs(sums[c] - mean)), check=False
        )
    solved = solve(problem, nodes=nodes, gap=gap, on_gap=on_gap)
    chosen = _valid(largest_in_rows(x), sizes)
    better = chosen if _spread(scaled, chosen, clusters, spread) <= _spread(
        scaled, start, clusters, spread
    ) else start
    return Clusters(better, solved)


def _spread(load_E: FloatArray, cluster_E: IntArray, clusters: int, spread: Spread) -> float:
    sums = np.bincount(cluster_E, load_E, clusters)
    return float(sums.max() if spread == "makespan" else abs(sums - sums.mean()).sum())


def _valid(cluster_E: IntArray, sizes: Sequence[tuple[int, int]]) -> IntArray:
    """The answer, checked by counting; the solver's own word is not enough."""
    for c, (least, most) in enumerate(sizes):
        count = int((cluster_E == c).sum())
        if not least <= count <= most:
            raise InfeasibleError(f"cluster {c} got {count} experts, allowed {least}..{most}")
    return cluster_E


def _lpt_with_swaps(load_E: FloatArray, sizes: Sequence[tuple[int, int]]) -> IntArray:
    """Heaviest first onto the lightest cluster with room, then swaps that lower the heaviest."""
    clusters = len(sizes)
    sums, count = np.zeros(clusters), np.zeros(clusters, np.int64)
    least = np.array([a for a, _ in sizes])
    most = np.array([b for _, b in sizes])
    cluster_E = np.zeros(len(load_E), np.int64)
    left = len(load_E)
    for e in np.lexsort((np.arange(len(load_E)), -load_E)):
        owed = np.maximum(least - count, 0)
        open_c = (count < most) & ((owed > 0) | (left > int(owed.sum())))
        c = int(np.argmin(np.where(open_c, sums, np.inf)))
        cluster_E[e] = c
        sums[c] += load_E[e]
        count[c] += 1
        left -= 1
    while True:
        hot = int(np.argmax(sums))
        mine, others = np.flatnonzero(cluster_E == hot), np.flatnonzero(cluster_E != hot)
        if not len(mine) or not len(others):
            return cluster_E
        gain = load_E[mine][:, None] - load_E[others]
        after = np.maximum(sums[hot] - gain, sums[cluster_E[others]] + gain)
        i, j = np.unravel_index(int(np.argmin(after)), after.shape)
        if after[i, j] >= sums[hot] * (1 - 1e-12):
            return cluster_E
        e, f = mine[i], others[j]
        sums[hot] -= gain[i, j]
        sums[cluster_E[f]] += gain[i, j]
        cluster_E[e], cluster_E[f] = cluster_E[f], hot


def _rename_first(cluster_E: IntArray, first: int) -> IntArray:
    """Exchange the names of cluster `first` and cluster 0."""
    renamed = cluster_E.copy()
    renamed[cluster_E == first], renamed[cluster_E == 0] = 0, first
    return renamed


# ---- stage 2 ----------------------------------------------------------------------------------


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
    traffic_LCC: FloatArray, weight_GG: FloatArray, worst: Worst = "max", seed: int = 0
) -> tuple[IntArray, bool]:
    """ILP 2: (device_LC, proved optimal). Exact by dynamic programming to 6 devices.

    With one cluster per device and layer the program's cost couples neighbouring layers only:
    V_{l+1}(q) = min_p V_l(p) + cost_l(p, q) over permutations p, q of clusters to devices. Above
    six devices: assignment descent from several starts, then pair swaps under the true objective.
    """
    devices = len(weight_GG)
    if devices <= EXACT_DEVICES:
        return _viterbi(traffic_LCC, weight_GG, worst), True
    return _descend(traffic_LCC, weight_GG, worst, seed), False


def _viterbi(traffic_LCC: FloatArray, weight_GG: FloatArray, worst: Worst) -> IntArray:
    clusters = traffic_LCC.shape[1] if len(traffic_LCC) else len(weight_GG)
    states = np.array(list(itertools.permutations(range(clusters))), np.int64)   # [P, C]
    layers = len(traffic_LCC) + 1
    value_P = np.zeros(len(states))
    came_LP = np.zeros((layers, len(states)), np.int64)
    for layer in range(layers - 1):
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
    traffic_LCC: FloatArray, weight_GG: FloatArray, worst: Worst, seed: int
) -> IntArray:
    layers, devices = len(traffic_LCC) + 1, len(weight_GG)
    rng = np.random.default_rng(seed)
    starts = [np.tile(np.arange(devices), (layers, 1))]
    starts += [
        np.stack([rng.permutation(devices) for _ in range(layers)]) for _ in range(RESTARTS)
    ]
    best, best_cost = starts[0], np.inf
    for start in starts:
        device_LC = _assignment_sweeps(traffic_LCC, weight_GG, start)
        device_LC = _pair_swaps(traffic_LCC, weight_GG, device_LC, worst)
        cost = chain_cost(traffic_LCC, device_LC, weight_GG, worst)
        if cost < best_cost:
            best, best_cost = device_LC, cost
    return best


def _assignment_sweeps(
    traffic_LCC: FloatArray, weight_GG: FloatArray, device_LC: IntArray
) -> IntArray:
    """With its neighbours fixed, a layer of the sum objective is a linear assignment problem."""
    device_LC = device_LC.copy()
    layers = len(device_LC)
    cost = chain_cost(traffic_LCC, device_LC, weight_GG, "sum")
    while True:
        for layer in (*range(layers), *range(layers - 2, -1, -1)):
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


def _pair_swaps(
    traffic_LCC: FloatArray, weight_GG: FloatArray, device_LC: IntArray, worst: Worst
) -> IntArray:
    """Exchange two clusters of a layer while the true objective falls."""
    device_LC = device_LC.copy()
    layers, clusters = device_LC.shape

    def around(layer: int) -> float:
        first, last = max(layer - 1, 0), min(layer + 1, layers - 1)
        return chain_cost(traffic_LCC[first:last], device_LC[first : last + 1], weight_GG, worst)

    improved = True
    while improved:
        improved = False
        for layer in range(layers):
            for a, b in itertools.combinations(range(clusters), 2):
                before = around(layer)
                device_LC[layer, [a, b]] = device_LC[layer, [b, a]]
                if around(layer) < before * (1 - 1e-12):
                    improved = True
                else:
                    device_LC[layer, [a, b]] = device_LC[layer, [b, a]]
    return device_LC


def full_program(
    traffic_LCC: FloatArray, weight_GG: FloatArray, worst: Worst, *, nodes: int = 200_000
) -> Solved:
    """ILP 2 as one program, to certify tiny cases; far too large for real ones.

    y[l][c][g] = 1 if cluster c of layer l is on device g; z[l][c1,g1,c2,g2] = y·y linearised.
    minimise  sum_l tau_l
    (1) tau_l >= weight[g1,g2] · sum_{c1,c2} traffic[l][c1,c2] z[l][c1,g1,c2,g2]   each g1 != g2
        (sum objective: tau_l = the sum over all pairs)
    (2) sum_{g2} z[l][c1,g1,c2,g2] = y[l][c1][g1],  sum_{g1} z = y[l+1][c2][g2]
    (3) sum_g y[l][c][g] = 1,  sum_c y[l][c][g] = 1
    """
    layers, devices = len(traffic_LCC) + 1, len(weight_GG)
    span = range(devices)
    problem = pulp.LpProblem("chain", pulp.LpMinimize)
    y = [binary_grid(f"y{layer}", devices, devices) for layer in range(layers)]
    tau = continuous("tau", layers - 1)
    problem += pulp.lpSum(tau)
    for layer in range(layers):
        for c in span:
            problem += pulp.lpSum(y[layer][c]) == 1                                   # (3)
            problem += pulp.lpSum(y[layer][i][c] for i in span) == 1
    for layer in range(layers - 1):
        z = pulp.LpVariable.dicts(f"z{layer}", (span, span, span, span), lowBound=0)
        for c1, g1, c2 in itertools.product(span, repeat=3):
            problem += pulp.lpSum(z[c1][g1][c2][g2] for g2 in span) == y[layer][c1][g1]   # (2)
            problem += pulp.lpSum(z[c1][g2][c2][g1] for g2 in span) == y[layer + 1][c2][g1]
        sent = {
            (g1, g2): weight_GG[g1, g2] * pulp.lpSum(
                traffic_LCC[layer][c1, c2] * z[c1][g1][c2][g2] for c1 in span for c2 in span
            )
            for g1 in span for g2 in span if g1 != g2
        }
        if worst == "sum":
            problem += tau[layer] >= pulp.lpSum(sent.values())                        # (1)
        else:
            for part in sent.values():
                problem += tau[layer] >= part
    return solve(problem, nodes=nodes)
