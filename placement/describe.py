"""What a plan says, and what changes from one plan to another, for people and as documents.

Knows plans and expert sizes. Knows nothing of traces, steps, links or printing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from ..traces.spec import ModelSpec
from .formats.model_layers import told_layers
from .plan import DispatchSpec, Evidence, Plan, Provenance

Row = tuple[Any, ...]
IntArray = npt.NDArray[np.int64]

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


@dataclass(frozen=True)
class PlanDifference:
    """What changes, in a sentence and in tables of the layers and devices where it does."""

    summary: str
    columns: tuple[str, ...]
    rows: list[Row]
    device_columns: tuple[str, ...]
    device_rows: list[Row]
    notes: tuple[str, ...] = ()
    document: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with every move as [layer, device, expert]."""
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


def diff_plans(old: Plan, new: Plan, model: ModelSpec | None = None) -> PlanDifference:
    """What must be sent to come from `old` to `new`: expert weights that a device lacks.

    An expert in another slot of the same device is there already and moves nothing. Sizes need a
    model that gives them. Raises InputError on plans or a model of different shapes.
    """
    moves = old.moves_to(new)
    if _differ(told_layers(old), told_layers(new)):
        raise InputError(
            f"the plans are for different layers of their model: {_layer_range(old)} and "
            f"{_layer_range(new)}"
        )
    bytes_E = _expert_bytes(new, model)
    arrived_LGE = (new.copies_LGE() > 0) & (old.copies_LGE() == 0)
    change_LE = new.replicas_LE - old.replicas_LE
    layer_rows = _changed_layers(new, arrived_LGE, change_LE, bytes_E)
    device_rows = _receiving_devices(new, arrived_LGE, bytes_E)
    total_bytes = None if bytes_E is None else int((arrived_LGE.sum(axis=(0, 1)) * bytes_E).sum())
    gained, lost = int(np.maximum(change_LE, 0).sum()), int(np.maximum(-change_LE, 0).sum())
    size = () if bytes_E is None else ("MB",)
    return PlanDifference(
        _difference_summary(new, arrived_LGE, total_bytes, lost),
        ("layer", "experts to send", "of its slots", "to devices", "most to one",
         "replicas gained", "replicas lost", *size),
        layer_rows,
        ("device", "experts to receive", "of its slots", *size), device_rows,
        _difference_notes(old, new, bool(moves) or lost > 0),
        {
            "moves": [list(move) for move in moves], "move_count": len(moves),
            "share_of_slots": len(moves) / int((new.slots >= 0).sum()),
            "bytes": total_bytes, "replicas_gained": gained, "replicas_lost": lost,
            "layers_changed": len({move[0] for move in moves}),
            "moves_per_layer": arrived_LGE.sum(axis=(1, 2)).tolist(),
            "moves_per_device": arrived_LGE.sum(axis=(0, 2)).tolist(),
            "same_slots": old.same_slots(new), "same_dispatch": old.dispatch == new.dispatch,
        },
    )


# ---- one plan ---------------------------------------------------------------------------------


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
        ("layers", f"{plan.num_layers} ({_layer_range(plan)})"),
        ("experts per layer", plan.num_experts),
        ("devices", plan.num_devices),
        ("filled slots per device and layer", _range(filled_LG)),
        ("spare replicas", plan.spare_slots),
        ("duplicates on one device", plan.duplicates),
        ("most copies of an expert", int(plan.replicas_LE.max())),
        ("dispatch", _dispatch_text(plan.dispatch)),
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
    duplicates_L = np.maximum(plan.copies_LGE() - 1, 0).sum(axis=(1, 2))
    replicas_LE = plan.replicas_LE
    judged = plan.evidence.layers if plan.evidence is not None else ()
    documents = []
    for layer, name in enumerate(_layer_names(plan)):
        evidence = judged[layer] if len(judged) == plan.num_layers else None
        documents.append({
            "layer": name,
            "filled_slots": int(filled_L[layer]),
            "spare_replicas": int(filled_L[layer]) - plan.num_experts,
            "duplicates": int(duplicates_L[layer]),
            "most_copies": _most_copies(replicas_LE[layer]),
            "objective": None if evidence is None else evidence.objective,
            "bound": None if evidence is None else evidence.bound,
        })
    return documents


def _layer_table(layers: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[Row]]:
    """Columns that say something, and rows with equal neighbours merged."""
    columns = ["layer", "filled slots", "spare replicas", "most copies"]
    keys = ["layer", "filled_slots", "spare_replicas", "most_copies"]
    if any(entry["duplicates"] for entry in layers):
        columns.append("duplicates")
        keys.append("duplicates")
    if any(entry["objective"] is not None for entry in layers):
        columns += ["objective", "bound"]
        keys += ["objective", "bound"]
    rows = [
        tuple(_copies_text(entry[key]) if key == "most_copies" else entry[key] for key in keys)
        for entry in layers
    ]
    return tuple(columns), _merged(rows)


def _most_copies(replicas_E: IntArray) -> list[dict[str, int]]:
    """The experts with most copies, of those with more than one; ties to the lower id."""
    order = np.argsort(-replicas_E, kind="stable")[:MOST_SHOWN]
    return [
        {"expert": int(e), "copies": int(replicas_E[e])} for e in order if replicas_E[e] > 1
    ]


def _copies_text(most: list[dict[str, int]]) -> str | None:
    return ", ".join(f"{m['expert']} x{m['copies']}" for m in most) or None


def _merged(rows: list[Row]) -> list[Row]:
    """Neighbours that say the same in one row, "3 - 60"."""
    merged = []
    for said, group in groupby(rows, key=lambda row: row[1:]):
        names = [row[0] for row in group]
        merged.append((str(names[0]) if len(names) == 1 else f"{names[0]} - {names[-1]}", *said))
    return merged


