"""Plans: what cannot be one, what one says, and its file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadmaster.errors import LoadmasterError
from loadmaster.placement.plan import DispatchSpec, Evidence, Plan, PlanError, Provenance

SLOTS = np.array([[[0, 1, 2], [2, 0, -1]], [[1, 1, 0], [2, -1, -1]]])
PLAN = Plan(
    slots=SLOTS, num_experts=3, layer_indices=(3, 5),
    dispatch=DispatchSpec(policy="balanced", parameters={"slack": 0.02}),
    provenance=Provenance(method="auto", seed=4, notes=("a", "b")),
    evidence=Evidence(objective_name="balance", objective=1.1, bound=1.0, gap=0.1),
)


def test_what_a_plan_counts() -> None:
    assert (PLAN.num_layers, PLAN.num_devices, PLAN.slots_per_device) == (2, 2, 3)
    assert PLAN.replicas_LE.tolist() == [[2, 1, 2], [1, 2, 1]]
    assert PLAN.spare_slots == 5 + 4 - 6
    assert PLAN.duplicates == 1            # expert 1 twice on device 0 in layer 1


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (np.zeros((2, 2), int), r"slots must be integers \[L, G, C\]"),
        (np.zeros((1, 1, 1)), "slots must be integers"),
        (np.zeros((1, 0, 1), int), "slots must be integers"),
        (np.array([[[0, 1], [2, 3]]]), "slot 1 names expert 3; experts are 0..2"),
        (np.array([[[0, 1], [2, -2]]]), "names expert -2"),
        (np.array([[[0, 1], [1, 0]]]), "expert 2 of layer 0 has no slot"),
        (np.array([[[0, 1, 2, 70000]]]), "names expert 70000"),
    ],
)
def test_what_breaks_an_invariant_cannot_be_made(slots: np.ndarray, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan(slots=slots, num_experts=3)


def test_plans_cannot_be_changed_behind_their_back() -> None:
    given_slots = SLOTS.copy()
    plan = Plan(slots=given_slots, num_experts=3)
    given_slots[:] = 0
    assert plan.same_slots(Plan(slots=SLOTS, num_experts=3))
    with pytest.raises(ValueError, match="read-only"):
        plan.slots[0, 0, 0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.num_experts = 4  # type: ignore[misc]


def test_moves_are_what_a_device_lacks() -> None:
    target = Plan(slots=np.array([[[2, 1, 0], [2, 1, 0]], [[1, 2, 0], [2, 0, 1]]]), num_experts=3)
    assert PLAN.moves_to(target) == [(0, 1, 1), (1, 0, 2), (1, 1, 0), (1, 1, 1)]
    assert target.moves_to(PLAN) == []
    with pytest.raises(PlanError, match="differ in shape"):
        PLAN.moves_to(Plan(slots=SLOTS[:1], num_experts=3))


def test_the_file_says_all_and_the_same_each_time(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    PLAN.save(path)
    back = Plan.load(path)
    assert back.same_slots(PLAN) and back.to_json() == PLAN.to_json() == path.read_text()
    assert (back.dispatch, back.provenance, back.evidence) == (
        PLAN.dispatch, PLAN.provenance, PLAN.evidence)
    assert back.layer_indices == (3, 5)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]     # no temporary file left


@given(st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_any_plan_survives_its_file(seed: int) -> None:
    rng = np.random.default_rng(seed)
    devices, experts = int(rng.integers(1, 5)), int(rng.integers(1, 9))
    width = -(-experts // devices) + int(rng.integers(0, 3))
    slots = np.stack([
        rng.permutation(np.r_[np.arange(experts), rng.integers(-1, experts, devices * width
                                                               - experts)])
        .reshape(devices, width) for _ in range(2)
    ])
    plan = Plan(slots=slots, num_experts=experts)
    assert Plan.from_json(plan.to_json()).same_slots(plan)


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"
    PLAN.save(path)
    old = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(LoadmasterError, match="cannot be written"):
        Plan(slots=SLOTS[:1], num_experts=3).save(path)
    assert path.read_bytes() == old and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not a Loadmaster plan: `placement.formats.import_plan`"),
        ({"schema_version": 99}, "plan schema 99, this version reads 1: upgrade loadmaster"),
        ({"num_experts": "many"}, "plan.json: num_experts"),
        ({"surprise": 1}, "plan.json: surprise"),
        ({"slots": [[[0, 1], [2]]]}, "rows differ in length"),
        ({"slots": [[[0, 1], [1, 0]]]}, "has no slot"),
        ({"layer_indices": [1]}, "names 1 layers, slots have 2"),
        ({"layer_indices": [1, 1]}, "each once"),
        ({"layer_indices": [-5, 1]}, "from 0"),
        ({"slots": [[[10**30]]]}, "slots: a number that is no expert's"),
        ({"num_experts": 10**12}, "must lie in"),
    ],
)
def test_altered_files_are_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(json.loads(PLAN.to_json()) | change))
    with pytest.raises(PlanError, match=message) as caught:
        Plan.load(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_files_that_are_no_plan(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no such plan file"):
        Plan.load(tmp_path / "none.json")
    path = tmp_path / "plan.json"
    for text in (PLAN.to_json()[:40], "[" * 100_000):
        path.write_text(text)
        with pytest.raises(PlanError, match="not JSON"):
            Plan.load(path)


def test_a_file_that_cannot_be_written_or_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(LoadmasterError, match=r"absent/p.json: cannot be written: No such file"):
        PLAN.save(tmp_path / "absent" / "p.json")
    PLAN.save(tmp_path / "p.json")
    with pytest.raises(PlanError, match="cannot be read: Not a directory"):
        Plan.load(tmp_path / "p.json" / "below")


def test_copies_are_evidence_and_older_files_lack_them(tmp_path: Path) -> None:
    assert PLAN.evidence is not None and PLAN.evidence.copies is None
    document = json.loads(PLAN.to_json())
    assert document["evidence"].pop("copies") is None
    older = Plan.from_json(json.dumps(document))
    assert older.evidence == PLAN.evidence
    evidence = PLAN.evidence.model_copy(update={"copies": 0.5})
    again = Plan.from_json(dataclasses.replace(PLAN, evidence=evidence).to_json())
    assert again.evidence is not None and again.evidence.copies == 0.5
