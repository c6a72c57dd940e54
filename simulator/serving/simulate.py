"""simulate(): serve a workload of arrivals under a plan and say what users and devices saw.

Wires workload, trace, cost model and serving loop together. Knows nothing of how plans are made or
of live workers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from ...errors import UsageError
from ...placement.cluster import Cluster
from ...placement.cost.evaluate import resolve_dispatch
from ...placement.cost.overlap import Overlap
from ...placement.memory import memory_notes
from ...placement.plan import DispatchSpec, Plan
from ...traces.model_spec import ModelSpec
from ...traces.trace import RoutingTrace
from ..pricing.attribution import OTHER_DISPATCHES, Blame, Usage, split_wait
from ..pricing.memory import MemorySpec
from ..pricing.step_composition import Composition
from ..pricing.step_router import Condition, StepRouter
from .active_state import ActiveState
from .batching import BatchLimits
from .event_loop import ServingLoop
from .every_step import EveryStep
from .result import Distribution, Event, SimulationResult, Slo, StepTimes, request_times
from .step_time_bank import BankSpec, StepBank
from .token_source import TokenSource
from .workload import ArrivalsLike, Workload, as_workload

Routing = Literal["bank", "every_step"]


@dataclass(frozen=True)
class Serving:
    """How the service runs, apart from the plan.

    limits: what a step holds. memory: bytes of all but the experts, for KV admission; None = KV
    memory is never the limit. groups: equal sets of devices behind one queue. other_us_per_token:
    attention and dense layers, per token of a device, in addition to the model's `other_time_us`.
    """

    limits: BatchLimits = field(default_factory=BatchLimits)
    memory: MemorySpec | None = None
    groups: int = 1
    overlap: Overlap | None = None
    other_us_per_token: float = 0.0

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise UsageError(f"groups {self.groups} must be at least 1")
        if not (np.isfinite(self.other_us_per_token) and self.other_us_per_token >= 0):
            raise UsageError(f"other_us_per_token {self.other_us_per_token} must be >= 0")


class Run:
    """A simulation under way: what plan switches and faults act on."""

    def __init__(
        self, loop: ServingLoop, active: ActiveState, router: StepRouter, source: TokenSource,
        timer: StepBank | EveryStep, seed: int,
    ) -> None:
        self.loop, self.active, self.router, self.seed = loop, active, router, seed
        self.source, self.timer = source, timer
        self.events: list[Event] = []
        self.moved_bytes = 0
        self.notes: list[str] = []

    def switch_plan(self, group: int, plan: Plan) -> None:
        """Put a active plan, with the KV memory it leaves; raises as `ActiveState.switch_plan`."""
        self.active.switch_plan(group, plan)
        serving = self.loop.groups[group]
        serving.epoch += 1
        room_G = self.active.kv_capacity_G(self.active.of(group).plan)
        if room_G is not None:
            serving.lanes.set_kv_capacity(room_G)

    def log(self, kind: str, detail: str, pause_ns: int = 0) -> None:
        """Note something that happened now."""
        self.events.append(Event(self.loop.env.now / 1e3, kind, detail, pause_ns / 1e3))


class Intervention(Protocol):
    """Something that acts on a run: a plan switch, a fault, a policy."""

    def start(self, run: Run) -> None: ...


def simulate(
    plan: Plan,
    workload: Workload | ArrivalsLike,
    cluster: Cluster,
    *,
    trace: RoutingTrace,
    model: ModelSpec,
    dispatch: str | DispatchSpec | None = None,
    serving: Serving | None = None,
    slo: Slo | None = None,
    routing: Routing = "bank",
    bank: BankSpec | None = None,
    interventions: Sequence[Intervention] = (),
    seed: int = 0,
) -> SimulationResult:
    """Serve the workload to its last token.

    Every step's routing is sampled from `trace` by domain, dispatched by `dispatch` (None = the
    plan's own; the name of its own policy keeps its parameters) and priced by `step_cost`.
    routing="bank" draws steps of each size from ones routed beforehand; "every_step" routes each
    (exact, slow). The same seed gives the same requests, routing and faults under every plan, so
    results of several plans are paired.
    Raises InputError or InfeasibleError naming what does not fit together.
    """
    requests, serving = as_workload(workload), serving or Serving()
    spec = None if dispatch is None else resolve_dispatch(dispatch, plan)
    router = StepRouter(trace, cluster, model, dispatch=spec, overlap=serving.overlap)
    active = ActiveState(
        router, plan, groups=serving.groups, seed=seed, memory=serving.memory
    )
    source = TokenSource(trace, requests, seed=seed)
    timer: StepBank | EveryStep
    if routing == "every_step":
        timer = EveryStep(router, source, active, other_us_per_token=serving.other_us_per_token)
    elif routing == "bank":
        timer = StepBank(
            router, source, requests, active, largest=serving.limits.step_tokens, seed=seed,
            spec=bank or BankSpec(), other_us_per_token=serving.other_us_per_token,
        )
    else:
        raise UsageError(f"unknown routing {routing!r}: bank or every_step")
    limits = serving.limits
    if (room_G := active.kv_capacity_G(plan)) is not None:
        limits = dataclasses.replace(limits, kv_tokens_per_device=room_G)
    loop = ServingLoop(
        requests, timer, limits, num_devices=cluster.num_devices, groups=serving.groups
    )
    run = Run(loop, active, router, source, timer, seed)
    run.notes.extend((*source.notes, *memory_notes(plan, cluster, model)))
    for intervention in interventions:
        intervention.start(run)
    loop.run()
    return _result(run, timer, slo)


def _result(run: Run, timer: StepBank | EveryStep, slo: Slo | None) -> SimulationResult:
    loop = run.loop
    requests = request_times(loop.workload, loop.requests)
    duration_us = float(requests.finish_ns.max()) / 1e3
    steps = _step_times(run)
    usage, kept, condition = timer.account()
    several = requests.output_tokens > 1
    wait, ttft, latency, step_time = (
        Distribution.of(values)
        for values in (requests.wait_us, requests.ttft_us, requests.latency_us,
                       steps.duration_ns / 1e3)
    )
    assert wait and ttft and latency and step_time
    served_us = duration_us * len(loop.groups)
    return SimulationResult(
        requests=requests, steps=steps, duration_us=duration_us, ttft=ttft, latency=latency,
        wait=wait, tpot=Distribution.of(requests.tpot_us) if several.any() else None,
        step_time=step_time,
        device_busy_G=usage.compute_us_LG.sum(axis=0) / served_us,
        port_busy_PG=usage.port_us_PG / served_us,
        blame=_blame(run, usage, kept, condition),
        goodput_requests_per_s=(
            float(requests.good_R(slo).sum()) / (duration_us / 1e6) if slo else None
        ),
        slo=slo, events=tuple(run.events),
        paused_us=sum(g.paused_ns for g in loop.groups) / 1e3,
        lost_steps=sum(g.lost_steps for g in loop.groups),
        moved_bytes=run.moved_bytes, seed=run.seed, notes=(*run.notes, *usage.notes),
        first_steps=tuple(timer.first_steps()),
    )


def _step_times(run: Run) -> StepTimes:
    log = run.loop.steps
    columns = [
        np.array(c, np.int64)
        for c in (log.start_ns, log.duration_ns, log.prefill_tokens, log.decode_tokens, log.group,
                  log.epoch)
    ]
    return StepTimes(*columns)


def _blame(run: Run, usage: Usage, kept: list[Composition], condition: Condition) -> Blame:
    """The account of all steps, its waits split between placement and dispatch."""
    if not kept:
        return usage.blame(None)
    actual = run.router.cost(kept, condition)
    others = [
        run.router.cost(kept, condition, DispatchSpec(policy=name)) for name in OTHER_DISPATCHES
    ]
    return usage.blame(split_wait(actual, others, np.ones(len(kept))))
