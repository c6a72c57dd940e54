"""`fewest_active`: every used expert is active in one slot, and no device has many of them.

METRO's aim (arXiv 2512.09277) for decode, where weights read, not tokens, set the time. Knows one
layer's slots and speeds and one step's counts of all ranks. Compiled, no randomness.

The most active experts on any device (over speed) are as few as possible: greedy, then moved along
paths as `min_max_flow.py` moves tokens. Ties go to the device with fewer tokens, then to the lower
slot.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...foundation.compiled import compiled
from .balanced import replicated_blocks, total_over
from .min_max_flow import falling_order, flatten, mean_level


@compiled
def choose_fewest_active(
    total_E: Any, start_E: Any, slot_R: Any, slots_per_device: int, speed_G: Any
) -> Any:
    """[E] the one slot each used expert is active in; -1 for unused experts.

    Greedy from the experts with fewest replicas (then most tokens, then lowest id), then moved
    along paths until no device can have fewer active experts.
    """
    experts = len(total_E)
    active_G = np.zeros(len(speed_G), np.int64)
    tokens_G = np.zeros(len(speed_G), np.int64)
    used_E = np.zeros(experts, np.int64)
    slot_E = np.empty(experts, np.int32)
    for e in range(experts):
        used_E[e] = 1 if total_E[e] > 0 else 0
        alone = used_E[e] > 0 and start_E[e + 1] - start_E[e] == 1
        slot_E[e] = slot_R[start_E[e]] if alone else -1
    replicated_blocks(total_E, start_E, slot_R, slots_per_device, tokens_G)
    expert_B, start_B, slot_O = replicated_blocks(
        used_E, start_E, slot_R, slots_per_device, active_G
    )
    device_O = slot_O // np.int32(slots_per_device)
    flow_O = np.zeros(len(slot_O), np.int64)
    _greedy_active(total_E, expert_B, start_B, device_O, flow_O, active_G, tokens_G, speed_G)
    cost_O = np.zeros(len(slot_O), np.int32)
    cap_G = np.empty(len(speed_G), np.int64)
    peak = mean_level(slot_O[:0], active_G, speed_G)
    flatten(start_B, device_O, cost_O, flow_O, active_G, speed_G, peak, 0.0, cap_G)
    for b in range(len(expert_B)):
        for o in range(start_B[b], start_B[b + 1]):
            if flow_O[o] > 0:
                slot_E[expert_B[b]] = slot_O[o]
    return slot_E


@compiled
def _greedy_active(
    total_E: Any, expert_B: Any, start_B: Any, device_O: Any, flow_O: Any, active_G: Any,
    tokens_G: Any, speed_G: Any,
) -> None:
    """Each block to the device with fewest active experts so far, ties to fewest tokens."""
    most = 0
    for e in range(len(total_E)):
        most = max(most, total_E[e])
    rank_B = np.empty(len(expert_B), np.int64)
    for b in range(len(expert_B)):
        rank_B[b] = total_E[expert_B[b]] - (start_B[b + 1] - start_B[b]) * (most + 1)
    for b in falling_order(rank_B):
        best = start_B[b]
        for o in range(start_B[b] + 1, start_B[b + 1]):
            d, held = device_O[o], device_O[best]
            gain = (active_G[held] + 1) / speed_G[held] - (active_G[d] + 1) / speed_G[d]
            if gain > 0 or (
                gain == 0 and tokens_G[d] / speed_G[d] < tokens_G[held] / speed_G[held]
            ):
                best = o
        flow_O[best] = 1
        active_G[device_O[best]] += 1
        tokens_G[device_O[best]] += total_E[expert_B[b]]


@compiled
def split_fewest_active(
    counts_GE: Any, start_E: Any, slot_R: Any, slots_per_device: int, speed_G: Any, quotas_GS: Any
) -> None:
    """`fewest_active` quotas of one step; quotas_GS comes in zero."""
    total_E = total_over(counts_GE)
    slot_E = choose_fewest_active(total_E, start_E, slot_R, slots_per_device, speed_G)
    for e in range(len(total_E)):
        if slot_E[e] >= 0:
            for g in range(counts_GE.shape[0]):
                quotas_GS[g, slot_E[e]] = counts_GE[g, e]
