"""SGLang's fair choice among replicas, draw by draw: Python's generator in compiled code.

SGLang draws with `random.Random(42)`: the Mersenne Twister, `sample` and `shuffle` as CPython has
them since 3.2. Repeated here so that a plan's table is the engine's own, in microseconds. Knows
numbers. Knows nothing of slots, ranks or layers.

A generator is 625 whole numbers: its 624 words, and which of them comes next.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import numpy.typing as npt

from ...foundation.compiled import compiled

WORDS, SHIFTED = 624, 397
LOW32 = 0xFFFFFFFF

Draws = npt.NDArray[np.int64]      # [G, 625] a generator for each rank


def first_draws(seed: int, ranks: int) -> Draws:
    """`random.Random(seed)` on every rank."""
    generator = np.array(random.Random(seed).getstate()[1], np.int64)
    return np.tile(generator, (ranks, 1))


@compiled
def fair_choices(generator: Any, replicas: int, ranks: int) -> Any:
    """[ranks] replica numbers: each equally often, give or take one, in shuffled order."""
    chosen = np.empty(ranks, np.int64)
    whole = ranks - ranks % replicas
    for i in range(whole):
        chosen[i] = i % replicas
    _sample(generator, replicas, chosen[whole:])
    for i in range(ranks - 1, 0, -1):
        j = _below(generator, i + 1)
        chosen[i], chosen[j] = chosen[j], chosen[i]
    return chosen


@compiled
def _sample(generator: Any, population: int, taken: Any) -> None:
    """`sample(range(population), len(taken))`, in one of its two ways, by size."""
    count = len(taken)
    in_a_set = 21
    if count > 5:
        power = 1
        while power < 3 * count:      # 4 ** ceil(log(3 * count, 4))
            power *= 4
        in_a_set += power
    pool = np.arange(population)
    if population <= in_a_set:
        for i in range(count):
            j = _below(generator, population - i)
            taken[i] = pool[j]
            pool[j] = pool[population - i - 1]
        return
    for i in range(count):
        j = _below(generator, population)
        while pool[j] < 0:
            j = _below(generator, population)
        taken[i] = j
        pool[j] = -1


@compiled
def _below(generator: Any, limit: int) -> int:
    """A whole number in [0, limit): as many bits as it takes, again while they are too many."""
    bits = 0
    while limit >> bits:
        bits += 1
    while True:
        drawn = _word(generator) >> (32 - bits)
        if drawn < limit:
            return int(drawn)


@compiled
def _word(generator: Any) -> int:
    """The next 32 bits."""
    if generator[WORDS] == WORDS:
        for i in range(WORDS):
            y = (generator[i] & 0x80000000) | (generator[(i + 1) % WORDS] & 0x7FFFFFFF)
            odd = 0x9908B0DF if y & 1 else 0
            generator[i] = generator[(i + SHIFTED) % WORDS] ^ (y >> 1) ^ odd
        generator[WORDS] = 0
    y = generator[generator[WORDS]]
    generator[WORDS] += 1
    y ^= y >> 11
    y ^= (y << 7) & 0x9D2C5680
    y ^= (y << 15) & 0xEFC60000
    y ^= y >> 18
    return int(y & LOW32)
