"""Which slot computes every assignment: one rule for planning, for simulation and for live ranks.

A layer's tokens of one step are dispatched in three moves. Live ranks make them one by one, with an
all-gather after the first; whoever replays a trace makes them for all ranks at once.

    count    a rank counts its own tokens
    split    the counts of all ranks become quotas: whole tokens from home ranks to slots
    place    a rank's own tokens take slots within its quotas, in token order

`layer_dispatch` chooses what is counted:

    ByExpert      assignments by expert; for most policies
    ByClass       by expert and the destinations its token visits anyway: `balanced` where a token
                  travels once per rank or node (deduplicated.py)
    ByPosition    by slot: the engines' rules that see where a token is among its rank's choose at
                  once, and the counts only announce what is sent
    ByRow         by slot, as if the rank's rows were the batch's first, and rows: how many rows lie
                  before them, the counts of all ranks say

Knows one layer at a time (`sglang_static` alone draws on from layer to layer, `layers_draws`);
every step is dispatched by itself. Knows nothing of tensors, of the
exchange or of time. Negative ids are left out everywhere.

Axes: A tokens of all steps, T of one, K choices, G ranks, E experts, X counts of a rank, S slots.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ...foundation.arrays import Int32Array
from ...foundation.compiled import compiled
from ..cluster import Cluster
from ..plan import DispatchSpec
from .deduplicated import ClassTable, classify, place_classes, quotas_of_classes, split_classes
from .fair_choice import Draws, first_draws
from .policies import (
    BALANCED,
    OFFSET_BY_RANK,
    SEED,
    SGLANG_ROWS,
    SGLANG_STATIC,
    SLACK,
    TRTLLM,
    fixed_slots,
    parameter_vector,
    policy_of,
    sends_once,
    split_cell,
)
from .replica_table import ReplicaTable
from .serving_engines import row_turns, slots_by_position, turned_places


class Counted(NamedTuple):
    """Tokens of one step and the counts of them; rows of ranks whose tokens are not here are 0."""

    ids_TK: Int32Array
    home_T: Int32Array
    counts_GX: Int32Array
    choice_TK: npt.NDArray[Any]      # the class or the slot of every assignment, for `place`


class LayerDispatch(Protocol):
    """One layer's dispatch under one plan; good until its slots change."""

    @property
    def start_E(self) -> Int32Array:
        """Replicas of expert e, one per device: start_E[e]:start_E[e + 1]."""

    @property
    def num_counts(self) -> int:
        """X, the whole numbers that a rank tells the others."""

    def count(self, ids_TK: Int32Array, home_T: Int32Array) -> Counted:
        """Count tokens, of one rank or of all."""

    def split(self, counts_GX: Int32Array) -> Any:
        """Divide the tokens of all ranks; for `quotas`, and then for `place`."""

    def quotas(self, counts_GX: Int32Array, split: Any) -> Int32Array:
        """[G, S] what each home rank sends to each slot."""

    def place(self, counted: Counted, split: Any) -> Int32Array:
        """The slot of every assignment, [T, K]; uses the split up."""


def layer_dispatch(
    slots_GC: npt.NDArray[np.integer[Any]],
    num_experts: int,
    cluster: Cluster,
    spec: DispatchSpec,
    draws_GX: Draws | None = None,
) -> LayerDispatch:
    """The dispatch of a layer with these slots. UsageError on an unknown policy or parameter.

    draws_GX: where the layers before it left the draws (`layers_draws`); None = a layer alone.
    """
    table = ReplicaTable.of(slots_GC, num_experts)
    policy, parameters = policy_of(spec), parameter_vector(spec, cluster)
    if policy.code == BALANCED and sends_once(cluster):
        return ByClass(ClassTable.of(table, cluster), cluster.speed_G, float(parameters[SLACK]))
    if policy.code == SGLANG_ROWS:
        return ByRow(table, slots_GC.size)
    if policy.by_position:
        return ByPosition(
            table, cluster.num_devices, slots_GC.size, policy.code == TRTLLM,
            bool(parameters[OFFSET_BY_RANK]),
        )
    draws_GX = None if draws_GX is None else draws_GX.copy()
    fixed_GE = fixed_slots(policy.code, table, cluster, parameters, draws_GX)
    return ByExpert(policy.code, table, cluster, slots_GC.size, parameters, fixed_GE)


def layers_draws(
    slots_LGC: npt.NDArray[np.integer[Any]],
    num_experts: int,
    cluster: Cluster,
    spec: DispatchSpec,
    layer_indices: Sequence[int] = (),
) -> list[Draws | None]:
    """Where the draws of `sglang_static` stand before each layer of a plan; None: none are made.

    layer_indices: the model's own; a layer that it has and the plan does not holds SGLang's default
    row (expert s mod E in slot s), and draws too.
    """
    if policy_of(spec).code != SGLANG_STATIC:
        return [None] * len(slots_LGC)
    parameters, (_, devices, width) = parameter_vector(spec, cluster), slots_LGC.shape
    default_GC = (np.arange(devices * width) % num_experts).reshape(devices, width)
    draws_GX = first_draws(int(parameters[SEED]), devices)
    place_of = {own: i for i, own in enumerate(layer_indices or range(len(slots_LGC)))}
    found: list[Draws | None] = [None] * len(slots_LGC)
    for own in range(max(place_of) + 1):
        slots_GC = default_GC
        if own in place_of:
            slots_GC = slots_LGC[place_of[own]]
            found[place_of[own]] = draws_GX.copy()
        table = ReplicaTable.of(slots_GC, num_experts)
        fixed_slots(SGLANG_STATIC, table, cluster, parameters, draws_GX)
    return found


