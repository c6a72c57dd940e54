"""rebalance(): from a standing plan to the best one within a budget of moves.

Every layer is searched from where it stands, at several budgets; the budget is then shared between
layers by gain per move. Nothing moves unless the gain shows on steps that were held back, beyond
their noise: average loads are thinned into two independent halves for that. Survivors of lost
devices are `survivors.py`.

Knows plans, traffic and budgets. Knows nothing of how weights travel or who decides (`policy.py`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..traces.profile import Profile
from ..traces.spec import ModelSpec
from ..traces.steps import StepSampler
from ..traces.trace import RoutingTrace
from .cluster import Cluster
from .cost import move_cost
from .evaluate import evaluate
from .evidence import Settings, evidence_of
from .layer_job import LayerAnswer, LayerTask, answer_with, judged, objective_W
from .layer_threads import LayerThreads
from .plan import DispatchSpec, Plan
from .planner import (
    Executor,
    PlanResult,
    assemble,
    check_current,
    layer_tasks,
    resolve_settings,
    rooms_of_layers,
    trace_digest,
)
from .planning_steps import LayerTraffic, PlanningSteps, planning_steps
from .search import search_from

FloatArray = npt.NDArray[np.float64]
SlotArray = npt.NDArray[np.int16]
Move = tuple[int, int, int]      # layer, device, expert

DEFAULT_SHARE = 0.1              # of filled slots that may move where no budget is given
LEVELS = (0.5, 1.0, 2.0)         # times an even share of the budget, tried in each layer
SURE = 2.0                       # standard errors that a gain must exceed
FEWEST_COUNTS = 16.0             # mean load below which thinning says nothing


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

    A move sends one expert's weights to a device that does not hold it; dropping a copy is free.
    max_moves, max_bytes: budgets over all layers, both kept where both are given; DEFAULT_SHARE of
    the filled slots where neither is. `.moves` lists them in order, best gain first;
    `.pays_back_after_steps` (with a model and a trace) is their transfer time over the time they
    save per step. The standing plan comes back, with no moves, where no gain can be shown.
    Raises UsageError on a bad budget, InputError where plan, trace and cluster do not match.
    """
    started = time.perf_counter()
    settings = resolve_settings(
        cluster, "auto", objective, current.dispatch if dispatch is None else dispatch, model,
        balance_slack, seed, effort, time_limit_s,
    )
    data = planning_steps(new_trace, steps)
    check_current(current, data, cluster)
    price_E = _price_of_moves(current, model, max_moves, max_bytes)
    run: Executor = LayerThreads() if executor is None else executor
    rooms = rooms_of_layers(data, settings, current)
    tasks = [
        replace(t, move_price_E=price_E) for t in layer_tasks(data, settings, rooms, current)
    ]
    ladders = list(run.map(_climb, tasks))
    levels = _share_budget(ladders)
    if not _gain_is_sure(ladders, levels):
        levels = [0] * len(tasks)
    final = [
        _FinalTask(task, 0.0 if level == 0 else ladder.budgets[level])
        for task, ladder, level in zip(tasks, ladders, levels, strict=True)
    ]
    answers = list(run.map(_finish, final))
    return _result(current, answers, ladders, data, settings, trace_digest(new_trace), started)


@dataclass(frozen=True)
class _Ladder:
    """One layer at rising budgets; index 0 is the layer as it stands.

    cost_KW: objective on held-back steps; price: what the moves cost, in shares of the budget.
    """

    slots: tuple[SlotArray, ...]
    budgets: tuple[float, ...]
    prices: tuple[float, ...]
    cost_KW: FloatArray
    noise: float                     # standard error that counting alone gives the cost


@dataclass(frozen=True)
class _FinalTask:
    task: LayerTask
    budget: float


def _climb(task: LayerTask) -> _Ladder:
    """Search the layer at every budget, judge on steps (or counts) not searched on."""
    searched, judging, noise = _halves(task)
    assert task.start_GC is not None and task.move_price_E is not None
    share = 1.0 / task.layers
    slots, budgets, prices = [task.start_GC], [0.0], [0.0]
    for level in LEVELS:
        budget = min(1.0, level * share)
        if task.expired() or budget < task.move_price_E.min():
            continue
        found = search_from(replace(searched, move_budget=budget), task.start_GC)
        slots.append(found)
        budgets.append(budget)
        prices.append(_price(task.start_GC, found, task.move_price_E))
    cost_KW = np.stack([_cost_W(judging, s) for s in slots])
    return _Ladder(tuple(slots), tuple(budgets), tuple(prices), cost_KW, noise)


def _cost_W(task: LayerTask, slots_GC: SlotArray) -> FloatArray:
    """[W] the objective on steps held back; where nothing was, on all steps searched on."""
    traffic = task.traffic
    if traffic.trace is None:
        return objective_W(task, slots_GC, None)
    if traffic.validation is not None:
        return objective_W(task, slots_GC, traffic.validation)
    assert traffic.planning is not None
    parts = [traffic.planning, *traffic.extra]
    return np.concatenate([objective_W(task, slots_GC, steps) for steps in parts])


