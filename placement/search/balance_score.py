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
from ..planning_traffic import LOAD_TOTAL

# Rules that give every replica of an expert the same part of its tokens, on average.
ALIKE_ON_AVERAGE = ("even", "sglang_dynamic", "vllm_hash", "trtllm_round_robin")


def fluid_tokens_WG(
    load_WE: FloatArray, slots_GC: SlotArray, cluster: Cluster, dispatch: DispatchSpec
) -> FloatArray:
    """[W, G] tokens of every device under average loads of any size, which are not whole tokens.

    Rules that share alike on average are exact; others split each window as LOAD_TOTAL tokens.
    """
    if dispatch.policy in ALIKE_ON_AVERAGE:
        return np.stack([even_device_load(load_E, slots_GC) for load_E in load_WE])
    total_W = load_WE.sum(axis=1)
    scale_W = LOAD_TOTAL / np.where(total_W > 0, total_W, 1.0)
    counts = np.rint(load_WE * scale_W[:, None]).astype(np.int32)
    by_home = spread_over_homes(counts, cluster.num_devices)
    tokens_WG = device_tokens(by_home, slots_GC, cluster, dispatch)[0]
    return np.asarray(tokens_WG / scale_W[:, None], np.float64)


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
