"""What holds of plans whatever the trace: invariants, labels, more slots, unequal devices."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadmaster.placement.cluster import Cluster, Device
from loadmaster.placement.cost.evaluate import evaluate
from loadmaster.placement.cost.lower_bounds import balance_bound_W
from loadmaster.placement.plan import Plan
from loadmaster.placement.planning.planner import plan
from loadmaster.traces.steps import StepSampler
from loadmaster.traces.synth.generate import synth_trace
from loadmaster.traces.trace import RoutingTrace

STEPS = StepSampler(tokens=96, concurrency=8)
METHODS = ("auto", "greedy", "lpt_swap", "anticorrelation", "affinity")


def trace_of(seed: int, experts: int, layers: int = 1, tokens: int = 2500) -> RoutingTrace:
    return synth_trace(
        layers=layers, experts=experts, top_k=min(2, experts), tokens=tokens, request_tokens=40,
        seed=seed, zipf=0.8,
    )


def cluster_of(slots: list[int], speeds: list[float] | None = None) -> Cluster:
    hardware = Cluster.preset("h100", slots_per_device=1).hardware
    return Cluster(
        devices=tuple(
            Device(node=0, slots=n, speed=1.0 if speeds is None else speeds[g])
            for g, n in enumerate(slots)
        ),
        hardware=hardware,
    )


def quick(trace: RoutingTrace, cluster: Cluster, **asked: Any) -> Plan:
    return plan(trace, cluster, **({"steps": STEPS, "effort": "fast"} | asked)).plan


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_plan_covers_all_experts_within_slots_and_without_duplicates(
    data: st.DataObject,
) -> None:
    experts = data.draw(st.integers(2, 12))
    slots = data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=5))
    usable = sum(min(n, experts) for n in slots)
    if usable < experts:
        slots.append(experts)
    speeds = data.draw(
        st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=len(slots), max_size=len(slots))
    )
    cluster = cluster_of(slots, speeds)
    method = data.draw(st.sampled_from(METHODS))
    made = quick(trace_of(data.draw(st.integers(0, 50)), experts), cluster, method=method)
    held_LG = (made.slots >= 0).sum(axis=2)
    assert (held_LG <= slots).all()
    assert made.duplicates == 0
    assert (made.replicas_LE >= 1).all()
    assert made.evidence is not None
    assert 1 <= made.evidence.bound <= made.evidence.objective + 1e-12


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 50), order=st.permutations(range(4)))
def test_a_plan_with_its_devices_renamed_is_worth_the_same(
    seed: int, order: list[int]
) -> None:
    """Tokens are whole, so ties may fall otherwise: equal within a token or two per step."""
    trace, cluster = trace_of(seed, 8), cluster_of([3, 3, 3, 3])
    made = quick(trace, cluster)
    renamed = Plan(made.slots[:, order], num_experts=8)
    first, second = (
        evaluate(one, trace, cluster, steps=STEPS, dispatch="balanced").imbalance_mean
        for one in (made, renamed)
    )
    assert first == pytest.approx(second, abs=0.02)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 50), order=st.permutations(range(4)))
def test_listing_unequal_devices_in_another_order_gives_as_good_a_plan(
    seed: int, order: list[int]
) -> None:
    slots, speeds = [2, 3, 4, 4], [1.0, 1.0, 2.0, 1.5]
    trace = trace_of(seed, 8)
    reached = [
        evaluate(quick(trace, one), trace, one, steps=STEPS).imbalance_mean
        for one in (
            cluster_of(slots, speeds),
            cluster_of([slots[g] for g in order], [speeds[g] for g in order]),
        )
    ]
    assert reached[0] == pytest.approx(reached[1], abs=0.06)


@settings(max_examples=30, deadline=None)
@given(
    load=st.lists(st.integers(0, 99), min_size=3, max_size=10), slots=st.integers(0, 6),
    devices=st.integers(1, 5),
)
def test_more_slots_never_raise_the_bound(load: list[int], slots: int, devices: int) -> None:
    load_WE = np.array([load], float)
    bounds = [
        balance_bound_W(load_WE, len(load) + spare, np.ones(devices))[0]
        for spare in (slots, slots + 1)
    ]
    assert bounds[1] <= bounds[0] + 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_more_slots_do_not_make_a_plan_worse(seed: int) -> None:
    """On the steps it was planned on, up to what a search of little effort may miss."""
    trace = trace_of(seed, 16, tokens=4000)
    reached = []
    for slots in (4, 5, 6, 8):
        made = quick(trace, cluster_of([slots] * 4), effort="normal")
        assert made.evidence is not None
        reached.append(made.evidence.objective)
    for fewer, more in itertools.pairwise(reached):
        assert more <= fewer + 0.01
    assert reached[-1] < reached[0]


@pytest.mark.parametrize("speeds", [[1.0, 1.0, 2.0, 2.0], [1.0, 1.5, 2.5, 3.0]])
def test_unequal_devices_get_equal_time_not_equal_tokens(speeds: list[float]) -> None:
    trace = trace_of(3, 32, tokens=6000)
    cluster = cluster_of([8, 10, 14, 14], speeds)
    made = quick(trace, cluster, effort="normal")
    report = evaluate(made, trace, cluster, steps=STEPS)
    blind = Plan(quick(trace, cluster_of([8, 10, 14, 14])).slots, num_experts=32)
    assert report.imbalance_mean < 1.1       # of tokens over speed
    assert report.imbalance_mean <= evaluate(
        blind, trace, cluster, steps=STEPS, dispatch="balanced"
    ).imbalance_mean + 0.005
