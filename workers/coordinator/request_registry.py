"""The request registry: numbers, what callers may see of each, and waiting for changes.

Knows requests and their domains. Knows nothing of ranks, steps or Ray. Safe for many threads: all
state is behind one condition, which its owner shares.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import LoadmasterError
from ..protocol.step_messages import ReplayedRouting, StepResult
from .scheduler import Request, check_prompt


class UnknownRequestError(LoadmasterError):
    """No such request: never taken, forgotten, or taken by a coordinator that has died since."""


@dataclass(frozen=True)
class RequestState:
    """What a caller sees of a request. `tokens` are those from position `since` on."""

    number: int
    tokens: tuple[int, ...]
    since: int
    done: bool
    error: str
    digest: str
    retries: int


class RequestBook:
    """Requests by number. `first_number` differs between coordinators of one group, so that a
    number given out by one that died is never mistaken for another's."""

    def __init__(self, changed: threading.Condition, first_number: int = 0) -> None:
        self._changed = changed
        self._requests: dict[int, Request] = {}
        self._next = first_number
        self._logits: dict[int, list[Any]] = {}
        self._own_ids: dict[int, list[Any]] = {}
        self.domain_names: list[str] = []
        self.vocabulary = 0
        self.context_tokens = 0

    def take(
        self,
        prompts: Sequence[Any],
        max_new_tokens: int,
        domains: Sequence[str] | None,
        stop_tokens: Sequence[int],
        replays: Sequence[ReplayedRouting] | None,
    ) -> list[Request]:
        """Number requests. Raises InputError, and takes none, when one cannot be served."""
        checked = [
            check_prompt(p, max_new_tokens, self.vocabulary, self.context_tokens) for p in prompts
        ]
        taken = []
        for i, prompt in enumerate(checked):
            domain = -1 if domains is None else self._domain(domains[i])
            request = Request(self._next, prompt, max_new_tokens, domain, frozenset(stop_tokens))
            request.replay = None if replays is None else replays[i]
            self._requests[request.number] = request
            self._next += 1
            taken.append(request)
        return taken

    def wait(self, since: dict[int, int], timeout_s: float) -> list[RequestState]:
        """Waits until one has tokens past `since[number]` or is done, or until time is up."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                states = [self._state(n, at) for n, at in since.items()]
                left = deadline - time.monotonic()
                if any(s.done or s.tokens for s in states) or left <= 0:
                    return states
                self._changed.wait(left)

    def wait_all(self, numbers: Sequence[int], timeout_s: float) -> list[RequestState]:
        """The states of these requests once all are done, or when time is up."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not all(self._state(n, 0).done for n in numbers):
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            return [self._state(n, 0) for n in numbers]

    def forget(self, number: int) -> bool:
        """Drop a request; whether it was still running."""
        request = self._requests.pop(number, None)
        self._logits.pop(number, None)
        self._own_ids.pop(number, None)
        return request is not None and not request.done

    def keep_outputs(self, results: list[StepResult]) -> None:
        """Collect logits and own routing where a step answered with them."""
        for result in results:
            for number, logits in result.logits.items():
                self._logits.setdefault(number, []).append(logits)
            for number, ids in result.own_ids.items():
                self._own_ids.setdefault(number, []).append(ids)

    def logits(self, number: int) -> tuple[Any, Any]:
        """(logits [rows, V], the router's own choice [L, rows, K] or None)."""
        with self._changed:
            own = self._own_ids.get(number)
            logits = np.concatenate(self._logits[number])
            return logits, None if own is None else np.concatenate(own, axis=1)

    def _domain(self, name: str) -> int:
        if name not in self.domain_names:
            self.domain_names.append(name)
        return self.domain_names.index(name)

    def _state(self, number: int, since: int) -> RequestState:
        if number not in self._requests:
            raise UnknownRequestError(
                f"no request {number}: it was never taken, or has been forgotten"
            )
        request = self._requests[number]
        return RequestState(
            number, tuple(request.produced[since:]), since, request.done, request.error,
            request.digest, request.retries,
        )