def _notes(plan: Plan) -> tuple[str, ...]:
    notes = []
    if plan.duplicates:
        notes.append("a second copy of an expert on one device serves nothing: plan anew, or "
                     "leave the slot to another expert")
    if plan.evidence is None:
        notes.append("no evidence in the file: `loadmaster evaluate TRACE PLAN` judges it")
    evidence = () if plan.evidence is None else plan.evidence.notes
    return (*notes, *plan.provenance.notes, *evidence)


# ---- two plans --------------------------------------------------------------------------------


def _changed_layers(
    new: Plan, arrived_LGE: npt.NDArray[np.bool_], change_LE: IntArray, bytes_E: IntArray | None
) -> list[Row]:
    """Layers where experts arrive or replica counts change."""
    filled_L = (new.slots >= 0).sum(axis=(1, 2))
    rows: list[Row] = []
    for layer, (name, arrived_GE) in enumerate(zip(_layer_names(new), arrived_LGE, strict=True)):
        to_G, change_E = arrived_GE.sum(axis=1), change_LE[layer]
        rows.append((
            name, int(to_G.sum()), f"{to_G.sum() / filled_L[layer]:.1%}", int((to_G > 0).sum()),
            int(to_G.max()), int(np.maximum(change_E, 0).sum()),
            int(np.maximum(-change_E, 0).sum()), *_megabytes(arrived_GE, bytes_E),
        ))
    return [row for row in _merged(rows) if row[1] or row[5] or row[6]]


def _receiving_devices(
    new: Plan, arrived_LGE: npt.NDArray[np.bool_], bytes_E: IntArray | None
) -> list[Row]:
    filled_G = np.maximum((new.slots >= 0).sum(axis=(0, 2)), 1)
    rows: list[Row] = [
        (
            device, int(arrived_LE.sum()), f"{arrived_LE.sum() / filled_G[device]:.1%}",
            *_megabytes(arrived_LE, bytes_E),
        )
        for device, arrived_LE in enumerate(arrived_LGE.transpose(1, 0, 2))
    ]
    return [row for row in _merged(rows) if row[1]]


def _megabytes(arrived: npt.NDArray[np.bool_], bytes_E: IntArray | None) -> tuple[float, ...]:
    """Of the experts along the last axis; () where sizes are unknown."""
    return () if bytes_E is None else (float((arrived * bytes_E).sum() / 1e6),)


def _difference_summary(
    new: Plan, arrived_LGE: npt.NDArray[np.bool_], total_bytes: int | None, lost: int
) -> str:
    moves = int(arrived_LGE.sum())
    if not moves:
        dropped = f"; {lost:,} replicas are dropped" if lost else ""
        return f"nothing moves: every device holds what it needs{dropped}"
    layers, devices = (int(arrived_LGE.any(axis=axes).sum()) for axes in ((1, 2), (0, 2)))
    share = moves / int((new.slots >= 0).sum())
    size = "" if total_bytes is None else f", {total_bytes / 1e9:,.2f} GB"
    return (
        f"{moves:,} expert{' moves' if moves == 1 else 's move'} ({share:.1%} of "
        f"slots{size}), in {layers} of {new.num_layers} layers, to {devices} of "
        f"{new.num_devices} devices"
    )


def _difference_notes(old: Plan, new: Plan, changes: bool) -> tuple[str, ...]:
    notes = []
    if old.dispatch != new.dispatch:
        notes.append(
            f"dispatch changes: {_dispatch_text(old.dispatch)} -> {_dispatch_text(new.dispatch)}"
        )
    if not changes and not old.same_slots(new):
        notes.append("slots change within devices only, and that sends nothing")
    for name, before, after in (
        ("models", old.model_digest, new.model_digest),
        ("clusters", old.cluster_digest, new.cluster_digest),
    ):
        if _differ(before, after):
            notes.append(f"the plans were made for different {name} ({before}, {after})")
    return tuple(notes)


def _expert_bytes(plan: Plan, model: ModelSpec | None) -> IntArray | None:
    """[E], or None where no model gives sizes."""
    if model is None or not (model.knows_sizes or model.expert_bytes):
        return None
    if (model.num_layers, model.num_experts) != (plan.num_layers, plan.num_experts):
        raise InputError(
            f"the model {model.name} has {model.num_layers} MoE layers of {model.num_experts} "
            f"experts, the plans {plan.num_layers} of {plan.num_experts}: name the plans' model"
        )
    return model.bytes_per_expert_E()


def _differ(before: object, after: object) -> bool:
    """Both are told and not the same."""
    return bool(before and after) and before != after


# ---- words ------------------------------------------------------------------------------------


def _layer_names(plan: Plan) -> tuple[int, ...]:
    return plan.layer_indices or tuple(range(plan.num_layers))


def _layer_range(plan: Plan) -> str:
    told = told_layers(plan)
    return f"the model's {_range(np.array(told))}" if told else "counted from 0"


def _range(values: IntArray) -> str:
    low, high = int(values.min()), int(values.max())
    return str(low) if low == high else f"{low} to {high}"


def _origin_text(made: Provenance) -> str:
    """Seed and effort mean something only where a trace was planned on."""
    return f"{made.method}, seed {made.seed}, effort {made.effort}" if made.trace_digest else (
        made.method
    )


def _dispatch_text(spec: DispatchSpec) -> str:
    given = ", ".join(f"{name} {value}" for name, value in sorted(spec.parameters.items()))
    return f"{spec.policy} ({given})" if given else spec.policy
