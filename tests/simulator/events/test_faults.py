"""Faults during a run: what slows, what is lost, and what is never left uncovered."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadmaster.errors import InfeasibleError, InputError, UsageError
from loadmaster.placement.cluster import Cluster
from loadmaster.placement.plan import Plan
from loadmaster.placement.rebalancing.survivors import survivors_plan
from loadmaster.simulator.events.faults import FlappingNic, Jitter, LostDevices, SlowDevice
from loadmaster.simulator.events.plan_switch import PlanSwitch
from loadmaster.simulator.serving.batching import BatchLimits
from loadmaster.simulator.serving.simulate import Serving, simulate

from ..conftest import EXPERTS, LAYERS, contiguous_plan, steady_workload

SERVING = Serving(BatchLimits(step_tokens=128, max_requests=32))


@pytest.fixture
def roomy(cluster) -> Cluster:
    """Four devices of four slots: every expert twice."""
    return cluster.with_slots(4)


def run(plan, cluster, trace, model, *interventions, load=None, **more):
    more = {"routing": "every_step", "serving": SERVING} | more
    return simulate(
        plan, load or steady_workload(), cluster, trace=trace, model=model,
        interventions=interventions, **more,
    )


def kinds(result) -> list[str]:
    return [event.kind for event in result.events]


@pytest.mark.parametrize("routing", ["every_step", "bank"])
def test_a_slow_device_sets_the_pace_until_it_recovers(cluster, trace, model, routing) -> None:
    plan = contiguous_plan()
    well = run(plan, cluster, trace, model, routing=routing)
    slow = run(plan, cluster, trace, model, SlowDevice(2, 8.0), routing=routing)
    brief = run(plan, cluster, trace, model, SlowDevice(2, 8.0, 0.0, 2e3), routing=routing)
    assert slow.step_time.mean > brief.step_time.mean > well.step_time.mean
    assert int(np.argmax(slow.blame.slowest_share_G)) == 2
    assert kinds(brief) == ["slow", "recovered"]


def test_thermal_steps_follow_each_other(cluster, trace, model) -> None:
    warm, hot = SlowDevice(1, 2.0, 0.0, 2e3), SlowDevice(1, 4.0, 2e3, 4e3)
    result = run(contiguous_plan(), cluster, trace, model, warm, hot)
    starts, took = result.steps.start_ns, result.steps.duration_ns
    means = [took[(starts >= a) & (starts < b)].mean() for a, b in
             ((0, 2e6), (2.4e6, 4e6), (4.4e6, 9e9))]
    assert means[1] > means[0] > means[2]


def test_jitter_only_ever_adds_and_repeats(cluster, trace, model) -> None:
    plan = contiguous_plan()
    calm = run(plan, cluster, trace, model)
    first, again = (run(plan, cluster, trace, model, Jitter(0.3)) for _ in range(2))
    assert first.to_json() == again.to_json()
    assert first.step_time.mean > calm.step_time.mean


def test_a_flapping_port_slows_only_while_it_is_down(cluster, trace, model) -> None:
    load = steady_workload(requests=60, gap_us=150.0)
    serving = Serving(BatchLimits(step_tokens=2048, max_requests=64))
    worse = [
        run(contiguous_plan(), cluster, trace, model, *faults, load=load, serving=serving)
        for faults in ([], [FlappingNic(0, 0.02, 1e3, 1e2)], [FlappingNic(0, 0.02, 1e3, 9e2)])
    ]
    assert worse[0].step_time.mean < worse[1].step_time.mean < worse[2].step_time.mean


def test_a_lost_device_is_replaced_and_every_request_answered(roomy, trace, model) -> None:
    load = steady_workload(requests=60)
    lost = LostDevices(at_us=3e3, devices=(1,), detect_us=500.0, replan_us=200.0)
    result = run(contiguous_plan(slots=4), roomy, trace, model, lost, load=load)
    assert kinds(result) == ["lost", "emergency plan"]
    assert (result.requests.finish_ns > 0).all()
    assert result.requests.retries.sum() > 0 and result.lost_steps == 1
    assert result.paused_us >= 700.0
    after = result.steps.start_ns > 3e6
    assert (result.steps.start_ns[after] >= (3e3 + 700) * 1e3).all(), "nothing runs uncovered"
    assert set(result.steps.epoch.tolist()) == {0, 1}


def test_a_lost_node_comes_back(roomy, trace, model) -> None:
    load = steady_workload(requests=80, gap_us=300.0)
    lost = LostDevices(2e3, node=1, detect_us=100.0, replan_us=100.0, back_after_us=5e3)
    result = run(contiguous_plan(slots=4), roomy, trace, model, lost, load=load)
    assert kinds(result) == ["lost", "emergency plan", "back"]
    assert set(result.steps.epoch.tolist()) == {0, 1, 2}


def test_survivors_that_cannot_hold_the_experts_are_refused(cluster, trace, model) -> None:
    """Two slots a device hold eight experts on four devices, not on three."""
    with pytest.raises(InfeasibleError, match="3 surviving devices have 6 slots for 8 experts"):
        run(contiguous_plan(), cluster, trace, model, LostDevices(1e3, devices=(0,)))


def test_a_burst_only_delays(cluster, trace, model) -> None:
    load = steady_workload(requests=80)
    burst = load.with_burst(5e3, 15e3, times=6)
    assert len(burst) > len(load)
    calm = run(contiguous_plan(), cluster, trace, model, load=load)
    busy = run(contiguous_plan(), cluster, trace, model, load=burst)
    assert busy.latency.mean > calm.latency.mean


@given(st.integers(0, 10_000), st.sets(st.integers(0, 5), min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_survivors_keep_what_they_hold_and_cover_the_rest(seed, lost) -> None:
    """Covered, inside the survivors' slots, orphans placed once, nothing else moved in."""
    rng = np.random.default_rng(seed)
    cluster = Cluster.preset("h100", nodes=3, devices_per_node=2, slots_per_device=4)
    layers = [
        rng.permutation(np.concatenate([np.arange(EXPERTS), rng.integers(-1, EXPERTS, 16)]))
        for _ in range(LAYERS)
    ]
    plan = Plan(np.stack(layers).reshape(LAYERS, 6, 4).astype(np.int16), EXPERTS)
    after = survivors_plan(plan, frozenset(lost), cluster)
    assert (after.slots[:, sorted(lost)] == -1).all()
    alive = [g for g in range(6) if g not in lost]
    covered = plan.replicas_LGE()[:, alive].sum(axis=1) > 0
    moved = plan.moves_to(after)
    assert len(moved) == int((~covered).sum())
    assert all(not covered[layer, expert] for layer, _, expert in moved)
    assert survivors_plan(plan, frozenset(lost), cluster).same_slots(after)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (SlowDevice(9, 2.0), "SlowDevice.device 9"),
        (SlowDevice(0, 0.5), "factor 0.5"),
        (SlowDevice(0, 2.0, at_us=5.0, until_us=1.0), "in order"),
        (FlappingNic(0, 0.0, 10.0, 5.0), "share 0.0"),
        (FlappingNic(0, 0.5, 10.0, 15.0), "down_us 15.0"),
        (LostDevices(1.0), "needs devices or a node"),
        (LostDevices(1.0, node=7), "LostDevices.node 7"),
        (Jitter(-1.0), "sigma -1.0"),
    ],
)
def test_a_fault_that_cannot_be_names_its_field(cluster, trace, model, fault, message) -> None:
    with pytest.raises((InputError, UsageError), match=message):
        run(contiguous_plan(), cluster, trace, model, fault)


