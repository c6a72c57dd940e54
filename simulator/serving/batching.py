"""Continuous batching: which tokens of which requests meet in the next step.

Knows token budgets, prefill chunks, decoding requests and KV memory. Knows nothing of simpy, clocks
beyond the time it is given, plans, or how long a step takes.

All decoding requests advance together, one token a step, so none is touched until it ends: a
request that still owes n tokens ends when the group's decode counter has grown by n.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from ...errors import InputError, UsageError
from .workload import Workload


@dataclass(frozen=True)
class BatchLimits:
    """What one step may hold, for a whole serving group.

    step_tokens: tokens of a step, prefill and decode together. max_requests: requests in flight.
    kv_tokens_per_device: KV memory of each device in tokens; None = never the limit. A request
    holds prompt + output tokens on its home device from admission to end.
    prefill: "chunked" fills what decoding requests leave of a step with pieces of prompts;
    "first" lets prompts go alone, decoding waits meanwhile.
    """

    step_tokens: int = 8192
    max_requests: int = 1024
    kv_tokens_per_device: tuple[int, ...] | None = None
    prefill: Literal["chunked", "first"] = "chunked"

    def __post_init__(self) -> None:
        if self.step_tokens < 1 or self.max_requests < 1:
            raise UsageError(
                f"step_tokens {self.step_tokens} and max_requests {self.max_requests} must be >= 1"
            )
        if self.max_requests > self.step_tokens:
            raise UsageError(
                f"max_requests {self.max_requests} is above step_tokens {self.step_tokens}: a step "
                "could not hold one token of each request"
            )
        if self.prefill not in ("chunked", "first"):
            raise UsageError(f"unknown prefill order {self.prefill!r}: chunked or first")


@dataclass(slots=True)
class Prefill:
    """A request whose prompt is being read (again, after its device was lost)."""

    request: int
    tokens: int             # to read in all
    outputs_left: int       # tokens it still has to write
    read: int = 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """Part of a prompt in a step."""

    prefill: Prefill
    start: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One step: pieces of prompts, and one token of each decoding request (0 where they wait)."""

    chunks: tuple[Chunk, ...]
    prefill_tokens: int
    decode_tokens: int

    @property
    def tokens(self) -> int:
        return self.prefill_tokens + self.decode_tokens


class RequestLog:
    """When each request was taken up, wrote its first token and its last. -1 = not yet."""

    def __init__(self, requests: int) -> None:
        self.start_ns = [-1] * requests
        self.first_token_ns = [-1] * requests
        self.finish_ns = [-1] * requests
        self.home = [-1] * requests
        self.retries = [0] * requests


