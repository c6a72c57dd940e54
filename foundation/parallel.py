"""An executor for one process: layers in threads, answers in order.

The compiled searches release the GIL, so threads use every core they may. Each layer's answer
depends on its task alone, so the number of threads changes nothing but the time.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


def usable_cores() -> int:
    """Cores that this process may run on; 1 where the system does not say.

    NUMBA_NUM_THREADS, where set, is the limit: jobs that share a machine set it to 1.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    limit = os.environ.get("NUMBA_NUM_THREADS", "")
    return min(cores, max(1, int(limit))) if limit.isdigit() else cores


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
