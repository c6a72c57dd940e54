"""What a control loop thinks: windows of traffic come in, one decision with its numbers comes out.

The live controller and the simulated one call these functions in this order. Each keeps only eyes
and hands of its own: how traffic and times are seen, how plans are switched.

1. `LoopMemory.saw`: a window has passed.
2. `settle`: did the last switch measure worse than staying would have? Then it is undone.
3. `propose`: has traffic moved, is it time to look, is there a better plan, does it pay?
4. `LoopMemory.looked`, `.switched`, `.undone`, `.confirmed`: what was done.

A loop answers on the newest window. Its requests are split in two: a candidate is planned on one
half and judged on the other. An older window joins both halves only where chance explains how it
differs from the newest, so old traffic never hides a shift. Knows traffic, plans and prices. Knows
nothing of clocks, ranks or events; the same arguments give the same decision.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from ...errors import InputError, LoadmasterError, UsageError
from ...traces.analysis.drift import drift
from ...traces.merge import concatenate
from ...traces.model_spec import ModelSpec
from ...traces.steps import StepSampler
from ...traces.trace import RoutingTrace
from ..cluster import Cluster
from ..comparison.compare import Comparison, compare
from ..cost.overlap import Overlap
from ..held_back import EVEN_SHARE
from ..plan import DispatchSpec, Plan
from ..planning.planner import plan
from .policy import Observation, Policy
from .rebalance import rebalance
from .survivors import survivors_plan

Answer = Literal["apply", "leave it", "not enough data", "cannot"]
Candidates = Literal["rebalance", "replan"]
PlansT = TypeVar("PlansT")

DRIFT_SHUFFLES = 50    # of requests, to tell drift from chance at 5 %: at least 20 are needed
FEWEST_STEPS = 6       # measured under a plan, to judge it by them


@dataclass(frozen=True)
class Entry:
    """One decision, with what it was based on."""

    step: int
    answer: Answer
    reason: str
    numbers: dict[str, float]
    rolled_back: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


# ---- what a loop remembers ---------------------------------------------------------------------


@dataclass(frozen=True)
class LoopMemory:
    """What a control loop remembers from one window to the next.

    windows: since the last switch, newest last; those before it shaped the active plan and would
    judge it too kindly. planned_for: the traffic that the active plan was made for, or the first
    seen under it.
    """

    windows: tuple[RoutingTrace, ...] = ()
    planned_for: RoutingTrace | None = None
    tokens_since_switch: int = 0
    last_look_step: int = 0
    rollbacks: int = 0                  # switches in a row that measured worse than promised

    def saw(self, window: RoutingTrace, tokens: int, *, kept: int) -> LoopMemory:
        """A window has passed; `tokens` of it ran under the active plan. At most `kept` stay."""
        counted = dataclasses.replace(self, tokens_since_switch=self.tokens_since_switch + tokens)
        if not window.num_tokens:
            return counted
        planned_for = window if self.planned_for is None else self.planned_for
        return dataclasses.replace(
            counted, windows=(*self.windows, window)[-kept:], planned_for=planned_for
        )

    def looked(self, step: int) -> LoopMemory:
        """A candidate was sought."""
        return dataclasses.replace(self, last_look_step=step)

    def switched(self, made_for: RoutingTrace) -> LoopMemory:
        """A plan made for this traffic is active now."""
        return dataclasses.replace(self, windows=(), planned_for=made_for, tokens_since_switch=0)

    def confirmed(self) -> LoopMemory:
        """The last switch kept its promise."""
        return dataclasses.replace(self, rollbacks=0)

    def undone(self, step: int) -> LoopMemory:
        """The plan before is active again; the back-off counts from here. What the undone plan was
        made for stays: while traffic is like that, it is no reason to try again."""
        return dataclasses.replace(
            self, windows=(), tokens_since_switch=0, last_look_step=step,
            rollbacks=self.rollbacks + 1,
        )

    def other_devices(self) -> LoopMemory:
        """The number of devices changed: traffic seen before belongs to others."""
        return dataclasses.replace(self, windows=(), planned_for=None, tokens_since_switch=0)


# ---- whether a switch was worth it -------------------------------------------------------------


@dataclass(frozen=True)
class Promise(Generic[PlansT]):
    """A switch that was made and is not yet judged."""

    before: PlansT         # what to go back to
    epoch: int             # the switch's; under another one there is nothing to judge
    gain_us: float         # promised per step
    error: float           # relative, of the times that it was promised by

    def can_be_judged(self, steps: int, window_steps: int) -> bool:
        """Whether enough steps ran under the new plan, of a window of so many."""
        return steps >= min(FEWEST_STEPS, window_steps)


@dataclass(frozen=True)
class Settlement:
    """What a switch turned out to be worth."""

    kept: bool
    reason: str
    numbers: dict[str, float]


def settle(
    promise: Promise[Any], measured_us: float, kept_us: float, worse_by: float
) -> Settlement:
    """Whether a switch may stay.

    measured_us: of a step under the new plan. kept_us: what the plan before would have taken for
    the same steps, by the times measured under it. The switch is undone where it measures worse
    than staying by more than the share `worse_by` and the error of those times.
    """
    realised_us = kept_us - measured_us
    numbers = {"promised_gain_us": promise.gain_us, "realised_gain_us": realised_us}
    if realised_us >= -(worse_by + promise.error) * kept_us:
        return Settlement(True, "", numbers)
    return Settlement(
        False,
        f"measured worse than promised: {realised_us:.0f} us a step where {promise.gain_us:.0f} "
        "were promised; the plan before is active again",
        numbers,
    )


def unsteadiness(factors: Sequence[float]) -> float:
    """By how much the devices' own speed differs from one window to the next: relative root mean
    square. What is measured before and after a switch differs by as much anyway.

    factors: what steps took over what they were expected to take, a window each.
    """
    change = np.diff(np.log(factors))
    return float(np.sqrt(np.mean(change**2))) if len(change) else 0.0


# ---- whether there is a better plan ------------------------------------------------------------


@dataclass(frozen=True)
class CandidateSearch:
    """How a candidate is looked for.

    candidates: `rebalance` moves at most `max_moves` experts away from the active plan (None =
    rebalance's own budget), `replan` starts from nothing with `method`. steps: how traffic is cut
    into steps to plan for and to judge on.
    """

    candidates: Candidates = "rebalance"
    method: str = "auto"
    max_moves: int | None = None
    steps: StepSampler = field(default_factory=StepSampler)
    effort: str = "fast"
    seed: int = 0


@dataclass(frozen=True)
class Situation:
    """What is active at the end of a window.

    phase: whose tokens alone count; None = all. cluster: with times as far as the loop knows them;
    unknown_times: why it does not know them yet, empty where it does. dispatch None: the plan's
    own. lost: devices that are away.
    """

    step: int
    current: Plan
    cluster: Cluster
    model: ModelSpec
    phase: int | None = None
    unknown_times: str = ""
    dispatch: DispatchSpec | None = None
    overlap: Overlap | None = None
    lost: frozenset[int] = frozenset()


@dataclass(frozen=True)
class SwitchPrice:
    """What a switch sends, and what steps lose to it."""

    moves: int
    bytes: float
    us: float


@dataclass(frozen=True)
class Prices:
    """What looking and switching take from serving; each loop has its own.

    looking_us: what looking has taken so far, at the moment of the call. looking_is_felt: whether
    that is taken from the devices that serve, so that a switch must pay for it too.
    """

    switch_to: Callable[[Plan], SwitchPrice]
    looking_us: Callable[[], float]
    looking_is_felt: bool


@dataclass(frozen=True)
class Proposal:
    """What to do at the end of a window, and why.

    plan: the candidate, whether or not it is to be applied; None where none was found. made_for:
    the traffic that it was planned and judged on. looked: whether a candidate was sought.
    """

    answer: Answer
    reason: str
    numbers: dict[str, float]
    plan: Plan | None = None
    made_for: RoutingTrace | None = None
    looked: bool = False


def propose(
    memory: LoopMemory, now: Situation, policy: Policy, search: CandidateSearch, prices: Prices
) -> Proposal:
    """The decision at the end of a window that `memory` has seen.

    Raises UsageError on a search that means nothing; whatever else goes wrong while looking is the
    answer `cannot`.
    """
    seen, numbers = _observed(memory, now.step, policy, search.seed)
    first = policy.decide(seen)
    if first.action == "keep":
        return Proposal(
            "leave it" if first.enough_data else "not enough data", first.reason, numbers
        )
    if now.unknown_times:
        return Proposal("not enough data", now.unknown_times, numbers)
    windows = alike_windows(memory.windows, now.phase, search.seed)
    numbers["windows"] = float(len(windows))
    try:
        halves = _halves(windows, now.phase, search)
        if isinstance(halves, str):
            return Proposal("not enough data", halves, numbers, looked=True)
        return _weighed(halves, concatenate(windows), now, seen, policy, search, prices, numbers)
    except UsageError:
        raise
    except LoadmasterError as error:
        return Proposal("cannot", str(error), numbers, looked=True)


def alike_windows(
    windows: tuple[RoutingTrace, ...], phase: int | None, seed: int
) -> tuple[RoutingTrace, ...]:
    """The newest window, last, and those before it that chance alone may tell from it (5 %).

    Compared by the tokens of the phase, where one is given. Where there are too few requests to
    tell, an older window stays: together they may be enough.
    """
    if not windows:
        return ()
    newest = of_phase(windows[-1], phase)
    older = (
        w for w in windows[:-1]
        if newest.num_tokens and of_phase(w, phase).num_tokens
        and not drift(of_phase(w, phase), newest, seed=seed, shuffles=DRIFT_SHUFFLES).moved
    )
    return (*older, windows[-1])


def of_phase(trace: RoutingTrace, phase: int | None) -> RoutingTrace:
    """The tokens of one phase, where phases were recorded; None: all."""
    if phase is None or trace.phase is None:
        return trace
    return trace.select(trace.phase == phase)


def _observed(
    memory: LoopMemory, step: int, policy: Policy, seed: int
) -> tuple[Observation, dict[str, float]]:
    """What the policy reads before there is a candidate, and the numbers of it."""
    bits, floor = None, 0.0
    numbers: dict[str, float] = {}
    if policy.name != "never" and memory.planned_for is not None and memory.windows:
        moved = drift(
            memory.planned_for, memory.windows[-1], seed=seed, shuffles=DRIFT_SHUFFLES
        )
        bits, floor = moved.bits, moved.floor_bits or 0.0
        numbers = {"drift_bits": bits, "drift_floor_bits": floor}
    return Observation(
        step=step, last_look_step=memory.last_look_step,
        tokens_since_switch=memory.tokens_since_switch, drift_bits=bits, drift_floor_bits=floor,
        rollbacks=memory.rollbacks,
    ), numbers


def _halves(
    windows: tuple[RoutingTrace, ...], phase: int | None, search: CandidateSearch
) -> tuple[RoutingTrace, RoutingTrace] | str:
    """(plan on, judge on), which share no request; a sentence where there is too little for it."""
    if not windows:
        return "no traffic since the last switch"
    try:
        traffic = of_phase(concatenate(windows), phase)
        planning, judging = traffic.split(EVEN_SHARE, by="request", seed=search.seed)
        for part in (planning, judging):
            search.steps.sample(part, 1)
    except InputError as error:
        return str(error)
    return planning, judging


def _weighed(
    halves: tuple[RoutingTrace, RoutingTrace], made_for: RoutingTrace, now: Situation,
    seen: Observation, policy: Policy, search: CandidateSearch, prices: Prices,
    numbers: dict[str, float],
) -> Proposal:
    """A candidate from one half, its gain on the other, against what coming to it costs."""
    planning, judging = halves
    began_us = prices.looking_us()
    candidate = _candidate(planning, now, search)
    numbers["planning_us"] = prices.looking_us() - began_us
    table = compare(
        {"now": now.current, "new": candidate}, judging, now.cluster, objective="time",
        steps=search.steps, model=now.model, dispatch=now.dispatch, overlap=now.overlap,
        current="now", seed=search.seed,
    )
    gain = _gain(table)
    price = prices.switch_to(candidate)
    looking_us = prices.looking_us()
    cost_us = price.us + (looking_us if prices.looking_is_felt else 0.0)
    numbers |= gain | {
        "moves": float(price.moves), "move_bytes": price.bytes, "move_us": price.us,
        "looking_us": looking_us, "cost_us": cost_us,
    }
    second = policy.decide(dataclasses.replace(
        seen, gain_us=gain["gain_us"], gain_low_us=gain["gain_low_us"], move_us=cost_us,
        moves=price.moves,
    ))
    answer: Answer = "apply" if second.action == "switch" else "leave it"
    return Proposal(answer, second.reason, numbers, candidate, made_for, looked=True)


def _candidate(traffic: RoutingTrace, now: Situation, search: CandidateSearch) -> Plan:
    """A better plan for this traffic, on the devices that are there."""
    dispatch = now.current.dispatch if now.dispatch is None else now.dispatch
    if search.candidates == "replan":
        found = plan(
            traffic, now.cluster, method=search.method, objective="time", model=now.model,
            steps=search.steps, dispatch=dispatch, seed=search.seed, effort=search.effort,
        ).plan
    else:
        found = rebalance(
            now.current, traffic, now.cluster, objective="time", model=now.model,
            steps=search.steps, dispatch=dispatch, max_moves=search.max_moves, seed=search.seed,
            effort=search.effort,
        ).plan
    return survivors_plan(found, now.lost, now.cluster, now.model) if now.lost else found


def _gain(table: Comparison) -> dict[str, float]:
    """Of a step, in us: under both plans, what the new one saves, and the low end of its band."""
    now, new = table.row("now"), table.row("new")
    return {
        "step_now_us": now.metric, "step_new_us": new.metric, "gain_us": now.metric - new.metric,
        "gain_low_us": -new.change_high_percent / 100.0 * now.metric,
    }
