"""Which rows every rank runs in the next step: continuous batching over ranks in lock step.

Knows requests, their prompts and how far each has come. Knows nothing of Ray, models, plans or
clocks. How a request is cut into chunks depends on that request alone, never on its neighbours, so
its output does not either.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from ...errors import InputError
from ...traces.trace import DECODE, PREFILL
from ..protocol.settings import Limits
from ..protocol.step_messages import Chunk, ReplayedRouting, StepResult, TokenArray


@dataclass
class Request:
    """One prompt and what became of it so far."""

    number: int
    prompt: TokenArray
    max_new_tokens: int
    domain: int = -1
    stop_tokens: frozenset[int] = frozenset()
    replay: ReplayedRouting | None = None      # routing of the whole prompt (parity tests)
    produced: list[int] = field(default_factory=list)
    digest: str = ""
    error: str = ""
    done: bool = False
    home: int = -1
    retries: int = 0
    fed: int = 0           # rows of prompt and produced tokens that went through the model
    _regained: int = 0      # produced tokens that a retry has produced again

    @property
    def in_prefill(self) -> bool:
        return self.fed < len(self.prompt)

    def next_chunk(self, chunk_tokens: int) -> Chunk:
        """The rows that come next: a piece of the prompt on a fixed grid, or one token."""
        start = self.fed
        if not self.in_prefill:
            token = self.produced[start - len(self.prompt)]
            return Chunk(
                self.number, np.array([token], np.int32), start, DECODE, self.domain, True
            )
        stop = min(start + chunk_tokens, len(self.prompt))
        replay = self.replay
        if replay is not None:
            replay = ReplayedRouting(
                replay.ids_LTK[:, start:stop], replay.gates_LTK[:, start:stop]
            )
        wants = stop == len(self.prompt)
        return Chunk(
            self.number, self.prompt[start:stop], start, PREFILL, self.domain, wants, replay
        )

    def advance(self, chunk: Chunk, token: int | None) -> int | None:
        """The chunk went through. Returns the token if it is new to whoever reads the stream.

        After a retry the tokens already streamed must come again; another token fails the request.
        """
        self.fed = chunk.start + len(chunk.tokens)
        if token is None:
            return None
        if self._regained < len(self.produced):
            if self.produced[self._regained] != token:
                self.fail(
                    f"request {self.number}: after a retry token {self._regained} came out as "
                    f"{token}, streamed was {self.produced[self._regained]}; stopped"
                )
            self._regained += 1
            return None
        self.produced.append(token)
        self._regained += 1
        self.done = len(self.produced) >= self.max_new_tokens or token in self.stop_tokens
        return token

    def restart(self) -> None:
        """Its rank is gone: start again from the prompt; what was streamed stays streamed."""
        self.fed = self._regained = 0
        self.home = -1
        self.retries += 1

    def fail(self, reason: str) -> None:
        """No more tokens will come."""
        self.error, self.done = reason, True

    @property
    def remaining_rows(self) -> int:
        """Rows still to run, an upper bound: what a home rank takes on with it."""
        return len(self.prompt) + self.max_new_tokens - self.fed


class Scheduler:
    """Requests in flight on G ranks. Homes: the rank with the fewest rows to do, lowest first."""

    def __init__(self, ranks: int, limits: Limits) -> None:
        self.limits = limits
        self._waiting: deque[Request] = deque()
        self._active: list[list[Request]] = [[] for _ in range(ranks)]
        self._release: list[list[int]] = [[] for _ in range(ranks)]

    @property
    def ranks(self) -> int:
        return len(self._active)

    @property
    def idle(self) -> bool:
        """No request waits or runs."""
        return not self._waiting and not any(self._active)

    @property
    def requests(self) -> list[Request]:
        """All requests not done, those in flight first."""
        return [r for rank in self._active for r in rank] + list(self._waiting)

    def add(self, requests: Iterable[Request]) -> None:
        """Take requests; they run in this order as the limits allow."""
        self._waiting.extend(requests)

    def next_step(self, *, phase: int | None = None) -> list[tuple[Chunk, ...]]:
        """Every rank's chunks. phase: only PREFILL or only DECODE rows, if given."""
        self._admit()
        share = -(-self.limits.step_tokens // self.ranks)
        return [self._rank_chunks(active, share, phase) for active in self._active]

    def set_step_tokens(self, step_tokens: int) -> None:
        """Change how large a step may grow; chunks stay as they are."""
        self.limits = dataclasses.replace(self.limits, step_tokens=step_tokens)

    def phases(self) -> set[int]:
        """Which phases have rows to run."""
        self._admit()
        return {PREFILL if r.in_prefill else DECODE for rank in self._active for r in rank}

    def take_release(self) -> list[tuple[int, ...]]:
        """Requests each rank may forget; asked for once."""
        release = [tuple(numbers) for numbers in self._release]
        self._release = [[] for _ in range(self.ranks)]
        return release

    def put_back_release(self, release: list[tuple[int, ...]]) -> None:
        """The step these were meant for does not run: hand them out again next time."""
        for mine, numbers in zip(self._release, release, strict=True):
            mine.extend(numbers)

    def drop_all(self) -> None:
        """Forget every request."""
        self._waiting.clear()
        self._active = [[] for _ in range(self.ranks)]

    def finish_step(
        self, chunks_G: list[tuple[Chunk, ...]], results: list[StepResult]
    ) -> list[tuple[Request, int | None]]:
        """Take a step's results. Returns (request, new token or None) for every request in it."""
        events: list[tuple[Request, int | None]] = []
        for rank, (chunks, result) in enumerate(zip(chunks_G, results, strict=True)):
            by_number = {r.number: r for r in self._active[rank]}
            for chunk in chunks:
                request = by_number.get(chunk.request)
                if request is None:
                    continue      # cancelled while the step ran
                request.digest = result.digest.get(chunk.request, request.digest)
                token = result.next_token.get(chunk.request)
                events.append((request, request.advance(chunk, token)))
            self._drop_done(rank)
        return events

    def restart_all(self, ranks: int) -> list[Request]:
        """Every rank's state is gone, or their number changed: all in flight start again.

        They keep their turn. Returns them.
        """
        lost = [r for rank in self._active for r in rank]
        for request in lost:
            request.restart()
        self._waiting.extendleft(reversed(sorted(lost, key=lambda r: r.number)))
        self._active = [[] for _ in range(ranks)]
        self._release = [[] for _ in range(ranks)]
        return lost

    def cancel(self, number: int) -> None:
        """Stop a request; its rank forgets it."""
        self._waiting = deque(r for r in self._waiting if r.number != number)
        for rank, active in enumerate(self._active):
            for request in active:
                if request.number == number:
                    request.fail(f"request {number} was cancelled")
            self._drop_done(rank)

    def _drop_done(self, rank: int) -> None:
        active = self._active[rank]
        self._release[rank].extend(r.number for r in active if r.done)
        self._active[rank] = [r for r in active if not r.done]

    def _admit(self) -> None:
        load = [sum(r.remaining_rows for r in active) for active in self._active]
        while self._waiting:
            open_ranks = [
                g for g, a in enumerate(self._active) if len(a) < self.limits.active_requests
            ]
            if not open_ranks:
                return
            home = min(open_ranks, key=lambda g: (load[g], g))
            request = self._waiting.popleft()
            request.home = home
            load[home] += request.remaining_rows
            self._active[home].append(request)

    def _rank_chunks(
        self, active: list[Request], share: int, phase: int | None
    ) -> tuple[Chunk, ...]:
        decoding = [r for r in active if not r.in_prefill]
        prompts = [r for r in active if r.in_prefill]
        chunks: list[Chunk] = []
        if phase != PREFILL:
            chunks.extend(r.next_chunk(self.limits.chunk_tokens) for r in decoding)
        rows = len(chunks)
        if phase != DECODE:
            for request in prompts:
                if rows >= share:
                    break
                chunks.append(request.next_chunk(self.limits.chunk_tokens))
                rows += len(chunks[-1].tokens)
        return tuple(chunks)


def check_prompt(prompt: object, max_new_tokens: int, vocabulary: int, context: int) -> TokenArray:
    """A prompt as an array of token ids. Raises InputError when it cannot be served."""
    tokens = np.asarray(prompt)
    if tokens.ndim == 1 and not len(tokens):
        raise InputError("the prompt is empty: give at least one token")
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise InputError("a prompt is a list of token ids")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens {max_new_tokens} must be at least 1")
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise InputError(
            f"the prompt holds token {int(tokens.max())}; this model knows 0..{vocabulary - 1}"
        )
    if len(tokens) + max_new_tokens > context:
        raise InputError(
            f"{len(tokens)} prompt tokens and {max_new_tokens} new ones exceed the model's "
            f"{context} positions: shorten one of them"
        )
    return tokens.astype(np.int32)
