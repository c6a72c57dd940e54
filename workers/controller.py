"""The control loop: watch live routing, look for a better plan, prove it, switch, measure.

Knows a group's trace and measurements, and asks `placement/policy.py` when to look and whether to
switch. Knows nothing of how plans are found or applied. It never applies what it has not simulated
on recorded traffic, and goes back when a switch measures worse than staying would have.

Every window ends in one `Entry`: apply, leave it, not enough data, or cannot; with its numbers.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from ..errors import LoadmasterError
from ..placement.cluster import Cluster
from ..placement.comparison import Comparison, compare
from ..placement.plan import Plan
from ..placement.planner import PlanResult, plan
from ..placement.policy import Observation, Policy
from ..placement.rebalance import rebalance
from ..traces.drift import drift
from ..traces.merge import concatenate
from ..traces.spec import ModelSpec
from ..traces.trace import RoutingTrace
from .demo_measure import RECORDED, predicted
from .expert_fit import ExpertFit, fit_kernel, machine, scale_to_live
from .step_log import Measurements
from .switch import ApplyReport

Answer = Literal["apply", "leave it", "not enough data", "cannot"]

_FEWEST_STEPS_TO_FIT = 6


class ControlledGroup(Protocol):
    """What the controller needs of a group; `workers.group.Group` is one."""

    @property
    def plan(self) -> Plan: ...

    @property
    def epoch(self) -> int: ...

    @property
    def step(self) -> int: ...

    @property
    def model_spec(self) -> ModelSpec: ...

    def record(self, on: bool) -> None: ...

    def trace(self, *, take: bool = False) -> RoutingTrace: ...

    def measurements(self, after_step: int = 0) -> Measurements: ...

    def apply(self, plan: Plan, decode: Plan | None = None, *, epoch: int | None = None
              ) -> ApplyReport: ...


@dataclass(frozen=True)
class Control:
    """How the loop runs.

    window_steps: steps per window. windows_kept: how many windows a plan is made from.
    candidates: `rebalance` moves a few experts from the plan in force, `replan` starts afresh.
    max_moves: budget of one switch; None = rebalance's own. planning_shares_cores: the planner's
    CPU time is taken from the ranks (one machine), so it counts as a cost of looking.
    worse_by: share of a step by which a switch may measure worse than promised before it is undone.
    advise_only: decide and log, change nothing.
    """

    policy: Policy = field(default_factory=Policy)
    window_steps: int = 32
    windows_kept: int = 2
    candidates: Literal["rebalance", "replan"] = "rebalance"
    max_moves: int | None = None
    effort: str = "fast"
    planning_shares_cores: bool = False
    worse_by: float = 0.01
    advise_only: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Entry:
    """One decision, with what it was based on."""

    step: int
    answer: Answer
    reason: str
    numbers: dict[str, float]
    rolled_back: bool = False

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class _Promise:
    """A switch that has been made and not yet judged."""

    before: Plan
    gain_us: float
    cluster: Cluster          # with the times measured before the switch
    error: float              # of those times, relative


class Controller:
    """Runs the loop on one group. `tick` after every window, or let `run` do it."""

    def __init__(
        self,
        group: ControlledGroup,
        cluster: Cluster,
        control: Control = Control(),
        *,
        kernel: ExpertFit | None = None,
        log: Path | None = None,
        on_entry: Callable[[Entry], None] = lambda entry: None,
    ) -> None:
        """cluster: the devices planned for; their times are replaced by measured ones as soon as
        there are enough steps. kernel: how long experts take here; None = timed when first needed,
        which takes seconds. log: a file that gets one JSON line per decision."""
        self._group = group
        self._cluster = cluster
        self._control = control
        self._log = log
        self._on_entry = on_entry
        self.entries: list[Entry] = []
        self._windows: list[RoutingTrace] = []
        self._planned_for: RoutingTrace | None = None
        self._kernel = kernel
        self._seen_step = group.step
        self._last_look = group.step
        self._rollbacks = 0
        self._promise: _Promise | None = None
        self._us_per_byte = 1e-3          # until a switch has been measured: 1 GB/s
        self._spec = group.model_spec

    def run(self, windows: int | None = None, *, poll_s: float = 0.2) -> list[Entry]:
        """Tick after every window, `windows` times or until interrupted. Recording goes on."""
        self._group.record(True)
        done = 0
        while windows is None or done < windows:
            while self._group.step - self._seen_step < self._control.window_steps:
                time.sleep(poll_s)
            self.tick()
            done += 1
        return self.entries

    def tick(self) -> Entry:
        """Take the window that has passed since the last tick, and decide."""
        measured = self._group.measurements(self._seen_step)
        self._seen_step = self._group.step
        try:
            window = self._group.trace(take=True)
        except LoadmasterError as error:
            return self._note("not enough data", str(error), {})
        measured = measured.take(np.isin(measured.step, np.unique(_steps_of(window))))
        self._keep(window)
        try:
            return self._decide(window, measured)
        except LoadmasterError as error:
            return self._note("cannot", str(error), {})

    # ---- deciding --------------------------------------------------------------------------

    def _decide(self, window: RoutingTrace, measured: Measurements) -> Entry:
        cluster, numbers = self._calibrated(window, measured)
        if self._promise is not None:
            undone = self._judge_promise(self._promise, window, measured, numbers)
            self._promise = None
            if undone is not None:
                return undone
        seen = self._observe(window, numbers)
        first = self._control.policy.decide(seen)
        if first.action == "keep":
            answer: Answer = "not enough data" if "not enough data" in first.reason else "leave it"
            return self._note(answer, first.reason, numbers)
        self._last_look = self._group.step
        began = time.process_time()
        found = self._candidate(cluster)
        planning_us = (time.process_time() - began) * 1e6
        current = self._group.plan
        table = compare(
            {"now": current, "new": found.plan}, self._judging(), cluster, steps=RECORDED,
            model=self._spec, current="now", seed=self._control.seed,
        )
        moves = len(current.moves_to(found.plan))
        seen = self._with_gain(seen, table, moves, planning_us, numbers)
        second = self._control.policy.decide(seen)
        if second.action != "switch":
            return self._note("leave it", second.reason, numbers)
        if not self._control.advise_only:
            self._switch(current, found.plan, numbers)
        return self._note("apply", second.reason, numbers)

    def _observe(self, window: RoutingTrace, numbers: dict[str, float]) -> Observation:
        bits, floor = None, 0.0
        if self._planned_for is not None:
            moved = drift(self._planned_for, window, seed=self._control.seed, shuffles=50)
            bits, floor = moved.bits, moved.floor_bits or 0.0
            numbers |= {"drift_bits": bits, "drift_floor_bits": floor}
        tokens = sum(w.num_tokens for w in self._windows)
        return Observation(
            step=self._group.step,
            last_look_step=self._last_look,
            tokens_since_switch=tokens,
            drift_bits=bits,
            drift_floor_bits=floor,
            rollbacks=self._rollbacks,
        )

    def _candidate(self, cluster: Cluster) -> PlanResult:
        """A better plan for the older part of the traffic kept; the newer part judges it."""
        trace, current = self._planning(), self._group.plan
        if self._control.candidates == "replan":
            return plan(
                trace, cluster, objective="time", model=self._spec, steps=RECORDED,
                dispatch=current.dispatch, seed=self._control.seed, effort=self._control.effort,
            )
        return rebalance(
            current, trace, cluster, objective="time", model=self._spec, steps=RECORDED,
            max_moves=self._control.max_moves, seed=self._control.seed,
            effort=self._control.effort,
        )

    def _with_gain(
        self,
        seen: Observation,
        table: Comparison,
        moves: int,
        planning_us: float,
        numbers: dict[str, float],
    ) -> Observation:
        now, new = table.row("now"), table.row("new")
        gain = now.metric - new.metric
        low = -new.change_high_percent / 100.0 * now.metric
        move_bytes = moves * float(self._spec.bytes_per_expert_E()[0])
        move_us = move_bytes * self._us_per_byte
        if self._control.planning_shares_cores:
            move_us += planning_us
        numbers |= {
            "step_now_us": now.metric, "step_new_us": new.metric, "gain_us": gain,
            "gain_low_us": low, "moves": float(moves), "move_bytes": move_bytes,
            "move_us": move_us, "planning_us": planning_us,
        }
        return dataclasses.replace(
            seen, gain_us=gain, gain_low_us=low, move_us=move_us, moves=moves
        )

    # ---- acting ----------------------------------------------------------------------------

    def _switch(self, before: Plan, target: Plan, numbers: dict[str, float]) -> None:
        report = self._group.apply(target, epoch=self._group.epoch)
        steps = self._group.measurements(self._seen_step)
        stall_us = float(steps.stage_us.max(axis=1, initial=0.0).sum()) if len(steps.step) else 0.0
        if report.moved_bytes and stall_us:
            self._us_per_byte = stall_us / report.moved_bytes
        numbers |= {"stage_us": stall_us, "commit_us": report.commit_us}
        error = numbers.get("fit_error", 0.0)
        self._promise = _Promise(before, numbers["gain_us"], self._cluster, error)
        self._planned_for = concatenate(self._windows)
        self._windows = []

    def _judge_promise(
        self,
        promise: _Promise,
        window: RoutingTrace,
        measured: Measurements,
        numbers: dict[str, float],
    ) -> Entry | None:
        """The critical path measured, against what the plan before would have cost on the same
        tokens by the times measured under it. Goes back when that is clearly less."""
        if not len(measured.step):
            return None
        kept_us = predicted(
            promise.before, window, promise.cluster, self._spec, None
        ).critical_path_us
        realised_us = kept_us - float(measured.critical_us.mean())
        numbers |= {"promised_gain_us": promise.gain_us, "realised_gain_us": realised_us}
        if realised_us >= -(self._control.worse_by + promise.error) * kept_us:
            self._rollbacks = 0
            return None
        self._rollbacks += 1
        if not self._control.advise_only:
            self._group.apply(promise.before, epoch=self._group.epoch)
        self._windows = []
        self._last_look = self._group.step      # the back-off counts from here
        reason = (
            f"measured worse than promised: {realised_us:.0f} us a step where "
            f"{promise.gain_us:.0f} were promised; the plan before is back in force"
        )
        return self._note("leave it", reason, numbers, rolled_back=True)

    # ---- what is known ---------------------------------------------------------------------

    def _keep(self, window: RoutingTrace) -> None:
        self._windows = [*self._windows, window][-self._control.windows_kept :]
        if self._planned_for is None:
            self._planned_for = window

    def _planning(self) -> RoutingTrace:
        whole = concatenate(self._windows)
        return whole.split(0.5, by="request", seed=self._control.seed)[0]

    def _judging(self) -> RoutingTrace:
        whole = concatenate(self._windows)
        return whole.split(0.5, by="request", seed=self._control.seed)[1]

    def _calibrated(
        self, window: RoutingTrace, measured: Measurements
    ) -> tuple[Cluster, dict[str, float]]:
        """The cluster with this machine's measured expert times, once there are enough steps."""
        numbers = {"tokens": float(window.num_tokens), "steps": float(len(measured.step))}
        if len(measured.step):
            numbers["critical_us"] = float(measured.critical_us.mean())
        whole = len(np.unique(_steps_of(window))) == len(measured.step)
        one_plan = len(set(measured.epoch.tolist())) == 1
        if not whole or not one_plan or len(measured.step) < _FEWEST_STEPS_TO_FIT:
            return self._cluster, numbers
        if self._kernel is None:
            self._kernel = fit_kernel(self._spec)
        fit = scale_to_live(self._kernel, measured, window, self._group.plan, self._cluster)
        numbers["fit_error"] = fit.live_error
        hardware = machine(fit, self._spec, self._cluster.hardware)
        self._cluster = self._cluster.model_copy(update={"hardware": hardware})
        return self._cluster, numbers

    def _note(
        self, answer: Answer, reason: str, numbers: dict[str, float], *, rolled_back: bool = False
    ) -> Entry:
        entry = Entry(self._group.step, answer, reason, dict(numbers), rolled_back)
        self.entries.append(entry)
        if self._log is not None:
            with open(self._log, "a", encoding="utf-8") as out:
                out.write(json.dumps(entry.to_dict()) + "\n")
        self._on_entry(entry)
        return entry


def _steps_of(trace: RoutingTrace) -> Any:
    assert trace.step is not None
    return trace.step
