"""What devices' memory holds: experts, beside all that must lie there too.

The one home of this question: planning, rebalancing, judging and the simulator ask here. A device
holds the experts of all layers in its slots, the model's other weights whole (tokens are at home
there), and keeps some free for the KV cache, activations and the runtime. Where a cluster file says
how much is for experts (`expert_memory_bytes`), that is the limit and nothing else is reckoned.
Where a model's sizes are not known nothing is refused. Knows bytes. Knows nothing of loads, or of
what is worth placing where.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import InfeasibleError
from ..foundation.arrays import FloatArray, IntArray, SlotArray
from ..traces.model_spec import ModelSpec
from .cluster import Cluster
from .plan import Plan

NOT_COUNTED = "expert_memory_bytes not counted: give the model, for its sizes"
NOT_CHECKED = "whether it fits in memory is not checked: the model's sizes are not known"


def held_bytes_G(slots_LGC: SlotArray, size_E: IntArray) -> IntArray:
    """[G] bytes of the experts that each device holds over all layers."""
    held_LGC = np.where(slots_LGC >= 0, size_E[np.maximum(slots_LGC, 0)], 0)
    return np.asarray(held_LGC.sum(axis=(0, 2)), np.int64)


def plan_bytes_G(plan: Plan, model: ModelSpec) -> IntArray:
    """[G] bytes of the expert weights that the plan keeps on each device, all layers."""
    return held_bytes_G(plan.slots, model.bytes_per_expert_E())


@dataclass(frozen=True)
class ExpertMemory:
    """What each device has for experts, all layers together.

    bytes_G [G]: inf where nothing is known of it. own_G [G]: the cluster file says it. dense_bytes:
    of the other weights, None = not known; estimated: they were reckoned.
    """

    bytes_G: FloatArray
    own_G: npt.NDArray[np.bool_]
    dense_bytes: int | None
    estimated: bool
    reserved_bytes: int
    memory_bytes: int

    @property
    def limited(self) -> bool:
        """Whether any device's limit is known."""
        return bool(np.isfinite(self.bytes_G).any())

    def reckoning(self) -> str:
        """How the bytes of a device without a limit of its own come about, in words."""
        if self.dense_bytes is None:
            dense = "the model's other weights, of unknown size"
        else:
            how = ", an estimate" if self.estimated else ""
            dense = f"{gigabytes(self.dense_bytes)} of other weights{how},"
        return (
            f"{gigabytes(self.memory_bytes)} less {dense} and {gigabytes(self.reserved_bytes)} "
            "kept free for KV cache and activations"
        )


