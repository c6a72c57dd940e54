"""What `coherent` traffic adds to planning layer by layer: tokens stay, so layers are linked.

`aligned` renames devices in each layer so that tokens find their next experts near; balance stays
as it is, because equal devices only change names. `together` prices the layers as one plan, since
a layer alone cannot know where its tokens come from.

Knows plans, transitions and cost. Knows nothing of how a layer's slots were found.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ...foundation.arrays import FloatArray, SlotArray
from ...traces.model_spec import ModelSpec
from ...traces.steps import Steps
from ..cluster import Cluster
from ..cost.step_cost import step_cost
from ..cost.step_loads import step_loads
from ..methods.cluster_assignment import chain_cost, place_clusters
from ..methods.whole_model import WholeModel, pairs_fit, whole_model
from ..plan import DispatchSpec, Plan
from ..planning_traffic import PlanningSteps
from ..search.layer_task import LayerAnswer, Score
from .evidence import Settings


def linked(
    answers: list[LayerAnswer], data: PlanningSteps, settings: Settings, *, align: bool
) -> tuple[list[LayerAnswer], tuple[str, ...]]:
    """Answers under `coherent` traffic: devices renamed where allowed, layers timed together."""
    notes: tuple[str, ...] = ()
    if align and can_align(settings.cluster) and data.trace is not None and pairs_fit(data):
        model = whole_model(
            data, settings.cluster, "auto", settings.seed, settings.effort, settings.deadline
        )
        slots_LGC, note = aligned(stacked([a.slots_GC for a in answers]), model)
        answers = [replace(a, slots_GC=slots_LGC[layer]) for layer, a in enumerate(answers)]
        notes = (note,)
    if settings.objective == "time" and settings.model is not None:
        answers = together(answers, data, settings.cluster, settings.dispatch, settings.model)
    return answers, notes


def can_align(cluster: Cluster) -> bool:
    """Whether devices may change names: tokens stay where they are, and devices are equal."""
    kinds = {(d.slots, d.speed, d.expert_memory_bytes) for d in cluster.devices}
    alike = len(kinds) == 1 and cluster.devices[0].expert_memory_bytes is None
    return cluster.traffic.mode == "coherent" and alike and cluster.num_devices > 1


def aligned(slots_LGC: SlotArray, model: WholeModel) -> tuple[SlotArray, str]:
    """(the same contents of devices under other device numbers, layer by layer; what that gains).

    Tokens of an expert count as spread evenly over its replicas. MoETuner's second program, with a
    device's contents as the cluster: exact up to six devices, local search above.
    """
    held_LGE = np.stack([
        (slots_GC[:, :, None] == np.arange(model.experts)).any(axis=1) for slots_GC in slots_LGC
    ]).astype(np.float64)
    share_LGE = held_LGE / np.maximum(held_LGE.sum(axis=1, keepdims=True), 1.0)
    traffic = np.stack([
        first_GE @ pairs_EE @ next_GE.T for first_GE, pairs_EE, next_GE in
        zip(share_LGE[:-1], model.transition_LEE, share_LGE[1:], strict=True)
    ]) if len(slots_LGC) > 1 else np.zeros((0, len(model.transition_GG), len(model.transition_GG)))
    device_LG, _ = place_clusters(
        traffic, model.transition_GG, "sum", model.seed, deadline=model.deadline
    )
    as_found = np.tile(np.arange(len(model.transition_GG)), (len(slots_LGC), 1))
    before = chain_cost(traffic, as_found, model.transition_GG, "sum")
    after = chain_cost(traffic, device_LG, model.transition_GG, "sum")
    if after >= before:
        return slots_LGC, "devices keep their names: no others bring tokens nearer"
    renamed = np.empty_like(slots_LGC)
    for layer, device_G in enumerate(device_LG):
        renamed[layer, device_G] = slots_LGC[layer]
    saved = 1.0 - after / before
    return renamed, f"devices renamed layer by layer: ways between layers cost {saved:.1%} less"


def together(
    answers: list[LayerAnswer], data: PlanningSteps, cluster: Cluster, dispatch: DispatchSpec,
    model: ModelSpec,
) -> list[LayerAnswer]:
    """The answers with every layer's time as it is behind the one before it."""
    slots = stacked([a.slots_GC for a in answers])
    whole = Plan(slots=slots, num_experts=data.num_experts, dispatch=dispatch)
    planning = _layer_us(whole, data, data.planning, cluster, model)
    validation = _layer_us(whole, data, data.validation, cluster, model)

    def timed(score: Score | None, us_L: FloatArray | None, layer: int) -> Score | None:
        if score is None or us_L is None:
            return score
        return replace(score, time_us=float(us_L[layer]))

    return [
        replace(
            answer, planning=timed(answer.planning, planning, layer) or answer.planning,
            validation=timed(answer.validation, validation, layer),
        )
        for layer, answer in enumerate(answers)
    ]


def stacked(layers: list[SlotArray]) -> SlotArray:
    """[L, G, C] layers padded to the widest with empty slots."""
    slots = np.full((len(layers), len(layers[0]), max(x.shape[1] for x in layers)), -1, np.int16)
    for layer, slots_GC in enumerate(layers):
        slots[layer, :, : slots_GC.shape[1]] = slots_GC
    return slots


def _layer_us(
    whole: Plan, data: PlanningSteps, steps: Steps | None, cluster: Cluster, model: ModelSpec
) -> FloatArray | None:
    """[L] mean microseconds; None where there are no such steps."""
    if steps is None or data.trace is None:
        return None
    loads = step_loads(
        data.trace, steps, whole, cluster, whole.dispatch, expert_bytes_E=model.listed_bytes_E()
    )
    cost = step_cost(loads, model, cluster, dispatch=whole.dispatch)
    return np.asarray(cost.layer_us_WL.mean(axis=0))
