"""`balanced` against linear programs: as flat as can be, and no token farther than that asks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.optimize import linprog

from loadmaster.placement.cluster import Cluster
from loadmaster.placement.dispatch.balanced import split_flat
from loadmaster.placement.dispatch.quotas import device_tokens, split
from loadmaster.placement.dispatch.replica_table import ReplicaTable
from loadmaster.placement.plan import DispatchSpec


def flattest_level(total_E: np.ndarray, slots_GC: np.ndarray, speed_G: np.ndarray) -> float:
    """Oracle: the fractional min-max of tokens over speed, by HiGHS."""
    pairs = [(e, g) for e in np.flatnonzero(total_E) for g in range(len(slots_GC))
             if (slots_GC[g] == e).any()]
    experts = {e: i for i, e in enumerate(np.flatnonzero(total_E))}
    n = len(pairs)
    placed = sparse.coo_matrix(
        (np.ones(n), ([experts[e] for e, _ in pairs], range(n))), shape=(len(experts), n + 1)
    )
    load = sparse.coo_matrix(
        (np.r_[np.ones(n), -speed_G],
         ([g for _, g in pairs] + list(range(len(speed_G))), [*range(n), *[n] * len(speed_G)])),
        shape=(len(speed_G), n + 1),
    )
    cost = np.r_[np.zeros(n), 1]
    answer = linprog(cost, A_ub=load, b_ub=np.zeros(len(speed_G)), A_eq=placed,
                     b_eq=total_E[list(experts)], method="highs")
    return float(answer.fun)


def fewest_remote(
    counts_NE: np.ndarray, slots_GC: np.ndarray, node_G: np.ndarray, cap_G: np.ndarray
) -> float:
    """Oracle: fewest tokens that leave their node when no device may hold more than its cap."""
    blocks = {b: i for i, b in enumerate(zip(*np.nonzero(counts_NE), strict=True))}
    options = [(b, g) for b in blocks for g in range(len(slots_GC)) if (slots_GC[g] == b[1]).any()]
    n = len(options)
    placed = sparse.coo_matrix((np.ones(n), ([blocks[b] for b, _ in options], range(n))))
    load = sparse.coo_matrix(
        (np.ones(n), ([g for _, g in options], range(n))), shape=(len(cap_G), n)
    )
    cost = np.array([float(node_G[g] != b[0]) for b, g in options])
    answer = linprog(cost, A_ub=load, b_ub=cap_G, A_eq=placed,
                     b_eq=[counts_NE[b] for b in blocks], method="highs")
    return float(answer.fun)


def instance(seed: int) -> tuple[Cluster, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    nodes, per_node = int(rng.integers(1, 4)), int(rng.integers(1, 5))
    devices, experts = nodes * per_node, int(rng.integers(2, 40))
    width = -(-experts // devices) + int(rng.integers(0, 4))
    spare = rng.integers(-1, experts, devices * width - experts)
    slots = rng.permutation(np.r_[np.arange(experts), spare]).reshape(devices, width)
    skew = rng.permutation(1 / np.arange(1, experts + 1)) * rng.random((devices, 1)) * 3
    counts = rng.poisson(rng.choice([1, 20, 500]) * skew)
    counts[0, 0] += 1
    speeds = list(rng.choice([0.5, 1.0, 1.5], devices)) if seed % 2 else None
    place = Cluster.preset("h100", nodes=nodes, devices_per_node=per_node,
                           slots_per_device=width, speeds=speeds)
    return place, slots, counts


@pytest.mark.parametrize("seed", range(40))
def test_flat_as_the_linear_program_and_local_as_its_caps_allow(seed: int) -> None:
    """Highest level within whole tokens of the LP's; remote tokens exactly the LP's optimum."""
    place, slots, counts = instance(seed)
    quotas = split(counts, slots, place, DispatchSpec(parameters={"slack": 0.0}))
    load = quotas.sum(axis=0).reshape(slots.shape).sum(axis=1)
    level = flattest_level(counts.sum(axis=0), slots, place.speed_G)
    assert (load <= np.ceil(level * place.speed_G - 1e-6)).all()
    node_S = np.repeat(place.node_G, slots.shape[1])
    remote = quotas[place.node_G[:, None] != node_S].sum()
    counts_NE = np.stack([counts[place.node_G == n].sum(axis=0) for n in range(place.num_nodes)])
    table = ReplicaTable.of(slots, counts.shape[1])
    cap_G = split_flat(counts.sum(axis=0), table.start_unique_E, table.slot_unique_R,
                       table.slots_per_device, place.speed_G, 0.0)[-1]
    assert (load <= cap_G).all()
    assert remote == pytest.approx(fewest_remote(counts_NE, slots, place.node_G, cap_G))


@given(st.integers(0, 100_000), st.sampled_from([0.0, 0.002, 0.02, 0.2]))
@settings(max_examples=60, deadline=None)
def test_slack_bounds_what_locality_may_cost(seed: int, slack: float) -> None:
    """Never above bound * (1 + slack) in whole tokens; more slack, no more remote tokens."""
    place, slots, counts = instance(seed)
    node_S = np.repeat(place.node_G, slots.shape[1])
    far = place.node_G[:, None] != node_S
    level = flattest_level(counts.sum(axis=0), slots, place.speed_G)
    quotas = split(counts, slots, place, DispatchSpec(parameters={"slack": slack}))
    load = quotas.sum(axis=0).reshape(slots.shape).sum(axis=1)
    limit = np.maximum(
        np.ceil(level * place.speed_G - 1e-6), np.floor(level * (1 + slack) * place.speed_G + 1e-6)
    )
    assert (load <= limit).all()
    everywhere = split(counts, slots, place, DispatchSpec(parameters={"slack": 1e6}))
    assert everywhere[far].sum() <= quotas[far].sum()


def test_production_size_is_within_one_per_cent_of_the_program() -> None:
    """256 experts, 320 slots, 32 devices in 4 nodes, 8,192 tokens of top-8, default slack."""
    rng = np.random.default_rng(0)
    share = rng.permutation(1 / np.arange(1, 257) ** 0.8)
    replicas = np.argsort(-share, kind="stable")[:64]
    slots = rng.permutation(np.r_[np.arange(256), replicas]).reshape(32, 10)
    counts = rng.multinomial(2048, share / share.sum(), size=32)
    place = Cluster.preset("h100", nodes=4, devices_per_node=8, slots_per_device=10)
    load = split(counts, slots, place, DispatchSpec()).sum(axis=0).reshape(32, 10).sum(axis=1)
    assert load.max() <= 1.01 * flattest_level(counts.sum(axis=0), slots, place.speed_G)


def test_own_slots_are_filled_by_own_tokens_first() -> None:
    """Two ranks hold expert 0; each keeps its own tokens although any split would be as flat."""
    place = Cluster.preset("h100", devices_per_node=2, slots_per_device=2)
    slots, counts = np.array([[0, 1], [0, 2]]), np.array([[6, 0, 0], [6, 0, 0]])
    quotas = split(counts, slots, place, DispatchSpec())
    assert quotas.tolist() == [[6, 0, 0, 0], [0, 0, 6, 0]]


def test_fast_devices_take_more() -> None:
    """Speed 3 beside speed 1: expert 0's 80 tokens split 60 to 20, equal time."""
    place = Cluster.preset("h100", devices_per_node=2, slots_per_device=1, speeds=[3.0, 1.0])
    tokens, _ = device_tokens(
        np.array([[[80], [0]]]), np.array([[0], [0]]), place, DispatchSpec()
    )
    assert tokens.tolist() == [[60, 20]]


def test_a_tight_subset_is_found() -> None:
    """Experts 0 and 1 live on devices 0 and 1 alone: those carry half each, device 2 the rest."""
    place = Cluster.preset("h100", devices_per_node=3, slots_per_device=2)
    slots = np.array([[0, 1], [0, 1], [2, -1]])
    tokens, active = device_tokens(
        np.array([[[50, 31, 9], [0, 0, 0], [0, 0, 0]]]), slots, place, DispatchSpec()
    )
    assert sorted(tokens[0][:2]) == [40, 41] and tokens[0][2] == 9
    assert active[0].sum() <= 5
