"""rebalance(): from the current plan to the best one within a budget of moves.

Every layer is searched from its current slots, at several budgets, on each half of the requests and
judged on the other; the budget is then shared between layers by gain per move (`ladders.py`).
Nothing moves unless the gain shows on requests that were not searched on, beyond what other draws
of them would make of it. Survivors of lost devices are `survivors.py`.

Knows plans, traffic and budgets. Knows nothing of how weights travel or who decides (`policy.py`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from ...foundation.arrays import SlotArray
from ...foundation.parallel import Executor, LayerThreads
from ...traces.model_spec import ModelSpec
from ...traces.profile import Profile
from ...traces.steps import StepSampler
from ...traces.trace import RoutingTrace
from ..cluster import Cluster
from ..comparison.cross_validation import Half, request_halves
from ..cost.evaluate import evaluate
from ..cost.step_cost import move_cost
from ..memory import require_slots_fit
from ..plan import DispatchSpec, Plan
from ..planning.evidence import Settings, evidence_of
from ..planning.planner import (
    PlanResult,
    assemble,
    capacity_of_layers,
    check_current,
    check_model,
    layer_tasks,
    resolve_settings,
    trace_digest,
)
from ..planning_traffic import PlanningSteps, planning_steps
from ..search.layer_search import search_from, within_slots
from ..search.layer_task import HURRIED_STEPS, LayerAnswer, LayerTask, answer_with, judged
from .budget_sweep import (
    BudgetSweep,
    Climb,
    Redraw,
    allowances,
    chosen_levels,
    climb,
    counting_error,
    crossed_gains,
    crossed_levels,
    is_significant,
    redrawn_gain,
)
from .move_budget import Budget, sent

Move = tuple[int, int, int]      # layer, device, expert

TOO_FEW = "too few requests to tell a gain from chance: nothing is moved"


def rebalance(
    current: Plan,
    new_trace: RoutingTrace | Profile,
    cluster: Cluster,
    *,
    max_moves: int | None = None,
    max_bytes: int | None = None,
    objective: str | None = None,
    dispatch: str | DispatchSpec | None = None,
    steps: StepSampler = StepSampler(),  # noqa: B008  (frozen)
    model: ModelSpec | None = None,
    seed: int = 0,
    effort: str = "normal",
    executor: Executor | None = None,
    time_limit_s: float | None = None,
    balance_slack: float | None = None,
) -> PlanResult:
    """The best plan for `new_trace` within a budget of moves from `current`.

    A move sends one expert's weights to a device that does not hold it; dropping a replica is free.
    max_moves, max_bytes: budgets over all layers, both kept where both are given; DEFAULT_SHARE of
    the filled slots where neither is. `.moves` lists them in order, best gain first;
    `.pays_back_after_steps` (with a model and a trace) is their transfer time over the time they
    save per step. The current plan comes back, with no moves, where no gain can be shown.
    Raises UsageError on a bad budget, InputError where plan, trace and cluster do not match.
    """
    started = time.perf_counter()
    settings = resolve_settings(
        cluster, "auto", objective, current.dispatch if dispatch is None else dispatch, model,
        balance_slack, seed, effort, time_limit_s,
    )
    fitting = require_slots_fit(cluster, model, current)
    data = planning_steps(new_trace, steps)
    unplanned = check_model(settings, data)
    check_current(current, data, cluster)
    fitted = _fitted(current, cluster)
    budget = Budget.of(current, model, max_moves, max_bytes)
    run: Executor = LayerThreads() if executor is None else executor
    capacities = capacity_of_layers(data, settings, fitted)
    tasks = [
        replace(t, move_price_E=budget.price_E(current.num_experts))
        for t in layer_tasks(data, settings, capacities, fitted)
    ]
    allowed, gain_L, notes = _allowances(tasks, data, steps, run)
    last = [_LastSearch(task, most) for task, most in zip(tasks, allowed, strict=True)]
    answers = _within(list(run.map(_finish, last)), tasks, budget, gain_L)
    return _result(
        current, answers, gain_L, data, settings, trace_digest(new_trace), started,
        (*fitting, *unplanned, *capacities.notes, *notes),
    )


def _fitted(current: Plan, cluster: Cluster) -> Plan:
    """The current plan as wide as the cluster, each device's experts in the slots it has."""
    slots = [within_slots(x, cluster.slots_G, int(cluster.slots_G.max())) for x in current.slots]
    return replace(current, slots=np.stack(slots))


def _allowances(
    tasks: list[LayerTask], data: PlanningSteps, sampler: StepSampler, run: Executor
) -> tuple[list[float | None], list[float], tuple[str, ...]]:
    """(budget of each layer's last search, None = stay; gain of each layer; what to say)."""
    stay: list[float | None] = [None] * len(tasks)
    halves = None
    if data.trace is not None:
        halves = request_halves(data.trace, sampler, tasks[0].seed)
        if halves is None:
            return stay, [0.0] * len(tasks), (TOO_FEW,)
    until = _half_way(tasks[0].deadline)
    works = (
        Climb(
            replace(t, deadline=until),
            halves and (halves[0].data.layer(t.layer), halves[1].data.layer(t.layer)),
        )
        for t in tasks
    )
    sweeps = list(run.map(climb, works))
    level_FL = crossed_levels(sweeps)
    gain_F = crossed_gains(sweeps, level_FL)
    error_F = [0.0, 0.0]
    if sum(gain_F) > 0:
        error_F = [
            counting_error(sweeps, f, level_FL[f]) if halves is None
            else _request_error(tasks, sweeps, f, level_FL[f], halves[1 - f], run)
            for f in range(2)
        ]
    if not is_significant(gain_F, error_F):
        return stay, [0.0] * len(tasks), ()
    levels = chosen_levels(sweeps)
    gain_L = [float(x.gain_FK[:, k].mean()) for x, k in zip(sweeps, levels, strict=True)]
    return allowances(sweeps, levels), gain_L, ()


