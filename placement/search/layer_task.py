"""One layer as a job of its own: what there is to place, and what given slots are worth.

A `LayerTask` holds everything and travels to any machine. Knows counts, devices, dispatch, traffic
and, with a model, time. Knows nothing of how slots are found, of other layers or of executors.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ...foundation.arrays import FloatArray, SlotArray
from ...traces.model_spec import ModelSpec
from ...traces.steps import Steps
from ..cluster import Cluster
from ..cost.evaluate import imbalance_of, peak_of
from ..cost.lower_bounds import balance_bound_W, most_replicas, time_bound_us
from ..cost.step_cost import step_cost
from ..cost.step_loads import StepLoads, step_loads
from ..cost.token_transfers import transfers_cost_bytes
from ..dispatch.quotas import count_tokens
from ..methods.baselines import LayerLoads
from ..plan import DispatchSpec, Plan
from ..planning_traffic import LayerTraffic
from .balance_score import fluid_tokens_WG, mean_over_steps

HURRIED_STEPS = 4            # judged on, of each kind, where the time limit has fired


@dataclass(frozen=True)
class LayerTask:
    """One layer to place."""

    layer: int
    layers: int                          # of the whole plan
    traffic: LayerTraffic
    slots_G: npt.NDArray[np.int64]       # slots in this layer, at most the cluster's
    capacity_G: FloatArray | None            # bytes for this layer; None = slots are the limit
    cluster: Cluster
    dispatch: DispatchSpec
    objective: str                       # "balance" or "time"
    model: ModelSpec | None              # this layer's sizes, needed for "time"
    slack: float                         # of balance, in favour of fewer transfers
    seed: int
    effort: str
    deadline: float | None = None        # time.time() after which only cheap work is begun
    known: tuple[tuple[str, SlotArray], ...] = ()    # other candidates, by name
    start_GC: SlotArray | None = None    # the current plan's slots, also a candidate
    move_budget: float | None = None     # most that moves away from it may cost; None = free
    move_price_E: FloatArray | None = None   # cost of sending each expert; None = 1
    in_haste: bool = False               # few steps are left to judge by, see `hurried`

    def loads(self) -> LayerLoads:
        """What the load-only methods see."""
        sizes = None if self.model is None else self.model.bytes_per_expert_E().astype(np.float64)
        return LayerLoads(
            load_WE=self.traffic.planning_WE(), slots_G=self.slots_G,
            speed_G=self.cluster.speed_G, nodes=self.cluster.num_nodes,
            expert_groups=1 if self.model is None else self.model.num_expert_groups,
            size_E=sizes, capacity_G=self.capacity_G,
        )

    def expired(self) -> bool:
        """Whether the time limit has fired."""
        return self.deadline is not None and time.time() > self.deadline

    def until(self) -> float:
        """The deadline as compiled loops take it."""
        return np.inf if self.deadline is None else self.deadline

    def hurried(self) -> LayerTask:
        """The task to judge by: itself, or few of its steps where the time is up before it began.

        Loads to place by are those of the whole task.
        """
        if not self.expired():
            return self
        return replace(self, traffic=self.traffic.thinned(HURRIED_STEPS), in_haste=True)

    def fits(self, slots_GC: SlotArray) -> bool:
        """Whether slots keep to each device's slots and bytes in this layer."""
        held = slots_GC >= 0
        if (held.sum(axis=1) > self.slots_G).any():
            return False
        sizes_E = self.loads().size_E if self.capacity_G is not None else None
        if sizes_E is None or self.capacity_G is None:
            return True
        held_G = np.where(held, sizes_E[np.maximum(slots_GC, 0)], 0.0).sum(axis=1)
        return bool((held_G <= self.capacity_G).all())

    @property
    def counts_transfers(self) -> bool:
        """Whether fewer transfers are worth something here."""
        return self.traffic.trace is not None and transfers_cost_bytes(self.cluster)


@dataclass(frozen=True)
class Score:
    """What slots are worth on some steps.

    peak: balance, as it decides (`evaluate.peak_of`). imbalance: as it is reported; the same where
    devices are equally fast. transfers: remote, per token; between nodes if any.
    """

    peak: float
    imbalance: float
    transfers: float = 0.0
    time_us: float | None = None

    def objective(self, name: str) -> float:
        """The figure that decides."""
        if name == "time":
            assert self.time_us is not None
            return self.time_us
        return self.peak


@dataclass(frozen=True)
class Candidate:
    """Slots, and their score on the steps that decide: held back where possible."""

    name: str
    slots_GC: SlotArray
    decisive: Score


@dataclass(frozen=True)
class LayerAnswer:
    """The slots found and what they are worth."""

    layer: int
    slots_GC: SlotArray
    name: str                        # the candidate that won
    planning: Score
    bound: float                     # on the objective, over all plans, on the planning steps
    validation: Score | None
    truncated: bool = False
    in_haste: bool = False           # judged on few steps: the time was up


def judged(task: LayerTask, name: str, slots_GC: SlotArray) -> Candidate:
    """Score slots on the steps that decide."""
    traffic = task.traffic
    steps = traffic.planning if traffic.validation is None else traffic.validation
    return Candidate(name, slots_GC, score(task, slots_GC, steps))


