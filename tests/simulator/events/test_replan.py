"""The policies of the live controller, acting on a simulated service over a drifting day."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from loadmaster.errors import InfeasibleError, UsageError
from loadmaster.placement.cluster import Cluster
from loadmaster.placement.plan import Plan
from loadmaster.placement.rebalancing.policy import Policy
from loadmaster.placement.rebalancing.proposal import Entry
from loadmaster.simulator.events.faults import LostDevices, SlowDevice
from loadmaster.simulator.events.replan import Replanning, sample_requests
from loadmaster.simulator.serving.batching import BatchLimits
from loadmaster.simulator.serving.simulate import Serving, simulate
from loadmaster.simulator.serving.step_time_bank import BankSpec
from loadmaster.simulator.serving.token_source import TokenSource
from loadmaster.simulator.serving.workload import Workload
from loadmaster.traces.steps import StepSampler

from ..conftest import EXPERTS, contiguous_plan, steady_workload

SERVING = Serving(BatchLimits(step_tokens=512, max_requests=64))
STEPS = StepSampler(tokens=128, concurrency=8)
SHARED = dict(window_steps=20, window_tokens=4096, windows_kept=2, steps=STEPS)


def policy(name: str) -> Policy:
    return Policy(name, every_steps=20, fewest_tokens=500, horizon_steps=2000)


def fits_front() -> Plan:
    """Level for front-domain traffic (experts 0, 1, 2 are hot), bad for the other."""
    return Plan(
        np.tile(np.array([[0, 7], [1, 6], [2, 5], [3, 4]], np.int16), (3, 1, 1)), EXPERTS
    )


def requests(count: int) -> Workload:
    rng = np.random.default_rng(0)
    return Workload.from_arrays(
        np.cumsum(rng.exponential(300.0, count)), rng.integers(40, 160, count),
        rng.integers(2, 12, count),
    )


@pytest.fixture(scope="module")
def day() -> Workload:
    """Front-domain requests all morning, back-domain ones from noon on."""
    load = requests(200)
    noon = float(load.arrival_ns[100]) / 1e3
    return load.with_domains(("front", "back"), [(0.0, (1, 0)), (noon, (0, 1))])


@dataclass(frozen=True)
class Outcome:
    """One policy's day. What users wait is the judge: it holds steps and stalls alike."""

    latency_mean_us: float
    switches: int
    looks: int
    moved_bytes: int


@pytest.fixture(scope="module")
def outcomes(day, trace, model):
    """From a plan with replicas of the wrong experts; a switch stops the service."""
    fat = model.model_copy(
        update={"hidden": 8192, "intermediate": 8192, "bytes_per_parameter": 0.05}
    )
    node = Cluster.preset("h100", devices_per_node=4, slots_per_device=3)

    def outcome(name: str) -> Outcome:
        spec = Replanning(policy(name), mode="stop", max_moves=12, **SHARED)
        result = simulate(contiguous_plan(slots=3), day, node, trace=trace, model=fat,
                          serving=SERVING, interventions=[spec], bank=BankSpec(windows=10))
        kinds = [e.kind for e in result.events]
        return Outcome(result.latency.mean, kinds.count("apply"),
                       kinds.count("apply") + kinds.count("leave it"), result.moved_bytes)

    return {name: outcome(name) for name in ("never", "every_n", "drift", "net_benefit")}


@pytest.mark.slow
def test_never_never_moves(outcomes) -> None:
    assert outcomes["never"].switches == 0 and outcomes["never"].moved_bytes == 0


@pytest.mark.slow
def test_net_benefit_beats_keeping_and_switching_blindly(outcomes) -> None:
    best = outcomes["net_benefit"]
    assert best.switches >= 1
    assert best.latency_mean_us < outcomes["never"].latency_mean_us
    assert best.latency_mean_us <= outcomes["every_n"].latency_mean_us
    # Not fewer: rebalance moves nothing that gains nothing, so a blind policy moves no more.
    assert best.moved_bytes <= outcomes["every_n"].moved_bytes