def gigabytes(size: float) -> str:
    """Bytes in words, a gigabyte being 1e9 of them."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(size) >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f} bytes"


def expert_memory(cluster: Cluster, model: ModelSpec | None) -> ExpertMemory:
    """What the devices have for experts; of devices without their own limit, if sizes are known."""
    own = [device.expert_memory_bytes for device in cluster.devices]
    own_G = np.array([limit is not None for limit in own])
    dense = None if model is None else model.dense_weights()
    left = np.inf
    if model is not None and model.knows_bytes:
        left = max(0.0, cluster.memory_bytes - cluster.kept_free_bytes - (dense or (0, False))[0])
    return ExpertMemory(
        np.array([left if limit is None else limit for limit in own], np.float64), own_G,
        None if dense is None else dense[0], dense is not None and dense[1],
        cluster.kept_free_bytes, cluster.memory_bytes,
    )


def limits_G(
    cluster: Cluster, model: ModelSpec | None, current: Plan | None = None
) -> FloatArray:
    """[G] bytes of experts that a plan may put on each device, all layers; inf = slots decide.

    Experts of one size fit where their slots do (`require_slots_fit`), unless the cluster file says
    how much there is. What a current plan holds fits, since it runs.
    """
    memory = expert_memory(cluster, model)
    if model is None or not model.knows_bytes:
        return np.full(cluster.num_devices, np.inf)
    size_E = model.bytes_per_expert_E()
    if size_E.min() == size_E.max():
        return np.where(memory.own_G, memory.bytes_G, np.inf)
    if current is None:
        return memory.bytes_G
    held_G = held_bytes_G(current.slots, size_E)
    return np.where(memory.own_G, memory.bytes_G, np.maximum(memory.bytes_G, held_G))


def fitting_slots(cluster: Cluster, model: ModelSpec) -> int:
    """Slots per layer that fit on every device; only devices without a limit of their own limit."""
    memory = expert_memory(cluster, model)
    reckoned = memory.bytes_G[~memory.own_G]
    if not len(reckoned):
        return int(cluster.slots_G.min())
    # A slot may have to hold any expert, so experts of different sizes count as the mean one.
    each = model.num_layers * float(model.bytes_per_expert_E().mean())
    return int(reckoned.min() // each)


def require_slots_fit(
    cluster: Cluster, model: ModelSpec | None, current: Plan | None = None
) -> tuple[str, ...]:
    """Refuse slots that no device has the memory for; only where sizes are known.

    A current plan with as many slots runs already: then the reckoning is wrong, and what is
    returned says so. Experts of different sizes are left to the planning itself, which counts their
    bytes. Raises InfeasibleError: how many slots fit, how many devices it takes, and how that was
    reckoned.
    """
    if model is None or not model.knows_bytes:
        return ()
    memory, size_E = expert_memory(cluster, model), model.bytes_per_expert_E()
    each = model.num_layers * float(size_E.mean())
    over = np.flatnonzero(~memory.own_G & (cluster.slots_G * each > memory.bytes_G))
    if not len(over) or (
        size_E.min() < size_E.max() and memory.bytes_G.sum() >= model.num_experts * each
    ):
        return ()
    g, fit = int(over[0]), fitting_slots(cluster, model)
    least = -(-model.num_experts // cluster.num_devices)
    said = (
        f"{model.name}: {cluster.slots_G[g]} slots in each of {model.num_layers} layers are "
        f"{gigabytes(cluster.slots_G[g] * each)} of experts on device {g}, memory holds {fit} "
        f"slots ({memory.reckoning()})"
    )
    if current is not None and cluster.slots_G.max() <= current.slots_per_device:
        return (f"{said}; the current plan has as many, so they are taken to fit",)
    if fit >= least:
        raise InfeasibleError(f"{said}: use {fit} slots per device, or more devices")
    raise InfeasibleError(
        f"{said}; {model.num_experts} experts on {cluster.num_devices} devices need {least}: "
        f"{_devices_it_takes(cluster, model, fit)}"
    )


def _devices_it_takes(cluster: Cluster, model: ModelSpec, fit: int) -> str:
    """What to do where even one replica of each expert does not fit."""
    if fit < 1:
        return (
            "no number of such devices holds it, since one expert of every layer is too much for "
            "one: use devices with more memory, or narrower weights"
        )
    devices, in_node = -(-model.num_experts // fit), int(np.bincount(cluster.node_G).max())
    nodes = -(-devices // in_node)
    whole = f" ({nodes} nodes of {in_node})" if devices > in_node else ""
    return f"it takes {devices} such devices{whole}, more memory each, or narrower weights"


def default_slots(share: int, cluster: Cluster, model: ModelSpec | None) -> tuple[int, str | None]:
    """(slots per device: an even share of the experts and a quarter more, or fewer where memory
    holds fewer; what to say of that). share: slots for one replica of each expert."""
    wanted = share + max(1, round(share / 4))
    if model is None or not model.knows_bytes:
        return wanted, None
    fit = fitting_slots(cluster, model)
    if fit >= wanted:
        return wanted, None
    slots = max(share, fit)          # below an even share planning refuses, and says why
    memory = expert_memory(cluster, model)
    return slots, (
        f"{slots} slots per device, not the usual {wanted}: memory holds no more "
        f"({memory.reckoning()})"
    )


def require_plan_fits(plan: Plan, cluster: Cluster, model: ModelSpec) -> None:
    """Refuse a plan whose experts exceed a device's memory, whatever is kept free.

    The dense part counts where the checkpoint says it, not where it is an estimate. Raises
    InfeasibleError naming the first device.
    """
    memory, held_G = expert_memory(cluster, model), plan_bytes_G(plan, model)
    known = memory.dense_bytes if memory.dense_bytes and not memory.estimated else 0
    most_G = np.where(memory.own_G, memory.bytes_G, cluster.memory_bytes - known)
    over = np.flatnonzero(held_G > most_G)
    if not len(over):
        return
    g = int(over[0])
    name = "expert_memory_bytes" if memory.own_G[g] else "memory_bytes"
    less = f" beside {known:,} of other weights" if known and not memory.own_G[g] else ""
    raise InfeasibleError(
        f"device {g}: the plan's experts need {held_G[g]:,} bytes, {name} allows "
        f"{most_G[g]:,.0f}{less}: use fewer slots or more devices"
    )


def memory_notes(plan: Plan, cluster: Cluster, model: ModelSpec | None) -> tuple[str, ...]:
    """What to say beside the figures of a plan that memory should not hold."""
    if model is None or not model.knows_bytes:
        return ()
    memory, held_G = expert_memory(cluster, model), plan_bytes_G(plan, model)
    over = np.flatnonzero(held_G > memory.bytes_G)
    if not len(over):
        return ()
    g = int(np.argmax(held_G - memory.bytes_G))
    how = "expert_memory_bytes" if memory.own_G[g] else memory.reckoning()
    return (
        f"over memory: {gigabytes(held_G[g])} of experts on device {g} "
        f"({len(over)} such devices), memory holds {gigabytes(memory.bytes_G[g])} ({how})",
    )
