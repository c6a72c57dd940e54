"""`step_loads` for many large steps at once, for the case that needs no token's slot.

Under `even` dispatch with one copy per (token, expert), work and port sums follow from how many
tokens each rank sends to each expert: same numbers as `placement.traffic.step_loads` (a test
compares), counted rank by rank through all layers, so a step of 16,384 tokens on 256 devices and 58
layers takes milliseconds. Knows counting. Knows nothing of time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..placement.cluster import Cluster
from ..placement.compiled import compiled, prefetch
from ..placement.plan import DispatchSpec, Plan
from ..placement.traffic import StepLoads, check_fit
from ..traces.trace import RoutingTrace
from .composition import Composition

NEAR_OUT, NEAR_IN, FAR_OUT, FAR_IN = range(4)
CACHE_LINE_IDS = 64      # ids of a byte in a line; of two bytes, every second line is asked for

Int32Array = npt.NDArray[np.int32]


def counts_in_bulk(dispatch: DispatchSpec, cluster: Cluster) -> bool:
    """Whether `bulk_loads` may answer for `step_loads`."""
    traffic = cluster.traffic
    return (
        dispatch.policy == "even"
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
    layout = _layout_of(plan)
    bytes_LS = np.where(plan.slots >= 0, expert_bytes_E[plan.slots], 0).reshape(
        plan.num_layers, -1
    ).astype(np.float64)
    shape = (len(steps), plan.num_layers, cluster.num_devices)
    tokens, active = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    weights, ports = np.zeros(shape), np.zeros((4, *shape), np.int64)
    k_TL = trace.k_of_token
    all_count = k_TL is None
    k_TL = np.zeros((1, 1), np.uint8) if k_TL is None else k_TL

    def count(w: int) -> None:
        order = np.argsort(steps[w].home, kind="stable")
        first_G = np.searchsorted(steps[w].home[order], np.arange(cluster.num_devices + 1))
        _count_step(
            trace.ids, all_count, k_TL, steps[w].token[order], first_G, cluster.node_G,
            plan.slots_per_device, layout.expert_LP, layout.turn_LP, layout.run_LRX,
            layout.slot_LS, layout.cell_LGC, bytes_LS, tokens[w], active[w], weights[w],
            ports[:, w],
        )

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(count, range(len(steps))))
    near_out, near_in, far_out, far_in = ports.astype(np.float64)
    return StepLoads(
        tokens, active, weights, near_out, near_in, far_out, far_in,
        tokens_W=np.array([len(s.token) for s in steps], np.int64),
    )


@dataclass(frozen=True, eq=False)
class _SlotLayout:
    """Experts by falling number of copies, slots so that equal copies lie side by side.

    Place p of a layer holds expert_LP; a run is a stretch of places with equally many copies.
    run_LRX: (first place, places, copies, first cell) of each run, places 0 past the last. Cell
    first + j·places + i is the j-th copy of the run's i-th place; slot_LS is its global slot, -1
    past the last. cell_LGC: the cells a device holds, -1 = none. turn_LP: expert mod copies.
    """

    expert_LP: Int32Array
    turn_LP: Int32Array
    run_LRX: Int32Array
    slot_LS: Int32Array
    cell_LGC: Int32Array

    @classmethod
    def of(cls, plan: Plan) -> _SlotLayout:
        copies_LE = plan.replicas_LE
        expert_LP = np.argsort(-copies_LE, axis=1, kind="stable").astype(np.int32)
        copies_LP = np.take_along_axis(copies_LE, expert_LP, axis=1).astype(np.int32)
        runs = [_runs(copies_P) for copies_P in copies_LP]
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
            expert_LP, (expert_LP % copies_LP).astype(np.int32), run_LRX, slot_LS,
            cell_LS.reshape(layers, devices, width),
        )


@functools.lru_cache(maxsize=4)
def _layout_of(plan: Plan) -> _SlotLayout:
    """A run asks for few plans, many times; a plan is known by identity and never changes."""
    return _SlotLayout.of(plan)


def _runs(copies_P: Int32Array) -> Int32Array:
    """[runs, 4] first place, places, copies, first cell."""
    first = np.flatnonzero(np.diff(copies_P, prepend=-1))
    places = np.diff(np.append(first, len(copies_P)))
    copies = copies_P[first]
    cell = np.concatenate(([0], np.cumsum(places * copies)[:-1]))
    return np.stack([first, places, copies, cell], axis=1).astype(np.int32)


def _cells(run_RX: Int32Array) -> tuple[Int32Array, Int32Array]:
    """(place, copy) of every cell of a layer."""
    place = [np.tile(np.arange(first, first + m), copies) for first, m, copies, _ in run_RX]
    copy = [np.repeat(np.arange(copies), m) for _, m, copies, _ in run_RX]
    return np.concatenate(place).astype(np.int32), np.concatenate(copy).astype(np.int32)


def _slots(slots_S: Any, expert_X: Int32Array, copy_X: Int32Array) -> Int32Array:
    """Global slot of the j-th copy of each expert, ascending."""
    filled = np.flatnonzero(slots_S >= 0)
    by_expert = filled[np.argsort(slots_S[filled], kind="stable")]
    first_E = np.searchsorted(slots_S[by_expert], np.arange(int(expert_X.max()) + 1))
    chosen: Int32Array = by_expert[first_E[expert_X] + copy_X].astype(np.int32)
    return chosen


@compiled
def _count_step(
    ids_TLK: Any, all_count: bool, k_TL: Any, token_A: Any, first_G: Any, node_G: Any,
    slots_per_device: int, expert_LP: Any, turn_LP: Any, run_LRX: Any, slot_LS: Any,
    cell_LGC: Any, bytes_LS: Any, tokens_LG: Any, active_LG: Any, weights_LG: Any,
    ports_PLG: Any,
) -> None:
    layers, experts = expert_LP.shape
    cells = slot_LS.shape[1]
    devices = len(node_G)
    own_LG = np.zeros((layers, devices), np.int64)
    count_LE = np.zeros((layers, experts), np.uint32)
    node_LS = np.zeros((layers, cells), np.int32)      # what the current node sends to each cell
    near_L = np.zeros(layers, np.int64)                # of that, to its own cells
    total_LS = np.zeros((layers, cells), np.int32)
    tokens_P = np.empty(experts, np.int32)
    work_XP = np.empty((3, experts), np.int32)
    first = 0
    for home in range(devices):
        node = node_G[home]
        _count_home(ids_TLK, all_count, k_TL, token_A[first_G[home] : first_G[home + 1]], count_LE)
        last = first
        while last < devices and node_G[last] == node:
            last += 1
        for layer in range(layers):
            sent = _take(count_LE[layer], expert_LP[layer], tokens_P)
            own = -_held(cell_LGC[layer, home : home + 1], node_LS[layer])
            _deal(tokens_P, turn_LP[layer], run_LRX[layer], home, node_LS[layer], work_XP)
            own += _held(cell_LGC[layer, home : home + 1], node_LS[layer])
            near = _held(cell_LGC[layer, first:last], node_LS[layer]) - near_L[layer]
            near_L[layer] += near
            ports_PLG[NEAR_OUT, layer, home] += near - own
            own_LG[layer, home] = own
            ports_PLG[FAR_OUT, layer, home] += sent - near
        if home + 1 == last:
            _close_node(cell_LGC, first, last, node_LS, total_LS, ports_PLG)
            near_L[:] = 0
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
def _count_home(ids_TLK: Any, all_count: bool, k_TL: Any, token_A: Any, count_LE: Any) -> None:
    """Assignments of one rank's tokens per layer and expert; count_LE comes in zero."""
    layers, top_k = ids_TLK.shape[1], ids_TLK.shape[2]
    ids_X, row = ids_TLK.reshape(-1), layers * top_k
    for a in range(len(token_A)):
        t = token_A[a]
        if a + 1 < len(token_A):     # tokens lie anywhere in the trace: half the time was waiting
            for x in range(token_A[a + 1] * row, (token_A[a + 1] + 1) * row, CACHE_LINE_IDS):
                prefetch(ids_X, x)
        for layer in range(layers):
            last = top_k if all_count else np.int64(k_TL[t, layer])
            for k in range(last):
                count_LE[layer, ids_TLK[t, layer, k]] += 1


