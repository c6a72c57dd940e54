"""plan(): from a trace and a cluster to a plan with its evidence.

Knows how the parts fit: planning steps, methods, search, bounds, evidence. Every layer is a job of
its own and goes through an executor with an ordered `map`; the answer does not depend on which.
Methods in which layers depend on each other place all of them first; the jobs then only judge.
Knows nothing of Ray, files or printing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from ...errors import InfeasibleError, InputError, UsageError
from ...foundation.arrays import SlotArray
from ...foundation.parallel import Executor, LayerThreads
from ...foundation.version import VERSION
from ...traces.model_spec import ModelSpec
from ...traces.profile import Profile
from ...traces.steps import StepSampler
from ...traces.trace import RoutingTrace
from ..cluster import Cluster
from ..cost.evaluate import check_slots
from ..cost.lower_bounds import checked_gap
from ..cost.unplanned import unplanned_layers, unplanned_note
from ..dispatch.policies import policy_of
from ..dispatch.quotas import default_slack
from ..memory import limits_G, plan_bytes_G, require_slots_fit
from ..methods.baselines import LAYER_METHODS, require_capacity
from ..methods.whole_model import PlacedModel
from ..plan import DispatchSpec, Evidence, Plan, Provenance
from ..planning_traffic import MOST_STEPS, MOST_TIMED_STEPS, PlanningSteps, planning_steps
from ..search.known_candidates import complete, known_candidates
from ..search.layer_search import EFFORTS
from ..search.layer_task import LayerAnswer, LayerTask, answer_with, judged
from ..search.milp_refine import search_and_polish
from .evidence import Settings, evidence_of
from .known_plans import WHOLE_MODEL_METHODS, Progress, known_plans, place_model
from .layer_capacity import LayerCapacity, capacity_per_layer
from .linked_layers import layers_linked, linked, stacked

EMPTY: Mapping[str, SlotArray] = MappingProxyType({})
METHODS = (*LAYER_METHODS, *WHOLE_MODEL_METHODS, "auto")


@dataclass(frozen=True)
class PlanResult:
    """A plan, what it is worth, and what finding it took.

    moves and pays_back_after_steps are `rebalance`'s: (layer, device, expert) to send, in order,
    and after how many steps their cost is earned back (None: never, or nothing to gain).
    """

    plan: Plan
    evidence: Evidence
    seconds: float
    truncated: bool = False
    moves: tuple[tuple[int, int, int], ...] = ()
    pays_back_after_steps: float | None = None


def plan(
    trace: RoutingTrace | Profile,
    cluster: Cluster,
    *,
    method: str = "auto",
    objective: str | None = None,
    dispatch: str | DispatchSpec = "balanced",
    steps: StepSampler = StepSampler(),  # noqa: B008  (frozen)
    seed: int = 0,
    model: ModelSpec | None = None,
    current: Plan | None = None,
    effort: str = "normal",
    executor: Executor | None = None,
    time_limit_s: float | None = None,
    balance_slack: float | None = None,
    progress: Progress | None = None,
) -> PlanResult:
    """Decide which device holds which expert and replica, for the dispatch that will run.

    method: see METHODS. objective: "time" (default with a model of known sizes) or "balance":
    smallest per-step imbalance and, where the traffic mode makes transfers cost bytes, the fewest
    transfers among plans within balance_slack of it (by default what the dispatch may spend on it:
    0.02 where transfers to one destination are sent once, 0.002 where each is sent). current:
    the current plan, one more candidate. effort: "fast", "normal" or "thorough", a budget in
    units of work, so the same input and seed give the same plan byte for byte on any executor.
    time_limit_s: a time limit; when it fires the best so far is returned, `truncated`. Evidence
    holds a bound over all plans and the gap. Raises UsageError on an unknown option, InputError on
    a bad trace, InfeasibleError when the cluster cannot hold every expert.
    """
    started = time.perf_counter()
    settings = resolve_settings(
        cluster, method, objective, dispatch, model, balance_slack, seed, effort, time_limit_s
    )
    require_capacity(trace.num_experts, cluster.slots_G)
    fitting = require_slots_fit(cluster, model, current)
    data = planning_steps(trace, steps, most_steps=most_steps(settings))
    unplanned = check_model(settings, data)
    if current is not None:
        check_current(current, data, cluster)
    capacities = capacity_of_layers(data, settings)
    known = known_plans(data, settings) if method == "auto" else {}
    tasks = layer_tasks(data, settings, capacities, current, known)
    work: Callable[[LayerTask], LayerAnswer]
    placed: PlacedModel | None = None
    if method in WHOLE_MODEL_METHODS:
        placed = place_model(method, data, settings, progress)
        work, progress = Judge(method, placed.slots_LGC), None
    else:
        work = search_and_polish if method == "auto" else Baseline(method)
    answers = run_layers(work, tasks, data.num_layers, executor, progress)
    notes = (
        *fitting, *unplanned, *capacities.notes, *(() if placed is None else placed.notes),
    )
    if layers_linked(settings):
        again = list(layer_tasks(data, settings, capacities, current, known))
        others = other_answers(again, executor) if method == "auto" else []
        answers, more = linked(
            [answers, *others], data, settings, align=method == "auto" and not current
        )
        notes = (*notes, *more)
    evidence = evidence_of(answers, data, settings, notes)
    made = assemble(answers, data, settings, method, trace_digest(trace), evidence)
    truncated = any(a.truncated for a in answers) or (placed is not None and placed.truncated)
    return PlanResult(made, evidence, time.perf_counter() - started, truncated)


@dataclass(frozen=True)
class Judge:
    """Slots that are decided already, judged layer by layer, as a job."""

    method: str
    slots_LGC: SlotArray

    def __call__(self, task: LayerTask) -> LayerAnswer:
        judge = task.hurried()
        return answer_with(judge, judged(judge, self.method, self.slots_LGC[task.layer]))


@dataclass(frozen=True)
class Baseline:
    """A method that looks at loads alone, as a job (picklable, unlike a closure)."""

    method: str

    def __call__(self, task: LayerTask) -> LayerAnswer:
        slots_GC, judge = LAYER_METHODS[self.method](task.loads()), task.hurried()
        return answer_with(judge, judged(judge, self.method, slots_GC))


def other_answers(tasks: list[LayerTask], executor: Executor | None) -> list[list[LayerAnswer]]:
    """What whole plans of the other methods are worth, and the current one: for `auto`, where
    layers are linked. Under a time limit only the current one."""
    plans: dict[str, list[SlotArray]] = {}
    if tasks[0].deadline is None:
        for task in tasks:
            for name, slots_GC in known_candidates(task, task.loads()):
                plans.setdefault(name, []).append(slots_GC)
    if all(task.start_GC is not None for task in tasks):
        plans["current"] = [task.start_GC for task in tasks if task.start_GC is not None]
    found = []
    for name, slots_L in plans.items():
        if len(slots_L) == len(tasks) and all(
            task.fits(slots_GC) and complete(slots_GC, task.traffic.num_experts)
            for task, slots_GC in zip(tasks, slots_L, strict=True)
        ):
            judge = Judge(name, stacked(slots_L))
            found.append(run_layers(judge, tasks, len(tasks), executor, None))
    return found


def capacity_of_layers(
    data: PlanningSteps, settings: Settings, current: Plan | None = None
) -> LayerCapacity:
    """Slots and bytes of each layer; loads are counted only where memory may be the limit."""
    cluster, shape = settings.cluster, (data.num_layers, data.num_experts)
    load_LE = np.zeros(shape)
    if np.isfinite(limits_G(cluster, settings.model, current)).any():
        for layer in range(data.num_layers):
            load_LE[layer] = data.layer(layer).planning_WE().mean(axis=0)
    return capacity_per_layer(load_LE, cluster, settings.model, current)


def layer_tasks(
    data: PlanningSteps, settings: Settings, capacities: LayerCapacity,
    current: Plan | None = None, known: Mapping[str, SlotArray] = EMPTY,
) -> Iterator[LayerTask]:
    """One job per layer, made as they are asked for."""
    for layer in range(data.num_layers):
        yield LayerTask(
            layer=layer, layers=data.num_layers, traffic=data.layer(layer),
            slots_G=capacities.slots_LG[layer],
            capacity_G=None if capacities.capacity_LG is None else capacities.capacity_LG[layer],
            cluster=settings.cluster, dispatch=settings.dispatch, objective=settings.objective,
            model=settings.model, slack=settings.slack, seed=settings.seed,
            effort=settings.effort, deadline=settings.deadline,
            known=tuple((name, slots_LGC[layer]) for name, slots_LGC in known.items()),
            start_GC=None if current is None else current.slots[layer],
        )


def run_layers(
    work: Callable[[LayerTask], LayerAnswer],
    tasks: Iterable[LayerTask],
    layers: int,
    executor: Executor | None,
    progress: Progress | None,
) -> list[LayerAnswer]:
    """Answers in layer order; None = threads of this process, one per usable core."""
    answers: list[LayerAnswer] = []
    runner: Executor = LayerThreads() if executor is None else executor
    for answer in runner.map(work, tasks):
        answers.append(answer)
        if progress is not None:
            objective = "time" if answer.planning.time_us is not None else "balance"
            reached = float(np.mean([a.planning.objective(objective) for a in answers]))
            bound = float(np.mean([a.bound for a in answers]))
            progress(len(answers), layers, checked_gap(reached, bound, "plan")[1])
    return answers


def assemble(
    answers: list[LayerAnswer],
    data: PlanningSteps,
    settings: Settings,
    method: str,
    digest: str,
    evidence: Evidence,
) -> Plan:
    """The plan itself."""
    slots_LGC = stacked([a.slots_GC for a in answers])
    made = Plan(
        slots=slots_LGC,
        num_experts=data.num_experts,
        dispatch=settings.dispatch,
        layer_indices=data.layer_indices,
        model_digest="" if settings.model is None else settings.model.digest(),
        cluster_digest=settings.cluster.digest(),
        provenance=Provenance(
            method=method, seed=settings.seed, effort=settings.effort, trace_digest=digest,
            version=VERSION, notes=data.notes,
        ),
        evidence=evidence,
    )
    _check_memory(made, settings)
    return made


def _check_memory(made: Plan, settings: Settings) -> None:
    """Raises InfeasibleError where the experts of a device exceed its own memory."""
    model = settings.model
    if model is None or not model.knows_bytes:
        return
    held_G = plan_bytes_G(made, model)
    for g, device in enumerate(settings.cluster.devices):
        if device.expert_memory_bytes is not None and held_G[g] > device.expert_memory_bytes:
            raise InfeasibleError(
                f"{made.provenance.method} puts {held_G[g]:,} bytes of experts on device {g}, "
                f"whose expert_memory_bytes allow {device.expert_memory_bytes:,}: use auto or "
                "greedy, which keep to it"
            )


def trace_digest(source: RoutingTrace | Profile) -> str:
    """Fingerprint of what the plan was made from."""
    if isinstance(source, RoutingTrace):
        return source.digest()
    if source.sample is not None:
        return source.sample.digest()
    return ""


def resolve_settings(
    cluster: Cluster,
    method: str,
    objective: str | None,
    dispatch: str | DispatchSpec,
    model: ModelSpec | None,
    slack: float | None,
    seed: int,
    effort: str,
    time_limit_s: float | None,
) -> Settings:
    """Check every option once. Raises UsageError on one that means nothing."""
    spec = DispatchSpec(policy=dispatch) if isinstance(dispatch, str) else dispatch
    policy_of(spec)
    sized = model is not None and model.knows_sizes
    objective = objective or ("time" if sized else "balance")
    for what, value, known in (
        ("method", method, METHODS),
        ("objective", objective, ("balance", "time")),
        ("effort", effort, tuple(EFFORTS)),
    ):
        if value not in known:
            raise UsageError(f"unknown {what} {value!r}; there are: {', '.join(known)}")
    if objective == "time" and not sized:
        raise UsageError(
            "objective time needs the model's hidden and intermediate sizes: give --model, or use "
            "--objective balance"
        )
    slack = default_slack(cluster) if slack is None else slack
    if not 0.0 <= slack < 1.0:
        raise UsageError(f"balance_slack {slack} must lie in [0, 1)")
    if seed < 0:
        raise UsageError(f"seed {seed} must be at least 0")
    if time_limit_s is not None and not time_limit_s > 0:
        raise UsageError(f"time_limit_s {time_limit_s} must be above 0")
    deadline = None if time_limit_s is None else time.time() + time_limit_s
    return Settings(cluster, spec, objective, model, slack, seed, effort, deadline)


def most_steps(settings: Settings) -> int:
    """Steps to plan on at most, of the planning part, and of what is held back."""
    return MOST_TIMED_STEPS if settings.objective == "time" else MOST_STEPS


def check_model(settings: Settings, data: PlanningSteps) -> tuple[str, ...]:
    """A note on the model's layers that the trace lacks.

    Raises InputError where trace and model do not belong together, UsageError where loads shall
    tell time.
    """
    model = settings.model
    missing = unplanned_layers(model, data.layer_indices, data.num_experts, "the trace")
    if model is None:
        return ()
    timed = settings.objective == "time"
    if timed and data.trace is None:
        raise UsageError(
            "average loads cannot tell time per step: record a trace of tokens, or use objective "
            "balance"
        )
    return unplanned_note(missing, data.num_layers, timed=timed)


def check_current(current: Plan, data: PlanningSteps, cluster: Cluster) -> None:
    """Whether the current plan fits trace, cluster and its slots. Raises InputError."""
    shape = (current.num_layers, current.num_experts, current.num_devices)
    if shape != (data.num_layers, data.num_experts, cluster.num_devices):
        raise InputError(
            f"the current plan has {shape[0]} layers of {shape[1]} experts on {shape[2]} devices; "
            f"the trace and cluster have {data.num_layers} of {data.num_experts} on "
            f"{cluster.num_devices}"
        )
    check_slots(current, cluster, "the current plan")