LOST = LostDevices(3e3, devices=(1,), detect_us=100.0, replan_us=100.0)


@pytest.mark.parametrize("mode", ["stop", "layers", "hidden"])
def test_a_switch_gives_lost_devices_no_work(roomy, trace, model, mode) -> None:
    """The plan switched to holds replicas on device 1, which is gone."""
    plan = contiguous_plan(slots=4)
    load = steady_workload(requests=60)
    gone = run(plan, roomy, trace, model, LOST, load=load)
    after = run(plan, roomy, trace, model, LOST, PlanSwitch(plan, 6e3, mode), load=load)
    worked_us = [r.device_busy_G[1] * r.duration_us for r in (gone, after)]
    assert worked_us[1] == pytest.approx(worked_us[0])
    assert "switch" in kinds(after)


def test_devices_come_back_to_a_plan_without_those_still_lost(roomy, trace, model) -> None:
    """Device 1 returns while 2 is gone; then 2 does, and everything is as it was."""
    plan = contiguous_plan(slots=4)
    first = LostDevices(2e3, devices=(1,), detect_us=50.0, replan_us=50.0, back_after_us=4e3)
    second = LostDevices(4e3, devices=(2,), detect_us=50.0, replan_us=50.0, back_after_us=6e3)
    seen = []

    class Watch:
        def start(self, run) -> None:
            run.loop.groups[0].on_step.append(lambda: seen.append(run.active.of(0)))

    result = run(plan, roomy, trace, model, first, second, Watch(),
                 load=steady_workload(requests=60))
    assert kinds(result) == ["lost", "emergency plan"] * 2 + ["back"] * 2
    for condition in seen:
        assert (condition.plan.slots[:, sorted(condition.lost)] == -1).all()
    assert frozenset({2}) in {c.lost for c in seen}
    assert not seen[-1].lost and seen[-1].plan.same_slots(plan)


