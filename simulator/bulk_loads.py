"""`step_loads` for many large steps at once, for the case that needs no token's slot.

Under `even` dispatch with one copy per (token, expert), work and port sums follow from how many
tokens each rank sends to each expert: same numbers as `placement.traffic.step_loads` (a test
compares), counted rank by rank and dealt node by node, so a step of 16,384 tokens on 256 devices
and 58 layers takes milliseconds. Knows counting. Knows nothing of time.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from ..placement.cluster import Cluster
from ..placement.compiled import compiled, prefetch
from ..placement.plan import DispatchSpec, Plan
from ..placement.traffic import StepLoads, check_fit
from ..traces.trace import RoutingTrace
from .bulk_layout import layout_of
from .composition import Composition

NEAR_OUT, NEAR_IN, FAR_OUT, FAR_IN = range(4)
CACHE_LINE_BYTES, FEW_LAYERS = 64, 4


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
    layout = layout_of(plan)
    bytes_LS = np.where(plan.slots >= 0, expert_bytes_E[plan.slots], 0).reshape(
        plan.num_layers, -1
    ).astype(np.float64)
    shape = (len(steps), plan.num_layers, cluster.num_devices)
    tokens, active = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    weights, ports = np.zeros(shape), np.zeros((4, *shape), np.int64)
    k_TL = trace.k_of_token
    all_count = k_TL is None
    k_TL = np.zeros((1, 1), np.uint8) if k_TL is None else k_TL

    blocks = _layers_together(trace.ids)
    count_shape = (int(np.bincount(cluster.node_G).max()), plan.num_layers, plan.num_experts)

    def count(w: int) -> None:
        order = np.argsort(steps[w].home, kind="stable")
        first_G = np.searchsorted(steps[w].home[order], np.arange(cluster.num_devices + 1))
        # An expert gets at most all choices of a rank's tokens: a token may name it more than once.
        small = np.diff(first_G).max() * trace.top_k < 2**16
        counts = np.zeros(count_shape, np.uint16 if small else np.uint32)
        token = steps[w].token[order]
        for b in blocks:
            _count_step(
                trace.ids[:, b], all_count, k_TL if all_count else k_TL[:, b], token, first_G,
                cluster.node_G, plan.slots_per_device, layout.expert_LP[b], layout.turn_LP[b],
                layout.run_LRX[b], layout.slot_LS[b], layout.cell_LGC[b], bytes_LS[b], counts,
                tokens[w, b], active[w, b], weights[w, b], ports[:, w, b],
            )

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(count, range(len(steps))))
    near_out, near_in, far_out, far_in = ports.astype(np.float64)
    return StepLoads(
        tokens, active, weights, near_out, near_in, far_out, far_in,
        tokens_W=np.array([len(s.token) for s in steps], np.int64),
    )


def _layers_together(ids_TLK: npt.NDArray[Any]) -> list[slice]:
    """All layers at once where a token's choices lie together. Where a layer's do, as in stored
    traces, a few at a time: one layer's counters would wait for each other, token after token.
    """
    layers = ids_TLK.shape[1]
    few = FEW_LAYERS if ids_TLK.strides[1] > ids_TLK.strides[0] else layers
    return [slice(first, first + few) for first in range(0, layers, few)]


@compiled
def _count_step(
    ids_TLK: Any, all_count: bool, k_TL: Any, token_A: Any, first_G: Any, node_G: Any,
    slots_per_device: int, expert_LP: Any, turn_LP: Any, run_LRX: Any, slot_LS: Any,
    cell_LGC: Any, bytes_LS: Any, count_HLE: Any, tokens_LG: Any, active_LG: Any,
    weights_LG: Any, ports_PLG: Any,
) -> None:
    layers, cells = slot_LS.shape
    devices = len(node_G)
    total_LS = np.zeros((layers, cells), np.int32)
    own_LG = np.zeros((layers, devices), np.int64)
    node_S = np.empty(cells, np.int32)
    tokens_P = np.empty(expert_LP.shape[1], np.int32)
    work_XP = np.empty((3, expert_LP.shape[1]), np.int32)
    first = 0
    while first < devices:
        last = first
        while last < devices and node_G[last] == node_G[first]:
            own_A = token_A[first_G[last] : first_G[last + 1]]
            _count_home(ids_TLK, all_count, k_TL, own_A, count_HLE[last - first])
            last += 1
        for layer in range(layers):
            _deal_node(
                count_HLE[:, layer], expert_LP[layer], turn_LP[layer], run_LRX[layer],
                cell_LGC[layer, first:last], first, total_LS[layer], own_LG[layer, first:last],
                ports_PLG[:, layer, first:last], node_S, tokens_P, work_XP,
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
def _deal_node(
    count_HE: Any, expert_P: Any, turn_P: Any, run_RX: Any, cell_DC: Any, first: int,
    total_S: Any, own_D: Any, ports_PD: Any, node_S: Any, tokens_P: Any, work_XP: Any,
) -> None:
    """One layer of a node's ranks, the first of which is device `first`; count_HE goes out zero.

    A layer's tables stay in the processor's nearest cache while all ranks of the node use them.
    node_S, tokens_P and work_XP are room to work in.
    """
    node_S[:] = 0      # what the node has sent to each cell
    near_before = 0
    in_order = run_RX[0, 1] == len(expert_P)       # equally many copies of all: places are experts
    for d in range(len(own_D)):
        if in_order:
            sent = _take_in_order(count_HE[d], tokens_P)
        else:
            sent = _take(count_HE[d], expert_P, tokens_P)
        own = -_held(cell_DC[d : d + 1], node_S)
        _deal(tokens_P, turn_P, run_RX, first + d, node_S, work_XP)
        own += _held(cell_DC[d : d + 1], node_S)
        near = _held(cell_DC, node_S) - near_before
        near_before += near
        own_D[d] = own
        ports_PD[NEAR_OUT, d] += near - own
        ports_PD[FAR_OUT, d] += sent - near
    for d in range(len(own_D)):
        ports_PD[NEAR_IN, d] = _held(cell_DC[d : d + 1], node_S)
    total_S += node_S


@compiled
def _count_home(ids_TLK: Any, all_count: bool, k_TL: Any, token_A: Any, count_LE: Any) -> None:
    """Assignments of one rank's tokens per layer and expert; count_LE comes in zero."""
    layers, top_k = ids_TLK.shape[1], ids_TLK.shape[2]
    a_line = max(1, CACHE_LINE_BYTES // ids_TLK.strides[1])      # layers in one
    for a in range(len(token_A)):
        t = token_A[a]
        if a + 1 < len(token_A):     # tokens lie anywhere in the trace: half the time was waiting
            for layer in range(0, layers, a_line):
                prefetch(ids_TLK, token_A[a + 1], layer)
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
def _take_in_order(count_E: Any, tokens_P: Any) -> int:
    """`_take` where place and expert are the same."""
    total = 0
    for p in range(len(count_E)):
        tokens_P[p] = count_E[p]
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
