"""What a switch would do and what it is worth, without doing it.

Knows plans, a group's active plans and recorded traffic. Makes the same checks as the switch
itself. Changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import LoadmasterError
from ...placement.cluster import Cluster
from ...placement.comparison.compare import Comparison, compare
from ...placement.cost.step_cost import move_cost
from ...placement.plan import Plan
from ...traces.model_spec import ModelSpec
from ...traces.steps import RECORDED, StepSampler
from ...traces.trace import DECODE, PHASES, PREFILL, RoutingTrace
from ..protocol.phase_plans import PhasePlans
from ..protocol.plan_switch import check_plans

Move = tuple[int, int, int]      # layer, device, expert


@dataclass(frozen=True)
class Advice:
    """What `apply` would do with these plans now."""

    epoch: int
    moves: tuple[Move, ...]
    move_bytes: tuple[int, ...]              # of each move
    move_us: float                           # sending them over the cluster's links
    tables: dict[str, Comparison]            # "all steps", or by phase; empty without traffic
    pays_back_after_steps: float | None      # None: never, or times are not known
    cluster_is_known: bool                   # else judged as equal CPU devices

    @property
    def verdict(self) -> str:
        """One sentence."""
        if not self.tables:
            return "no recorded traffic to judge on: record some, or name a trace"
        lines = [f"{name}: {t.verdict}" if len(self.tables) > 1 else t.verdict
                for name, t in self.tables.items()]
        if self.pays_back_after_steps is not None:
            lines.append(f"moving pays back after {self.pays_back_after_steps:,.0f} steps")
        return "; ".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "verdict": self.verdict,
            "epoch": self.epoch,
            "moves": len(self.moves),
            "move_bytes": sum(self.move_bytes),
            "move_us": self.move_us,
            "pays_back_after_steps": self.pays_back_after_steps,
            "moved": [
                {"layer": layer, "device": device, "expert": expert, "bytes": size}
                for (layer, device, expert), size in zip(self.moves, self.move_bytes, strict=True)
            ],
            "judged": {name: table.to_dict() for name, table in self.tables.items()},
            "applied": False,
        }


def advise(status: dict[str, Any], wanted: PhasePlans, trace: RoutingTrace | None) -> Advice:
    """Check plans against a group's status, list what would move, and judge them on a trace.

    Raises PlanError for plans that `apply` would refuse, with the same reason.
    """
    current = PhasePlans.both(status["plan"], status["decode_plan"])
    model: ModelSpec = status["model_spec"]
    check_plans(wanted, current, model)
    known = status.get("cluster")
    given = known if known is not None else Cluster.preset(
        "cpu", devices_per_node=current.prefill.num_devices,
        slots_per_device=current.prefill.slots_per_device,
    )
    widest = max(p.slots_per_device for p in (wanted.prefill, wanted.decode))
    cluster = resized(given, current.prefill.num_devices, widest)
    moves = new_experts(current, wanted)
    tables = {} if trace is None else _judged(current, wanted, trace, cluster, model)
    cost = move_cost(moves, current.prefill, model, cluster)
    return Advice(
        int(status["epoch"]), tuple(moves), bytes_of(moves, model), cost.us, tables,
        _pays_back(tables, cost.us), known is not None and status.get("device", "cpu") == "cpu",
    )


def new_experts(before: PhasePlans, after: PhasePlans) -> list[Move]:
    """(layer, device, expert) that ranks must hold under `after` and do not under `before`."""
    rows = zip(before.wanted_LG(), after.wanted_LG(), strict=True)
    return [
        (layer, device, expert)
        for layer, (old_G, new_G) in enumerate(rows)
        for device, (old, new) in enumerate(zip(old_G, new_G, strict=True))
        for expert in sorted(new - old)
    ]


def bytes_of(moves: list[Move], model: ModelSpec) -> tuple[int, ...]:
    """The size of each move."""
    bytes_E = model.bytes_per_expert_E()
    return tuple(int(bytes_E[expert]) for _, _, expert in moves)


def with_phase(plans: PhasePlans, plan: Plan, phase: int | None) -> PhasePlans:
    """These plans with another one for a phase; None: for both."""
    if phase is None:
        return PhasePlans.both(plan)
    return PhasePlans(plans.prefill, plan) if phase == DECODE else PhasePlans(plan, plans.decode)


def asked_for(current: PhasePlans, plan: Plan, decode: Plan | None) -> PhasePlans:
    """The plans that someone means who names one: phases under plans of their own stay apart."""
    return PhasePlans.both(plan, current.decode if decode is None and current.apart else decode)


def resized(cluster: Cluster, devices: int, slots: int) -> Cluster:
    """The cluster with this many devices, and at least these slots on each.

    The first devices stay; further ones are taken to be like the last, on its node.
    """
    kept = list(cluster.devices[:devices])
    kept += [cluster.devices[-1]] * (devices - len(kept))
    roomy = tuple(d.model_copy(update={"slots": max(d.slots, slots)}) for d in kept)
    if roomy == cluster.devices:
        return cluster
    return Cluster(
        name=cluster.name, devices=roomy, traffic=cluster.traffic, hardware=cluster.hardware
    )


def _judged(
    current: PhasePlans, wanted: PhasePlans, trace: RoutingTrace, cluster: Cluster,
    model: ModelSpec,
) -> dict[str, Comparison]:
    """Both plans on recorded steps; each phase by itself where one has a plan of its own."""

    def table(now: Plan, new: Plan, part: RoutingTrace) -> Comparison:
        steps = StepSampler() if part.step is None else RECORDED
        return compare(
            {"now": now, "new": new}, part, cluster, steps=steps, current="now",
            model=model if model.knows_sizes else None,
        )

    if not (current.apart or wanted.apart):
        return {"all steps": table(current.prefill, wanted.prefill, trace)}
    if trace.phase is None:
        raise LoadmasterError(
            "prefill and decode have plans of their own, and the trace does not say which tokens "
            "are which: record one with phases"
        )
    return {
        PHASES[phase]: table(
            current.of(phase), wanted.of(phase), trace.select(trace.phase == phase)
        )
        for phase in (PREFILL, DECODE)
        if np.any(trace.phase == phase)
    }


def _pays_back(tables: dict[str, Comparison], move_us: float) -> float | None:
    """After how many steps the time saved equals that of moving; phases have equal weight."""
    gains = [
        t.row("now").metric - t.row("new").metric for t in tables.values()
        if t.metric_name == "step_time_us"
    ]
    gain_us = sum(gains) / len(gains) if gains else 0.0
    return move_us / gain_us if gain_us > 0 else None
