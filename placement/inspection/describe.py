"""What a plan says, in words and tables for people and as a document for machines.

Knows one plan. Knows nothing of traces, clusters or printing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from ...foundation.arrays import IntArray
from ..formats.imported import named_layers
from ..plan import DispatchSpec, Evidence, Plan, Provenance

Row = tuple[Any, ...]

MOST_SHOWN = 3      # experts named per layer


@dataclass(frozen=True)
class PlanDescription:
    """A plan in a sentence, in facts and as a table of layers (equal neighbours in one row)."""

    summary: str
    facts: list[tuple[str, Any]]
    layer_columns: tuple[str, ...]
    layer_rows: list[Row]
    notes: tuple[str, ...] = ()
    document: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, one entry for every layer."""
        return {"summary": self.summary, **self.document, "notes": list(self.notes)}


def describe_plan(plan: Plan) -> PlanDescription:
    """What the plan says: shape, replicas, dispatch, where it came from and how good it is."""
    layers = _layer_documents(plan)
    columns, rows = _layer_table(layers)
    return PlanDescription(
        _summary(plan), _facts(plan), columns, rows, _notes(plan),
        {
            "num_layers": plan.num_layers, "num_experts": plan.num_experts,
            "num_devices": plan.num_devices, "slots_per_device": plan.slots_per_device,
            "spare_replicas": plan.spare_slots, "duplicates": plan.duplicates,
            "dispatch": plan.dispatch.model_dump(),
            "model_digest": plan.model_digest, "cluster_digest": plan.cluster_digest,
            "provenance": plan.provenance.model_dump(),
            "evidence": None if plan.evidence is None else plan.evidence.model_dump(
                exclude={"layers"}
            ),
            "layers": layers,
        },
    )


def shape_text(plan: Plan) -> str:
    """Layers, experts, devices, slots and replicas in words."""
    filled_L = (plan.slots >= 0).sum(axis=(1, 2))
    spare = f"{plan.spare_slots:,} spare replicas" if plan.spare_slots else "no replicas"
    return (
        f"{plan.num_layers} layers x {plan.num_experts} experts on {plan.num_devices} devices, "
        f"{_range(filled_L)} slots per layer, {spare}"
    )


def _summary(plan: Plan) -> str:
    if plan.evidence is None:
        return f"{shape_text(plan)}; how good it is was not judged"
    return (
        f"{shape_text(plan)}; {_objective_text(plan.evidence)} on its planning steps, at most "
        f"{plan.evidence.gap:.2%} above what any plan can reach there"
    )


def _facts(plan: Plan) -> list[tuple[str, Any]]:
    filled_LG = (plan.slots >= 0).sum(axis=2)
    facts: list[tuple[str, Any]] = [
        ("layers", f"{plan.num_layers} ({layer_range(plan)})"),
        ("experts per layer", plan.num_experts),
        ("devices", plan.num_devices),
        ("filled slots per device and layer", _range(filled_LG)),
        ("spare replicas", plan.spare_slots),
        ("duplicates on one device", plan.duplicates),
        ("most replicas of an expert", int(plan.replicas_LE.max())),
        ("dispatch", dispatch_text(plan.dispatch)),
        ("made by", _origin_text(plan.provenance)),
        ("trace", plan.provenance.trace_digest),
        ("model", plan.model_digest),
        ("cluster", plan.cluster_digest),
        *([] if plan.evidence is None else _evidence_facts(plan.evidence)),
    ]
    return [(name, value) for name, value in facts if value not in ("", None)]


def _evidence_facts(evidence: Evidence) -> list[tuple[str, Any]]:
    kind = f" ({evidence.bound_kind})" if evidence.bound_kind else ""
    return [
        (f"objective ({evidence.objective_name})", f"{evidence.objective:,.4f}"),
        (f"bound{kind}", f"{evidence.bound:,.4f}"),
        ("gap", f"{evidence.gap:.2%}"),
        ("remote transfers per token",
         None if evidence.copies is None else f"{evidence.copies:,.3f}"),
        ("on held-back steps",
         None if evidence.validation is None else f"{evidence.validation:,.4f}"),
        ("judged on", evidence.steps),
    ]