class Lanes:
    """The requests in flight in one serving group, and the next batch they make."""

    def __init__(
        self, workload: Workload, limits: BatchLimits, num_devices: int, log: RequestLog
    ) -> None:
        self.limits, self.log = limits, log
        self.prompt, self.output = workload.prompt_tokens.tolist(), workload.output_tokens.tolist()
        self.kv_free_G, self.kv_capacity_G = None, limits.kv_tokens_per_device
        if limits.kv_tokens_per_device is not None:
            self.kv_free_G = list(limits.kv_tokens_per_device)
        self.requests_G = [0] * num_devices
        self.next_home = 0
        self.alive = list(range(num_devices))
        self.prefilling: deque[Prefill] = deque()
        self.decoding: list[tuple[int, int]] = []    # heap of (ends at counter, request)
        self.counter = 0

    @property
    def in_flight(self) -> int:
        return len(self.prefilling) + len(self.decoding)

    def next_batch(self, queue: deque[Prefill], now_ns: int) -> Batch | None:
        """Admit what fits from the shared queue, then fill the step; None when idle.

        First come, first served: a request that does not fit yet holds back those behind it.
        """
        while queue and self.in_flight < self.limits.max_requests:
            if not self._admit(queue[0], now_ns):
                break
            self.prefilling.append(queue.popleft())
        waiting = bool(self.prefilling) and self.limits.prefill == "first"
        decode_tokens = 0 if waiting else len(self.decoding)
        budget = self.limits.step_tokens - decode_tokens
        chunks = []
        for prefill in self.prefilling:
            tokens = min(budget, prefill.tokens - prefill.read)
            if tokens <= 0:
                break
            chunks.append(Chunk(prefill, prefill.read, tokens))
            budget -= tokens
        prefill_tokens = self.limits.step_tokens - decode_tokens - budget
        if not prefill_tokens and not decode_tokens:
            return None
        return Batch(tuple(chunks), prefill_tokens, decode_tokens)

    def complete(self, batch: Batch, now_ns: int) -> int:
        """The step's tokens exist now; returns how many requests ended."""
        ended = 0
        if batch.decode_tokens:
            self.counter += 1
            while self.decoding and self.decoding[0][0] <= self.counter:
                self._end(heapq.heappop(self.decoding)[1], now_ns)
                ended += 1
        for chunk in batch.chunks:
            prefill = chunk.prefill
            prefill.read += chunk.tokens
            if prefill.read < prefill.tokens:
                continue
            self.prefilling.popleft()
            request = prefill.request
            if self.log.first_token_ns[request] < 0:
                self.log.first_token_ns[request] = now_ns
            if prefill.outputs_left == 1:
                self._end(request, now_ns)
                ended += 1
            else:
                ends = self.counter + prefill.outputs_left - 1
                heapq.heappush(self.decoding, (ends, request))
        return ended

    def written(self) -> list[tuple[int, int]]:
        """(request, output tokens written so far) of decoding requests, by request."""
        return sorted(
            (request, self.output[request] - (ends - self.counter))
            for ends, request in self.decoding
        )

    def lose_devices(self, lost: Collection[int], queue: deque[Prefill]) -> int:
        """Requests at home on lost devices go back to the head of the queue, oldest first.

        They must read prompt and written tokens again. Returns how many were hit.
        """
        home = self.log.home
        hit = [Prefill(p.request, p.tokens, p.outputs_left) for p in self.prefilling
               if home[p.request] in lost]
        for request, written in self.written():
            if home[request] in lost:
                left = self.output[request] - written
                hit.append(Prefill(request, self.prompt[request] + written, left))
        hit_requests = {p.request for p in hit}
        self.prefilling = deque(p for p in self.prefilling if p.request not in hit_requests)
        self.decoding = [d for d in self.decoding if d[1] not in hit_requests]
        heapq.heapify(self.decoding)
        for prefill in sorted(hit, key=lambda p: -p.request):
            self._release(prefill.request)
            self.log.retries[prefill.request] += 1
            queue.appendleft(prefill)
        self.alive = [g for g in self.alive if g not in lost]
        return len(hit)

    def regain_devices(self, devices: Collection[int]) -> None:
        """Devices that serve again; they are empty."""
        self.alive = sorted({*self.alive, *devices})

    def set_kv_capacity(self, tokens_G: tuple[int, ...]) -> None:
        """Another plan leaves another capacity; a device over it admits no request."""
        if self.kv_free_G is not None and self.kv_capacity_G is not None:
            self.kv_free_G = [
                free + new - old
                for free, new, old in zip(self.kv_free_G, tokens_G, self.kv_capacity_G, strict=True)
            ]
            self.kv_capacity_G = tokens_G

    def _admit(self, prefill: Prefill, now_ns: int) -> bool:
        request = prefill.request
        need = self.prompt[request] + self.output[request]
        home = self._home(need)
        if home is None:
            return False
        self.requests_G[home] += 1
        if self.kv_free_G is not None:
            self.kv_free_G[home] -= need
        self.log.home[request] = home
        if self.log.start_ns[request] < 0:
            self.log.start_ns[request] = now_ns
        return True

    def _home(self, need: int) -> int | None:
        """The live device with the fewest requests with capacity left; ties go round in turn."""
        free, requests, devices = self.kv_free_G, self.requests_G, len(self.requests_G)
        fits = self.alive if free is None else [g for g in self.alive if free[g] >= need]
        if not fits:
            return None
        fewest = min(map(requests.__getitem__, fits))
        ties = [g for g in fits if requests[g] == fewest]
        home = min(ties, key=lambda g: (g - self.next_home) % devices)
        self.next_home = home + 1
        return home

    def _end(self, request: int, now_ns: int) -> None:
        self.log.finish_ns[request] = now_ns
        self._release(request)

    def _release(self, request: int) -> None:
        home = self.log.home[request]
        self.requests_G[home] -= 1
        if self.kv_free_G is not None:
            self.kv_free_G[home] += self.prompt[request] + self.output[request]


def require_fits(workload: Workload, limits: BatchLimits) -> None:
    """Raises InputError naming the first request no device's KV memory can ever hold."""
    if limits.kv_tokens_per_device is None:
        return
    room = max(limits.kv_tokens_per_device)
    need = workload.prompt_tokens + workload.output_tokens
    if int(need.max()) > room:
        request = int((need > room).argmax())
        raise InputError(
            f"request {request} needs KV memory for {int(need[request])} tokens (prompt + output), "
            f"the largest device holds {room}: use fewer expert slots, more memory, or shorter "
            "requests"
        )
