"""Replay with a clock: a recorded run's own steps under any plans, side by side.

The same steps in the same order for every plan, so differences are paired; bands and verdict are
`placement.comparison`'s. A request begins with the first step that holds one of its tokens and ends
with the last; with arrival times it begins when it arrives, and a step waits until all its requests
are there. Knows traces, plans and step times. Knows nothing of admission or KV memory: what ran
together in the recording runs together here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import InputError, UsageError
from ...foundation.arrays import FloatArray, IntArray
from ...placement.cluster import Cluster
from ...placement.comparison.compare import Comparison, compare
from ...placement.cost.evaluate import resolve_dispatch
from ...placement.cost.overlap import Overlap
from ...placement.cost.step_loads import StepLoads
from ...placement.plan import DispatchSpec, Plan
from ...traces.arrivals import Arrivals
from ...traces.model_spec import ModelSpec
from ...traces.steps import Steps, StepSampler
from ...traces.trace import RoutingTrace
from ..pricing.attribution import OTHER_DISPATCHES, Blame, Usage, WaitSplit, split_wait
from ..pricing.step_composition import Composition
from ..pricing.step_router import Condition, StepRouter
from .result import Distribution

# Steps priced together: enough to amortise a call, few enough to stay in the processor's cache.
MOST_STEPS_AT_ONCE, CELLS_AT_ONCE = 64, 2**18


@dataclass(frozen=True, eq=False)
class ReplayedPlan:
    """One plan's clock. `request_latency_us` [R] in the order of `Replay.request`."""

    step_us: FloatArray             # [W]
    step_end_us: FloatArray         # [W]
    request_latency_us: FloatArray  # [R]
    latency: Distribution
    step_time: Distribution
    blame: Blame
    notes: tuple[str, ...]

    @property
    def total_us(self) -> float:
        """When the last step ended."""
        return float(self.step_end_us[-1])


@dataclass(frozen=True, eq=False)
class Replay:
    """All plans over the same steps; `comparison` holds the paired bands and the verdict."""

    plans: dict[str, ReplayedPlan]
    comparison: Comparison
    request: IntArray               # [R] request ids of the trace
    steps: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """One row per plan."""
        return {
            "steps": self.steps,
            "requests": len(self.request),
            "notes": list(self.notes),
            "comparison": self.comparison.to_dict(),
            "plans": {
                name: {
                    "total_us": p.total_us, "step_us": vars(p.step_time),
                    "latency_us": vars(p.latency), "blame": p.blame.to_dict(),
                    "notes": list(p.notes),
                }
                for name, p in self.plans.items()
            },
        }


def replay(
    plans: Mapping[str, Plan],
    trace: RoutingTrace,
    cluster: Cluster,
    *,
    model: ModelSpec,
    steps: StepSampler | None = None,
    dispatch: str | DispatchSpec | None = None,
    overlap: Overlap | None = None,
    arrival_us: Mapping[int, float] | None = None,
    max_steps: int | None = None,
    current: str | None = None,
    seed: int = 0,
) -> Replay:
    """Play a trace's steps under each plan.

    steps None: the recorded steps where the trace has them, else the default sampler.
    arrival_us: request id -> time it arrived, for every request in the steps; None = no waiting.
    current: the active plan, which the verdict compares with; None = the first. seed: of the bands.
    Raises UsageError without plans, InputError when something does not fit together.
    """
    if not plans:
        raise UsageError("name at least one plan to replay")
    sampler = steps or StepSampler(order="recorded" if trace.step is not None else "interleaved")
    cut = sampler.sample(trace, max_steps)
    routers = {
        name: StepRouter(
            trace, cluster, model, overlap=overlap,
            dispatch=None if dispatch is None else resolve_dispatch(dispatch, plan),
        )
        for name, plan in plans.items()
    }
    for name, plan in plans.items():
        routers[name].check(plan)
    home_T = trace.home_rank_T(cluster.num_devices).astype(np.int64)
    compositions = [
        Composition(tokens, home_T[tokens]) for tokens in map(cut.tokens_of, range(len(cut)))
    ]
    request, first_R, last_R = _spans(trace, cut)
    arrival_R = None if arrival_us is None else _arrivals(request, arrival_us)
    ready_W = np.zeros(len(cut))
    if arrival_R is not None:
        np.maximum.at(ready_W, first_R, arrival_R)
    played = {
        name: _play(routers[name], plan, compositions, ready_W, first_R, last_R, arrival_R)
        for name, plan in plans.items()
    }
    comparison = compare(
        dict(plans), trace, cluster, steps=sampler, dispatch=dispatch, model=model, seed=seed,
        current=current, max_steps=max_steps, overlap=overlap,
    )
    return Replay(played, comparison, request, len(cut), cut.notes)


