"""Several methods on the same traffic, one after another, within one limit of time.

A method that cannot place these experts on this cluster says why and does not stop the others.
Knows methods and limits. Knows nothing of judging what they found.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import InfeasibleError, UsageError
from ...foundation.parallel import Executor, LayerThreads
from ...traces.profile import Profile
from ...traces.trace import RoutingTrace
from ..cluster import Cluster
from ..methods.baselines import LAYER_METHODS
from ..plan import Plan
from ..planning.planner import METHODS, PlanResult, plan
from .rebalance import rebalance

USUAL_METHODS = ("auto", "eplb", "greedy", "contiguous")
REBALANCE = "rebalance"
LEAST_S = 1e-3               # what a method gets when the time is up: it answers with its start
QUICK_PIECES = 8             # methods that only pack get a like part of the time left, to judge by

MethodProgress = Callable[[str, int, int, float | None], None]   # method, done, of, gap so far
Source = RoutingTrace | Profile


@dataclass(frozen=True)
class Attempts:
    """What each method found, in the order asked; and why the others could not."""

    results: dict[str, PlanResult]
    cannot: dict[str, str]


def try_methods(
    source: Source,
    cluster: Cluster,
    methods: Sequence[str],
    *,
    time_limit_s: float | None = None,
    progress: MethodProgress | None = None,
    **options: Any,
) -> Attempts:
    """Plan by every method. Those that search share what the others, quickly judged, leave of the
    time.

    options go to `plan`. Raises UsageError on an unknown method, InfeasibleError where none can.
    """
    names = list(dict.fromkeys(methods))
    for name in names:
        if name not in METHODS:
            raise UsageError(f"unknown method {name!r}; there are: {', '.join(METHODS)}")
    if not names:
        raise UsageError("name at least one method")
    results: dict[str, PlanResult] = {}
    cannot: dict[str, str] = {}
    clock = TimeLimit.start(time_limit_s)
    searching = [name for name in names if name not in LAYER_METHODS]
    for name in [*(n for n in names if n in LAYER_METHODS), *searching]:
        sharing = len(searching) - searching.index(name) if name in searching else QUICK_PIECES
        try:
            results[name] = plan(
                source, cluster, method=name, time_limit_s=clock.share(sharing),
                progress=None if progress is None else _named(progress, name), **options,
            )
        except InfeasibleError as error:
            cannot[name] = str(error)
    if not results:
        raise InfeasibleError("; ".join(dict.fromkeys(cannot.values())))
    return Attempts(
        {n: results[n] for n in names if n in results}, {n: cannot[n] for n in names if n in cannot}
    )


def attempt(
    source: Source, cluster: Cluster, methods: Sequence[str], current: Plan | None,
    budget: tuple[int | None, int | None], **options: Any,
) -> Attempts:
    """Every method; or, within a budget of (moves, bytes), the one way that keeps to it."""
    if budget == (None, None):
        return try_methods(source, cluster, methods, current=current, **options)
    if current is None:
        raise UsageError(
            "a budget of moves counts them away from a plan: name the current one with --current"
        )
    return try_rebalance(
        current, source, cluster, max_moves=budget[0], max_bytes=budget[1], **options
    )


def try_rebalance(
    current: Plan,
    source: Source,
    cluster: Cluster,
    *,
    executor: Executor | None = None,
    progress: MethodProgress | None = None,
    **options: Any,
) -> Attempts:
    """The best plan within a budget of moves, as the only attempt. options go to `rebalance`."""
    watched: Executor | None = executor
    if progress is not None:
        watched = _Watched(executor or LayerThreads(), progress)
    found = rebalance(current, source, cluster, executor=watched, **options)
    return Attempts({REBALANCE: found}, {})


@dataclass(frozen=True)
class TimeLimit:
    """A limit that several pieces of work keep to together; None = none."""

    deadline: float | None

    @classmethod
    def start(cls, limit_s: float | None) -> TimeLimit:
        if limit_s is not None and not limit_s > 0:
            raise UsageError(f"time_limit_s {limit_s} must be above 0")
        return cls(None if limit_s is None else time.monotonic() + limit_s)

    def expired(self) -> bool:
        """Whether nothing is left."""
        return self.deadline is not None and time.monotonic() > self.deadline

    def part(self, share: float) -> float | None:
        """Seconds for a part of what is left."""
        left = self.share()
        return None if left is None else max(LEAST_S, share * left)

    def share(self, pieces: int = 1) -> float | None:
        """Seconds for the next of so many pieces that are still to do."""
        if self.deadline is None:
            return None
        return max(LEAST_S, (self.deadline - time.monotonic()) / pieces)


class _Watched:
    """An executor that says how many results have come, pass by pass."""

    def __init__(self, inner: Executor, progress: MethodProgress) -> None:
        self._inner, self._progress = inner, progress

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        work = list(items)
        for done, result in enumerate(self._inner.map(function, work), 1):
            self._progress(REBALANCE, done, len(work), None)
            yield result


def _named(progress: MethodProgress, method: str) -> Callable[[int, int, float], None]:
    return lambda done, layers, gap: progress(method, done, layers, gap)