def test_a_device_lost_twice_is_back_after_both(roomy, trace, model) -> None:
    plan = contiguous_plan(slots=4)
    both = [LostDevices(2e3, devices=(1,), detect_us=0.0, replan_us=0.0, back_after_us=2e3),
            LostDevices(3e3, devices=(1,), detect_us=0.0, replan_us=0.0, back_after_us=6e3)]
    result = run(plan, roomy, trace, model, *both, load=steady_workload(requests=60))
    details = [e.detail.split(";")[0] for e in result.events if e.kind == "back"]
    assert details == ["devices []", "devices [1]"]


def test_two_equal_faults_count_twice(cluster, trace, model) -> None:
    plan = contiguous_plan()
    twice, once = SlowDevice(0, 2.0), SlowDevice(0, 4.0)
    double = run(plan, cluster, trace, model, twice, SlowDevice(0, 2.0))
    assert double.step_time == run(plan, cluster, trace, model, once).step_time


def test_a_port_that_flaps_for_long_makes_two_conditions(cluster, trace, model) -> None:
    seen = []

    class Watch:
        def start(self, run) -> None:
            seen.append(run)

    run(contiguous_plan(), cluster, trace, model, FlappingNic(0, 0.5, 200.0, 100.0), Watch(),
        routing="bank")
    assert len(seen[0].active.conditions) == 2


@pytest.mark.parametrize("routing", ["every_step", "bank"])
def test_jitter_and_own_time_are_in_the_account(cluster, trace, model, routing) -> None:
    """The mean step of the account is the one that ran, and its shares still add up."""
    serving = dataclasses.replace(SERVING, other_us_per_token=5.0)
    result = run(contiguous_plan(), cluster, trace, model, Jitter(0.5), routing=routing,
                 serving=serving)
    blame = result.blame
    assert blame.step_us == pytest.approx(result.step_time.mean, rel=1e-4)
    assert blame.shares["jitter"] > 0 and blame.shares["other"] > 0
    assert sum(blame.shares.values()) == pytest.approx(1.0)


def test_two_jitters_on_a_device_both_count(cluster, trace, model) -> None:
    """Neither overwrites the other, in either order; one with sigma 0 changes nothing."""
    plan = contiguous_plan()
    weak, strong, both, turned, idle = (
        run(plan, cluster, trace, model, *faults).step_time.mean
        for faults in (
            [Jitter(0.1)], [Jitter(0.4, (1,))], [Jitter(0.1), Jitter(0.4, (1,))],
            [Jitter(0.4, (1,)), Jitter(0.1)], [Jitter(0.1), Jitter(0.0)],
        )
    )
    assert both > weak and both > strong and turned > strong
    assert idle == weak


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (SlowDevice(0, 2.0, float("inf")), "at_us"),
        (SlowDevice(0, 2.0, 0.0, float("nan")), "until_us"),
        (FlappingNic(0, 0.5, float("inf"), 1.0), "period_us"),
        (LostDevices(float("nan"), (0,)), "at_us"),
        (LostDevices(0.0, (0,), detect_us=float("nan")), "detect_us"),
        (LostDevices(0.0, (0,), back_after_us=-1.0), "back_after_us"),
        (LostDevices(0.0, node=0, group=3), "group 3"),
    ],
)
def test_times_that_no_clock_can_tell_are_refused(cluster, trace, model, fault, message) -> None:
    with pytest.raises((InputError, UsageError), match=message):
        run(contiguous_plan(), cluster, trace, model, fault)
