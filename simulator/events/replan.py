"""Re-planning while serving: the policies of `placement/rebalancing/policy.py` acting on a
simulated service.

The very decisions a live controller takes: after every window of steps look at what was routed,
ask the policy whether to look for a plan and whether to switch, and switch in one of the ways of
`migration.py`. Knows windows and plans. Knows nothing of live workers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ...errors import InfeasibleError, InputError, UsageError
from ...placement.comparison.compare import compare
from ...placement.plan import Plan
from ...placement.planning.planner import plan as make_plan
from ...placement.rebalancing.policy import Observation, Policy
from ...placement.rebalancing.rebalance import rebalance
from ...placement.rebalancing.survivors import survivors_plan
from ...traces.analysis.drift import drift
from ...traces.merge import concatenate
from ...traces.steps import StepSampler
from ...traces.trace import RoutingTrace
from ..serving.result import SimulationResult
from ..serving.simulate import Run
from ..serving.token_source import TokenSource
from .plan_switch import MODES, Mode, begin_switch, switch_cost

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Replanning:
    """A policy at work on one serving group.

    window_steps: between two looks at what was routed. window_tokens: of them kept, a sample.
    windows_kept: a candidate is made from one half of their requests and judged on the other.
    candidates: "rebalance" moves at most `max_moves` experts; "replan" starts from nothing with
    `method`. steps: how traffic is cut into steps to judge on. planning_us: what finding a
    candidate costs the service; 0 = it happens elsewhere.
    """

    policy: Policy
    window_steps: int = 500
    window_tokens: int = 8192
    windows_kept: int = 4
    candidates: Literal["rebalance", "replan"] = "rebalance"
    method: str = "auto"
    max_moves: int | None = None
    mode: Mode = "hidden"
    steps: StepSampler = dataclasses.field(default_factory=StepSampler)
    effort: str = "fast"
    planning_us: float = 0.0
    group: int = 0

    def start(self, run: Run) -> None:
        if self.window_steps < 1 or self.window_tokens < 1 or self.windows_kept < 1:
            raise UsageError("Replanning: window_steps, window_tokens, windows_kept must be >= 1")
        if self.mode not in MODES or self.candidates not in ("rebalance", "replan"):
            raise UsageError(
                f"Replanning: mode {self.mode!r} of {', '.join(MODES)}; candidates "
                f"{self.candidates!r} of rebalance, replan"
            )
        if not 0 <= self.group < len(run.loop.groups):
            raise InputError(f"Replanning.group {self.group}: {len(run.loop.groups)} groups")
        watcher = _Watcher(self, run)
        run.loop.groups[self.group].on_step.append(watcher.step_done)


class _Watcher:
    """What one replanning remembers between windows."""

    def __init__(self, spec: Replanning, run: Run) -> None:
        self.spec, self.run = spec, run
        self.steps = 0
        self.last_look = 0
        self.first_request = 0
        self.windows: list[RoutingTrace] = []
        self.planned_for: RoutingTrace | None = None
        self.tokens_since_switch = 0
        self.switching = False

    def step_done(self) -> None:
        """Count; at the end of a window, decide."""
        self.steps += 1
        if self.steps % self.spec.window_steps == 0 and not self.switching:
            window = self._window()
            if window is not None:
                self._decide(window)

    def _window(self) -> RoutingTrace | None:
        """A sample of what the requests taken up since the last window have routed."""
        started = self.run.loop.requests.start_ns
        first, last = self.first_request, self.first_request
        while last < len(started) and started[last] >= 0:
            last += 1
        if last == first:
            return None
        self.first_request = last
        requests = np.arange(first, last)
        each = max(1, self.spec.window_tokens // len(requests))
        window = sample_requests(self.run.source, self.run.router.trace, requests, each,
                                 self.run.loop.workload.prompt_tokens)
        self.windows = [*self.windows, window][-self.spec.windows_kept :]
        self.planned_for = self.planned_for or window
        self.tokens_since_switch += window.num_tokens
        return window

    def _decide(self, window: RoutingTrace) -> None:
        spec, run = self.spec, self.run
        seen = self._observe(window)
        first = spec.policy.decide(seen)
        if first.action == "keep":
            return
        self.last_look = self.steps
        current = run.in_force.of(spec.group).plan
        try:
            candidate, seen = self._candidate(current, seen)
        except InputError as error:
            run.log("leave it", f"not enough data: {error}")
            return
        except InfeasibleError as error:
            run.log("cannot", str(error))
            return
        second = spec.policy.decide(seen)
        run.log("apply" if second.action == "switch" else "leave it", second.reason)
        if spec.planning_us > 0:
            run.loop.groups[spec.group].at_boundary(lambda _now: round(spec.planning_us * 1e3))
        if second.action == "switch":
            self.switching = True
            begin_switch(run, candidate, spec.mode, group=spec.group, done=self._switched,
                         refused=self._refused)

    def _observe(self, window: RoutingTrace) -> Observation:
        assert self.planned_for is not None
        moved = drift(self.planned_for, window, seed=self.run.seed, shuffles=20)
        return Observation(
            step=self.steps, last_look_step=self.last_look,
            tokens_since_switch=self.tokens_since_switch,
            drift_bits=moved.bits, drift_floor_bits=moved.floor_bits or 0.0,
        )

    def _candidate(self, current: Plan, seen: Observation) -> tuple[Plan, Observation]:
        """A plan from one half of the kept requests, its gain judged on the other half."""
        spec, router = self.spec, self.run.router
        known, judging = concatenate(self.windows).split(0.5, seed=self.run.seed)
        if spec.candidates == "replan":
            found = make_plan(known, router.cluster, method=spec.method, model=router.model,
                              steps=spec.steps, dispatch=current.dispatch, seed=self.run.seed,
                              effort=spec.effort).plan
        else:
            found = rebalance(current, known, router.cluster, model=router.model, steps=spec.steps,
                              max_moves=spec.max_moves, seed=self.run.seed,
                              effort=spec.effort).plan
        lost = self.run.in_force.of(spec.group).lost
        if lost:
            found = survivors_plan(found, lost, router.cluster, router.model)
        table = compare({"now": current, "new": found}, judging, router.cluster, steps=spec.steps,
                        model=router.model, current="now", seed=self.run.seed)
        now, new = table.row("now"), table.row("new")
        cost = switch_cost(self.run, found, spec.group)
        move_us = spec.planning_us + (0.0 if spec.mode == "hidden" else cost.us)
        return found, dataclasses.replace(
            seen, gain_us=now.metric - new.metric,
            gain_low_us=-new.change_high_percent / 100.0 * now.metric,
            move_us=move_us, moves=cost.moves,
        )

    def _refused(self, error: InfeasibleError) -> None:
        """Devices were lost while weights were on their way."""
        self.run.log("cannot", str(error))
        self.switching = False

    def _switched(self) -> None:
        self.switching = False
        self.tokens_since_switch = 0
        self.planned_for = concatenate(self.windows)
        self.windows = self.windows[-1:]


def sample_requests(
    source: TokenSource, trace: RoutingTrace, requests: IntArray, each: int, prompts: IntArray
) -> RoutingTrace:
    """The first `each` tokens of every request, as a trace whose requests are these."""
    tokens, owner = [], []
    for r in requests.tolist():
        count = int(min(each, prompts[r]))
        tokens.append(source.prompt(r, 0, count))
        more = source.answers(np.full(each - count, r), np.arange(each - count))
        tokens.append(more)
        owner.append(np.full(each, r))
    picked = trace.select(np.concatenate(tokens))
    return dataclasses.replace(
        picked, request=np.concatenate(owner).astype(np.int64), source=None, step=None
    )


@dataclass(frozen=True)
class PolicyOutcome:
    """One policy's day. What users wait is the judge: it holds steps and stalls alike."""

    name: str
    latency_mean_us: float
    latency_p99_us: float
    step_mean_us: float
    paused_us: float           # stood still for weights or planning
    switches: int
    looks: int
    moved_bytes: int


def compare_policies(
    policies: Mapping[str, Replanning],
    serve: Callable[[Sequence[Replanning]], SimulationResult],
) -> list[PolicyOutcome]:
    """The same day under each policy, least mean latency first (ties keep the order given).

    serve(happenings) runs the day; everything random in it must come from its own seed.
    """
    outcomes = []
    for name, spec in policies.items():
        result = serve([spec])
        kinds = [e.kind for e in result.events]
        outcomes.append(PolicyOutcome(
            name, result.latency.mean, result.latency.p99, result.step_time.mean,
            result.paused_us, kinds.count("apply"),
            kinds.count("apply") + kinds.count("leave it"), result.moved_bytes,
        ))
    return sorted(outcomes, key=lambda o: o.latency_mean_us)
