"""The control loop on scripted traffic: it acts when that pays, and says why when it does not.

The group is a stand-in that serves synthetic routing in steps and whose experts take a known time,
so every decision can be checked; the live loop is measured in `benchmarks/live.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadmaster.errors import LoadmasterError, UsageError
from loadmaster.placement.cluster import Cluster, Traffic
from loadmaster.placement.cost.step_loads import step_loads
from loadmaster.placement.hardware import ComputeProfile
from loadmaster.placement.plan import Plan
from loadmaster.placement.rebalancing.policy import Policy
from loadmaster.traces.model_spec import ModelSpec
from loadmaster.traces.steps import StepSampler
from loadmaster.traces.trace import RoutingTrace
from loadmaster.workers.calibrate.expert_fit import ExpertFit
from loadmaster.workers.control.controller import Controller
from loadmaster.workers.control.decisions import Control
from loadmaster.workers.coordinator.coordinator import Coordinator
from loadmaster.workers.coordinator.step_log import Measurements
from loadmaster.workers.protocol.plan_switch import ApplyReport

RANKS, LAYERS, EXPERTS, TOP_K = 4, 2, 16, 2
STEPS, STEP_TOKENS = 12, 256
SPEC = ModelSpec(
    num_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K, hidden=64, intermediate=32
)
CLUSTER = Cluster.preset("cpu", devices_per_node=RANKS, slots_per_device=4)
RECORDED = StepSampler(order="recorded")
TOKEN_US, ACTIVE_US, START_US = 2.0, 5.0, 20.0
KERNEL = ExpertFit(
    ComputeProfile(
        start_us=START_US, active_expert_us=ACTIVE_US, hbm_bytes_per_s=1e30,
        flops_per_s=SPEC.flops_per_assignment / TOKEN_US * 1e6,
    ),
    kernel_error=0.0,
)
EAGER = Policy("net_benefit", every_steps=STEPS, fewest_tokens=1000, horizon_steps=1e5)


def routing(popularity_E: np.ndarray, first_step: int, seed: int) -> RoutingTrace:
    """STEPS steps of tokens that choose experts by popularity; 32 requests."""
    rng = np.random.default_rng(seed)
    tokens = STEPS * STEP_TOKENS
    noise = rng.gumbel(size=(tokens, LAYERS, EXPERTS))
    ids = np.argsort(-(np.log(popularity_E) + noise), axis=2)[:, :, :TOP_K]
    step = first_step + 1 + np.arange(tokens) // STEP_TOKENS
    request = 1000 * first_step + np.arange(tokens) % 32
    return RoutingTrace.from_arrays(
        ids, num_experts=EXPERTS, step=step, request=request, source=request % RANKS
    )


def popularity(hot: list[int]) -> np.ndarray:
    share = np.ones(EXPERTS)
    share[hot] = 6.0
    return share / share.sum()


class ScriptedGroup:
    """Serves one window per call of `serve`; `slower` makes steps under later plans slower."""

    def __init__(self, plan: Plan, slower: float = 1.0, decode: Plan | None = None) -> None:
        self.plan, self.decode, self.epoch, self.step = plan, decode or plan, 1, 0
        self.model_spec, self.device = SPEC, "cpu"
        self.slower = slower
        self.applied: list[Plan] = []
        self._trace: RoutingTrace | None = None
        self._us: list[np.ndarray] = []

    def serve(self, popularity_E: np.ndarray, seed: int, ranks: int = RANKS) -> None:
        trace = routing(popularity_E, self.step, seed)
        self._trace = dataclasses.replace(trace, source=trace.request % ranks)
        cluster = Cluster.preset("cpu", devices_per_node=ranks, slots_per_device=8)
        loads = step_loads(self._trace, RECORDED.sample(self._trace), self.plan, cluster)
        us = START_US + ACTIVE_US * loads.active_WLG + TOKEN_US * loads.tokens_WLG
        self._us.append(us * (self.slower if self.epoch > 1 else 1.0))
        self._tokens = loads.tokens_WLG
        self.step += STEPS

    def status(self) -> dict[str, Any]:
        return {"plan": self.plan, "decode_plan": self.decode, "epoch": self.epoch,
                "step": self.step, "model_spec": SPEC, "device": self.device}

    def record(self, on: bool) -> None:
        return

    def trace(self, *, take: bool = False) -> RoutingTrace:
        if self._trace is None:
            raise LoadmasterError("nothing has been recorded")
        return self._trace

    def measurements(self, after_step: int = 0) -> Measurements:
        us = self._us[-1] if after_step < self.step else np.zeros((0, *self._us[-1].shape[1:]))
        steps = np.arange(self.step - len(us), self.step) + 1
        zero_WLG = np.zeros(us.shape, np.int64)
        zero_WG = np.zeros((len(us), us.shape[2]))
        tokens = self._tokens if len(us) else zero_WLG
        return Measurements(
            step=steps, epoch=np.full(len(us), self.epoch), rows=zero_WG.astype(np.int64) + 64,
            expert_cpu_us=us, tokens=tokens, remote_transfers=zero_WLG, dropped=zero_WLG,
            peak=zero_WLG[:, :, 0], step_wall_us=us.sum(axis=(1, 2)), step_cpu_us=zero_WG,
            stage_us=zero_WG, staging=np.zeros(len(us), bool),
        )

    def apply(
        self, plan: Plan, decode: Plan | None = None, *, epoch: int | None = None
    ) -> ApplyReport:
        if epoch is not None and epoch != self.epoch:
            raise LoadmasterError(f"made under epoch {epoch}, and {self.epoch} is active")
        moves = self.plan.moves_to(plan)
        self.applied.append(plan)
        self.plan, self.decode, self.epoch = plan, decode or plan, self.epoch + 1
        return ApplyReport(self.epoch, tuple(moves), 12288 * len(moves), 0, 1, 0.0, 0.0, 0.0)


def plan_in_order() -> Plan:
    slots = np.zeros((LAYERS, RANKS, 4), int)
    slots[:] = np.arange(EXPERTS).reshape(RANKS, 4)
    return Plan(slots=slots, num_experts=EXPERTS)


def drive(
    group: ScriptedGroup, windows: list[list[int]], control: Control, **options: Any
) -> Controller:
    """Serve windows with these experts hot, ticking after each."""
    controller = Controller(group, CLUSTER, control, kernel=KERNEL, **options)
    for seed, hot in enumerate(windows):
        group.serve(popularity(hot), seed)
        controller.tick()
    return controller


SPREAD = [0, 4, 8, 12]      # one hot expert on every rank: in order is as good as any
CROWDED = [0, 1, 2, 3]      # all hot experts on rank 0


def test_even_traffic_is_left_alone() -> None:
    group = ScriptedGroup(plan_in_order())
    controller = drive(group, [SPREAD] * 5, Control(EAGER, max_moves=8))
    assert group.applied == []
    assert {e.answer for e in controller.entries} == {"leave it"}


def test_a_shift_is_answered_by_a_few_moves_and_then_rests() -> None:
    group = ScriptedGroup(plan_in_order())
    windows = [SPREAD] * 3 + [CROWDED] * 5
    controller = drive(group, windows, Control(EAGER, max_moves=8))
    answers = [e.answer for e in controller.entries]
    assert answers[:3] == ["leave it"] * 3
    assert "apply" in answers[3:6]
    assert answers[-1] == "leave it"
    assert sum(len(plan_in_order().moves_to(p)) for p in group.applied[:1]) <= 8
    first = next(e for e in controller.entries if e.answer == "apply")
    assert first.numbers["gain_low_us"] > 0
    assert first.numbers["moves"] > 0
    after = next(e for e in controller.entries if "realised_gain_us" in e.numbers)
    assert after.numbers["realised_gain_us"] > 0.5 * after.numbers["promised_gain_us"]
    start, end = controller.entries[3], controller.entries[-1]
    assert end.numbers["critical_us"] < 0.8 * start.numbers["critical_us"]


def test_the_first_full_window_after_a_shift_is_answered_at_its_own_worth() -> None:
    """Windows from before the shift would halve the gain, and moving would seem not to pay."""
    brief = dataclasses.replace(EAGER, horizon_steps=100)
    group = ScriptedGroup(plan_in_order())
    controller = drive(group, [SPREAD] * 3 + [CROWDED] * 2, Control(brief, max_moves=8))
    answered = controller.entries[3]
    assert answered.answer == "apply" and answered.numbers["windows"] == 1
    assert controller.entries[2].numbers["windows"] == 2, "traffic that stays is pooled"
    realised = controller.entries[4].numbers["realised_gain_us"]
    assert answered.numbers["gain_us"] > 0.6 * realised


def test_a_shift_in_mid_window_is_answered_in_the_first_full_one() -> None:
    class Shifting(ScriptedGroup):
        def serve_both(self, before: list[int], after: list[int], seed: int) -> None:
            """Half of the window's requests are of the old kind."""
            self.serve(popularity(before), seed)
            assert self._trace is not None
            old, new = self._trace, routing(popularity(after), self.step - STEPS, seed + 50)
            late_T = old.request % 2 == 1
            ids = np.where(late_T[:, None, None], new.ids, old.ids)
            self._trace = dataclasses.replace(old, ids=ids)

    group = Shifting(plan_in_order())
    brief = dataclasses.replace(EAGER, horizon_steps=60)
    controller = Controller(group, CLUSTER, Control(brief, max_moves=8), kernel=KERNEL)
    group.serve(popularity(SPREAD), 0)
    controller.tick()
    group.serve_both(SPREAD, CROWDED, 1)
    assert controller.tick().answer == "leave it", "half of the gain does not pay for the moves"
    group.serve(popularity(CROWDED), 2)
    entry = controller.tick()
    assert entry.answer == "apply" and entry.numbers["windows"] == 1


