"""Profile: a compact stand-in for a trace.

Loads per window, a sample of whole requests with their metadata and step structure, and, made only
when asked for, co-activation and transition counts. A load-only dump becomes a Profile without a
sample: it plans for average load and nothing else. Knows tokens and loads. Knows nothing of
devices, plans or files.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from ..foundation.compiled import compiled
from .trace import RoutingTrace


@dataclass(frozen=True, eq=False)
class Profile:
    """What a planner needs of a trace. W windows in time order, L MoE layers, E experts."""

    load_WLE: npt.NDArray[np.float64]     # assignments per window, layer and expert
    top_k: int
    sample: RoutingTrace | None = None    # whole requests, in the trace's order; None: loads only
    sampled_share: float = 0.0            # of the trace's tokens
    layer_indices: tuple[int, ...] = ()
    model_name: str = ""

    @classmethod
    def from_trace(
        cls, trace: RoutingTrace, *, windows: int = 16, sample_tokens: int = 65_536, seed: int = 0
    ) -> Self:
        """Profile of a trace: all its loads, and whole requests up to about `sample_tokens`.

        Windows hold equally many tokens and follow the recorded step where there is one, else the
        order in which tokens are stored. Requests are drawn at random, at least one of them.
        Raises InputError on an empty trace or windows < 1.
        """
        if trace.num_tokens == 0 or windows < 1:
            raise InputError(
                f"a profile needs tokens and at least one window; got {trace.num_tokens} tokens "
                f"and {windows} windows"
            )
        order = np.arange(trace.num_tokens)
        if trace.step is not None:
            order = np.argsort(trace.step, kind="stable")
        parts = np.array_split(order, min(windows, trace.num_tokens))
        load_WLE = np.stack([trace.load_LE(part) for part in parts]).astype(np.float64)
        chosen = _sample_of_requests(trace.request_T(), sample_tokens, seed)
        return cls(
            load_WLE=load_WLE, top_k=trace.top_k, sample=trace.select(chosen),
            sampled_share=float(chosen.mean()), layer_indices=trace.layer_indices,
            model_name=trace.model_name,
        )

    @classmethod
    def from_loads(
        cls, load: npt.ArrayLike, *, top_k: int = 1, layer_indices: tuple[int, ...] = (),
        model_name: str = "",
    ) -> Self:
        """Profile of loads alone: [L, E], or [W, L, E] with windows in time order.

        Raises InputError unless all loads are finite and >= 0 and every layer has some.
        """
        kind = np.asarray(load).dtype
        if kind.kind not in "fiu":
            raise InputError(f"loads must be numbers; got {kind}")
        load_WLE = np.asarray(load, np.float64)
        if load_WLE.ndim == 2:
            load_WLE = load_WLE[None]
        if load_WLE.ndim != 3 or 0 in load_WLE.shape:
            raise InputError(
                f"loads must be [layers, experts] or [windows, layers, experts]; got shape "
                f"{list(np.shape(load))}"
            )
        with np.errstate(over="ignore"):  # a sum beyond all numbers is found here
            finite = np.isfinite(load_WLE).all() and np.isfinite(load_WLE.sum())
        if not finite or (load_WLE < 0).any():
            raise InputError("loads must be finite and >= 0, their sum too")
        empty = np.flatnonzero(load_WLE.sum(axis=(0, 2)) == 0)
        if len(empty):
            raise InputError(
                f"layer {empty[0]} has no load at all: leave dense layers out, or record longer"
            )
        if not 1 <= top_k <= load_WLE.shape[2]:
            raise InputError(f"top_k {top_k} must lie in [1, {load_WLE.shape[2]}]")
        if layer_indices and len(layer_indices) != load_WLE.shape[1]:
            raise InputError(
                f"layer_indices names {len(layer_indices)} layers, loads have {load_WLE.shape[1]}"
            )
        return cls(
            load_WLE=load_WLE, top_k=top_k, model_name=model_name,
            layer_indices=layer_indices or tuple(range(load_WLE.shape[1])),
        )

    @property
    def num_windows(self) -> int:
        return int(self.load_WLE.shape[0])

    @property
    def num_layers(self) -> int:
        return int(self.load_WLE.shape[1])

    @property
    def num_experts(self) -> int:
        return int(self.load_WLE.shape[2])

    @cached_property
    def load_LE(self) -> npt.NDArray[np.float64]:
        """[L, E] assignments of all windows."""
        total: npt.NDArray[np.float64] = self.load_WLE.sum(axis=0)
        return total

    @property
    def num_tokens(self) -> int:
        """Tokens the loads stand for: assignments of a layer over K (the largest over layers)."""
        return round(float(self.load_LE.sum(axis=1).max()) / self.top_k)

    def require_sample(self) -> RoutingTrace:
        """The sampled tokens. Raises InputError where only loads are known."""
        if self.sample is None:
            raise InputError(
                "this profile holds loads only: steps, requests and which experts go together are "
                "not known; record a trace of tokens for that"
            )
        return self.sample

    def coactivation_LEE(self) -> npt.NDArray[np.int64]:
        """[L, E, E] sampled tokens that chose both experts in a layer; the diagonal is the load.

        Counted at the first call and kept. Raises InputError where only loads are known.
        """
        return self._coactivation

    def transition_LEE(self) -> npt.NDArray[np.int64]:
        """[L-1, E, E] pairs (expert in layer l, expert in layer l+1) of the same sampled token.

        Counted at the first call and kept. Raises InputError where only loads are known.
        """
        return self._transition

    @cached_property
    def _coactivation(self) -> npt.NDArray[np.int64]:
        return count_coactivation(self.require_sample())

    @cached_property
    def _transition(self) -> npt.NDArray[np.int64]:
        return count_transitions(self.require_sample())


def _sample_of_requests(
    request_T: npt.NDArray[np.int64], tokens: int, seed: int
) -> npt.NDArray[np.bool_]:
    """[T] tokens of requests drawn at random until `tokens` are reached; at least one request."""
    unique, inverse, size = np.unique(request_T, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(unique))
    inside = np.cumsum(size[order]) <= tokens
    inside[0] = True
    chosen = np.zeros(len(unique), bool)
    chosen[order[inside]] = True
    mask: npt.NDArray[Any] = chosen[inverse]
    return mask


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


@compiled
def _add_pairs(
    first_TK: Any, first_k_T: Any, second_TK: Any, second_k_T: Any, counts_EE: Any
) -> None:
    for t in range(len(first_TK)):
        for i in range(first_k_T[t]):
            for j in range(second_k_T[t]):
                counts_EE[first_TK[t, i], second_TK[t, j]] += 1
