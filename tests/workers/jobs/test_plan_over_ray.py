"""A plan made by Ray tasks is the plan made at home, byte for byte."""

from __future__ import annotations

import pytest

from loadmaster.placement.cluster import Cluster
from loadmaster.placement.planning.planner import plan
from loadmaster.placement.rebalancing.rebalance import rebalance
from loadmaster.traces.steps import StepSampler
from loadmaster.traces.synth.generate import synth_trace
from loadmaster.workers.jobs.ray_executor import RayExecutor

STEPS = StepSampler(tokens=64, concurrency=8)
CLUSTER = Cluster.preset("h100", nodes=2, devices_per_node=2, slots_per_device=5)
OLD, NEW = (
    synth_trace(layers=3, experts=16, top_k=2, tokens=2500, request_tokens=40, seed=seed)
    for seed in (1, 2)
)


@pytest.mark.parametrize("method", [
    "auto",
    pytest.param("greedy", marks=pytest.mark.slow),
    pytest.param("affinity", marks=pytest.mark.slow),
])
def test_a_plan_over_ray_is_the_same_bytes(ray_cluster: None, method: str) -> None:
    asked = {"method": method, "steps": STEPS, "effort": "fast"}
    at_home = plan(OLD, CLUSTER, **asked)  # type: ignore[arg-type]
    over_ray = plan(
        OLD, CLUSTER, executor=RayExecutor(cpus_per_task=0.1), **asked,  # type: ignore[arg-type]
    )
    assert over_ray.plan.to_json() == at_home.plan.to_json()


def test_so_is_a_rebalanced_one_and_its_moves(ray_cluster: None) -> None:
    current_plan = plan(OLD, CLUSTER, steps=STEPS, effort="fast").plan
    answers = [
        rebalance(
            current_plan, NEW, CLUSTER, max_moves=6, steps=STEPS, effort="fast", executor=executor
        )
        for executor in (None, RayExecutor(cpus_per_task=0.1))
    ]
    assert answers[0].moves and answers[0].moves == answers[1].moves
    assert answers[0].plan.to_json() == answers[1].plan.to_json()