def test_never_never_looks() -> None:
    group = ScriptedGroup(plan_in_order())
    drive(group, [CROWDED] * 4, Control(Policy("never"), max_moves=8))
    assert group.applied == []


def test_drift_looks_only_when_loads_have_moved() -> None:
    policy = Policy("drift", every_steps=1, fewest_tokens=1000)
    group = ScriptedGroup(plan_in_order())
    controller = drive(group, [SPREAD] * 3 + [CROWDED] * 2, Control(policy, max_moves=8))
    assert all("is within" in e.reason for e in controller.entries[1:3])
    assert [e.answer for e in controller.entries].count("apply") >= 1


def test_too_few_tokens_are_not_enough_data() -> None:
    policy = Policy("net_benefit", every_steps=1, fewest_tokens=10**6)
    group = ScriptedGroup(plan_in_order())
    controller = drive(group, [CROWDED] * 2, Control(policy))
    assert {e.answer for e in controller.entries} == {"not enough data"}


def test_nothing_recorded_is_not_enough_data() -> None:
    controller = Controller(ScriptedGroup(plan_in_order()), CLUSTER, Control(EAGER))
    assert controller.tick().answer == "not enough data"


def test_what_measures_worse_than_promised_is_undone_and_backs_off() -> None:
    """Steps under any new plan take half as long again, for a reason no model knows."""
    group = ScriptedGroup(plan_in_order(), slower=1.8)
    controller = drive(group, [SPREAD] + [CROWDED] * 5, Control(EAGER, max_moves=8))
    undone = [e for e in controller.entries if e.rolled_back]
    assert len(undone) == 1
    assert "measured worse than promised" in undone[0].reason
    assert group.applied[1].same_slots(plan_in_order())
    after = controller.entries[controller.entries.index(undone[0]) + 1]
    assert "after 1 rollbacks" in after.reason


