"""Methods that place all layers together: MoETuner's programs and ExFlow's affinity."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from loadmaster.errors import InfeasibleError, UsageError
from loadmaster.placement.cluster import Cluster, Device
from loadmaster.placement.cost.evaluate import evaluate
from loadmaster.placement.methods import whole_model
from loadmaster.placement.methods.affinity import affinity
from loadmaster.placement.methods.cluster_assignment import chain_cost, cluster_traffic
from loadmaster.placement.methods.moetuner import moetuner
from loadmaster.placement.methods.whole_model import WholeModel, slots_of, transition_prices
from loadmaster.placement.plan import Plan
from loadmaster.placement.planning.planner import PlanResult, plan
from loadmaster.traces.profile import Profile
from loadmaster.traces.steps import StepSampler
from loadmaster.traces.synth.generate import synth_trace
from loadmaster.traces.trace import RoutingTrace

STEPS = StepSampler(tokens=64, concurrency=8)
PAIR = Cluster.preset("h100", devices_per_node=2, slots_per_device=2)


def quick(trace: RoutingTrace, cluster: Cluster, method: str, **asked: Any) -> PlanResult:
    return plan(trace, cluster, method=method, **({"steps": STEPS} | asked))


def small_trace(layers: int, experts: int, seed: int) -> RoutingTrace:
    return synth_trace(
        layers=layers, experts=experts, top_k=1, tokens=2000, request_tokens=50, seed=seed,
        affinity=1.0, blocks=max(1, experts // 2),
    )


def device_of(made: Plan) -> npt.NDArray[np.int64]:
    """[L, E] the one device of each expert."""
    assert (made.replicas_LE == 1).all()
    return made.replicas_LGE().argmax(axis=1)


def whole(made_on: RoutingTrace, cluster: Cluster, **asked: Any) -> WholeModel:
    """What both methods see of a trace, every token counted once."""
    return WholeModel(
        load_LE=made_on.load_LE().astype(float),
        transition_LEE=Profile.from_trace(made_on).transition_LEE(),
        slots_G=cluster.slots_G, speed_G=cluster.speed_G, transition_GG=transition_prices(cluster),
        **({"seed": 0, "effort": "normal"} | asked),
    )


def ignore(_layers: int, _gap: float) -> None:
    """Progress nobody watches."""


def equal_halves(experts: int) -> list[npt.NDArray[np.int64]]:
    """Every way to put half of the experts on either of two devices."""
    ways = []
    for chosen in itertools.combinations(range(experts), experts // 2):
        device_E = np.ones(experts, np.int64)
        device_E[list(chosen)] = 0
        ways.append(device_E)
    return ways


def price_of(model: WholeModel, device_LE: npt.NDArray[np.int64]) -> float:
    """Hops, one transition at a time."""
    return float(sum(
        model.transition_LEE[layer][e, f] * model.transition_GG[device_LE[layer][e],
                                                         device_LE[layer + 1][f]]
        for layer in range(len(device_LE) - 1)
        for e, f in np.ndindex(model.transition_LEE[layer].shape)
    ))


# ---- MoETuner ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_moetuner_balances_each_layer_as_well_as_any_equal_halves(seed: int) -> None:
    """On its planning steps' loads: four experts, two devices of two slots, all ways tried."""
    trace = small_trace(2, 4, seed)
    placed = moetuner(whole(trace, PAIR), ignore)
    for layer, load_E in enumerate(trace.load_LE().astype(float)):
        heaviest = [np.bincount(way, load_E, 2).max() for way in equal_halves(4)]
        held = [load_E[row].sum() for row in placed.slots_LGC[layer]]
        assert max(held) == min(heaviest)


@pytest.mark.parametrize("seed", range(4))
def test_moetuner_chains_its_clusters_as_cheaply_as_any_order_of_devices(seed: int) -> None:
    trace = small_trace(3, 4, seed)
    model = whole(trace, PAIR)
    placed = moetuner(model, ignore)
    device_LE = np.stack([
        np.array([int(np.flatnonzero((slots == e).any(axis=1))[0]) for e in range(4)])
        for slots in placed.slots_LGC
    ])
    traffic = cluster_traffic(model.transition_LEE, device_LE, 2)
    cheapest = min(
        chain_cost(traffic, np.array(order), model.transition_GG, "max")
        for order in itertools.product([(0, 1), (1, 0)], repeat=3)
    )
    assert chain_cost(traffic, np.tile([0, 1], (3, 1)), model.transition_GG, "max") == cheapest


def test_moetuner_through_plan_says_what_is_proved() -> None:
    result = quick(small_trace(3, 8, 1), PAIR.with_slots(4), "moetuner")
    assert result.plan.provenance.method == "moetuner"
    assert (result.plan.replicas_LE == 1).all() and result.plan.duplicates == 0
    said = " ".join(result.evidence.notes)
    assert "3 of 3 layers proved" in said and "exact" in said
    assert 0 < result.evidence.bound <= result.evidence.objective


