"""What the compiled searches share: the space they move in, the schedule, the cost of a step.

Knows numbers only; the searches know what a move is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ....foundation.arrays import SlotArray
from ....foundation.compiled import compiled, compiled_inline


class SearchSpace(NamedTuple):
    """Devices of one layer, and how far a search may go from a standing placement.

    `fill` False: empty slots stay empty. standing_EG [E, G] bool marks what is held today; sending
    expert e to a device that does not hold it costs move_price_E[e], and all moves together at most
    move_budget. Shape (0, 0) = nothing stands, moves are free.
    """

    slots_G: Any      # [G] int64
    speed_G: Any      # [G] float64
    size_E: Any       # [E] float64 bytes of an expert; 0 where memory does not limit
    room_G: Any       # [G] float64 bytes for this layer; a huge number where it does not limit
    fill: bool
    standing_EG: Any
    move_price_E: Any
    move_budget: float


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
    standing_GC: SlotArray | None = None,
    move_price_E: npt.NDArray[np.float64] | None = None,
    move_budget: float = 0.0,
) -> SearchSpace:
    """The space; memory and moves left out where they do not limit."""
    standing_EG = np.zeros((0, 0), np.bool_)
    if standing_GC is not None:
        standing_EG = np.zeros((experts, len(slots_G)), np.bool_)
        device, slot = np.nonzero(standing_GC >= 0)
        standing_EG[standing_GC[device, slot], device] = True
    limited = size_E is not None and room_G is not None
    return SearchSpace(
        np.asarray(slots_G, np.int64),
        np.asarray(speed_G, np.float64),
        np.asarray(size_E, np.float64) if limited else np.zeros(experts),
        np.asarray(room_G, np.float64) if limited else np.full(len(slots_G), 1e300),
        fill,
        standing_EG,
        np.ones(experts) if move_price_E is None else np.asarray(move_price_E, np.float64),
        float(move_budget),
    )


def require_slots(space: SearchSpace, slots_GC: SlotArray) -> None:
    """Every search's first line: compiled loops index without looking.

    Slots [G, C] of at least the widest device's width, and nothing beyond a device's own slots.
    Raises AssertionError: callers bring standing plans into this form (`search.within_slots`).
    """
    devices, width = slots_GC.shape
    slots_G = np.asarray(space.slots_G)
    assert devices == len(slots_G), f"{devices} rows of slots for {len(slots_G)} devices"
    assert width >= slots_G.max(), f"{width} slots wide, a device has {slots_G.max()}"
    beyond = (slots_GC >= 0) & (np.arange(width) >= slots_G[:, None])
    assert not beyond.any(), f"device {np.argwhere(beyond)[0][0]} holds more than its slots"


@compiled_inline
def penalty(annealing: Annealing, peak: float) -> float:
    """Cost of one step whose most loaded device is at `peak` (1 = perfect)."""
    over = max(peak - annealing.free, 0.0)
    return over + annealing.bend * over * over


@compiled
def moves_price(space: SearchSpace, slots_GC: Any) -> float:
    """What it costs to get from the standing placement to these slots [G, C]."""
    if space.standing_EG.shape[0] == 0:
        return 0.0
    price = 0.0
    for g in range(len(slots_GC)):
        for e in slots_GC[g]:
            if e >= 0 and not space.standing_EG[e, g]:
                price += space.move_price_E[e]
    return price


@compiled_inline
def moves_price_change(space: SearchSpace, g1: int, g2: int, e1: int, e2: int) -> float:
    """How a move of the search changes that: e1 leaves g1 (for g2 if >= 0), e2 does the reverse."""
    if space.standing_EG.shape[0] == 0:
        return 0.0
    change = 0.0
    if e1 >= 0:
        if not space.standing_EG[e1, g1]:
            change -= space.move_price_E[e1]
        if g2 >= 0 and not space.standing_EG[e1, g2]:
            change += space.move_price_E[e1]
    if e2 >= 0:
        if not space.standing_EG[e2, g1]:
            change += space.move_price_E[e2]
        if g2 >= 0 and not space.standing_EG[e2, g2]:
            change -= space.move_price_E[e2]
    return change
