"""Continuous batching: whose rows run next, and what a retry may not change."""

from __future__ import annotations

import numpy as np
import pytest

from loadmaster.errors import InputError
from loadmaster.traces.trace import DECODE, PREFILL
from loadmaster.workers.coordinator.scheduler import Request, Scheduler, check_prompt
from loadmaster.workers.protocol.settings import Limits
from loadmaster.workers.protocol.step_messages import Chunk, StepResult


def request(number: int, length: int, new_tokens: int = 2) -> Request:
    return Request(number, np.arange(length, dtype=np.int32) % 250, new_tokens)


def answer(chunks_G: list[tuple[Chunk, ...]], token: int = 7) -> list[StepResult]:
    """What ranks would send back that always predict `token`."""
    return [
        StepResult(g, 1, 1, next_token={c.request: token for c in chunks if c.wants_token})
        for g, chunks in enumerate(chunks_G)
    ]


def step(scheduler: Scheduler, token: int = 7) -> list[list[tuple[int, int, int]]]:
    """Run one step; returns (request, start, rows) by rank."""
    chunks_G = scheduler.next_step()
    scheduler.finish_step(chunks_G, answer(chunks_G, token))
    return [[(c.request, c.start, len(c.tokens)) for c in chunks] for chunks in chunks_G]


def test_a_request_runs_its_prompt_on_a_grid_then_token_by_token() -> None:
    scheduler = Scheduler(1, Limits(step_tokens=8, chunk_tokens=4))
    scheduler.add([request(0, 10, new_tokens=3)])
    log = [step(scheduler)[0] for _ in range(5)]
    assert log == [[(0, 0, 4)], [(0, 4, 4)], [(0, 8, 2)], [(0, 10, 1)], [(0, 11, 1)]]
    assert scheduler.idle
    assert scheduler.take_release() == [(0,)]


def test_a_steps_rows_reach_its_share_while_prompts_wait() -> None:
    scheduler = Scheduler(2, Limits(step_tokens=16, chunk_tokens=4))
    scheduler.add([request(n, 4) for n in range(6)])
    assert step(scheduler) == [[(0, 0, 4), (2, 0, 4)], [(1, 0, 4), (3, 0, 4)]]
    # The next step carries the four that decode, and the two prompts left.
    assert step(scheduler) == [
        [(0, 4, 1), (2, 4, 1), (4, 0, 4)], [(1, 4, 1), (3, 4, 1), (5, 0, 4)]
    ]


def test_chunks_depend_on_the_request_alone() -> None:
    """Cut points of a prompt stay where they are, whoever runs beside it."""

    def cuts(neighbours: int) -> list[tuple[int, int]]:
        scheduler = Scheduler(1, Limits(step_tokens=12, chunk_tokens=5))
        scheduler.add([request(n, 3 + n) for n in range(1, neighbours + 1)])
        scheduler.add([request(0, 13, new_tokens=1)])
        seen = []
        while not scheduler.idle:
            seen += [(s, n) for r, s, n in step(scheduler)[0] if r == 0]
        return seen

    assert cuts(0) == cuts(3) == cuts(7) == [(0, 5), (5, 5), (10, 3)]


def test_homes_go_to_the_rank_with_least_to_do() -> None:
    scheduler = Scheduler(3, Limits(step_tokens=300, chunk_tokens=100))
    scheduler.add([request(0, 50), request(1, 10), request(2, 10), request(3, 20)])
    assert step(scheduler) == [[(0, 0, 50)], [(1, 0, 10), (3, 0, 20)], [(2, 0, 10)]]


def test_at_most_so_many_requests_are_in_flight_on_a_rank() -> None:
    scheduler = Scheduler(1, Limits(step_tokens=100, chunk_tokens=10, active_requests=2))
    scheduler.add([request(n, 3, new_tokens=1) for n in range(3)])
    assert step(scheduler) == [[(0, 0, 3), (1, 0, 3)]]
    assert step(scheduler) == [[(2, 0, 3)]]


def test_a_step_of_one_phase_leaves_the_other_alone() -> None:
    scheduler = Scheduler(1, Limits(step_tokens=100, chunk_tokens=10))
    scheduler.add([request(0, 3)])
    step(scheduler)
    scheduler.add([request(1, 3)])
    assert scheduler.phases() == {PREFILL, DECODE}
    assert [c.request for c in scheduler.next_step(phase=PREFILL)[0]] == [1]
    assert [c.request for c in scheduler.next_step(phase=DECODE)[0]] == [0]


def test_a_retry_streams_no_token_twice() -> None:
    scheduler = Scheduler(2, Limits(step_tokens=8, chunk_tokens=4))
    one = request(0, 4, new_tokens=3)
    scheduler.add([one])
    step(scheduler)
    step(scheduler)
    assert one.produced == [7, 7]
    assert scheduler.restart_all(2) == [one]
    fresh = []
    while not scheduler.idle:
        chunks_G = scheduler.next_step()
        fresh += [t for _, t in scheduler.finish_step(chunks_G, answer(chunks_G)) if t is not None]
    assert fresh == [7]
    assert (one.produced, one.error, one.retries) == ([7, 7, 7], "", 1)


def test_a_retry_that_comes_out_otherwise_fails_the_request() -> None:
    scheduler = Scheduler(1, Limits(step_tokens=8, chunk_tokens=4))
    one = request(0, 4, new_tokens=5)
    scheduler.add([one])
    step(scheduler)
    scheduler.restart_all(1)
    step(scheduler, token=9)
    assert one.done
    assert "came out as 9, streamed was 7" in one.error
    assert one.produced == [7]


def test_restarted_requests_go_before_those_that_wait() -> None:
    scheduler = Scheduler(1, Limits(step_tokens=4, chunk_tokens=4, active_requests=1))
    scheduler.add([request(0, 4), request(1, 4)])
    step(scheduler)
    scheduler.restart_all(1)
    assert step(scheduler) == [[(0, 0, 4)]]


def test_a_cancelled_request_is_released() -> None:
    scheduler = Scheduler(1, Limits(step_tokens=8, chunk_tokens=4))
    scheduler.add([request(0, 4), request(1, 4)])
    step(scheduler)
    scheduler.cancel(0)
    assert scheduler.take_release() == [(0,)]
    assert step(scheduler) == [[(1, 4, 1)]]


def test_a_stop_token_ends_a_request() -> None:
    scheduler = Scheduler(1, Limits(step_tokens=8, chunk_tokens=4))
    one = request(0, 4, new_tokens=50)
    one.stop_tokens = frozenset({7})
    scheduler.add([one])
    step(scheduler)
    assert one.done and one.produced == [7]


@pytest.mark.parametrize(
    ("prompt", "new_tokens", "reason"),
    [
        ([], 1, "the prompt is empty"),
        ([[1, 2]], 1, "list of token ids"),
        ("text", 1, "list of token ids"),
        ([1.5], 1, "list of token ids"),
        ([1, 256], 1, r"token 256; this model knows 0\.\.255"),
        ([-1], 1, r"token -1; this model knows"),
        ([1] * 90, 11, "exceed the model's 100 positions"),
        ([1], 0, "at least 1"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_refused(
    prompt: object, new_tokens: int, reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        check_prompt(prompt, new_tokens, vocabulary=256, context=100)
