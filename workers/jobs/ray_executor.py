"""Work of lower floors spread over a Ray cluster: an executor with an ordered `map`.

Knows Ray tasks. Knows nothing of what the functions compute; they are module-level and picklable,
and their results do not depend on where they ran.
"""

from __future__ import annotations

import copy
import importlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..fleet.crossing import crossed
from ..fleet.ray_fleet import connect

# Ray declares few of its types.
ray: Any = importlib.import_module("ray")


class RayExecutor:
    """Runs items as Ray tasks, a bounded number at a time, results in the order of the items."""

    def __init__(
        self, address: str | None = None, *, cpus_per_task: float = 1.0, ahead: int | None = None
    ) -> None:
        """address: a cluster; None = the one joined, or a new one here. ahead: tasks in flight;
        None = twice the cluster's CPUs."""
        connect(address)
        cpus = ray.cluster_resources().get("CPU", 1.0)
        self._ahead = ahead or max(2, int(2 * cpus / max(cpus_per_task, 0.01)))
        self._cpus = cpus_per_task

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """Results one after another; an error in a task is raised where its result would come."""
        task: Any = ray.remote(_call).options(
            num_cpus=self._cpus,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}},
        )
        reference = ray.put(function)
        waiting: deque[Any] = deque()
        try:
            for item in items:
                waiting.append(task.remote(reference, item))
                if len(waiting) >= self._ahead:
                    yield _result(waiting.popleft())
            while waiting:
                yield _result(waiting.popleft())
        finally:
            for answer in waiting:
                ray.cancel(answer, force=False)


def _call(function: Callable[[Any], Any], item: Any) -> Any:
    """Ray hands arrays over read-only: another type to compiled code, which would be compiled
    once more in every worker. Arrays of a copy are as at home."""
    return function(copy.deepcopy(item))


def _result(answer: Any) -> Any:
    try:
        return ray.get(answer)
    except ray.exceptions.RayError as error:
        raise crossed(error, "a task on the cluster") from error
