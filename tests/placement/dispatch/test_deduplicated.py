"""Balance where a token travels once per rank or node: what crosses anyway carries it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadmaster.placement.cluster import Cluster
from loadmaster.placement.dispatch.deduplicated import ClassTable
from loadmaster.placement.dispatch.quotas import route
from loadmaster.placement.dispatch.replica_table import ReplicaTable
from loadmaster.placement.plan import DispatchSpec


def cluster(payload: str, nodes: int, per_node: int, slots: int) -> Cluster:
    return Cluster.preset(
        "h100", nodes=nodes, devices_per_node=per_node, slots_per_device=slots,
        traffic=f"return_home/{payload}",
    )


@st.composite
def steps(draw: st.DrawFn) -> tuple[Cluster, np.ndarray, np.ndarray, np.ndarray, int]:
    payload = draw(st.sampled_from(["per_node", "per_rank"]))
    nodes, per_node = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    devices = nodes * per_node
    experts = draw(st.integers(2, 10))
    width = -(-experts // devices) + draw(st.integers(0, 2))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    spare = rng.integers(-1, experts, devices * width - experts)
    slots = rng.permutation(np.r_[np.arange(experts), spare]).reshape(devices, width)
    tokens, choices = draw(st.integers(1, 80)), draw(st.integers(1, min(4, experts)))
    ids = np.stack([rng.permutation(experts)[:choices] for _ in range(tokens)])
    ids[rng.random(ids.shape) < 0.05] = -1
    home = rng.integers(0, devices, tokens)
    return cluster(payload, nodes, per_node, width), slots, ids, home, experts


def transfers(place: Cluster, slots: np.ndarray, slot_TK: np.ndarray, home: np.ndarray) -> int:
    """Places other than their own that tokens visit: the transfers the payload sends."""
    width = slots.shape[1]
    place_G = place.node_G if place.traffic.payload == "per_node" else np.arange(len(slots))
    return sum(
        len({place_G[s // width] for s in row if s >= 0} - {place_G[h]})
        for row, h in zip(slot_TK, home, strict=True)
    )


@given(steps())
@settings(max_examples=60, deadline=None)
def test_unlimited_slack_reaches_the_fewest_copies_of_two_places(
    step: tuple[Cluster, np.ndarray, np.ndarray, np.ndarray, int],
) -> None:
    """With two nodes, what a token must visit is all it visits when balance asks for nothing."""
    place, slots, ids, home, experts = step
    if place.traffic.payload != "per_node" or place.num_nodes > 2:
        return
    free = DispatchSpec(parameters={"slack": 1e6})
    chosen = route(ids, home, slots, place, free, experts)
    nodes_of = [set(place.node_G[np.nonzero(slots == e)[0]]) for e in range(experts)]
    least = sum(
        any(place.node_G[h] not in nodes_of[e] for e in row if e >= 0)
        for row, h in zip(ids, home, strict=True)
    )
    assert transfers(place, slots, chosen, home) == least


@pytest.mark.parametrize("seed", range(12))
def test_tiny_steps_against_all_assignments(seed: int) -> None:
    """Six tokens, brute force over every slot choice: as flat, and near the fewest transfers."""
    rng = np.random.default_rng(seed)
    place = cluster("per_node", 2, 1, 4)
    slots = np.array([[0, 1, 2, 3], [0, 1, 4, 5]])
    ids = np.stack([rng.permutation(6)[:2] for _ in range(6)])
    home = rng.integers(0, 2, 6)
    chosen = route(ids, home, slots, place, DispatchSpec(parameters={"slack": 0.0}), 6)
    load = np.bincount(chosen.reshape(-1) // 4, minlength=2).max()
    options = [np.flatnonzero(slots.reshape(-1) == e) for e in ids.reshape(-1)]
    best: dict[int, int] = {}
    for pick in itertools.product(*options):
        slot_TK = np.array(pick).reshape(ids.shape)
        level = int(np.bincount(slot_TK.reshape(-1) // 4, minlength=2).max())
        sent = transfers(place, slots, slot_TK, home)
        best[level] = min(sent, best.get(level, 99))
    assert load == min(best)
    assert transfers(place, slots, chosen, home) <= best[load] + 1


def test_tokens_that_cross_anyway_are_moved_before_the_others() -> None:
    """Node 0 is too full by four. Four of its eight tokens also need expert 3, which is far: they
    take expert 0 along; the other four stay home."""
    place = cluster("per_node", 2, 1, 4)
    slots = np.array([[0, 1, 2, -1], [0, 3, 4, -1]])
    ids = np.array([[0, 3]] * 4 + [[0, 1]] * 4)
    home = np.zeros(8, int)
    chosen = route(ids, home, slots, place, DispatchSpec(parameters={"slack": 0.0}), 5)
    assert (chosen[:4, 0] // 4).tolist() == [1, 1, 1, 1]
    assert (chosen[4:, 0] // 4).tolist() == [0, 0, 0, 0]
    assert transfers(place, slots, chosen, home) == 4
    assert np.bincount(chosen.reshape(-1) // 4).tolist() == [8, 8]


def test_experts_in_many_places_are_classed_by_one() -> None:
    """Seven ranks hold expert 0: no class per set of places, and nothing gets lost."""
    place = cluster("per_rank", 1, 8, 2)
    slots = np.array([[0, e] for e in range(1, 8)] + [[8, 9]])
    table = ClassTable.of(ReplicaTable.of(slots, 10), place)
    assert int(table.class_start_E[1] - table.class_start_E[0]) == 7
    rng = np.random.default_rng(0)
    ids = np.stack([np.r_[0, rng.permutation(np.arange(1, 10))[:2]] for _ in range(70)])
    home = rng.integers(0, 8, 70)
    chosen = route(ids, home, slots, place, DispatchSpec(), 10)
    assert np.array_equal(slots.reshape(-1)[chosen], ids)
