"""The control loop of a live group: watch, propose, switch, measure, go back if it was worse.

The eyes and hands of `placement/rebalancing/proposal.py`, which decides: takes windows of a group's
trace and measurements, knows times as measured there, stages and commits. Knows nothing of how
plans are found or applied. It never applies what it has not simulated on recorded traffic with
times measured here. Where prefill and decode run under plans of their own, it looks at the phase
that takes more time and leaves the other's plan alone.

Every window ends in one `Entry`: apply, leave it, not enough data, or cannot; with its numbers.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path

from ...errors import LoadmasterError, UsageError
from ...placement.cluster import Cluster
from ...placement.plan import Plan
from ...placement.rebalancing.proposal import (
    FEWEST_STEPS,
    Answer,
    Entry,
    LoopMemory,
    Prices,
    Proposal,
    Situation,
    SwitchPrice,
    propose,
    settle,
)
from ...traces.trace import RoutingTrace
from ..calibrate.expert_fit import ExpertFit
from ..protocol.phase_plans import PhasePlans
from ..protocol.plan_switch import ApplyReport
from .decisions import ActiveGroup, Control, ControlledGroup
from .measured_times import LivePromise, LiveTimes, MovePrice, stalls
from .switch_preview import new_experts, resized, with_phase
from .traffic_window import Taken, Window, take_window


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
        self._active = ActiveGroup.of(group)
        self._taken_step = self._seen_step = self._active.step
        self._memory = LoopMemory(last_look_step=self._active.step)
        self._promise: LivePromise | None = None
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
            step = ActiveGroup.of(self._group).step
        except LoadmasterError as error:
            if str(error) != self._trouble:     # reported once, not at every poll
                self._trouble = str(error)
                self._note("cannot", self._trouble, {})
            return False
        self._trouble = ""
        if step < self._seen_step:              # a new coordinator counts from scratch
            self._taken_step = self._seen_step = step
            self._memory = self._memory.looked(step)
            self._recording = False
        return step - self._seen_step >= self._control.window_steps

    def tick(self) -> Entry:
        """Take the window that has passed since the last tick, and decide."""
        self._began = time.process_time()
        try:
            self._active = ActiveGroup.of(self._group)
            self._seen_step = self._active.step
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
        active, control = self._active, self._control
        traffic = self._adapted(taken)
        under = taken.whole.of_epoch(active.epoch)
        phase = under.busier_phase() if active.plans.apart else None
        live = under.of_phase(phase)
        self._memory = self._memory.saw(
            traffic, live.trace.num_tokens, kept=control.windows_kept
        )
        numbers = self._figures(traffic, live)
        undone = self._settle(under, numbers)
        if undone is not None:
            return undone
        if control.policy.name != "never" and live.steps >= FEWEST_STEPS:
            numbers["fit_error"] = self._times.measure(
                live, _plan_of(active.plans, phase), phase
            )
        proposal = propose(
            self._memory, self._situation(live, phase), control.policy, control.search,
            self._prices(phase),
        )
        numbers |= proposal.numbers
        if proposal.looked:
            self._memory = self._memory.looked(active.step)
        if proposal.answer == "apply" and not control.advise_only:
            self._switch(proposal, phase, numbers)
        return self._note(proposal.answer, proposal.reason, numbers)

    def _adapted(self, taken: Taken) -> RoutingTrace:
        """The window's traffic. Where the number of ranks changed, only what ran since; all that
        was known of the ranks before is forgotten."""
        current = self._active.plans.prefill
        cluster = resized(self._cluster, current.num_devices, current.slots_per_device)
        if not self._times.adapt(cluster):
            return taken.trace
        self._memory, self._promise = self._memory.other_devices(), None
        return taken.whole.of_epoch(self._active.epoch).trace

    def _figures(self, traffic: RoutingTrace, live: Window) -> dict[str, float]:
        numbers = {"tokens": float(traffic.num_tokens), "steps": float(live.steps)}
        if live.steps:
            numbers["critical_us"] = float(live.measured.critical_us.mean())
        dropped = float(live.measured.dropped.sum())
        if dropped:
            numbers["dropped_share"] = dropped / (dropped + float(live.measured.tokens.sum()))
        return numbers

    def _situation(self, live: Window, phase: int | None) -> Situation:
        unknown = "" if self._times.measured else (
            f"{live.steps} steps measured under the active plan, {FEWEST_STEPS} in one window "
            "are needed to know this machine's times"
        )
        return Situation(
            self._active.step, _plan_of(self._active.plans, phase), self._times.cluster,
            self._spec, phase, unknown,
        )

    def _prices(self, phase: int | None) -> Prices:
        """A switch takes what the last one took for as many experts; looking, this process's CPU
        time since the window ended."""

        def switch_to(candidate: Plan) -> SwitchPrice:
            active = self._active.plans
            moves = len(new_experts(active, with_phase(active, candidate, phase)))
            move_bytes = moves * float(self._spec.bytes_per_expert_E()[0])
            return SwitchPrice(moves, move_bytes, self._price.us(moves, move_bytes))

        return Prices(
            switch_to, lambda: (time.process_time() - self._began) * 1e6,
            self._control.planning_shares_cores,
        )

    # ---- acting ----------------------------------------------------------------------------

    def _switch(
        self, proposal: Proposal, phase: int | None, numbers: dict[str, float]
    ) -> None:
        assert proposal.plan is not None and proposal.made_for is not None
        active = self._active
        target = with_phase(active.plans, proposal.plan, phase)
        report = self._group.apply(target.prefill, target.decode, epoch=active.epoch)
        self._promise = LivePromise(
            active.plans, report.epoch, numbers["gain_us"], self._times.error, phase,
            self._times.cluster,
        )
        self._memory = self._memory.switched(proposal.made_for)
        self._feel(report, numbers)

    def _feel(self, report: ApplyReport, numbers: dict[str, float]) -> None:
        """What serving felt of a switch that is done: noted, and the price of the next."""
        with contextlib.suppress(LoadmasterError):      # it is done, measured or not
            felt = stalls(self._group.measurements(self._active.step), report)
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
        if promise.epoch != self._active.epoch:       # someone switched again meanwhile
            self._promise = None
            return None
        live = under.of_phase(promise.phase)
        if not promise.can_be_judged(live.steps, self._control.window_steps):
            return None
        self._promise = None                            # whatever comes of judging it
        found = settle(
            promise, float(live.measured.critical_us.mean()), promise.kept_us(live, self._spec),
            self._control.worse_by,
        )
        numbers |= found.numbers
        if found.kept:
            self._memory = self._memory.confirmed()
            return None
        before = promise.before
        try:
            report = self._group.apply(
                before.prefill, before.decode, epoch=self._active.epoch
            )
        except LoadmasterError:
            self._promise = promise                     # still active: judged again
            raise
        self._memory = self._memory.undone(self._active.step)
        self._feel(report, numbers)
        return self._note("leave it", found.reason, numbers, rolled_back=True)

    # ---- small things ----------------------------------------------------------------------

    def _note(
        self, answer: Answer, reason: str, numbers: dict[str, float], *, rolled_back: bool = False
    ) -> Entry:
        entry = Entry(self._active.step, answer, reason, dict(numbers), rolled_back)
        self.entries.append(entry)
        if self._log is not None:      # a full disk ends the log, not the loop
            with contextlib.suppress(OSError), open(self._log, "a", encoding="utf-8") as out:
                out.write(json.dumps(entry.to_dict()) + "\n")
        self._on_entry(entry)
        return entry


def _plan_of(plans: PhasePlans, phase: int | None) -> Plan:
    return plans.prefill if phase is None else plans.of(phase)
