"""A plan's evidence: objective, bound and gap from its layers' answers, and its notes.

Knows answers, planning steps and what was asked. Knows nothing of how slots were found or of files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...foundation.arrays import FloatArray
from ...traces.model_spec import ModelSpec
from ..cluster import Cluster
from ..cost.lower_bounds import checked_gap
from ..cost.token_transfers import transfers_cost_bytes
from ..cost.unplanned import unplanned_us_W
from ..dispatch.policies import NEAREST_RULES
from ..dispatch.quotas import needs_all_counts
from ..plan import DispatchSpec, Evidence, LayerEvidence
from ..planning_traffic import PlanningSteps
from ..search.layer_task import HURRIED_STEPS, LayerAnswer


@dataclass(frozen=True)
class Settings:
    """What a planning run was asked, checked once."""

    cluster: Cluster
    dispatch: DispatchSpec
    objective: str
    model: ModelSpec | None
    slack: float
    seed: int
    effort: str
    deadline: float | None


def evidence_of(
    answers: list[LayerAnswer],
    data: PlanningSteps,
    settings: Settings,
    notes: tuple[str, ...] = (),
) -> Evidence:
    """Objective, bound and gap; time adds layers up, balance takes their mean."""
    name = settings.objective
    counted = data.trace is not None and transfers_cost_bytes(settings.cluster)
    layers = []
    for answer in answers:
        reached = answer.planning.objective(name)
        bound, _ = checked_gap(reached, answer.bound, f"layer {answer.layer}")
        layers.append(
            LayerEvidence(
                objective=reached, bound=bound, imbalance_mean=answer.planning.imbalance,
                replicas=int((answer.slots_GC >= 0).sum()) - data.num_experts,
                copies=answer.planning.transfers if counted else None,
            )
        )
    other_us = settings.model.other_time_us if name == "time" and settings.model else 0.0
    rest_us = _unplanned_us(answers, data, settings) if name == "time" else np.zeros(2)
    sums = np.array([[x.objective, x.bound] for x in layers])
    objective, bound = (
        sums.sum(axis=0) + other_us + rest_us if name == "time" else sums.mean(axis=0)
    )
    bound, gap = checked_gap(float(objective), float(bound), "plan")
    checks = [a.validation.objective(name) for a in answers if a.validation is not None]
    validation = None
    if checks:
        validation = (
            float(np.sum(checks)) + other_us + float(rest_us[0]) if name == "time"
            else float(np.mean(checks))
        )
    return Evidence(
        objective_name=name, objective=float(objective), bound=bound, gap=gap,
        validation=validation, layers=tuple(layers), steps=data.summary,
        bound_kind=BOUND_KINDS[name],
        notes=(*data.notes, *notes, *notes_on(answers, data, settings)),
        copies=float(np.mean([a.planning.transfers for a in answers])) if counted else None,
    )


def _unplanned_us(
    answers: list[LayerAnswer], data: PlanningSteps, settings: Settings
) -> FloatArray:
    """[2] what the model's layers that the trace lacks add: under this plan, and at least."""
    model, devices = settings.model, settings.cluster.num_devices
    if model is None or data.trace is None or data.planning is None:
        return np.zeros(2)
    filled = max(int((a.slots_GC >= 0).sum(axis=1).max()) for a in answers)
    fewest = -(-data.num_experts // devices)
    found = [
        unplanned_us_W(
            data.trace, data.planning, (data.num_layers, devices, slots), settings.cluster,
            settings.dispatch, model,
        ) for slots in (filled, fewest)
    ]
    held, least = (0.0 if us_W is None else float(us_W.mean()) for us_W in found)
    return np.array([held, min(held, least)])


BOUND_KINDS = {
    "balance": "mean load; replicas that the heaviest experts need",
    "time": "every used expert read once, every token computed once; exchanges start, and send "
            "what no device's slots could keep at home",
}


def notes_on(
    answers: list[LayerAnswer], data: PlanningSteps, settings: Settings
) -> tuple[str, ...]:
    """What a reader of the plan should know besides the numbers."""
    notes = []
    filled = sum(int((a.slots_GC >= 0).sum()) for a in answers)
    closed = closed_by_memory(answers, settings)
    slots = data.num_layers * settings.cluster.total_slots - closed
    empty = slots - filled
    if closed:
        notes.append(
            f"{closed} of {slots + closed} slots are closed: the devices' expert_memory_bytes hold "
            "no more experts"
        )
    searched = any(a.name.startswith("search") or a.name.endswith(" slots") for a in answers)
    if empty and searched and settings.objective == "time":
        notes.append(
            f"{empty} of {slots} slots are left empty: another replica there would cost more in "
            "weight reads than it saves in balance"
        )
    elif empty and searched and settings.dispatch.policy in NEAREST_RULES:
        notes.append(
            f"{empty} of {slots} slots are left empty: under {settings.dispatch.policy} another "
            "replica there would take few tokens and not balance better"
        )
    single = filled == data.num_layers * data.num_experts
    if single and settings.objective == "time" and needs_all_counts(settings.dispatch):
        notes.append(
            f"no expert has a replica: dispatch even makes the same choices as "
            f"{settings.dispatch.policy} and need not gather counts in every layer"
        )
    hurried = sum(a.in_haste for a in answers)
    if hurried:
        notes.append(
            f"the time limit left {hurried} of {len(answers)} layers judged on at most "
            f"{HURRIED_STEPS} steps"
        )
    unused = [a.layer for a in answers if not data.layer(a.layer).planning_WE().any()]
    if unused:
        notes.append(f"no token used layer {unused[0]} ({len(unused)} such layers)")
    return tuple(notes)


def closed_by_memory(answers: list[LayerAnswer], settings: Settings) -> int:
    """Empty slots of all layers that no expert could fill, because their device's memory is full.

    Experts of one size share a device's memory between layers; of different sizes, every layer has
    the same bytes (`layer_rooms.py`).
    """
    model, devices = settings.model, settings.cluster.devices
    if model is None or not model.knows_bytes:
        return 0
    size_E = np.maximum(model.bytes_per_expert_E().astype(np.float64), 1.0)
    memory_G = np.array([d.expert_memory_bytes or np.inf for d in devices])
    held_LG = np.stack([
        np.where(a.slots_GC >= 0, size_E[np.maximum(a.slots_GC, 0)], 0.0).sum(axis=1)
        for a in answers
    ])
    empty_LG = settings.cluster.slots_G - np.stack([(a.slots_GC >= 0).sum(axis=1) for a in answers])
    if size_E.min() == size_E.max():
        empty_G, left_G = empty_LG.sum(axis=0), memory_G - held_LG.sum(axis=0)
        return int(np.maximum(empty_G - np.floor(left_G / size_E.min()), 0).sum())
    left_LG = memory_G / len(answers) - held_LG
    return int(np.maximum(empty_LG - np.floor(left_LG / size_E.min()), 0).sum())
