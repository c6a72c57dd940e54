"""Planning for tokens that stay where their experts are: near names, and time of linked layers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from loadmaster.placement.cluster import Cluster
from loadmaster.placement.cost.evaluate import evaluate
from loadmaster.placement.methods.whole_model import WholeModel, transition_prices
from loadmaster.placement.planning.linked_layers import aligned, can_align
from loadmaster.placement.planning.planner import plan
from loadmaster.placement.planning_traffic import MOST_TIMED_STEPS, planning_steps
from loadmaster.traces.model_spec import ModelSpec
from loadmaster.traces.steps import StepSampler
from loadmaster.traces.synth.generate import synth_trace

STEPS = StepSampler(tokens=64, concurrency=8)
CLUSTER = Cluster.preset("h100", devices_per_node=4, slots_per_device=3, traffic="coherent")
TRACE = synth_trace(
    layers=4, experts=8, top_k=1, tokens=4000, request_tokens=50, seed=1, affinity=1.0, blocks=4,
    block_share=1.0,
)
MODEL = ModelSpec(name="tiny", num_layers=4, num_experts=8, top_k=1, hidden=512, intermediate=512)


def model_of(transition: np.ndarray, devices: int) -> WholeModel:
    cluster = Cluster.preset("h100", devices_per_node=devices, slots_per_device=2)
    return WholeModel(
        load_LE=np.ones((len(transition) + 1, transition.shape[1])), transition_LEE=transition,
        slots_G=cluster.slots_G, speed_G=cluster.speed_G,
        transition_GG=transition_prices(cluster), seed=0,
        effort="normal",
    )


def crossings(slots_LGC: np.ndarray, transition: np.ndarray) -> float:
    """Pairs that change device, replicas used alike, counted one by one."""
    total = 0.0
    for layer, pairs in enumerate(transition):
        for e, f in np.argwhere(pairs):
            holders = [
                np.flatnonzero((slots_LGC[layer + step] == expert).any(axis=1))
                for step, expert in ((0, e), (1, f))
            ]
            ways = [a != b for a, b in itertools.product(*holders)]
            total += pairs[e, f] * np.mean(ways)
    return float(total)


@pytest.mark.parametrize("seed", range(4))
def test_no_other_names_of_devices_bring_tokens_nearer(seed: int) -> None:
    """Three layers on three devices, with a replicated expert: all names tried."""
    rng = np.random.default_rng(seed)
    transition = rng.integers(0, 30, (2, 5, 5))
    slots = np.stack([
        rng.permutation([0, 1, 2, 3, 4, -1]).reshape(3, 2) for _ in range(3)
    ]).astype(np.int16)
    slots[slots < 0] = 0
    found, _ = aligned(slots, model_of(transition, 3))
    names = list(itertools.permutations(range(3)))
    least = min(
        crossings(np.stack([slots[layer][list(way)] for layer, way in enumerate(ways)]), transition)
        for ways in itertools.product(names, repeat=3)
    )
    assert crossings(found, transition) == pytest.approx(least)


def test_what_devices_hold_together_stays_together() -> None:
    slots = np.array([[[0, 1], [2, 3]], [[0, 2], [1, 3]]], np.int16)
    found, note = aligned(slots, model_of(np.ones((1, 4, 4), np.int64), 2))
    for layer in range(2):
        assert sorted(map(tuple, found[layer])) == sorted(map(tuple, slots[layer]))
    assert "devices" in note


def test_a_plan_for_coherent_traffic_sends_less_than_one_made_for_another() -> None:
    coherent = plan(TRACE, CLUSTER, steps=STEPS, effort="fast").plan
    other = plan(
        TRACE, CLUSTER.with_traffic("return_home/per_expert"), steps=STEPS, effort="fast"
    ).plan
    sent, without = (
        evaluate(one, TRACE, CLUSTER, steps=STEPS) for one in (coherent, other)
    )
    assert sent.remote_device_copies_per_token < without.remote_device_copies_per_token
    assert sent.imbalance_mean <= without.imbalance_mean + 0.02
    assert coherent.evidence is not None
    assert any("devices renamed" in note for note in coherent.evidence.notes)


@pytest.mark.parametrize("method", ["auto", "greedy", "affinity", "moetuner"])
def test_evidence_holds_the_time_of_the_layers_together(method: str) -> None:
    made = plan(TRACE, CLUSTER, steps=STEPS, model=MODEL, method=method, effort="fast")
    data = planning_steps(TRACE, STEPS, most_steps=MOST_TIMED_STEPS)
    assert data.planning is not None
    judged = evaluate(made.plan, TRACE, CLUSTER, steps=data.planning, model=MODEL)
    assert judged.step_time_us is not None
    assert made.evidence.objective == pytest.approx(judged.step_time_us)
    assert made.evidence.bound <= made.evidence.objective


def test_devices_that_differ_keep_their_names() -> None:
    assert can_align(CLUSTER)
    assert not can_align(CLUSTER.with_traffic("allgather"))
    mixed = Cluster.preset(
        "h100", devices_per_node=2, slots_per_device=3, traffic="coherent", speeds=[1.0, 2.0]
    )
    assert not can_align(mixed)
