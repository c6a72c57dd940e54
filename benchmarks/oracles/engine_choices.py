"""Which slot each serving engine would choose, written from what its code does: slow and obvious.

Checked in `tests/placement/dispatch/test_engine_oracles.py` against choices of the engines' own
functions. Shares no code with the package. One layer of one step: ids [T, K] in step order and the
home rank of each token; `layout` is the expert in every slot, in order; slot s is on rank
s // (S / ranks). TensorRT-LLM's kernel and SGLang's random draws were never run: the first is
written from its source, of the second only the distribution is known.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def replicas(layout: Sequence[int]) -> dict[int, list[int]]:
    """The slots of every expert, ascending."""
    held: dict[int, list[int]] = {}
    for slot, expert in enumerate(layout):
        held.setdefault(int(expert), []).append(slot)
    return held


def vllm_hash(ids_TK: Array, home_T: Array, layout: Sequence[int]) -> Array:
    """A rank's i-th token takes replica hash(i) mod replicas, for each of its experts."""
    held, rows = replicas(layout), dict.fromkeys(home_T.tolist(), 0)
    chosen = np.empty_like(ids_TK)
    for t, home in enumerate(home_T.tolist()):
        turn = rows[home] * 2654435769 % 2**32
        rows[home] += 1
        chosen[t] = [held[e][turn % len(held[e])] for e in ids_TK[t].tolist()]
    return chosen


def sglang_rows(ids_TK: Array, home_T: Array, layout: Sequence[int]) -> Array:
    """The i-th token of the batch, rank after rank, takes replica i mod replicas."""
    held, chosen = replicas(layout), np.empty_like(ids_TK)
    for row, t in enumerate(np.argsort(home_T, kind="stable").tolist()):
        chosen[t] = [held[e][row % len(held[e])] for e in ids_TK[t].tolist()]
    return chosen


def sglang_random(
    ids_TK: Array, layout: Sequence[int], rng: np.random.Generator
) -> Array:
    """Every assignment draws from 65,536 numbers and takes them modulo the replicas."""
    held = replicas(layout)
    draw_TK = rng.integers(0, 65536, ids_TK.shape)
    return np.array([
        [held[e][draw % len(held[e])] for e, draw in zip(row, draws, strict=True)]
        for row, draws in zip(ids_TK.tolist(), draw_TK.tolist(), strict=True)
    ])


def trtllm_round_robin(ids_TK: Array, home_T: Array, layout: Sequence[int]) -> Array:
    """An expert's j-th in the b-th 1,024 of a rank's assignments: replica (j + b) mod replicas."""
    held, chosen = replicas(layout), np.empty_like(ids_TK)
    for home in np.unique(home_T):
        mine = np.flatnonzero(home_T == home)
        flat, slots = ids_TK[mine].reshape(-1).tolist(), []
        for i, expert in enumerate(flat):
            if i % 1024 == 0:
                seen: dict[int, int] = {}
            j = seen.get(expert, 0)
            seen[expert] = j + 1
            slots.append(held[expert][(j + i // 1024) % len(held[expert])])
        chosen[mine] = np.reshape(slots, (len(mine), ids_TK.shape[1]))
    return chosen


def ascend_tables(layouts: Sequence[Sequence[int]], ranks: int, tensor_parallel: int = 1) -> Array:
    """[L, G, E] the slot each rank uses for each expert."""
    tables = []
    for layout in layouts:
        held = replicas(layout)
        rows = []
        for rank in range(ranks):
            turn = rank % tensor_parallel + rank // tensor_parallel if tensor_parallel > 1 else rank
            rows.append([
                held[e][(turn + (e if tensor_parallel > 1 else 0)) % len(held[e])]
                for e in range(len(held))
            ])
        tables.append(rows)
    return np.array(tables)


def sglang_tables(layouts: Sequence[Sequence[int]], ranks: int, nodes: int) -> Array:
    """[L, G, E] likewise: near ones first, else every rank draws for itself, through all layers."""
    width, per_node = len(layouts[0]) // ranks, ranks // nodes
    tables = np.empty((len(layouts), ranks, len(set(layouts[0]))), int)
    for rank in range(ranks):
        draw = random.Random(42)
        for layer, layout in enumerate(layouts):
            for expert, slots in sorted(replicas(layout).items()):
                near = [_near(slots, g, width, per_node) for g in range(ranks)]
                if near[rank] is not None:
                    tables[layer, rank, expert] = near[rank]
                    continue
                left = [g for g in range(ranks) if near[g] is None]
                whole, rest = divmod(len(left), len(slots))
                picks = slots * whole + draw.sample(slots, rest)
                draw.shuffle(picks)
                tables[layer, rank, expert] = picks[left.index(rank)]
    return tables


def _near(slots: list[int], rank: int, width: int, per_node: int) -> int | None:
    if len(slots) == 1:
        return slots[0]
    own = [s for s in slots if s // width == rank]
    if own:
        return own[0]
    node = [s for s in slots if s // width // per_node == rank // per_node]
    return node[0] if 0 < len(node) < len(slots) else None
