"""What is told of a plan, and of the way from one plan to another."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from loadmaster.placement.describe import describe_plan, diff_plans
from loadmaster.placement.plan import (
    DispatchSpec,
    Evidence,
    LayerEvidence,
    Plan,
    PlanError,
    Provenance,
)
from loadmaster.traces.spec import ModelSpec

OLD = Plan(
    slots=np.array([[[0, 1, 2], [3, 0, -1]], [[0, 1, -1], [2, 3, 1]]]),
    num_experts=4, layer_indices=(3, 4), dispatch=DispatchSpec(policy="even"),
    provenance=Provenance(method="eplb", notes=("made in a test",)),
)
NEW = dataclasses.replace(
    OLD, slots=np.array([[[2, 1, 0], [3, 1, -1]], [[0, 1, 3], [2, 3, 1]]]),
    dispatch=DispatchSpec(policy="balanced"),
)


def test_a_plan_in_words_facts_and_layers() -> None:
    told = describe_plan(OLD)
    assert told.summary == (
        "eplb: 2 layers of 4 experts on 2 devices, 2 spare replicas, dispatch even"
    )
    facts = dict(told.facts)
    assert facts["slots filled on a device"] == "2 to 3"
    assert facts["empty slots"] == 2 and facts["evidence"] == "none"
    assert told.layer_columns == ("layer", "slots", "spare replicas", "most copies")
    assert told.layer_rows == [(3, 5, 1, 2), (4, 5, 1, 2)]
    assert told.notes == ("made in a test",)
    json.dumps(told.to_dict())


def test_evidence_is_told_layer_by_layer() -> None:
    evidence = Evidence(
        objective_name="balance", objective=1.02, bound=1.0, gap=0.02, validation=1.03,
        layers=(LayerEvidence(objective=1.01, bound=1.0), LayerEvidence(objective=1.03, bound=1.0)),
        steps="64 steps", bound_kind="load", notes=("few steps",),
    )
    told = describe_plan(dataclasses.replace(OLD, evidence=evidence))
    assert told.layer_rows[1] == (4, 5, 1, 2, 1.03, 1.0)
    assert dict(told.facts)["gap"] == "2.00%" and dict(told.facts)["on held-back steps"] == 1.03
    assert told.notes == ("made in a test", "few steps")


def test_only_experts_a_device_lacks_are_sent() -> None:
    """Layer 0 reorders device 0 and gives device 1 expert 1 for 0; layer 1 fills an empty slot."""
    model = ModelSpec(num_layers=2, num_experts=4, top_k=2, hidden=1024, intermediate=512)
    change = diff_plans(OLD, NEW, model)
    expert_bytes = 3 * 1024 * 512 * 2
    assert change.moves == 2 and change.moved_bytes == 2 * expert_bytes
    assert change.columns[:3] == ("layer", "experts to send", "experts dropped")
    assert [row[:5] for row in change.rows] == [(3, 1, 1, 1, 1), (4, 1, 0, 1, 1)]
    assert change.summary.startswith("2 experts to send (18.2% of the new plan's slots")
    assert "dispatch: even -> balanced" in change.notes
    assert "1 replicas more" in change.notes
    json.dumps(change.to_dict())


def test_nothing_to_send() -> None:
    assert diff_plans(OLD, OLD).summary == "nothing to send: the same slots"
    turned = dataclasses.replace(OLD, slots=OLD.slots[:, :, ::-1])
    change = diff_plans(OLD, turned)
    assert change.summary == "nothing to send: the same experts on every device"
    assert change.rows == [] and change.moved_bytes is None


def test_plans_of_other_shapes_have_no_difference() -> None:
    with pytest.raises(PlanError, match="differ in shape"):
        diff_plans(OLD, Plan(slots=OLD.slots[:1], num_experts=4))
