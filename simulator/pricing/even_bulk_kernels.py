"""Deals what the ranks of one node send in one layer to the replicas of experts, as `even` does.

Knows one node and layer at a time, in the cells of `even_bulk.SlotLayout`. Knows nothing of tokens
or steps. Counters are unsigned and of one width throughout, 16 bits where they suffice, and every
loop runs over whole runs side by side, so that it compiles to vector code: half the time of a step
was dealing in mixed widths.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...foundation.compiled import compiled

NEAR_OUT, NEAR_IN, FAR_OUT, FAR_IN = range(4)


@compiled
def deal_node(
    count_HLE: Any, layer: int, sent_HL: Any, expert_P: Any, turn_P: Any, run_RX: Any,
    cell_DC: Any, first: int, total_S: Any, own_D: Any, ports_PD: Any, node_S: Any, work_XP: Any,
    cell_GC: Any, far_DG: Any, before_G: Any,
) -> None:
    """One layer of a node's ranks, the first of which is device `first`; its counts go out zero.

    A layer's tables stay in the processor's nearest cache while all ranks of the node use them.
    node_S, work_XP and before_G are work space. Products of a count and its replicas must fit
    the counter. far_DG: transfers to each device outside the node; no rows = not wanted.
    """
    before_G[:] = 0    # what the node has sent to each device
    node_S[:] = 0      # what the node has sent to each cell
    near_before = 0
    ranks = len(own_D)
    in_order = run_RX[0, 1] == len(expert_P)       # as many replicas of all: places are experts
    for d in range(ranks):
        count_E = count_HLE[d, layer]
        own = -_held(cell_DC, d, d + 1, node_S)
        if in_order:
            _deal(count_E, turn_P, run_RX, first + d, node_S, work_XP)
        else:
            for p in range(len(expert_P)):
                work_XP[3, p] = count_E[expert_P[p]]
            _deal(work_XP[3], turn_P, run_RX, first + d, node_S, work_XP)
        count_E[:] = 0
        own += _held(cell_DC, d, d + 1, node_S)
        if len(far_DG) > 0:
            for g in range(len(cell_GC)):
                if g < first or g >= first + ranks:
                    held = _held(cell_GC, g, g + 1, node_S)
                    far_DG[d, g] = held - before_G[g]
                    before_G[g] = held
        near = _held(cell_DC, 0, ranks, node_S) - near_before
        near_before += near
        own_D[d] = own
        ports_PD[NEAR_OUT, d] += near - own
        ports_PD[FAR_OUT, d] += sent_HL[d, layer] - near
    for d in range(ranks):
        ports_PD[NEAR_IN, d] = _held(cell_DC, d, d + 1, node_S)
    for x in range(len(node_S)):
        total_S[x] += node_S[x]


@compiled
def _held(cell_DC: Any, first: int, last: int, node_S: Any) -> int:
    """What the node has sent so far to the cells of its devices first:last."""
    total = 0
    for d in range(first, last):
        for c in range(cell_DC.shape[1]):
            if cell_DC[d, c] >= 0:
                total += node_S[cell_DC[d, c]]
    return total


@compiled
def _deal(
    tokens_P: Any, turn_P: Any, run_RX: Any, home: int, node_S: Any, work_XP: Any
) -> None:
    """Add one rank's tokens to the cells of their experts' replicas."""
    for r in range(len(run_RX)):
        first, m, replicas, cell = run_RX[r]
        if m == 0:
            return
        n_P, turns = tokens_P[first : first + m], turn_P[first : first + m]
        if replicas == 1:
            out = node_S[cell : cell + m]
            for i in range(m):
                out[i] += n_P[i]
        elif replicas == 2:
            _deal_pair(
                n_P, turns, home % 2, node_S[cell : cell + m], node_S[cell + m : cell + 2 * m]
            )
        else:
            of_run_S = node_S[cell : cell + replicas * m]
            _deal_run(n_P, turns, home % replicas, replicas, of_run_S, work_XP)


@compiled
def _deal_pair(n_P: Any, turns: Any, turn: int, first: Any, second: Any) -> None:
    """Two replicas: the odd token goes to the one whose turn it is."""
    one, this_turn = n_P.dtype.type(1), n_P.dtype.type(turn)
    for i in range(len(n_P)):
        odd = n_P[i] & one
        late = odd & (turns[i] ^ this_turn)
        half = n_P[i] >> one
        first[i] += half + (odd ^ late)
        second[i] += half + late


@compiled
def _deal_run(
    n_P: Any, turns: Any, turn: int, replicas: int, out_X: Any, work_XP: Any
) -> None:
    """Any number of replicas: the whole part to each, the rest one by one from the turn on."""
    counter = n_P.dtype.type
    m, zero, one, c, this_turn = len(n_P), counter(0), counter(1), counter(replicas), counter(turn)
    # Division by multiplication, exact while count · replicas fits the counter.
    bits = np.uint64(8 * n_P.itemsize)
    inverse = (np.uint64(1) << bits) // np.uint64(replicas) + np.uint64(1)
    base, extra, start = work_XP[0, :m], work_XP[1, :m], work_XP[2, :m]
    for i in range(m):
        base[i] = (n_P[i] * inverse) >> bits
        extra[i] = n_P[i] - base[i] * c
        begin = counter(turns[i] + this_turn)
        start[i] = min(begin, counter(begin - c))      # mod replicas: below 0 a counter is huge
    for j in range(replicas):
        out, this = out_X[j * m : (j + 1) * m], counter(j)
        for i in range(m):
            ahead = counter(this - start[i])
            ahead = min(ahead, counter(ahead + c))
            out[i] += base[i] + (one if ahead < extra[i] else zero)
