"""MoETuner's programs, repaired: both stages against trying everything, on cases small enough."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pulp
import pytest

from loadmaster.errors import InfeasibleError
from loadmaster.foundation.arrays import FloatArray
from loadmaster.placement.methods.cluster_assignment import (
    Worst,
    chain_cost,
    cluster_traffic,
    place_clusters,
)
from loadmaster.placement.methods.milp import (
    Solved,
    SolverError,
    binary_grid,
    continuous,
    largest_in_rows,
    set_start,
    solve,
)
from loadmaster.placement.methods.moetuner import cluster_layer

# Two nodes of two devices: crossing nodes costs four times a hop inside one.
TWO_NODES = np.array([[0, 1, 4, 4], [1, 0, 4, 4], [4, 4, 0, 1], [4, 4, 1, 0]], np.float64)
THREE_UNEQUAL = np.array([[0, 1, 3], [2, 0, 5], [1, 4, 0]], np.float64)


# ---- the solver ---------------------------------------------------------------------------------


def knapsack(values: list[float], weights: list[float], room: float) -> pulp.LpProblem:
    """Leave out as little value as possible; column 1 = packed."""
    problem = pulp.LpProblem("knapsack", pulp.LpMinimize)
    grid = binary_grid("x", len(values), 2)
    problem += pulp.lpSum(v * x[0] for v, x in zip(values, grid, strict=True))
    problem += pulp.lpSum(w * x[1] for w, x in zip(weights, grid, strict=True)) <= room
    for row in grid:
        problem += pulp.lpSum(row) == 1
    set_start(grid, np.zeros(len(values), np.int64))
    problem.grid = grid
    return problem


def test_a_solved_program_says_what_it_reached_and_that_it_is_proved() -> None:
    problem = knapsack([6, 5, 4], [3, 2, 2], 4)
    solved = solve(problem, nodes=1000)
    assert solved.objective == pytest.approx(6)
    assert solved.bound <= solved.objective and solved.gap <= 1e-6 and solved.proved
    assert largest_in_rows(problem.grid).tolist() == [0, 1, 1]


def test_the_same_program_gives_the_same_answer() -> None:
    problems = [knapsack([3, 3, 3, 3], [1, 1, 1, 1], 2) for _ in range(2)]
    for problem in problems:
        solve(problem, nodes=1000)
    np.testing.assert_array_equal(*[largest_in_rows(p.grid) for p in problems])


def test_programs_that_cannot_be_trusted_are_refused() -> None:
    upwards = pulp.LpProblem("upwards", pulp.LpMaximize)
    with pytest.raises(SolverError, match="minimisation"):
        solve(upwards, nodes=10)
    impossible = knapsack([1.0], [1.0], 0.0)
    impossible += impossible.grid[0][1] == 1
    with pytest.raises(SolverError, match="has no answer"):
        solve(impossible, nodes=10)


# ---- stage 1: experts into clusters -------------------------------------------------------------


def lightest_heaviest(load_E: FloatArray, sizes: list[tuple[int, int]]) -> float:
    """By trying every assignment."""
    best = np.inf
    for chosen in itertools.product(range(len(sizes)), repeat=len(load_E)):
        count = np.bincount(chosen, minlength=len(sizes))
        if all(a <= n <= b for n, (a, b) in zip(count, sizes, strict=True)):
            best = min(best, heaviest(load_E, np.array(chosen), len(sizes)))
    return best


def heaviest(load_E: FloatArray, cluster_E: npt.NDArray[np.int64], clusters: int) -> float:
    return float(np.bincount(cluster_E, load_E, clusters).max())


@pytest.mark.parametrize("sizes", [
    [(3, 3), (3, 3)],
    [(2, 2), (2, 2), (2, 2)],
    [(1, 4), (2, 3)],
    [(1, 2), (0, 3), (1, 3)],
])
@pytest.mark.parametrize("seed", [0, 1])
def test_clusters_are_as_even_as_any_assignment(
    sizes: list[tuple[int, int]], seed: int
) -> None:
    load_E = np.random.default_rng(seed).integers(1, 100, 6).astype(np.float64)
    found = cluster_layer(load_E, sizes)
    count = np.bincount(found.cluster_E, minlength=len(sizes))
    assert all(a <= n <= b for n, (a, b) in zip(count, sizes, strict=True))
    reached = heaviest(load_E, found.cluster_E, len(sizes))
    assert reached == pytest.approx(lightest_heaviest(load_E, sizes), rel=1e-6, abs=1e-4)
    assert found.solved.proved


def test_clusters_of_a_layer_that_nobody_used_still_hold_every_expert() -> None:
    found = cluster_layer(np.zeros(6), [(3, 3), (3, 3)])
    assert np.bincount(found.cluster_E).tolist() == [3, 3]


@pytest.mark.parametrize("sizes", [[(1, 2), (1, 2)], [(4, 4), (4, 4)]])
def test_sizes_that_cannot_hold_the_experts_are_refused(sizes: list[tuple[int, int]]) -> None:
    with pytest.raises(InfeasibleError, match="6 experts do not fit 2 clusters"):
        cluster_layer(np.ones(6), sizes)


# ---- stage 2: clusters onto devices -------------------------------------------------------------


def test_traffic_between_clusters_adds_up_the_transitions_of_their_experts() -> None:
    transition = np.arange(16).reshape(1, 4, 4)
    cluster_LE = np.array([[0, 1, 0, 1], [1, 1, 0, 0]])
    expected = np.zeros((2, 2))
    for a, b in itertools.product(range(4), repeat=2):
        expected[cluster_LE[0, a], cluster_LE[1, b]] += transition[0, a, b]
    np.testing.assert_array_equal(cluster_traffic(transition, cluster_LE, 2)[0], expected)


def test_the_cost_of_a_chain_is_the_dearest_pair_or_the_sum() -> None:
    traffic = np.array([[[5.0, 2.0], [3.0, 7.0]]])
    weight = np.array([[0.0, 1.0], [10.0, 0.0]])
    stay = np.array([[0, 1], [0, 1]])
    cross = np.array([[0, 1], [1, 0]])
    assert chain_cost(traffic, stay, weight, "max") == 30
    assert chain_cost(traffic, stay, weight, "sum") == 32
    assert chain_cost(traffic, cross, weight, "max") == 70
    assert chain_cost(traffic, cross, weight, "sum") == 75


def cheapest_chain(traffic_LCC: FloatArray, weight_GG: FloatArray, worst: Worst) -> float:
    """By trying every permutation in every layer."""
    states = list(itertools.permutations(range(len(weight_GG))))
    return min(
        chain_cost(traffic_LCC, np.array(chain), weight_GG, worst)
        for chain in itertools.product(states, repeat=len(traffic_LCC) + 1)
    )


@pytest.mark.parametrize("worst", ["max", "sum"])
@pytest.mark.parametrize("seed", range(4))
def test_the_chain_is_as_cheap_as_any_order_of_devices(worst: Worst, seed: int) -> None:
    traffic = np.random.default_rng(seed).integers(0, 50, (3, 3, 3)).astype(np.float64)
    device_LC, proved = place_clusters(traffic, THREE_UNEQUAL, worst)
    assert proved
    assert np.array_equal(np.sort(device_LC, axis=1), np.tile(np.arange(3), (4, 1)))
    reached = chain_cost(traffic, device_LC, THREE_UNEQUAL, worst)
    assert reached == pytest.approx(cheapest_chain(traffic, THREE_UNEQUAL, worst))


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


@pytest.mark.parametrize("worst", ["max", "sum"])
def test_the_whole_program_certifies_the_chain(worst: Worst) -> None:
    traffic = np.random.default_rng(5).integers(0, 50, (1, 3, 3)).astype(np.float64)
    device_LC, _ = place_clusters(traffic, THREE_UNEQUAL, worst)
    certified = full_program(traffic, THREE_UNEQUAL, worst)
    assert certified.proved
    assert certified.objective == pytest.approx(
        chain_cost(traffic, device_LC, THREE_UNEQUAL, worst), abs=1e-4
    )


def test_clusters_that_talk_are_placed_in_one_node() -> None:
    """0 with 2 and 1 with 3: numbering them as they come would cross nodes every time."""
    traffic = np.zeros((2, 4, 4))
    for a, b in ((0, 2), (2, 0), (1, 3), (3, 1)):
        traffic[:, a, b] = 10.0
    device_LC, _ = place_clusters(traffic, TWO_NODES, "sum")
    assert chain_cost(traffic, device_LC, TWO_NODES, "sum") == 0


@pytest.mark.parametrize("worst", ["max", "sum"])
def test_above_six_devices_the_answer_is_valid_not_worse_than_as_numbered_and_repeatable(
    worst: Worst,
) -> None:
    traffic = np.random.default_rng(7).integers(0, 50, (2, 8, 8)).astype(np.float64)
    node = np.arange(8) // 4
    weight = np.where(node[:, None] == node, 1.0, 5.0) * (1 - np.eye(8))
    device_LC, proved = place_clusters(traffic, weight, worst, seed=3)
    assert not proved
    assert np.array_equal(np.sort(device_LC, axis=1), np.tile(np.arange(8), (3, 1)))
    as_numbered = np.tile(np.arange(8), (3, 1))
    reached = chain_cost(traffic, device_LC, weight, worst)
    assert reached <= chain_cost(traffic, as_numbered, weight, worst)
    again, _ = place_clusters(traffic, weight, worst, seed=3)
    np.testing.assert_array_equal(device_LC, again)


def test_one_layer_costs_nothing_wherever_its_clusters_are() -> None:
    device_LC, proved = place_clusters(np.zeros((0, 3, 3)), THREE_UNEQUAL)
    assert proved and sorted(device_LC[0]) == [0, 1, 2]
