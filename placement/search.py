"""One layer's search: starts, improvement under the dispatch that will run, and the choice.

A `LayerTask` holds everything and travels to any machine; `search_layer` is pure. Knows counts per
step, devices and dispatch. Knows nothing of traces, other layers, files or executors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .bounds import balance_bound_W
from .cluster import Cluster
from .compiled import random_state
from .judge import fluid_imbalance_W, imbalance_W, mean_imbalance
from .methods import LayerLoads, greedy, lpt_swap
from .plan import DispatchSpec
from .search_few_devices import MOST_DEVICES, anneal, subset_speed

FloatArray = npt.NDArray[np.float64]
CountArray = npt.NDArray[np.int32]
SlotArray = npt.NDArray[np.int16]

EFFORTS = {"fast": 0.3, "normal": 1.0, "thorough": 4.0}   # units of work
HARDENING = 1.5      # search steps are drawn this much further from their mean
BEND = 1.0           # weight of squared overload: the tail counts more


@dataclass(frozen=True)
class LayerTask:
    """One layer to place. Counts are [W, G, E] by home rank, or [W, 1, E] where homes are moot."""

    layer: int
    loads: LayerLoads
    planning_WGE: CountArray | None      # None: average loads only
    validation_WGE: CountArray | None
    cluster: Cluster
    dispatch: DispatchSpec
    seed: int
    effort: str


@dataclass(frozen=True)
class LayerAnswer:
    """The slots found and what they are worth on the planning steps."""

    layer: int
    slots_GC: SlotArray
    name: str                            # the candidate that won
    objective: float
    bound: float
    validation: float | None


def search_layer(task: LayerTask) -> LayerAnswer:
    """Search one layer; the candidate with the best validation wins, ties to the earlier one."""
    candidates = {"greedy": greedy(task.loads), "lpt_swap": lpt_swap(task.loads)}
    if task.dispatch.policy == "balanced" and task.loads.devices <= MOST_DEVICES:
        candidates["search"] = _few_devices(task, candidates["greedy"])
    answers = [judge_layer(task, name, slots) for name, slots in candidates.items()]
    return min(answers, key=_decisive)


def judge_layer(task: LayerTask, name: str, slots_GC: SlotArray) -> LayerAnswer:
    """Objective, bound and validation of given slots."""
    loads = task.loads
    bound = balance_bound_W(loads.load_WE, int(loads.slots_G.sum()), loads.speed_G)
    if task.planning_WGE is None:
        planning = fluid_imbalance_W(loads.load_WE, slots_GC, task.cluster, task.dispatch)
    else:
        planning = imbalance_W(task.planning_WGE, slots_GC, task.cluster, task.dispatch)
    validation = None
    if task.validation_WGE is not None:
        validation = mean_imbalance(
            imbalance_W(task.validation_WGE, slots_GC, task.cluster, task.dispatch)
        )
    used = loads.load_WE.sum(axis=1) > 0
    return LayerAnswer(
        task.layer, slots_GC, name, mean_imbalance(planning),
        float(bound[used].mean()) if used.any() else 1.0, validation,
    )


def _decisive(answer: LayerAnswer) -> float:
    return answer.objective if answer.validation is None else answer.validation


def _few_devices(task: LayerTask, start_GC: SlotArray) -> SlotArray:
    loads = task.loads
    rows = hardened(loads.load_WE, loads.speed_G)
    if len(rows) == 0:
        return start_GC
    rate_Q = (1.0 / subset_speed(loads.speed_G)).astype(np.float32)
    moves = int(20_000 * EFFORTS[task.effort])
    _, slots_GC = anneal(
        rows.astype(np.float32), np.full(len(rows), 1 / len(rows)), rate_Q, start_GC,
        loads.slots_G, moves, 3e-3, 3e-5, BEND, random_state(task.seed, task.layer),
    )
    return slots_GC


def hardened(load_WE: FloatArray, speed_G: FloatArray) -> FloatArray:
    """Steps with tokens, scaled so that perfect balance is 1, moved away from their mean.

    x' = max(0, mean + HARDENING · (x − mean)), renormalised. Once every step is perfect a search
    would walk at random; harder steps keep it walking towards plans with room to spare.
    """
    total_W1 = load_WE.sum(axis=1, keepdims=True)
    share = load_WE[total_W1[:, 0] > 0] / total_W1[total_W1[:, 0] > 0]
    if len(share) == 0:
        return share
    share = np.maximum(0.0, share.mean(axis=0) + HARDENING * (share - share.mean(axis=0)))
    return np.asarray(share / share.sum(axis=1, keepdims=True) * speed_G.sum())
