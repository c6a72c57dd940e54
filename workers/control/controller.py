"""The control loop: watch live routing, look for a better plan, prove it, switch, measure.

Knows a group's trace and measurements, and asks `placement/rebalancing/policy.py` when to look and
whether to switch. Knows nothing of how plans are found or applied. It never applies what it has not
simulated on recorded traffic with times measured here, and goes back when a switch measures worse
than staying would have. Where prefill and decode run under plans of their own, it looks at the
phase that takes more time and leaves the other's plan alone.

Every window ends in one `Entry`: apply, leave it, not enough data, or cannot; with its numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

from ...errors import LoadmasterError, UsageError
from ...placement.cluster import Cluster
from ...placement.comparison.compare import Comparison, compare
from ...placement.plan import Plan
from ...placement.planning.planner import PlanResult, plan
from ...placement.rebalancing.policy import Decision, Observation
from ...placement.rebalancing.rebalance import rebalance
from ...traces.analysis.drift import drift
from ...traces.merge import concatenate
from ...traces.trace import RoutingTrace
from ..calibrate.expert_fit import ExpertFit
from ..demo.measure import RECORDED
from ..protocol.phase_plans import PhasePlans
from ..protocol.plan_switch import ApplyReport
from .decisions import Answer, Control, ControlledGroup, Entry, Standing
from .measured_times import LiveTimes, MovePrice, Promise, stalls
from .switch_preview import new_experts, resized, with_phase
from .traffic_window import Taken, Window, take_window

_FEWEST_STEPS = 6      # to fit this machine's times, or to judge a switch


class Controller:
    """Runs the loop on one group. `tick` after every window, or let `run` do it."""

    def __init__(
        self,
        group: ControlledGroup,
        cluster: Cluster,
        control: Control = Control(),  # noqa: B008  (frozen)
        *,
        kernel: ExpertFit | None = None,
        log: Path | None = None,
        on_entry: Callable[[Entry], None] = lambda entry: None,
    ) -> None:
        """cluster: the devices planned for; their times are replaced by measured ones as soon as
        there are enough steps. kernel: how long experts take here; None = timed when first needed,
        which takes seconds. log: a file that gets one JSON line per decision. Raises UsageError for
        a cluster whose traffic is not the group's, and for ranks on GPUs without `kernel`: here
        their experts cannot be timed."""
        status = group.status()
        device, served = status["device"], status.get("cluster")
        if served is not None and served.traffic != cluster.traffic:
            raise UsageError(
                f"the group serves {served.traffic}, the cluster to plan for {cluster.traffic}: "
                "their tokens choose replicas differently; give the controller the group's traffic"
            )
        if device != "cpu" and kernel is None:
            raise UsageError(
                f"the group's ranks compute on {device}, where this process cannot time experts: "
                "control it from Python with `kernel`, or apply plans made with a calibrated "
                "hardware profile"
            )
        self._group = group
        self._cluster = cluster
        self._control = control
        self._log = log
        self._on_entry = on_entry
        self.entries: list[Entry] = []
        self._spec = group.model_spec
        self._times = LiveTimes(self._spec, cluster, kernel)
        self._windows: list[RoutingTrace] = []
        self._planned_for: RoutingTrace | None = None
        self._standing = Standing.of(group)
        self._taken_step = self._seen_step = self._last_look = self._standing.step
        self._tokens_since_switch = 0
        self._rollbacks = 0
        self._promise: Promise | None = None
        self._price = MovePrice()
        self._recording = False
        self._trouble = ""
        self._began = 0.0                 # CPU time of this process when the tick began

    # ---- the loop --------------------------------------------------------------------------

    def run(self, windows: int | None = None, *, poll_s: float = 0.2) -> list[Entry]:
        """Tick after every window, `windows` times or until interrupted. Recording goes on.

        A group that does not answer is asked again; that it did not is an entry.
        """
        done = 0
        while windows is None or done < windows:
            if self.due():
                self.tick()
                done += 1
            else:
                time.sleep(poll_s)
        return self.entries

    def due(self) -> bool:
        """Whether a window has passed. Turns recording on, and on again after a group lost it."""
        try:
            if not self._recording:
                self._group.record(True)
                self._recording = True
            step = Standing.of(self._group).step
        except LoadmasterError as error:
            if str(error) != self._trouble:     # said once, not at every poll
                self._trouble = str(error)
                self._note("cannot", self._trouble, {})
            return False
        self._trouble = ""
        if step < self._seen_step:              # a new coordinator counts afresh
            self._taken_step = self._seen_step = self._last_look = step
            self._recording = False
        return step - self._seen_step >= self._control.window_steps

    def tick(self) -> Entry:
        """Take the window that has passed since the last tick, and decide."""
        self._began = time.process_time()
        try:
            self._standing = Standing.of(self._group)
            self._seen_step = self._standing.step
        except LoadmasterError as error:
            self._trouble = str(error)
            return self._note("cannot", self._trouble, {})
        try:
            taken = take_window(self._group, self._taken_step)
        except LoadmasterError as error:
            self._recording = False
            return self._note("not enough data", str(error), {})
        self._taken_step = taken.last_step
        try:
            return self._decide(taken)
        except LoadmasterError as error:
            return self._note("cannot", str(error), {})

    # ---- deciding --------------------------------------------------------------------------

    def _decide(self, taken: Taken) -> Entry:
        standing = self._standing
        traffic = self._adapted(taken)
        under = taken.whole.of_epoch(standing.epoch)
        phase = under.busier_phase() if standing.plans.apart else None
        live = under.of_phase(phase)
        self._keep(traffic, live)
        numbers = self._figures(traffic, live)
        undone = self._settle(under, numbers)
        if undone is not None:
            return undone
        if self._control.policy.name != "never" and live.steps >= _FEWEST_STEPS:
            numbers["fit_error"] = self._times.measure(
                live, _plan_of(standing.plans, phase), phase
            )
        seen = self._observe(traffic, numbers)
        first = self._control.policy.decide(seen)
        if first.action == "keep":
            answer: Answer = "not enough data" if "not enough data" in first.reason else "leave it"
            return self._note(answer, first.reason, numbers)
        if not self._times.measured:
            return self._note(
                "not enough data", f"{live.steps} steps measured under the plan in force, "
                f"{_FEWEST_STEPS} in one window are needed to know this machine's times", numbers,
            )
        target, second = self._look(seen, phase, numbers)
        if second.action != "switch":
            return self._note("leave it", second.reason, numbers)
        if not self._control.advise_only:
            self._switch(target, phase, numbers)
        return self._note("apply", second.reason, numbers)

    def _adapted(self, taken: Taken) -> RoutingTrace:
        """The window's traffic. Where the number of ranks changed, only what ran since; all that
        was known of the ranks before is forgotten."""
        current = self._standing.plans.prefill
        cluster = resized(self._cluster, current.num_devices, current.slots_per_device)
        if not self._times.adapt(cluster):
            return taken.trace
        self._windows, self._planned_for, self._promise = [], None, None
        self._tokens_since_switch = 0
        return taken.whole.of_epoch(self._standing.epoch).trace

    def _figures(self, traffic: RoutingTrace, live: Window) -> dict[str, float]:
        numbers = {"tokens": float(traffic.num_tokens), "steps": float(live.steps)}
        if live.steps:
            numbers["critical_us"] = float(live.measured.critical_us.mean())
        dropped = float(live.measured.dropped.sum())
        if dropped:
            numbers["dropped_share"] = dropped / (dropped + float(live.measured.tokens.sum()))
        return numbers

    def _observe(self, traffic: RoutingTrace, numbers: dict[str, float]) -> Observation:
        bits, floor = None, 0.0
        asked = self._control.policy.name != "never"
        if asked and self._planned_for is not None and traffic.num_tokens:
            moved = drift(self._planned_for, traffic, seed=self._control.seed, shuffles=50)
            bits, floor = moved.bits, moved.floor_bits or 0.0
            numbers |= {"drift_bits": bits, "drift_floor_bits": floor}
        return Observation(
            step=self._standing.step,
            last_look_step=self._last_look,
            tokens_since_switch=self._tokens_since_switch,
            drift_bits=bits,
            drift_floor_bits=floor,
            rollbacks=self._rollbacks,
        )

    def _look(
        self, seen: Observation, phase: int | None, numbers: dict[str, float]
    ) -> tuple[PhasePlans, Decision]:
        """A candidate for one phase (None: both), and whether to switch to it."""
        standing = self._standing.plans
        self._last_look = self._standing.step
        cluster, current = self._times.cluster, _plan_of(standing, phase)
        traffic = concatenate(self._windows)
        if phase is not None and traffic.phase is not None:
            traffic = traffic.select(traffic.phase == phase)
        planning, judging = traffic.split(0.5, by="request", seed=self._control.seed)
        began = time.process_time()
        found = self._candidate(current, planning, cluster)
        numbers["planning_us"] = (time.process_time() - began) * 1e6
        table = compare(
            {"now": current, "new": found.plan}, judging, cluster, steps=RECORDED,
            model=self._spec, current="now", seed=self._control.seed,
        )
        target = with_phase(standing, found.plan, phase)
        moves = len(new_experts(standing, target))
        return target, self._control.policy.decide(self._with_gain(seen, table, moves, numbers))

    def _candidate(self, current: Plan, traffic: RoutingTrace, cluster: Cluster) -> PlanResult:
        """A better plan for the older part of the traffic kept; the newer part judges it."""
        control, model = self._control, self._spec
        if control.candidates == "replan":
            return plan(
                traffic, cluster, objective="time", model=model, steps=RECORDED,
                dispatch=current.dispatch, seed=control.seed, effort=control.effort,
            )
        return rebalance(
            current, traffic, cluster, objective="time", model=model, steps=RECORDED,
            max_moves=control.max_moves, seed=control.seed, effort=control.effort,
        )

    def _with_gain(
        self, seen: Observation, table: Comparison, moves: int, numbers: dict[str, float]
    ) -> Observation:
        """The gain against what a switch costs: sending experts, and looking where that takes
        the ranks' time."""
        now, new = table.row("now"), table.row("new")
        gain = now.metric - new.metric
        low = -new.change_high_percent / 100.0 * now.metric
        move_bytes = moves * float(self._spec.bytes_per_expert_E()[0])
        move_us = self._price.us(moves, move_bytes)
        looking_us = (time.process_time() - self._began) * 1e6
        cost_us = move_us + (looking_us if self._control.planning_shares_cores else 0.0)
        numbers |= {
            "step_now_us": now.metric, "step_new_us": new.metric, "gain_us": gain,
            "gain_low_us": low, "moves": float(moves), "move_bytes": move_bytes,
            "move_us": move_us, "looking_us": looking_us, "cost_us": cost_us,
        }
        return dataclasses.replace(
            seen, gain_us=gain, gain_low_us=low, move_us=cost_us, moves=moves
        )

    # ---- acting ----------------------------------------------------------------------------

    def _switch(self, target: PhasePlans, phase: int | None, numbers: dict[str, float]) -> None:
        standing = self._standing
        report = self._group.apply(target.prefill, target.decode, epoch=standing.epoch)
        self._promise = Promise(
            standing.plans, report.epoch, phase, numbers["gain_us"], self._times.cluster,
            self._times.error,
        )
        self._planned_for = concatenate(self._windows)
        self._windows, self._tokens_since_switch = [], 0
        self._feel(report, numbers)

    def _feel(self, report: ApplyReport, numbers: dict[str, float]) -> None:
        """What serving felt of a switch that is done: noted, and the price of the next."""
        with contextlib.suppress(LoadmasterError):      # it is done, measured or not
            felt = stalls(self._group.measurements(self._standing.step), report)
            numbers |= felt
            self._price = self._price.learned(
                len(report.moved), float(report.moved_bytes),
                felt["staging_us"] + felt["commit_us"],
            )

    def _settle(self, under: Window, numbers: dict[str, float]) -> Entry | None:
        """Judge the last switch, once, on the first window that can; go back if it was worse."""
        promise = self._promise
        if promise is None:
            return None
        if promise.epoch != self._standing.epoch:       # someone switched again meanwhile
            self._promise = None
            return None
        live = under.of_phase(promise.phase)
        if live.steps < min(_FEWEST_STEPS, self._control.window_steps):
            return None
        self._promise = None                            # whatever comes of judging it
        realised_us, kept_us = promise.realised(live, self._spec)
        numbers |= {"promised_gain_us": promise.gain_us, "realised_gain_us": realised_us}
        if realised_us >= -(self._control.worse_by + promise.error) * kept_us:
            self._rollbacks = 0
            return None
        before = promise.before
        try:
            report = self._group.apply(
                before.prefill, before.decode, epoch=self._standing.epoch
            )
        except LoadmasterError:
            self._promise = promise                     # still in force: judged again
            raise
        self._rollbacks += 1
        self._last_look = self._standing.step           # the back-off counts from here
        self._feel(report, numbers)
        self._windows, self._tokens_since_switch = [], 0
        reason = (
            f"measured worse than promised: {realised_us:.0f} us a step where "
            f"{promise.gain_us:.0f} were promised; the plan before is back in force"
        )
        return self._note("leave it", reason, numbers, rolled_back=True)

    # ---- small things ----------------------------------------------------------------------

    def _keep(self, traffic: RoutingTrace, live: Window) -> None:
        if traffic.num_tokens:
            self._windows = [*self._windows, traffic][-self._control.windows_kept :]
            self._planned_for = traffic if self._planned_for is None else self._planned_for
        self._tokens_since_switch += live.trace.num_tokens

    def _note(
        self, answer: Answer, reason: str, numbers: dict[str, float], *, rolled_back: bool = False
    ) -> Entry:
        entry = Entry(self._standing.step, answer, reason, dict(numbers), rolled_back)
        self.entries.append(entry)
        if self._log is not None:      # a full disk ends the log, not the loop
            with contextlib.suppress(OSError), open(self._log, "a", encoding="utf-8") as out:
                out.write(json.dumps(entry.to_dict()) + "\n")
        self._on_entry(entry)
        return entry


def _plan_of(plans: PhasePlans, phase: int | None) -> Plan:
    return plans.prefill if phase is None else plans.of(phase)
