"""Lower bounds: never above the best of all placements, on cases small enough to try them all."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadmaster.foundation.arrays import FloatArray
from loadmaster.placement.cluster import Cluster, Device
from loadmaster.placement.cost.evaluate import evaluate
from loadmaster.placement.cost.lower_bounds import (
    BoundError,
    balance_bound_W,
    checked_gap,
    least_sent_W,
    most_replicas,
    time_bound_us,
)
from loadmaster.placement.cost.step_loads import step_loads
from loadmaster.placement.plan import DispatchSpec, Plan
from loadmaster.traces.model_spec import ModelSpec
from loadmaster.traces.steps import StepSampler
from loadmaster.traces.trace import RoutingTrace


def hosts_of_experts(experts: int, devices: int, slots: int) -> Iterator[tuple[int, ...]]:
    """Every way to give each expert a set of devices (a bit mask) with at most `slots` transfers.

    Slots may lie anywhere, which only makes the best placement better.
    """
    for hosts in itertools.product(range(1, 2**devices), repeat=experts):
        if sum(mask.bit_count() for mask in hosts) <= slots:
            yield hosts


def best_peak(load_E: FloatArray, speed_G: FloatArray, slots: int) -> float:
    """Lowest peak over all placements, each with the best split of every expert's tokens.

    The best split's maximum is the largest, over sets of devices, of the load that has nowhere
    else to go, over their speed (max flow = min cut).
    """
    ideal, devices = load_E.sum() / speed_G.sum(), len(speed_G)
    speed_Q = [sum(speed_G[g] for g in range(devices) if q >> g & 1) for q in range(2**devices)]
    return float(min(
        max(
            sum(load for load, mask in zip(load_E, hosts, strict=True) if mask & ~group == 0)
            / speed_Q[group]
            for group in range(1, 2**devices)
        )
        for hosts in hosts_of_experts(len(load_E), devices, slots)
    ) / ideal)


@settings(max_examples=40, deadline=None)
@given(
    load=st.lists(st.integers(0, 50), min_size=3, max_size=3).filter(any),
    speed=st.lists(st.sampled_from([0.25, 1.0, 1.0, 3.0]), min_size=1, max_size=3),
    spare=st.integers(0, 3),
)
def test_the_balance_bound_is_never_above_the_best_placement(
    load: list[int], speed: list[float], spare: int
) -> None:
    load_WE = np.array([load], np.float64)
    bound = balance_bound_W(load_WE, 3 + spare, np.array(speed))[0]
    best = best_peak(load_WE[0], np.array(speed), 3 + spare)
    assert 1.0 <= bound <= best * (1 + 1e-9)


@pytest.mark.parametrize(("load", "devices", "slots", "bound"), [
    ([10, 10, 10, 10], 2, 4, 1.0),          # flat: the mean
    ([30, 5, 5], 2, 3, 1.5),                # one expert with one copy: three quarters of all
    ([30, 5, 5], 2, 4, 1.0),                # a second copy frees it
    ([100, 0, 0, 0], 4, 4, 4.0),            # all load on one expert, no spare slot
    ([100, 0, 0, 0], 4, 6, 4 / 3),          # three transfers
    ([100, 0, 0, 0], 4, 100, 1.0),          # never more than one on each device is of use
    ([0, 0, 0, 0], 4, 4, 1.0),              # a step without tokens
])
def test_balance_bounds_by_hand(
    load: list[int], devices: int, slots: int, bound: float
) -> None:
    found = balance_bound_W(np.array([load], np.float64), slots, np.ones(devices))
    assert found[0] == pytest.approx(bound)


def test_every_step_has_a_bound_of_its_own() -> None:
    load_WE = np.array([[30, 5, 5], [10, 10, 20], [0, 0, 0]], np.float64)
    whole = balance_bound_W(load_WE, 3, np.ones(2))
    for row, bound in zip(load_WE, whole, strict=True):
        assert balance_bound_W(row[None], 3, np.ones(2))[0] == bound


def test_more_slots_never_raise_the_bound() -> None:
    load_WE = np.random.default_rng(1).integers(1, 200, (6, 8)).astype(np.float64)
    bounds = np.array([balance_bound_W(load_WE, s, np.ones(4)) for s in range(8, 20)])
    assert (np.diff(bounds, axis=0) <= 1e-12).all()


@pytest.mark.parametrize(("slots", "bound"), [
    (4, 7 / 4),      # one copy: at best on the fastest, which is 4 of 7
    (5, 7 / 6),      # two: on the two fastest
    (6, 1.0),
])
def test_with_unequal_speeds_the_fastest_devices_bound_an_expert(slots: int, bound: float) -> None:
    load_WE = np.array([[100.0, 0, 0, 0]])
    found = balance_bound_W(load_WE, slots, np.array([1.0, 4.0, 2.0]))
    assert found[0] == pytest.approx(bound)


def test_a_layer_can_take_the_whole_spare_memory_of_all_layers() -> None:
    sized = MODEL.model_copy(update={"num_layers": 2, "expert_bytes": (10, 10, 20)})
    devices = [Device(node=0, slots=3, expert_memory_bytes=room) for room in (59, 60)]
    cluster = Cluster(devices=tuple(devices), hardware=Cluster.preset(
        "h100", slots_per_device=1).hardware)
    # 119 bytes, 2 · 40 of them for one replica of each expert; 39 left hold three of the smallest.
    assert most_replicas(cluster, sized, 2, 3) == 6
    tighter = cluster.model_copy(update={"devices": (devices[0], Device(
        node=0, slots=3, expert_memory_bytes=40))})
    assert most_replicas(tighter, sized, 2, 3) == 4
    assert most_replicas(tighter, None, 2, 3) == 6        # sizes unknown: slots alone limit
    assert most_replicas(Cluster.preset("h100", slots_per_device=9), sized, 2, 3) == 24


# ---- time --------------------------------------------------------------------------------------


MODEL = ModelSpec(name="tiny", num_layers=1, num_experts=3, top_k=1, hidden=512, intermediate=512)
POLICIES = ("even", "balanced", "fewest_active")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("nodes", [1, 2])
def test_the_time_bound_is_never_above_the_best_placement(policy: str, nodes: int) -> None:
    cluster = Cluster.preset(
        "h100", nodes=nodes, devices_per_node=2 // nodes, slots_per_device=2
    )
    ids = np.random.default_rng(0).choice(3, size=(60, 1, 1), p=[0.7, 0.2, 0.1])
    trace = RoutingTrace.from_arrays(ids, num_experts=3)
    spec = DispatchSpec(policy=policy)
    steps = StepSampler(tokens=20, order="stored").sample(trace)
    best_W = np.full(len(steps), np.inf)
    for slots in itertools.product(range(-1, 3), repeat=4):
        if {0, 1, 2} <= set(slots):
            plan = Plan(np.array(slots).reshape(1, 2, 2), num_experts=3, dispatch=spec)
            found = evaluate(plan, trace, cluster, steps=steps, model=MODEL)
            assert found.step_time_us_W is not None
            best_W = np.minimum(best_W, found.step_time_us_W)
    load_WE = np.array([
        np.bincount(ids[steps.tokens_of(w), 0, 0], minlength=3) for w in range(len(steps))
    ], np.float64)
    bound_W = time_bound_us(load_WE, MODEL, cluster)
    assert (bound_W > 0).all()
    assert (bound_W <= best_W * (1 + 1e-9)).all()


@pytest.mark.parametrize(("traffic", "nodes"), [
    ("return_home/per_expert", 1), ("return_home/per_rank", 1), ("return_home/per_expert", 2),
    ("return_home/per_rank", 2), ("return_home/per_node", 2), ("allgather", 1),
])
@pytest.mark.parametrize("preset", ["h100", "cpu"])
def test_what_must_cross_is_never_more_than_any_plan_sends(
    preset: str, traffic: str, nodes: int
) -> None:
    """Two of four experts for each token, two devices of two slots; all 2^8 placements tried."""
    cluster = Cluster.preset(
        preset, nodes=nodes, devices_per_node=2 // nodes, slots_per_device=2, traffic=traffic
    )
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((48, 1, 4)) + np.array([0.0, 0.1, 0.3, 0.4]), axis=2)[:, :, :2]
    trace = RoutingTrace.from_arrays(ids, num_experts=4, request=np.arange(48) // 4)
    model = MODEL.model_copy(update={"num_experts": 4, "top_k": 2, "hidden": 4096})
    steps = StepSampler(tokens=16, order="stored").sample(trace)
    home_T = trace.home_rank_T(2)
    counts = np.zeros((len(steps), 2, 4), np.int64)
    for w in range(len(steps)):
        for t in steps.tokens_of(w):
            counts[w, home_T[t], ids[t, 0]] += 1
    best_W, least_W = np.full(len(steps), np.inf), np.full(len(steps), np.inf)
    for slots in itertools.product(range(4), repeat=4):
        if len(set(slots)) == 4:
            plan = Plan(np.array(slots).reshape(1, 2, 2), num_experts=4)
            found = evaluate(plan, trace, cluster, steps=steps, model=model)
            assert found.step_time_us_W is not None
            best_W = np.minimum(best_W, found.step_time_us_W)
            sent = step_loads(trace, steps, plan, cluster)
            ports = sent.nvlink_out_WLG if nodes == 1 else sent.nic_out_WLG
            least_W = np.minimum(least_W, ports[:, 0].max(axis=1))
    load_WE = counts.sum(axis=1).astype(float)
    with_traffic = time_bound_us(load_WE, model, cluster, counts)
    without = time_bound_us(load_WE, model, cluster)
    assert (without <= with_traffic).all()
    assert (with_traffic <= best_W * (1 + 1e-9)).all()
    least = least_sent_W(counts, cluster, top_k=2)
    assert (least <= least_W + 1e-9).all()
    assert (least > 0).all() == (traffic != "allgather")


def test_one_device_without_exchange_takes_just_the_bound() -> None:
    """Nothing to decide: every token and every used expert are on the one device."""
    cluster = Cluster.preset("h100", devices_per_node=1, slots_per_device=3)
    ids = np.repeat([0, 0, 1], 10).reshape(30, 1, 1)
    trace = RoutingTrace.from_arrays(ids, num_experts=3)
    plan = Plan(np.array([[[0, 1, 2]]]), num_experts=3)
    found = evaluate(
        plan, trace, cluster, steps=StepSampler(tokens=30, order="stored"), model=MODEL
    )
    bound_W = time_bound_us(np.array([[20.0, 10.0, 0.0]]), MODEL, cluster)
    assert found.step_time_us_W is not None
    assert bound_W[0] == pytest.approx(found.step_time_us_W[0])


# ---- the gap -----------------------------------------------------------------------------------


def test_a_bound_above_the_objective_is_a_defect_and_says_so() -> None:
    with pytest.raises(BoundError, match=r"layer 3: bound 1\.2 is above the objective 1\.1"):
        checked_gap(1.1, 1.2, "layer 3")


@pytest.mark.parametrize(("objective", "bound"), [
    (np.nan, 1.0), (1.0, np.nan), (np.inf, 1.0), (1.0, -np.inf),
])
def test_a_figure_that_is_no_number_is_a_defect(objective: float, bound: float) -> None:
    with pytest.raises(BoundError, match="finite"):
        checked_gap(objective, bound, "plan")


@pytest.mark.parametrize(("objective", "bound", "gap"), [
    (1.5, 1.0, 0.5), (1.0, 1.0, 0.0), (0.0, 0.0, 0.0),
])
def test_the_gap_is_relative_to_the_bound(objective: float, bound: float, gap: float) -> None:
    assert checked_gap(objective, bound, "plan") == (bound, gap)


def test_a_bound_above_by_rounding_is_lowered_to_the_objective() -> None:
    assert checked_gap(1.0, 1.0 + 1e-12, "plan") == (1.0, 0.0)
