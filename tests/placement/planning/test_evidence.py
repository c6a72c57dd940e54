"""What a plan's evidence says: slots closed by memory, slots left empty, replicas."""

from __future__ import annotations

import numpy as np
import pytest

from loadmaster.placement.cluster import Cluster, Device
from loadmaster.placement.planning.planner import plan
from loadmaster.traces.model_spec import ModelSpec
from loadmaster.traces.steps import StepSampler
from loadmaster.traces.trace import RoutingTrace

STEPS = StepSampler(tokens=64, concurrency=8)
MODEL = ModelSpec(num_layers=2, num_experts=8, top_k=2, hidden=64, intermediate=64)


def trace() -> RoutingTrace:
    rng = np.random.default_rng(0)
    liking = np.log(1.0 / np.arange(1, 9))
    ids = np.argsort(-(liking + rng.gumbel(size=(4000, 2, 8))), axis=2)[:, :, :2]
    return RoutingTrace.from_arrays(ids, num_experts=8, request=np.arange(4000) // 50)


def place(replicas: int) -> Cluster:
    """Four devices with 5 slots a layer and memory for `replicas` experts over both layers."""
    room = replicas * int(MODEL.bytes_per_expert_E()[0])
    hardware = Cluster.preset("h100", slots_per_device=1).hardware
    device = Device(node=0, slots=5, expert_memory_bytes=room)
    return Cluster(devices=(device,) * 4, hardware=hardware)


def test_slots_that_memory_closes_are_not_called_a_choice() -> None:
    """40 slots in all, memory for 20 experts: 20 are closed, and none of those was left empty."""
    made = plan(trace(), place(5), model=MODEL, steps=STEPS, effort="fast")
    said = " ".join(made.evidence.notes)
    assert "20 of 40 slots are closed: the devices' expert_memory_bytes" in said
    empty = 20 - int((made.plan.slots >= 0).sum())
    assert empty and f"{empty} of 20 slots are left empty: another replica" in said


def test_memory_that_is_wide_enough_closes_nothing() -> None:
    made = plan(trace(), place(10), model=MODEL, objective="balance", steps=STEPS, effort="fast")
    assert not any("closed" in note for note in made.evidence.notes)


def test_copies_are_kept_where_they_cost_bytes() -> None:
    two = Cluster.preset("h100", nodes=2, devices_per_node=2, slots_per_device=3)
    evidence = plan(trace(), two, steps=STEPS, method="greedy").evidence
    assert evidence.copies is not None and 0 < evidence.copies < 2
    assert evidence.copies == pytest.approx(np.mean([x.copies for x in evidence.layers]))
    one = Cluster.preset("h100", devices_per_node=4, slots_per_device=3)
    assert plan(trace(), one, steps=STEPS, method="greedy").evidence.copies is None
