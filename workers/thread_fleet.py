"""Ranks as threads of this process: the same ranks, the same gloo exchange, no Ray.

For parity checks, tests and debugging. Knows how to run and lose ranks; nothing of their work.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from time import monotonic
from typing import Any

from .fleet import RankLostError
from .rank import Rank
from .settings import RankSettings


class ThreadFleet:
    """One thread per rank. A rank that was lost stays lost until it is replaced."""

    def __init__(self) -> None:
        self._threads: list[ThreadPoolExecutor] = []
        self.rank_objects: list[Rank] = []

    @property
    def ranks(self) -> int:
        return len(self.rank_objects)

    @property
    def pids(self) -> list[int]:
        return [os.getpid()] * self.ranks

    def start(self, settings: Sequence[RankSettings], timeout_s: float) -> None:
        """Start one rank per setting."""
        self.rank_objects = [Rank(one) for one in settings]
        self._threads = [
            ThreadPoolExecutor(1, thread_name_prefix=f"rank-{one.rank}") for one in settings
        ]

    def hosts(self) -> list[str]:
        return ["127.0.0.1"] * self.ranks

    def call(self, rank: int, method: str, *args: Any, **options: Any) -> Future[Any]:
        """Start a method of one rank in its thread."""
        function = getattr(self.rank_objects[rank], method)
        return self._threads[rank].submit(function, *args, **options)

    def call_all(self, method: str, *args: Any) -> list[Future[Any]]:
        """Start a method of every rank."""
        return [self.call(g, method, *args) for g in range(self.ranks)]

    def gather(self, answers: list[Any], timeout_s: float) -> list[Any]:
        """All answers; the first failure is raised at once."""
        deadline = monotonic() + timeout_s
        waiting = set(answers)
        while waiting:
            done, waiting = wait(
                waiting, timeout=max(0.0, deadline - monotonic()), return_when=FIRST_COMPLETED
            )
            if not done:
                raise RankLostError((), f"no answer within {timeout_s:.1f} s")
            for answer in done:
                answer.result()
        return [answer.result() for answer in answers]

    def end(self) -> None:
        """Leave the group; the threads end with what they run."""
        for rank in self.rank_objects:
            rank.leave()
        for thread in self._threads:
            thread.shutdown(wait=False)
        self.rank_objects, self._threads = [], []
