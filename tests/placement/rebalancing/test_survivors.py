"""Survivors of lost devices: every expert covered, as few weights sent as any way would need."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadmaster.errors import InfeasibleError
from loadmaster.placement.cluster import Cluster
from loadmaster.placement.plan import Plan
from loadmaster.placement.rebalancing.survivors import plan_without, survivors_plan
from loadmaster.traces.model_spec import ModelSpec


def plan_of(*layers: list[list[int]], experts: int) -> Plan:
    return Plan(np.array(layers), num_experts=experts)


def cluster_of(devices: int, slots: int) -> Cluster:
    return Cluster.preset("h100", devices_per_node=devices, slots_per_device=slots)


def fewest_moves(before_GC: npt.NDArray[np.int16], experts: int, limit: int) -> int | None:
    """By trying every set of `limit` experts on every device; None where nothing covers all."""
    held = [set(row[row >= 0].tolist()) for row in before_GC]
    sets = [
        set(chosen) for size in range(limit + 1)
        for chosen in itertools.combinations(range(experts), size)
    ]
    costs = [
        sum(len(after - was) for after, was in zip(ways, held, strict=True))
        for ways in itertools.product(sets, repeat=len(held))
        if set().union(*ways) == set(range(experts))
    ]
    return min(costs, default=None)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_other_way_to_cover_all_experts_sends_fewer(data: st.DataObject) -> None:
    """Three devices of two slots and up to four experts: small enough to try everything."""
    experts = data.draw(st.integers(1, 4))
    spare = data.draw(st.lists(st.integers(-1, experts - 1), min_size=6, max_size=6))
    filled = np.array((list(range(experts)) + spare)[:6])
    slots = data.draw(st.permutations(filled.tolist()))
    plan = plan_of(np.array(slots).reshape(3, 2).tolist(), experts=experts)
    lost = data.draw(st.sets(st.integers(0, 2), max_size=2))
    alive = [g for g in range(3) if g not in lost]
    wanted = fewest_moves(plan.slots[0, alive], experts, 2)
    if wanted is None:
        with pytest.raises(InfeasibleError, match="short"):
            survivors_plan(plan, frozenset(lost), cluster_of(3, 2))
        return
    after = survivors_plan(plan, frozenset(lost), cluster_of(3, 2))
    assert len(plan.moves_to(after)) == wanted
    assert (after.slots[:, sorted(lost)] == -1).all()
    assert ((after.slots >= 0).sum(axis=2) <= 2).all()


def test_orphans_are_spread_over_the_survivors() -> None:
    plan = plan_of([[0, -1, -1], [1, -1, -1], [2, 3, -1], [4, 5, -1]], experts=6)
    after = survivors_plan(plan, frozenset([2, 3]), cluster_of(4, 3))
    assert after.slots[0].tolist() == [[0, 2, 4], [1, 3, 5], [-1, -1, -1], [-1, -1, -1]]


def test_a_replica_makes_room_only_where_no_slot_is_free() -> None:
    free = plan_of([[0, 1], [0, -1], [2, -1]], experts=3)
    assert survivors_plan(free, frozenset([2]), cluster_of(3, 2)).slots[0, :2].tolist() == [
        [0, 1], [0, 2]
    ]
    full = plan_of([[0, 1], [0, 1], [2, 0]], experts=3)
    after = survivors_plan(full, frozenset([2]), cluster_of(3, 2))
    assert len(full.moves_to(after)) == 1


def test_the_last_copy_of_an_expert_is_never_given_up() -> None:
    plan = plan_of([[0, 1, 1], [2, 3, 4], [5, 6, -1]], experts=7)
    after = plan_without(plan, [2], most_slots=4)        # Plan itself checks that all are covered
    assert len(after.slots[0]) == 2
    assert set(after.slots[0].ravel().tolist()) - {-1} == set(range(7))


def test_a_device_takes_slots_beyond_the_plans_where_the_cluster_has_them() -> None:
    plan = plan_of([[0, 1], [2, 3]], experts=4)
    after = survivors_plan(plan, frozenset([1]), cluster_of(2, 4))
    assert after.slots[0].tolist() == [[0, 1, 2, 3], [-1, -1, -1, -1]]


def test_nobody_lost_moves_nothing() -> None:
    plan = plan_of([[0, 1], [1, 2]], [[2, 0], [1, 1]], experts=3)
    after = survivors_plan(plan, frozenset(), cluster_of(2, 2))
    assert after.same_slots(plan)
    assert after.provenance.method == "survivors" and after.evidence is None


def test_a_refusal_says_the_layer_and_how_many_slots_are_missing() -> None:
    plan = plan_of([[0, 1], [0, 1]], [[0, 1], [0, 1]], experts=2)
    assert survivors_plan(plan, frozenset([0]), cluster_of(2, 2)).num_layers == 2
    tight = plan_of([[0, 1], [2, 3]], experts=4)
    with pytest.raises(
        InfeasibleError, match="layer 0: 1 surviving devices have 2 slots for 4 experts: 2 short"
    ):
        survivors_plan(tight, frozenset([0]), cluster_of(2, 2))


def test_no_survivor_at_all_is_refused() -> None:
    plan = plan_of([[0], [1]], experts=2)
    for lose_all in (lambda: survivors_plan(plan, frozenset([0, 1]), cluster_of(2, 1)),
                     lambda: plan_without(plan, [0, 1])):
        with pytest.raises(InfeasibleError, match="all 2 devices are lost"):
            lose_all()


# ---- memory -----------------------------------------------------------------------------------


def model_of(layers: int, *sizes: int) -> ModelSpec:
    return ModelSpec(
        name="m", num_layers=layers, num_experts=len(sizes), top_k=1, expert_bytes=sizes
    )


def with_memory(slots: int, *limits: int | None) -> Cluster:
    plain = cluster_of(len(limits), slots)
    devices = tuple(
        d.model_copy(update={"expert_memory_bytes": n})
        for d, n in zip(plain.devices, limits, strict=True)
    )
    return Cluster(devices=devices, hardware=plain.hardware)


def bytes_of(plan: Plan, model: ModelSpec) -> list[int]:
    return (plan.replicas_LGE().sum(axis=0) @ model.bytes_per_expert_E()).tolist()


def test_an_orphan_goes_where_memory_is_left() -> None:
    """By slots alone device 0 would take it; its memory is full."""
    plan = plan_of([[0, 1, -1], [2, -1, -1], [3, -1, -1]], experts=4)
    model = model_of(1, 10, 10, 10, 10)
    after = survivors_plan(plan, frozenset([2]), with_memory(3, 20, 20, 99), model)
    assert after.slots[0].tolist() == [[0, 1, -1], [2, 3, -1], [-1, -1, -1]]
    unlimited = survivors_plan(plan, frozenset([2]), with_memory(3, None, None, 99), model)
    assert unlimited.same_slots(survivors_plan(plan, frozenset([2]), cluster_of(3, 3)))


def test_replicas_of_other_layers_make_way_for_an_orphan() -> None:
    """Layer 0 loses expert 1; every byte is taken, two of them by layer 1's second replicas."""
    plan = plan_of([[0, -1], [-1, -1], [1, -1]], [[0, 1], [0, 1], [-1, -1]], experts=2)
    model = model_of(2, 10, 10)
    after = survivors_plan(plan, frozenset([2]), with_memory(2, 30, 20, 30), model)
    assert after.slots[0, 1].tolist() == [1, -1] or after.slots[0, 0].tolist() == [0, 1]
    assert len(plan.moves_to(after)) == 1
    assert all(held <= most for held, most in zip(bytes_of(after, model), [30, 20, 0], strict=True))


