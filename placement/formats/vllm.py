"""vLLM's plan (initial_expert_map_path): a JSON list of slots, [S], or one for each MoE layer.

The option is in a proposal, in no release: the file is read, and written, as described there. Slot
s is on rank s // (S / ranks); one list alone is for all layers. The mapping record of another
proposal, lists by MoE layer under initial_global_assignments, is read too.
"""

from __future__ import annotations

import json
from pathlib import Path

from ...errors import InputError, UsageError
from ...foundation.atomic_file import replacing
from ...foundation.documents import read_json
from ...traces.model_spec import ModelSpec
from ..plan import Plan
from .even_rows import even_rows_LS
from .imported import (
    ImportedPlan,
    Known,
    build_plan,
    expert_ids,
    moe_layer_names,
    shown,
    split_rows,
)

ASSIGNMENTS = "initial_global_assignments"
UNRELEASED = "no release of vLLM reads such a file yet (initial_expert_map_path is in a proposal)"


def read(known: Known) -> ImportedPlan:
    """Raises InputError naming layer and slot; UsageError where the layers are not told."""
    table = read_json(known.path)
    if isinstance(table, dict) and isinstance(table.get(ASSIGNMENTS), dict):
        table = _by_layer(known.path, table[ASSIGNMENTS])
    if not isinstance(table, list) or not table:
        raise InputError(
            f"{known.path}: must be a list of slots, or one for each MoE layer, not {shown(table)}"
        )
    notes: tuple[str, ...] = ()
    if not isinstance(table[0], list):
        if known.model is None:
            raise UsageError(
                f"{known.path}: one list for all layers, and it does not say how many there are: "
                "name the model with --model"
            )
        table = [table] * known.model.num_layers
        notes = (f"one list, for all {len(table)} MoE layers",)
    names = moe_layer_names(len(table))
    rows = [
        expert_ids(row, f"{known.path}: {name}") for name, row in zip(names, table, strict=True)
    ]
    slots = split_rows(rows, names, known.devices(), known.path)
    num_experts, inferred = known.experts(int(slots.max()))
    plan = build_plan(
        known, slots, num_experts, names, known.layers(len(rows)), engine="vllm",
        dispatch="vllm_hash",
    )
    return ImportedPlan(plan, inferred + notes)


def _by_layer(path: Path, assignments: dict[str, object]) -> list[object]:
    """The rows of a mapping record, {"0": [slots], …}, in order; MoE layers counted from 0."""
    for number in range(len(assignments)):
        if str(number) not in assignments:
            raise InputError(
                f"{path}: {ASSIGNMENTS} lacks MoE layer {number}: it counts them from 0"
            )
    return [assignments[str(number)] for number in range(len(assignments))]


def write(plan: Plan, path: Path, model: ModelSpec | None) -> tuple[str, ...]:
    """One row for each MoE layer, in order."""
    rows_LS = even_rows_LS(plan, "vLLM")
    with replacing(path) as file:
        file.write((json.dumps(rows_LS.tolist()) + "\n").encode())
    spare = rows_LS.shape[1] - plan.num_experts
    return (f"{UNRELEASED}; it is for {plan.num_devices} ranks, num_redundant_experts {spare}",)