def _objective_text(evidence: Evidence) -> str:
    if evidence.objective_name == "time":
        return f"step time {evidence.objective:,.1f} us"
    return f"imbalance {evidence.objective:.4f}"


def _layer_documents(plan: Plan) -> list[dict[str, Any]]:
    filled_L = (plan.slots >= 0).sum(axis=(1, 2))
    duplicates_L = np.maximum(plan.replicas_LGE() - 1, 0).sum(axis=(1, 2))
    replicas_LE = plan.replicas_LE
    judged = plan.evidence.layers if plan.evidence is not None else ()
    documents = []
    for layer, name in enumerate(layer_names(plan)):
        evidence = judged[layer] if len(judged) == plan.num_layers else None
        documents.append({
            "layer": name,
            "filled_slots": int(filled_L[layer]),
            "spare_replicas": int(filled_L[layer]) - plan.num_experts,
            "duplicates": int(duplicates_L[layer]),
            "most_replicas": _most_replicas(replicas_LE[layer]),
            "objective": None if evidence is None else evidence.objective,
            "bound": None if evidence is None else evidence.bound,
        })
    return documents


def _layer_table(layers: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[Row]]:
    """Columns that say something, and rows with equal neighbours merged."""
    columns = ["layer", "filled slots", "spare replicas", "most replicas"]
    keys = ["layer", "filled_slots", "spare_replicas", "most_replicas"]
    if any(entry["duplicates"] for entry in layers):
        columns.append("duplicates")
        keys.append("duplicates")
    if any(entry["objective"] is not None for entry in layers):
        columns += ["objective", "bound"]
        keys += ["objective", "bound"]
    rows = [
        tuple(_replicas_text(entry[key]) if key == "most_replicas" else entry[key] for key in keys)
        for entry in layers
    ]
    return tuple(columns), merged_rows(rows)


def _most_replicas(replicas_E: IntArray) -> list[dict[str, int]]:
    """The experts with most replicas, of those with more than one; ties to the lower id."""
    order = np.argsort(-replicas_E, kind="stable")[:MOST_SHOWN]
    return [
        {"expert": int(e), "replicas": int(replicas_E[e])} for e in order if replicas_E[e] > 1
    ]


def _replicas_text(most: list[dict[str, int]]) -> str | None:
    return ", ".join(f"{m['expert']} x{m['replicas']}" for m in most) or None


def merged_rows(rows: list[Row]) -> list[Row]:
    """Neighbours that say the same in one row, "3 - 60"."""
    merged = []
    for cells, group in groupby(rows, key=lambda row: row[1:]):
        names = [row[0] for row in group]
        merged.append((str(names[0]) if len(names) == 1 else f"{names[0]} - {names[-1]}", *cells))
    return merged


def _notes(plan: Plan) -> tuple[str, ...]:
    notes = []
    if plan.duplicates:
        notes.append("a second replica of an expert on one device serves nothing: plan anew, or "
                     "leave the slot to another expert")
    if plan.evidence is None:
        notes.append("no evidence in the file: `loadmaster evaluate TRACE PLAN` judges it")
    evidence = () if plan.evidence is None else plan.evidence.notes
    return (*notes, *plan.provenance.notes, *evidence)


def layer_names(plan: Plan) -> tuple[int, ...]:
    """The model's own numbers where the plan has them, else 0, 1, 2, ..."""
    return plan.layer_indices or tuple(range(plan.num_layers))


def layer_range(plan: Plan) -> str:
    """The model's first and last MoE layer, or that the plan does not know."""
    named = named_layers(plan)
    return f"the model's {_range(np.array(named))}" if named else "counted from 0"


def _range(values: IntArray) -> str:
    low, high = int(values.min()), int(values.max())
    return str(low) if low == high else f"{low} to {high}"


def _origin_text(made: Provenance) -> str:
    """Seed and effort mean something only where a trace was planned on."""
    if not made.trace_digest:
        return made.method
    return f"{made.method}, seed {made.seed}, effort {made.effort}"


def dispatch_text(spec: DispatchSpec) -> str:
    """Policy and parameters."""
    given = ", ".join(f"{name} {value}" for name, value in sorted(spec.parameters.items()))
    return f"{spec.policy} ({given})" if given else spec.policy
