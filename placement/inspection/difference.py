"""What changes from one plan to another: the expert weights to send, by layer and device.

Knows two plans and expert sizes. Knows nothing of links, times or printing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ...foundation.arrays import IntArray
from ...traces.model_spec import ModelSpec
from ..cost.unplanned import layers_of, unplanned_layers
from ..formats.imported import named_layers
from ..plan import Plan
from .describe import Row, dispatch_text, layer_names, layer_range, merged_rows


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


def diff_plans(old: Plan, new: Plan, model: ModelSpec | None = None) -> PlanDifference:
    """What must be sent to come from `old` to `new`: expert weights that a device lacks.

    An expert in another slot of the same device is there already and moves nothing. Sizes need a
    model that gives them. Raises InputError on plans or a model of different shapes.
    """
    moves = old.moves_to(new)
    if _differ(named_layers(old), named_layers(new)):
        raise InputError(
            f"the plans are for different layers of their model: {layer_range(old)} and "
            f"{layer_range(new)}"
        )
    bytes_E = _expert_bytes(new, model)
    arrived_LGE = (new.replicas_LGE() > 0) & (old.replicas_LGE() == 0)
    change_LE = new.replicas_LE - old.replicas_LE
    total_bytes = None if bytes_E is None else int((arrived_LGE.sum(axis=(0, 1)) * bytes_E).sum())
    gained, lost = int(np.maximum(change_LE, 0).sum()), int(np.maximum(-change_LE, 0).sum())
    size = () if bytes_E is None else ("MB",)
    return PlanDifference(
        _summary(new, arrived_LGE, total_bytes, lost),
        ("layer", "experts to send", "of its slots", "to devices", "most to one",
         "replicas gained", "replicas lost", *size),
        _changed_layers(new, arrived_LGE, change_LE, bytes_E),
        ("device", "experts to receive", "of its slots", *size),
        _receiving_devices(new, arrived_LGE, bytes_E),
        _notes(old, new, bool(moves) or lost > 0),
        {
            "moves": [list(move) for move in moves], "move_count": len(moves),
            "share_of_slots": len(moves) / int((new.slots >= 0).sum()),
            "bytes": total_bytes, "replicas_gained": gained, "replicas_lost": lost,
            "moves_per_layer": arrived_LGE.sum(axis=(1, 2)).tolist(),
            "moves_per_device": arrived_LGE.sum(axis=(0, 2)).tolist(),
            "same_slots": old.same_slots(new), "same_dispatch": old.dispatch == new.dispatch,
        },
    )


def _changed_layers(
    new: Plan, arrived_LGE: npt.NDArray[np.bool_], change_LE: IntArray, bytes_E: IntArray | None
) -> list[Row]:
    """Layers where experts arrive or replica counts change."""
    filled_L = (new.slots >= 0).sum(axis=(1, 2))
    rows: list[Row] = []
    for layer, (name, arrived_GE) in enumerate(zip(layer_names(new), arrived_LGE, strict=True)):
        to_G, change_E = arrived_GE.sum(axis=1), change_LE[layer]
        rows.append((
            name, int(to_G.sum()), f"{to_G.sum() / filled_L[layer]:.1%}", int((to_G > 0).sum()),
            int(to_G.max()), int(np.maximum(change_E, 0).sum()),
            int(np.maximum(-change_E, 0).sum()), *_megabytes(arrived_GE, bytes_E),
        ))
    return [row for row in merged_rows(rows) if row[1] or row[5] or row[6]]


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
    return [row for row in merged_rows(rows) if row[1]]


def _megabytes(arrived: npt.NDArray[np.bool_], bytes_E: IntArray | None) -> tuple[float, ...]:
    """Of the experts along the last axis; () where sizes are unknown."""
    return () if bytes_E is None else (float((arrived * bytes_E).sum() / 1e6),)


def _summary(
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


def _notes(old: Plan, new: Plan, changes: bool) -> tuple[str, ...]:
    notes = []
    if old.dispatch != new.dispatch:
        notes.append(
            f"dispatch changes: {dispatch_text(old.dispatch)} -> {dispatch_text(new.dispatch)}"
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
    if model is None or not model.knows_bytes:
        return None
    unplanned_layers(model, layers_of(plan), plan.num_experts, "the plans")
    return model.bytes_per_expert_E()


def _differ(before: object, after: object) -> bool:
    """Both are given and differ."""
    return bool(before and after) and before != after
