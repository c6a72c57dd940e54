"""One layer as an integer program over its steps: better slots for small layers, and proof.

Starts from the slots that the search found, so nothing gets worse; its bound holds for every
placement under every dispatch, because tokens split freely in it. Worth its time for layers of a
few hundred experts · devices. Neighbouring layers stay as they are: balance does not couple them.

Knows per-step loads and devices of one layer. Knows nothing of traces or of what transfers cost.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import pulp

from ...foundation.arrays import BoolArray, FloatArray, SlotArray
from ..cost.lower_bounds import checked_gap
from ..methods.milp import OnGap, Solved, SolverError, binary_grid, continuous, solve
from .layer_search import search_layer
from .layer_task import LayerAnswer, LayerTask, judged

MOST_FLOWS = 3_000          # steps · experts · devices: above, one node takes too long
NODES = 200                 # of the search tree
FEWEST_STEPS = 4            # polishing on fewer learns them by heart
NOTHING_TO_GAIN = 1e-3      # gap of the search's answer below which no program is solved
SOLVER_ROUNDING = 1e-5      # taken off the program's bound
FREE_SPLIT = ("balanced", "fewest_active")


@dataclass(frozen=True)
class Polished:
    """Slots, and what the solver proved about the steps it saw."""

    slots_GC: SlotArray
    solved: Solved


def search_and_polish(task: LayerTask, on_gap: OnGap | None = None) -> LayerAnswer:
    """`search_layer`; with effort "thorough", small layers are polished on their planning steps.

    The polished slots are taken where the steps that decide say they are better. The program's
    bound counts where it saw every planning step and all devices are equally fast. When the time
    limit on time fires meanwhile the best so far is kept, `truncated`. on_gap: hears of the
    program's incumbent and bound while it is solved, in this process.
    """
    answer = search_layer(task)
    chosen_WE, whole = _steps_to_polish(task, answer)
    if not len(chosen_WE):
        return answer
    seconds = None if task.deadline is None else max(0.01, task.deadline - time.time())
    try:
        polished = polish(chosen_WE, task, answer.slots_GC, seconds=seconds, on_gap=on_gap)
    except SolverError:
        if seconds is None:
            raise                     # the start is an answer: without a time limit, a defect
        return replace(answer, truncated=True)
    better = _better_of(task, answer, polished, whole)
    return replace(better, truncated=task.expired())


def _steps_to_polish(task: LayerTask, answer: LayerAnswer) -> tuple[FloatArray, bool]:
    """([W, E] the steps of the program, whether its bound holds for all plans on all steps).

    No steps where it is not worth it.
    """
    load_WE = task.traffic.planning_WE()
    load_WE = load_WE[load_WE.sum(axis=1) > 0]
    flows_per_step = load_WE.shape[1] * len(task.slots_G)
    steps = min(len(load_WE), MOST_FLOWS // max(flows_per_step, 1))
    if (
        task.effort != "thorough" or task.objective != "balance" or task.counts_transfers
        or task.dispatch.policy not in FREE_SPLIT or steps < min(FEWEST_STEPS, len(load_WE))
        or steps == 0 or answer.truncated or task.expired()
        or answer.planning.peak <= answer.bound * (1 + NOTHING_TO_GAIN)
    ):
        return load_WE[:0], False
    chosen = np.unique(np.linspace(0, len(load_WE) - 1, steps).astype(np.int64))
    # Where memory is shared between layers, another share-out may give this one more slots.
    own_limits = task.capacity_G is None and np.array_equal(task.slots_G, task.cluster.slots_G)
    return load_WE[chosen], steps == len(load_WE) and own_limits


def _better_of(
    task: LayerTask, answer: LayerAnswer, polished: Polished, whole: bool
) -> LayerAnswer:
    """The search's answer or the polished one, by the steps that decide; the higher bound.

    Raises BoundError where the program's bound is above what the search reached.
    """
    bound, speed_G = answer.bound, task.cluster.speed_G
    if whole and speed_G.min() == speed_G.max():
        bound = max(bound, polished.solved.bound - SOLVER_ROUNDING)
        bound, _ = checked_gap(answer.planning.peak, bound, f"layer {task.layer}, polished")
    candidate = judged(task, "polished", polished.slots_GC)
    decisive = answer.planning if answer.validation is None else answer.validation
    if candidate.decisive.peak >= decisive.peak - SOLVER_ROUNDING:
        return replace(answer, bound=bound)
    planning = candidate.decisive
    if task.traffic.validation is not None:
        part = replace(task, traffic=replace(task.traffic, validation=None))
        planning = judged(part, "polished", polished.slots_GC).decisive
    return replace(
        answer, slots_GC=polished.slots_GC, name="polished", planning=planning, bound=bound,
        validation=None if answer.validation is None else candidate.decisive,
    )


def polish(
    load_WE: FloatArray, task: LayerTask, start_GC: SlotArray, *, nodes: int = NODES,
    seconds: float | None = None, on_gap: OnGap | None = None,
) -> Polished:
    """Solve the layer's program on these steps, each with some load.

    x[e][g] = 1 if device g holds expert e; y[w][e][g] tokens of e that g computes in step w.
    minimise  mean over w of z_w                loads scaled so that perfect balance is 1
    (1) sum_g y[w][e][g] = load[w][e]           every token is computed
    (2) y[w][e][g] <= load[w][e] x[e][g]        where the expert is
    (3) sum_e y[w][e][g] <= speed[g] z_w        z_w: the busiest device
    (4) sum_g x[e][g] >= 1                      every expert is somewhere
        sum_e x[e][g] <= slots[g], sum_e size[e] x[e][g] <= room[g]
    """
    loads = task.loads()
    speed_G, (steps, experts) = loads.speed_G, load_WE.shape
    devices = loads.devices
    scaled_WE = load_WE * (float(speed_G.sum()) / load_WE.sum(axis=1, keepdims=True))
    problem = pulp.LpProblem("polish", pulp.LpMinimize)
    x = binary_grid("x", experts, devices)
    z = continuous("z", steps)
    problem += pulp.lpSum(z) / steps
    for w in range(steps):
        taken_G: list[list[pulp.LpVariable]] = [[] for _ in range(devices)]
        for e in np.flatnonzero(scaled_WE[w]).tolist():
            load = float(scaled_WE[w, e])
            y_G = continuous(f"y{w}_{e}", devices)
            problem += pulp.lpSum(y_G) == load                                            # (1)
            for g in range(devices):
                problem += y_G[g] <= load * x[e][g]                                       # (2)
                taken_G[g].append(y_G[g])
        for g in range(devices):
            problem += pulp.lpSum(taken_G[g]) <= float(speed_G[g]) * z[w]                 # (3)
    for e in range(experts):
        problem += pulp.lpSum(x[e]) >= 1                                                  # (4)
    for g in range(devices):
        problem += pulp.lpSum(x[e][g] for e in range(experts)) <= int(loads.slots_G[g])
        if loads.size_E is not None and loads.capacity_G is not None:
            held = pulp.lpSum(float(loads.size_E[e]) * x[e][g] for e in range(experts))
            problem += held <= float(loads.capacity_G[g])
    _set_start(problem, x, start_GC)
    solved = solve(problem, nodes=nodes, seconds=seconds, on_gap=on_gap)
    held_EG = np.array([[(v.varValue or 0.0) > 0.5 for v in row] for row in x])
    slots_GC = _slots(held_EG, start_GC.shape[1])
    if slots_GC is None or not task.fits(slots_GC) or not held_EG.any(axis=1).all():
        return Polished(start_GC, solved)      # the solver's rounding broke a rule: keep the start
    return Polished(slots_GC, solved)


def _set_start(
    problem: pulp.LpProblem, x: list[list[pulp.LpVariable]], slots_GC: SlotArray
) -> None:
    """Placement as given; HiGHS finds the flows that go with it."""
    for variable in problem.variables():
        variable.setInitialValue(0.0, check=False)
    for g, row in enumerate(slots_GC):
        for e in row[row >= 0]:
            x[int(e)][g].setInitialValue(1.0, check=False)


def _slots(held_EG: BoolArray, width: int) -> SlotArray | None:
    """Experts in ascending order on every device; None where a device has too few slots."""
    slots_GC = np.full((held_EG.shape[1], width), -1, np.int16)
    for g in range(held_EG.shape[1]):
        held = np.flatnonzero(held_EG[:, g])
        if len(held) > width:
            return None
        slots_GC[g, : len(held)] = held
    return slots_GC
