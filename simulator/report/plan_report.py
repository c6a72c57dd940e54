"""The report of `plan`: what to do, what it is worth, what it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ...foundation.arrays import FloatArray, IntArray
from ...foundation.units import duration, percent, size
from ...placement.cluster import Cluster
from ...placement.plan import Plan
from ...placement.rebalancing.advise import CURRENT, Advice
from ...placement.rebalancing.advise_loads import LoadAdvice
from ...placement.rebalancing.switch_payback import Moving
from .compared_parts import (
    HOTTEST,
    VIEWED,
    compared_spread,
    compared_table,
    judged_on,
    load_picture,
    metric_title,
    traffic_picture,
)
from .report import Picture, Report, Table
from .views import PlanView


def shown_plans(advice: Advice) -> dict[str, Plan]:
    """Before and after: the reference and what was chosen, or the best where it is to be left."""
    before, after = advice.comparison.reference, advice.chosen
    if before == after:
        after = next((n for n in advice.comparison.ranking if n != before), before)
    return {name: advice.plans[name] for name in dict.fromkeys((before, after))}


def plan_report(
    advice: Advice, views: Callable[[], Sequence[PlanView]], cluster: Cluster,
    notes: Sequence[str] = (), *, title: str = "Plan",
) -> Report:
    """views: counts those of `shown_plans`. notes: beyond the advice's own."""
    table = advice.comparison
    return Report(
        title=title, verdict=advice.verdict,
        tables=(compared_table(table, cluster.num_nodes), _planned(advice),
                *_moving(advice.moving), *_ordered(advice.results)),
        judged_on=(advice.notes[0], *judged_on(table), VIEWED),
        notes=tuple(dict.fromkeys((*advice.notes[1:], *notes))),
        document=advice.to_dict() | {"notes": [*advice.notes, *notes]},
        draw=lambda: _pictures(advice, views(), cluster),
    )


def _pictures(
    advice: Advice, views: Sequence[PlanView], cluster: Cluster
) -> tuple[Picture, ...]:
    pictures = [load_picture(views), compared_spread(advice.comparison)]
    if len({advice.plans[row.name].spare_slots for row in advice.comparison.rows}) > 1:
        pictures.append(_replicas(advice))
    if cluster.num_devices > 1:
        pictures.append(traffic_picture(views, cluster))
    current = advice.plans.get(CURRENT)
    if current is not None and advice.chosen != CURRENT:
        pictures.append(_moves(current, advice.plan, advice.chosen))
    return tuple(pictures)


def _planned(advice: Advice) -> Table:
    """How good each plan could have been, and what finding it took."""
    rows = [
        (name, f"{r.evidence.objective_name.replace('_', ' ')}",
         "-" if r.evidence.bound is None else f"{r.evidence.bound:,.4g}",
         percent(r.evidence.gap), f"{advice.plans[name].spare_slots:,}", duration(r.seconds * 1e6))
        for name, r in advice.results.items()
    ] + [(name, "cannot", "-", "-", "-", "-") for name in advice.cannot]
    header = ("plan", "planned for", "no plan can be better than", "gap", "replicas", "planned in")
    return Table("How good a plan can be, on the planning steps", header, tuple(rows))


def _moving(moving: Mapping[str, Moving]) -> list[Table]:
    if not moving:
        return []
    rows = tuple(
        (name, f"{m.moves:,}", percent(m.share), size(m.bytes), duration(m.us),
         duration(m.significant_gain_us),
         "-" if m.pays_back_after_steps is None else f"{m.pays_back_after_steps:,.0f} steps")
        for name, m in moving.items()
    )
    header = ("to", "experts to send", "of its slots", "bytes", "transfer",
              "significant gain a step", "pays back after")
    return [Table("What coming from the current plan takes", header, rows)]


def _ordered(results: Mapping[str, Any]) -> list[Table]:
    """The moves of a plan within a budget, in order."""
    return [
        Table(f"{len(result.moves)} moves, best gain first",
              ("move", "layer", "expert", "to device"),
              tuple((str(i), str(layer), str(expert), str(device))
                    for i, (layer, device, expert) in enumerate(result.moves, start=1)),
              folded=True)
        for result in results.values() if result.moves
    ]


