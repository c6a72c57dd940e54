"""The replica choice of serving engines: a plan is judged under the engine that will run it.

Knows one layer's slots and one step's counts by home rank. Compiled, deterministic. Rules, as the
engines have them (SGLang 0.5.23, vLLM 0.33.0, TensorRT-LLM 004d78b, vllm-ascend 182b75e); replicas
are in the order of their slots. Checked against choices of the engines' own functions
(`tests/placement/dispatch/engine_choices.json`), TensorRT-LLM's, a CUDA kernel, by reading.

sglang_static   `--ep-dispatch-algorithm static`, with an all-to-all backend: each (home rank,
                expert) always uses one slot: the first on the rank itself, else the first in its
                node where the expert lies in other nodes too, else a fair choice (every replica
                serves as many of the ranks that are left as the next, give or take one). Each
                rank draws for itself, seed 42, through all layers in turn, and passes over experts
                near to it: so fair choices of different ranks soon are not one choice. A layer
                alone starts the draws anew; `layers_draws` says where they stand in a plan.
sglang_dynamic  `dynamic` with an all-to-all backend: each assignment draws a replica at random.
                SGLang draws on the device; we draw from a hash of (seed, home, expert, how many),
                so that a run repeats.
sglang_rows     `dynamic` without an all-to-all backend: replica = row mod replicas, row = place of
                the token in the whole batch, in which the ranks' tokens lie one after the other.
vllm_hash       replica = (2654435769 · row mod 2^32) mod replicas, row = place of the token among
                the rank's own: the same turn for all of a token's choices.
trtllm_round_robin  blocks of 1,024 flat assignments t·K + k; in block b the j-th assignment of an
                expert takes replica (j + b [+ rank]) mod replicas.
ascend_fixed    replica = rank mod replicas; with tensor parallelism (tp_rank + dp_rank + expert)
                mod replicas.

Rules by position need the tokens (`slots_by_position`, `row_turns`). Where only counts are known
(`split_by_position`) an expert's tokens are taken to lie evenly over the rank's assignments, each
in a row of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...foundation.compiled import compiled, splitmix
from .fair_choice import fair_choices

KNUTH = 2654435769
BLOCK = 1024
HASH, ROUND_ROBIN, BY_ROW = 0, 1, 2      # rules by position


@compiled
def mix(a: int, b: int) -> Any:
    """A well-mixed 63-bit whole number from two."""
    z = np.uint64(a) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(b) + np.uint64(0x632BE59BD9B4E019)
    return np.int64(splitmix(z) >> np.uint64(1))


@compiled
def fixed_slots_sglang(
    start_E: Any, slot_R: Any, slots_per_device: int, node_G: Any, draws_GX: Any
) -> Any:
    """[G, E] the slot each home rank uses for each expert (0 for an expert without slots).

    draws_GX: where each rank's draws stand (`fair_choice.py`); moved on.
    """
    homes, experts = len(node_G), len(start_E) - 1
    slot_GE = np.zeros((homes, experts), np.int32)
    for e in range(experts):
        first, last = start_E[e], start_E[e + 1]
        left = 0                                    # ranks without a replica near
        for g in range(homes):
            slot_GE[g, e] = _near_slot(g, first, last, slot_R, slots_per_device, node_G)
            left += slot_GE[g, e] < 0
        if last == first:
            slot_GE[:, e] = 0
        elif left > 0:
            turn = 0
            for g in range(homes):
                if slot_GE[g, e] < 0:
                    choice_N = fair_choices(draws_GX[g], last - first, left)
                    slot_GE[g, e] = slot_R[first + choice_N[turn]]
                    turn += 1
    return slot_GE


@compiled
def _near_slot(
    home: int, first: int, last: int, slot_R: Any, slots_per_device: int, node_G: Any
) -> int:
    """The only slot, or the first on the rank, or in its node if not all are there; else -1."""
    if last - first == 1:
        return int(slot_R[first])
    in_node, count = -1, 0
    for r in range(first, last):
        device = slot_R[r] // slots_per_device
        if device == home:
            return int(slot_R[r])
        if node_G[device] == node_G[home]:
            count += 1
            if in_node < 0:
                in_node = slot_R[r]
    return int(in_node) if count < last - first else -1


@compiled
def fixed_slots_ascend(homes: int, start_E: Any, slot_R: Any, tensor_parallel: int) -> Any:
    """[G, E] the slot each home rank uses for each expert (0 for an expert without slots)."""
    experts = len(start_E) - 1
    slot_GE = np.zeros((homes, experts), np.int32)
    for e in range(experts):
        replicas = start_E[e + 1] - start_E[e]
        if replicas == 0:
            continue
        for g in range(homes):
            turn = g
            if tensor_parallel > 1:
                turn = g % tensor_parallel + g // tensor_parallel + e
            slot_GE[g, e] = slot_R[start_E[e] + turn % replicas]
    return slot_GE


@compiled
def split_fixed(counts_GE: Any, slot_GE: Any, quotas_GS: Any) -> None:
    """All tokens of (home, expert) to its fixed slot; quotas_GS comes in zero."""
    for g in range(counts_GE.shape[0]):
        for e in range(counts_GE.shape[1]):
            if counts_GE[g, e] > 0:
                quotas_GS[g, slot_GE[g, e]] = counts_GE[g, e]


@compiled
def split_random(counts_GE: Any, start_E: Any, slot_R: Any, seed: int, quotas_GS: Any) -> None:
    """sglang_dynamic: one draw per assignment; quotas_GS comes in zero."""
    for g in range(counts_GE.shape[0]):
        for e in range(counts_GE.shape[1]):
            tokens = counts_GE[g, e]
            replicas = start_E[e + 1] - start_E[e]
            if replicas == 1:
                quotas_GS[g, slot_R[start_E[e]]] = tokens
            elif tokens > 0:
                key = mix(mix(mix(seed, g), e), tokens)
                for i in range(tokens):
                    quotas_GS[g, slot_R[start_E[e] + mix(key, i) % replicas]] += 1


@compiled
def replica_by_hash(row: int, replicas: int) -> int:
    """vLLM's rule."""
    replica: int = ((KNUTH * row) & 0xFFFFFFFF) % replicas
    return replica


