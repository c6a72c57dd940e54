"""How many moves each layer should make: budgets are tried, judged, shared out and confirmed.

A ladder is one layer at rising budgets of moves, searched on each half of the traffic and judged on
the other. Which layer gets how much is decided on one judging half, and what that is worth is read
from the other: the best of many figures flatters itself. Knows layers' tasks and halves. Knows
nothing of plans.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ...foundation.arrays import FloatArray, SlotArray
from ..comparison.bootstrap import Redrawn
from ..comparison.intervals import standard_error
from ..planning_traffic import LayerTraffic
from ..search.layer_search import search_from
from ..search.layer_task import LayerTask, objective_W
from .move_budget import sent

LEVELS = (0.5, 1.0, 2.0)         # times an even share of the budget, tried in each layer
SURE = 2.0                       # standard errors that a gain must exceed
FEWEST_COUNTS = 16.0             # mean load below which thinning says nothing
MOST_COUNTS = 1e12               # and above which it changes nothing that is seen
ROUNDING = 1e-9                  # of the budget: prices are added up in different orders


@dataclass(frozen=True)
class BudgetSweep:
    """One layer at rising budgets; index 0 is the layer as it is.

    slots_FK[f][k]: searched on half f. price_FK: what its moves cost, in shares of the budget.
    cost_FKW[f]: [K, W] its objective on the other half's steps. wide_FK: its mean objective on
    those and on steps of other concurrencies: where all steps are balanced already, these still
    tell how much a placement can take. counting: standard error of a device's level, known of
    average loads; of requests `redrawn_gain` tells.
    """

    budgets: tuple[float, ...]
    slots_FK: tuple[tuple[SlotArray, ...], ...]
    price_FK: FloatArray
    cost_FKW: tuple[FloatArray, ...]
    wide_FK: FloatArray
    counting: float

    def gain_W(self, half: int, level: int) -> FloatArray:
        """Of a budget over no moves, step by step; 0 in steps without tokens."""
        cost_KW = self.cost_FKW[half]
        return np.asarray(np.nan_to_num(cost_KW[0] - cost_KW[level]), np.float64)

    @property
    def gain_FK(self) -> FloatArray:
        """Of every budget over no moves, by which levels are chosen."""
        return self.wide_FK[:, :1] - self.wide_FK


@dataclass(frozen=True)
class Climb:
    """A layer to search at every budget. halves: None = average loads, thinned into two."""

    task: LayerTask
    halves: tuple[LayerTraffic, LayerTraffic] | None

    def __call__(self) -> BudgetSweep:
        task = self.task
        assert task.start_GC is not None and task.move_price_E is not None
        if task.expired():
            return _stays(task.start_GC)
        halves, counting = (self.halves, 0.0) if self.halves else _thinned(task)
        budgets = budgets_of(task.move_price_E, task.layers)
        slots_FK, price_FK, cost_FKW, wide_FK = [], [], [], []
        for searched, judging in (halves, halves[::-1]):
            slots_K = [task.start_GC]
            for budget in budgets[1:]:
                if task.expired():
                    slots_K.append(task.start_GC)
                    continue
                part = replace(task, traffic=searched, move_budget=budget)
                slots_K.append(search_from(part, task.start_GC))
            judge = replace(task, traffic=judging)
            slots_FK.append(tuple(slots_K))
            price_FK.append(
                [float(task.move_price_E[sent(task.start_GC, s)].sum()) for s in slots_K]
            )
            cost_KW, wide_K = zip(*(judged_on(judge, s) for s in slots_K), strict=True)
            cost_FKW.append(np.stack(cost_KW))
            wide_FK.append(wide_K)
        return BudgetSweep(
            budgets, tuple(slots_FK), np.array(price_FK), tuple(cost_FKW), np.array(wide_FK),
            counting,
        )


def _stays(slots_GC: SlotArray) -> BudgetSweep:
    """A layer whose time was up before it began: it offers no moves."""
    nothing = np.zeros((2, 1))
    return BudgetSweep(
        (0.0,), ((slots_GC,), (slots_GC,)), nothing, (nothing[:1], nothing[:1]), nothing, 0.0
    )


def judged_on(task: LayerTask, slots_GC: SlotArray) -> tuple[FloatArray, float]:
    """(objective in each of the task's steps, its mean on them and on the extra ones)."""
    traffic = task.traffic
    cost_W = objective_W(task, slots_GC, traffic.planning)
    wide_W = np.concatenate([cost_W, *(objective_W(task, slots_GC, x) for x in traffic.extra)])
    used = np.isfinite(wide_W)
    return cost_W, float(wide_W[used].mean()) if used.any() else 0.0


def climb(work: Climb) -> BudgetSweep:
    """The layer's ladder, as a job."""
    return work()


def budgets_of(price_E: FloatArray, layers: int) -> tuple[float, ...]:
    """0, then every level's; none too small for the cheapest expert, none above the whole."""
    least = float(price_E.min())
    if least > 1.0:
        return (0.0,)
    found = {min(1.0, max(level / layers, least)) for level in LEVELS}
    return (0.0, *sorted(found))


def _thinned(task: LayerTask) -> tuple[tuple[LayerTraffic, LayerTraffic], float]:
    """(two halves of average loads, standard error that counting gives a device's level).

    Of whole counts every token goes to one half or the other by a fair coin, which makes the
    halves independent samples. Other loads tell nothing of their noise: both halves are all there
    is, and every gain counts as significant. So do counts so large that theirs is nothing.
    """
    loads, unit = task.traffic.load_WE, task.traffic.counted
    assert loads is not None
    if unit is None or not FEWEST_COUNTS <= loads.mean() * unit <= MOST_COUNTS:
        return (task.traffic, task.traffic), 0.0
    counts = np.rint(loads * unit)
    rng = np.random.default_rng([task.seed, task.layer, 2])
    first = rng.binomial(counts.astype(np.int64), 0.5).astype(np.float64)
    first_part, second_part = (
        replace(task.traffic, load_WE=part / unit) for part in (first, counts - first)
    )
    per_device = float((counts - first).sum(axis=1).mean()) / task.cluster.num_devices
    return (first_part, second_part), 1.0 / float(np.sqrt(max(per_device, 1.0)))


# ---- sharing the budget -------------------------------------------------------------------------


def share_budget(gain_LK: list[FloatArray], price_LK: list[FloatArray]) -> list[int]:
    """Level of each layer: always the step up with most gain per price that still fits."""
    levels, left = [0] * len(gain_LK), 1.0 + ROUNDING
    while True:
        best, best_rate = None, 0.0
        for layer, (gain_K, price_K) in enumerate(zip(gain_LK, price_LK, strict=True)):
            at = levels[layer]
            for level in range(len(gain_K)):
                gain = float(gain_K[level] - gain_K[at])
                price = float(price_K[level] - price_K[at])
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


def chosen_levels(sweeps: list[BudgetSweep]) -> list[int]:
    """By what both halves say; a level costs what the dearer of its two searches took."""
    return share_budget(
        [x.gain_FK.mean(axis=0) for x in sweeps], [x.price_FK.max(axis=0) for x in sweeps]
    )


def allowances(sweeps: list[BudgetSweep], levels: list[int]) -> list[float | None]:
    """Budget of each layer's last search, together at most the whole; None = stay.

    What its searches took; then, in order of gain, up to the level's own budget.
    """
    price_L = [float(x.price_FK[:, k].max()) for x, k in zip(sweeps, levels, strict=True)]
    left = 1.0 - sum(price_L)
    gain_L = [float(x.gain_FK[:, k].mean()) for x, k in zip(sweeps, levels, strict=True)]
    for layer in sorted(range(len(sweeps)), key=lambda i: (-gain_L[i], i)):
        if levels[layer]:
            more = min(sweeps[layer].budgets[levels[layer]] - price_L[layer], left)
            price_L[layer] += max(0.0, more)
            left -= max(0.0, more)
    return [
        price * (1 + ROUNDING) if k else None for price, k in zip(price_L, levels, strict=True)
    ]


# ---- is it significant --------------------------------------------------------------------------


def crossed_levels(sweeps: list[BudgetSweep]) -> tuple[list[int], list[int]]:
    """[F][L] levels by which half f's searches are judged: chosen by the other half's figures."""
    chosen = [
        share_budget([x.gain_FK[f] for x in sweeps], [x.price_FK[f] for x in sweeps])
        for f in range(2)
    ]
    return chosen[1], chosen[0]


def crossed_gains(
    sweeps: list[BudgetSweep], levels_FL: tuple[list[int], list[int]]
) -> list[float]:
    """[F] gain over all layers at these levels."""
    return [
        sum(float(x.gain_W(f, k).mean()) for x, k in zip(sweeps, levels_FL[f], strict=True))
        for f in range(2)
    ]


@dataclass(frozen=True)
class Redraw:
    """One layer's change, to be judged on other draws of the requests it was judged by."""

    task: LayerTask
    traffic: LayerTraffic
    redrawn: Redrawn
    slots_GC: SlotArray


def redrawn_gain(work: Redraw) -> FloatArray:
    """[W] gain of the change in each step of all draws; 0 in steps without tokens.

    NaN alone: there is no time left to tell.
    """
    if work.task.expired():
        return np.full(1, np.nan)
    steps = work.redrawn.steps
    task = replace(work.task, traffic=replace(work.traffic, planning=steps))
    assert task.start_GC is not None
    gain_W = objective_W(task, task.start_GC, steps) - objective_W(task, work.slots_GC, steps)
    return np.nan_to_num(gain_W)


def counting_error(sweeps: list[BudgetSweep], half: int, level_L: list[int]) -> float:
    """Standard error of the gain of average loads: of counting, and of windows that differ."""
    changed = [(x, k) for x, k in zip(sweeps, level_L, strict=True) if k]
    if not changed:
        return 0.0
    gain_W = np.sum([x.gain_W(half, k) for x, k in changed], axis=0)
    sampling = standard_error(gain_W) if len(gain_W) > 1 else 0.0
    return float(np.hypot(sampling, np.sqrt(sum(x.counting**2 for x, _ in changed))))


def is_significant(gain_F: list[float], error_F: list[float]) -> bool:
    """Whether the mean of both gains exceeds SURE of its standard errors."""
    return float(np.mean(gain_F)) > SURE * float(np.hypot(error_F[0], error_F[1])) / 2
