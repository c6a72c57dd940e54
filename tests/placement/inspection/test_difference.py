"""What changes between two plans: figures checked by hand, sums against moves one by one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadmaster.errors import InputError
from loadmaster.placement.inspection.difference import diff_plans
from loadmaster.placement.plan import DispatchSpec, Plan
from loadmaster.traces.model_spec import ModelSpec


def plan_of(slots: list[list[list[int]]], experts: int = 4, **rest: object) -> Plan:
    return Plan(slots=np.array(slots, np.int16), num_experts=experts, **rest)  # type: ignore[arg-type]


OLD = plan_of([[[0, 1, 2], [2, 3, 0]], [[0, 1, -1], [2, 3, -1]]])


def test_moves_are_experts_a_device_lacks() -> None:
    new = plan_of([[[0, 1, 3], [2, 3, 1]], [[0, 1, 2], [2, 3, -1]]])
    told = diff_plans(OLD, new)
    assert told.to_dict()["moves"] == [[0, 0, 3], [0, 1, 1], [1, 0, 2]]
    assert told.summary == "3 experts move (27.3% of slots), in 2 of 2 layers, to 2 of 2 devices"
    assert told.rows == [("0", 2, "33.3%", 2, 1, 2, 2), ("1", 1, "20.0%", 1, 1, 1, 0)]
    assert told.device_rows == [("0", 2, "33.3%"), ("1", 1, "20.0%")]


def test_sizes_come_from_the_model() -> None:
    new = plan_of([[[0, 1, 3], [2, 3, 0]], [[0, 1, -1], [2, 3, -1]]])
    sizes = (1_000_000, 2_000_000, 4_000_000, 8_000_000)
    model = ModelSpec(num_layers=2, num_experts=4, top_k=1, expert_bytes=sizes)
    told = diff_plans(OLD, new, model)
    assert told.columns[-1] == "MB" and told.rows[0][-1] == 8.0
    assert told.to_dict()["bytes"] == 8_000_000 and "0.01 GB" in told.summary
    assert told.summary.startswith("1 expert moves ")
    unsized = ModelSpec(num_layers=2, num_experts=4, top_k=1)
    assert diff_plans(OLD, new, unsized).to_dict()["bytes"] is None
    other = ModelSpec(num_layers=3, num_experts=4, top_k=1, expert_bytes=sizes)
    with pytest.raises(InputError, match="3 MoE layers"):
        diff_plans(OLD, new, other)


def test_equal_plans_move_nothing() -> None:
    told = diff_plans(OLD, OLD)
    assert told.summary == "nothing moves: every device holds what it needs"
    assert told.rows == [] and told.device_rows == [] and told.notes == ()
    assert told.to_dict()["same_slots"]


def test_other_slots_of_the_same_device_move_nothing() -> None:
    new = plan_of(OLD.slots[:, :, ::-1].tolist(), dispatch=DispatchSpec(policy="even"))
    told = diff_plans(OLD, new)
    assert told.summary.startswith("nothing moves") and told.rows == []
    assert told.notes == (
        "dispatch changes: balanced -> even", "slots change within devices only, and that sends "
        "nothing",
    )


def test_dropped_replicas_are_told_though_nothing_moves() -> None:
    new = plan_of([[[0, 1, -1], [2, 3, -1]]] * 2)
    told = diff_plans(OLD, new)
    assert told.summary.endswith("2 replicas are dropped")
    assert told.rows == [("0", 0, "0.0%", 0, 0, 0, 2)]


def test_plans_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(InputError, match="plans differ in shape"):
        diff_plans(OLD, plan_of([[[0, 1], [2, 3]]]))
    here, there = (
        plan_of(OLD.slots.tolist(), layer_indices=layers) for layers in ((1, 2), (3, 4))
    )
    with pytest.raises(InputError, match="different layers of their model"):
        diff_plans(here, there)
    assert diff_plans(OLD, there).rows == []


@given(seed=st.integers(0, 10_000), layers=st.integers(1, 4), devices=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_sums_agree_with_the_moves_one_by_one(seed: int, layers: int, devices: int) -> None:
    rng = np.random.default_rng(seed)

    def draw() -> Plan:
        base = np.tile(np.arange(6), (layers, devices, 1))      # all experts everywhere, thinned
        thin = np.where(rng.random(base.shape) < 0.5, -1, base)
        thin[:, 0] = base[:, 0]
        return Plan(slots=thin.astype(np.int16), num_experts=6)

    old, new = draw(), draw()
    told = diff_plans(old, new)
    moves = {
        (layer, device, expert)
        for layer in range(layers) for device in range(devices) for expert in range(6)
        if expert in new.slots[layer, device] and expert not in old.slots[layer, device]
    }
    document = told.to_dict()
    assert {tuple(move) for move in document["moves"]} == moves
    assert sum(document["moves_per_layer"]) == sum(document["moves_per_device"]) == len(moves)
    assert document["replicas_gained"] - document["replicas_lost"] == (
        new.spare_slots - old.spare_slots
    )
