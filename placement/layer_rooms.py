"""What each device may hold in each layer: slots, and where memory is the tighter limit, bytes.

A device's memory is for the experts of all layers together. With experts of one size it is a number
of copies, shared between layers by what another copy is worth in each (`replicate.py`), so layers
may end up with different numbers of slots. With experts of different sizes every layer gets the
same bytes. Knows loads, sizes and devices. Knows nothing of what is placed where.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import InfeasibleError
from ..traces.spec import ModelSpec
from .cluster import Cluster
from .plan import Plan
from .replicate import lightest_heaviest_copy, share_slots_between_layers

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LayerRooms:
    """slots_LG [L, G]; room_LG [L, G] bytes, None where slots are the only limit."""

    slots_LG: IntArray
    room_LG: FloatArray | None = None
    notes: tuple[str, ...] = ()


def layer_rooms(
    load_LE: FloatArray, cluster: Cluster, model: ModelSpec | None, current: Plan | None = None
) -> LayerRooms:
    """Slots and bytes of each layer. current: a standing plan, whose layers keep their slots.

    Raises InfeasibleError when memory cannot hold one copy of every expert.
    """
    layers, experts = load_LE.shape
    slots_LG = np.tile(cluster.slots_G, (layers, 1))
    memory = [d.expert_memory_bytes for d in cluster.devices]
    if all(own is None for own in memory):
        return LayerRooms(slots_LG)
    if model is None or not (model.knows_sizes or model.expert_bytes):
        return LayerRooms(
            slots_LG, notes=("expert_memory_bytes not counted: give the model, for its sizes",)
        )
    memory_G = np.array([np.inf if own is None else own for own in memory])
    size_E = model.bytes_per_expert_E().astype(np.float64)
    if (memory_G >= layers * cluster.slots_G * size_E.max()).all():
        return LayerRooms(slots_LG)
    short = layers * size_E.sum() - memory_G.sum()
    if short > 0:
        raise InfeasibleError(
            f"{layers} layers of {experts} experts take {layers * size_E.sum():,.0f} bytes; the "
            f"devices' expert_memory_bytes hold {memory_G.sum():,.0f}: {short:,.0f} short; add "
            "devices or memory"
        )
    if size_E.min() < size_E.max():
        room_LG = np.tile(memory_G / layers, (layers, 1))
        return LayerRooms(slots_LG, room_LG, ("memory limits the experts' bytes on devices",))
    copies_G = np.minimum(memory_G // size_E[0], layers * cluster.slots_G).astype(np.int64)
    if current is not None:
        held_LG = (current.slots >= 0).sum(axis=2)
        return LayerRooms(np.minimum(np.maximum(held_LG, 1), cluster.slots_G))
    return _shared(load_LE, copies_G, cluster)


def _shared(load_LE: FloatArray, copies_G: IntArray, cluster: Cluster) -> LayerRooms:
    """copies_G [G] copies over all layers that each device's memory holds."""
    layers, experts = load_LE.shape
    budget = int(copies_G.sum()) - layers * experts
    if budget < 0:
        raise InfeasibleError(
            f"memory holds {int(copies_G.sum())} experts over all layers and devices, "
            f"{layers} layers of {experts} need {layers * experts}: add devices or memory"
        )
    widest = int(np.minimum(cluster.slots_G, experts).sum()) - experts
    cost_LR = np.stack([
        lightest_heaviest_copy(load_E, widest, cluster.num_devices) for load_E in load_LE
    ])
    spare_L = share_slots_between_layers(cost_LR, budget)
    slots_LG = np.zeros((layers, cluster.num_devices), np.int64)
    left_G = copies_G.copy()
    for layer in np.argsort(-spare_L, kind="stable"):
        slots_LG[layer] = _dealt(experts + int(spare_L[layer]), left_G, cluster.slots_G)
        left_G -= slots_LG[layer]
    said = f"memory holds {budget} copies beyond one of each expert; layers have " + (
        f"{spare_L.min()} to {spare_L.max()} of them, by what they are worth there"
    )
    return LayerRooms(slots_LG, notes=(said,))


def _dealt(count: int, left_G: IntArray, most_G: IntArray) -> IntArray:
    """[G] `count` slots, one by one to the device with most memory left, ties to the lower one.

    Raises InfeasibleError where the devices' slots of one layer are too few for what is left.
    """
    dealt_G = np.zeros(len(left_G), np.int64)
    heap = [(-int(left), g) for g, left in enumerate(left_G) if left > 0 and most_G[g] > 0]
    heapq.heapify(heap)
    for _ in range(count):
        if not heap:
            raise InfeasibleError(
                "memory and slots together leave a layer short: devices with memory to spare have "
                "too few slots per layer; even out expert_memory_bytes or raise slots"
            )
        left, g = heap[0]
        dealt_G[g] += 1
        if left + 1 < 0 and dealt_G[g] < most_G[g]:
            heapq.heapreplace(heap, (left + 1, g))
        else:
            heapq.heappop(heap)
    return dealt_G
