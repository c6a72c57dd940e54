"""Capacity rules: who is dropped, who goes where instead, and what is reported."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadmaster.errors import InputError, UsageError
from loadmaster.placement.dispatch.token_limit import CapacityResult, CapacityRule, apply_capacity

DROP, REROUTE = CapacityRule("drop", 1.0), CapacityRule("reroute", 1.0)


def softmax(seed: int, tokens: int, experts: int, skew: float = 1.5) -> np.ndarray:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((tokens, experts)) - skew * np.log(np.arange(1, experts + 1))
    exp = np.exp(logits)
    return exp / exp.sum(axis=1, keepdims=True)


def top(score: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.argsort(-score, axis=1, kind="stable")[:, :k]
    return ids, np.take_along_axis(score, ids, axis=1)


def test_each_expert_keeps_its_best_gates_and_nothing_refills_the_rest() -> None:
    """Five tokens want expert 0, C = 2: the two best stay. The second choices are untouched."""
    ids = np.array([[0, 1], [0, 2], [0, 3], [0, 4], [0, 5]])
    gates = np.array([[0.5, 0.1], [0.9, 0.1], [0.7, 0.1], [0.5, 0.1], [0.2, 0.1]])
    result = apply_capacity(ids, gates, 5 + 1, DROP)
    assert result.limit == 2                       # ceil(1.0 * 10 / 6)
    assert result.ids_TK[:, 0].tolist() == [-1, 0, 0, -1, -1]
    assert result.gates_TK[:, 0].tolist() == [0, 0.9, 0.7, 0, 0]      # not rescaled
    assert result.ids_TK[:, 1].tolist() == [1, 2, 3, 4, 5]
    assert (result.dropped, result.rerouted, result.dropped_share) == (3, 0, 0.3)
    assert (result.peak_load_before, result.peak_load) == (5, 2)


def test_equal_gates_keep_the_lower_token() -> None:
    result = apply_capacity(np.zeros((4, 1), int), np.full((4, 1), 0.5), 2, DROP)
    assert result.limit == 2 and result.ids_TK[:, 0].tolist() == [0, 0, -1, -1]


def test_the_limit_never_exceeds_the_tokens_and_one_token_is_left_alone() -> None:
    assert apply_capacity(np.array([[0], [0]]), [[1], [1]], 2, CapacityRule("drop", 9.0)).limit == 2
    alone = apply_capacity(np.array([[0, 0, 0]]), [[0.5, 0.3, 0.2]], 8, CapacityRule("drop", 0.1))
    assert alone.ids_TK.tolist() == [[0, 0, 0]] and alone.dropped == 0


def test_lost_choices_go_to_the_tokens_own_rank_where_there_is_room() -> None:
    """Rank 0 holds experts 0 and 1, rank 1 holds 2 and 3; everyone wants expert 0, C = 1."""
    ids = np.zeros((3, 1), int)
    score = np.array([[0.9, 0.1, 0, 0], [0.8, 0.05, 0.1, 0.05], [0.7, 0.1, 0.15, 0.05]])
    holds = np.array([[1, 1, 0, 0], [0, 0, 1, 1]], bool)
    result = apply_capacity(ids, score[:, :1], 4, REROUTE, score_TE=score,
                            home_T=np.array([0, 0, 1]), holds_GE=holds)
    assert result.limit == 1
    # Token 0 keeps 0. Token 1 may use 1 alone; token 2 takes 2, its best local one.
    assert result.ids_TK[:, 0].tolist() == [0, 1, 2]
    assert result.gates_TK[:, 0].tolist() == [0.9, 0.05, 0.15]
    assert (result.dropped, result.rerouted, result.peak_load) == (0, 2, 1)


def test_local_means_local() -> None:
    """Expert 3 is empty but on the other rank: the token would rather be dropped."""
    ids = np.array([[0], [0]])
    score = np.array([[0.6, 0.0, 0.0, 0.4], [0.5, 0.0, 0.0, 0.5]])
    holds = np.array([[1, 0, 0, 0], [0, 1, 1, 1]], bool)
    result = apply_capacity(ids, score[:, :1], 4, REROUTE, score_TE=score,
                            home_T=np.array([0, 0]), holds_GE=holds)
    assert result.ids_TK[:, 0].tolist() == [0, -1] and result.dropped == 1


def test_a_ranks_common_limit_lets_one_expert_be_hot() -> None:
    """Rank 0's two experts may take 2 C together: the hot one uses its neighbour's room."""
    ids = np.array([[0], [0], [0], [2]])
    holds = np.array([[1, 1, 0, 0], [0, 0, 1, 1]], bool)
    per_expert = apply_capacity(ids, np.full((4, 1), 0.5), 4, DROP)
    per_device = apply_capacity(ids, np.full((4, 1), 0.5), 4, CapacityRule("drop", 1.0, "device"),
                                holds_GE=holds)
    assert per_expert.limit == per_device.limit == 1
    assert per_expert.dropped == 2 and per_device.dropped == 1


def run(seed: int, rule: CapacityRule, tokens: int = 60) -> tuple[np.ndarray, CapacityResult]:
    score = softmax(seed, tokens, 8)
    ids, gates = top(score, 2)
    holds = np.arange(8) // 2 == np.arange(4)[:, None]
    home = np.random.default_rng(seed).integers(0, 4, tokens)
    return ids, apply_capacity(ids, gates, 8, rule, score_TE=score, home_T=home, holds_GE=holds)


@given(st.integers(0, 10_000), st.sampled_from(["drop", "reroute"]),
       st.sampled_from([0.3, 1.0, 1.5, 4.0]), st.sampled_from(["expert", "device"]))
@settings(max_examples=80, deadline=None)
def test_limits_hold_and_nothing_is_lost_uncounted(
    seed: int, rule: str, factor: float, scope: str
) -> None:
    ids, result = run(seed, CapacityRule(rule, factor, scope))  # type: ignore[arg-type]
    kept = result.ids_TK
    load_E = np.bincount(kept[kept >= 0], minlength=8)
    if scope == "expert":
        assert load_E.max() <= result.limit
    assert load_E.reshape(4, 2).sum(axis=1).max() <= 2 * result.limit
    assert load_E.sum() + result.dropped == ids.size
    for row in kept:
        assert len(set(row[row >= 0])) == (row >= 0).sum()       # no expert twice in a token
    stayed = kept == ids
    assert int(((kept >= 0) & ~stayed).sum()) == result.rerouted
    assert (result.gates_TK[kept < 0] == 0).all()


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_rerouting_only_adds_to_dropping(seed: int) -> None:
    """What drop keeps, reroute keeps in its place; it fills some of what drop left empty."""
    _, dropped = run(seed, DROP)
    _, rerouted = run(seed, REROUTE)
    kept = dropped.ids_TK >= 0
    assert np.array_equal(rerouted.ids_TK[kept], dropped.ids_TK[kept])
    assert rerouted.dropped <= dropped.dropped


def test_dropped_share_is_the_papers_formula() -> None:
    """Sum of max(0, N_i - C) over all assignments."""
    ids, result = run(5, CapacityRule("drop", 1.5), tokens=400)
    load_E = np.bincount(ids.reshape(-1), minlength=8)
    assert result.dropped == np.maximum(0, load_E - result.limit).sum()
    assert result.dropped_share == result.dropped / ids.size


def test_bad_input_is_named() -> None:
    ids, gates = np.array([[0], [1]]), np.array([[0.5], [0.5]])
    with pytest.raises(UsageError, match="factor 0"):
        CapacityRule("drop", 0)
    with pytest.raises(UsageError, match="drop or reroute"):
        CapacityRule("refill", 1)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="reroute needs"):
        apply_capacity(ids, gates, 2, REROUTE)
    with pytest.raises(UsageError, match="scope device needs"):
        apply_capacity(ids, gates, 2, CapacityRule("drop", 1, "device"))
    with pytest.raises(InputError, match="softmax, not logits"):
        apply_capacity(ids, -gates, 2, DROP)
    with pytest.raises(InputError, match="softmax, not logits"):
        apply_capacity(ids, gates * np.nan, 2, DROP)
    with pytest.raises(InputError, match=r"experts are 0\.\.0"):
        apply_capacity(ids, gates, 1, DROP)
    with pytest.raises(InputError, match="holder for every expert"):
        apply_capacity(ids, gates, 2, REROUTE, score_TE=np.full((2, 2), 0.5),
                       home_T=np.array([0, 0]), holds_GE=np.array([[True, False]]))
