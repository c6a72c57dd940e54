"""Ranks as threads of this process: the same ranks, the same gloo exchange, no Ray.

For parity checks, tests and debugging. Knows how to run and lose ranks; nothing of their work.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from time import monotonic
from typing import Any

from ..protocol.settings import RankSettings
from ..rank.rank import Rank
from .fleet import OverdueError, RankLostError


class _RankThread:
    """A rank and the thread it lives in."""

    def __init__(self, settings: RankSettings) -> None:
        self.rank = Rank(settings)
        self.alive = True
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"rank-{settings.rank}")

    def call(self, method: str, *args: Any, **options: Any) -> Future[Any]:
        return self._thread.submit(self._run, method, args, options)

    def _run(self, method: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if not self.alive:
            raise RankLostError((self.rank.settings.rank,), "the rank was killed")
        return getattr(self.rank, method)(*args, **options)

    def die(self) -> None:
        """Fall silent; peers in an exchange notice as the connection closes."""
        self.alive = False
        self.rank.leave()
        self._thread.shutdown(wait=False)


class ThreadFleet:
    """One thread per rank. What `kill` ended stays dead until it is replaced."""

    def __init__(self) -> None:
        self._threads: list[_RankThread] = []

    @property
    def ranks(self) -> int:
        return len(self._threads)

    @property
    def pids(self) -> list[int]:
        return [os.getpid()] * self.ranks

    def start(self, settings: Sequence[RankSettings], timeout_s: float) -> None:
        self._threads = [_RankThread(one) for one in settings]

    def attach(self, timeout_s: float) -> list[Any]:
        return self.gather([self.call(g, "state") for g in range(self.ranks)], timeout_s)

    def hosts(self) -> list[str]:
        return ["127.0.0.1"] * self.ranks

    def call(self, rank: int, method: str, *args: Any, **options: Any) -> Future[Any]:
        thread = self._threads[rank]
        if not thread.alive:
            lost: Future[Any] = Future()
            lost.set_exception(RankLostError((rank,), f"rank {rank} was killed"))
            return lost
        return thread.call(method, *args, **options)

    def gather(self, answers: list[Any], timeout_s: float) -> list[Any]:
        deadline = monotonic() + timeout_s
        waiting = set(answers)
        while waiting:
            done, waiting = wait(
                waiting, timeout=max(0.0, deadline - monotonic()), return_when=FIRST_COMPLETED
            )
            if not done:
                raise OverdueError(f"no answer within {timeout_s:.1f} s")
            for answer in done:
                answer.result()
        return [answer.result() for answer in answers]

    def failures(self, answers: list[Any], timeout_s: float) -> list[Exception]:
        wait(answers, timeout=timeout_s)
        raised = [a.exception() for a in answers if a.done()]
        return [e for e in raised if isinstance(e, Exception)]

    def silent(self, timeout_s: float) -> dict[int, str]:
        dead = [g for g, thread in enumerate(self._threads) if not thread.alive]
        return dict.fromkeys(dead, "its thread was ended")

    def kill(self, rank: int) -> None:
        self._threads[rank].die()

    def replace(self, settings: RankSettings, timeout_s: float) -> None:
        self._threads[settings.rank] = _RankThread(settings)

    def add(self, settings: RankSettings, timeout_s: float) -> None:
        self._threads.append(_RankThread(settings))

    def keep(self, ranks: Sequence[int]) -> None:
        for g, thread in enumerate(self._threads):
            if g not in ranks:
                thread.die()
        self._threads = [self._threads[g] for g in ranks]

    def end(self) -> None:
        for thread in self._threads:
            thread.die()
        self._threads = []
