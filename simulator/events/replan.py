"""Re-planning while serving: the control loop of a live group, at work on a simulated service.

The eyes and hands of `placement/rebalancing/proposal.py`, which decides, as it does for a live
group: after every window of steps a sample of what its requests routed goes there, and a switch
is carried out in one of the ways of `plan_switch.py`. What a switch was worth is judged by the
steps served since, against what the plan before would have taken for the very same steps on
devices without faults, times what steps took longer than that before the switch; so faults mislead
this loop as they mislead a live one. Where steps are drawn from the whole workload though its mix
of domains drifts, they say nothing of the traffic that the loop sees, and no switch is undone.
Knows windows and events. Knows nothing of live workers.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...errors import InfeasibleError, InputError, UsageError
from ...foundation.arrays import IntArray
from ...placement.plan import Plan
from ...placement.rebalancing.policy import Policy
from ...placement.rebalancing.proposal import (
    FEWEST_STEPS,
    Candidates,
    CandidateSearch,
    Entry,
    LoopMemory,
    Prices,
    Promise,
    Proposal,
    Situation,
    SwitchPrice,
    propose,
    settle,
    unsteadiness,
)
from ...traces.steps import StepSampler
from ...traces.trace import RoutingTrace
from ..serving.batching import Batch
from ..serving.simulate import Run
from ..serving.token_source import TokenSource
from .plan_switch import MODES, Mode, begin_switch, switch_cost

KEPT_FACTORS = 16      # windows whose speeds are kept


def _unheard(_entry: Entry) -> None:
    """No one listens to the decisions."""


@dataclass(frozen=True)
class Replanning:
    """A policy at work on one serving group.

    window_steps: between two looks at what was routed. window_tokens: of them kept, a sample.
    windows_kept: how many windows a plan is made from at most; those before the newest only where
    traffic has not drifted since. candidates: "rebalance" moves at most `max_moves` experts;
    "replan" starts from nothing with `method`. steps: how traffic is cut into steps to judge on.
    planning_us: what finding a candidate costs the service; 0 = it happens elsewhere. worse_by:
    share of a step by which a switch may measure worse than promised before it is undone.
    on_entry: hears of every decision, looks or not.
    """

    policy: Policy
    window_steps: int = 500
    window_tokens: int = 8192
    windows_kept: int = 4
    candidates: Candidates = "rebalance"
    method: str = "auto"
    max_moves: int | None = None
    mode: Mode = "hidden"
    steps: StepSampler = dataclasses.field(default_factory=StepSampler)
    effort: str = "fast"
    planning_us: float = 0.0
    group: int = 0
    worse_by: float = 0.01
    on_entry: Callable[[Entry], None] = dataclasses.field(default=_unheard, compare=False)

    def start(self, run: Run) -> None:
        if self.window_steps < 1 or self.window_tokens < 1 or self.windows_kept < 1:
            raise UsageError("Replanning: window_steps, window_tokens, windows_kept must be >= 1")
        if self.mode not in MODES or self.candidates not in ("rebalance", "replan"):
            raise UsageError(
                f"Replanning: mode {self.mode!r} of {', '.join(MODES)}; candidates "
                f"{self.candidates!r} of rebalance, replan"
            )
        if not self.worse_by >= 0:
            raise UsageError(f"Replanning: worse_by {self.worse_by} must be >= 0")
        if not 0 <= self.group < len(run.loop.groups):
            raise InputError(f"Replanning.group {self.group}: {len(run.loop.groups)} groups")
        if self.policy.name != "never" and not run.timer.follows_traffic:
            run.notes.append(
                "switches are not judged by what they measure: steps are drawn from the domains of "
                "the whole workload; give BankSpec windows"
            )
        loop = _ControlLoop(self, run)
        run.loop.groups[self.group].on_start.append(loop.step_began)
        run.loop.groups[self.group].on_step.append(loop.step_done)


@dataclass(frozen=True)
class _SimulatedPromise(Promise[Plan]):
    """A switch that was made and is not yet judged."""

    factor: float      # what steps took over what they take without faults, before the switch


@dataclass(frozen=True)
class _Step:
    """A step that ran: what it took, and what it takes without faults, under either plan."""

    epoch: int
    took_us: float
    faultless_us: float
    before_us: float       # under the plan before the last switch, while that is to be judged


class _ControlLoop:
    """One group's control loop: its memory, and what it measured of the steps of a window."""

    def __init__(self, spec: Replanning, run: Run) -> None:
        self.spec, self.run = spec, run
        self.search = CandidateSearch(
            spec.candidates, spec.method, spec.max_moves, spec.steps, spec.effort, run.seed
        )
        self.memory = LoopMemory()
        self.promise: _SimulatedPromise | None = None
        self.steps = 0
        self.first_request = 0
        self.switching = False
        self.factors: list[float] = []       # of the last windows
        self.error = 0.0                     # relative, of times predicted with the last factor
        self._begun: _Step | None = None
        self._measured: list[_Step] = []     # in this window

    # ---- eyes ------------------------------------------------------------------------------

    def step_began(self, batch: Batch, duration_ns: int) -> None:
        """Price it again without faults."""
        run, group = self.run, self.run.loop.groups[self.spec.group]
        faultless = dataclasses.replace(
            run.active.of(self.spec.group), slowdown_G=None, nic_share_G=None
        )
        before_us = 0.0
        if self.promise is not None:
            before = dataclasses.replace(faultless, plan=self.promise.before)
            before_us = run.timer.again_us(batch, group, before)
        self._begun = _Step(
            group.epoch, duration_ns / 1e3, run.timer.again_us(batch, group, faultless), before_us
        )

    def step_done(self) -> None:
        """Count; at the end of a window, decide."""
        assert self._begun is not None
        self._measured.append(self._begun)
        self.steps += 1
        if self.steps % self.spec.window_steps == 0:
            if not self.switching:
                window = self._window()
                if window is not None:
                    self._decide(window)
            self._measured = []

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
        return sample_requests(self.run.source, self.run.router.trace, requests, each,
                               self.run.loop.workload.prompt_tokens)

    def _measure(self, steps: list[_Step], numbers: dict[str, float]) -> None:
        """How much longer steps take here than without faults, and how certain that is."""
        ratio_W = np.array([s.took_us / s.faultless_us for s in steps])
        factor = float(np.median(ratio_W))
        self.factors = [*self.factors, factor][-KEPT_FACTORS:]
        self.error = float(np.median(np.abs(ratio_W / factor - 1.0))) + unsteadiness(self.factors)
        numbers["fit_error"] = self.error

    # ---- the loop --------------------------------------------------------------------------

    def _decide(self, window: RoutingTrace) -> None:
        spec, run = self.spec, self.run
        epoch = run.loop.groups[spec.group].epoch
        under = [s for s in self._measured if s.epoch == epoch]
        self.memory = self.memory.saw(window, window.num_tokens, kept=spec.windows_kept)
        numbers = {"tokens": float(window.num_tokens), "steps": float(len(under))}
        if self._settled_by_going_back(under, epoch, numbers):
            return
        if len(under) >= FEWEST_STEPS:
            self._measure(under, numbers)
        proposal = propose(self.memory, self._situation(), spec.policy, self.search, self._prices())
        numbers |= proposal.numbers
        if proposal.looked:
            self.memory = self.memory.looked(self.steps)
            run.log(proposal.answer, proposal.reason)
        if proposal.plan is not None and spec.planning_us > 0:
            run.loop.groups[spec.group].at_boundary(lambda _now: round(spec.planning_us * 1e3))
        if proposal.answer == "apply":
            self._switch(proposal)
        spec.on_entry(Entry(self.steps, proposal.answer, proposal.reason, numbers))

    def _situation(self) -> Situation:
        router, condition = self.run.router, self.run.active.of(self.spec.group)
        return Situation(
            self.steps, condition.plan, router.cluster, router.model, dispatch=router.dispatch,
            overlap=router.overlap, lost=condition.lost,
        )

    def _prices(self) -> Prices:
        """A switch takes what the links need for it, unless it hides; looking, `planning_us`."""

        def switch_to(candidate: Plan) -> SwitchPrice:
            cost = switch_cost(self.run, candidate, self.spec.group)
            felt_us = 0.0 if self.spec.mode == "hidden" else cost.us
            return SwitchPrice(cost.moves, float(cost.bytes), felt_us)

        readings = itertools.chain((0.0,), itertools.repeat(self.spec.planning_us))
        return Prices(switch_to, lambda: next(readings), looking_is_felt=True)

    # ---- hands -----------------------------------------------------------------------------

    def _switch(self, proposal: Proposal) -> None:
        assert proposal.plan is not None and proposal.made_for is not None
        before, made_for = self.run.active.of(self.spec.group).plan, proposal.made_for
        gain_us = proposal.numbers["gain_us"]

        def switched() -> None:
            if self.run.timer.follows_traffic:
                factor = self.factors[-1] if self.factors else 1.0
                epoch = self.run.loop.groups[self.spec.group].epoch
                self.promise = _SimulatedPromise(before, epoch, gain_us, self.error, factor)
            self.memory = self.memory.switched(made_for)
            self.switching = False

        self._begin(proposal.plan, switched)

    def _settled_by_going_back(
        self, under: list[_Step], epoch: int, numbers: dict[str, float]
    ) -> bool:
        """Judge the last switch, once, on the first window that can; whether it is undone."""
        promise = self.promise
        if promise is None:
            return False
        if promise.epoch != epoch:            # faults have changed plans meanwhile
            self.promise = None
            return False
        if not promise.can_be_judged(len(under), self.spec.window_steps):
            return False
        found = settle(
            promise, float(np.mean([s.took_us for s in under])),
            promise.factor * float(np.mean([s.before_us for s in under])), self.spec.worse_by,
        )
        numbers |= found.numbers
        if found.kept:
            self.promise, self.memory = None, self.memory.confirmed()
            return False

        def undone() -> None:
            self.promise, self.memory = None, self.memory.undone(self.steps)
            self.switching = False

        self.run.log("roll back", found.reason)
        self._begin(promise.before, undone)
        self.spec.on_entry(Entry(self.steps, "leave it", found.reason, numbers, rolled_back=True))
        return True

    def _begin(self, plan: Plan, done: Callable[[], None]) -> None:
        self.switching = True
        begin_switch(self.run, plan, self.spec.mode, group=self.spec.group, done=done,
                     refused=self._refused)

    def _refused(self, error: InfeasibleError) -> None:
        """Devices were lost while weights were on their way."""
        self.run.log("cannot", str(error))
        self.switching = False


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
