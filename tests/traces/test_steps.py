"""Steps as continuous batching makes them, against a simulation token by token."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadmaster.errors import InputError, UsageError
from loadmaster.traces.steps import StepSampler
from loadmaster.traces.trace import RoutingTrace


def trace_of_requests(lengths: list[int]) -> RoutingTrace:
    """One layer; token t chooses expert t mod 5; requests of these lengths, stored in turn."""
    request = np.repeat(np.arange(len(lengths)), lengths)
    ids = (np.arange(len(request)) % 5).reshape(-1, 1, 1)
    return RoutingTrace.from_arrays(ids, num_experts=5, request=request)


def served_in_order(lengths: list[int], concurrency: int, seed: int) -> list[int]:
    """The slow oracle: requests end to end in seeded order, cut in equal stretches, one for each
    place in flight; one token per turn, each stretch once round from its seeded point."""
    starts = np.concatenate(([0], np.cumsum(lengths)))
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths)).tolist()
    stream = [t for r in order for t in range(starts[r], starts[r + 1])]
    lanes = min(concurrency, len(stream))
    stretches = [
        stream[lane * len(stream) // lanes : (lane + 1) * len(stream) // lanes]
        for lane in range(lanes)
    ]
    first = rng.integers(0, [len(stretch) for stretch in stretches])
    turns = [deque(s[at:] + s[:at]) for s, at in zip(stretches, first, strict=True)]
    served: list[int] = []
    while any(turns):
        served += [turn.popleft() for turn in turns if turn]
    return served


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=20), concurrency=st.integers(1, 8),
    tokens=st.integers(1, 7), seed=st.integers(0, 5),
)
def test_interleaving_is_continuous_batching(
    lengths: list[int], concurrency: int, tokens: int, seed: int
) -> None:
    """Every step is a run of the oracle's order; the partial last step is dropped."""
    expected = served_in_order(lengths, concurrency, seed)
    assert sorted(expected) == list(range(sum(lengths)))
    sampler = StepSampler(tokens=tokens, concurrency=concurrency, seed=seed)
    if len(expected) < tokens:
        with pytest.raises(InputError, match="do not fill one step"):
            sampler.sample(trace_of_requests(lengths))
        return
    steps = sampler.sample(trace_of_requests(lengths))
    assert len(steps) == len(expected) // tokens
    assert steps.token.tolist() == expected[: len(steps) * tokens]
    assert set(np.diff(steps.offset)) == {tokens}


@pytest.mark.parametrize("requests", [8, 24, 90])
def test_every_token_is_in_one_step_however_few_requests_there_are(requests: int) -> None:
    """As many requests as are in flight once ended sampling when the first of them ended."""
    trace = trace_of_requests([10 + 7 * (r % 9) for r in range(requests)])
    steps = StepSampler(tokens=16, concurrency=24).sample(trace)
    assert len(np.unique(steps.token)) == len(steps.token) > trace.num_tokens - 16


def test_a_step_meets_requests_anywhere_in_their_lives() -> None:
    """The first step is like every other: not the first tokens of everyone, though all are of one
    length and as many as are in flight."""
    length, requests = 50, 200
    trace = trace_of_requests([length] * requests)
    steps = StepSampler(tokens=200, concurrency=200).sample(trace)
    for step in (0, len(steps) // 2, len(steps) - 1):
        place = steps.tokens_of(step) % length
        assert abs(place.mean() - (length - 1) / 2) < 4 * length / np.sqrt(12 * requests)
        assert len(np.unique(place)) > length // 2


def test_a_request_is_in_flight_once_where_there_are_many_more() -> None:
    trace = trace_of_requests([20] * 100)
    steps = StepSampler(tokens=10, concurrency=10).sample(trace)
    together = [np.unique(steps.tokens_of(w) // 20) for w in range(len(steps))]
    assert {len(requests) for requests in together} == {10}
    assert len(np.unique(np.concatenate(together))) == 100


def test_fewer_requests_than_asked_for_is_said() -> None:
    steps = StepSampler(tokens=2, concurrency=64).sample(trace_of_requests([40, 40]))
    assert steps.notes == (
        "only 2 requests for 64 in flight: each stands for about 32.0, at different places in it",
    )


def test_a_trace_without_requests_is_cut_in_blocks_and_says_so(make_trace: Any) -> None:
    trace = make_trace(tokens=1024, full=False)
    steps = StepSampler(tokens=8, concurrency=2).sample(trace)
    assert "blocks of 256 tokens" in steps.notes[0]
    assert len({int(t) // 256 for t in steps.tokens_of(0)}) == 2


def test_recorded_steps_are_the_traces_own(make_trace: Any) -> None:
    """Any sizes, in the order of the step numbers; nothing is dropped."""
    trace = make_trace(tokens=40)
    steps = StepSampler(order="recorded").sample(trace)
    assert [len(steps.tokens_of(w)) for w in range(len(steps))] == [16, 16, 8]
    assert np.array_equal(trace.step[steps.token], np.sort(trace.step))
    with pytest.raises(InputError, match="did not record steps"):
        StepSampler(order="recorded").sample(make_trace(full=False))


def test_shuffled_and_stored_exist_to_be_printed_beside() -> None:
    trace = trace_of_requests([10, 10])
    stored = StepSampler(tokens=4, order="stored").sample(trace)
    assert stored.token.tolist() == list(range(20))
    shuffled = StepSampler(tokens=4, order="shuffled", seed=1).sample(trace)
    assert sorted(shuffled.token.tolist()) == list(range(20))
    assert shuffled.token.tolist() != stored.token.tolist()


def test_the_first_steps_can_be_had_alone() -> None:
    sampler = StepSampler(tokens=3, concurrency=2)
    trace = trace_of_requests([9, 9, 9])
    few = sampler.sample(trace, max_steps=2)
    assert len(few) == 2
    assert few.token.tolist() == sampler.sample(trace).token.tolist()[:6]


def test_steps_that_cannot_be_are_refused() -> None:
    for options in ({"tokens": 0}, {"concurrency": 0}, {"order": "sorted"}):
        with pytest.raises(UsageError):
            StepSampler(**options)