def counts_gathered_first(num_experts: int, cluster: Cluster) -> int:
    """How many counts of a layer live ranks gather at once, whatever the plan.

    The rest takes a second gather, and few plans need it: there is one count per expert, or one
    per slot, or by class one to three per expert where every second expert has a replica.
    """
    return (4 if sends_once(cluster) else 2) * num_experts


def counts_gathers(layer: LayerDispatch, cluster: Cluster) -> int:
    """How often ranks gather counts to choose among replicas: not at all where no expert lies on
    several devices; twice where the counts are too many for one gather."""
    if not (np.diff(layer.start_E) > 1).any():
        return 0
    first = counts_gathered_first(len(layer.start_E) - 1, cluster)
    return 1 if layer.num_counts <= first else 2


def route_steps(
    layer: LayerDispatch,
    ids_AK: Int32Array,
    home_A: Int32Array,
    offset_W: npt.NDArray[np.int64],
) -> Int32Array:
    """[A, K] int32 slots; step w holds tokens offset_W[w]:offset_W[w + 1]; negative ids stay -1.

    Raises InputError when an expert with tokens has no slot.
    """
    unplaced_E = np.flatnonzero(np.diff(layer.start_E) == 0)
    missing_E = unplaced_E[np.isin(unplaced_E, ids_AK)] if len(unplaced_E) else unplaced_E
    if len(missing_E):
        raise InputError(f"expert {missing_E[0]} has tokens but no slot: complete the plan")
    slot_AK = np.empty(ids_AK.shape, np.int32)
    for first, last in itertools.pairwise(offset_W.tolist()):
        counted = layer.count(ids_AK[first:last], home_A[first:last])
        slot_AK[first:last] = layer.place(counted, layer.split(counted.counts_GX))
    return slot_AK


# ---- the four kinds -------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ByExpert:
    """Quotas from counts by expert; an expert's tokens fill its slots in ascending order."""

    policy: int
    table: ReplicaTable
    cluster: Cluster
    slots: int
    parameters: npt.NDArray[np.float64]
    fixed_GE: Int32Array

    @property
    def start_E(self) -> Int32Array:
        return self.table.start_unique_E

    @property
    def num_counts(self) -> int:
        return len(self.table.start_E) - 1

    def count(self, ids_TK: Int32Array, home_T: Int32Array) -> Counted:
        counts_GE = np.zeros((self.cluster.num_devices, self.num_counts), np.int32)
        count_into(ids_TK, home_T, counts_GE)
        return Counted(ids_TK, home_T, counts_GE, ids_TK)

    def split(self, counts_GX: Int32Array) -> Int32Array:
        cluster = self.cluster
        quotas_GS = np.zeros((len(counts_GX), self.slots), np.int32)
        split_cell(
            self.policy, counts_GX, *self.table.arrays(), cluster.node_G, cluster.num_nodes,
            cluster.speed_G, self.parameters, self.fixed_GE, quotas_GS,
        )
        return quotas_GS

    def quotas(self, counts_GX: Int32Array, split: Int32Array) -> Int32Array:
        return split.copy()

    def place(self, counted: Counted, split: Int32Array) -> Int32Array:
        slot_TK = np.empty(counted.ids_TK.shape, np.int32)
        stuck = assign_in_order(
            counted.ids_TK, counted.home_T, split, self.table.start_E, self.table.slot_R, slot_TK
        )
        if stuck >= 0:
            raise InputError(f"token {stuck} found no quota left: split the counts of these tokens")
        return slot_TK


@dataclass(frozen=True, eq=False)
class ByClass:
    """`balanced` where a token travels once per destination; see `deduplicated.py`."""

    table: ClassTable
    speed_G: npt.NDArray[np.float64]
    slack: float

    @property
    def start_E(self) -> Int32Array:
        return self.table.start_E

    @property
    def num_counts(self) -> int:
        return self.table.num_classes

    def count(self, ids_TK: Int32Array, home_T: Int32Array) -> Counted:
        class_TK = np.empty(ids_TK.shape, np.int32)
        counts_GX = np.zeros((len(self.table.node_G), self.num_counts), np.int32)
        classify(ids_TK, home_T, self.table, class_TK, counts_GX)
        return Counted(ids_TK, home_T, counts_GX, class_TK)

    def split(self, counts_GX: Int32Array) -> Any:
        return split_classes(counts_GX, self.table, self.speed_G, self.slack)

    def quotas(self, counts_GX: Int32Array, split: Any) -> Int32Array:
        devices = len(self.table.node_G)
        quotas_GS = np.zeros((devices, devices * self.table.slots_per_device), np.int32)
        quotas_of_classes(counts_GX, self.table, split, quotas_GS)
        return quotas_GS

    def place(self, counted: Counted, split: Any) -> Int32Array:
        slot_TK = np.empty(counted.ids_TK.shape, np.int32)
        place_classes(
            counted.ids_TK, counted.home_T, counted.choice_TK, self.table, split, slot_TK
        )
        return slot_TK


