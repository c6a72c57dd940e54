"""Methods in which layers depend on each other, and what they look at.

Both keep one replica of each expert and place experts that follow each other near each other: the
exchange that this saves exists only under `coherent` traffic, elsewhere they are baselines. Knows
loads, transitions and hops. Knows nothing of steps, dispatch, cost or what the slots are worth.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...errors import InfeasibleError, UsageError
from ...foundation.arrays import FloatArray, IntArray, SlotArray
from ...traces.profile import count_transitions
from ..cluster import Cluster
from ..planning_traffic import PlanningSteps

MOST_PAIR_BYTES = 2 << 30       # of transition counts: [L-1, E, E] int64


@dataclass(frozen=True)
class WholeModel:
    """All layers at once, and the devices to place them on."""

    load_LE: FloatArray              # [L, E] mean tokens per planning step
    transition_LEE: IntArray         # [L-1, E, E] pairs (expert, expert of the next layer)
    slots_G: IntArray                # [G] slots of each device, the same in all layers
    speed_G: FloatArray              # [G]
    transition_GG: FloatArray               # [G, G] price of a way: 0 on a device, 1 in its node
    seed: int
    effort: str
    deadline: float | None = None    # time.time() after which only what must be is done

    @property
    def experts(self) -> int:
        return int(self.load_LE.shape[1])

    def seconds_left(self) -> float | None:
        """Until the deadline, at least a hundredth; None = no deadline."""
        return None if self.deadline is None else max(0.01, self.deadline - time.time())

    def expired(self) -> bool:
        """Whether the time limit has fired."""
        return self.deadline is not None and time.time() > self.deadline


@dataclass(frozen=True)
class PlacedModel:
    """Slots of all layers, and what the method has to say about them."""

    slots_LGC: SlotArray
    notes: tuple[str, ...] = ()
    truncated: bool = False


LayersDone = Callable[[int, float], None]     # layers done, the method's own gap
Method = Callable[[WholeModel, LayersDone], PlacedModel]


def whole_model(
    data: PlanningSteps, cluster: Cluster, method: str, seed: int, effort: str,
    deadline: float | None,
) -> WholeModel:
    """What the planning steps say about loads and transitions.

    Raises UsageError for average loads, which do not tell what follows what, and InfeasibleError
    where the counts of pairs would not fit in memory.
    """
    if data.trace is None or data.planning is None:
        raise UsageError(
            f"method {method} needs to know which experts follow each other: give a trace of "
            "tokens; average loads are enough for auto, greedy, lpt_swap or eplb"
        )
    if not pairs_fit(data):
        raise InfeasibleError(
            f"method {method} counts pairs of experts: {data.num_layers} layers of "
            f"{data.num_experts} would take more than {MOST_PAIR_BYTES / 2**30:.0f} GiB; use auto"
        )
    load_WLE = [data.layer(layer).planning_WE() for layer in range(data.num_layers)]
    tokens = np.unique(data.planning.token)
    return WholeModel(
        load_LE=np.stack([load_WE.mean(axis=0) for load_WE in load_WLE]),
        transition_LEE=count_transitions(data.trace.select(tokens)),
        slots_G=cluster.slots_G, speed_G=cluster.speed_G,
        transition_GG=transition_prices(cluster), seed=seed,
        effort=effort, deadline=deadline,
    )


def pairs_fit(data: PlanningSteps) -> bool:
    """Whether the counts of pairs of experts fit in memory."""
    return 8 * max(0, data.num_layers - 1) * data.num_experts**2 <= MOST_PAIR_BYTES


def transition_prices(cluster: Cluster) -> FloatArray:
    """[G, G] what a token's way costs: 0 to stay, 1 in a node, bandwidths' ratio between nodes."""
    leg = cluster.hardware.dispatch
    across = leg.nvlink_bytes_per_s / leg.nic_bytes_per_s
    node = cluster.node_G
    price: FloatArray = np.where(node[:, None] == node, 1.0, across)
    np.fill_diagonal(price, 0.0)
    return price


def slots_of(device_LE: IntArray, slots_G: IntArray) -> SlotArray:
    """[L, G, C] experts in ascending order on the device each layer gives them."""
    layers, devices = len(device_LE), len(slots_G)
    slots = np.full((layers, devices, int(slots_G.max())), -1, np.int16)
    for layer, device_E in enumerate(device_LE):
        for g in range(devices):
            held = np.flatnonzero(device_E == g)
            slots[layer, g, : len(held)] = held
    return slots
