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

from ...foundation.compiled import compiled
from ..cluster import Cluster
from .replica_table import SlotTable

MOST_SET_PLACES = 6


@dataclass(frozen=True, eq=False)
class ClassTable:
    """One layer's slots, seen as places. P places, R copies (one per expert and device)."""

    slots_per_device: int
    start_E: npt.NDArray[np.int32]
    slot_R: npt.NDArray[np.int32]
    place_G: npt.NDArray[np.int64]       # place of each device
    node_G: npt.NDArray[np.int64]
    node_P: npt.NDArray[np.int64]        # node of each place
    spot_R: npt.NDArray[np.int32]        # place of each copy
    place_R: npt.NDArray[np.int32]       # which of its expert's places that is: 0, 1, ...
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
        spot_R, place_R, count_E = _index_places(start_E, slot_R, table.slots_per_device, place_G)
        first_E = _class_offsets(start_E, count_E, groups)
        node_P = cluster.node_G[np.unique(place_G, return_index=True)[1]]
        return cls(table.slots_per_device, start_E, slot_R, place_G, cluster.node_G, node_P,
                   spot_R, place_R, count_E, first_E, groups)

    @property
    def num_classes(self) -> int:
        return int(self.first_E[-1])

    def places(self) -> tuple[Any, Any, Any, Any, Any, Any, Any, Any, int]:
        """What `classify` takes, in its order."""
        return (self.start_E, self.place_G, self.node_G, self.node_P, self.spot_R, self.place_R,
                self.count_E, self.first_E, self.groups)

    def slots(self) -> tuple[Any, Any, int, Any, Any, Any, Any, int]:
        """What the split by classes takes, in its order."""
        return (self.start_E, self.slot_R, self.slots_per_device, self.node_G, self.place_R,
                self.count_E, self.first_E, self.groups)


@compiled
def _index_places(start_E: Any, slot_R: Any, slots_per_device: int, place_G: Any) -> Any:
    """(spot_R, place_R, count_E). Slots ascend, so the copies in one place are neighbours."""
    spot_R = np.empty(len(slot_R), np.int32)
    place_R = np.empty(len(slot_R), np.int32)
    count_E = np.zeros(len(start_E) - 1, np.int32)
    for e in range(len(count_E)):
        last = -1
        for r in range(start_E[e], start_E[e + 1]):
            spot_R[r] = place_G[slot_R[r] // slots_per_device]
            if spot_R[r] != last:
                count_E[e] += 1
                last = spot_R[r]
            place_R[r] = count_E[e] - 1
    return spot_R, place_R, count_E


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
    ids_TK: Any, home_T: Any, start_E: Any, place_G: Any, node_G: Any, node_P: Any, spot_R: Any,
    place_R: Any, count_E: Any, first_E: Any, groups: int, class_TK: Any,
) -> None:
    """class_TK: the class of every assignment, -1 for negative ids."""
    seen_P = np.zeros(len(node_P), np.int64)     # last token to visit, counted from 1
    serves_P = np.zeros(len(node_P), np.int64)
    waiting_K = np.empty(ids_TK.shape[1], np.int64)
    for t in range(ids_TK.shape[0]):
        home = home_T[t]
        _visit(ids_TK[t], home, place_G[home], start_E, node_G, node_P, spot_R, count_E, t + 1,
               seen_P, serves_P, waiting_K)
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
            kind = 0
            if count_E[e] <= MOST_SET_PLACES:
                for r in range(start_E[e], start_E[e + 1]):
                    if seen_P[spot_R[r]] == t + 1:
                        kind |= 1 << place_R[r]
            else:
                r = start_E[e] + (home + k) % copies
                while seen_P[spot_R[r]] != t + 1:
                    r = r + 1 if r + 1 < start_E[e + 1] else start_E[e]
                kind = place_R[r]
            class_TK[t, k] = first_E[e] + kind * groups + group


@compiled
def _visit(
    ids_K: Any, home: int, own_place: int, start_E: Any, node_G: Any, node_P: Any, spot_R: Any,
    count_E: Any, stamp: int, seen_P: Any, serves_P: Any, waiting_K: Any,
) -> None:
    """Mark (seen_P = stamp) the places that one token visits.

    waiting_K and serves_P are scratch: the choices not yet served in choice order, and how many of
    them each place would serve; serves_P is zero before and after.
    """
    seen_P[own_place] = stamp
    for e in ids_K:
        if e >= 0 and count_E[e] == 1:
            seen_P[spot_R[start_E[e]]] = stamp
    waiting = 0
    for e in ids_K:
        if e >= 0 and not _served(e, start_E, spot_R, stamp, seen_P):
            waiting_K[waiting] = e
            waiting += 1
            _count_places(e, 1, start_E, spot_R, serves_P)
    while waiting > 0:
        opened = _place_to_open(waiting_K[0], home, start_E, node_G, node_P, spot_R, serves_P)
        seen_P[opened] = stamp
        left = 0
        for i in range(waiting):
            e = waiting_K[i]
            if _served(e, start_E, spot_R, stamp, seen_P):
                _count_places(e, -1, start_E, spot_R, serves_P)
            else:
                waiting_K[left] = e
                left += 1
        waiting = left


@compiled
def _place_to_open(
    expert: int, home: int, start_E: Any, node_G: Any, node_P: Any, spot_R: Any, serves_P: Any
) -> int:
    """The expert's place that serves most of the choices not yet served.

    Ties: a place in the home node, then the first in an order that turns with home and expert.
    """
    copies = start_E[expert + 1] - start_E[expert]
    r = start_E[expert] + (home + expert) % copies
    best = -1
    best_score = -1
    for _ in range(copies):
        place = spot_R[r]
        score = 2 * serves_P[place] + (1 if node_P[place] == node_G[home] else 0)
        if score > best_score:
            best, best_score = place, score
        r = r + 1 if r + 1 < start_E[expert + 1] else start_E[expert]
    return best


@compiled
def _served(expert: int, start_E: Any, spot_R: Any, stamp: int, seen_P: Any) -> bool:
    """Whether some copy of the expert is in a place the token visits."""
    r = start_E[expert]
    while r < start_E[expert + 1] and seen_P[spot_R[r]] != stamp:
        r += 1
    return bool(r < start_E[expert + 1])


@compiled
def _count_places(expert: int, change: int, start_E: Any, spot_R: Any, serves_P: Any) -> None:
    """Add `change` to every place that holds the expert, once each."""
    last = -1
    for r in range(start_E[expert], start_E[expert + 1]):
        if spot_R[r] != last:
            last = spot_R[r]
            serves_P[last] += change