def answer_with(task: LayerTask, candidate: Candidate) -> LayerAnswer:
    """The layer's answer: the candidate, its planning score and its bound."""
    bound = layer_bound(task)
    if task.traffic.validation is None:
        return LayerAnswer(
            task.layer, candidate.slots_GC, candidate.name, candidate.decisive, bound, None,
            in_haste=task.in_haste,
        )
    planning = score(task, candidate.slots_GC, task.traffic.planning)
    return LayerAnswer(
        task.layer, candidate.slots_GC, candidate.name, planning, bound, candidate.decisive,
        in_haste=task.in_haste,
    )


def score(task: LayerTask, slots_GC: SlotArray, steps: Steps | None) -> Score:
    """What slots are worth on these steps (the average loads where there is no trace)."""
    tokens, transfers, time_us_W = _measured(task, slots_GC, steps)
    return score_of(tokens, transfers, task.cluster, time_us_W)


def score_of(
    tokens_WG: FloatArray, transfers: float, cluster: Cluster, time_us_W: FloatArray | None
) -> Score:
    """A layer's score from what its devices computed in every step."""
    return Score(
        mean_over_steps(peak_of(tokens_WG[:, None], cluster)[:, 0]),
        mean_over_steps(imbalance_of(tokens_WG[:, None], cluster)[:, 0]),
        transfers, None if time_us_W is None else float(time_us_W.mean()),
    )


TIE = 1e-4   # of the least objective, and transfers per token


def best_of(
    scores: Sequence[Score], sizes: Sequence[tuple[int, ...]], objective: str, slack: float | None
) -> int:
    """The best of several placements; see the objective in `plan`.

    time: the least. balance: the lowest peak; where transfers cost bytes (slack, else None), the
    fewest transfers among those within slack of it. Of those that tie, the one of least size.
    """
    value = [score.objective(objective) for score in scores]
    priced, least = slack is not None and objective != "time", min(value)
    reach = TIE * least + (slack if priced and slack is not None else 0.0)
    near = [i for i, one in enumerate(value) if one <= least + reach]
    if priced:
        fewest = min(scores[i].transfers for i in near)
        near = [i for i in near if scores[i].transfers <= fewest + TIE]
    return min(near, key=lambda i: (*sizes[i], value[i]))


def crossing_transfers(loads: StepLoads, cluster: Cluster, layer: int) -> float:
    """Remote transfers per token in one layer; between nodes if there are any."""
    crossing = loads.nvlink_out_WLG if cluster.num_nodes == 1 else loads.nic_out_WLG
    return float(crossing[:, layer].sum() / max(loads.tokens_W.sum(), 1))


def objective_W(task: LayerTask, slots_GC: SlotArray, steps: Steps | None) -> FloatArray:
    """[W] the objective in every step; NaN where a step without tokens has no balance."""
    tokens, _, time_us_W = _measured(task, slots_GC, steps)
    return peak_of(tokens[:, None], task.cluster)[:, 0] if time_us_W is None else time_us_W


def _measured(
    task: LayerTask, slots_GC: SlotArray, steps: Steps | None
) -> tuple[FloatArray, float, FloatArray | None]:
    """(tokens [W, G], remote transfers per token, microseconds [W] for objective time)."""
    traffic, cluster = task.traffic, task.cluster
    if traffic.load_WE is not None:
        return fluid_tokens_WG(traffic.load_WE, slots_GC, cluster, task.dispatch), 0.0, None
    assert traffic.trace is not None and steps is not None
    plan = Plan(slots=slots_GC[None], num_experts=traffic.num_experts, dispatch=task.dispatch)
    sizes = None if task.model is None else task.model.listed_bytes_E()
    timed = task.objective == "time"
    loads = step_loads(
        traffic.trace, steps, plan, cluster, task.dispatch, expert_bytes_E=sizes, timed=timed
    )
    time_us_W = None
    if timed:
        assert task.model is not None
        time_us_W = step_cost(
            loads, task.model, cluster, dispatch=task.dispatch
        ).layer_us_WL[:, 0]
    return (
        loads.tokens_WLG[:, 0].astype(np.float64), crossing_transfers(loads, cluster, 0), time_us_W
    )


def layer_bound(task: LayerTask) -> float:
    """Least possible objective of this layer on the planning steps, over all plans.

    Where layers share memory, "all plans" are those of every share-out, not of the task's alone.
    """
    load_WE = task.traffic.planning_WE()
    if task.objective == "time":
        assert task.model is not None
        return float(
            time_bound_us(load_WE, task.model, task.cluster, _counts_by_home(task)).mean()
        )
    used = load_WE.sum(axis=1) > 0
    if not used.any():
        return 1.0
    slots = most_replicas(task.cluster, task.model, task.layers, task.traffic.num_experts)
    return float(balance_bound_W(load_WE[used], slots, task.cluster.speed_G).mean())


def _counts_by_home(task: LayerTask) -> npt.NDArray[np.int32] | None:
    """[W, G, E] assignments of the planning steps by home rank; None where no tokens are known."""
    traffic, devices = task.traffic, task.cluster.num_devices
    if traffic.trace is None or traffic.planning is None:
        return None
    token, offset = traffic.planning.token, traffic.planning.offset
    ids_AK = traffic.trace.ids[token, 0].astype(np.int32)
    valid = traffic.trace.valid_TLK(token)
    if valid is not None:
        ids_AK[~valid[:, 0]] = -1
    home_A = traffic.trace.home_rank_T(devices)[token]
    return np.stack([
        count_tokens(ids_AK[a:b], home_A[a:b], devices, traffic.num_experts)
        for a, b in itertools.pairwise(offset.tolist())
    ])
