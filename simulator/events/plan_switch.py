"""Changing plans under load, and what the weights on the move cost.

Three ways: everything stops while weights move (`stop`), one layer after another between steps
(`layers`), or in the windows that a step leaves the links idle (`hidden`). Knows moves and links.
Knows nothing of why a plan changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...errors import InfeasibleError, InputError, UsageError
from ...placement.cost.step_cost import MoveCost, move_cost
from ...placement.plan import Plan
from ..serving.event_loop import BoundaryAction, Process
from ..serving.simulate import Run

Mode = Literal["stop", "layers", "hidden"]
MODES = ("stop", "layers", "hidden")
Refused = Callable[[InfeasibleError], None]


@dataclass(frozen=True)
class PlanSwitch:
    """Make `plan` active at `at_us`, in one of the three ways.

    link_share: hidden only, the part of an idle link window that transfers really use.
    """

    plan: Plan
    at_us: float = 0.0
    mode: Mode = "stop"
    link_share: float = 0.8
    group: int = 0

    def start(self, run: Run) -> None:
        if self.mode not in MODES:
            raise UsageError(f"PlanSwitch.mode {self.mode!r}: {', '.join(MODES)}")
        if not 0 < self.link_share <= 1 or not self.at_us >= 0:
            raise UsageError(
                f"PlanSwitch: link_share {self.link_share} in (0, 1], at_us {self.at_us} >= 0"
            )
        if not 0 <= self.group < len(run.loop.groups):
            raise InputError(f"PlanSwitch.group {self.group}: {len(run.loop.groups)} groups")
        run.router.check(self.plan)
        run.loop.env.process(self._wait(run))

    def _wait(self, run: Run) -> Process:
        yield run.loop.env.timeout(round(self.at_us * 1e3))
        begin_switch(run, self.plan, self.mode, group=self.group, link_share=self.link_share)


def begin_switch(
    run: Run,
    plan: Plan,
    mode: Mode,
    *,
    group: int = 0,
    link_share: float = 0.8,
    done: Callable[[], None] | None = None,
    refused: Refused | None = None,
) -> None:
    """Start changing to `plan` at the next step boundary; `done()` once it is active.

    refused(error) hears of a plan that devices lost meanwhile have made impossible, and the switch
    ends; None = raise it.
    """
    serving = run.loop.groups[group]
    finish = done or (lambda: None)     # no one waits for the switch
    if mode == "stop":
        serving.at_boundary(_heeding(refused, lambda _now: _stop(run, plan, group, finish)))
    elif mode == "layers":
        serving.at_boundary(
            _heeding(refused, lambda _now: _next_layer(run, plan, group, 0, finish, refused))
        )
    else:
        run.loop.env.process(_hide(run, plan, group, link_share, finish, refused))


def _heeding(refused: Refused | None, action: BoundaryAction) -> BoundaryAction:
    """The action; a switch that cannot be done is handed to `refused`, where there is one."""
    if refused is None:
        return action

    def heeding(now_ns: int) -> int:
        try:
            return action(now_ns)
        except InfeasibleError as error:
            refused(error)
            return 0

    return heeding


def switch_cost(run: Run, plan: Plan, group: int) -> MoveCost:
    """What changing from the active plan to `plan` sends."""
    condition = run.active.of(group)
    moves = condition.plan.moves_to(run.active.current_plan(group, plan))
    return move_cost(moves, condition.plan, run.router.model, run.router.cluster,
                     unavailable=condition.lost)


def _stop(run: Run, plan: Plan, group: int, done: Callable[[], None]) -> int:
    cost = switch_cost(run, plan, group)
    run.moved_bytes += cost.bytes
    pause_ns = round(cost.us * 1e3)
    _commit(run, plan, group, f"stopped for {cost.moves} experts, {cost.bytes} bytes", pause_ns)
    done()
    return pause_ns


def _next_layer(
    run: Run, plan: Plan, group: int, layer: int, done: Callable[[], None],
    refused: Refused | None,
) -> int:
    """Move one layer's experts, then let a step run; layers that do not change are skipped."""
    current = run.active.of(group).plan
    target = _widened(run.active.current_plan(group, plan), current)
    while layer < plan.num_layers and np.array_equal(
        _widened(current, plan).slots[layer], target.slots[layer]
    ):
        layer += 1
    if layer == plan.num_layers:
        _commit(run, plan, group, "last layer in place", 0)
        done()
        return 0
    slots = _widened(current, plan).slots.copy()
    slots[layer] = target.slots[layer]
    mixed = dataclasses.replace(current, slots=slots, evidence=None)
    cost = switch_cost(run, mixed, group)
    run.moved_bytes += cost.bytes
    pause_ns = round(cost.us * 1e3)
    _commit(run, mixed, group, f"layer {layer}: {cost.moves} experts, {cost.bytes} bytes", pause_ns)
    run.loop.groups[group].after_step(
        _heeding(refused, lambda _now: _next_layer(run, plan, group, layer + 1, done, refused))
    )
    return pause_ns


def _hide(
    run: Run, plan: Plan, group: int, link_share: float, done: Callable[[], None],
    refused: Refused | None,
) -> Process:
    """Send weights whenever no exchange uses the links; commit at the boundary after the last.

    Waits as long as the rest would take on idle links, then again as long as exchanges kept them
    busy meanwhile, until nothing is left.
    """
    cost = switch_cost(run, plan, group)
    run.moved_bytes += cost.bytes
    run.log("staging", f"{cost.moves} experts, {cost.bytes} bytes while serving")
    left_ns = round(cost.us * 1e3 / link_share)
    while left_ns > 0:
        busy_us = run.active.exchange_us_of_group[group]
        yield run.loop.env.timeout(left_ns)
        if run.loop.finished:
            return
        left_ns = round((run.active.exchange_us_of_group[group] - busy_us) * 1e3 / link_share)

    def commit(_now: int) -> int:
        _commit(run, plan, group, "staged weights", 0)
        done()
        return 0

    run.loop.groups[group].at_boundary(_heeding(refused, commit))


def _commit(run: Run, plan: Plan, group: int, detail: str, pause_ns: int) -> None:
    run.switch_plan(group, plan)
    run.log("switch", detail, pause_ns)


def _widened(plan: Plan, other: Plan) -> Plan:
    """The plan with as many slots per device as the wider of both, padded with empty ones."""
    width = max(plan.slots_per_device, other.slots_per_device)
    missing = width - plan.slots_per_device
    if not missing:
        return plan
    slots = np.pad(plan.slots, ((0, 0), (0, 0), (0, missing)), constant_values=-1)
    return dataclasses.replace(plan, slots=slots)
