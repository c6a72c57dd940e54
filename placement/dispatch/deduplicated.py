"""`balanced` where a token travels once per destination: what crosses anyway carries the balance.

A destination is a rank under `per_rank` and a node under `per_node`: a token pays for the
destinations it visits, not for its experts. Two nodes of two ranks, under `per_rank`:

        node 0          |         node 1
    rank 0    rank 1    |     rank 2    rank 3
    a b       c d       |     e a       f c          expert a lies on ranks 0 and 2, c on 1 and 3

    A token at home on rank 1 chooses e and a. It must visit rank 2, for e; a is there as well, and
    on rank 0. The set of a's destinations that it visits is {2}: a on rank 2 costs nothing more.

The rule.
1. `classify`. A token visits its own destination and the only destination of every expert that has
   one. Its remaining experts, in choice order, join a destination it visits already; if there is
   none, the token visits the one that serves most of its experts not yet served.
2. An assignment's class is its expert and the set of the expert's destinations that its token
   visits: there it travels free. Assignments are counted by home rank and class.
3. `split_classes`. The flattest split of the experts' tokens sets every device's cap. Within the
   caps as few assignments as possible leave their free destinations (`min_max_flow.py`), one to
   another node counting as three inside. So a token travels further only where balance needs it,
   and what balances is first of all the choice among free destinations. For that, classes of
   homes in different nodes are distinguished (home groups).
4. The flow of every class is divided among home ranks, own slots first, then in turn.
5. `place_classes`. A rank's tokens of a class take, in order, a slot on a rank they visit already,
   else the lowest with quota left.

Steps 1 and 5 need one rank's tokens only, steps 3 and 4 the counts of all ranks: so live ranks
exchange counts by class. Knows one step's ids and home ranks and one layer's slots. Compiled, no
randomness.

Axes: R replicas (one per expert and device), D destinations, X classes, N home groups, B blocks (a
class with tokens and a choice, of one home group), O a block's options.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...foundation.arrays import Int32Array
from ...foundation.compiled import compiled
from ..cluster import Cluster
from .balanced import split_flat
from .min_max_flow import fill_flat, push_excess
from .replica_table import ReplicaTable

LARGEST_SET = 6              # an expert in more destinations is classed by one that is visited
LEAVE_NEAR, LEAVE_FAR = 1, 3


class ClassTable(NamedTuple):
    """One layer's replicas by destination, and how its classes are numbered.

    Expert e has classes class_start_E[e]:class_start_E[e + 1]: one where it has one replica, else
    one per set of its destinations (bit set - 1), or per destination where they are many.
    """

    slots_per_device: int
    home_groups: int                               # home nodes distinguished
    start_E: Int32Array                            # replicas of e: start_E[e]:start_E[e + 1]
    slot_R: Int32Array
    destination_R: Int32Array
    nth_R: Int32Array                              # 0, 1, ... among its expert's destinations
    destinations_E: Int32Array                     # how many each expert has
    class_start_E: npt.NDArray[np.int64]           # [E + 1]
    destination_G: npt.NDArray[np.int64]
    node_G: npt.NDArray[np.int64]
    node_D: npt.NDArray[np.int64]

    @classmethod
    def of(cls, table: ReplicaTable, cluster: Cluster) -> ClassTable:
        """The classes of one layer under the cluster's payload, per_node or per_rank."""
        per_node = cluster.traffic.payload == "per_node"
        node_G = np.array(cluster.node_G, np.int64)
        destination_G = node_G if per_node else np.arange(cluster.num_devices)
        start_E, slot_R = table.start_unique_E, table.slot_unique_R
        destination_R, nth_R, destinations_E = _index_destinations(
            start_E, slot_R, table.slots_per_device, destination_G
        )
        return cls(
            slots_per_device=table.slots_per_device,
            home_groups=1 if per_node else cluster.num_nodes,
            start_E=start_E, slot_R=slot_R, destination_R=destination_R, nth_R=nth_R,
            destinations_E=destinations_E,
            class_start_E=_class_starts(start_E, destinations_E),
            destination_G=destination_G, node_G=node_G,
            node_D=node_G[np.unique(destination_G, return_index=True)[1]],
        )

    @property
    def num_classes(self) -> int:
        return int(self.class_start_E[-1])


class ClassSplit(NamedTuple):
    """What every home rank may send where, block by block; `place_classes` uses it up."""

    block_XN: Int32Array     # for classes with tokens and a choice only
    start_B: Int32Array      # options of block b: start_B[b]:start_B[b + 1]
    slot_O: Int32Array
    quota_GO: Int32Array


