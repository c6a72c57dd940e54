"""Placement methods that look at loads alone, one layer at a time: baselines and starting points.

Each takes a `LayerLoads` and returns slots_GC [G, C] int16. Ours never put two replicas of an
expert on one device; DeepSeek's may. Knows loads, steps' shares and devices. Knows nothing of
dispatch, traffic or cost: how good a placement is, others say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...errors import InfeasibleError
from ...foundation.arrays import FloatArray, IntArray, SlotArray
from .cover_milp import cover_by_program
from .eplb import eplb
from .pack import EMPTY, pack_heaviest_first
from .replicate import replicas_by_load
from .swap import swap_with_hottest


@dataclass(frozen=True)
class LayerLoads:
    """One layer to place, and the devices to place it on."""

    load_WE: FloatArray          # [W, E] tokens per step (one row of averages where no steps known)
    slots_G: IntArray            # [G] slots of each device in this layer
    speed_G: FloatArray          # [G] relative speed
    nodes: int = 1
    expert_groups: int = 1
    size_E: FloatArray | None = None   # [E] bytes, with
    capacity_G: FloatArray | None = None   # [G] bytes each device has for this layer

    @property
    def load_E(self) -> FloatArray:
        """[E] mean tokens per step."""
        return np.asarray(self.load_WE.mean(axis=0), np.float64)

    @property
    def experts(self) -> int:
        return int(self.load_WE.shape[1])

    @property
    def devices(self) -> int:
        return len(self.slots_G)

    @property
    def most_slots(self) -> int:
        """C, the widest device's slots."""
        return int(self.slots_G.max())

    def usable_slots_G(self) -> IntArray:
        """[G] slots that can hold something: a device needs one replica of an expert at most."""
        return np.minimum(self.slots_G, self.experts)


def contiguous(layer: LayerLoads) -> SlotArray:
    """Experts in blocks of consecutive ids, sized in proportion to slots; spare slots stay empty.

    What engines do unasked: with equal slots the first E mod G devices get one expert more than
    the others (vLLM's "linear"; SGLang and TensorRT-LLM want experts that divide evenly).
    """
    part_G = layer.experts * layer.slots_G / int(layer.slots_G.sum())
    count_G = np.floor(part_G + 1e-9).astype(np.int64)
    left = layer.experts - int(count_G.sum())
    count_G[np.flatnonzero(part_G > count_G + 1e-9)[:left]] += 1
    edge = np.concatenate(([0], np.cumsum(count_G)))
    slots_GC = _empty(layer)
    for g in range(layer.devices):
        block = np.arange(edge[g], edge[g + 1])
        slots_GC[g, : len(block)] = block
    return slots_GC


def round_robin(layer: LayerLoads) -> SlotArray:
    """Experts dealt to devices like cards, full devices passed over; spare slots stay empty."""
    slots_GC = _empty(layer)
    used_G = np.zeros(layer.devices, np.int64)
    g = 0
    for expert in range(layer.experts):
        while used_G[g] >= layer.slots_G[g]:
            g = (g + 1) % layer.devices
        slots_GC[g, used_G[g]] = expert
        used_G[g] += 1
        g = (g + 1) % layer.devices
    return slots_GC


def eplb_global(layer: LayerLoads) -> SlotArray:
    """DeepSeek's EPLB with one group and one node (see `eplb.py` for ties and limits)."""
    return _eplb(layer, groups=1, nodes=1)


def eplb_hierarchical(layer: LayerLoads) -> SlotArray:
    """DeepSeek's EPLB: expert groups to nodes first, then replicas and devices inside each node.

    The model's expert groups are used; a model without groups counts each node as one group.
    """
    groups = layer.expert_groups if layer.expert_groups > 1 else layer.nodes
    return _eplb(layer, groups=groups, nodes=layer.nodes)


def greedy(layer: LayerLoads) -> SlotArray:
    """Replicas by load, then heaviest first onto the device that would finish first.

    Where that leaves out experts of different sizes, a program packs them (`cover_program.py`) and
    replicas fill what is left. Raises InfeasibleError where it finds no packing either.
    """
    slots_GC = pack_heaviest_first(
        layer.load_E, greedy_replicas(layer), layer.slots_G, layer.speed_G,
        size_E=layer.size_E, capacity_G=layer.capacity_G,
    )
    if len(np.setdiff1d(np.arange(layer.experts), slots_GC)) == 0:
        return slots_GC
    require_capacity(layer.experts, layer.usable_slots_G())
    size_E, capacity_G = layer.size_E, layer.capacity_G
    if size_E is None or capacity_G is None:
        size_E, capacity_G = np.zeros(layer.experts), np.zeros(layer.devices)
    slots_GC = cover_by_program(layer.load_E, size_E, layer.slots_G, capacity_G, layer.speed_G)
    return _filled(layer, slots_GC, size_E, capacity_G)


