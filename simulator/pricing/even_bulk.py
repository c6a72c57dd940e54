"""`step_loads` for many large steps at once, for the case that needs no token's slot.

Under `even` dispatch with one replica per (token, expert), work and port sums follow from how many
tokens each rank sends to each expert: same numbers as `placement.cost.step_loads` (a test
compares), counted rank by rank and dealt node by node, so a step of 16,384 tokens on 256 devices
and 58 layers takes milliseconds. Knows counting. Knows nothing of time.

What it is worth: `loadmaster simulate` of a recorded trace (26 layers of 64 experts, top-6; 300
requests) under an `even` plan takes 1.0 s of CPU instead of 5.0 on 8 devices, 3.1 instead of 7.3 on
64. On 288 devices it would take 17.9 instead of 10.5: a step holds some 1,000 tokens there, and
every rank's share of every slot is dealt whatever the tokens (6 ms a step against 2.5). Such steps
are left to `step_loads`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...foundation.arrays import Int32Array
from ...foundation.compiled import compiled, prefetch
from ...placement.cluster import Cluster
from ...placement.cost.max_min_rates import deals_fairly, fair_transfers_WX
from ...placement.cost.step_loads import StepLoads, check_fit
from ...placement.plan import DispatchSpec, Plan
from ...traces.trace import RoutingTrace
from .even_bulk_kernels import FAR_IN, NEAR_IN, deal_node
from .step_composition import Composition

CACHE_LINE_BYTES, FEW_LAYERS = 64, 4
# Most slots dealt (of every rank) for each assignment of a step, for bulk to be the sooner one.
SLOTS_PER_ASSIGNMENT = 8


def counts_in_bulk(
    dispatch: DispatchSpec, cluster: Cluster, plan: Plan, assignments: float
) -> bool:
    """Whether `bulk_loads` may answer for `step_loads`, and sooner. assignments: of a step."""
    traffic, dealt = cluster.traffic, cluster.num_devices * plan.slots[0].size
    return (
        dealt <= SLOTS_PER_ASSIGNMENT * assignments
        and dispatch.policy == "even"
        and traffic.mode == "return_home"
        and traffic.payload == "per_expert"
        and not cluster.hardware.compute.expert_table_tokens
    )


def bulk_loads(
    trace: RoutingTrace,
    steps: Sequence[Composition],
    plan: Plan,
    cluster: Cluster,
    *,
    expert_bytes_E: npt.NDArray[np.integer[Any]],
    threads: int = 1,
) -> StepLoads:
    """The loads of `steps` under `even` dispatch, `return_home/per_expert`.

    The answer does not depend on `threads`. Raises InputError when plan, trace and cluster do not
    belong together.
    """
    check_fit(trace, plan, cluster)
    layout = layout_of(plan)
    bytes_LS = np.where(plan.slots >= 0, expert_bytes_E[plan.slots], 0).reshape(
        plan.num_layers, -1
    ).astype(np.float64)
    shape = (len(steps), plan.num_layers, cluster.num_devices)
    tokens, active = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    weights, ports = np.zeros(shape), np.zeros((4, *shape), np.int64)
    fairly, devices = deals_fairly(cluster), cluster.num_devices
    fair_WLX = np.zeros((len(steps), plan.num_layers, 2)) if fairly else None
    k_TL = trace.k_of_token
    all_count = k_TL is None
    k_TL = np.zeros((1, 1), np.uint8) if k_TL is None else k_TL

    blocks = _layers_together(trace.ids)
    count_shape = (int(np.bincount(cluster.node_G).max()), plan.num_layers, plan.num_experts)

    def count(w: int) -> None:
        order = np.argsort(steps[w].home, kind="stable")
        first_G = np.searchsorted(steps[w].home[order], np.arange(cluster.num_devices + 1))
        counts = np.zeros(count_shape, _counter(first_G, trace.top_k, cluster.node_G, layout))
        token = steps[w].token[order]
        far_LGG = np.zeros((plan.num_layers, devices if fairly else 0, devices))
        for b in blocks:
            _count_step(
                trace.ids[:, b], all_count, k_TL if all_count else k_TL[:, b], token, first_G,
                cluster.node_G, plan.slots_per_device, layout.expert_LP[b],
                layout.turn_LP[b].astype(counts.dtype), layout.run_LRX[b],
                layout.slot_LS[b], layout.cell_LGC[b], bytes_LS[b], counts, tokens[w, b],
                active[w, b], weights[w, b], ports[:, w, b], far_LGG[b],
            )
        if fair_WLX is not None:
            fair_WLX[w] = fair_transfers_WX(far_LGG, cluster)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(count, range(len(steps))))
    near_out, near_in, far_out, far_in = ports.astype(np.float64)
    return StepLoads(
        tokens, active, weights, near_out, near_in, far_out, far_in,
        tokens_W=np.array([len(s.token) for s in steps], np.int64), fair_transfers_WLX=fair_WLX,
    )


def _counter(
    first_G: npt.NDArray[np.int64], top_k: int, node_G: npt.NDArray[Any], layout: SlotLayout
) -> type[np.unsignedinteger[Any]]:
    """The narrowest counter that no step overflows: all of a node's assignments may be of one cell
    (a token may name an expert more than once), and `deal_node` divides a rank's by its replicas.
    """
    of_rank_G = np.diff(first_G) * top_k
    of_node = int(np.bincount(node_G, of_rank_G).max())
    most_replicas = int(layout.run_LRX[..., 2].max())
    return np.uint16 if max(of_node, int(of_rank_G.max()) * most_replicas) < 2**16 else np.uint32


def _layers_together(ids_TLK: npt.NDArray[Any]) -> list[slice]:
    """All layers at once where a token's choices lie together. Where a layer's do, as in stored
    traces, a few at a time: one layer's counters would wait for each other, token after token.
    """
    layers = ids_TLK.shape[1]
    few = FEW_LAYERS if ids_TLK.strides[1] > ids_TLK.strides[0] else layers
    return [slice(first, first + few) for first in range(0, layers, few)]


@dataclass(frozen=True, eq=False)
class SlotLayout:
    """Experts by falling number of replicas, slots so that equal replicas lie side by side.

    Place p of a layer holds expert_LP; a run is a stretch of places with equally many replicas.
    run_LRX: (first place, places, replicas, first cell) of each run, places 0 past the last. Cell
    first + j·places + i is the j-th replica of the run's i-th place; slot_LS is its global slot, -1
    past the last. cell_LGC: the cells a device holds, -1 = none. turn_LP: expert mod replicas.
    """

    expert_LP: Int32Array
    turn_LP: Int32Array
    run_LRX: Int32Array
    slot_LS: Int32Array
    cell_LGC: Int32Array

    @classmethod
    def of(cls, plan: Plan) -> SlotLayout:
        replicas_LE = plan.replicas_LE
        expert_LP = np.argsort(-replicas_LE, axis=1, kind="stable").astype(np.int32)
        replicas_LP = np.take_along_axis(replicas_LE, expert_LP, axis=1).astype(np.int32)
        runs = [_runs(replicas_P) for replicas_P in replicas_LP]
        run_LRX = np.zeros((plan.num_layers, max(len(r) for r in runs), 4), np.int32)
        layers, devices, width = plan.slots.shape
        slot_LS = np.full((layers, devices * width), -1, np.int32)
        cell_LS = np.full((layers, devices * width), -1, np.int32)
        for layer, run_RX in enumerate(runs):
            run_LRX[layer, : len(run_RX)] = run_RX
            place_X, copy_X = _cells(run_RX)
            slot_X = _slots(plan.slots[layer].reshape(-1), expert_LP[layer][place_X], copy_X)
            slot_LS[layer, : len(slot_X)] = slot_X
            cell_LS[layer, slot_X] = np.arange(len(slot_X))
        return cls(
            expert_LP, (expert_LP % replicas_LP).astype(np.int32), run_LRX, slot_LS,
            cell_LS.reshape(layers, devices, width),
        )


@functools.lru_cache(maxsize=4)
def layout_of(plan: Plan) -> SlotLayout:
    """A run asks for few plans, many times; a plan is known by identity and never changes."""
    return SlotLayout.of(plan)


def _runs(replicas_P: Int32Array) -> Int32Array:
    """[runs, 4] first place, places, replicas, first cell."""
    first = np.flatnonzero(np.diff(replicas_P, prepend=-1))
    places = np.diff(np.append(first, len(replicas_P)))
    replicas = replicas_P[first]
    cell = np.concatenate(([0], np.cumsum(places * replicas)[:-1]))
    return np.stack([first, places, replicas, cell], axis=1).astype(np.int32)


def _cells(run_RX: Int32Array) -> tuple[Int32Array, Int32Array]:
    """(place, replica) of every cell of a layer."""
    place = [np.tile(np.arange(first, first + m), replicas) for first, m, replicas, _ in run_RX]
    replica = [np.repeat(np.arange(replicas), m) for _, m, replicas, _ in run_RX]
    return np.concatenate(place).astype(np.int32), np.concatenate(replica).astype(np.int32)


def _slots(slots_S: Any, expert_X: Int32Array, copy_X: Int32Array) -> Int32Array:
    """Global slot of the j-th replica of each expert, ascending."""
    filled = np.flatnonzero(slots_S >= 0)
    by_expert = filled[np.argsort(slots_S[filled], kind="stable")]
    first_E = np.searchsorted(slots_S[by_expert], np.arange(int(expert_X.max()) + 1))
    chosen: Int32Array = by_expert[first_E[expert_X] + copy_X].astype(np.int32)
    return chosen


@compiled
def _count_step(
    ids_TLK: Any, all_count: bool, k_TL: Any, token_A: Any, first_G: Any, node_G: Any,
    slots_per_device: int, expert_LP: Any, turn_LP: Any, run_LRX: Any, slot_LS: Any,
    cell_LGC: Any, bytes_LS: Any, count_HLE: Any, tokens_LG: Any, active_LG: Any,
    weights_LG: Any, ports_PLG: Any, far_LGG: Any,
) -> None:
    layers, cells = slot_LS.shape
    devices = len(node_G)
    total_LS = np.zeros((layers, cells), np.int32)
    own_LG = np.zeros((layers, devices), np.int64)
    sent_HL = np.empty((len(count_HLE), layers), np.int64)
    node_S = np.empty(cells, count_HLE.dtype)
    work_XP = np.empty((4, expert_LP.shape[1]), count_HLE.dtype)
    before_G = np.empty(devices, np.int64)
    first = 0
    while first < devices:
        last = first
        while last < devices and node_G[last] == node_G[first]:
            own_A = token_A[first_G[last] : first_G[last + 1]]
            _count_home(
                ids_TLK, all_count, k_TL, own_A, count_HLE[last - first], sent_HL[last - first]
            )
            last += 1
        for layer in range(layers):
            deal_node(
                count_HLE, layer, sent_HL, expert_LP[layer], turn_LP[layer], run_LRX[layer],
                cell_LGC[layer, first:last], first, total_LS[layer], own_LG[layer, first:last],
                ports_PLG[:, layer, first:last], node_S, work_XP, cell_LGC[layer],
                far_LGG[layer, first:last], before_G,
            )
        first = last
    for layer in range(layers):
        for x in range(cells):
            if total_LS[layer, x] > 0:
                device = slot_LS[layer, x] // slots_per_device
                tokens_LG[layer, device] += total_LS[layer, x]
                active_LG[layer, device] += 1
                weights_LG[layer, device] += bytes_LS[layer, slot_LS[layer, x]]
        for device in range(devices):
            # NEAR_IN holds all that came from the own node so far, the device's own tokens too.
            ports_PLG[FAR_IN, layer, device] = (
                tokens_LG[layer, device] - ports_PLG[NEAR_IN, layer, device]
            )
            ports_PLG[NEAR_IN, layer, device] -= own_LG[layer, device]


@compiled
def _count_home(
    ids_TLK: Any, all_count: bool, k_TL: Any, token_A: Any, count_LE: Any, sent_L: Any
) -> None:
    """Assignments of one rank's tokens: per layer and expert (count_LE comes in zero), per layer.
    """
    layers, top_k = ids_TLK.shape[1], ids_TLK.shape[2]
    a_line = max(1, CACHE_LINE_BYTES // ids_TLK.strides[1])      # layers in one
    sent_L[:] = len(token_A) * top_k if all_count else 0
    for a in range(len(token_A)):
        t = token_A[a]
        if a + 1 < len(token_A):     # tokens lie anywhere in the trace: half the time was waiting
            for layer in range(0, layers, a_line):
                prefetch(ids_TLK, token_A[a + 1], layer)
        for layer in range(layers):
            last = top_k if all_count else np.int64(k_TL[t, layer])
            for k in range(last):
                count_LE[layer, ids_TLK[t, layer, k]] += 1
            if not all_count:
                sent_L[layer] += last