def arrivals_of(trace: RoutingTrace, arrivals: Arrivals) -> dict[int, float]:
    """Request id -> when it arrives: the n-th arrival is the trace's n-th request id, rising.

    Arrivals beyond the trace's requests are left over. Raises InputError where there are too few.
    """
    request = np.unique(trace.request_T())
    if len(arrivals) < len(request):
        raise InputError(
            f"{arrivals.source or 'arrivals'}: {len(arrivals)} arrivals for the trace's "
            f"{len(request)} requests: each request needs one"
        )
    return dict(zip(request.tolist(), map(float, arrivals.time_us), strict=False))


def _play(
    router: StepRouter,
    plan: Plan,
    compositions: list[Composition],
    ready_W: FloatArray,
    first_R: IntArray,
    last_R: IntArray,
    arrival_R: FloatArray | None,
) -> ReplayedPlan:
    condition = Condition(plan)
    step_W, usage = cost_all(router, condition, compositions)
    end_W = np.empty(len(step_W))
    clock = 0.0
    for w, (ready, duration) in enumerate(zip(ready_W.tolist(), step_W.tolist(), strict=True)):
        clock = max(clock, ready) + duration
        end_W[w] = clock
    begin_R = (end_W - step_W)[first_R] if arrival_R is None else arrival_R
    latency_R = end_W[last_R] - begin_R
    latency, step_time = Distribution.of(latency_R), Distribution.of(step_W)
    assert latency and step_time
    return ReplayedPlan(
        step_W, end_W, latency_R, latency, step_time,
        usage.blame(_wait_split(router, compositions, condition)), tuple(usage.notes),
    )


def cost_all(
    router: StepRouter, condition: Condition, compositions: Iterable[Composition]
) -> tuple[FloatArray, Usage]:
    """([W] microseconds of each step, the account of all of them), a few steps at a time."""
    layers, devices = router.model.num_layers, router.cluster.num_devices
    usage = Usage(layers, devices)
    at_once = min(MOST_STEPS_AT_ONCE, max(1, CELLS_AT_ONCE // (layers * devices)))
    if at_once > 1:
        at_once -= at_once % 2      # of two threads none is left with one step more
    spec = router.dispatch or condition.plan.dispatch
    step_us: list[FloatArray] = []
    for loads in _loads_ahead(router, condition.plan, compositions, at_once):
        routed = router.price(loads, condition, spec)
        usage.add(routed, np.ones(len(routed.step_us)))
        step_us.append(routed.step_us)
    return np.concatenate(step_us), usage


def _loads_ahead(
    router: StepRouter, plan: Plan, compositions: Iterable[Composition], at_once: int
) -> Iterator[StepLoads]:
    """Loads of `at_once` steps after another; in a thread more than the router's, the next are
    counted while the caller has these."""
    waiting = iter(compositions)
    counter = ThreadPoolExecutor(1)
    try:
        counted: Future[StepLoads] | None = None
        while steps := list(itertools.islice(waiting, at_once)):
            following = counter.submit(router.loads, steps, plan)
            if counted is not None:
                yield counted.result()
            counted = following
        if counted is not None:
            yield counted.result()
    finally:
        counter.shutdown(wait=False, cancel_futures=True)


def _wait_split(
    router: StepRouter, compositions: list[Composition], condition: Condition
) -> WaitSplit:
    """Judged on up to 48 steps spread over the run."""
    at = np.unique(np.linspace(0, len(compositions) - 1, 48).astype(np.int64))
    judged = [compositions[w] for w in at]
    actual = router.cost(judged, condition)
    others = [
        router.cost(judged, condition, DispatchSpec(policy=name)) for name in OTHER_DISPATCHES
    ]
    return split_wait(actual, others, np.ones(len(judged)))


def _spans(trace: RoutingTrace, cut: Steps) -> tuple[IntArray, IntArray, IntArray]:
    """(request ids [R], first step [R], last step [R])."""
    request_A = trace.request_T()[cut.token]
    step_A = cut.step_of_token()
    request, first_at = np.unique(request_A, return_index=True)
    _, last_at = np.unique(request_A[::-1], return_index=True)
    return request, step_A[first_at], step_A[len(step_A) - 1 - last_at]


def _arrivals(request: IntArray, arrival_us: Mapping[int, float]) -> FloatArray:
    """[R] when each request arrived."""
    missing = [r for r in request.tolist() if r not in arrival_us]
    if missing:
        raise InputError(f"arrival_us has no time for request {missing[0]} of the trace")
    times = np.array([arrival_us[r] for r in request.tolist()], np.float64)
    if not np.isfinite(times).all() or (times < 0).any():
        raise InputError("arrival_us must be finite and >= 0")
    return times