def _replicas(advice: Advice) -> Picture:
    from .charts.replica_gain import Offer, replica_gain

    table = advice.comparison
    scale = 1e-3 if table.metric_name.endswith("_us") else 1.0
    unit = ", ms" if table.metric_name.endswith("_us") else ""
    offers = [
        Offer(row.name, advice.plans[row.name].spare_slots, row.metric * scale,
              row.metric_low * scale, row.metric_high * scale)
        for row in table.rows
    ]
    return Picture("replicas", "What replicas buy",
                   (replica_gain(offers, metric_title(table.metric_name) + unit),),
                   "Every replica takes a slot of memory on its device.")


def _moves(current: Plan, target: Plan, name: str) -> Picture:
    from .charts.switch_moves import switch_moves

    return Picture("moves", "What the switch sends",
                   (switch_moves(arriving_LG(current, target), f"to {name}"),),
                   "Experts that each device must receive, layer by layer.")


def arriving_LG(current: Plan, target: Plan) -> IntArray:
    """[L, G] experts that each device must receive to come from one plan to another."""
    arrive_LG = np.zeros((target.num_layers, target.num_devices), np.int64)
    for layer, device, _expert in current.moves_to(target):
        arrive_LG[layer, device] += 1
    return arrive_LG


# ---- average loads ----------------------------------------------------------------------------


def loads_report(
    advice: LoadAdvice, load_LE: FloatArray, cluster: Cluster, notes: Sequence[str] = ()
) -> Report:
    """As `plan_report`, for average loads: each replica of an expert takes an even part."""
    rows = [
        (name, f"{r.evidence.objective:.4f}", f"{r.evidence.bound:.4f}", percent(r.evidence.gap),
         f"{r.plan.spare_slots:,}", duration(r.seconds * 1e6))
        for name, r in advice.results.items()
    ] + [(name, "cannot", "-", "-", "-", "-") for name in advice.cannot]
    header = ("plan", "imbalance of the average loads", "no plan can be better than", "gap",
              "replicas", "planned in")
    return Report(
        title="Plan", verdict=advice.verdict,
        tables=(Table("The plans, best first", header, tuple(rows)), *_moving(advice.moving),
                *_ordered(advice.results)),
        judged_on=("the average loads that were planned for: no noise, no single steps",),
        notes=tuple(dict.fromkeys((*advice.notes, *notes))),
        document=advice.to_dict() | {"notes": [*advice.notes, *notes]},
        draw=lambda: (_average_loads(advice, load_LE, cluster),),
    )


def _average_loads(advice: LoadAdvice, load_LE: FloatArray, cluster: Cluster) -> Picture:
    """The current plan, or the least good, beside the chosen one."""
    from .charts.load_map import load_map

    first = CURRENT if CURRENT in advice.results else next(reversed(advice.results))
    names = dict.fromkeys((first, advice.chosen))
    loads = {n: even_load_LG(advice.results[n].plan, load_LE, cluster) for n in names}
    highest = min(HOTTEST, max(float(load.max()) for load in loads.values()))
    return Picture(
        "load", "Load of every device in every layer",
        tuple(load_map(load, name, highest) for name, load in loads.items()),
        "Average loads over the layer's mean, each replica taking an even part.",
    )


def even_load_LG(plan: Plan, load_LE: FloatArray, cluster: Cluster) -> FloatArray:
    """[L, G] load over the layer's mean where an expert's replicas share evenly."""
    layers, devices, _ = plan.slots.shape
    load_LG = np.zeros((layers, devices))
    for layer in range(layers):
        slot_GC = plan.slots[layer]
        held = slot_GC >= 0
        replicas_E = np.bincount(slot_GC[held], minlength=plan.num_experts)
        part_E = load_LE[layer] / np.maximum(replicas_E, 1)
        load_LG[layer] = np.where(held, part_E[np.where(held, slot_GC, 0)], 0.0).sum(axis=1)
    load_LG /= cluster.speed_G
    mean_L = load_LG.mean(axis=1, keepdims=True)
    over_LG: FloatArray = np.divide(load_LG, mean_L, out=np.ones_like(load_LG), where=mean_L > 0)
    return over_LG
