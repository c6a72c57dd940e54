"""What callers hand in to be done between two steps.

Two queues: what the next boundary does, and changes of plan or size, which wait for each other.
Knows futures. Knows nothing of what is done. Its owner's condition guards it, and the one thread
that serves calls `run`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from ...errors import LoadmasterError
from ..fleet.fleet import RankLostError
from ..protocol.step_messages import ExchangeError

Answer = TypeVar("Answer")
_Queue = deque[tuple[Callable[[], Any], Future[Any]]]


class Boundary:
    """Work that waits for the serving thread."""

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self._next: _Queue = deque()
        self._changes: _Queue = deque()

    @property
    def waiting(self) -> bool:
        """Whether anything was handed in."""
        return bool(self._next or self._changes)

    def hand_in(self, work: Callable[[], Answer]) -> Future[Answer]:
        """Have it done at the next boundary; what it returns comes in the future."""
        future: Future[Answer] = Future()

        def answer() -> None:
            future.set_result(work())

        self._put(self._next, answer, future)
        return future

    def hand_in_change(self, work: Callable[[], None], future: Future[Any]) -> None:
        """Have it begun once no other change is under way; it answers the future itself."""
        self._put(self._changes, work, future)

    def run(self, changing: Callable[[], bool]) -> None:
        """Do what was handed in so far, then begin changes while none is under way.

        A caller gets the error of its own work; a lost rank is everybody's, and raised here too.
        """
        with self._changed:
            batch = list(self._next)
            self._next.clear()
        for number, (work, future) in enumerate(batch):
            try:
                _settle(work, future)
            except Exception:
                with self._changed:      # the others' turn comes after the recovery
                    self._next.extendleft(reversed(batch[number + 1 :]))
                raise
        while self._changes and not changing():
            with self._changed:
                work, future = self._changes.popleft()
            _settle(work, future)

    def fail(self, reason: str) -> None:
        """Nothing more will be done: tell everybody who waits."""
        with self._changed:
            for queue in (self._next, self._changes):
                while queue:
                    queue.popleft()[1].set_exception(LoadmasterError(reason))

    def _put(self, queue: _Queue, work: Callable[[], None], future: Future[Any]) -> None:
        with self._changed:
            queue.append((work, future))
            self._changed.notify_all()


def _settle(work: Callable[[], None], future: Future[Any]) -> None:
    try:
        work()
    except Exception as error:
        future.set_exception(error)
        if isinstance(error, RankLostError | ExchangeError):
            raise
