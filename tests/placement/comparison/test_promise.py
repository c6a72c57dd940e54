"""What was promised of a plan, set beside what it does on the traffic at hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from loadmaster.placement.cluster import Cluster
from loadmaster.placement.comparison.compare import compare
from loadmaster.placement.plan import Plan
from loadmaster.placement.rebalancing.advise import advise
from loadmaster.traces.steps import StepSampler
from loadmaster.traces.trace import RoutingTrace

PLACE = Cluster.preset("h100", devices_per_node=4, slots_per_device=5)
STEPS = StepSampler(tokens=128, concurrency=16)


def traffic(seed: int, requests: int = 120, favourite: int = 0) -> RoutingTrace:
    """Requests of 40 tokens that mostly like four experts from `favourite` on, of 16."""
    rng = np.random.default_rng(seed)
    liking = np.zeros(16)
    liking[favourite : favourite + 4] = 2.0
    request = np.repeat(np.arange(requests), 40)
    taste = liking + 0.5 * rng.standard_normal((requests, 16))
    ids = np.argsort(-(taste[request] + rng.gumbel(size=(len(request), 16))), axis=1)[:, :2]
    return RoutingTrace.from_arrays(ids[:, None, :], num_experts=16, request=request)


@pytest.fixture(scope="module")
def made() -> Plan:
    found = advise(traffic(0), PLACE, methods=("greedy", "contiguous"), steps=STEPS)
    assert found.chosen == "greedy"
    return found.plan


def notes_on(plan: Plan, trace: RoutingTrace, steps: StepSampler = STEPS) -> list[str]:
    table = compare({"mine": plan}, trace, PLACE, steps=steps)
    return [note for note in table.notes if note.startswith("mine")]


def test_the_chosen_plan_carries_what_its_judges_found(made: Plan, tmp_path: Path) -> None:
    """And its file keeps it; a plan that nobody judged promises nothing."""
    assert made.evidence is not None and made.evidence.promise is not None
    promise = made.evidence.promise
    assert promise.metric == "imbalance_mean" and 1 < promise.value < 1.4
    assert promise.requests == 36 and promise.trace_digest == traffic(0).digest()
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").evidence == made.evidence
    bare = made.evidence.model_copy(update={"promise": None})
    assert "promise" not in dataclasses.replace(made, evidence=bare).to_json()


def test_other_requests_of_the_same_kind_keep_it(made: Plan) -> None:
    for seed in (1, 2, 3):
        assert notes_on(made, traffic(seed)) == []


def test_traffic_unlike_its_own_is_said_with_both_figures(made: Plan) -> None:
    assert made.evidence is not None and made.evidence.promise is not None
    (note,) = notes_on(made, traffic(4, favourite=8))
    assert f"promised {made.evidence.promise.value:.3f}, here " in note
    assert "beyond the noise" in note and "unlike what it was made from" in note


def test_its_own_requests_flatter_it_and_that_is_said(made: Plan) -> None:
    (note,) = notes_on(made, traffic(0))
    assert "made from part of this trace" in note
    planned_on = traffic(0).split(0.7, seed=0)[0]
    (note,) = notes_on(made, planned_on)
    assert "from these very requests" in note


def test_other_steps_are_no_broken_promise(made: Plan) -> None:
    (note,) = notes_on(made, traffic(1), StepSampler(tokens=16, concurrency=4))
    assert "in other steps" in note and "16 in flight" in note
