"""Survivors short of memory: every expert covered within each device's bytes, replicas given up.

Invariant as in `survivors.py`: equal input gives equal slots. Memory is for all layers together, so
an orphan of one layer may take the bytes of another layer's replica. Experts with one replica stay
where they are. Knows slots and bytes.
"""

from __future__ import annotations

import numpy as np

from ...errors import InfeasibleError
from ...foundation.arrays import FloatArray, IntArray, SlotArray
from ..memory import held_bytes_G
from ..plan import EMPTY


def cover_within(
    slots_LGC: SlotArray, slots_G: IntArray, size_E: IntArray, most_G: FloatArray,
    names_G: IntArray,
) -> SlotArray:
    """Survivors' slots [L, G, C] with every expert of every layer in at least one.

    slots_G: slots of each device in a layer; most_G: bytes over all layers, inf = no limit;
    names_G: the devices' own numbers, for messages. Orphans go, largest first, then by layer and
    number, to a device with a slot (empty, or a replica's) and bytes: without giving a replica up
    if there is one, each time the device that took fewest orphans so far, then has most bytes
    left, then the lower one. Raises InfeasibleError where none has both.
    """
    slots = slots_LGC.copy()
    layers, devices, _ = slots.shape
    replicas_LE = np.stack([np.bincount(x[x >= 0], minlength=len(size_E)) for x in slots])
    orphans = np.argwhere(replicas_LE == 0)
    left_G = most_G - held_bytes_G(slots, size_E)
    short = layers * int(size_E.sum()) - most_G.sum()
    if short > 0:
        raise InfeasibleError(
            f"one replica of every expert takes {layers * int(size_E.sum()):,} bytes, the "
            f"{devices} surviving devices' expert_memory_bytes hold {short:,.0f} fewer: bring "
            "devices back"
        )
    taken_G = np.zeros(devices, np.int64)
    for layer, expert in orphans[np.argsort(-size_E[orphans[:, 1]], kind="stable")].tolist():
        order = np.lexsort((np.arange(devices), -left_G, taken_G)).tolist()
        given_up, g = min(
            ((_given_up(slots, replicas_LE, g, layer, int(size_E[expert]), left_G[g], slots_G[g],
                        size_E), g) for g in order),
            key=lambda found: np.inf if found[0] is None else len(found[0]),
        )
        if given_up is None:
            raise InfeasibleError(
                f"layer {layer}: no surviving device has a slot and {size_E[expert]:,} bytes for "
                f"expert {expert}, all replicas given up, unless others move; bring devices back "
                "or plan from scratch"
            )
        for other, c in given_up:
            replicas_LE[other, slots[other, g, c]] -= 1
            left_G[g] += size_E[slots[other, g, c]]
            slots[other, g, c] = EMPTY
        slots[layer, g, np.flatnonzero(slots[layer, g] == EMPTY)[0]] = expert
        replicas_LE[layer, expert] = 1
        left_G[g] -= size_E[expert]
        taken_G[g] += 1
    if (left_G < 0).any():
        g = int(np.argmin(left_G))
        raise InfeasibleError(
            f"the plan holds {-left_G[g]:,.0f} bytes more on device {names_G[g]} than its "
            "expert_memory_bytes allow: plan from scratch"
        )
    return slots


def _given_up(
    slots: SlotArray, replicas_LE: IntArray, g: int, layer: int, size: int, left: float, most: int,
    size_E: IntArray,
) -> list[tuple[int, int]] | None:
    """(layer, slot) of the replicas on device g that make way for an orphan; None = not enough.

    The layer's own first where its slots are full; then, largest first, what the bytes ask for.
    """
    gone: list[tuple[int, int]] = []
    replicas = replicas_LE.copy()

    def give_up(candidates: list[tuple[int, int]]) -> float:
        """Give up the best replica among these slots; its bytes, 0 where none is one."""
        spare = [
            (-int(replicas[at, slots[at, g, c]]), -int(size_E[slots[at, g, c]]), at, c)
            for at, c in candidates
            if slots[at, g, c] >= 0 and (at, c) not in gone and replicas[at, slots[at, g, c]] > 1
        ]
        if not spare:
            return 0.0
        _, freed, at, c = min(spare)
        replicas[at, slots[at, g, c]] -= 1
        gone.append((at, c))
        return float(-freed)

    if int((slots[layer, g] >= 0).sum()) >= most:
        left += give_up([(layer, c) for c in range(slots.shape[2])])
        if not gone:
            return None
    everywhere = [(at, c) for at in range(slots.shape[0]) for c in range(slots.shape[2])]
    while left < size:
        before = len(gone)
        left += give_up(everywhere)
        if len(gone) == before:
            return None
    return gone
