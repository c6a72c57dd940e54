"""What a plan says and what changes between two: figures checked by hand."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadmaster.errors import InputError
from loadmaster.placement.describe import describe_plan, diff_plans
from loadmaster.placement.plan import (
    DispatchSpec,
    Evidence,
    LayerEvidence,
    Plan,
    Provenance,
)
from loadmaster.traces.spec import ModelSpec


def plan_of(slots: list[list[list[int]]], experts: int = 4, **rest: object) -> Plan:
    return Plan(slots=np.array(slots, np.int16), num_experts=experts, **rest)  # type: ignore[arg-type]


OLD = plan_of([[[0, 1, 2], [2, 3, 0]], [[0, 1, -1], [2, 3, -1]]])


def test_a_plan_says_its_shape_and_replicas() -> None:
    told = describe_plan(OLD)
    assert told.summary.startswith("2 layers x 4 experts on 2 devices, 4 to 6 slots per layer, ")
    assert "2 spare replicas" in told.summary and "not judged" in told.summary
    facts = dict(told.facts)
    assert facts["filled slots per device and layer"] == "2 to 3"
    assert facts["dispatch"] == "balanced" and facts["most copies of an expert"] == 2
    assert told.layer_columns == ("layer", "filled slots", "spare replicas", "most copies")
    assert told.layer_rows == [("0", 6, 2, "0 x2, 2 x2"), ("1", 4, 0, None)]


def test_layers_that_say_the_same_share_a_row() -> None:
    plan = plan_of([[[0, 1], [2, 3]]] * 5, layer_indices=(3, 4, 5, 6, 7))
    told = describe_plan(plan)
    assert told.layer_rows == [("3 - 7", 4, 0, None)]
    assert len(told.to_dict()["layers"]) == 5
    assert dict(told.facts)["layers"] == "5 (the model's 3 to 7)"


def test_duplicates_are_counted_and_explained() -> None:
    told = describe_plan(plan_of([[[0, 0, 1], [2, 3, 1]]]))
    assert dict(told.facts)["duplicates on one device"] == 1
    assert told.layer_rows == [("0", 6, 2, "0 x2, 1 x2", 1)]
    assert any("serves nothing" in note for note in told.notes)


def test_evidence_and_origin_are_told() -> None:
    evidence = Evidence(
        objective_name="balance", objective=1.02, bound=1.0, gap=0.02, validation=1.03,
        layers=(LayerEvidence(objective=1.01, bound=1.0), LayerEvidence(objective=1.03, bound=1.0)),
        steps="64 steps of 512 tokens", notes=("short trace",),
    )
    plan = plan_of(
        OLD.slots.tolist(), evidence=evidence,
        provenance=Provenance(method="auto", seed=3, trace_digest="abc"),
        dispatch=DispatchSpec(policy="sglang_static", parameters={"seed": 7}),
    )
    told = describe_plan(plan)
    assert "imbalance 1.0200 on its planning steps, at most 2.00% above" in told.summary
    facts = dict(told.facts)
    assert facts["gap"] == "2.00%" and facts["on held-back steps"] == "1.0300"
    assert facts["made by"] == "auto, seed 3, effort normal" and facts["trace"] == "abc"
    assert facts["dispatch"] == "sglang_static (seed 7)"
    assert [row[-2:] for row in told.layer_rows] == [(1.01, 1.0), (1.03, 1.0)]
    assert "short trace" in told.notes
    document = json.loads(json.dumps(told.to_dict()))
    assert document["evidence"]["gap"] == 0.02 and document["layers"][1]["objective"] == 1.03


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
