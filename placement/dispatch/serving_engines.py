"""The replica choice of serving engines: a plan is judged under the engine that will run it.

Knows one layer's slots and one step's counts by home rank. Compiled, deterministic. Rules, as read
in the engines' sources (SGLang 0.5.23, vLLM 0.33.0, TensorRT-LLM 0d919a4, vllm-ascend 182b75e):

sglang_static   each (home rank, expert) always uses one slot: the first on the rank itself, else
                the first in its node, else a fair pick (every replica serves as many of the
                remaining ranks as the next, give or take one). SGLang shuffles the fair picks with
                Python's generator seeded 42 over all layers in turn; ours are shuffled with our own
                generator, seeded per expert: the same rule, other draws.
sglang_dynamic  each assignment draws a replica at random. SGLang draws on the device; we draw from
                a hash of (seed, home, expert, how many), so that a run repeats.
vllm_hash       replica = (2654435769 · i mod 2^32) mod replicas, i = flat index t·K + k on the
                rank.
trtllm_round_robin  blocks of 1,024 flat assignments; in block b the j-th assignment of an expert
                takes replica (j + b [+ rank]) mod replicas.
ascend_fixed    replica = rank mod replicas; with tensor parallelism (tp_rank + dp_rank + expert)
                mod replicas.

The two rules by position need the tokens (`slots_by_position`). Where only counts are known
(`split_by_position`) an expert's tokens are taken to lie evenly over the rank's assignments.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...foundation.compiled import compiled, splitmix
from .even_nearest import nearest_slots

KNUTH = 2654435769
BLOCK = 1024


@compiled
def mix(a: int, b: int) -> Any:
    """A well-mixed 63-bit whole number from two."""
    z = np.uint64(a) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(b) + np.uint64(0x632BE59BD9B4E019)
    return np.int64(splitmix(z) >> np.uint64(1))


@compiled
def fixed_slots_sglang(
    homes: int, start_E: Any, slot_R: Any, slots_per_device: int, node_G: Any, seed: int
) -> Any:
    """[G, E] the slot each home rank uses for each expert (0 for an expert without slots)."""
    experts = len(start_E) - 1
    slot_GE = np.zeros((homes, experts), np.int32)
    waiting = np.empty(homes, np.int32)
    for e in range(experts):
        first, last = start_E[e], start_E[e + 1]
        replicas = last - first
        count = 0
        for g in range(homes):
            begin, _end = nearest_slots(g, first, last, slot_R, slots_per_device, node_G)
            near = node_G[slot_R[begin] // slots_per_device] == node_G[g] if replicas > 0 else False
            if near or replicas == 1:
                slot_GE[g, e] = slot_R[begin]
            elif replicas > 1:
                waiting[count] = g
                count += 1
        if count > 0:
            pick = _fair_picks(count, replicas, seed, e)
            for i in range(count):
                slot_GE[waiting[i], e] = slot_R[first + pick[i]]
    return slot_GE


@compiled
def _fair_picks(count: int, replicas: int, seed: int, salt: int) -> Any:
    """`count` replica numbers, every replica equally often give or take one, in shuffled order."""
    order = np.empty(replicas, np.int64)
    for i in range(replicas):
        order[i] = i
    _shuffle(order, seed, 2 * salt)
    pick = np.empty(count, np.int64)
    for i in range(count):
        pick[i] = order[i % replicas]
    _shuffle(pick, seed, 2 * salt + 1)
    return pick


@compiled
def _shuffle(values: Any, seed: int, salt: int) -> None:
    """Fisher-Yates with draws from `mix`, in place."""
    for i in range(len(values) - 1, 0, -1):
        j = mix(mix(seed, salt), i) % (i + 1)
        values[i], values[j] = values[j], values[i]


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
def replica_by_hash(position: int, replicas: int) -> int:
    """vLLM's rule."""
    replica: int = ((KNUTH * position) & 0xFFFFFFFF) % replicas
    return replica


@compiled
def split_by_position(
    counts_GE: Any, start_E: Any, slot_R: Any, round_robin: bool, offset_by_rank: bool,
    quotas_GS: Any,
) -> None:
    """vllm_hash or trtllm_round_robin from counts alone; quotas_GS comes in zero."""
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
                if round_robin:
                    if position // BLOCK != block:
                        block = position // BLOCK
                        turn = block + (g if offset_by_rank else 0)
                    replica = turn % replicas
                    turn += 1
                else:
                    replica = replica_by_hash(position, replicas)
                quotas_GS[g, slot_R[start_E[e] + replica]] += 1


@compiled
def slots_by_position(
    ids_TK: Any, home_T: Any, homes: int, start_E: Any, slot_R: Any, round_robin: bool,
    offset_by_rank: bool, slot_TK: Any,
) -> None:
    """vllm_hash or trtllm_round_robin, exactly: each rank numbers its own assignments from 0."""
    tokens, choices = ids_TK.shape
    position_G = np.zeros(homes, np.int64)
    taken_GE = np.zeros((homes, len(start_E) - 1), np.int32)
    for t in range(tokens):
        g = home_T[t]
        for k in range(choices):
            position = position_G[g]
            position_G[g] += 1
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
                replica = replica_by_hash(position, replicas)
            slot_TK[t, k] = slot_R[start_E[e] + replica]
