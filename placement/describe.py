"""What a plan says, and what changes from one plan to another, for people and as documents.

Knows plans and expert sizes. Knows nothing of traces, steps or links.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..traces.spec import ModelSpec
from .plan import Plan

Row = tuple[Any, ...]


@dataclass(frozen=True)
class PlanDescription:
    """A plan in a sentence, facts and a table of layers."""

    summary: str
    facts: list[tuple[str, Any]]
    layer_columns: tuple[str, ...]
    layer_rows: list[Row]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class PlanDifference:
    """What changes, in a sentence and a table of layers."""

    summary: str
    columns: tuple[str, ...]
    rows: list[Row]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def describe_plan(plan: Plan) -> PlanDescription:
    """What the plan says."""
    spare = (plan.replicas_LE - 1).sum(axis=1)
    return PlanDescription(
        f"{plan.num_experts} experts on {plan.num_devices} devices, {plan.num_layers} layers",
        [("spare replicas", plan.spare_slots)], ("layer", "spare replicas"),
        [(layer, int(count)) for layer, count in enumerate(spare)],
    )


def diff_plans(old: Plan, new: Plan, model: ModelSpec | None = None) -> PlanDifference:
    """What `new` needs moved, coming from `old`."""
    moves = old.moves_to(new)
    return PlanDifference(f"{len(moves)} experts to move", ("layer", "device", "expert"), [*moves])
