"""Which expert leaves the cache: LRU, LFU, FIFO, LIFO after inactive, cross-layer, Belady.

Knows resident experts, when they came and when they were used. Knows nothing of bytes or time.
Experts are numbered over all layers, layer x E + expert; ties go to the lower number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ...errors import UsageError

NEVER = 2**62


class Eviction(Protocol):
    """Told of every load and use, asked for a victim. `turn` counts accesses."""

    def loaded(self, expert: int, turn: int) -> None: ...
    def used(self, expert: int, turn: int) -> None: ...
    def victim(self, resident: Collection[int], active: Collection[int]) -> int: ...


class _LastUse:
    """Remembers when each expert was used last; one that is loaded counts as used."""

    def __init__(self) -> None:
        self.last: dict[int, int] = {}

    def loaded(self, expert: int, turn: int) -> None:
        self.last[expert] = turn

    def used(self, expert: int, turn: int) -> None:
        self.last[expert] = turn


class LeastRecent(_LastUse):
    """LRU: the one unused for longest."""

    def victim(self, resident: Collection[int], active: Collection[int]) -> int:
        return min(resident, key=lambda e: (self.last[e], e))


class LeastFrequent(_LastUse):
    """LFU: the one with fewest uses in the whole run; among equals the one unused for longest."""

    def __init__(self) -> None:
        super().__init__()
        self.uses: Counter[int] = Counter()

    def used(self, expert: int, turn: int) -> None:
        super().used(expert, turn)
        self.uses[expert] += 1

    def victim(self, resident: Collection[int], active: Collection[int]) -> int:
        return min(resident, key=lambda e: (self.uses[e], self.last[e], e))


class FirstIn:
    """FIFO: the one loaded first."""

    def __init__(self) -> None:
        self.came: dict[int, int] = {}

    def loaded(self, expert: int, turn: int) -> None:
        self.came[expert] = turn

    def used(self, expert: int, turn: int) -> None:
        """Uses do not matter."""

    def victim(self, resident: Collection[int], active: Collection[int]) -> int:
        return min(resident, key=lambda e: (self.came[e], e))


class InactiveThenLastIn(_LastUse):
    """Expert buffering (arXiv 2303.06182): first an expert without tokens in this step, the one
    unused for longest; else the one used last. Experts run in rising order in every step, so that
    one is needed again latest.
    """

    def victim(self, resident: Collection[int], active: Collection[int]) -> int:
        inactive = [e for e in resident if e not in active]
        if inactive:
            return min(inactive, key=lambda e: (self.last[e], e))
        return max(resident, key=lambda e: (self.last[e], -e))


class CrossLayer(_LastUse):
    """ExpertFlow's slots: a layer's are free when it has run, the one that ran last first.

    It is the one whose turn comes last in the next step. Experts loaded ahead and not used yet
    stay; among equals the lower number goes.
    """

    def loaded(self, expert: int, turn: int) -> None:
        self.last[expert] = -1

    def victim(self, resident: Collection[int], active: Collection[int]) -> int:
        free = [e for e in resident if e not in active]
        return max(free or resident, key=lambda e: (self.last[e], -e))


class Belady:
    """MIN: the one whose next use is farthest away. Knows the future: a bound, not a policy."""

    def __init__(self, accesses: Iterable[int]) -> None:
        uses: dict[int, list[int]] = {}
        for turn, expert in enumerate(accesses):
            uses.setdefault(expert, []).append(turn)
        self.uses: Mapping[int, npt.NDArray[np.int64]] = {
            e: np.array(turns, np.int64) for e, turns in uses.items()
        }
        self.turn = -1

    def loaded(self, expert: int, turn: int) -> None:
        self.turn = max(self.turn, turn)

    def used(self, expert: int, turn: int) -> None:
        self.turn = turn

    def victim(self, resident: Collection[int], active: Collection[int]) -> int:
        return max(resident, key=lambda e: (self._next(e), -e))

    def _next(self, expert: int) -> int:
        turns = self.uses.get(expert)
        if turns is None:
            return NEVER
        at = int(np.searchsorted(turns, self.turn, side="right"))
        return int(turns[at]) if at < len(turns) else NEVER


POLICIES = ("lru", "lfu", "fifo", "lifo_after_inactive", "cross_layer", "belady")


def make_policy(name: str, accesses: Iterable[int]) -> Eviction:
    """A fresh policy by name; `accesses` is the run's order of experts, for Belady."""
    if name == "belady":
        return Belady(accesses)
    makers: dict[str, Callable[[], Eviction]] = {
        "lru": LeastRecent, "lfu": LeastFrequent, "fifo": FirstIn,
        "lifo_after_inactive": InactiveThenLastIn, "cross_layer": CrossLayer,
    }
    if name not in makers:
        raise UsageError(f"unknown cache policy {name!r}; there are: {', '.join(POLICIES)}")
    return makers[name]()
