"""A plan's slots as bulk counting wants them: experts with equally many copies side by side.

Knows a plan's slots only. Knows nothing of tokens, steps or who asks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...placement.plan import Plan

Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class SlotLayout:
    """Experts by falling number of copies, slots so that equal copies lie side by side.

    Place p of a layer holds expert_LP; a run is a stretch of places with equally many copies.
    run_LRX: (first place, places, copies, first cell) of each run, places 0 past the last. Cell
    first + j·places + i is the j-th copy of the run's i-th place; slot_LS is its global slot, -1
    past the last. cell_LGC: the cells a device holds, -1 = none. turn_LP: expert mod copies.
    """

    expert_LP: Int32Array
    turn_LP: Int32Array
    run_LRX: Int32Array
    slot_LS: Int32Array
    cell_LGC: Int32Array

    @classmethod
    def of(cls, plan: Plan) -> SlotLayout:
        copies_LE = plan.replicas_LE
        expert_LP = np.argsort(-copies_LE, axis=1, kind="stable").astype(np.int32)
        copies_LP = np.take_along_axis(copies_LE, expert_LP, axis=1).astype(np.int32)
        runs = [_runs(copies_P) for copies_P in copies_LP]
        run_LRX = np.zeros((plan.num_layers, max(len(r) for r in runs), 4), np.int32)
        layers, devices, width = plan.slots.shape
        slot_LS = np.full((layers, devices * width), -1, np.int32)
        cell_LS = np.full((layers, devices * width), -1, np.int32)
        for layer, run_RX in enumerate(runs):
            run_LRX[layer, : len(run_RX)] = run_RX
            place_X, copy_X = _cells(run_RX)
            slot_X = _slots(plan.slots[layer].reshape(-1), expert_LP[layer][place_X], copy_X)
            slot_LS[layer, : len(slot_X)] = slot_X
            cell_LS[layer, slot_X] = np.arange(len(slot_X))
        return cls(
            expert_LP, (expert_LP % copies_LP).astype(np.int32), run_LRX, slot_LS,
            cell_LS.reshape(layers, devices, width),
        )


@functools.lru_cache(maxsize=4)
def layout_of(plan: Plan) -> SlotLayout:
    """A run asks for few plans, many times; a plan is known by identity and never changes."""
    return SlotLayout.of(plan)


def _runs(copies_P: Int32Array) -> Int32Array:
    """[runs, 4] first place, places, copies, first cell."""
    first = np.flatnonzero(np.diff(copies_P, prepend=-1))
    places = np.diff(np.append(first, len(copies_P)))
    copies = copies_P[first]
    cell = np.concatenate(([0], np.cumsum(places * copies)[:-1]))
    return np.stack([first, places, copies, cell], axis=1).astype(np.int32)


def _cells(run_RX: Int32Array) -> tuple[Int32Array, Int32Array]:
    """(place, copy) of every cell of a layer."""
    place = [np.tile(np.arange(first, first + m), copies) for first, m, copies, _ in run_RX]
    copy = [np.repeat(np.arange(copies), m) for _, m, copies, _ in run_RX]
    return np.concatenate(place).astype(np.int32), np.concatenate(copy).astype(np.int32)


def _slots(slots_S: Any, expert_X: Int32Array, copy_X: Int32Array) -> Int32Array:
    """Global slot of the j-th copy of each expert, ascending."""
    filled = np.flatnonzero(slots_S >= 0)
    by_expert = filled[np.argsort(slots_S[filled], kind="stable")]
    first_E = np.searchsorted(slots_S[by_expert], np.arange(int(expert_X.max()) + 1))
    chosen: Int32Array = by_expert[first_E[expert_X] + copy_X].astype(np.int32)
    return chosen