@compiled
def _index_destinations(
    start_E: Any, slot_R: Any, slots_per_device: int, destination_G: Any
) -> Any:
    """(destination_R, nth_R, destinations_E). Slots ascend, and so do an expert's destinations."""
    destination_R = np.empty(len(slot_R), np.int32)
    nth_R = np.empty(len(slot_R), np.int32)
    destinations_E = np.zeros(len(start_E) - 1, np.int32)
    for e in range(len(destinations_E)):
        last = -1
        for r in range(start_E[e], start_E[e + 1]):
            destination_R[r] = destination_G[slot_R[r] // slots_per_device]
            if destination_R[r] != last:
                destinations_E[e] += 1
                last = destination_R[r]
            nth_R[r] = destinations_E[e] - 1
    return destination_R, nth_R, destinations_E


@compiled
def _class_starts(start_E: Any, destinations_E: Any) -> Any:
    """[E + 1] where each expert's classes start."""
    class_start_E = np.zeros(len(destinations_E) + 1, np.int64)
    for e in range(len(destinations_E)):
        classes = 1
        if start_E[e + 1] - start_E[e] > 1:
            classes = destinations_E[e]
            if classes <= LARGEST_SET:
                classes = (1 << classes) - 1
        class_start_E[e + 1] = class_start_E[e] + classes
    return class_start_E


# ---- 1 and 2: what a token visits, and the classes of its assignments -----------------------


@compiled
def classify(ids_TK: Any, home_T: Any, table: Any, class_TK: Any, counts_GX: Any) -> None:
    """class_TK: the class of every assignment, -1 for negative ids. Adds to counts_GX."""
    start_E, destination_R, nth_R = table.start_E, table.destination_R, table.nth_R
    destinations_E, class_start_E = table.destinations_E, table.class_start_E
    destination_G, node_G, node_D = table.destination_G, table.node_G, table.node_D
    visited_D = np.zeros(len(node_D), np.int64)     # last token to visit, counted from 1
    serves_D = np.zeros(len(node_D), np.int64)
    waiting_K = np.empty(ids_TK.shape[1], np.int64)
    for t in range(ids_TK.shape[0]):
        home = home_T[t]
        visited_D[destination_G[home]] = t + 1
        _visit(ids_TK[t], home, node_G[home], start_E, destination_R, destinations_E, node_D,
               t + 1, visited_D, serves_D, waiting_K)
        for k in range(ids_TK.shape[1]):
            e = ids_TK[t, k]
            class_TK[t, k] = -1
            if e < 0:
                continue
            x = class_start_E[e]
            replicas = start_E[e + 1] - start_E[e]
            if replicas > 1 and destinations_E[e] <= LARGEST_SET:
                visited = 0
                for r in range(start_E[e], start_E[e + 1]):
                    if visited_D[destination_R[r]] == t + 1:
                        visited |= 1 << nth_R[r]
                x += visited - 1
            elif replicas > 1:
                r = start_E[e] + (home + k) % replicas
                while visited_D[destination_R[r]] != t + 1:
                    r = r + 1 if r + 1 < start_E[e + 1] else start_E[e]
                x += nth_R[r]
            class_TK[t, k] = x
            counts_GX[home, x] += 1


@compiled
def _visit(
    ids_K: Any, home: int, home_node: int, start_E: Any, destination_R: Any, destinations_E: Any,
    node_D: Any, stamp: int, visited_D: Any, serves_D: Any, waiting_K: Any,
) -> None:
    """Mark (visited_D = stamp) the destinations that one token visits; its own is marked already.

    waiting_K and serves_D are scratch: the choices not yet served in choice order, and how many of
    them each destination would serve; serves_D is zero before and after.
    """
    for e in ids_K:
        if e >= 0 and destinations_E[e] == 1:
            visited_D[destination_R[start_E[e]]] = stamp
    waiting = 0
    for e in ids_K:
        if e >= 0 and not _served(e, start_E, destination_R, stamp, visited_D):
            waiting_K[waiting] = e
            waiting += 1
            _count_destinations(e, 1, start_E, destination_R, serves_D)
    while waiting > 0:
        visited_D[_next_destination(
            waiting_K[0], home, home_node, start_E, destination_R, node_D, serves_D
        )] = stamp
        left = 0
        for i in range(waiting):
            e = waiting_K[i]
            if _served(e, start_E, destination_R, stamp, visited_D):
                _count_destinations(e, -1, start_E, destination_R, serves_D)
            else:
                waiting_K[left] = e
                left += 1
        waiting = left


@compiled
def _next_destination(
    expert: int, home: int, home_node: int, start_E: Any, destination_R: Any, node_D: Any,
    serves_D: Any,
) -> int:
    """The expert's destination that serves most of the choices not yet served.

    Ties: one in the home node, then the first in an order that turns with home and expert.
    """
    first, last = start_E[expert], start_E[expert + 1]
    r = first + (home + expert) % (last - first)
    best = -1
    best_score = -1
    for _ in range(last - first):
        d = destination_R[r]
        score = 2 * serves_D[d] + (1 if node_D[d] == home_node else 0)
        if score > best_score:
            best, best_score = d, score
        r = r + 1 if r + 1 < last else first
    return best


@compiled
def _served(expert: int, start_E: Any, destination_R: Any, stamp: int, visited_D: Any) -> bool:
    """Whether some replica of the expert is in a destination the token visits."""
    r = start_E[expert]
    while r < start_E[expert + 1] and visited_D[destination_R[r]] != stamp:
        r += 1
    return bool(r < start_E[expert + 1])


@compiled
def _count_destinations(
    expert: int, change: int, start_E: Any, destination_R: Any, serves_D: Any
) -> None:
    """Add `change` to every destination that holds the expert, once each."""
    last = -1
    for r in range(start_E[expert], start_E[expert + 1]):
        if destination_R[r] != last:
            last = destination_R[r]
            serves_D[last] += change


# ---- 3 and 4: quotas from the counts of all ranks -------------------------------------------


@compiled
def split_classes(counts_GX: Any, table: Any, speed_G: Any, slack: float) -> Any:
    """Quotas by home rank and (class, slot), from the counts of all ranks."""
    start_E, slots_per_device = table.start_E, table.slots_per_device
    group_G = _home_groups(table)
    tokens_XN = np.zeros((counts_GX.shape[1], table.home_groups), np.int64)
    for g in range(counts_GX.shape[0]):
        for x in range(counts_GX.shape[1]):
            tokens_XN[x, group_G[g]] += counts_GX[g, x]
    total_E = np.zeros(len(start_E) - 1, np.int64)
    for e in range(len(total_E)):
        for x in range(table.class_start_E[e], table.class_start_E[e + 1]):
            for n in range(table.home_groups):
                total_E[e] += tokens_XN[x, n]
    flat = split_flat(total_E, start_E, table.slot_R, slots_per_device, speed_G, slack)
    load_G, cap_G = flat[4], flat[6]
    block_XN, expert_B, class_B, group_B = _blocks(tokens_XN, table)
    start_B = np.zeros(len(class_B) + 1, np.int32)
    for b in range(len(class_B)):
        start_B[b + 1] = start_B[b] + start_E[expert_B[b] + 1] - start_E[expert_B[b]]
    slot_O = np.empty(start_B[len(class_B)], np.int32)
    cost_O = np.zeros(len(slot_O), np.int32)
    end_B = np.empty(len(class_B), np.int32)
    tokens_B = np.empty(len(class_B), np.int64)
    for b in range(len(class_B)):
        tokens_B[b] = tokens_XN[class_B[b], group_B[b]]
        end_B[b] = _list_options(
            start_B[b], expert_B[b], class_B[b], group_B[b], table, slot_O, cost_O
        )
    flow_O = np.zeros(len(slot_O), np.int64)
    device_O = slot_O // np.int32(slots_per_device)
    fill_flat(tokens_B, start_B, end_B, device_O, flow_O, load_G, speed_G, cap_G)
    push_excess(start_B, device_O, cost_O, flow_O, load_G, cap_G)
    quota_GO = np.zeros((counts_GX.shape[0], len(slot_O)), np.int32)
    _divide(
        counts_GX, group_G, slots_per_device, expert_B, class_B, group_B, start_B, slot_O, flow_O,
        quota_GO,
    )
    return ClassSplit(block_XN, start_B, slot_O, quota_GO)


@compiled
def _home_groups(table: Any) -> Any:
    """[G] the home group of each rank: its node, or 0 where nodes are not distinguished."""
    if table.home_groups > 1:
        return table.node_G
    return np.zeros(len(table.node_G), np.int64)


@compiled
def _blocks(tokens_XN: Any, table: Any) -> Any:
    """(block_XN, expert_B, class_B, group_B): classes with tokens and a choice, by home group."""
    block_XN = np.empty(tokens_XN.shape, np.int32)
    most = tokens_XN.size
    expert_B, class_B = np.empty(most, np.int32), np.empty(most, np.int64)
    group_B = np.empty(most, np.int64)
    b = 0
    for e in range(len(table.start_E) - 1):
        if table.start_E[e + 1] - table.start_E[e] < 2:
            continue
        for x in range(table.class_start_E[e], table.class_start_E[e + 1]):
            for n in range(tokens_XN.shape[1]):
                if tokens_XN[x, n] > 0:
                    block_XN[x, n] = b
                    expert_B[b], class_B[b], group_B[b] = e, x, n
                    b += 1
    return block_XN, expert_B[:b], class_B[:b], group_B[:b]


@compiled
def _list_options(
    at: int, expert: int, x: int, group: int, table: Any, slot_O: Any, cost_O: Any
) -> int:
    """Write one block's slots from option `at` on, free ones first; returns where those end."""
    first, last = table.start_E[expert], table.start_E[expert + 1]
    free = x - table.class_start_E[expert]
    free = free + 1 if table.destinations_E[expert] <= LARGEST_SET else 1 << free
    o = at
    for r in range(first, last):
        if (free >> table.nth_R[r]) & 1:
            slot_O[o] = table.slot_R[r]
            o += 1
    end = o
    for r in range(first, last):
        if not (free >> table.nth_R[r]) & 1:
            slot_O[o] = table.slot_R[r]
            node = table.node_G[table.slot_R[r] // table.slots_per_device]
            cost_O[o] = LEAVE_NEAR if table.home_groups == 1 or node == group else LEAVE_FAR
            o += 1
    return end


@compiled
def _divide(
    counts_GX: Any, group_G: Any, slots_per_device: int, expert_B: Any, class_B: Any,
    group_B: Any, start_B: Any, slot_O: Any, flow_O: Any, quota_GO: Any,
) -> None:
    """Each block's flow among its home ranks: own slots first, then the rest in turn."""
    homes = counts_GX.shape[0]
    left_G = np.empty(homes, np.int64)
    left_O = flow_O.copy()
    for b in range(len(class_B)):
        for g in range(homes):
            left_G[g] = counts_GX[g, class_B[b]] if group_G[g] == group_B[b] else 0
        for o in range(start_B[b], start_B[b + 1]):
            home = slot_O[o] // slots_per_device
            own = min(left_O[o], left_G[home])
            quota_GO[home, o] += own
            left_G[home] -= own
            left_O[o] -= own
        o = start_B[b]
        for i in range(homes):
            home = (i + expert_B[b]) % homes
            while left_G[home] > 0:
                while left_O[o] == 0:
                    o += 1
                amount = min(left_O[o], left_G[home])
                quota_GO[home, o] += amount
                left_G[home] -= amount
                left_O[o] -= amount


@compiled
def quotas_of_classes(counts_GX: Any, table: Any, split: Any, quotas_GS: Any) -> None:
    """What each home rank sends to each slot; quotas_GS comes in zero, `split` not yet used."""
    for g in range(counts_GX.shape[0]):
        for e in range(len(table.start_E) - 1):
            if table.start_E[e + 1] - table.start_E[e] == 1:
                quotas_GS[g, table.slot_R[table.start_E[e]]] = counts_GX[g, table.class_start_E[e]]
        for o in range(len(split.slot_O)):
            quotas_GS[g, split.slot_O[o]] += split.quota_GO[g, o]


# ---- 5: slots ------------------------------------------------------------------------------


@compiled
def place_classes(
    ids_TK: Any, home_T: Any, class_TK: Any, table: Any, split: Any, slot_TK: Any
) -> None:
    """Tokens in order: experts without a choice first, then a slot on a rank already visited."""
    start_E, slot_R, slots_per_device = table.start_E, table.slot_R, table.slots_per_device
    block_XN, start_B, slot_O, quota_GO = split
    group_G = _home_groups(table)
    visited_G = np.zeros(len(group_G), np.int64)      # last token to visit, counted from 1
    for t in range(ids_TK.shape[0]):
        home = home_T[t]
        visited_G[home] = t + 1
        for k in range(ids_TK.shape[1]):
            e = ids_TK[t, k]
            slot_TK[t, k] = -1
            if e >= 0 and start_E[e + 1] - start_E[e] == 1:
                slot_TK[t, k] = slot_R[start_E[e]]
                visited_G[slot_R[start_E[e]] // slots_per_device] = t + 1
        for k in range(ids_TK.shape[1]):
            if class_TK[t, k] < 0 or slot_TK[t, k] >= 0:
                continue
            b = block_XN[class_TK[t, k], group_G[home]]
            chosen = -1
            for o in range(start_B[b], start_B[b + 1]):
                if quota_GO[home, o] > 0:
                    if visited_G[slot_O[o] // slots_per_device] == t + 1:
                        chosen = o
                        break
                    if chosen < 0:
                        chosen = o
            quota_GO[home, chosen] -= 1
            slot_TK[t, k] = slot_O[chosen]
            visited_G[slot_O[chosen] // slots_per_device] = t + 1
