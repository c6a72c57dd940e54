"""`even` and `nearest`: every rank splits its own tokens, knowing only the plan.

Knows one layer's slots and one step's counts by home rank. Compiled, no randomness.

`even`: an expert's tokens are spread evenly over all its slots. `nearest`: over the slots nearest
to the home rank: on the rank itself, else in its node, else anywhere. Whole tokens: what does not
divide goes one token each to consecutive slots, starting at slot (home + expert) mod replicas, so
that no slot is always the one to get more.
"""

from __future__ import annotations

from typing import Any

from ...foundation.compiled import compiled


@compiled
def deal(
    tokens: int, turn: int, first: int, last: int, slot_R: Any, quotas_S: Any
) -> None:
    """Spread tokens evenly over slot_R[first:last], extra ones from the `turn`-th on."""
    replicas = last - first
    base = tokens // replicas
    extra = tokens - base * replicas
    start = turn % replicas
    for j in range(replicas):
        ahead = (j - start + replicas) % replicas
        quotas_S[slot_R[first + j]] += base + (1 if ahead < extra else 0)


@compiled
def split_even(counts_GE: Any, start_E: Any, slot_R: Any, quotas_GS: Any) -> None:
    """`even` quotas of one step; quotas_GS comes in zero."""
    for g in range(counts_GE.shape[0]):
        for e in range(counts_GE.shape[1]):
            if counts_GE[g, e] > 0:
                deal(counts_GE[g, e], g + e, start_E[e], start_E[e + 1], slot_R, quotas_GS[g])


@compiled
def split_nearest(
    counts_GE: Any, start_E: Any, slot_R: Any, slots_per_device: int, node_G: Any, quotas_GS: Any
) -> None:
    """`nearest` quotas of one step; quotas_GS comes in zero."""
    for g in range(counts_GE.shape[0]):
        for e in range(counts_GE.shape[1]):
            if counts_GE[g, e] > 0:
                first, last = nearest_slots(
                    g, start_E[e], start_E[e + 1], slot_R, slots_per_device, node_G
                )
                deal(counts_GE[g, e], g + e, first, last, slot_R, quotas_GS[g])


@compiled
def nearest_slots(
    home: int, first: int, last: int, slot_R: Any, slots_per_device: int, node_G: Any
) -> Any:
    """The part of slot_R[first:last] nearest to `home`; slots ascend, so it is one run."""
    begin = last
    end = first
    for r in range(first, last):
        if slot_R[r] // slots_per_device == home:
            begin = min(begin, r)
            end = r + 1
    if begin < end:
        return begin, end
    for r in range(first, last):
        if node_G[slot_R[r] // slots_per_device] == node_G[home]:
            begin = min(begin, r)
            end = r + 1
    if begin < end:
        return begin, end
    return first, last
