"""Layers that are no jobs of their own: what one is worth depends on those before it.

Under `coherent` traffic tokens stay where their experts are. `aligned` renames devices in each
layer so that tokens find their next experts near; balance stays as it is, because equal devices
only change names. Under `sglang_static` fair choices are drawn through all layers in turn. In both
`together` scores the layers as one plan, and of several whole plans the best is kept.

Knows plans, transitions and cost. Knows nothing of how a layer's slots were found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ...foundation.arrays import SlotArray
from ...traces.steps import Steps
from ..cluster import Cluster
from ..cost.step_cost import step_cost
from ..cost.step_loads import step_loads
from ..cost.token_transfers import transfers_cost_bytes
from ..methods.cluster_assignment import chain_cost, place_clusters
from ..methods.whole_model import WholeModel, pairs_fit, whole_model
from ..plan import Plan
from ..planning_traffic import PlanningSteps
from ..search.layer_task import LayerAnswer, Score, best_of, crossing_transfers, score_of
from .evidence import Settings

NAMES_DO_NOT_MATTER = ("even", "balanced", "fewest_active")


def linked(
    plans: Sequence[list[LayerAnswer]], data: PlanningSteps, settings: Settings, *, align: bool
) -> tuple[list[LayerAnswer], tuple[str, ...]]:
    """The best of whole plans, scored together; the first may get its devices renamed (`align`)."""
    notes: tuple[str, ...] = ()
    # A rule that goes by the order of slots shares otherwise among devices of other names: only a
    # score of the whole tells what that is worth.
    free = scored_together(settings) or settings.dispatch.policy in NAMES_DO_NOT_MATTER
    align = align and free and can_align(settings.cluster) and data.trace is not None
    if align and pairs_fit(data):
        model = whole_model(
            data, settings.cluster, "auto", settings.seed, settings.effort, settings.deadline
        )
        slots_LGC, note = aligned(stacked([a.slots_GC for a in plans[0]]), model)
        renamed = [replace(a, slots_GC=slots_LGC[layer]) for layer, a in enumerate(plans[0])]
        plans, notes = [renamed, *plans], (note,)
    if not scored_together(settings):
        return plans[0], notes
    scored = [together(answers, data, settings) for answers in plans]
    best = scored[best_of(
        [whole_score(answers, settings.objective) for answers in scored],
        [(sum(int((a.slots_GC >= 0).sum()) for a in answers),) for answers in scored],
        settings.objective,
        settings.slack if transfers_cost_bytes(settings.cluster) else None,
    )]
    return best, notes if best is scored[0] else ()


def layers_linked(settings: Settings) -> bool:
    """Whether a layer's worth, or what its devices are called, depends on other layers."""
    return settings.cluster.traffic.mode == "coherent" or scored_together(settings)


def scored_together(settings: Settings) -> bool:
    """Whether layers alone are worth something else than as one plan."""
    timed_chain = settings.cluster.traffic.mode == "coherent" and settings.objective == "time"
    return timed_chain or settings.dispatch.policy == "sglang_static"


def whole_score(answers: list[LayerAnswer], objective: str) -> Score:
    """The plan's score on the steps that decide: time adds up, the rest is a mean."""
    decisive = [a.planning if a.validation is None else a.validation for a in answers]
    time_us = sum(s.objective("time") for s in decisive) if objective == "time" else None
    return Score(
        float(np.mean([s.peak for s in decisive])), float(np.mean([s.imbalance for s in decisive])),
        float(np.mean([s.transfers for s in decisive])), time_us,
    )


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
    answers: list[LayerAnswer], data: PlanningSteps, settings: Settings
) -> list[LayerAnswer]:
    """The answers, scored behind the layers before them.

    Under `coherent` traffic only time is: balance is that of each layer from its tokens' homes.
    """
    if data.trace is None:
        return answers
    whole = Plan(
        slots=stacked([a.slots_GC for a in answers]), num_experts=data.num_experts,
        dispatch=settings.dispatch, layer_indices=data.layer_indices,
    )
    planning = _scores(whole, data, data.planning, settings)
    validation = _scores(whole, data, data.validation, settings)
    chain = settings.cluster.traffic.mode == "coherent"

    def behind(alone: Score | None, scores: list[Score], layer: int) -> Score | None:
        if alone is None or not scores:
            return alone
        return replace(alone, time_us=scores[layer].time_us) if chain else scores[layer]

    return [
        replace(
            answer, planning=behind(answer.planning, planning, layer) or answer.planning,
            validation=behind(answer.validation, validation, layer),
        )
        for layer, answer in enumerate(answers)
    ]


def stacked(layers: list[SlotArray]) -> SlotArray:
    """[L, G, C] layers padded to the widest with empty slots."""
    slots = np.full((len(layers), len(layers[0]), max(x.shape[1] for x in layers)), -1, np.int16)
    for layer, slots_GC in enumerate(layers):
        slots[layer, :, : slots_GC.shape[1]] = slots_GC
    return slots


def _scores(
    whole: Plan, data: PlanningSteps, steps: Steps | None, settings: Settings
) -> list[Score]:
    """A score of every layer in the plan; empty where there are no such steps."""
    if steps is None or data.trace is None:
        return []
    cluster, model = settings.cluster, settings.model
    timed = settings.objective == "time" and model is not None
    loads = step_loads(
        data.trace, steps, whole, cluster, whole.dispatch, timed=timed,
        expert_bytes_E=None if model is None else model.listed_bytes_E(),
    )
    us_WL = None
    if timed and model is not None:
        us_WL = step_cost(loads, model, cluster, dispatch=whole.dispatch).layer_us_WL
    return [
        score_of(
            loads.tokens_WLG[:, layer].astype(np.float64),
            crossing_transfers(loads, cluster, layer), cluster,
            None if us_WL is None else us_WL[:, layer],
        )
        for layer in range(whole.num_layers)
    ]
