"""Memory as the limit: replicas shared between layers, every device within its own bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadmaster.errors import InfeasibleError
from loadmaster.placement.cluster import Cluster
from loadmaster.placement.methods.replicate import lightest_heaviest_replica, replicas_by_load
from loadmaster.placement.plan import Plan
from loadmaster.placement.planning.layer_capacity import capacity_per_layer
from loadmaster.placement.planning.planner import plan
from loadmaster.placement.rebalancing.rebalance import rebalance
from loadmaster.traces.model_spec import ModelSpec
from loadmaster.traces.profile import Profile
from loadmaster.traces.steps import StepSampler
from loadmaster.traces.synth.generate import synth_trace

STEPS = StepSampler(tokens=64, concurrency=8)
MODEL = ModelSpec(
    name="tiny", num_layers=3, num_experts=8, top_k=2, hidden=16, intermediate=16
)
SIZE = int(MODEL.bytes_per_expert_E()[0])


def cluster_of(replicas: list[int | None], slots: int = 4) -> Cluster:
    """Devices whose memory holds so many experts over all layers; None = as many as slots."""
    plain = Cluster.preset("h100", devices_per_node=len(replicas), slots_per_device=slots)
    devices = tuple(
        device.model_copy(update={"expert_memory_bytes": None if n is None else n * SIZE + 1})
        for device, n in zip(plain.devices, replicas, strict=True)
    )
    return plain.model_copy(update={"devices": devices})


def held_bytes(made: Plan, model: ModelSpec = MODEL) -> list[int]:
    return (made.replicas_LGE().sum(axis=0) @ model.bytes_per_expert_E()).tolist()


def test_without_memory_limits_slots_are_all_there_is() -> None:
    capacities = capacity_per_layer(np.ones((3, 8)), cluster_of([None] * 4), MODEL)
    assert capacities.slots_LG.tolist() == [[4] * 4] * 3 and capacities.capacity_LG is None


def test_layers_that_no_trace_tells_of_keep_their_part_of_the_memory() -> None:
    """Two of three layers, memory for nine experts a device in all: two thirds of it are theirs."""
    some = capacity_per_layer(np.ones((2, 8)), cluster_of([9] * 4), MODEL)
    assert some.slots_LG.sum(axis=0).tolist() == [6] * 4
    with pytest.raises(InfeasibleError, match="short"):
        capacity_per_layer(np.ones((2, 8)), cluster_of([5] * 4), MODEL)


def test_a_limit_that_does_not_bind_changes_nothing() -> None:
    capacities = capacity_per_layer(np.ones((3, 8)), cluster_of([12] * 4), MODEL)
    assert capacities.slots_LG.tolist() == [[4] * 4] * 3 and not capacities.notes


def test_layers_get_slots_by_what_another_copy_is_worth_there() -> None:
    """Layer 1 is skewed, the others are flat: all spare memory goes to it."""
    load = np.ones((3, 8)) * 10
    load[1] = [70, 2, 2, 2, 1, 1, 1, 1]
    capacities = capacity_per_layer(load, cluster_of([7] * 4), MODEL)
    slots_L = capacities.slots_LG.sum(axis=1)
    assert slots_L[1] > 8 and slots_L[1] > slots_L[0] and slots_L.sum() <= 28
    assert (capacities.slots_LG.sum(axis=0) <= 7).all()
    assert "memory holds 4 replicas beyond one" in capacities.notes[0]


@settings(max_examples=50, deadline=None)
@given(
    replicas=st.lists(st.integers(0, 12), min_size=2, max_size=4),
    load=st.lists(st.integers(0, 99), min_size=24, max_size=24),
)
def test_every_layer_holds_every_expert_and_every_device_its_memory(
    replicas: list[int], load: list[int]
) -> None:
    cluster = cluster_of([max(1, n) for n in replicas], slots=5)
    try:
        capacities = capacity_per_layer(np.array(load, float).reshape(3, 8), cluster, MODEL)
    except InfeasibleError:
        assert sum(max(1, n) for n in replicas) < 24      # 12 replicas fit into 3 layers of 5 slots
        return
    assert (capacities.slots_LG.sum(axis=1) >= 8).all()
    assert (capacities.slots_LG.sum(axis=0) <= [max(1, n) for n in replicas]).all()
    assert (capacities.slots_LG <= 5).all()


def test_layers_ask_for_no_more_than_can_be_dealt_to_them_together() -> None:
    """Device 3 holds one replica in all: two skewed layers cannot both have 4 from every device."""
    load = np.ones((3, 8)) * 10
    load[:2] = [70, 60, 50, 1, 1, 1, 1, 1]
    for replicas in ([12, 12, 12, 1], [30, 30, 8], [30, 30, 1], [30, 9, 9, 1]):
        slots_LG = capacity_per_layer(load, cluster_of(list(replicas)), MODEL).slots_LG
        assert (slots_LG.sum(axis=1) >= 8).all() and (slots_LG <= 4).all()
        assert (slots_LG.sum(axis=0) <= replicas).all()


def test_every_device_serves_all_layers_alike() -> None:
    slots_LG = capacity_per_layer(np.ones((3, 8)), cluster_of([7, 7, 7, 3]), MODEL).slots_LG
    assert (slots_LG.max(axis=0) - slots_LG.min(axis=0) <= 1).all()
    assert slots_LG[:, 3].tolist() == [1, 1, 1]


def test_a_device_without_a_limit_counts_by_its_slots() -> None:
    slots_LG = capacity_per_layer(np.ones((3, 8)), cluster_of([None, 4, 4, 4]), MODEL).slots_LG
    assert slots_LG.sum(axis=1).tolist() == [8, 8, 8] and (slots_LG <= 4).all()


def test_a_standing_plan_keeps_its_slots_and_what_memory_is_left_is_dealt() -> None:
    """Device 3 came back empty: its memory is to be used, and not beyond what it holds."""
    held = np.full((3, 4, 4), -1)
    held[:, :3] = np.arange(9).reshape(3, 3)[[0, 1, 2], :][None][..., [0, 1, 2, 2]] % 8
    held[:, :3, 3] = -1
    current = Plan(held, num_experts=8)
    cluster = cluster_of([9, 9, 9, 2])
    slots_LG = capacity_per_layer(np.ones((3, 8)), cluster, MODEL, current).slots_LG
    assert slots_LG.tolist() == [[3, 3, 3, 1], [3, 3, 3, 1], [3, 3, 3, 0]]
    with pytest.raises(InfeasibleError, match=r"holds 9 experts on device 1 .* allow 8"):
        capacity_per_layer(np.ones((3, 8)), cluster_of([9, 8, 9, 2]), MODEL, current)


def test_a_standing_plan_keeps_its_bytes_and_what_is_left_is_shared() -> None:
    """Layers of one plan may hold different bytes: together they keep to the memory."""
    model = MODEL.model_copy(
        update={"num_layers": 2, "num_experts": 3, "expert_bytes": (300, 100, 100)}
    )
    plain = Cluster.preset("h100", devices_per_node=2, slots_per_device=3)
    devices = tuple(d.model_copy(update={"expert_memory_bytes": 600}) for d in plain.devices)
    current = Plan(np.array([[[0, -1], [1, 2]], [[1, -1], [0, 2]]]), num_experts=3)
    capacities = capacity_per_layer(
        np.ones((2, 3)), plain.model_copy(update={"devices": devices}), model, current
    )
    assert capacities.capacity_LG is not None
    assert capacities.capacity_LG.tolist() == [[400, 200], [200, 400]]


@settings(max_examples=50, deadline=None)
@given(load=st.lists(st.integers(0, 99), min_size=1, max_size=6), most=st.integers(1, 4))
def test_the_heaviest_copy_by_spare_slots_is_what_handing_them_out_gives(
    load: list[int], most: int
) -> None:
    load_E = np.array(load, float)
    widest = len(load) * (most - 1)
    found = lightest_heaviest_replica(load_E, widest, most)
    for spare in range(widest + 1):
        replicas_E = replicas_by_load(load_E, len(load) + spare, most)
        assert found[spare] == pytest.approx((load_E / replicas_E).max())


@pytest.mark.parametrize("method", ["auto", "greedy", "lpt_swap", "contiguous"])
def test_plans_keep_to_each_devices_own_memory(method: str) -> None:
    trace = synth_trace(layers=3, experts=8, top_k=2, tokens=3000, request_tokens=50, seed=3)
    cluster = cluster_of([7, 7, 7, 7])
    made = plan(
        trace, cluster, method=method, steps=STEPS, model=MODEL, objective="balance",
        effort="fast",
    )
    assert all(held <= 7 * SIZE for held in held_bytes(made.plan))
    assert any("memory holds" in note for note in made.evidence.notes)
    moved = rebalance(
        made.plan, trace, cluster, steps=STEPS, model=MODEL, objective="balance", max_moves=4
    )
    assert all(held <= 7 * SIZE for held in held_bytes(moved.plan))


def test_experts_of_different_sizes_are_counted_in_bytes() -> None:
    trace = synth_trace(layers=3, experts=8, top_k=2, tokens=3000, request_tokens=50, seed=3)
    model = MODEL.model_copy(update={"expert_bytes": (900, 100, 100, 100, 100, 100, 100, 100)})
    plain = Cluster.preset("h100", devices_per_node=2, slots_per_device=8)
    devices = tuple(d.model_copy(update={"expert_memory_bytes": 3300}) for d in plain.devices)
    cluster = plain.model_copy(update={"devices": devices})
    made = plan(trace, cluster, steps=STEPS, model=model, objective="balance", effort="fast")
    assert all(held <= 3300 for held in held_bytes(made.plan, model))
    with pytest.raises(InfeasibleError, match=r"contiguous puts .* bytes of experts on device 0"):
        plan(trace, cluster, method="contiguous", steps=STEPS, model=model, objective="balance")


def test_too_little_memory_is_refused_with_the_bytes_that_are_missing() -> None:
    trace = synth_trace(layers=3, experts=8, top_k=2, tokens=3000, request_tokens=50, seed=3)
    with pytest.raises(InfeasibleError, match=r"3 layers of 8 experts take .* short"):
        plan(trace, cluster_of([5] * 4), steps=STEPS, model=MODEL)


def test_memory_that_cannot_be_counted_is_said() -> None:
    loads = Profile.from_loads(np.arange(1.0, 25).reshape(3, 8))
    made = plan(loads, cluster_of([7] * 4), method="greedy", dispatch="even")
    assert any("expert_memory_bytes not counted" in note for note in made.evidence.notes)
