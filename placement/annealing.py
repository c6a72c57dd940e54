"""What the compiled searches share: the space they move in, the schedule, the cost of a step.

Knows numbers only; the searches know what a move is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .compiled import compiled

SlotArray = npt.NDArray[np.int16]


class SearchSpace(NamedTuple):
    """Devices of one layer. `fill` False: empty slots stay empty."""

    slots_G: Any      # [G] int64
    speed_G: Any      # [G] float64
    size_E: Any       # [E] float64 bytes of an expert; 0 where memory does not limit
    room_G: Any       # [G] float64 bytes for this layer; a huge number where it does not limit
    fill: bool


class Annealing(NamedTuple):
    """`moves` tried while the temperature falls geometrically; what overload costs.

    cost of a step = over + bend · over², over = max(0, peak − free). free = 1 asks for perfect
    balance; 1 + slack leaves that much to other aims.
    """

    moves: int
    hot: float
    cold: float
    bend: float
    free: float


@dataclass(frozen=True)
class Found:
    """What a search returns: the best placement seen, its cost, and where it stood at the end."""

    cost: float
    best_GC: SlotArray
    last_GC: SlotArray


def search_space(
    slots_G: npt.NDArray[np.int64],
    speed_G: npt.NDArray[np.float64],
    experts: int,
    size_E: npt.NDArray[np.float64] | None = None,
    room_G: npt.NDArray[np.float64] | None = None,
    *,
    fill: bool = True,
) -> SearchSpace:
    """The space with memory left out where it does not limit."""
    limited = size_E is not None and room_G is not None
    return SearchSpace(
        np.asarray(slots_G, np.int64),
        np.asarray(speed_G, np.float64),
        np.asarray(size_E, np.float64) if limited else np.zeros(experts),
        np.asarray(room_G, np.float64) if limited else np.full(len(slots_G), 1e300),
        fill,
    )


@compiled
def penalty(annealing: Annealing, peak: float) -> float:
    """Cost of one step whose most loaded device is at `peak` (1 = perfect)."""
    over = max(peak - annealing.free, 0.0)
    return over + annealing.bend * over * over
