"""plan(): from a trace and a cluster to a plan with its evidence.

Knows how the parts fit: planning steps, methods, search, bounds, evidence. Every layer is a job of
its own and goes through an executor with an ordered `map`; the answer does not depend on which.
Knows nothing of Ray, files or printing.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..errors import UsageError
from ..traces.spec import ModelSpec
from ..traces.steps import StepSampler
from ..traces.trace import RoutingTrace
from .bounds import checked_gap
from .cluster import Cluster
from .dispatch_policies import POLICIES
from .judge import HOME_BLIND
from .methods import (
    LayerLoads,
    SlotArray,
    anticorrelation,
    contiguous,
    eplb_global,
    eplb_hierarchical,
    greedy,
    lpt_swap,
    require_room,
    round_robin,
)
from .plan import DispatchSpec, Evidence, LayerEvidence, Plan, Provenance
from .planning_steps import PlanningSteps, steps_of_trace
from .search import EFFORTS, LayerAnswer, LayerTask, judge_layer, search_layer

LAYER_METHODS: dict[str, Callable[[LayerLoads], SlotArray]] = {
    "contiguous": contiguous,
    "round_robin": round_robin,
    "eplb": eplb_global,
    "eplb_hierarchical": eplb_hierarchical,
    "greedy": greedy,
    "anticorrelation": anticorrelation,
    "lpt_swap": lpt_swap,
}
METHODS = (*LAYER_METHODS, "auto")

Progress = Callable[[int, int, float], None]     # layers done, layers, gap so far


class Executor(Protocol):
    """Runs one function over many items and keeps their order."""

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterable[Any]: ...


@dataclass(frozen=True)
class PlanResult:
    """A plan, what it is worth, and what finding it took."""

    plan: Plan
    evidence: Evidence
    seconds: float
    truncated: bool = False


def plan(
    trace: RoutingTrace,
    cluster: Cluster,
    *,
    method: str = "auto",
    objective: str | None = None,
    dispatch: str | DispatchSpec = "balanced",
    steps: StepSampler | None = None,
    seed: int = 0,
    model: ModelSpec | None = None,
    effort: str = "normal",
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> PlanResult:
    """Decide which device holds which expert and replica, for the dispatch that will run.

    method: see METHODS. effort: "fast", "normal" or "thorough", a budget in units of work, so the
    same input and seed give the same plan byte for byte on any executor.
    Raises UsageError on an unknown option, InputError on a bad trace, InfeasibleError when the
    cluster cannot hold every expert.
    """
    started = time.perf_counter()
    spec = DispatchSpec(policy=dispatch) if isinstance(dispatch, str) else dispatch
    objective = objective or "balance"
    _check_options(method, objective, spec, effort)
    require_room(trace.num_experts, cluster.slots_G)
    data = steps_of_trace(trace, steps or StepSampler())
    work = search_layer if method == "auto" else _Baseline(method)
    tasks = [
        layer_task(data, layer, cluster, spec, seed=seed, effort=effort, model=model)
        for layer in range(data.num_layers)
    ]
    answers = _run(work, tasks, executor, progress)
    slots = np.stack([a.slots_GC for a in answers])
    evidence = _evidence(objective, answers, data)
    made = Plan(
        slots=slots,
        num_experts=trace.num_experts,
        dispatch=spec,
        layer_indices=trace.layer_indices,
        model_digest="" if model is None else model.digest(),
        cluster_digest=cluster.digest(),
        provenance=Provenance(
            method=method, seed=seed, effort=effort, trace_digest=trace.digest(),
            notes=data.notes,
        ),
        evidence=evidence,
    )
    return PlanResult(made, evidence, time.perf_counter() - started)


@dataclass(frozen=True)
class _Baseline:
    """A method that looks at loads alone, as a job (picklable, unlike a closure)."""

    method: str

    def __call__(self, task: LayerTask) -> LayerAnswer:
        return judge_layer(task, self.method, LAYER_METHODS[self.method](task.loads))


def layer_task(
    data: PlanningSteps,
    layer: int,
    cluster: Cluster,
    dispatch: DispatchSpec,
    *,
    seed: int,
    effort: str,
    model: ModelSpec | None,
) -> LayerTask:
    """Everything one layer's job needs."""
    loads = LayerLoads(
        load_WE=data.planning_WE(layer),
        slots_G=cluster.slots_G,
        speed_G=cluster.speed_G,
        nodes=cluster.num_nodes,
        expert_groups=1 if model is None else model.num_expert_groups,
    )
    planning = validation = None
    if data.trace is not None:
        if dispatch.policy in HOME_BLIND:
            planning = loads.load_WE.astype(np.int32)[:, None]
            check = data.validation_WE(layer)
            validation = None if check is None else check.astype(np.int32)[:, None]
        else:
            planning = data.planning_WGE(layer, cluster.num_devices)
            validation = data.validation_WGE(layer, cluster.num_devices)
    return LayerTask(layer, loads, planning, validation, cluster, dispatch, seed, effort)


def _run(
    work: Callable[[LayerTask], LayerAnswer],
    tasks: list[LayerTask],
    executor: Executor | None,
    progress: Progress | None,
) -> list[LayerAnswer]:
    answers: list[LayerAnswer] = []
    results = map(work, tasks) if executor is None else executor.map(work, tasks)
    for answer in results:
        answers.append(answer)
        if progress is not None:
            reached = float(np.mean([a.objective for a in answers]))
            bound = float(np.mean([a.bound for a in answers]))
            progress(len(answers), len(tasks), checked_gap(reached, bound, "plan")[1])
    return answers


def _evidence(objective: str, answers: list[LayerAnswer], data: PlanningSteps) -> Evidence:
    layers = []
    for answer in answers:
        bound, _ = checked_gap(answer.objective, answer.bound, f"layer {answer.layer}")
        copies = int((answer.slots_GC >= 0).sum()) - data.num_experts
        layers.append(
            LayerEvidence(
                objective=answer.objective, bound=bound, imbalance_mean=answer.objective,
                replicas=copies,
            )
        )
    reached = float(np.mean([x.objective for x in layers]))
    bound, gap = checked_gap(reached, float(np.mean([x.bound for x in layers])), "plan")
    checks = [a.validation for a in answers if a.validation is not None]
    return Evidence(
        objective_name=objective, objective=reached, bound=bound, gap=gap,
        validation=float(np.mean(checks)) if checks else None, layers=tuple(layers),
        steps=data.said, bound_kind="mean load; copies of the heaviest experts", notes=data.notes,
    )


def _check_options(method: str, objective: str, spec: DispatchSpec, effort: str) -> None:
    for what, value, known in (
        ("method", method, METHODS),
        ("objective", objective, ("balance", "time")),
        ("dispatch", spec.policy, tuple(POLICIES)),
        ("effort", effort, tuple(EFFORTS)),
    ):
        if value not in known:
            raise UsageError(f"unknown {what} {value!r}; there are: {', '.join(known)}")


def replace_evidence(made: Plan, evidence: Evidence) -> Plan:
    """The same slots with other evidence."""
    return dataclasses.replace(made, evidence=evidence)
