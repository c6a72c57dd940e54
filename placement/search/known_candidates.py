"""What the planner's other methods would place in a layer, so that no search loses to them.

`auto` scores each as one more candidate; most cost less to make than to score. Beside them the
packing of `lpt_swap` on fewer slots: a replica that gains nothing should not be there. Where EPLB
puts an expert on a device twice, once is enough; but rules that share by slot then send that device
two shares, which no single slot does, so there both are candidates (vllm-ascend cannot hold an
expert twice). Knows one layer's task. Knows nothing of search.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ...errors import InfeasibleError, UsageError
from ...foundation.arrays import SlotArray
from ..methods.baselines import LAYER_METHODS, LayerLoads, lpt_swap
from .layer_task import LayerTask

FEWER = (0.5, 0.25, 0.0)      # of the spare slots
SHARING_TWICE = ("eplb", "eplb_hierarchical")                 # may put an expert on a device twice
ONE_SHARE = ("balanced", "fewest_active", "ascend_fixed")     # to each device that holds an expert


def known_candidates(task: LayerTask, loads: LayerLoads) -> Iterator[tuple[str, SlotArray]]:
    """(name, slots) of every method, and of packings on fewer slots."""
    for name, method in LAYER_METHODS.items():
        try:
            slots_GC = method(loads)
        except (InfeasibleError, UsageError):    # it wants equal devices, or more memory
            continue
        yield name, without_duplicates(slots_GC)
        if name in SHARING_TWICE and task.dispatch.policy not in ONE_SHARE:
            yield f"{name}, as it is", slots_GC
    yield from task.known
    slots = int(loads.usable_slots_G().sum())
    for keep, fewer in with_fewer_slots(loads):
        name = f"lpt_swap, {keep} of {slots} slots"
        try:
            yield name, widened(lpt_swap(fewer), loads.most_slots)
        except InfeasibleError:        # memory needs more slots than these
            return


def with_fewer_slots(loads: LayerLoads) -> Iterator[tuple[int, LayerLoads]]:
    """(slots, the same layer with so many slots), where some are spare."""
    experts, slots = loads.experts, int(loads.usable_slots_G().sum())
    for share in FEWER:
        keep = experts + round(share * (slots - experts))
        if keep < slots:
            yield keep, replace(loads, slots_G=_trimmed(loads.slots_G, keep))


def without_duplicates(slots_GC: SlotArray) -> SlotArray:
    """Second and further replicas of an expert on one device become empty slots."""
    slots_GC = slots_GC.copy()
    for row in slots_GC:
        _, first = np.unique(row, return_index=True)
        again = np.ones(len(row), bool)
        again[first] = False
        row[again] = -1
    return slots_GC


def widened(slots_GC: SlotArray, width: int) -> SlotArray:
    """The same slots, padded with empty ones."""
    wide = np.full((len(slots_GC), width), -1, np.int16)
    wide[:, : slots_GC.shape[1]] = slots_GC
    return wide


def complete(slots_GC: SlotArray, experts: int) -> bool:
    """Whether every expert has a slot."""
    return len(np.unique(slots_GC[slots_GC >= 0])) == experts


def _trimmed(slots_G: npt.NDArray[np.int64], keep: int) -> npt.NDArray[np.int64]:
    """Fewer slots, taken one by one from the device with most (ties: the last)."""
    slots = slots_G.copy()
    while int(slots.sum()) > keep:
        slots[len(slots) - 1 - int(np.argmax(slots[::-1]))] -= 1
    return slots
