"""Many tasks at once, answers in order: what an executor is, and the one for one process.

Lower floors take an `Executor` and hand it tasks whose answers depend on the task alone, so where
they run changes nothing but the time. `LayerThreads` runs them in threads, for compiled loops that
release the GIL; the one over Ray lives with the workers. Knows nothing of the tasks.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol


def usable_cores() -> int:
    """Cores that this process may run on; 1 where the system does not say.

    NUMBA_NUM_THREADS, where set, is the limit: jobs that share a machine set it to 1.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    limit = os.environ.get("NUMBA_NUM_THREADS", "")
    return min(cores, max(1, int(limit))) if limit.isdigit() else cores


class Executor(Protocol):
    """Runs one function over many items."""

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterable[Any]:
        """Results in the order of the items; an error is raised where its result would come."""


class LayerThreads:
    """`map` with as many threads as cores this process may use, a few tasks ahead at most."""

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """Results in the order of the items; an error is raised where its result would come."""
        threads = usable_cores()
        if threads == 1:
            yield from map(function, items)
            return
        with ThreadPoolExecutor(threads) as pool:
            waiting: deque[Future[Any]] = deque()
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
