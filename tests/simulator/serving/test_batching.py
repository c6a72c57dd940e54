"""Continuous batching: what meets in a step, who is admitted, who has to wait."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadmaster.errors import InputError, UsageError
from loadmaster.simulator.serving.batching import (
    BatchLimits,
    Lanes,
    Prefill,
    RequestLog,
    require_fits,
)
from loadmaster.simulator.serving.workload import Workload


def lanes_of(prompts, outputs, devices=1, **limits):
    workload = Workload.from_arrays([0.0] * len(prompts), prompts, outputs)
    log = RequestLog(len(prompts))
    queue = deque(Prefill(r, p, o) for r, (p, o) in enumerate(zip(prompts, outputs, strict=True)))
    return Lanes(workload, BatchLimits(**limits), devices, log), queue, log


def play(lanes, queue):
    """Steps of one nanosecond each until nothing is left: (prompt tokens, answer tokens)."""
    steps, now = [], 0
    while (batch := lanes.next_batch(queue, now)) is not None:
        now += 1
        lanes.complete(batch, now)
        steps.append((batch.prefill_tokens, batch.decode_tokens))
    return steps


def test_a_long_prompt_is_read_in_pieces_beside_a_decoding_request() -> None:
    """Budget 4: the short prompt goes first, then the long one takes what decoding leaves."""
    lanes, queue, log = lanes_of([2, 7], [4, 1], step_tokens=4, max_requests=4)
    assert play(lanes, queue) == [(4, 0), (3, 1), (2, 1), (0, 1)]
    assert log.first_token_ns == [1, 3] and log.finish_ns == [4, 3]


def test_prefill_first_lets_decoding_wait() -> None:
    lanes, queue, _ = lanes_of([2, 7], [4, 1], step_tokens=4, max_requests=4, prefill="first")
    assert play(lanes, queue) == [(4, 0), (4, 0), (1, 0), (0, 1), (0, 1), (0, 1)]


def test_requests_beyond_the_limit_wait_their_turn() -> None:
    lanes, queue, log = lanes_of([1, 1, 1], [3, 1, 1], step_tokens=8, max_requests=2)
    play(lanes, queue)
    assert log.start_ns == [0, 0, 1]


def test_homes_go_to_the_device_with_fewest_requests() -> None:
    lanes, queue, log = lanes_of([1] * 5, [9] * 5, devices=3, step_tokens=8, max_requests=8)
    lanes.next_batch(queue, 0)
    assert log.home == [0, 1, 2, 0, 1]


def test_kv_memory_holds_back_the_head_of_the_queue() -> None:
    """Two requests of 10 tokens in memory for 15: one after the other, on the device's own."""
    lanes, queue, log = lanes_of(
        [6, 6], [4, 4], step_tokens=64, max_requests=8, kv_tokens_per_device=(15,)
    )
    play(lanes, queue)
    assert log.start_ns == [0, 4]
    assert lanes.kv_free_G == [15]


def test_a_lost_device_sends_its_requests_back_to_read_all_again() -> None:
    lanes, queue, log = lanes_of([3, 3], [5, 5], devices=2, step_tokens=64, max_requests=8)
    for now in (1, 2, 3):
        lanes.complete(lanes.next_batch(queue, now - 1), now)
    assert lanes.lose_devices({1}, queue) == 1
    assert [(p.request, p.tokens, p.outputs_left) for p in queue] == [(1, 3 + 3, 2)]
    play(lanes, queue)
    assert log.retries == [0, 1] and log.home == [0, 0]
    assert log.first_token_ns[1] == 1, "the first token was streamed before the loss"


def test_a_request_no_device_can_hold_is_named() -> None:
    workload = Workload.from_arrays([0.0, 1.0], [5, 50], [5, 50])
    with pytest.raises(InputError, match="request 1 needs KV memory for 100 tokens"):
        require_fits(workload, BatchLimits(kv_tokens_per_device=(40, 60)))


@pytest.mark.parametrize(
    "bad", [{"step_tokens": 0}, {"max_requests": 0}, {"step_tokens": 4}, {"prefill": "last"}]
)
def test_limits_that_cannot_be_are_refused(bad) -> None:
    with pytest.raises(UsageError):
        BatchLimits(**bad)


REQUESTS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=12)


@given(REQUESTS, st.integers(1, 9), st.integers(0, 20), st.sampled_from(["chunked", "first"]))
@settings(deadline=None)
def test_every_token_is_read_and_written_once(requests, running, room, prefill) -> None:
    """Tokens conserved: prompts read once, answers one token a step after the first."""
    prompts, outputs = [p for p, _ in requests], [o for _, o in requests]
    lanes, queue, log = lanes_of(
        prompts, outputs, step_tokens=running + room, max_requests=running, prefill=prefill
    )
    steps = play(lanes, queue)
    assert sum(p for p, _ in steps) == sum(prompts)
    assert sum(d for _, d in steps) == sum(o - 1 for o in outputs)
    assert all(0 < p + d <= running + room for p, d in steps)
    for start, first, finish in zip(log.start_ns, log.first_token_ns, log.finish_ns, strict=True):
        assert start < first <= finish
    assert lanes.in_flight == 0