def test_memory_that_cannot_hold_every_expert_is_refused() -> None:
    plan = plan_of([[0, 1], [2, -1], [3, -1]], experts=4)
    model = model_of(1, 10, 10, 10, 10)
    with pytest.raises(InfeasibleError, match="hold 5 fewer"):
        survivors_plan(plan, frozenset([2]), with_memory(3, 20, 15, 99), model)
    with pytest.raises(InfeasibleError, match="layer 0: no surviving device has a slot and 10"):
        survivors_plan(plan, frozenset([2]), with_memory(3, 25, 15, 99), model)


def test_without_a_model_memory_is_not_counted_and_that_is_said() -> None:
    plan = plan_of([[0, 1], [2, -1], [3, -1]], experts=4)
    after = survivors_plan(plan, frozenset([2]), with_memory(3, 20, 15, 99))
    assert any("expert_memory_bytes not counted" in note for note in after.provenance.notes)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_survivors_keep_to_their_memory_or_refuse(data: st.DataObject) -> None:
    """Two layers; what stands fits, so only orphans can break a limit."""
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=3, max_size=3))
    model = model_of(2, *sizes)
    layers = []
    for _ in range(2):
        spare = data.draw(st.lists(st.integers(-1, 2), min_size=3, max_size=3))
        layers.append(np.array(data.draw(st.permutations([0, 1, 2, *spare]))).reshape(3, 2))
    plan = Plan(np.stack(layers), num_experts=3)
    lost = data.draw(st.integers(0, 2))
    extra = data.draw(st.lists(st.integers(0, 6), min_size=3, max_size=3))
    limits = [max(1, held + more) for held, more in zip(bytes_of(plan, model), extra, strict=True)]
    try:
        after = survivors_plan(plan, frozenset([lost]), with_memory(3, *limits), model)
    except InfeasibleError:
        return
    assert (after.slots[:, lost] == -1).all()
    assert all(held <= most for held, most in zip(bytes_of(after, model), limits, strict=True))