@compiled
def _take(count_E: Any, expert_P: Any, tokens_P: Any) -> int:
    """Counts in order of places; count_E goes out zero. Returns their sum."""
    total = 0
    for p in range(len(expert_P)):
        tokens_P[p] = count_E[expert_P[p]]
        total += tokens_P[p]
    count_E[:] = 0
    return total


@compiled
def _deal(
    tokens_P: Any, turn_P: Any, run_RX: Any, home: int, node_S: Any, work_XP: Any
) -> None:
    """Add one rank's tokens to the cells of their experts' copies, as `even` deals them.

    Written over whole runs so that it compiles to vector code; 32-bit throughout.
    """
    for r in range(len(run_RX)):
        first, m, copies, cell = run_RX[r]
        if m == 0:
            return
        n_P, turns = tokens_P[first : first + m], turn_P[first : first + m]
        if copies == 1:
            out = node_S[cell : cell + m]
            for i in range(m):
                out[i] += n_P[i]
            continue
        if copies == 2:
            _deal_pair(n_P, turns, np.int32(home % 2), node_S[cell : cell + 2 * m])
            continue
        _deal_run(n_P, turns, home, np.int32(copies), node_S[cell : cell + copies * m], work_XP)


@compiled
def _deal_run(
    n_P: Any, turns: Any, home: int, copies: Any, out_X: Any, work_XP: Any
) -> None:
    """Any number of copies: the whole part to each, the rest one by one from the turn on."""
    m, zero = len(n_P), np.int32(0)
    turn = np.int32(home % copies)
    inverse = np.float32(1.0) / np.float32(copies)
    base, extra, start = work_XP[0, :m], work_XP[1, :m], work_XP[2, :m]
    for i in range(m):
        base[i] = np.int32((np.float32(n_P[i]) + np.float32(0.5)) * inverse)
        extra[i] = n_P[i] - base[i] * copies
        start[i] = turns[i] + turn
        start[i] -= copies if start[i] >= copies else zero
    for j in range(copies):
        out, this = out_X[j * m : (j + 1) * m], np.int32(j)
        for i in range(m):
            ahead = this - start[i]
            ahead += copies if ahead < zero else zero
            out[i] += base[i] + (np.int32(1) if ahead < extra[i] else zero)


@compiled
def _deal_pair(n_P: Any, turns: Any, turn: Any, out_X: Any) -> None:
    """Two copies: the odd token goes to the one whose turn it is."""
    m, one = len(n_P), np.int32(1)
    first, second = out_X[:m], out_X[m:]
    for i in range(m):
        to_first = (n_P[i] + one - ((turns[i] + turn) & one)) >> one
        first[i] += to_first
        second[i] += n_P[i] - to_first


@compiled
def _held(cells_XC: Any, node_S: Any) -> int:
    """What the current node has sent to these cells so far."""
    total = 0
    for row in range(cells_XC.shape[0]):
        for x in cells_XC[row]:
            if x >= 0:
                total += node_S[x]
    return total


@compiled
def _close_node(
    cell_LGC: Any, first: int, last: int, node_LS: Any, total_LS: Any, ports_PLG: Any
) -> None:
    """Add what a node of devices first..last sent; node_LS goes out zero."""
    for layer in range(node_LS.shape[0]):
        for device in range(first, last):
            ports_PLG[NEAR_IN, layer, device] = _held(
                cell_LGC[layer, device : device + 1], node_LS[layer]
            )
        total_LS[layer] += node_LS[layer]
        node_LS[layer] = 0
