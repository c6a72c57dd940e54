"""Counting steps in bulk gives the very numbers of `step_loads`."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from loadmaster.placement.cluster import Cluster
from loadmaster.placement.cost.step_loads import step_loads
from loadmaster.placement.plan import DispatchSpec, Plan
from loadmaster.simulator.pricing.even_bulk import bulk_loads, counts_in_bulk
from loadmaster.simulator.pricing.step_composition import Composition
from loadmaster.simulator.pricing.step_router import StepRouter
from loadmaster.traces.steps import Steps

from ..conftest import EXPERTS, LAYERS, contiguous_plan, skewed_trace

EVEN = DispatchSpec(policy="even")
FIELDS = ("tokens_WLG", "active_WLG", "weight_bytes_WLG", "nvlink_out_WLG", "nvlink_in_WLG",
          "nic_out_WLG", "nic_in_WLG", "tokens_W", "fair_transfers_WLX")


def random_plan(rng, devices: int, slots: int) -> Plan:
    """Every expert once, the other slots random (duplicates and empty ones included)."""
    layers = []
    for _ in range(LAYERS):
        more = rng.integers(-1, EXPERTS, devices * slots - EXPERTS)
        layers.append(rng.permutation(np.concatenate([np.arange(EXPERTS), more])))
    return Plan(np.stack(layers).reshape(LAYERS, devices, slots).astype(np.int16), EXPERTS)


def slowly(trace, steps, plan, cluster, bytes_E):
    token = np.concatenate([s.token for s in steps])
    home = np.concatenate([s.home for s in steps]).astype(np.int32)
    offset = np.concatenate(([0], np.cumsum([len(s.token) for s in steps])))
    routed = dataclasses.replace(trace.select(token), source=home)
    return step_loads(routed, Steps(np.arange(len(token)), offset), plan, cluster, EVEN,
                      expert_bytes_E=bytes_E)


@pytest.mark.parametrize("shape", [(1, 4, 3), (2, 3, 5), (3, 2, 9), (4, 1, 2)])
@pytest.mark.parametrize("ragged", [False, True])
def test_bulk_counts_equal_step_loads(shape, ragged) -> None:
    """Replicas from 1 to many, uneven homes, empty slots, tokens that choose fewer experts."""
    nodes, per_node, slots = shape
    rng = np.random.default_rng(sum(shape))
    trace = skewed_trace(1_000)
    if ragged:
        k = rng.integers(0, trace.top_k + 1, (1_000, LAYERS)).astype(np.uint8)
        trace = dataclasses.replace(trace, k_of_token=k)
    cluster = Cluster.preset("h100", nodes=nodes, devices_per_node=per_node,
                             slots_per_device=slots)
    if nodes > 1 and ragged:
        cluster = cluster.with_oversubscription(1.5)
    devices = nodes * per_node
    plan = random_plan(rng, devices, slots)
    bytes_E = rng.integers(1, 100, EXPERTS)
    steps = [
        Composition(rng.integers(0, 1_000, size), rng.integers(0, devices, size) // 2)
        for size in (1, 37, 300)
    ]
    expected = slowly(trace, steps, plan, cluster, bytes_E)
    for threads in (1, 2):
        counted = bulk_loads(trace, steps, plan, cluster, expert_bytes_E=bytes_E, threads=threads)
        for field in FIELDS:
            np.testing.assert_array_equal(
                getattr(counted, field), getattr(expected, field), err_msg=field
            )


@pytest.mark.parametrize("tokens", [6_500, 8_500, 40_000])
def test_counters_of_any_width_count_the_same(tokens) -> None:
    """Five replicas of some experts, all tokens of one rank: just below 2^16 by replicas, above."""
    rng = np.random.default_rng(tokens)
    trace = skewed_trace(300)
    cluster = Cluster.preset("h100", nodes=2, devices_per_node=2, slots_per_device=6)
    repeated = np.repeat(np.arange(EXPERTS), [5, 1, 4, 3, 5, 2, 3, 1])
    layers = [rng.permutation(repeated) for _ in range(LAYERS)]
    plan = Plan(np.stack(layers).reshape(LAYERS, 4, 6).astype(np.int16), EXPERTS)
    steps = [Composition(rng.integers(0, 300, tokens), np.full(tokens, home)) for home in range(4)]
    bytes_E = np.ones(EXPERTS, np.int64)
    expected = slowly(trace, steps, plan, cluster, bytes_E)
    counted = bulk_loads(trace, steps, plan, cluster, expert_bytes_E=bytes_E)
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(counted, field), getattr(expected, field), field)


def layer_major(ids):
    """As stored traces lie in memory."""
    return np.ascontiguousarray(ids.transpose(1, 0, 2)).transpose(1, 0, 2)


@pytest.mark.parametrize("ids_type", [np.uint8, np.uint16, np.int32])
def test_ids_are_counted_as_they_lie_in_memory(ids_type) -> None:
    rng = np.random.default_rng(7)
    trace = skewed_trace(500)
    other = dataclasses.replace(trace, ids=layer_major(trace.ids.astype(ids_type)))
    cluster = Cluster.preset("h100", nodes=2, devices_per_node=2, slots_per_device=3)
    plan, bytes_E = random_plan(rng, 4, 3), np.ones(EXPERTS, np.int64)
    steps = [Composition(rng.integers(0, 500, 200), rng.integers(0, 4, 200))]
    expected, counted = (
        bulk_loads(t, steps, plan, cluster, expert_bytes_E=bytes_E) for t in (trace, other)
    )
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(counted, field), getattr(expected, field), field)


@pytest.mark.parametrize("policy", ["even", "balanced"])
def test_reading_a_trace_over_and_over_changes_nothing(cluster, model, policy) -> None:
    """Once it pays, the router lays it out anew: token by token, or layer by layer."""
    trace = skewed_trace(3_000)
    if policy == "even":
        trace = dataclasses.replace(trace, ids=layer_major(trace.ids))
    router = StepRouter(trace, cluster, model, dispatch=DispatchSpec(policy=policy))
    steps = [Composition(np.arange(2_000), np.arange(2_000) % 4)] * 3
    first, *others = (router.loads(steps[:n], contiguous_plan()) for n in (1, 2, 3))
    for field in FIELDS:
        for other in others:
            one = getattr(other, field)[:1]
            np.testing.assert_array_equal(one, getattr(first, field), field)


def test_a_rank_may_send_one_expert_more_tokens_than_sixteen_bits_hold() -> None:
    trace = skewed_trace(100)
    cluster = Cluster.preset("h100", nodes=1, devices_per_node=2, slots_per_device=4)
    plan = Plan(np.tile(np.arange(8).reshape(1, 2, 4), (LAYERS, 1, 1)).astype(np.int16), EXPERTS)
    one_token = [Composition(np.zeros(70_000, np.int64), np.zeros(70_000, np.int64))]
    loads = bulk_loads(trace, one_token, plan, cluster, expert_bytes_E=np.ones(EXPERTS, np.int64))
    chosen = np.bincount(trace.ids[0, 0] // 4, minlength=2)
    assert loads.tokens_WLG[0, 0].tolist() == (70_000 * chosen).tolist()


def test_only_the_case_it_counts_is_taken(cluster) -> None:
    plan, many = contiguous_plan(), 1e6
    assert counts_in_bulk(EVEN, cluster, plan, many)
    assert not counts_in_bulk(DispatchSpec(policy="balanced"), cluster, plan, many)
    for traffic in ("return_home/per_rank", "coherent"):
        assert not counts_in_bulk(EVEN, cluster.with_traffic(traffic), plan, many)


def test_few_tokens_on_many_devices_are_left_to_step_loads(trace, model) -> None:
    """256 ranks would deal 512 slots each, for a handful of tokens; the loads are the same."""
    cluster = Cluster.preset("h100", nodes=32, devices_per_node=8, slots_per_device=2)
    slots = np.tile(np.arange(512) % EXPERTS, (LAYERS, 1)).reshape(LAYERS, 256, 2)
    plan = Plan(slots.astype(np.int16), EXPERTS, dispatch=EVEN)
    assert not counts_in_bulk(EVEN, cluster, plan, 100.0)
    assert counts_in_bulk(EVEN, cluster, plan, 100_000.0)
    steps = [Composition(np.arange(20), np.arange(20) * 12)]
    bulk = bulk_loads(trace, steps, plan, cluster, expert_bytes_E=model.bytes_per_expert_E())
    routed = StepRouter(trace, cluster, model).loads(steps, plan)
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(routed, field), getattr(bulk, field), field)
