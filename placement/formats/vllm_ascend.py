"""vllm-ascend's plan (expert_map_path): JSON, each MoE layer's devices with their experts.

The engine reads layers and devices by position, whatever their ids say, and derives slot numbers
from the number of distinct experts on device 0: ids out of order or an expert twice on a device
would corrupt its numbering without a word, so both are refused. Writers count layers from 0, from
1, or by the model's own numbers; some leave counts out, some add keys of their own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...foundation.atomic_file import replacing
from ...foundation.documents import read_json
from ...traces.model_config.layer_ranges import written
from ...traces.model_spec import ModelSpec
from ..plan import Plan
from .even_rows import even_rows_LS, refuse_duplicates
from .imported import (
    ImportedPlan,
    Known,
    build_plan,
    expert_ids,
    moe_layer_names,
    require_mapping_with,
    shown,
    split_rows,
)

LAYERS, DEVICES, EXPERTS = "layer_list", "device_list", "device_expert"


def read(known: Known) -> ImportedPlan:
    """As the engine: by position, whatever ids count from; keys it does not read are left unread.

    Leading devices that hold expert 0 alone are shared experts' and left out. Raises InputError
    where counts or positions disagree, naming layer and device.
    """
    path = known.path
    document = require_mapping_with(read_json(path), ("moe_layer_count", LAYERS), str(path))
    unread = set(document) - {"moe_layer_count", LAYERS}
    entries = _listed(document, "moe_layer_count", LAYERS, str(path))
    layers = [_layer(entry, layer, path) for layer, entry in enumerate(entries)]
    for layer, held in enumerate(layers):
        if len(held) != len(layers[0]):
            raise InputError(
                f"{path}: MoE layer {layer} has {len(held)} devices, layer 0 has "
                f"{len(layers[0])}: all layers need the same"
            )
    shared, notes = _shared_devices(layers)
    layers = [held[shared:] for held in layers]
    for layer, held in enumerate(layers):
        _require_even(held, shared, f"{path}: MoE layer {layer}")
    names = moe_layer_names(len(layers))
    rows = [[expert for held in layer for expert in held] for layer in layers]
    devices = len(layers[0])
    if known.num_devices != devices + shared:
        devices = known.devices(devices)
    slots = split_rows(rows, names, devices, path)
    num_experts, inferred = known.experts(int(slots.max()))
    numbers, said = _layer_numbers(known, [entry.get("layer_id") for entry in entries])
    if unread:
        notes += (f"left unread, as by the engine: {', '.join(sorted(map(shown, unread)))}",)
    plan = build_plan(
        known, slots, num_experts, names, numbers, engine="vllm_ascend", dispatch="ascend_fixed",
    )
    return ImportedPlan(plan, inferred + notes + said)


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
    fields = require_mapping_with(entry, (DEVICES,), where)
    parts = _listed(fields, "device_count", DEVICES, where)
    held = [_device(part, f"{where}, device {device}") for device, part in enumerate(parts)]
    ids = [part.get("device_id") for part in parts]
    _require_counting([number for number in ids if number is not None], f"{where}: device_id")
    return held


def _device(part: object, where: str) -> list[int]:
    fields = require_mapping_with(part, (EXPERTS,), where)
    experts = expert_ids(fields[EXPERTS], where)
    if len(set(experts)) < len(experts):
        twice = min(expert for expert in experts if experts.count(expert) > 1)
        raise InputError(
            f"{where} holds expert {twice} twice, which corrupts vllm-ascend's slot numbers: put "
            "another expert there"
        )
    return experts


def _shared_devices(layers: list[list[list[int]]]) -> tuple[int, tuple[str, ...]]:
    """(leading devices that hold expert 0 alone in every layer, a note)."""
    count = 0
    while count < len(layers[0]) - 1 and all(held[count] == [0] for held in layers):
        count += 1
    if not count or any(
        len(held[count]) == 1 or not any(0 in experts for experts in held[count:])
        for held in layers
    ):
        return 0, ()
    which = "0" if count == 1 else f"0 to {count - 1}"
    return count, (
        f"device {which} holds expert 0 alone in every layer, as shared experts' devices are "
        f"written: left out; the plan is for the {len(layers[0]) - count} devices behind, counted "
        "from 0",
    )


def _require_even(held: list[list[int]], shared: int, where: str) -> None:
    for device, experts in enumerate(held):
        if len(experts) != len(held[0]):
            raise InputError(
                f"{where}, device {shared + device} holds {len(experts)} experts, device {shared} "
                f"holds {len(held[0])}: vllm-ascend needs the same number on all devices"
            )


def _layer_numbers(
    known: Known, ids: list[object]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """(the model's own layer numbers, a note): what layer_id counts, which the engine ignores."""
    given = [number for number in ids if number is not None]
    _require_counting(given, f"{known.path}: layer_id")
    own = known.layers(len(ids)) if known.model is not None else ()
    if not given or given == list(range(len(ids))):
        return own, ()
    if own and tuple(given) == own:
        return own, (f"layer_id says the model's own numbers, {written(own)}",)
    numbers = tuple(int(str(number)) for number in given)
    if own:
        return own, (
            f"layer_id says {written(numbers)}, and the model's MoE layers are {written(own)}: "
            "taken by position, as by the engine",
        )
    if given == list(range(1, len(ids) + 1)):
        return (), (
            "layer_id counts from 1; the engine reads by position, and so does this: --model tells "
            "whether these are the model's own numbers",
        )
    return numbers, (
        f"layer_id is taken for the model's own numbers, {written(numbers)}; the engine itself "
        "reads by position",
    )


def _listed(fields: dict[str, Any], count: str, name: str, where: str) -> list[Any]:
    """The list `name` of mappings, as long as `count` says where that is there."""
    entries = fields[name]
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{where}: {name} must be a list, not {shown(entries)}")
    said = fields.get(count, len(entries))
    if type(said) is not int or said != len(entries):
        raise InputError(
            f"{where}: {count} is {shown(said)}, but {name} holds {len(entries)}"
        )
    return entries


def _require_counting(ids: list[object], where: str) -> None:
    """Ids rise, or the list is not in the order that the engine will take it in."""
    for position, number in enumerate(ids):
        if type(number) is not int or number < 0 or number >= 2**31:
            raise InputError(f"{where} {shown(number)} at position {position} is no number from 0")
        if position and not number > ids[position - 1]:  # type: ignore[operator]
            raise InputError(
                f"{where} is {number} at position {position}, after {ids[position - 1]}: "
                "vllm-ascend reads by position, so sort the list"
            )
