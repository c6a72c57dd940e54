"""What each device may hold in each layer: slots, and where memory is the tighter limit, bytes.

A device's memory is for the experts of all layers together. With experts of one size it is a number
of replicas, shared between layers by what another replica is worth in each (`replicate.py`), so
layers may end up with different numbers of slots; every device's replicas are dealt as evenly over
layers as that allows. With experts of different sizes every layer gets the same bytes. Knows loads,
sizes and devices. Knows nothing of what is placed where.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import InfeasibleError
from ...foundation.arrays import FloatArray, IntArray
from ...traces.model_spec import ModelSpec
from ..cluster import Cluster
from ..memory import NOT_COUNTED, held_bytes_G, limits_G
from ..methods.replicate import lightest_heaviest_replica, share_slots_between_layers
from ..plan import Plan


@dataclass(frozen=True)
class LayerCapacity:
    """slots_LG [L, G]; capacity_LG [L, G] bytes, None where slots are the only limit."""

    slots_LG: IntArray
    capacity_LG: FloatArray | None = None
    notes: tuple[str, ...] = ()


def capacity_per_layer(
    load_LE: FloatArray, cluster: Cluster, model: ModelSpec | None, current: Plan | None = None
) -> LayerCapacity:
    """Slots and bytes of each layer. current: the current plan, whose layers keep what they hold.

    Raises InfeasibleError when memory cannot hold one replica of every expert, or not what
    `current` puts on a device.
    """
    layers, experts = load_LE.shape
    slots_LG = np.tile(cluster.slots_G, (layers, 1))
    if model is None or not model.knows_bytes:
        own = any(d.expert_memory_bytes is not None for d in cluster.devices)
        return LayerCapacity(slots_LG, notes=(NOT_COUNTED,) if own else ())
    size_E = model.bytes_per_expert_E().astype(np.float64)
    memory_G = _part_of_memory(limits_G(cluster, model, current), layers, model, current)
    if (memory_G >= layers * cluster.slots_G * size_E.max()).all():
        return LayerCapacity(slots_LG)
    short = layers * size_E.sum() - memory_G.sum()
    if short > 0:
        raise InfeasibleError(
            f"{layers} layers of {experts} experts take {layers * size_E.sum():,.0f} bytes; the "
            f"devices' memory holds {memory_G.sum():,.0f}: {short:,.0f} short; add devices or "
            "memory"
        )
    if size_E.min() < size_E.max():
        capacity_LG = _bytes_of_layers(memory_G, size_E, layers, current)
        notes = ("memory limits the experts' bytes on devices",)
        return LayerCapacity(slots_LG, capacity_LG, notes)
    copies_G = np.minimum(np.floor(memory_G / size_E[0]), layers * cluster.slots_G)
    if current is not None:
        return LayerCapacity(_kept(current, copies_G.astype(np.int64), cluster.slots_G))
    most_G = np.minimum(cluster.slots_G, experts)
    return _shared(load_LE, np.minimum(copies_G, layers * most_G).astype(np.int64), most_G)


def _part_of_memory(
    limit_G: FloatArray, layers: int, model: ModelSpec, current: Plan | None
) -> FloatArray:
    """[G] bytes for these layers: the model's others, which no trace tells of, need memory too, and
    each layer counts the same. What a current plan holds in these layers stays theirs."""
    if layers >= model.num_layers:
        return limit_G
    part_G = limit_G * layers / model.num_layers
    if current is None:
        return part_G
    held_G = held_bytes_G(current.slots, model.bytes_per_expert_E())
    return np.asarray(np.minimum(limit_G, np.maximum(part_G, held_G)))


def _bytes_of_layers(
    memory_G: FloatArray, size_E: FloatArray, layers: int, current: Plan | None
) -> FloatArray:
    """[L, G] bytes: the same in every layer, beyond what the current plan holds there.

    Raises InfeasibleError where it holds more than a device's memory.
    """
    if current is None:
        return np.tile(memory_G / layers, (layers, 1))
    held_LG = np.where(current.slots >= 0, size_E[np.maximum(current.slots, 0)], 0.0).sum(axis=2)
    _require_memory(held_LG.sum(axis=0), memory_G, "bytes")
    return np.asarray(held_LG + (memory_G - held_LG.sum(axis=0)) / layers)


def _kept(current: Plan, copies_G: IntArray, slots_G: IntArray) -> IntArray:
    """[L, G] slots: those the current plan fills; what its device's memory holds beyond them goes
    to the layers in which it has fewest, one by one, ties to the lower layer."""
    held_LG = (current.slots >= 0).sum(axis=2)
    left_G = copies_G - np.minimum(held_LG, slots_G).sum(axis=0)
    _require_memory(held_LG.sum(axis=0), copies_G, "experts")
    slots_LG: IntArray = np.minimum(held_LG, slots_G).astype(np.int64)
    for g in range(len(slots_G)):
        for _ in range(int(left_G[g])):
            layer = int(np.argmin(slots_LG[:, g]))
            if slots_LG[layer, g] >= slots_G[g]:
                break
            slots_LG[layer, g] += 1
    return slots_LG


def _require_memory(
    held_G: npt.NDArray[np.number[Any]], most_G: npt.NDArray[np.number[Any]], what: str
) -> None:
    over = np.flatnonzero(held_G > most_G)
    if len(over):
        g = int(over[0])
        raise InfeasibleError(
            f"the current plan holds {held_G[g]:,.0f} {what} on device {g} over all layers, whose "
            f"expert_memory_bytes allow {most_G[g]:,.0f} ({len(over)} such devices): plan from "
            "scratch, or raise expert_memory_bytes"
        )


def _shared(load_LE: FloatArray, copies_G: IntArray, most_G: IntArray) -> LayerCapacity:
    """copies_G [G] replicas over all layers that each device's memory holds, at most L·most_G.

    k layers together can get sum over devices of min(copies_g, k·most_g), and nothing else limits
    what the layers' sums may be (max-flow/min-cut: a device gives a layer at most most_g). So
    memory is too small only where all layers ask for more than there is at one replica of each
    expert.
    """
    layers, experts = load_LE.shape
    together_K = np.minimum(
        copies_G, np.arange(1, layers + 1)[:, None] * most_G
    ).sum(axis=1)
    spare_K = together_K - experts * np.arange(1, layers + 1)
    budget = int(spare_K[-1])
    if budget < 0:
        raise InfeasibleError(
            f"memory holds {int(copies_G.sum())} experts over all layers and devices, "
            f"{layers} layers of {experts} need {layers * experts}: add devices or memory"
        )
    cost_LR = np.stack([
        lightest_heaviest_replica(load_E, int(spare_K[0]), len(copies_G)) for load_E in load_LE
    ])
    spare_L = _spare_within(cost_LR, spare_K)
    note = f"memory holds {budget} replicas beyond one of each expert; layers have " + (
        f"{spare_L.min()} to {spare_L.max()} of them, by what they are worth there"
    )
    return LayerCapacity(_dealt(experts + spare_L, copies_G, most_G), notes=(note,))


def _spare_within(cost_LR: FloatArray, most_K: IntArray) -> IntArray:
    """[L] spare slots by marginal benefit, any k layers together at most most_K[k - 1].

    The layers that together ask for most beyond their limit get exactly that limit, the others
    what is left; exact, because most_K is concave (decomposition over a polymatroid).
    Source: Fujishige (1980); Groenevelt (1991).
    """
    spare_L = share_slots_between_layers(cost_LR, int(most_K[-1]))
    order = np.argsort(-spare_L, kind="stable")
    over_K = np.cumsum(spare_L[order]) - most_K
    k = int(np.argmax(over_K))
    if over_K[k] > 0:
        many, rest = order[: k + 1], order[k + 1 :]
        spare_L[many] = _spare_within(cost_LR[many], most_K[: k + 1])
        spare_L[rest] = _spare_within(cost_LR[rest], most_K[k + 1 :] - most_K[k])
    return spare_L


def _dealt(count_L: IntArray, copies_G: IntArray, most_G: IntArray) -> IntArray:
    """[L, G] slots: count_L in every layer, at most most_G there and copies_G over all layers.

    Layers are served by falling count. Each takes a like part of what every device has left, whole
    replicas, and the rest one by one from the device that could fill most layers, ties to the lower
    one: a replica too many there hurts the remaining layers least. Needs counts of which any k sum
    to at most sum over devices of min(copies_g, k·most_g); then it always comes out even.
    """
    order = np.argsort(-count_L, kind="stable")
    left_G = copies_G.copy()
    _take(left_G, int(left_G.sum() - count_L.sum()), left_G.copy(), most_G)
    slots_LG = np.zeros((len(count_L), len(copies_G)), np.int64)
    for place, layer in enumerate(order):
        part_G = left_G // (len(order) - place)
        left_G -= part_G
        more_G = _take(left_G, int(count_L[layer] - part_G.sum()), most_G - part_G, most_G)
        slots_LG[layer] = part_G + more_G
    assert not left_G.any() and (slots_LG <= most_G).all() and (slots_LG >= 0).all()
    return slots_LG


def _take(left_G: IntArray, count: int, limit_G: IntArray, most_G: IntArray) -> IntArray:
    """[G] `count` replicas taken off left_G, in place, at most limit_G of each device."""
    taken_G = np.zeros(len(left_G), np.int64)
    heap = [
        (-left_G[g] / most_G[g], g) for g in range(len(left_G)) if min(left_G[g], limit_G[g]) > 0
    ]
    heapq.heapify(heap)
    for _ in range(count):
        _, g = heap[0]
        taken_G[g] += 1
        left_G[g] -= 1
        if left_G[g] > 0 and taken_G[g] < limit_G[g]:
            heapq.heapreplace(heap, (-left_G[g] / most_G[g], g))
        else:
            heapq.heappop(heap)
    return taken_G
