"""Which places a token visits anyway, and the classes its assignments fall into.

For payloads that send a token once to each place (a rank or a node). Knows one step's ids and home
ranks and one layer's slots. Compiled, no randomness. The rule is told in `dispatch_merged.py`.

An assignment's class is its expert and the set of the expert's places that its token visits (one
of them where the expert is in more than MOST_SET_PLACES); under `per_rank` also the home node.
Classes of expert e are numbered first_E[e] + kind·groups + group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .cluster import Cluster
from .compiled import compiled
from .slot_table import SlotTable

MOST_SET_PLACES = 6


@dataclass(frozen=True, eq=False)
class ClassTable:
    """One layer's slots, seen as places. P places, R copies (one per expert and device)."""

    slots_per_device: int
    start_E: npt.NDArray[np.int32]
    slot_R: npt.NDArray[np.int32]
    place_G: npt.NDArray[np.int64]       # place of each device
    node_G: npt.NDArray[np.int64]
    place_R: npt.NDArray[np.int32]       # which of its expert's places a copy is in: 0, 1, ...
    count_E: npt.NDArray[np.int32]       # places of each expert
    first_E: npt.NDArray[np.int64]       # [E + 1]
    groups: int                          # home nodes told apart

    @classmethod
    def of(cls, table: SlotTable, cluster: Cluster) -> ClassTable:
        """The classes of one layer under the cluster's payload, per_node or per_rank."""
        per_node = cluster.traffic.payload == "per_node"
        place_G = cluster.node_G if per_node else np.arange(cluster.num_devices)
        groups = 1 if per_node else cluster.num_nodes
        start_E, slot_R = table.start_unique_E, table.slot_unique_R
        place_R, count_E = _index_places(start_E, slot_R, table.slots_per_device, place_G)
        first_E = _class_offsets(start_E, count_E, groups)
        return cls(table.slots_per_device, start_E, slot_R, place_G, cluster.node_G, place_R,
                   count_E, first_E, groups)

    @property
    def num_classes(self) -> int:
        return int(self.first_E[-1])

    def arrays(self) -> tuple[Any, Any, int, Any, Any, Any, Any, Any, int]:
        """What the compiled functions take, in their order."""
        return (self.start_E, self.slot_R, self.slots_per_device, self.place_G, self.node_G,
                self.place_R, self.count_E, self.first_E, self.groups)


@compiled
def _index_places(start_E: Any, slot_R: Any, slots_per_device: int, place_G: Any) -> Any:
    """(place_R, count_E). Slots ascend, so the copies in one place are neighbours."""
    place_R = np.empty(len(slot_R), np.int32)
    count_E = np.zeros(len(start_E) - 1, np.int32)
    for e in range(len(count_E)):
        last = -1
        for r in range(start_E[e], start_E[e + 1]):
            place = place_G[slot_R[r] // slots_per_device]
            if place != last:
                count_E[e] += 1
                last = place
            place_R[r] = count_E[e] - 1
    return place_R, count_E


@compiled
def _class_offsets(start_E: Any, count_E: Any, groups: int) -> Any:
    """[E + 1] where each expert's classes start; an expert with one copy has one kind."""
    first_E = np.zeros(len(count_E) + 1, np.int64)
    for e in range(len(count_E)):
        kinds = 1
        if start_E[e + 1] - start_E[e] > 1:
            kinds = 1 << count_E[e] if count_E[e] <= MOST_SET_PLACES else count_E[e]
        first_E[e + 1] = first_E[e] + kinds * groups
    return first_E


@compiled
def class_places(x: int, expert: int, count_E: Any, first_E: Any, groups: int) -> Any:
    """(bit set of the expert's free places, home node or -1) of class x."""
    kind = (x - first_E[expert]) // groups
    free = kind if count_E[expert] <= MOST_SET_PLACES else 1 << kind
    return free, ((x - first_E[expert]) % groups if groups > 1 else -1)


@compiled
def classify(
    ids_TK: Any, home_T: Any, start_E: Any, slot_R: Any, slots_per_device: int, place_G: Any,
    node_G: Any, place_R: Any, count_E: Any, first_E: Any, groups: int, class_TK: Any,
) -> None:
    """class_TK: the class of every assignment, -1 for negative ids."""
    seen_P = np.zeros(place_G[len(place_G) - 1] + 1, np.int64)   # last token to visit, from 1
    for t in range(ids_TK.shape[0]):
        home = home_T[t]
        _visit(ids_TK[t], home, start_E, slot_R, slots_per_device, place_G, node_G, count_E,
               t + 1, seen_P)
        group = node_G[home] if groups > 1 else 0
        for k in range(ids_TK.shape[1]):
            e = ids_TK[t, k]
            class_TK[t, k] = -1
            if e < 0:
                continue
            copies = start_E[e + 1] - start_E[e]
            if copies == 1:
                class_TK[t, k] = first_E[e] + group
                continue
            free = 0
            one = -1
            for i in range(copies):
                r = start_E[e] + (i + home + k) % copies
                if seen_P[place_G[slot_R[r] // slots_per_device]] == t + 1:
                    free |= 1 << place_R[r]
                    if one < 0:
                        one = place_R[r]
            kind = free if count_E[e] <= MOST_SET_PLACES else one
            class_TK[t, k] = first_E[e] + kind * groups + group


@compiled
def _visit(
    ids_K: Any, home: int, start_E: Any, slot_R: Any, slots_per_device: int, place_G: Any,
    node_G: Any, count_E: Any, stamp: int, seen_P: Any,
) -> None:
    """Mark (seen_P = stamp) the places that one token visits."""
    seen_P[place_G[home]] = stamp
    for e in ids_K:
        if e >= 0 and count_E[e] == 1:
            seen_P[place_G[slot_R[start_E[e]] // slots_per_device]] = stamp
    for k in range(len(ids_K)):
        e = ids_K[k]
        if e >= 0 and not _served(e, start_E, slot_R, slots_per_device, place_G, stamp, seen_P):
            seen_P[_place_to_open(
                ids_K, k, home, start_E, slot_R, slots_per_device, place_G, node_G, stamp, seen_P
            )] = stamp


@compiled
def _place_to_open(
    ids_K: Any, k: int, home: int, start_E: Any, slot_R: Any, slots_per_device: int, place_G: Any,
    node_G: Any, stamp: int, seen_P: Any,
) -> int:
    """The place of choice k's expert that serves most of the choices not yet served.

    Ties: a place in the home node, then the first in an order that turns with home and expert.
    """
    expert = ids_K[k]
    copies = start_E[expert + 1] - start_E[expert]
    best = -1
    best_score = -1
    for i in range(copies):
        device = slot_R[start_E[expert] + (i + home + expert) % copies] // slots_per_device
        score = 1 if node_G[device] == node_G[home] else 0
        for j in range(k, len(ids_K)):
            other = ids_K[j]
            if other < 0 or _served(other, start_E, slot_R, slots_per_device, place_G, stamp,
                                    seen_P):
                continue
            for r in range(start_E[other], start_E[other + 1]):
                if place_G[slot_R[r] // slots_per_device] == place_G[device]:
                    score += 2
                    break
        if score > best_score:
            best, best_score = place_G[device], score
    return best


@compiled
def _served(
    expert: int, start_E: Any, slot_R: Any, slots_per_device: int, place_G: Any, stamp: int,
    seen_P: Any,
) -> bool:
    """Whether some copy of the expert is in a place the token visits."""
    found = False
    for r in range(start_E[expert], start_E[expert + 1]):
        found = found or seen_P[place_G[slot_R[r] // slots_per_device]] == stamp
    return found
