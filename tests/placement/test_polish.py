"""Polishing a layer by an integer program: as good as any placement, proved, never worse."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from loadmaster.placement.bounds import checked_gap
from loadmaster.placement.cluster import Cluster, Device
from loadmaster.placement.layer_job import LayerTask
from loadmaster.placement.plan import DispatchSpec
from loadmaster.placement.planner import PlanResult, plan
from loadmaster.placement.planning_steps import LayerTraffic
from loadmaster.placement.polish import polish
from loadmaster.traces.steps import StepSampler
from loadmaster.traces.synth import synth_trace

FloatArray = npt.NDArray[np.float64]
HARDWARE = Cluster.preset("h100", slots_per_device=1).hardware


def task_of(load_WE: FloatArray, slots: list[int], speeds: list[float]) -> LayerTask:
    devices = tuple(
        Device(node=0, slots=n, speed=s) for n, s in zip(slots, speeds, strict=True)
    )
    traffic = LayerTraffic(None, None, (), None, load_WE, load_WE.shape[1])
    return LayerTask(
        layer=0, layers=1, traffic=traffic, slots_G=np.array(slots), room_G=None,
        cluster=Cluster(devices=devices, hardware=HARDWARE), dispatch=DispatchSpec(),
        objective="balance", model=None, slack=0.0, seed=0, effort="thorough",
    )


def busiest(load_E: FloatArray, hosts: tuple[int, ...], speeds: list[float]) -> float:
    """Least time of the busiest device when tokens split freely over each expert's hosts (bits).

    The largest, over sets of devices, of the load that has nowhere else to go over their speed.
    """
    return max(
        sum(load for load, mask in zip(load_E, hosts, strict=True) if mask & ~group == 0)
        / sum(s for g, s in enumerate(speeds) if group >> g & 1)
        for group in range(1, 2 ** len(speeds))
    )


def best_of_all(load_WE: FloatArray, slots: list[int], speeds: list[float]) -> float:
    """Mean over steps of the busiest device, perfect balance 1, by trying every placement."""
    ideal_W = load_WE.sum(axis=1) / sum(speeds)
    best = np.inf
    for hosts in itertools.product(range(1, 2 ** len(slots)), repeat=load_WE.shape[1]):
        held = [sum(mask >> g & 1 for mask in hosts) for g in range(len(slots))]
        if all(n <= most for n, most in zip(held, slots, strict=True)):
            reached = [busiest(row, hosts, speeds) for row in load_WE]
            best = min(best, float(np.mean(np.array(reached) / ideal_W)))
    return best


@pytest.mark.parametrize(("slots", "speeds"), [
    ([2, 2], [1.0, 1.0]), ([3, 2], [1.0, 1.0]), ([2, 3], [1.0, 2.0]), ([2, 2, 1], [1.0] * 3),
])
@pytest.mark.parametrize("seed", range(3))
def test_no_placement_at_all_is_better(slots: list[int], speeds: list[float], seed: int) -> None:
    load_WE = np.random.default_rng(seed).integers(0, 50, (3, 4)).astype(float) + 1
    start = np.full((len(slots), max(slots)), -1, np.int16)
    experts = iter([0, 1, 2, 3])
    for g, n in enumerate(slots):
        for c in range(n):
            start[g, c] = next(experts, -1)
    found = polish(load_WE, task_of(load_WE, slots, speeds), start, nodes=10_000)
    hosts = tuple(
        sum(1 << g for g, row in enumerate(found.slots_GC) if e in row) for e in range(4)
    )
    ideal_W = load_WE.sum(axis=1) / sum(speeds)
    reached = float(np.mean(
        [busiest(row, hosts, speeds) / i for row, i in zip(load_WE, ideal_W, strict=True)]
    ))
    wanted = best_of_all(load_WE, slots, speeds)
    assert found.solved.proved
    assert reached == pytest.approx(wanted, abs=1e-5)
    assert found.solved.bound == pytest.approx(wanted, abs=1e-5)
    assert ((found.slots_GC >= 0).sum(axis=1) <= slots).all()


# ---- through plan() ---------------------------------------------------------------------------


def quick(effort: str, seed: int = 0, **asked: Any) -> PlanResult:
    trace = synth_trace(
        layers=1, experts=6, top_k=2, tokens=4000, request_tokens=50, seed=seed, zipf=0.8
    )
    cluster = Cluster.preset("h100", devices_per_node=3, slots_per_device=2)
    steps = StepSampler(tokens=60, concurrency=8)
    return plan(trace, cluster, effort=effort, **({"steps": steps} | asked))


@pytest.mark.parametrize("seed", range(3))
def test_thorough_proves_what_the_search_found_on_small_layers(seed: int) -> None:
    normal, thorough = quick("normal", seed), quick("thorough", seed)
    assert normal.evidence.gap > 0.02                     # the load bound alone says little here
    assert thorough.evidence.gap < 1e-3
    assert thorough.evidence.bound <= thorough.evidence.objective
    assert thorough.evidence.validation is not None and normal.evidence.validation is not None
    assert thorough.evidence.validation <= normal.evidence.validation + 1e-3
    checked_gap(normal.evidence.objective, thorough.evidence.bound, "the same steps")


def test_thorough_is_as_repeatable_as_the_rest() -> None:
    assert quick("thorough").plan.to_json() == quick("thorough").plan.to_json()


@pytest.mark.parametrize("asked", [{"dispatch": "even"}, {"dispatch": "nearest"}])
def test_dispatch_that_does_not_split_freely_is_not_polished(asked: dict[str, Any]) -> None:
    result = quick("thorough", **asked)
    assert (result.plan.replicas_LE >= 1).all()
    assert result.evidence.bound <= result.evidence.objective
