"""How a layer's slots balance average loads, where no steps of tokens were recorded.

Steps of tokens are counted by `step_loads`. Knows loads, slots and the dispatch rules. Knows
nothing of time, of traces, or of how slots were found.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...foundation.arrays import FloatArray, SlotArray
from ..cluster import Cluster
from ..dispatch.quotas import device_tokens
from ..plan import DispatchSpec


def fluid_tokens_WG(
    load_WE: FloatArray, slots_GC: SlotArray, cluster: Cluster, dispatch: DispatchSpec
) -> FloatArray:
    """[W, G] tokens of every device under average loads, which are not whole tokens.

    `even` is exact; other policies are judged on the loads scaled to about a million tokens.
    """
    if dispatch.policy == "even":
        return np.stack([even_device_load(load_E, slots_GC) for load_E in load_WE])
    total = float(load_WE.sum(axis=1).max(initial=0.0))
    scale = 1.0 if total <= 0 else max(1.0, 2.0**20 / total)
    counts = np.rint(load_WE * scale).astype(np.int32)
    by_home = spread_over_homes(counts, cluster.num_devices)
    return device_tokens(by_home, slots_GC, cluster, dispatch)[0].astype(np.float64)


def even_device_load(load_E: FloatArray, slots_GC: SlotArray) -> FloatArray:
    """[G] tokens per device when each expert's replicas share its tokens evenly (fluid)."""
    held = slots_GC >= 0
    copies_E = np.bincount(slots_GC[held].astype(np.int64), minlength=len(load_E))
    share_E = load_E / np.maximum(copies_E, 1)
    return np.asarray(np.where(held, share_E[np.maximum(slots_GC, 0)], 0.0).sum(axis=1))


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
