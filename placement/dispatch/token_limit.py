"""Capacity rules: what becomes of tokens beyond what an expert or a rank may take. Off by default.

Runs before dispatch, on one step of one layer: ids in, ids out, a dropped choice is -1. Knows gates
and which rank holds which expert. Knows nothing of traffic or time. A rule changes the model's
output, so it acts only where it is asked for, and what it dropped or moved is always reported.

Rules (after Capacity-Aware Inference, arXiv 2503.05066): drop      every expert keeps its C
assignments of highest gate, C = max(1, ceil(gamma·A / E)) but at most the step's tokens; the rest
are dropped, and nothing refills them (the paper's public patch refills from the ordinary top-k,
which brings the dropped ones back). reroute   drop; then a token's lost choices go to experts on
its own rank that have capacity and that it does not use yet, best score first over all tokens. The
paper's expanded drop with k enforced, save that a local candidate never displaces a chosen one. Own
rank means what `holds_GE` says, never all experts (the public code reads it so unless told
otherwise). Scope device: the limit is one per rank, n·C for the n experts on it, in place of one
per expert. Gates are not rescaled. Ties go to the lower token, then to the lower choice or expert.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ...errors import InputError, UsageError
from ...foundation.arrays import BoolArray, FloatArray, IntArray


@dataclass(frozen=True)
class CapacityRule:
    """What to do with overflow. factor: gamma, capacity over the mean load of an expert."""

    rule: Literal["drop", "reroute"]
    factor: float
    scope: Literal["expert", "device"] = "expert"

    def __post_init__(self) -> None:
        if self.rule not in ("drop", "reroute") or self.scope not in ("expert", "device"):
            raise UsageError(
                f"capacity {self.rule!r} per {self.scope!r}: the rule is drop or reroute, the "
                "scope expert or device"
            )
        if not (math.isfinite(self.factor) and self.factor > 0):
            raise UsageError(f"capacity factor {self.factor} must be finite and above 0")


@dataclass(frozen=True, eq=False)
class CapacityResult:
    """One step of one layer under a rule. Dropped choices have id -1 and gate 0."""

    ids_TK: IntArray
    gates_TK: FloatArray
    limit: int                 # assignments an expert may keep
    dropped: int
    rerouted: int
    dropped_share: float       # of the assignments that came in
    peak_load_before: int      # most assignments of one expert
    peak_load: int


def apply_capacity(
    ids_TK: npt.NDArray[np.integer[Any]],
    gates_TK: npt.ArrayLike,
    num_experts: int,
    rule: CapacityRule,
    *,
    score_TE: npt.ArrayLike | None = None,
    home_T: npt.NDArray[np.integer[Any]] | None = None,
    holds_GE: BoolArray | None = None,
) -> CapacityResult:
    """Apply a rule to one step. A step of one token is left alone, as in the paper.

    ids_TK: chosen experts, -1 = none; gates_TK: their router weights, >= 0. score_TE: the router's
    softmax over all experts and home_T: each token's rank, for `reroute`. holds_GE: which rank
    holds which expert, for `reroute` and scope device (an expert counts on its lowest rank).
    Raises InputError on bad shapes or NaN, UsageError when a needed argument is missing.
    """
    ids = np.array(ids_TK, np.int64)
    gates = np.where(ids >= 0, np.asarray(gates_TK, np.float64), 0.0)
    _check(ids, gates, num_experts, rule, score_TE, home_T, holds_GE)
    before_E = np.bincount(ids[ids >= 0], minlength=num_experts)
    tokens, arrived = len(ids), int(before_E.sum())
    limit = min(max(1, math.ceil(rule.factor * arrived / num_experts)), max(1, tokens))
    pool_E, capacity_P = _pools(num_experts, limit, rule, holds_GE)
    rerouted = 0
    if tokens > 1:
        lost_TK = _drop_inplace(ids, gates, pool_E, capacity_P)
        if rule.rule == "reroute":
            assert score_TE is not None and home_T is not None and holds_GE is not None
            rerouted = _reroute_inplace(
                ids, gates, lost_TK, pool_E, capacity_P, np.asarray(score_TE, np.float64), home_T,
                holds_GE,
            )
    after_E = np.bincount(ids[ids >= 0], minlength=num_experts)
    dropped = arrived - int(after_E.sum())
    return CapacityResult(
        ids_TK=ids, gates_TK=gates, limit=limit, dropped=dropped, rerouted=rerouted,
        dropped_share=dropped / arrived if arrived else 0.0,
        peak_load_before=int(before_E.max(initial=0)), peak_load=int(after_E.max(initial=0)),
    )


def _check(
    ids: IntArray,
    gates: FloatArray,
    num_experts: int,
    rule: CapacityRule,
    score_TE: npt.ArrayLike | None,
    home_T: npt.NDArray[np.integer[Any]] | None,
    holds_GE: BoolArray | None,
) -> None:
    if ids.ndim != 2 or gates.shape != ids.shape:
        raise InputError(
            f"capacity needs ids and gates [T, K]; got {list(ids.shape)}, {list(gates.shape)}"
        )
    if ids.size and (int(ids.max()) >= num_experts or int(ids.min()) < -1):
        raise InputError(f"ids hold {int(ids.max())}; experts are 0..{num_experts - 1}, -1 = none")
    if not np.isfinite(gates).all() or (gates < 0).any():
        raise InputError("gates must be finite and >= 0: give the softmax, not logits")
    if rule.rule == "reroute" and (score_TE is None or home_T is None or holds_GE is None):
        raise UsageError("reroute needs score_TE, home_T, holds_GE: what the own rank can take")
    if rule.scope == "device" and holds_GE is None:
        raise UsageError("scope device needs holds_GE: which rank holds which expert")
    if score_TE is not None:
        score = np.asarray(score_TE, np.float64)
        if score.shape != (len(ids), num_experts) or not np.isfinite(score).all():
            raise InputError(f"scores must be finite, [{len(ids)}, {num_experts}]")
    if holds_GE is not None and (holds_GE.shape[1:] != (num_experts,) or not holds_GE.any(0).all()):
        raise InputError(f"holds_GE must be [ranks, {num_experts}] with a holder for every expert")


def _pools(
    num_experts: int, limit: int, rule: CapacityRule, holds_GE: BoolArray | None
) -> tuple[IntArray, IntArray]:
    """(pool of each expert [E], assignments each pool may take): one per expert, or per rank."""
    if rule.scope == "device" and holds_GE is not None:
        rank_E = np.argmax(holds_GE, axis=0)
        return rank_E, np.bincount(rank_E, minlength=len(holds_GE)) * limit
    return np.arange(num_experts), np.full(num_experts, limit)


def _drop_inplace(
    ids: IntArray, gates: FloatArray, pool_E: IntArray, capacity_P: IntArray
) -> BoolArray:
    """Keep each pool's best gates, up to its room; capacity_P is left with what is unused."""
    token, choice = np.nonzero(ids >= 0)
    pool_A = pool_E[ids[token, choice]]
    order = np.lexsort((choice, token, -gates[token, choice], pool_A))
    starts = np.flatnonzero(np.diff(pool_A[order], prepend=-1))
    turn_A = np.empty(len(order), np.int64)
    turn_A[order] = np.arange(len(order)) - np.repeat(
        starts, np.diff(np.append(starts, len(order)))
    )
    over = turn_A >= capacity_P[pool_A]
    capacity_P -= np.bincount(pool_A[~over], minlength=len(capacity_P))
    lost_TK = np.zeros(ids.shape, bool)
    lost_TK[token[over], choice[over]] = True
    ids[lost_TK] = -1
    gates[lost_TK] = 0.0
    return lost_TK


def _reroute_inplace(
    ids: IntArray,
    gates: FloatArray,
    lost_TK: BoolArray,
    pool_E: IntArray,
    capacity_P: IntArray,
    score_TE: FloatArray,
    home_T: npt.NDArray[np.integer[Any]],
    holds_GE: BoolArray,
) -> int:
    """Fill lost choices from the token's own rank, best score first; how many were filled."""
    needy_N = np.flatnonzero(lost_TK.any(axis=1))
    open_NE = holds_GE[home_T[needy_N]]
    used_n, used_k = np.nonzero(ids[needy_N] >= 0)
    open_NE[used_n, ids[needy_N][used_n, used_k]] = False
    row, expert = np.nonzero(open_NE)
    token = needy_N[row]
    filled = 0
    for i in np.lexsort((expert, token, -score_TE[token, expert])):
        t, e = int(token[i]), int(expert[i])
        free = np.flatnonzero(lost_TK[t])
        if len(free) and capacity_P[pool_E[e]] > 0:
            ids[t, free[0]], gates[t, free[0]] = e, score_TE[t, e]
            lost_TK[t, free[0]] = False
            capacity_P[pool_E[e]] -= 1
            filled += 1
    return filled