@pytest.mark.slow
def test_drift_looks_less_often_than_every_n(outcomes) -> None:
    assert 1 <= outcomes["drift"].looks < outcomes["every_n"].looks


def test_a_plan_that_fits_is_left_alone(trace, model, cluster) -> None:
    front_only = trace.slice_domains(["front"])
    result = simulate(
        fits_front(), requests(240), cluster, trace=front_only, model=model, serving=SERVING,
        interventions=[Replanning(policy("net_benefit"), **SHARED)],
    )
    assert "apply" not in [e.kind for e in result.events]


@pytest.mark.slow
def test_a_days_run_repeats_byte_for_byte(day, trace, model, cluster) -> None:
    runs = [
        simulate(fits_front(), day.head(150), cluster, trace=trace, model=model, serving=SERVING,
                 interventions=[Replanning(policy("net_benefit"), **SHARED)]).to_json()
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


def test_a_windows_sample_holds_what_its_requests_read(trace) -> None:
    load = steady_workload(10).with_domains(("front", "back"), [(0.0, (1, 1))])
    source = TokenSource(trace, load, seed=0)
    window = sample_requests(source, trace, np.arange(3, 6), 20, load.prompt_tokens)
    assert window.num_tokens == 60
    assert np.unique(window.request).tolist() == [3, 4, 5]
    for r in (3, 4, 5):
        assert (window.domain[window.request == r] == load.domain[r]).all()


def test_what_cannot_be_is_refused(day, trace, model, cluster) -> None:
    for bad in ({"window_steps": 0}, {"mode": "slowly"}, {"candidates": "guess"}):
        with pytest.raises(UsageError, match="Replanning"):
            simulate(fits_front(), day.head(5), cluster, trace=trace, model=model,
                     interventions=[Replanning(policy("never"), **(SHARED | bad))])


def test_after_a_loss_candidates_are_for_the_survivors(trace, model) -> None:
    """A plan from nothing for all devices becomes one for those that are left."""
    node = Cluster.preset("h100", devices_per_node=4, slots_per_device=3)
    seen = []

    class Watch:
        def start(self, run) -> None:
            run.loop.groups[0].on_step.append(lambda: seen.append(run.active.of(0)))

    spec = Replanning(policy("every_n"), mode="stop", candidates="replan", method="eplb", **SHARED)
    lost = LostDevices(2e3, devices=(1,), detect_us=10.0, replan_us=10.0)
    result = simulate(contiguous_plan(slots=3), steady_workload(150), node, trace=trace,
                      model=model, serving=SERVING, interventions=[lost, spec, Watch()])
    assert {"apply", "leave it"} & {e.kind for e in result.events if e.at_us > 3e3}
    assert (seen[-1].plan.slots[:, 1] == -1).all()


def test_a_candidate_that_cannot_be_is_left_and_said(trace, model) -> None:
    node = Cluster.preset("h100", devices_per_node=4, slots_per_device=3)

    def cannot(*args, **kwargs):
        raise InfeasibleError("no room")

    spec = Replanning(policy("every_n"), candidates="replan", method="eplb", **SHARED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loadmaster.placement.rebalancing.proposal.survivors_plan", cannot)
        lost = LostDevices(2e3, devices=(1,), detect_us=10.0, replan_us=10.0)
        result = simulate(contiguous_plan(slots=3), steady_workload(150), node, trace=trace,
                          model=model, serving=SERVING, interventions=[lost, spec])
    assert ("cannot", "no room") in [(e.kind, e.detail) for e in result.events]


# ---- going back --------------------------------------------------------------------------------


def sparing_device_0() -> Plan:
    """Device 0 holds the experts that front-domain traffic hardly uses."""
    return Plan(
        np.tile(np.array([[7, 6], [0, 5], [1, 4], [2, 3]], np.int16), (3, 1, 1)), EXPERTS
    )


@dataclass
class ControlledDay:
    """Front-domain requests under a loop that re-plans from nothing; what it decided and did."""

    entries: list[Entry]
    plans: list[Plan]
    kinds: list[str]


@pytest.fixture(scope="module")
def controlled(trace, model):
    """Re-planning with or without a fault beside it."""
    fat = model.model_copy(
        update={"hidden": 8192, "intermediate": 8192, "bytes_per_parameter": 0.05}
    )
    node = Cluster.preset("h100", devices_per_node=4, slots_per_device=2)

    def play(*faults) -> ControlledDay:
        entries: list[Entry] = []
        plans: list[Plan] = []

        class Watch:
            def start(self, run) -> None:
                run.loop.groups[0].on_step.append(lambda: self.see(run.active.of(0).plan))

            def see(self, active: Plan) -> None:
                if not plans or not active.same_slots(plans[-1]):
                    plans.append(active)

        spec = Replanning(policy("every_n"), mode="stop", candidates="replan", method="lpt_swap",
                          on_entry=entries.append, **SHARED)
        result = simulate(
            sparing_device_0(), steady_workload(600, 100.0), node,
            trace=trace.slice_domains(["front"]), model=fat, serving=SERVING,
            interventions=[*faults, spec, Watch()],
        )
        return ControlledDay(entries, plans, [e.kind for e in result.events])

    return play


def test_a_switch_that_keeps_its_promise_stays(controlled) -> None:
    day = controlled()
    first = next(i for i, e in enumerate(day.entries) if e.answer == "apply")
    judged = day.entries[first + 1].numbers
    assert judged["realised_gain_us"] == pytest.approx(judged["promised_gain_us"], rel=0.5)
    assert judged["realised_gain_us"] > 0
    assert "roll back" not in day.kinds and not any(e.rolled_back for e in day.entries)


def test_what_measures_worse_than_promised_is_undone_and_backs_off(controlled) -> None:
    """Device 0 takes four times as long, which no planner knows: what it is given is taken back."""
    day = controlled(SlowDevice(device=0, factor=4.0))
    undone = next(i for i, e in enumerate(day.entries) if e.rolled_back)
    assert day.entries[undone - 1].answer == "apply"
    assert "measured worse than promised" in day.entries[undone].reason
    assert day.entries[undone].numbers["realised_gain_us"] < 0
    assert "after 1 rollbacks" in day.entries[undone + 1].reason
    assert not day.plans[1].same_slots(sparing_device_0())
    assert day.plans[2].same_slots(sparing_device_0())
    assert day.kinds.index("roll back") > day.kinds.index("apply")


def test_slowness_of_before_a_switch_is_not_laid_to_it(controlled) -> None:
    """All devices take twice as long all day, under either plan."""
    day = controlled(*(SlowDevice(device=g, factor=2.0) for g in range(4)))
    judged = next(e.numbers for e in day.entries if "realised_gain_us" in e.numbers)
    assert judged["realised_gain_us"] > 0
    assert "roll back" not in day.kinds


@pytest.mark.parametrize(("windows", "judged"), [(1, False), (4, True)])
def test_steps_of_all_day_judge_no_switch_of_its_afternoon(
    windows: int, judged: bool, trace, model, cluster
) -> None:
    """Drawn from both halves of the day, they are not the traffic that a plan was made for."""
    load = steady_workload(150, 200.0).with_domains(
        ("front", "back"), [(0.0, (1, 0)), (15_000.0, (0, 1))]
    )
    entries: list[Entry] = []
    spec = Replanning(policy("every_n"), mode="stop", candidates="replan", method="lpt_swap",
                      on_entry=entries.append, **SHARED)
    result = simulate(contiguous_plan(), load, cluster, trace=trace, model=model,
                      serving=SERVING, interventions=[spec], bank=BankSpec(windows=windows))
    assert any(e.answer == "apply" for e in entries)
    assert any("realised_gain_us" in e.numbers for e in entries) == judged
    assert any("BankSpec windows" in n for n in result.notes) != judged