@compiled
def split_by_position(
    rule: int, counts_GE: Any, start_E: Any, slot_R: Any, offset_by_rank: bool, quotas_GS: Any
) -> None:
    """A rule by position from counts alone; quotas_GS comes in zero."""
    before = 0                       # rows of the ranks that lie ahead in the batch
    for g in range(counts_GE.shape[0]):
        total = 0
        for e in range(counts_GE.shape[1]):
            total += counts_GE[g, e]
        for e in range(counts_GE.shape[1]):
            tokens = counts_GE[g, e]
            replicas = start_E[e + 1] - start_E[e]
            if replicas == 1:
                quotas_GS[g, slot_R[start_E[e]]] = tokens
                continue
            block = -1
            turn = 0
            for i in range(tokens):
                position = (i * total + total // 2) // tokens
                if rule == ROUND_ROBIN:
                    if position // BLOCK != block:
                        block = position // BLOCK
                        turn = block + (g if offset_by_rank else 0)
                    replica = turn % replicas
                    turn += 1
                elif rule == BY_ROW:
                    replica = (before + position) % replicas
                else:
                    replica = replica_by_hash(position, replicas)
                quotas_GS[g, slot_R[start_E[e] + replica]] += 1
        before += total


@compiled
def slots_by_position(
    ids_TK: Any, home_T: Any, homes: int, start_E: Any, slot_R: Any, round_robin: bool,
    offset_by_rank: bool, slot_TK: Any,
) -> None:
    """vllm_hash or trtllm_round_robin, exactly: each rank numbers its own tokens from 0."""
    tokens, choices = ids_TK.shape
    row_G = np.zeros(homes, np.int64)
    taken_GE = np.zeros((homes, len(start_E) - 1), np.int32)
    for t in range(tokens):
        g = home_T[t]
        for k in range(choices):
            position = row_G[g] * choices + k
            if position % BLOCK == 0:
                taken_GE[g] = 0
            e = ids_TK[t, k]
            if e < 0:
                slot_TK[t, k] = -1
                continue
            replicas = start_E[e + 1] - start_E[e]
            if round_robin:
                turn = taken_GE[g, e] + position // BLOCK + (g if offset_by_rank else 0)
                taken_GE[g, e] += 1
                replica = turn % replicas
            else:
                replica = replica_by_hash(row_G[g], replicas)
            slot_TK[t, k] = slot_R[start_E[e] + replica]
        row_G[g] += 1


# sglang_rows: a rank knows its own rows; how many lie before them, the counts of all ranks say.


@compiled
def row_turns(ids_TK: Any, home_T: Any, start_E: Any, turn_TK: Any, counts_GX: Any) -> None:
    """Where each assignment would go if its rank's rows were the batch's first.

    turn_TK: places in slot_R, -1 for none. counts_GX [G, R + 1]: how many for each place, and last
    the rank's rows; comes in zero.
    """
    rows = counts_GX.shape[1] - 1
    for t in range(ids_TK.shape[0]):
        g = home_T[t]
        for k in range(ids_TK.shape[1]):
            e = ids_TK[t, k]
            if e < 0:
                turn_TK[t, k] = -1
                continue
            turn_TK[t, k] = start_E[e] + counts_GX[g, rows] % (start_E[e + 1] - start_E[e])
            counts_GX[g, turn_TK[t, k]] += 1
        counts_GX[g, rows] += 1


@compiled
def turned_places(start_E: Any, rows_G: Any) -> Any:
    """[G, R] the place that is meant, by home rank, once the rows before its own are counted."""
    place_GR = np.empty((len(rows_G), start_E[-1]), np.int32)
    before = 0
    for g in range(len(rows_G)):
        for e in range(len(start_E) - 1):
            replicas = start_E[e + 1] - start_E[e]
            for i in range(replicas):
                place_GR[g, start_E[e] + i] = start_E[e] + (before + i) % replicas
        before += rows_G[g]
    return place_GR