def _halves(task: LayerTask) -> tuple[LayerTask, LayerTask, float]:
    """(task to search, task to judge by, counting noise of the judge's cost).

    With a trace the held-back steps judge. Whole counts without one are thinned: every token goes
    to one half or the other by a fair coin, which makes the halves independent samples.
    """
    loads = task.traffic.load_WE
    if loads is None:
        return task, task, 0.0
    whole = bool((loads == np.rint(loads)).all()) and loads.mean() >= FEWEST_COUNTS
    if not whole:
        return task, task, 0.0
    rng = np.random.default_rng([task.seed, task.layer, 2])
    first = rng.binomial(loads.astype(np.int64), 0.5).astype(np.float64)
    per_device = float((loads - first).sum(axis=1).mean()) / task.cluster.num_devices

    def half(part: FloatArray) -> LayerTask:
        traffic = LayerTraffic(None, None, (), None, part, task.traffic.num_experts)
        return replace(task, traffic=traffic)

    return half(first), half(loads - first), 1.0 / np.sqrt(max(per_device, 1.0))


def _finish(final: _FinalTask) -> LayerAnswer:
    """The layer searched on everything within its budget, experts that stay kept in their slots."""
    task = final.task
    assert task.start_GC is not None
    if final.budget == 0.0:
        return answer_with(task, judged(task, "current", task.start_GC))
    found = search_from(replace(task, move_budget=final.budget), task.start_GC)
    found = keep_places(task.start_GC, found)
    worse = np.nanmean(_cost_W(task, found)) >= np.nanmean(_cost_W(task, task.start_GC))
    name, slots = ("current", task.start_GC) if worse else ("rebalance", found)
    return answer_with(task, judged(task, name, slots))


def keep_places(before_GC: SlotArray, after_GC: SlotArray) -> SlotArray:
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


def _price(before_GC: SlotArray, after_GC: SlotArray, price_E: FloatArray) -> float:
    total = 0.0
    for before, after in zip(before_GC, after_GC, strict=True):
        held = set(before.tolist())
        total += sum(float(price_E[e]) for e in after.tolist() if e >= 0 and e not in held)
    return total


def _price_of_moves(
    current: Plan, model: ModelSpec | None, max_moves: int | None, max_bytes: int | None
) -> FloatArray:
    """[E] share of the whole budget that sending each expert takes, the tighter of the two."""
    for what, value in (("max_moves", max_moves), ("max_bytes", max_bytes)):
        if value is not None and value < 0:
            raise UsageError(f"{what} {value} must be at least 0")
    if max_bytes is not None and (model is None or not (model.knows_sizes or model.expert_bytes)):
        raise UsageError("max_bytes needs the experts' sizes: give model=ModelSpec, or max_moves")
    if max_moves is None and max_bytes is None:
        max_moves = int(DEFAULT_SHARE * int((current.slots >= 0).sum()))
    price_E = np.zeros(current.num_experts)
    if max_moves is not None:
        price_E = np.maximum(price_E, 1.0 / max_moves if max_moves else np.inf)
    if max_bytes is not None:
        assert model is not None
        bytes_E = model.bytes_per_expert_E().astype(np.float64)
        price_E = np.maximum(price_E, bytes_E / max_bytes if max_bytes else np.inf)
    return np.minimum(price_E, 1e9)


def _share_budget(ladders: list[_Ladder]) -> list[int]:
    """Level of each layer: always the step up with most gain per price that still fits."""
    levels, left = [0] * len(ladders), 1.0 + 1e-9
    while True:
        best, best_rate = None, 0.0
        for layer, ladder in enumerate(ladders):
            mean_K = np.nanmean(ladder.cost_KW, axis=1) if ladder.cost_KW.size else np.zeros(1)
            at = levels[layer]
            for level in range(len(ladder.slots)):
                gain = float(mean_K[at] - mean_K[level])
                price = ladder.prices[level] - ladder.prices[at]
                if gain <= 0 or price > left:
                    continue
                rate = gain / max(price, 1e-12)
                if rate > best_rate:
                    best, best_rate = (layer, level, price), rate
        if best is None:
            return levels
        layer, level, price = best
        levels[layer] = level
        left -= price


def _gain_is_sure(ladders: list[_Ladder], levels: list[int]) -> bool:
    """Whether the mean gain over layers exceeds SURE standard errors of its noise."""
    gain_LW = np.stack(
        [ladder.cost_KW[0] - ladder.cost_KW[level]
         for ladder, level in zip(ladders, levels, strict=True)]
    )
    gain = float(np.nanmean(gain_LW)) if np.isfinite(gain_LW).any() else 0.0
    if gain <= 0:
        return False
    counting = float(np.sqrt(np.mean([x.noise**2 for x in ladders]) / len(ladders)))
    gain_W = np.nanmean(gain_LW, axis=0)
    steps = len(gain_W)
    sampling = float(np.nanstd(gain_W, ddof=1) / np.sqrt(steps)) if steps > 1 else 0.0
    return gain > SURE * float(np.hypot(counting, sampling))


def _result(
    current: Plan,
    answers: list[LayerAnswer],
    ladders: list[_Ladder],
    data: PlanningSteps,
    settings: Settings,
    digest: str,
    started: float,
) -> PlanResult:
    evidence = evidence_of(answers, data, settings)
    made = assemble(answers, data, settings, "rebalance", digest, evidence)
    moves = current.moves_to(made)
    gain_L = [
        float(np.nanmean(x.cost_KW[0]) - min(np.nanmean(x.cost_KW, axis=1))) for x in ladders
    ]
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
