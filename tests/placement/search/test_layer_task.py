"""One layer as a job: its bound holds for every plan, and its scores say what decides."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from loadmaster.placement.cluster import Cluster, Device
from loadmaster.placement.plan import DispatchSpec
from loadmaster.placement.planning_traffic import planning_steps
from loadmaster.placement.search.layer_task import LayerTask, layer_bound, score
from loadmaster.traces.model_spec import ModelSpec
from loadmaster.traces.profile import Profile
from loadmaster.traces.steps import StepSampler

HARDWARE = Cluster.preset("h100", slots_per_device=1).hardware
MODEL = ModelSpec(
    name="tiny", num_layers=2, num_experts=2, top_k=1, hidden=64, intermediate=64,
    expert_bytes=(100, 100),
)


def task(load_E: list[float], cluster: Cluster, slots_G: list[int]) -> LayerTask:
    """The first of two layers with these average loads."""
    data = planning_steps(Profile.from_loads(np.array([load_E, load_E])), StepSampler())
    return LayerTask(
        layer=0, layers=2, traffic=data.layer(0), slots_G=np.array(slots_G), capacity_G=None,
        cluster=cluster, dispatch=DispatchSpec(), objective="balance", model=MODEL, slack=0.0,
        seed=0, effort="fast",
    )


def test_the_bound_holds_for_every_way_to_share_memory_between_layers() -> None:
    """This share-out gave the layer no spare copy; another would, and reach perfect balance."""
    cluster = Cluster(hardware=HARDWARE, devices=tuple(
        Device(node=0, slots=2, expert_memory_bytes=300) for _ in range(2)
    ))
    poor = task([90.0, 10.0], cluster, [1, 1])
    richer = np.array([[0, 1], [0, -1]], np.int16)
    assert score(poor, np.array([[0], [1]], np.int16), None).peak == pytest.approx(1.8, abs=1e-5)
    assert layer_bound(poor) <= score(replace(poor, slots_G=np.array([2, 1])), richer, None).peak


def test_the_peak_decides_and_imbalance_is_told_beside_it() -> None:
    uneven = Cluster.preset("h100", devices_per_node=2, slots_per_device=1, speeds=[1.0, 4.0])
    one = task([100.0, 0.0], uneven, [1, 1])
    on_fast = score(one, np.array([[1], [0]], np.int16), None)
    on_slow = score(one, np.array([[0], [1]], np.int16), None)
    assert on_fast.imbalance == on_slow.imbalance == 2.0
    assert (on_fast.objective("balance"), on_slow.objective("balance")) == pytest.approx((1.25, 5))
