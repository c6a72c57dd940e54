"""vllm-ascend's plan (expert_map_path): JSON, each MoE layer's devices with their experts.

The engine reads layers and devices by position and derives slot numbers from the number of
distinct experts on device 0: an id out of place or an expert twice on a device would corrupt its
numbering without a word, so both are refused, either way.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...foundation.atomic_file import replacing
from ...foundation.documents import read_json
from ...traces.model_spec import ModelSpec
from ..plan import Plan
from .even_rows import even_rows_LS, refuse_duplicates
from .imported import (
    ImportedPlan,
    Known,
    build_plan,
    expert_ids,
    moe_layer_names,
    require_keys,
    shown,
    split_rows,
)

LAYERS, DEVICES, EXPERTS = "layer_list", "device_list", "device_expert"


def read(known: Known) -> ImportedPlan:
    """Raises InputError where counts, ids or positions disagree, naming layer and device."""
    path = known.path
    document = require_keys(read_json(path), ("moe_layer_count", LAYERS), str(path))
    entries = _listed(document, "moe_layer_count", LAYERS, str(path))
    layers = [_layer(entry, layer, path) for layer, entry in enumerate(entries)]
    for layer, held in enumerate(layers):
        if len(held) != len(layers[0]):
            raise InputError(
                f"{path}: MoE layer {layer} has {len(held)} devices, layer 0 has "
                f"{len(layers[0])}: all layers need the same"
            )
    names = moe_layer_names(len(layers))
    rows = [[expert for held in layer for expert in held] for layer in layers]
    slots = split_rows(rows, names, known.devices(len(layers[0])), path)
    num_experts, notes = known.experts(int(slots.max()))
    plan = build_plan(
        known, slots, num_experts, names, known.layers(len(layers)), engine="vllm_ascend",
        dispatch="ascend_fixed",
    )
    return ImportedPlan(plan, notes)


def write(plan: Plan, path: Path, model: ModelSpec | None) -> tuple[str, ...]:
    """Layers counted from 0 in MoE layers, as the engine reads them."""
    refuse_duplicates(plan, "vllm-ascend", "it corrupts the engine's slot numbers")
    rows_LGC = even_rows_LS(plan, "vllm-ascend").reshape(plan.num_layers, plan.num_devices, -1)
    document = {"moe_layer_count": plan.num_layers, LAYERS: [
        {"layer_id": layer, "device_count": plan.num_devices, DEVICES: [
            {"device_id": device, EXPERTS: held} for device, held in enumerate(held_GC)
        ]}
        for layer, held_GC in enumerate(rows_LGC.tolist())
    ]}
    with replacing(path) as file:
        file.write((json.dumps(document, indent=4) + "\n").encode())
    return (f"give {path} to vllm-ascend as expert_map_path, on {plan.num_devices} ranks",)


def _layer(entry: object, layer: int, path: Path) -> list[list[int]]:
    """Experts of each device."""
    where = f"{path}: MoE layer {layer}"
    fields = require_keys(entry, ("layer_id", "device_count", DEVICES), where)
    _require_position(fields["layer_id"], layer, f"{where}: layer_id")
    parts = _listed(fields, "device_count", DEVICES, where)
    held = [_device(part, device, f"{where}, device {device}")
            for device, part in enumerate(parts)]
    for device, experts in enumerate(held):
        if len(experts) != len(held[0]):
            raise InputError(
                f"{where}, device {device} holds {len(experts)} experts, device 0 holds "
                f"{len(held[0])}: vllm-ascend needs the same number on all devices"
            )
    return held


def _device(part: object, device: int, where: str) -> list[int]:
    fields = require_keys(part, ("device_id", EXPERTS), where)
    _require_position(fields["device_id"], device, f"{where}: device_id")
    experts = expert_ids(fields[EXPERTS], where)
    if len(set(experts)) < len(experts):
        twice = min(expert for expert in experts if experts.count(expert) > 1)
        raise InputError(
            f"{where} holds expert {twice} twice, which corrupts vllm-ascend's slot numbers: put "
            "another expert there"
        )
    return experts


def _listed(fields: dict[str, Any], count: str, name: str, where: str) -> list[Any]:
    """The list `name`, as long as `count` says."""
    entries = fields[name]
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{where}: {name} must be a list, not {shown(entries)}")
    if type(fields[count]) is not int or fields[count] != len(entries):
        raise InputError(
            f"{where}: {count} is {shown(fields[count])}, but {name} holds {len(entries)}"
        )
    return entries


def _require_position(value: object, position: int, where: str) -> None:
    if type(value) is not int or value != position:
        raise InputError(
            f"{where} is {shown(value)} at position {position}: vllm-ascend reads by position, "
            "so sort the list"
        )
