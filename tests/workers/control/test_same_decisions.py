"""The live controller and the simulated one, given the same windows, decide the same.

Each is driven through its own entry: a `Controller` on a stand-in of a group, and `simulate` with a
`Replanning`. Only what they see and touch is replaced: both see the windows that the test prepared,
and both are told the same price of a switch. What they measure of a switch is their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from loadmaster.placement.plan import Plan
from loadmaster.placement.rebalancing.policy import Policy
from loadmaster.placement.rebalancing.proposal import Entry
from loadmaster.simulator.events import replan
from loadmaster.simulator.events.replan import Replanning
from loadmaster.simulator.serving.batching import BatchLimits
from loadmaster.simulator.serving.simulate import Serving, simulate
from loadmaster.simulator.serving.workload import Workload
from loadmaster.traces.merge import concatenate
from loadmaster.traces.steps import RECORDED
from loadmaster.traces.trace import RoutingTrace
from loadmaster.workers.calibrate.expert_fit import machine
from loadmaster.workers.control.decisions import Control
from loadmaster.workers.control.measured_times import MovePrice

from .test_controller import (
    CLUSTER,
    CROWDED,
    EAGER,
    KERNEL,
    SPEC,
    SPREAD,
    STEPS,
    ScriptedGroup,
    drive,
    plan_in_order,
    popularity,
    routing,
)

OTHER = [4, 5, 6, 7]      # all hot experts on rank 1
MEASURED = {      # by each loop, in ways of its own
    "steps", "critical_us", "fit_error", "realised_gain_us", "looking_us", "planning_us",
    "stage_us", "staging_us", "commit_us", "commit_step_us",
}


@dataclass
class Loop:
    """What one loop decided, and the plans it activated after the first."""

    entries: list[Entry] = field(default_factory=list)
    applied: list[Plan] = field(default_factory=list)


def live(windows: list[list[int]], policy: Policy, *, slower: float = 1.0, **options: Any) -> Loop:
    """The controller of a group that serves these windows."""
    group = ScriptedGroup(plan_in_order(), slower=slower)
    controller = drive(group, windows, Control(policy, **options))
    return Loop(controller.entries, group.applied)


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Loop]:
    """The control loop of a service whose requests route as these windows do."""

    def run(
        windows: list[list[int]], policy: Policy, *, slower: float = 1.0, **options: Any
    ) -> Loop:
        prepared = [
            routing(popularity(hot), number * STEPS, number) for number, hot in enumerate(windows)
        ]
        waiting, loop = iter(prepared), Loop()

        class FinishedError(Exception):
            """No window is left."""

        def seen(*_arguments: object) -> RoutingTrace:
            window = next(waiting, None)
            if window is None:
                raise FinishedError
            return window

        monkeypatch.setattr(replan, "sample_requests", seen)
        monkeypatch.setattr(replan, "switch_cost", price_as_live)
        spec = Replanning(policy, window_steps=STEPS, windows_kept=2, mode="stop", steps=RECORDED,
                          on_entry=loop.entries.append, **options)
        load = Workload.from_arrays(
            np.arange(4000) * 100.0, np.full(4000, 64), np.full(4000, 2)
        )
        cluster = CLUSTER.model_copy(update={"hardware": machine(KERNEL, CLUSTER.hardware)})
        with pytest.raises(FinishedError):
            simulate(
                plan_in_order(), load, cluster, trace=concatenate(prepared[-1:]), model=SPEC,
                serving=Serving(BatchLimits(step_tokens=256, max_requests=64)),
                interventions=[spec, Slower(slower), Watch(loop)],
            )
        return loop

    return run


def price_as_live(run: Any, target: Plan, group: int) -> Any:
    """A switch in the simulation takes what the controller thinks that one of a group takes."""
    moves = len(run.active.of(group).plan.moves_to(target))
    size = moves * int(SPEC.bytes_per_expert_E()[0])
    return SimpleNamespace(moves=moves, bytes=size, us=MovePrice().us(moves, size))


@dataclass
class Watch:
    """Notes every plan that comes into force."""

    loop: Loop

    def start(self, run: Any) -> None:
        last = [run.active.of(0).plan]

        def note() -> None:
            active = run.active.of(0).plan
            if active is not last[0]:
                self.loop.applied.append(active)
                last[0] = active

        run.loop.groups[0].on_step.append(note)


@dataclass
class Slower:
    """All experts take so many times as long soon after the first switch; no one knows why."""

    factor: float

    def start(self, run: Any) -> None:
        cause = run.active.new_cause()

        def slow() -> None:
            if run.loop.groups[0].epoch > 0 and run.active.of(0).slowdown_G is None:
                run.active.slow(0, cause, np.full(CLUSTER.num_devices, self.factor))

        if self.factor > 1.0:
            run.loop.groups[0].on_step.append(slow)


def same(live_loop: Loop, simulated_loop: Loop) -> None:
    """Step by step: the answer, the reason, and every number that is not a measurement."""
    assert len(live_loop.entries) == len(simulated_loop.entries)
    for ours, theirs in zip(live_loop.entries, simulated_loop.entries, strict=True):
        assert (ours.step, ours.answer, ours.rolled_back) == (
            theirs.step, theirs.answer, theirs.rolled_back
        )
        shared = {k: v for k, v in ours.numbers.items() if k not in MEASURED}
        assert shared == pytest.approx(
            {k: v for k, v in theirs.numbers.items() if k not in MEASURED}, rel=1e-9, abs=1e-9
        )
        if not ours.rolled_back:
            assert ours.reason == theirs.reason
    assert len(live_loop.applied) == len(simulated_loop.applied)
    for mine, other in zip(live_loop.applied, simulated_loop.applied, strict=True):
        assert mine.same_slots(other)


def test_two_shifts_are_answered_alike(simulated: Callable[..., Loop]) -> None:
    windows = [SPREAD, SPREAD, CROWDED, CROWDED, OTHER]
    a, b = (loop(windows, EAGER, max_moves=8) for loop in (live, simulated))
    assert [e.answer for e in a.entries].count("apply") >= 2
    assert any("promised_gain_us" in e.numbers for e in a.entries)
    same(a, b)


@pytest.mark.parametrize("policy", [
    Policy("drift", every_steps=1, fewest_tokens=1000),
    Policy("every_n", every_steps=2 * STEPS, fewest_tokens=1000),
    Policy("net_benefit", every_steps=STEPS, fewest_tokens=1000, horizon_steps=20),
    Policy("net_benefit", every_steps=STEPS, fewest_tokens=10**6),
    Policy("never"),
], ids=["drift", "every_n", "too dear", "too few tokens", "never"])
def test_every_policy_answers_alike(policy: Policy, simulated: Callable[..., Loop]) -> None:
    windows = [SPREAD, SPREAD, CROWDED, CROWDED]
    same(live(windows, policy, max_moves=8), simulated(windows, policy, max_moves=8))


def test_full_re_planning_answers_alike(simulated: Callable[..., Loop]) -> None:
    windows = [SPREAD, CROWDED, CROWDED]
    a, b = (loop(windows, EAGER, candidates="replan") for loop in (live, simulated))
    assert "apply" in [e.answer for e in a.entries]
    same(a, b)


def test_both_go_back_and_back_off_alike(simulated: Callable[..., Loop]) -> None:
    """Experts take four times as long from the first switch on, for a reason no model knows."""
    windows = [SPREAD, CROWDED, CROWDED, CROWDED]
    a, b = (loop(windows, EAGER, slower=4.0, max_moves=8) for loop in (live, simulated))
    assert [e.rolled_back for e in a.entries] == [False, False, True, False]
    assert "after 1 rollbacks" in a.entries[-1].reason
    same(a, b)
