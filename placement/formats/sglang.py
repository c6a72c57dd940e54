"""SGLang's plan (--init-expert-location): JSON or .pt with the one key physical_to_logical_map.

[L_all, S]: a row for every hidden layer of the model, dense ones too; slot s is on rank
s // (S / ranks). SGLang checks nothing when it loads such a file, so all is checked here.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ...errors import InputError, UsageError
from ...foundation.atomic_file import replacing
from ...foundation.documents import read_json
from ...traces.model_config.layer_ranges import written
from ...traces.model_layers import LayerRows, draft_layers, hidden_layers
from ...traces.model_spec import ModelSpec
from ..plan import Plan
from .array_files import read_pt, whole_array
from .even_rows import even_rows_LS
from .imported import (
    ImportedPlan,
    Known,
    build_plan,
    expert_ids,
    model_layers,
    require_keys,
    shown,
    split_rows,
)

KEY = "physical_to_logical_map"
# What makes SGLang choose among replicas as a policy says; static is what it does unasked.
DISPATCH_OPTIONS = {
    "sglang_static": "--ep-dispatch-algorithm static and an all-to-all backend",
    "sglang_dynamic": "--ep-dispatch-algorithm dynamic and an all-to-all backend",
    "sglang_rows": "--ep-dispatch-algorithm dynamic --moe-a2a-backend none",
}


def read(known: Known) -> ImportedPlan:
    """With a model its dense layers' rows are left out; without one every row is a MoE layer."""
    table = _table(known.path)
    names = [f"layer {layer}" for layer in range(len(table))]
    rows = [
        expert_ids(row, f"{known.path}: {name}") for name, row in zip(names, table, strict=True)
    ]
    slots = split_rows(rows, names, known.devices(), known.path)
    num_experts, notes = known.experts(int(slots.max()))
    moe = known.rows(len(rows))
    plan = build_plan(
        known, slots[list(moe.rows)], num_experts, [names[row] for row in moe.rows], moe.layers,
        engine="sglang", dispatch="sglang_static",
    )
    return ImportedPlan(plan, notes + _row_notes(rows, moe, num_experts, known.model))


def write(plan: Plan, path: Path, model: ModelSpec | None) -> tuple[str, ...]:
    """Dense layers get SGLang's own default row. Needs the model's number of hidden layers."""
    rows_LS = even_rows_LS(plan, "SGLang")
    if model is None or model.total_layers is None:
        raise UsageError(
            "SGLang's file has a row for every hidden layer, dense ones too, and a plan knows "
            "MoE layers only: name the model with --model (one by hand needs total_layers)"
        )
    layers, notes = model_layers(plan, model)
    drafted = set(draft_layers(model)) & set(layers or ())
    total = max(drafted) + 1 if drafted else model.total_layers
    if layers is None or max(layers) >= total:
        raise UsageError(
            f"the plan's layers do not fit total_layers {model.total_layers} of {model.name}: "
            "correct the ModelSpec"
        )
    slots = rows_LS.shape[1]
    table = np.tile(np.arange(slots) % plan.num_experts, (total, 1))
    table[list(layers)] = rows_LS
    with replacing(path) as file:
        if path.suffix == ".pt":
            import torch

            torch.save({KEY: torch.from_numpy(table)}, file)
        else:
            file.write((json.dumps({KEY: table.tolist()}) + "\n").encode())
    start = (
        f"start SGLang on {plan.num_devices} ranks with --init-expert-location {path} "
        f"--ep-num-redundant-experts {slots - plan.num_experts}"
    )
    option = DISPATCH_OPTIONS.get(plan.dispatch.policy) if slots > plan.num_experts else None
    return (f"{start} {option}" if option else start, *notes)


def _table(path: Path) -> list[object]:
    document = read_pt(path) if path.suffix == ".pt" else read_json(path)
    if isinstance(document, dict) and KEY not in document and "logical_count" in document:
        raise InputError(
            f"{path}: holds loads (logical_count), not a plan: `loadmaster plan {path} --out "
            "plan.json` makes one from them"
        )
    if isinstance(document, list) and document:
        raise InputError(
            f"{path}: must be a mapping with {KEY}; is a list without it, as vLLM's plans are: "
            "--format vllm reads it"
        )
    table = require_keys(document, [KEY], str(path))[KEY]
    if path.suffix == ".pt":
        table = whole_array(table, "layer, slot", f"{path}: {KEY}").tolist()
    if not isinstance(table, list) or not table:
        raise InputError(f"{path}: {KEY} must be a list of layers, not {shown(table)}")
    return table


def _row_notes(
    rows: list[list[int]], moe: LayerRows, num_experts: int, model: ModelSpec | None
) -> tuple[str, ...]:
    if model is not None:
        if len(rows) < hidden_layers(model):
            return (*moe.notes, (
                f"{len(rows)} rows, taken by position for the model's MoE layers "
                f"{written(moe.layers)}; SGLang itself wants a row for each of the "
                f"{hidden_layers(model)} hidden layers: `loadmaster plan-export --format sglang` "
                "writes such a file"
            ))
        return moe.notes
    default = [
        str(layer) for layer, row in enumerate(rows)
        if row == [slot % num_experts for slot in range(len(row))]
    ]
    said = f"; SGLang's default fills layer {', '.join(default)}, perhaps dense" if default else ""
    return (f"every row is taken for a MoE layer{said}: --model tells which are",)
