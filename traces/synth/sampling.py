"""Drawing a token's experts: K different ones, by share, most inside the token's block.

Sequential sampling without replacement, the law of Gumbel top-k, in one compiled loop with alias
tables. Every request has its own random stream, so a token's choice depends on its request alone.
Knows shares and blocks. Knows nothing of where they come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ...foundation.arrays import FloatArray, IntArray
from ...foundation.compiled import compiled, compiled_inline, splitmix

_TRIES = 24  # rejected draws before the exact draw from what is left


@dataclass(frozen=True)
class BlockTables:
    """Alias tables per domain and layer: of the whole layer, and of each block inside it.

    `member_LE` lists experts block by block, `start_LB` where each block begins. A table column c
    of a span of n entries reads: keep c with probability accept[c], else take alias[c].
    """

    share_DLE: FloatArray
    member_LE: IntArray
    start_LB: IntArray        # [L, B + 1]
    mass_DLB: FloatArray      # [D, L, B] cumulative share of the blocks, last = 1
    layer_accept_DLE: npt.NDArray[np.float32]
    layer_alias_DLE: npt.NDArray[np.int32]
    block_accept_DLE: npt.NDArray[np.float32]
    block_alias_DLE: npt.NDArray[np.int32]

    @classmethod
    def of(cls, share_DLE: FloatArray, block_LE: IntArray) -> Self:
        """Tables for these shares; block_LE: [L, E] the block of each expert, 0..B-1."""
        domains, layers, experts = share_DLE.shape
        blocks = int(block_LE.max()) + 1
        member = np.argsort(block_LE, axis=1, kind="stable")
        start = np.stack([np.searchsorted(np.sort(row), np.arange(blocks + 1)) for row in block_LE])
        accept = np.empty((2, domains, layers, experts), np.float32)
        alias = np.empty((2, domains, layers, experts), np.int32)
        mass = np.empty((domains, layers, blocks))
        for d in range(domains):
            for layer in range(layers):
                share = share_DLE[d, layer]
                accept[0, d, layer], alias[0, d, layer] = _alias_table(share)
                inside = share[member[layer]]
                for b in range(blocks):
                    span = slice(start[layer, b], start[layer, b + 1])
                    accept[1, d, layer, span], alias[1, d, layer, span] = _alias_table(inside[span])
                    mass[d, layer, b] = inside[span].sum()
        mass = np.cumsum(mass, axis=2)
        mass /= mass[:, :, -1:]
        return cls(share_DLE, member, start, mass, accept[0], alias[0], accept[1], alias[1])


def sample_ids(
    tables: BlockTables, request_T: IntArray, domain_R: IntArray, top_k: int,
    probabilities: tuple[float, ...], seed: int,
) -> npt.NDArray[Any]:
    """[L, T, K] expert ids. request_T: ascending from 0. probabilities: of a choice inside the
    token's block, of keeping the place among blocks to the next layer, and to the next token."""
    _, layers, experts = tables.share_DLE.shape
    dtype = np.uint8 if experts <= 256 else np.uint16
    ids_LTK = np.empty((layers, len(request_T), top_k), dtype)
    _sample(
        ids_LTK, request_T, domain_R, np.array(probabilities), np.uint64(seed),
        tables.share_DLE, tables.member_LE, tables.start_LB, tables.mass_DLB,
        tables.layer_accept_DLE, tables.layer_alias_DLE,
        tables.block_accept_DLE, tables.block_alias_DLE,
    )
    return ids_LTK


def _alias_table(share: FloatArray) -> tuple[FloatArray, IntArray]:
    """Walker's alias table of shares that need not sum to 1 (Vose's construction)."""
    size = len(share)
    accept, alias = np.ones(size), np.arange(size)
    scaled = share * size / share.sum()
    small = [i for i in range(size) if scaled[i] < 1.0]
    large = [i for i in range(size) if scaled[i] >= 1.0]
    while small and large:
        low, high = small.pop(), large[-1]
        accept[low], alias[low] = scaled[low], high
        scaled[high] -= 1.0 - scaled[low]
        if scaled[high] < 1.0:
            small.append(large.pop())
    return accept, alias


@compiled_inline
def _unit(bits: Any) -> Any:
    return (bits >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@compiled
def _exact(share_E: Any, chosen_K: Any, count: int, unit: float) -> int:
    """An expert by share among those not chosen yet."""
    left = 0.0
    for e in range(len(share_E)):
        left += share_E[e]
    for j in range(count):
        left -= share_E[chosen_K[j]]
    threshold, last = unit * left, -1
    for e in range(len(share_E)):
        taken = False
        for j in range(count):
            taken = taken or chosen_K[j] == e
        if not taken:
            last = e
            threshold -= share_E[e]
            if threshold < 0.0:
                return e
    return last


@compiled
def _sample(
    ids_LTK: Any, request_T: Any, domain_R: Any, probabilities: Any, seed: Any,
    share_DLE: Any, member_LE: Any, start_LB: Any, mass_DLB: Any,
    layer_accept_DLE: Any, layer_alias_DLE: Any, block_accept_DLE: Any, block_alias_DLE: Any,
) -> None:
    layers, tokens, top_k = ids_LTK.shape
    experts, blocks = share_DLE.shape[2], mass_DLB.shape[2]
    inside, keep_layer, keep_token = probabilities
    golden, low_mask = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xFFFFFFFF)
    half, to_unit = np.uint64(32), 1.0 / 4294967296.0
    state, place, request = np.uint64(0), 0.0, -1
    for t in range(tokens):
        if request_T[t] != request:
            request = request_T[t]
            state = splitmix(seed * golden + np.uint64(request) + np.uint64(1))
            state += golden
            place = _unit(splitmix(state))
        domain = domain_R[request]
        state += golden
        if _unit(splitmix(state)) >= keep_token:
            state += golden
            place = _unit(splitmix(state))
        here = place
        for layer in range(layers):
            state += golden
            if layer > 0 and _unit(splitmix(state)) >= keep_layer:
                state += golden
                here = _unit(splitmix(state))
            block = 0
            while block < blocks - 1 and here >= mass_DLB[domain, layer, block]:
                block += 1
            start = start_LB[layer, block]
            size = start_LB[layer, block + 1] - start
            count, tries = 0, 0
            while count < top_k:
                # One draw: the upper half picks a column, the lower half accepts it or not.
                state += golden
                bits = splitmix(state)
                coin = (bits & low_mask) * to_unit
                column = (bits >> half) * to_unit
                if tries >= _TRIES:
                    expert = _exact(share_DLE[domain, layer], ids_LTK[layer, t], count, column)
                else:
                    state += golden
                    if inside > 0.0 and _unit(splitmix(state)) < inside:
                        c = start + int(column * size)
                        if coin >= block_accept_DLE[domain, layer, c]:
                            c = start + block_alias_DLE[domain, layer, c]
                        expert = member_LE[layer, c]
                    else:
                        c = int(column * experts)
                        if coin >= layer_accept_DLE[domain, layer, c]:
                            c = layer_alias_DLE[domain, layer, c]
                        expert = c
                taken = False
                for j in range(count):
                    taken = taken or ids_LTK[layer, t, j] == expert
                if taken:
                    tries += 1
                else:
                    ids_LTK[layer, t, count] = expert
                    count, tries = count + 1, 0