def test_advice_changes_nothing() -> None:
    group = ScriptedGroup(plan_in_order())
    control = Control(EAGER, max_moves=8, advise_only=True)
    controller = drive(group, [CROWDED] * 3, control)
    assert group.applied == []
    assert controller.entries[-1].answer == "apply"


def test_a_move_that_never_pays_is_left_alone() -> None:
    short = Policy("net_benefit", every_steps=STEPS, fewest_tokens=1000, horizon_steps=0.01)
    group = ScriptedGroup(plan_in_order())
    controller = drive(group, [CROWDED] * 3, Control(short, max_moves=8))
    assert group.applied == []
    assert "pays back after" in controller.entries[-1].reason


def test_a_switch_that_fails_is_said_and_the_loop_goes_on() -> None:
    class Refusing(ScriptedGroup):
        def apply(self, plan: Plan, decode: Plan | None = None, *, epoch: int | None = None) -> Any:
            raise LoadmasterError("a rank has no room")

    group = Refusing(plan_in_order())
    controller = drive(group, [CROWDED] * 2, Control(EAGER, max_moves=8))
    assert controller.entries[-1].answer == "cannot"
    assert controller.entries[-1].reason == "a rank has no room"


def test_full_replanning_moves_far_more() -> None:
    moves = {}
    for candidates in ("rebalance", "replan"):
        group = ScriptedGroup(plan_in_order())
        control = Control(
            Policy("every_n", every_steps=1, fewest_tokens=1000),
            candidates=candidates,  # type: ignore[arg-type]
            max_moves=6,
        )
        drive(group, [CROWDED] * 3, control)
        plans = [plan_in_order(), *group.applied]
        moves[candidates] = sum(len(a.moves_to(b)) for a, b in itertools.pairwise(plans))
    assert moves["rebalance"] < 0.5 * moves["replan"]


