"""MoETuner, repaired (arXiv 2502.06643): experts into clusters, clusters onto devices.

Stage 1, here, clusters each layer's experts by load; stage 2 (`chain.py`) places the clusters of
all layers so that tokens stay near. The printed programs lack an assignment constraint, nest their
sums wrongly and multiply variables; the repaired forms are in the docstrings. One replica of each
expert; spare slots only loosen the clusters' sizes.

Knows loads, transition counts and hop prices. Knows nothing of replicas, steps or dispatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pulp

from ...errors import InfeasibleError
from ...foundation.arrays import FloatArray, IntArray
from .cluster_assignment import EXACT_DEVICES, cluster_traffic, place_clusters
from .milp import OnGap, Solved, binary_grid, continuous, largest_in_rows, set_start, solve
from .whole_model import LayersDone, PlacedModel, WholeModel, slots_of

NODES = {"fast": 20, "normal": 200, "thorough": 20_000}   # of the search tree, each layer
ENOUGH = 1e-4               # relative gap of a layer's makespan at which to stop, and where the
EXACT, SMALL = 1e-6, 512    # program is small (experts · devices), at which to stop instead


def moetuner(model: WholeModel, done: LayersDone) -> PlacedModel:
    """Both stages: slots of all layers, and how far each stage is proved.

    Clusters hold between one expert (none where experts are fewer than devices) and as many as a
    device has slots; without spare slots that makes equal sizes. Raises InfeasibleError where
    devices differ: the programs know one kind of device.
    """
    if len(set(model.slots_G.tolist())) > 1 or len(set(model.speed_G.tolist())) > 1:
        raise InfeasibleError(
            f"moetuner places on equal devices; here slots are {model.slots_G.tolist()} and speeds "
            f"{model.speed_G.tolist()}: use auto, greedy or lpt_swap"
        )
    devices = len(model.slots_G)
    size = (min(1, model.experts // devices), int(model.slots_G[0]))
    gap = EXACT if model.experts * devices <= SMALL else ENOUGH
    cluster_LE = np.zeros(model.load_LE.shape, np.int64)
    gaps, truncated = [], False
    for layer, load_E in enumerate(model.load_LE):
        truncated = truncated or model.expired()
        found = cluster_layer(
            load_E, [size] * devices, nodes=0 if truncated else NODES[model.effort],
            gap=gap, seconds=model.seconds_left(),
        )
        cluster_LE[layer] = found.cluster_E
        gaps.append(found.solved.gap)
        done(layer + 1, float(max(gaps)))
    traffic_LCC = cluster_traffic(model.transition_LEE, cluster_LE, devices)
    device_LC, proved = place_clusters(
        traffic_LCC, model.transition_GG, seed=model.seed, deadline=model.deadline
    )
    closed = sum(reached <= gap for reached in gaps)
    notes = (
        f"clusters: {closed} of {len(gaps)} layers proved as light as can be, worst gap "
        f"of the heaviest cluster {max(gaps):.2%}",
        "clusters on devices: exact" if proved else
        f"clusters on devices: local search (exact up to {EXACT_DEVICES} devices)",
    )
    device_LE = np.take_along_axis(device_LC, cluster_LE, axis=1)
    return PlacedModel(slots_of(device_LE, model.slots_G), notes, truncated or model.expired())


@dataclass(frozen=True)
class Clusters:
    """Stage 1 of one layer: the cluster of each expert, and how good the solver says it is."""

    cluster_E: IntArray
    solved: Solved


def cluster_layer(
    load_E: FloatArray,
    sizes: Sequence[tuple[int, int]],
    *,
    nodes: int = 20_000,
    gap: float = 1e-6,
    seconds: float | None = None,
    on_gap: OnGap | None = None,
) -> Clusters:
    """ILP 1, repaired: cluster one layer's experts so that clusters carry equal loads.

    x[e][c] = 1 if expert e is in cluster c.   E experts, C clusters, T_c = sum_e load[e] x[e][c].
    minimise  z
    (1) sum_c x[e][c] = 1                each e      every expert in exactly one cluster
    (2) least_c <= sum_e x[e][c] <= most_c   each c  sizes[c]: equal, or free between bounds
    (3) z >= T_c                         each c
    (4) clusters of equal size bounds are interchangeable: the heaviest expert goes to the first.
    Starts from longest-processing-time with swaps, which is the answer where it is at the bound
    already or `nodes` is 0. Loads are scaled to a mean cluster of 1. seconds: a time limit.
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
    reached, bound = _heaviest(scaled, start, clusters), _heaviest_bound(scaled, sizes)
    if nodes == 0 or reached - bound <= gap * reached:
        within = (reached - bound) / reached if reached > 0 else 0.0
        return Clusters(start, Solved(reached, bound, within, within <= gap))
    problem = pulp.LpProblem("clusters", pulp.LpMinimize)
    x = binary_grid("x", experts, clusters)
    load_c = [pulp.lpSum(scaled[e] * x[e][c] for e in range(experts)) for c in range(clusters)]
    z = continuous("z", 1)
    problem += pulp.lpSum(z)
    for e in range(experts):
        problem += pulp.lpSum(x[e]) == 1, f"placed_{e}"                              # (1)
    for c, (least, most) in enumerate(sizes):
        count = pulp.lpSum(x[e][c] for e in range(experts))
        problem += count >= least, f"least_{c}"                                      # (2)
        problem += count <= most, f"most_{c}"
        problem += z[0] >= load_c[c], f"load_{c}"                                    # (3)
    if len(set(sizes)) == 1:
        heaviest = int(np.argmax(scaled))
        start = _rename_first(start, int(start[heaviest]))
        problem += x[heaviest][0] == 1, "heaviest_first"                             # (4)
    set_start(x, start)
    z[0].setInitialValue(_heaviest(scaled, start, clusters), check=False)
    solved = solve(problem, nodes=nodes, gap=gap, seconds=seconds, on_gap=on_gap)
    chosen = _valid(largest_in_rows(x), sizes)
    better = min((chosen, start), key=lambda c: _heaviest(scaled, c, clusters))
    return Clusters(better, solved)


def _heaviest(load_E: FloatArray, cluster_E: IntArray, clusters: int) -> float:
    return float(np.bincount(cluster_E, load_E, clusters).max())


def _heaviest_bound(load_E: FloatArray, sizes: Sequence[tuple[int, int]]) -> float:
    """No clusters are lighter: the heaviest holds the mean and the heaviest expert with company.

    A cluster of at least `least` experts holds the lightest ones with the heaviest, at best.
    """
    company = max(0, min(least for least, _ in sizes) - 1)
    heaviest = float(load_E.max() + np.sort(load_E)[:company].sum())
    return max(float(load_E.sum()) / len(sizes), heaviest)


def _valid(cluster_E: IntArray, sizes: Sequence[tuple[int, int]]) -> IntArray:
    """The answer, checked by counting; the solver's own word is not enough."""
    for c, (least, most) in enumerate(sizes):
        count = int((cluster_E == c).sum())
        if not least <= count <= most:
            raise InfeasibleError(f"cluster {c} got {count} experts, allowed {least}..{most}")
    return cluster_E


def _lpt_with_swaps(load_E: FloatArray, sizes: Sequence[tuple[int, int]]) -> IntArray:
    """Heaviest first onto the lightest cluster with capacity, then swaps that lower the most."""
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
