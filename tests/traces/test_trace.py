"""RoutingTrace: built from arrays with every mistake named; sliced; split without leaking."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loadmaster.errors import InputError
from loadmaster.traces.trace import PREFILL, RoutingTrace


def test_loads_count_every_choice_that_counts(make_trace: Any) -> None:
    """Against a plain loop, with a router that picks fewer than K."""
    trace = make_trace(tokens=40)
    expected = np.zeros((3, 8), int)
    for t in range(40):
        for layer in range(3):
            for k in range(trace.k_of_token[t, layer]):
                expected[layer, trace.ids[t, layer, k]] += 1
    assert np.array_equal(trace.load_LE(), expected)
    half = np.arange(0, 40, 2)
    assert np.array_equal(trace.load_LE(half), trace.select(half).load_LE())


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (np.zeros((4, 2)), {}, r"\[T, L, K\]"),
        (np.zeros((4, 2, 1)), {}, "must be integers"),
        (np.zeros((4, 2, 9), int), {}, "K=9 experts but a layer has only E=8"),
        (np.zeros((4, 0, 2), int), {}, "no layer"),
        (np.full((4, 2, 2), 8), {}, r"token 0, layer 0.*\[0, 8\)"),
        (np.full((4, 2, 2), -1), {}, r"token 0, layer 0"),
        (np.zeros((4, 2, 2), int), {"num_experts": 0}, "num_experts 0"),
        (np.zeros((4, 2, 2), int), {"request": [1, 2]}, r"request has shape \[2\]"),
        (np.zeros((4, 2, 2), int), {"gates": np.full((4, 2, 2), np.nan)}, "NaN"),
        (np.zeros((4, 2, 2), int), {"k_of_token": np.full((4, 2), 3)}, "k_of_token"),
        (np.zeros((4, 2, 2), int), {"layer_indices": [1]}, "names 1 layers"),
        (np.zeros((4, 2, 2), int), {"domain": [0, 1, 2, 0], "domain_names": ["a"]}, "domain 2"),
    ],
)
def test_a_wrong_array_is_named(ids: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RoutingTrace.from_arrays(ids, **{"num_experts": 8, **options})


def test_ids_take_one_byte_while_they_can() -> None:
    """uint8 up to 256 experts, uint16 above; the 257th expert survives."""
    assert RoutingTrace.from_arrays([[[255]]], num_experts=256).ids.dtype == np.uint8
    wide = RoutingTrace.from_arrays([[[256]]], num_experts=257)
    assert wide.ids.dtype == np.uint16 and wide.ids[0, 0, 0] == 256


def test_ids_beyond_a_tokens_k_may_be_anything() -> None:
    """Padding after the k that count is no expert and is not read as one."""
    trace: Any = RoutingTrace.from_arrays(
        [[[3, -1]], [[1, 7]]], num_experts=8, k_of_token=[[1], [2]]
    )
    assert trace.load_LE()[0].tolist() == [0, 1, 0, 1, 0, 0, 0, 1]


def test_domains_may_be_words() -> None:
    words = ["b", "a", "b"]
    trace: Any = RoutingTrace.from_arrays([[[0]], [[1]], [[1]]], num_experts=2, domain=words)
    assert trace.domain_names == ("a", "b") and trace.domain.tolist() == [1, 0, 1]
    assert trace.slice_domains(["b"]).ids.ravel().tolist() == [0, 1]
    with pytest.raises(InputError, match="no domain 'c'; there are: a, b"):
        trace.slice_domains(["c"])


def test_slices_are_by_step_request_domain_and_phase(make_trace: Any) -> None:
    """Each keeps exactly the tokens it says, with all their columns."""
    trace = make_trace()
    for part, kept in (
        (trace.slice_steps(2, 4), (trace.step >= 2) & (trace.step < 4)),
        (trace.slice_requests([1, 5]), np.isin(trace.request, [1, 5])),
        (trace.slice_domains([1]), trace.domain == 1),
        (trace.slice_phase("prefill"), trace.phase == PREFILL),
    ):
        assert 0 < part.num_tokens < 200
        assert part.digest() == trace.select(kept).digest()


def test_a_slice_by_what_was_not_recorded_is_refused(make_trace: Any) -> None:
    with pytest.raises(InputError, match="did not record `step`"):
        make_trace(full=False).slice_steps(0, 1)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    fraction=st.floats(0.05, 0.95), seed=st.integers(0, 99),
    by=st.sampled_from(["request", "time"]),
)
def test_a_split_shares_no_request_and_loses_no_token(
    make_trace: Any, fraction: float, seed: int, by: Any
) -> None:
    trace = make_trace()
    a, b = trace.split(fraction, by=by, seed=seed)
    assert not set(a.request) & set(b.request)
    assert a.num_tokens + b.num_tokens == trace.num_tokens
    assert abs(len(set(a.request)) - fraction * 20) <= 1
    if by == "time":
        assert a.request.max() < b.request.min()
    else:
        again, _ = trace.split(fraction, seed=seed)
        assert again.digest() == a.digest()


def test_one_request_cannot_be_split(make_trace: Any) -> None:
    with pytest.raises(InputError, match="at least 2 requests"):
        make_trace(tokens=5).split()


def test_home_ranks_come_from_the_recording_or_the_request(make_trace: Any) -> None:
    trace = make_trace()
    assert np.array_equal(trace.home_rank_T(4), trace.source)
    with pytest.raises(InputError, match="recorded on at least 4 ranks, the cluster has 2"):
        trace.home_rank_T(2)
    bare = make_trace(tokens=600, full=False)
    assert bare.home_rank_T(2).tolist() == [0] * 256 + [1] * 256 + [0] * 88


def test_a_digest_knows_every_column(make_trace: Any) -> None:
    """Equal content, equal digest; memory layout does not matter."""
    import dataclasses

    trace = make_trace()
    assert trace.digest() == make_trace().digest()
    by_layer = np.ascontiguousarray(trace.ids.transpose(1, 0, 2)).transpose(1, 0, 2)
    assert dataclasses.replace(trace, ids=by_layer).digest() == trace.digest()
    for column in ("gates", "k_of_token", "step", "request", "source", "phase", "domain"):
        assert dataclasses.replace(trace, **{column: None}).digest() != trace.digest()