def test_every_decision_is_a_line_in_the_log(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    group = ScriptedGroup(plan_in_order())
    controller = drive(group, [CROWDED] * 3, Control(EAGER, max_moves=8), log=path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [e.to_dict() for e in controller.entries]
    assert {"step", "answer", "reason", "numbers"} <= set(lines[0])


@pytest.mark.parametrize("windows", [1, 3])
def test_run_ticks_once_per_window(windows: int) -> None:
    group = ScriptedGroup(plan_in_order())
    controller = Controller(group, CLUSTER, Control(EAGER, window_steps=STEPS), kernel=KERNEL)
    record = group.record
    group.record = lambda on: (record(on), group.serve(popularity(SPREAD), 0))[0]  # type: ignore
    controller._on_entry = lambda entry: group.serve(popularity(SPREAD), entry.step)
    assert len(controller.run(windows, poll_s=0.01)) == windows


# ---- the group changes under the controller -------------------------------------------------


def test_a_decode_plan_stays_apart_through_a_switch_and_its_undoing() -> None:
    decode = Plan(slots=plan_in_order().slots[:, ::-1].copy(), num_experts=EXPERTS)

    class Phased(ScriptedGroup):
        def trace(self, *, take: bool = False) -> RoutingTrace:
            trace = super().trace()
            return dataclasses.replace(trace, phase=np.zeros(trace.num_tokens, np.uint8))

    group = Phased(plan_in_order(), slower=1.8, decode=decode)
    controller = drive(group, [SPREAD, CROWDED], Control(EAGER, max_moves=8))
    assert controller.entries[-1].answer == "apply"
    assert not group.plan.same_slots(plan_in_order()) and group.decode.same_slots(decode)
    group.serve(popularity(CROWDED), 9)
    assert controller.tick().rolled_back
    assert group.plan.same_slots(plan_in_order()) and group.decode.same_slots(decode)


def test_after_a_change_of_ranks_the_loop_goes_on() -> None:
    group = ScriptedGroup(plan_in_order())
    controller = drive(group, [CROWDED] * 2, Control(Policy("never")))
    controller._control = Control(EAGER, max_moves=8)
    fewer = np.full((LAYERS, 2, 8), -1, int)
    fewer[:] = np.arange(EXPERTS).reshape(2, 8)
    group.plan = group.decode = Plan(slots=fewer, num_experts=EXPERTS)
    group.epoch += 1
    for seed in range(3):
        group.serve(popularity(CROWDED), seed, ranks=2)
        controller.tick()
    assert [e.answer for e in controller.entries[2:]].count("apply") == 1
    assert group.plan.num_devices == 2


def test_a_promise_that_cannot_be_judged_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    group = ScriptedGroup(plan_in_order())
    controller = drive(group, [SPREAD, CROWDED], Control(EAGER, max_moves=8))
    assert controller._promise is not None

    def fails(*arguments: object) -> None:
        raise LoadmasterError("no such trace")

    monkeypatch.setattr("loadmaster.workers.control.measured_times.critical_path_us_W", fails)
    group.serve(popularity(CROWDED), 7)
    assert controller.tick().answer == "cannot"
    group.serve(popularity(CROWDED), 8)
    entry = controller.tick()
    assert entry.answer in ("apply", "leave it") and not entry.rolled_back
    assert "realised_gain_us" not in entry.numbers, "it is not judged any more"


def test_going_back_is_tried_again_where_it_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    group = ScriptedGroup(plan_in_order(), slower=1.8)
    controller = drive(group, [SPREAD, CROWDED], Control(EAGER, max_moves=8))
    assert controller.entries[-1].answer == "apply"
    works = group.apply

    def busy(*arguments: object, **options: object) -> Any:
        raise LoadmasterError("a rank is being replaced")

    monkeypatch.setattr(group, "apply", busy)
    group.serve(popularity(CROWDED), 7)
    assert controller.tick().answer == "cannot"
    monkeypatch.setattr(group, "apply", works)
    group.serve(popularity(CROWDED), 8)
    entry = controller.tick()
    assert entry.rolled_back and "stage_us" in entry.numbers
    group.serve(popularity(CROWDED), 9)
    assert "after 1 rollbacks" in controller.tick().reason, "the failed attempt was none"


def test_a_promise_ends_with_its_epoch() -> None:
    group = ScriptedGroup(plan_in_order(), slower=1.8)
    controller = drive(group, [SPREAD, CROWDED], Control(EAGER, max_moves=8))
    assert controller.entries[-1].answer == "apply"
    group.apply(plan_in_order())        # by someone else
    group.serve(popularity(CROWDED), 7)
    entry = controller.tick()
    assert not entry.rolled_back and "realised_gain_us" not in entry.numbers


def test_tokens_count_from_the_switch_and_not_only_those_kept() -> None:
    policy = Policy("net_benefit", every_steps=1, fewest_tokens=4 * STEPS * STEP_TOKENS)
    controller = drive(ScriptedGroup(plan_in_order()), [SPREAD] * 5, Control(policy))
    assert [e.answer for e in controller.entries] == ["not enough data"] * 3 + ["leave it"] * 2


def test_experts_on_gpus_are_not_timed_on_this_cpu() -> None:
    group = ScriptedGroup(plan_in_order())
    group.device = "cuda"
    with pytest.raises(UsageError, match="cannot time experts"):
        Controller(group, CLUSTER)


def test_a_cluster_of_other_traffic_is_refused() -> None:
    """Under it tokens would choose other replicas than they do live."""
    group = ScriptedGroup(plan_in_order())
    current_plan = group.status()
    group.status = lambda: current_plan | {"cluster": CLUSTER}      # type: ignore[method-assign]
    Controller(group, CLUSTER)
    other = CLUSTER.model_copy(update={"traffic": Traffic.parse("return_home/per_rank")})
    with pytest.raises(UsageError, match=r"serves return_home/per_expert, .* return_home/per_rank"):
        Controller(group, other)


def test_looking_is_paid_for_where_it_takes_the_ranks_time() -> None:
    costs = []
    for shared in (False, True):
        group = ScriptedGroup(plan_in_order())
        control = Control(EAGER, max_moves=8, planning_shares_cores=shared)
        numbers = drive(group, [CROWDED] * 2, control).entries[0].numbers
        costs.append(numbers["cost_us"] - numbers["move_us"])
        assert numbers["looking_us"] > numbers["planning_us"] > 0
    assert costs[0] == 0.0 and costs[1] > 1000.0


def test_a_group_that_does_not_answer_for_a_while_does_not_end_the_loop() -> None:
    group = ScriptedGroup(plan_in_order())
    controller = Controller(group, CLUSTER, Control(EAGER, window_steps=STEPS), kernel=KERNEL)
    answers = iter([True, False, False, False])
    honest, fine = group.status, ScriptedGroup.measurements

    def status() -> dict[str, Any]:
        if not next(answers, True):
            raise LoadmasterError("the coordinator is away")
        return honest()

    def measurements(after_step: int = 0) -> Measurements:
        group.measurements = lambda after_step=0: fine(group, after_step)  # type: ignore
        raise LoadmasterError("away again")

    group.status, group.measurements = status, measurements  # type: ignore[method-assign]
    group.serve(popularity(SPREAD), 0)
    controller._on_entry = lambda entry: group.serve(popularity(SPREAD), entry.step)
    assert controller.due()
    found = controller.run(2, poll_s=0.001)
    assert [e.reason for e in found[:2]] == ["the coordinator is away", "away again"]
    assert [e.answer for e in found] == ["cannot", "not enough data", "leave it"]


class ThreadGroup:
    """A coordinator in this process, as the controller wants to see it."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._leader = coordinator
        self.model_spec = coordinator.model_spec
        self.status, self.measurements = coordinator.status, coordinator.measurements

    def record(self, on: bool) -> None:
        self._leader.configure(recording=on)

    def trace(self, *, take: bool = False) -> RoutingTrace:
        found = self._leader.trace(take)
        if found is None:
            raise LoadmasterError("nothing has been recorded")
        return found

    def apply(self, plan: Plan, decode: Plan | None = None, *, epoch: int | None = None) -> Any:
        return self._leader.apply(plan, decode, epoch)


def test_under_continuous_load_times_are_measured_and_switches_judged(
    checkpoint: Callable[[str], Path], start_threads: Callable[..., Coordinator],
    random_prompts: Callable[..., list[list[int]]],
) -> None:
    coordinator = start_threads(checkpoint("qwen3_moe"))
    stop = threading.Event()

    def load(seed: int) -> None:
        prompts = random_prompts(seed, 16)
        while not stop.is_set():
            numbers = coordinator.submit(prompts, 2)
            coordinator.wait_all(numbers, 30.0)
            coordinator.forget(numbers)

    threads = [threading.Thread(target=load, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    try:
        group = ThreadGroup(coordinator)
        plan = coordinator.status()["plan"]
        cluster = Cluster.preset(
            "cpu", devices_per_node=plan.num_devices, slots_per_device=plan.slots_per_device + 1
        )
        policy = Policy("every_n", every_steps=1, fewest_tokens=1)
        control = Control(policy, window_steps=12, candidates="replan")
        entries = Controller(group, cluster, control, kernel=KERNEL).run(6, poll_s=0.01)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    enough = [e for e in entries if e.numbers["steps"] >= 6 and not e.rolled_back]
    assert enough and all(e.numbers["fit_error"] > 0.0 for e in enough), entries
    switched = [i for i, e in enumerate(entries) if e.answer == "apply"]
    assert switched and all("stage_us" in entries[i].numbers for i in switched)
    judged = [e for e in entries[switched[0] + 1 :] if "realised_gain_us" in e.numbers]
    assert judged, entries