def test_spare_slots_let_a_hot_expert_sit_alone() -> None:
    ids = np.repeat([0, 0, 0, 1, 2, 3], 300).reshape(-1, 1, 1)
    ids = np.random.default_rng(0).permutation(ids)
    trace = RoutingTrace.from_arrays(ids, num_experts=4, request=np.arange(1800) // 50)
    result = quick(trace, PAIR.with_slots(3), "moetuner")
    device_E = device_of(result.plan)[0]
    assert (device_E == device_E[0]).sum() == 1


def test_above_six_devices_the_chain_is_searched_and_said_to_be() -> None:
    eight = Cluster.preset("h100", nodes=2, devices_per_node=4, slots_per_device=2)
    trace = synth_trace(layers=2, experts=16, top_k=2, tokens=2000, request_tokens=50, seed=1)
    result = quick(trace, eight, "moetuner", effort="fast")
    assert any("local search" in note for note in result.evidence.notes)


def test_a_fired_time_limit_still_gives_a_whole_plan() -> None:
    trace = synth_trace(layers=4, experts=32, top_k=2, tokens=4000, request_tokens=50, seed=1)
    eight = Cluster.preset("h100", devices_per_node=8, slots_per_device=4)
    for method in ("moetuner", "affinity"):
        result = quick(trace, eight, method, time_limit_s=1e-6)
        assert result.truncated
        assert (result.plan.replicas_LE == 1).all()


@pytest.mark.parametrize(("cluster", "said"), [
    (Cluster.preset("h100", devices_per_node=2, slots_per_device=4, speeds=[1.0, 2.0]),
     r"moetuner places on equal devices.*use auto, greedy or lpt_swap"),
])
def test_devices_that_differ_are_refused_with_another_way(cluster: Cluster, said: str) -> None:
    with pytest.raises(InfeasibleError, match=said):
        quick(small_trace(2, 8, 1), cluster, "moetuner")


# ---- affinity ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_affinity_finds_the_cheapest_hops_of_all_equal_halves(seed: int) -> None:
    trace = small_trace(3, 4, seed)
    model = whole(trace, PAIR, effort="thorough")
    placed = affinity(model, ignore)
    found = np.stack([
        np.array([int(np.flatnonzero((slots == e).any(axis=1))[0]) for e in range(4)])
        for slots in placed.slots_LGC
    ])
    cheapest = min(
        price_of(model, np.stack(ways))
        for ways in itertools.product(equal_halves(4), repeat=3)
    )
    assert price_of(model, found) == pytest.approx(cheapest)


def test_affinity_keeps_more_ways_on_their_device_than_contiguous() -> None:
    trace = synth_trace(
        layers=4, experts=32, top_k=2, tokens=6000, request_tokens=50, seed=2, affinity=0.95
    )
    coherent = Cluster.preset(
        "h100", devices_per_node=4, slots_per_device=8, traffic="coherent"
    )
    crossing = [
        evaluate(quick(trace, coherent, method).plan, trace, coherent, steps=STEPS)
        .remote_device_copies_per_token for method in ("affinity", "contiguous")
    ]
    assert crossing[0] < 0.8 * crossing[1]


def test_affinity_prefers_a_hop_inside_the_node() -> None:
    """Each expert is followed by its own successor: pairs that cannot share a device share a node.
    """
    two_nodes = Cluster.preset("h100", nodes=2, devices_per_node=2, slots_per_device=1)
    transition = np.zeros((1, 4, 4), np.int64)
    transition[0, [0, 0, 1, 1, 2, 2, 3, 3], [2, 3, 2, 3, 0, 1, 0, 1]] = 10
    model = WholeModel(
        load_LE=np.ones((2, 4)), transition_LEE=transition, slots_G=two_nodes.slots_G,
        speed_G=two_nodes.speed_G, transition_GG=transition_prices(two_nodes), seed=0,
        effort="normal",
    )
    placed = affinity(model, ignore)
    node = [{int(e): g // 2 for g, row in enumerate(slots) for e in row}
            for slots in placed.slots_LGC]
    assert all(node[0][e] == node[1][f] for e, f in np.argwhere(transition[0]))


def test_affinity_follows_unequal_slots_and_leaves_the_spare_ones_empty() -> None:
    devices = (Device(node=0, slots=2), Device(node=0, slots=6))
    mixed = Cluster(devices=devices, hardware=PAIR.hardware)
    result = quick(small_trace(2, 6, 1), mixed, "affinity")
    assert ((result.plan.slots >= 0).sum(axis=2) <= [2, 6]).all()
    assert (result.plan.replicas_LE == 1).all()


# ---- both -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["affinity", "moetuner"])
def test_average_loads_do_not_say_what_follows_what(method: str) -> None:
    loads = Profile.from_loads(np.ones((2, 4)))
    with pytest.raises(UsageError, match=f"method {method} needs to know which experts follow"):
        plan(loads, PAIR, method=method)


def test_pairs_that_do_not_fit_in_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_model, "MOST_PAIR_BYTES", 100)
    with pytest.raises(InfeasibleError, match="counts pairs of experts"):
        quick(small_trace(2, 4, 1), PAIR, "affinity")


@pytest.mark.parametrize("method", ["affinity", "moetuner"])
def test_one_layer_is_planned_like_any_other(method: str) -> None:
    assert quick(small_trace(1, 4, 1), PAIR, method).plan.num_layers == 1


@pytest.mark.parametrize("method", ["affinity", "moetuner"])
def test_the_same_question_gets_the_same_bytes(method: str) -> None:
    trace = small_trace(3, 8, 2)
    first, second = (quick(trace, PAIR.with_slots(4), method) for _ in range(2))
    assert first.plan.to_json() == second.plan.to_json()


def test_hops_cost_nothing_on_a_device_one_in_a_node_and_more_between_nodes() -> None:
    cluster = Cluster.preset("h100", nodes=2, devices_per_node=2, slots_per_device=1)
    price = transition_prices(cluster)
    assert (np.diag(price) == 0).all() and price[0, 1] == 1.0
    assert price[0, 2] > 1.0 and (price == price.T).all()


def test_slots_of_devices_come_in_ascending_order() -> None:
    assert slots_of(np.array([[1, 0, 1]]), np.array([2, 2])).tolist() == [[[1, -1], [0, 2]]]
