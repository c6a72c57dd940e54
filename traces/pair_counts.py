"""Counting pairs of experts: inside a layer, and from one layer to the next.

Compiled loops over tokens. Knows a trace. Knows nothing of what the counts are for.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from .trace import RoutingTrace


def count_coactivation(trace: RoutingTrace) -> npt.NDArray[np.int64]:
    """[L, E, E] tokens that chose both experts of a layer; the diagonal counts each expert."""
    counts = np.zeros((trace.num_layers, trace.num_experts, trace.num_experts), np.int64)
    for layer in range(trace.num_layers):
        ids, k_T = _layer(trace, layer)
        _add_pairs(ids, k_T, ids, k_T, counts[layer])
    return counts


def count_transitions(trace: RoutingTrace) -> npt.NDArray[np.int64]:
    """[L-1, E, E] pairs (expert of layer l, expert of layer l + 1) over all tokens."""
    shape = (max(0, trace.num_layers - 1), trace.num_experts, trace.num_experts)
    counts = np.zeros(shape, np.int64)
    for layer in range(len(counts)):
        _add_pairs(*_layer(trace, layer), *_layer(trace, layer + 1), counts[layer])
    return counts


def _layer(
    trace: RoutingTrace, layer: int
) -> tuple[npt.NDArray[np.integer[Any]], npt.NDArray[np.uint8]]:
    """Ids [T, K] of a layer, contiguous, and how many of each token's count."""
    if trace.k_of_token is None:
        k_T = np.full(trace.num_tokens, trace.top_k, np.uint8)
    else:
        k_T = np.ascontiguousarray(trace.k_of_token[:, layer])
    return np.ascontiguousarray(trace.ids[:, layer]), k_T


@numba.njit(cache=True)
def _add_pairs(
    first_TK: Any, first_k_T: Any, second_TK: Any, second_k_T: Any, counts_EE: Any
) -> None:
    for t in range(len(first_TK)):
        for i in range(first_k_T[t]):
            for j in range(second_k_T[t]):
                counts_EE[first_TK[t, i], second_TK[t, j]] += 1