@dataclass(frozen=True, eq=False)
class ByPosition:
    """The engines' rules by a token's place among its rank's: slots first, counts of them after."""

    table: ReplicaTable
    devices: int
    num_counts: int            # slots
    round_robin: bool
    offset_by_rank: bool

    @property
    def start_E(self) -> Int32Array:
        return self.table.start_unique_E

    def count(self, ids_TK: Int32Array, home_T: Int32Array) -> Counted:
        slot_TK = np.empty(ids_TK.shape, np.int32)
        slots_by_position(
            ids_TK, home_T, self.devices, self.table.start_E, self.table.slot_R, self.round_robin,
            self.offset_by_rank, slot_TK,
        )
        counts_GS = np.zeros((self.devices, self.num_counts), np.int32)
        count_into(slot_TK, home_T, counts_GS)
        return Counted(ids_TK, home_T, counts_GS, slot_TK)

    def split(self, counts_GX: Int32Array) -> Int32Array:
        return counts_GX

    def quotas(self, counts_GX: Int32Array, split: Int32Array) -> Int32Array:
        return counts_GX

    def place(self, counted: Counted, split: Int32Array) -> Int32Array:
        return counted.choice_TK


@dataclass(frozen=True, eq=False)
class ByRow:
    """`sglang_rows`: by a token's place in the whole batch, rank after rank."""

    table: ReplicaTable
    slots: int

    @property
    def start_E(self) -> Int32Array:
        return self.table.start_unique_E

    @property
    def num_counts(self) -> int:
        return len(self.table.slot_R) + 1

    def count(self, ids_TK: Int32Array, home_T: Int32Array) -> Counted:
        turn_TK = np.empty(ids_TK.shape, np.int32)
        counts_GX = np.zeros((self.slots // self.table.slots_per_device, self.num_counts), np.int32)
        row_turns(ids_TK, home_T, self.table.start_E, turn_TK, counts_GX)
        return Counted(ids_TK, home_T, counts_GX, turn_TK)

    def split(self, counts_GX: Int32Array) -> Int32Array:
        slot_GR: Int32Array = self.table.slot_R[
            turned_places(self.table.start_E, counts_GX[:, -1])
        ]
        return slot_GR

    def quotas(self, counts_GX: Int32Array, split: Int32Array) -> Int32Array:
        quotas_GS = np.zeros((len(counts_GX), self.slots), np.int32)
        np.put_along_axis(quotas_GS, split.astype(np.int64), counts_GX[:, :-1], axis=1)
        return quotas_GS

    def place(self, counted: Counted, split: Int32Array) -> Int32Array:
        turn_TK = counted.choice_TK
        slot_TK = split[counted.home_T[:, None], np.maximum(turn_TK, 0)]
        return np.asarray(np.where(turn_TK >= 0, slot_TK, -1), np.int32)


# ---- compiled loops over tokens -------------------------------------------------------------


@compiled
def count_into(ids_TK: Any, home_T: Any, counts_GE: Any) -> None:
    """Add assignments by home rank and expert (or slot)."""
    for t in range(ids_TK.shape[0]):
        g = home_T[t]
        for k in range(ids_TK.shape[1]):
            e = ids_TK[t, k]
            if e >= 0:
                counts_GE[g, e] += 1


@compiled
def assign_in_order(
    ids_TK: Any, home_T: Any, quotas_GS: Any, start_E: Any, slot_R: Any, slot_TK: Any
) -> int:
    """Fill slot_TK in token order, an expert's slots ascending, each up to its home's quota.

    quotas_GS is used up. Returns the first token that found no quota left, or -1.
    """
    experts = len(start_E) - 1
    cursor_GE = np.empty((quotas_GS.shape[0], experts), np.int32)
    for g in range(quotas_GS.shape[0]):
        for e in range(experts):
            cursor_GE[g, e] = start_E[e]
    for t in range(ids_TK.shape[0]):
        g = home_T[t]
        for k in range(ids_TK.shape[1]):
            e = ids_TK[t, k]
            if e < 0:
                slot_TK[t, k] = -1
                continue
            r = cursor_GE[g, e]
            while r < start_E[e + 1] and quotas_GS[g, slot_R[r]] == 0:
                r += 1
            cursor_GE[g, e] = r
            if r == start_E[e + 1]:
                return t
            slot_TK[t, k] = slot_R[r]
            quotas_GS[g, slot_R[r]] -= 1
    return -1
