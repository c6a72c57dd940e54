"""StepSampler: which tokens of a trace meet in one forward step.

The one definition of a step (continuous batching); the planner, `evaluate`, the benchmarks and the
simulator all use it. Knows token order and requests. Knows nothing of experts or devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..errors import InputError, UsageError
from .trace import RoutingTrace

Order = Literal["interleaved", "recorded", "shuffled", "stored"]


@dataclass(frozen=True)
class Steps:
    """W steps: step w holds the trace's tokens `token[offset[w]:offset[w + 1]]`."""

    token: npt.NDArray[np.int64]    # [sum of step sizes] token indices into the trace
    offset: npt.NDArray[np.int64]   # [W + 1]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.offset) - 1

    def tokens_of(self, step: int) -> npt.NDArray[np.int64]:
        """Token indices of one step."""
        return self.token[self.offset[step] : self.offset[step + 1]]

    def step_of_token(self) -> npt.NDArray[np.int64]:
        """The step number of each entry of `token`."""
        return np.repeat(np.arange(len(self)), np.diff(self.offset))

    def take(self, steps: npt.NDArray[np.int64]) -> Steps:
        """Only these steps, in the order given."""
        parts = [self.tokens_of(int(w)) for w in steps]
        sizes = np.array([len(p) for p in parts], np.int64)
        token = np.concatenate(parts) if parts else np.empty(0, np.int64)
        return Steps(token, np.concatenate(([0], np.cumsum(sizes))), self.notes)


@dataclass(frozen=True)
class StepSampler:
    """How a trace is cut into steps (design: "A step").

    interleaved: `concurrency` requests are in flight, each in turn contributes its next token until
    the step holds `tokens`, and the turn carries over to the next step. As on a server that has
    been running for long, requests are met anywhere in their lives: laid end to end in seeded
    order they form one stream, every place in flight has an equal stretch of it and goes once
    round its stretch from a seeded point. So every token is in flight exactly once (what does not
    fill a last step is dropped), and long requests fill more places than short ones. Where the
    requests are fewer than `concurrency`, or one is longer than a stretch, a request is in flight
    at several of its tokens at once. recorded: the trace's own `step` column. shuffled: tokens at
    random (flatters every plan). stored: as they lie in the file (no server sees that).
    """

    tokens: int = 512
    concurrency: int = 64
    order: Order = "interleaved"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.concurrency < 1:
            raise UsageError(
                f"a step's tokens {self.tokens} and concurrency {self.concurrency} must both be "
                "at least 1"
            )
        orders = ("interleaved", "recorded", "shuffled", "stored")
        if self.order not in orders:
            raise UsageError(f"unknown order {self.order!r}; there are: {', '.join(orders)}")

    def sample(self, trace: RoutingTrace, max_steps: int | None = None) -> Steps:
        """Cut the trace into steps; at most `max_steps` (the first ones).

        Raises InputError when not even one whole step can be formed.
        """
        notes: list[str] = []
        if self.order == "recorded":
            steps = _recorded_steps(trace)
        else:
            steps = _whole_steps(self._token_order(trace, notes), self.tokens)
        if len(steps) == 0:
            raise InputError(
                f"the trace's {trace.num_tokens} tokens do not fill one step of {self.tokens} "
                f"({self.order} order, {self.concurrency} in flight): record more, or ask for "
                "smaller steps"
            )
        steps = Steps(steps.token, steps.offset, tuple(notes))
        if max_steps is not None and len(steps) > max_steps:
            return steps.take(np.arange(max_steps))
        return steps

    def _token_order(
        self, trace: RoutingTrace, notes: list[str]
    ) -> npt.NDArray[np.int64]:
        if self.order == "stored" or not trace.num_tokens:
            return np.arange(trace.num_tokens, dtype=np.int64)
        rng = np.random.default_rng(self.seed)
        if self.order == "shuffled":
            return rng.permutation(trace.num_tokens).astype(np.int64)
        if trace.request is None:
            notes.append("no requests recorded: blocks of 256 tokens stand for requests")
        tokens_by_request, start = _tokens_by_request(trace.request_T())
        requests = len(start) - 1
        if requests < self.concurrency:
            notes.append(
                f"only {requests} requests for {self.concurrency} in flight: each stands for about "
                f"{self.concurrency / requests:.1f}, at different places in it"
            )
        lengths = np.diff(start)[order := rng.permutation(requests)]
        stream = tokens_by_request[_ranges(start[order], lengths)]
        return stream[_round_robin(len(stream), self.concurrency, rng)]


def _tokens_by_request(
    request_T: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Tokens grouped by request (ascending request, stored order inside), and group starts."""
    token = np.argsort(request_T, kind="stable").astype(np.int64)
    _, counts = np.unique(request_T, return_counts=True)
    return token, np.concatenate(([0], np.cumsum(counts))).astype(np.int64)


def _ranges(start: npt.NDArray[np.int64], length: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """start[0], start[0] + 1, ... `length[0]` of them, then the same from start[1], and so on."""
    before = np.cumsum(length) - length
    return np.asarray(np.arange(int(length.sum())) + np.repeat(start - before, length), np.int64)


def _round_robin(
    tokens: int, concurrency: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Positions in a stream: one of every stretch in turn, each stretch once round from anywhere.

    Stretches are as equal as can be; the longer ones, by one token, take part in one more round.
    """
    lanes = min(concurrency, tokens)
    bound = np.arange(lanes + 1, dtype=np.int64) * tokens // lanes
    length = np.diff(bound)
    first = rng.integers(0, length)
    rounds = np.arange(int(length.max()), dtype=np.int64)[:, None]
    position = bound[:-1] + (first + rounds) % length
    return np.asarray(position[rounds < length], np.int64)


def _whole_steps(token: npt.NDArray[np.int64], tokens: int) -> Steps:
    whole = len(token) // tokens
    tokens = min(tokens, len(token))    # numpy takes no larger number, and no step is that long
    return Steps(token[: whole * tokens], np.arange(whole + 1, dtype=np.int64) * tokens)


def _recorded_steps(trace: RoutingTrace) -> Steps:
    if trace.step is None:
        raise InputError("this trace did not record steps: use order='interleaved'")
    token = np.argsort(trace.step, kind="stable").astype(np.int64)
    _, counts = np.unique(trace.step, return_counts=True)
    return Steps(token, np.concatenate(([0], np.cumsum(counts))).astype(np.int64))


RECORDED = StepSampler(order="recorded")      # the steps that a live group ran
