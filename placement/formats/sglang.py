"""SGLang's plan (`--init-expert-location`): {"physical_to_logical_map": rows of experts by slot}.

That key alone: SGLang fails on any other. One row per hidden layer of the model, dense ones too;
slot s lies on rank s // (S / ranks). SGLang checks none of it on load. A .pt file with the same key
and an integer tensor is read as well.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...traces.atomic_file import replacing
from ...traces.spec import ModelSpec
from ..plan import Plan
from .full_rows import full_rows, model_layers
from .imported import ImportedPlan, Known, build, whole_numbers

HOLDS_DUPLICATES = True
HOLDS_UNEVEN = False
KEY = "physical_to_logical_map"


def write(plan: Plan, path: Path, model: ModelSpec | None) -> tuple[str, ...]:
    """Dense layers get the trivial row (slot s holds s mod E), which nothing reads."""
    rows = full_rows(plan, "SGLang")
    layers, notes = model_layers(plan, model)
    total = max(layers) + 1
    if model is not None and model.total_layers is not None:
        total = model.total_layers
    elif model is None:
        notes = (*notes, f"no model given: took layer {total - 1} for the model's last")
    table = [[s % plan.num_experts for s in range(rows.shape[1])] for _ in range(total)]
    for layer, row in zip(layers, rows, strict=True):
        table[layer] = row.tolist()
    with replacing(path) as file:
        file.write(json.dumps({KEY: table}).encode())
    return notes


def read(known: Known) -> ImportedPlan:
    """Rows of MoE layers; which these are only the model can tell."""
    table = _table(known)
    where = [f"layer {i}" for i in range(len(table))]
    rows = [whole_numbers(row, f"{known.path}: {name}") for row, name in
            zip(table, where, strict=True)]
    model = known.model
    if model is None:
        note = "every row is taken for a MoE layer: give the model if some of its layers are dense"
        return build(known, rows, where, range(len(rows)), "sglang", [note])
    layers = model.own_layer_indices()
    total = model.total_layers or max(layers) + 1
    if len(rows) != total:
        raise InputError(
            f"{known.path}: {len(rows)} rows, but {model.name} has {total} hidden layers, and "
            "SGLang's file has one row for each"
        )
    return build(known, [rows[i] for i in layers], [where[i] for i in layers], layers, "sglang")


def _table(known: Known) -> list[Any]:
    content = _tensors(known) if known.path.suffix == ".pt" else _json(known)
    if not isinstance(content, dict) or KEY not in content:
        raise InputError(f'{known.path}: not an SGLang plan: it needs the key "{KEY}"')
    extra = sorted(str(k) for k in content if k != KEY)
    if extra:
        raise InputError(
            f'{known.path}: key "{extra[0]}" beside "{KEY}": SGLang refuses any other key; take it '
            "out"
        )
    table = content[KEY]
    if not isinstance(table, list) or not table:
        raise InputError(f"{known.path}: {KEY} must be a list of rows, one per layer")
    return table


def _json(known: Known) -> Any:
    try:
        return json.loads(known.text())
    except ValueError as error:
        raise InputError(f"{known.path}: not JSON: {error}") from error


def _tensors(known: Known) -> Any:
    import torch  # slow to import, and only this reads .pt

    try:
        content = torch.load(io.BytesIO(known.bytes()), weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises many kinds on a file that is not its own
        raise InputError(f"{known.path}: not a torch file of plain tensors") from error
    if isinstance(content, dict):
        return {k: v.tolist() if hasattr(v, "tolist") else v for k, v in content.items()}
    return content
