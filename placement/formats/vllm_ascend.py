"""vllm-ascend's plan (`expert_map_path`): layers, each with devices, each with its experts.

The engine reads layers and devices by position and ignores their ids, needs as many slots on every
device, and numbers slots by the count of distinct experts on device 0: an expert twice on a device
would corrupt the numbering. So ids must agree with positions here, and duplicates are refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError
from ...traces.atomic_file import replacing
from ...traces.spec import ModelSpec
from ..plan import Plan
from .full_rows import full_rows, model_layers, refuse_duplicates
from .imported import ImportedPlan, Known, check_row, plan_of, whole_numbers

HOLDS_DUPLICATES = False
HOLDS_UNEVEN = False


def write(plan: Plan, path: Path, model: ModelSpec | None) -> tuple[str, ...]:
    """Layers are counted over MoE layers from 0, whatever the model calls them."""
    full_rows(plan, "vllm-ascend")
    refuse_duplicates(plan, "vllm-ascend", "cannot hold an expert twice on a device")
    model_layers(plan, model)
    layers = [
        {
            "layer_id": layer,
            "device_count": plan.num_devices,
            "device_list": [
                {"device_id": g, "device_expert": [int(e) for e in plan.slots[layer, g]]}
                for g in range(plan.num_devices)
            ],
        }
        for layer in range(plan.num_layers)
    ]
    document = {"moe_layer_count": plan.num_layers, "layer_list": layers}
    with replacing(path) as file:
        file.write(json.dumps(document, indent=4).encode())
    return ()


def read(known: Known) -> ImportedPlan:
    """Devices come from the file; the model's own layer numbers from the model, if given."""
    try:
        document = json.loads(known.text())
    except ValueError as error:
        raise InputError(f"{known.path}: not JSON: {error}") from error
    layers = _listed(known, document, "layer_list", "moe_layer_count", "the file")
    slots = [_layer(known, layer, position) for position, layer in enumerate(layers)]
    if len({(len(rows), len(rows[0])) for rows in slots}) > 1:
        raise InputError(
            f"{known.path}: layers differ in devices or slots; vllm-ascend reads them as one table"
        )
    if known.num_devices not in (None, len(slots[0])):
        raise InputError(
            f"{known.path}: the file has {len(slots[0])} devices, not {known.num_devices}"
        )
    notes = []
    experts = known.num_experts
    if experts is None:
        experts = int(np.max(slots)) + 1
        notes.append(f"the file does not say how many experts there are: took {experts}")
    for position, rows in enumerate(slots):
        check_row(known.path, f"layer {position}", [e for row in rows for e in row], experts)
    model = known.model
    if model is not None and model.num_layers != len(slots):
        raise InputError(
            f"{known.path}: {len(slots)} layers, the model {model.name} has {model.num_layers}"
        )
    indices = model.own_layer_indices() if model else ()
    return ImportedPlan(plan_of(np.array(slots), experts, indices, "vllm_ascend"), tuple(notes))


def _layer(known: Known, layer: Any, position: int) -> list[list[int]]:
    """One layer's experts by device, checked."""
    where = f"layer {position}"
    devices = _listed(known, layer, "device_list", "device_count", where)
    _check_id(known, layer, "layer_id", position, where)
    rows: list[list[int]] = []
    for g, device in enumerate(devices):
        place = f"{where}, device {g}"
        _check_id(known, device, "device_id", g, place)
        row = whole_numbers(device.get("device_expert"), f"{known.path}: {place}")
        twice = sorted({e for e in row if row.count(e) > 1})
        if twice:
            raise InputError(
                f"{known.path}: {place} lists expert {twice[0]} twice: vllm-ascend's slot numbers "
                "would be wrong from there on"
            )
        if rows and len(row) != len(rows[0]):
            raise InputError(
                f"{known.path}: {place} has {len(row)} slots, device 0 has {len(rows[0])}"
            )
        rows.append(row)
    return rows


def _listed(known: Known, holder: Any, key: str, count_key: str, where: str) -> list[Any]:
    items = holder.get(key) if isinstance(holder, dict) else None
    if not isinstance(items, list) or not items:
        raise InputError(f"{known.path}: {where} has no {key}: not a vllm-ascend plan")
    if holder.get(count_key) != len(items):
        raise InputError(
            f"{known.path}: {where} says {count_key} {holder.get(count_key)!r}, {key} has "
            f"{len(items)}"
        )
    return items


def _check_id(known: Known, holder: Any, key: str, position: int, where: str) -> None:
    if not isinstance(holder, dict) or holder.get(key) != position:
        given = holder.get(key) if isinstance(holder, dict) else holder
        raise InputError(
            f"{known.path}: {where} has {key} {given!r}; vllm-ascend goes by position, so it must "
            f"be {position}"
        )
