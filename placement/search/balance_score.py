"""How a layer's slots fare on given steps under the dispatch that will run.

The bridge from counts to balance for search, evidence and re-planning. Knows counts, slots and
the dispatch rules. Knows nothing of time (`cost.py`), of traces, or of how slots were found.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ...foundation.arrays import FloatArray, SlotArray
from ..cluster import Cluster
from ..dispatch.quotas import device_tokens
from ..plan import DispatchSpec
from .annealing.even_average import even_device_load

HOME_BLIND = ("even", "balanced", "fewest_active")   # tokens per device do not depend on homes


def tokens_WG(
    counts_WGE: npt.NDArray[np.integer[Any]],
    slots_GC: SlotArray,
    cluster: Cluster,
    dispatch: DispatchSpec,
) -> FloatArray:
    """[W, G] whole tokens of every device.

    counts_WGE: [W, G, E], or [W, 1, E] where the policy does not ask for homes.
    """
    return device_tokens(counts_WGE, slots_GC, cluster, dispatch)[0].astype(np.float64)


def fluid_tokens_WG(
    load_WE: FloatArray, slots_GC: SlotArray, cluster: Cluster, dispatch: DispatchSpec
) -> FloatArray:
    """[W] the same for average loads, which are not whole tokens.

    `even` is exact; other policies are judged on the loads scaled to about a million tokens.
    """
    if dispatch.policy == "even":
        return np.stack([even_device_load(load_E, slots_GC) for load_E in load_WE])
    total = float(load_WE.sum(axis=1).max(initial=0.0))
    scale = 1.0 if total <= 0 else max(1.0, 2.0**20 / total)
    counts = np.rint(load_WE * scale).astype(np.int32)
    if dispatch.policy in HOME_BLIND:
        return tokens_WG(counts[:, None], slots_GC, cluster, dispatch)
    return tokens_WG(spread_over_homes(counts, cluster.num_devices), slots_GC, cluster, dispatch)


def spread_over_homes(
    counts_WE: npt.NDArray[np.int32], devices: int
) -> npt.NDArray[np.int32]:
    """[W, G, E] every expert's tokens spread evenly over home ranks, turn by expert."""
    base, extra = np.divmod(counts_WE, devices)
    turn_GE = (np.arange(devices)[:, None] - np.arange(counts_WE.shape[1])) % devices
    return np.asarray(base[:, None] + (turn_GE < extra[:, None]), np.int32)


def mean_over_steps(ratio_W: FloatArray) -> float:
    """Mean over steps with tokens; 1 (nothing to balance) where there are none."""
    used = ratio_W[~np.isnan(ratio_W)]
    return float(used.mean()) if len(used) else 1.0