def _half_way(deadline: float | None) -> float | None:
    """When trying budgets must end, so that there is time to tell gains from chance and to move."""
    return None if deadline is None else time.time() + (deadline - time.time()) / 2


def _request_error(
    tasks: list[LayerTask], sweeps: list[BudgetSweep], half: int, level_L: list[int],
    judging: Half,
    run: Executor,
) -> float:
    """Standard error, over requests, of what half `half`'s searches gain on the other half."""
    works = (
        Redraw(t, judging.data.layer(t.layer), judging.redrawn, x.slots_FK[half][k])
        for t, x, k in zip(tasks, sweeps, level_L, strict=True) if k
    )
    gain_W = sum(run.map(redrawn_gain, works), np.zeros(1))
    if np.isnan(gain_W).any():
        return np.inf               # the time was up: what cannot be told from chance is none
    if len(gain_W) < 2:
        return 0.0
    return float(np.std(judging.redrawn.noise(gain_W), ddof=1))


@dataclass(frozen=True)
class _LastSearch:
    task: LayerTask
    most: float | None      # budget; None = stay


def _finish(last: _LastSearch) -> LayerAnswer:
    """The layer searched on everything within its budget, experts that stay kept in their slots."""
    task = last.task
    assert task.start_GC is not None
    judge = task.hurried()
    stands = judged(judge, "current", task.start_GC)
    if last.most is None or judge.in_haste:
        return answer_with(judge, stands)
    found = search_from(replace(task, move_budget=last.most), task.start_GC)
    moved = judged(task, "rebalance", keep_slots(task.start_GC, found))
    name = task.objective
    better = moved.decisive.objective(name) < stands.decisive.objective(name)
    return answer_with(task, moved if better else stands)


def _within(
    answers: list[LayerAnswer], tasks: list[LayerTask], budget: Budget, gain_L: list[float]
) -> list[LayerAnswer]:
    """The answers, counted in whole moves and bytes; layers that gain least stay where it is over.

    Budgets are searched in shares, whose sums round; this makes them hold.
    """
    sent_L = [
        sent(t.start_GC, a.slots_GC) for t, a in zip(tasks, answers, strict=True)
        if t.start_GC is not None
    ]
    kept = list(answers)
    for layer in sorted(range(len(tasks)), key=lambda i: (gain_L[i], -i)):
        if budget.covers([e for part in sent_L for e in part]):
            break
        if sent_L[layer]:
            kept[layer] = _finish(_LastSearch(tasks[layer], None))
            sent_L[layer] = []
    return kept


def keep_slots(before_GC: SlotArray, after_GC: SlotArray) -> SlotArray:
    """The same placement, experts that stay on their device in the (first) slot they had."""
    placed = np.full_like(after_GC, -1)
    for g, (before, after) in enumerate(zip(before_GC, after_GC, strict=True)):
        coming = [e for e in after.tolist() if e >= 0]
        for slot, expert in enumerate(before.tolist()):
            if expert in coming:
                placed[g, slot] = expert
                coming.remove(expert)
        free = np.flatnonzero(placed[g] < 0)[: len(coming)]
        placed[g, free] = coming
    return placed


def _result(
    current: Plan,
    answers: list[LayerAnswer],
    gain_L: list[float],
    data: PlanningSteps,
    settings: Settings,
    digest: str,
    started: float,
    notes: tuple[str, ...],
) -> PlanResult:
    """The plan, no wider than it must be; its moves, layers that gain most first."""
    used = np.flatnonzero(np.any([a.slots_GC >= 0 for a in answers], axis=(0, 1)))
    width = max(current.slots_per_device, int(used[-1]) + 1)
    answers = [replace(a, slots_GC=a.slots_GC[:, :width]) for a in answers]
    evidence = evidence_of(answers, data, settings, notes)
    made = assemble(answers, data, settings, "rebalance", digest, evidence)
    moves = current.moves_to(made)
    moves.sort(key=lambda m: (-gain_L[m[0]], *m))
    truncated = settings.deadline is not None and time.time() > settings.deadline
    return PlanResult(
        made, evidence, time.perf_counter() - started, truncated, tuple(moves),
        pay_back(current, made, moves, data, settings),
    )


def pay_back(
    current: Plan, target: Plan, moves: list[Move], data: PlanningSteps, settings: Settings
) -> float | None:
    """Steps after which the transfer is earned back; None where time is unknown or never."""
    model, steps = settings.model, data.validation or data.planning
    if steps is not None and settings.deadline is not None and time.time() > settings.deadline:
        steps = steps.take(np.arange(min(HURRIED_STEPS, len(steps))))
    if model is None or not model.knows_sizes or data.trace is None or steps is None:
        return None
    if not moves:
        return None
    both = [
        evaluate(p, data.trace, settings.cluster, steps=steps, dispatch=settings.dispatch,
                 model=model).step_time_us
        for p in (replace(current, model_digest=""), replace(target, model_digest=""))
    ]
    assert both[0] is not None and both[1] is not None
    gain_us = both[0] - both[1]
    if gain_us <= 0:
        return None
    return move_cost(moves, current, model, settings.cluster).us / gain_us
