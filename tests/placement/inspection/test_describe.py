"""What a plan says: figures checked by hand."""

import json

import numpy as np

from loadmaster.placement.inspection.describe import describe_plan
from loadmaster.placement.plan import DispatchSpec, Evidence, LayerEvidence, Plan, Provenance


def plan_of(slots: list[list[list[int]]], experts: int = 4, **rest: object) -> Plan:
    return Plan(slots=np.array(slots, np.int16), num_experts=experts, **rest)  # type: ignore[arg-type]


OLD = plan_of([[[0, 1, 2], [2, 3, 0]], [[0, 1, -1], [2, 3, -1]]])


def test_a_plan_says_its_shape_and_replicas() -> None:
    told = describe_plan(OLD)
    assert told.summary.startswith("2 layers x 4 experts on 2 devices, 4 to 6 slots per layer, ")
    assert "2 spare replicas" in told.summary and "not judged" in told.summary
    facts = dict(told.facts)
    assert facts["filled slots per device and layer"] == "2 to 3"
    assert facts["dispatch"] == "balanced" and facts["most replicas of an expert"] == 2
    assert told.layer_columns == ("layer", "filled slots", "spare replicas", "most replicas")
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
