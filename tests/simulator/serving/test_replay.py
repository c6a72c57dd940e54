"""Replay: the same recorded steps under several plans, side by side and paired."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from loadmaster.errors import InputError, UsageError
from loadmaster.placement.cost.step_cost import step_cost
from loadmaster.placement.cost.step_loads import step_loads
from loadmaster.placement.plan import Plan
from loadmaster.simulator.serving.replay import replay
from loadmaster.traces.steps import StepSampler

from ..conftest import EXPERTS, contiguous_plan

STEPS = StepSampler(tokens=200, concurrency=16)


def spread() -> Plan:
    """Hot and cold experts paired on each device."""
    return Plan(np.tile(np.array([[0, 7], [1, 6], [2, 5], [3, 4]], np.int16), (3, 1, 1)), EXPERTS)


@pytest.fixture(scope="module")
def fat(model):
    return model.model_copy(update={"hidden": 8192, "intermediate": 8192})


def test_step_times_are_those_of_step_cost(trace, cluster, fat) -> None:
    """Same numbers as floor 2, which the planner optimises."""
    plan = contiguous_plan()
    played = replay({"p": plan}, trace, cluster, model=fat, steps=STEPS).plans["p"]
    steps = STEPS.sample(trace)
    loads = step_loads(trace, steps, plan, cluster, expert_bytes_E=fat.bytes_per_expert_E())
    cost = step_cost(loads, fat, cluster, dispatch=plan.dispatch)
    np.testing.assert_allclose(played.step_us, cost.step_us_W)
    assert played.total_us == pytest.approx(cost.step_us_W.sum())
    assert played.blame.critical_path_us == pytest.approx(
        cost.compute_us_WLG.max(axis=2).sum(axis=1).mean(), rel=1e-5
    )


def test_a_request_lasts_from_its_first_step_to_its_last(trace, cluster, fat) -> None:
    result = replay({"p": contiguous_plan()}, trace, cluster, model=fat, steps=STEPS)
    cut, played = STEPS.sample(trace), result.plans["p"]
    step_of = cut.step_of_token()
    for i, request in enumerate(result.request.tolist()[:10]):
        mine = step_of[trace.request[cut.token] == request]
        expected = played.step_us[mine.min() : mine.max() + 1].sum()
        assert played.request_latency_us[i] == pytest.approx(expected)


def test_the_better_plan_is_told_from_the_same_plan(trace, cluster, fat) -> None:
    """Front-domain tokens: contiguous piles up, spread does not; a plan equals itself."""
    front = trace.slice_domains(["front"])
    plans = {"piled": contiguous_plan(), "spread": spread(), "again": spread()}
    result = replay(plans, front, cluster, model=fat, steps=STEPS, current="piled")
    table = result.comparison
    assert table.ranking[-1] == "piled" and not table.row("piled").indistinguishable
    assert table.row("again").indistinguishable and table.row("spread").indistinguishable
    assert table.row("spread").metric == pytest.approx(result.plans["spread"].step_time.mean)
    assert result.to_dict()["comparison"]["verdict"] == table.verdict


def test_a_step_waits_for_its_requests(trace, cluster, fat) -> None:
    recorded = dataclasses.replace(trace, step=np.arange(trace.num_tokens) // 200)
    late = {int(r): 0.0 for r in np.unique(trace.request)}
    on_time = replay({"p": contiguous_plan()}, recorded, cluster, model=fat, arrival_us=late)
    late[10] = 1e6
    delayed = replay({"p": contiguous_plan()}, recorded, cluster, model=fat, arrival_us=late)
    step = int(recorded.step[recorded.request == 10].min())
    played = delayed.plans["p"]
    assert played.step_end_us[step] - played.step_us[step] == pytest.approx(1e6)
    np.testing.assert_array_equal(played.step_us, on_time.plans["p"].step_us)
    waited = on_time.plans["p"]
    ends = [recorded.step[recorded.request == r].max() for r in on_time.request]
    np.testing.assert_allclose(
        waited.request_latency_us, waited.step_end_us[ends], err_msg="all were there from 0 on"
    )
    del late[3]
    with pytest.raises(InputError, match="no time for request 3"):
        replay({"p": contiguous_plan()}, recorded, cluster, model=fat, arrival_us=late)


def test_recorded_steps_are_the_default(trace, cluster, fat) -> None:
    recorded = dataclasses.replace(trace, step=np.arange(trace.num_tokens) // 500)
    assert replay({"p": spread()}, recorded, cluster, model=fat).steps == 8
    with pytest.raises(UsageError, match="at least one plan"):
        replay({}, recorded, cluster, model=fat)