def _filled(
    layer: LayerLoads, slots_GC: SlotArray, size_E: FloatArray, capacity_G: FloatArray
) -> SlotArray:
    """The rest of slots and bytes filled with replicas: always of the expert with most load per
    replica among those that fit somewhere, onto the device that holds fewest."""
    slots_GC = slots_GC.copy()
    held_GE = np.zeros((layer.devices, layer.experts), bool)
    for g, row in enumerate(slots_GC):
        held_GE[g, row[row >= 0]] = True
    while True:
        used_G, left_G = held_GE.sum(axis=1), capacity_G - held_GE @ size_E
        fits_GE = ~held_GE & (size_E <= left_G[:, None]) & (used_G < layer.slots_G)[:, None]
        if not fits_GE.any():
            return slots_GC
        share_E = np.where(fits_GE.any(axis=0), layer.load_E / held_GE.sum(axis=0), -1.0)
        e = int(np.argmax(share_E))
        g = int(np.argmin(np.where(fits_GE[:, e], used_G, layer.experts)))
        slots_GC[g, np.flatnonzero(slots_GC[g] < 0)[0]] = e
        held_GE[g, e] = True


def lpt_swap(layer: LayerLoads) -> SlotArray:
    """`greedy`, then the best exchange with the hottest device until none helps."""
    return swap_with_hottest(
        greedy(layer), layer.load_E, layer.speed_G, size_E=layer.size_E, capacity_G=layer.capacity_G
    )


def anticorrelation(layer: LayerLoads) -> SlotArray:
    """As `greedy`, but a device looks fuller to an expert that is busy when its experts are.

    Placing a, device load = sum over its experts m of (share_m + 0.5 · corr(a, m)), shares and
    Pearson correlations over steps; replicas count with share/replicas.
    Source: Towards MoE Deployment (arXiv 2303.06182), anti-correlation placement.
    """
    replicas_E = greedy_replicas(layer)
    total_W1 = np.maximum(layer.load_WE.sum(axis=1, keepdims=True), 1e-300)
    share_WE = layer.load_WE / total_W1 / replicas_E
    centred = share_WE - share_WE.mean(axis=0)
    norm_E = np.sqrt((centred**2).sum(axis=0))
    norm_E[norm_E == 0] = np.inf           # an expert that never varies correlates with nothing
    scaled = centred / norm_E
    share_E = share_WE.mean(axis=0)
    slots_GC, used_G = _empty(layer), np.zeros(layer.devices, np.int64)
    seen_GE = np.zeros((layer.devices, layer.experts))   # how full g looks to each expert
    held_GE = np.zeros((layer.devices, layer.experts), bool)
    free, waiting = int(layer.slots_G.sum()), layer.experts
    for expert in np.lexsort((np.arange(layer.experts), -share_E)):
        waiting -= 1
        felt_E = share_E[expert] + 0.5 * (scaled.T @ scaled[:, expert])
        for replica in range(int(replicas_E[expert])):
            barred = (used_G >= layer.slots_G) | held_GE[:, expert]
            if barred.all() or (replica > 0 and free <= waiting):
                break
            finish_G = np.where(barred, np.inf, seen_GE[:, expert] / layer.speed_G)
            g = int(np.argmin(finish_G))
            slots_GC[g, used_G[g]] = expert
            used_G[g] += 1
            held_GE[g, expert] = True
            seen_GE[g] += felt_E
            free -= 1
    return slots_GC


def greedy_replicas(layer: LayerLoads) -> IntArray:
    """[E] replicas by load for every usable slot; memory may cut them later."""
    return replicas_by_load(layer.load_E, int(layer.usable_slots_G().sum()), layer.devices)


def require_capacity(experts: int, slots_G: IntArray) -> None:
    """Raises InfeasibleError when one replica of each expert does not fit."""
    slots = int(slots_G.sum())
    if slots < experts:
        raise InfeasibleError(
            f"{len(slots_G)} devices with {slots} slots per layer cannot hold {experts} experts: "
            f"{experts - slots} slots short; add devices or slots per device"
        )


def _eplb(layer: LayerLoads, *, groups: int, nodes: int) -> SlotArray:
    if len(set(layer.slots_G.tolist())) > 1:
        raise InfeasibleError(
            f"EPLB needs equally many slots on every device; here {layer.slots_G.tolist()}: "
            "use greedy or auto"
        )
    slots = int(layer.slots_G.sum())
    maps = eplb(layer.load_E[None], slots, groups, nodes, layer.devices)
    slots_GC: SlotArray = maps.physical_to_logical_LS[0].reshape(layer.devices, -1).astype(np.int16)
    return slots_GC


def _empty(layer: LayerLoads) -> SlotArray:
    return np.full((layer.devices, layer.most_slots), EMPTY, np.int16)


LAYER_METHODS: dict[str, Callable[[LayerLoads], SlotArray]] = {
    "contiguous": contiguous,
    "round_robin": round_robin,
    "eplb": eplb_global,
    "eplb_hierarchical": eplb_hierarchical,
    "greedy": greedy,
    "anticorrelation": anticorrelation,
    "lpt_swap": lpt_swap,
}
