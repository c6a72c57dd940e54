"""From ids to counts, and from quotas back to slots: the compiled loops over tokens.

Knows ids, home ranks and quotas. Knows nothing of policies. Negative ids are left out everywhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...foundation.compiled import compiled


@compiled
def count_into(ids_TK: Any, home_T: Any, counts_GE: Any) -> None:
    """Add assignments by home rank and expert."""
    for t in range(ids_TK.shape[0]):
        g = home_T[t]
        for k in range(ids_TK.shape[1]):
            e = ids_TK[t, k]
            if e >= 0:
                counts_GE[g, e] += 1


@compiled
def assign_in_order(
    ids_TK: Any, home_T: Any, quotas_GS: Any, start_E: Any, slot_R: Any, slot_TK: Any
) -> int:
    """Fill slot_TK in token order, an expert's slots ascending, each up to its home's quota.

    quotas_GS is used up. Returns the quota left over, or -(t + 1) where token t found none.
    """
    experts = len(start_E) - 1
    cursor_GE = np.empty((quotas_GS.shape[0], experts), np.int32)
    for g in range(quotas_GS.shape[0]):
        for e in range(experts):
            cursor_GE[g, e] = start_E[e]
    for t in range(ids_TK.shape[0]):
        g = home_T[t]
        for k in range(ids_TK.shape[1]):
            e = ids_TK[t, k]
            if e < 0:
                slot_TK[t, k] = -1
                continue
            r = cursor_GE[g, e]
            while r < start_E[e + 1] and quotas_GS[g, slot_R[r]] == 0:
                r += 1
            cursor_GE[g, e] = r
            if r == start_E[e + 1]:
                return -(t + 1)
            slot_TK[t, k] = slot_R[r]
            quotas_GS[g, slot_R[r]] -= 1
    left = 0
    for g in range(quotas_GS.shape[0]):
        for s in range(quotas_GS.shape[1]):
            left += quotas_GS[g, s]
    return left
