"""TensorRT-LLM's plan (the load balancer's YAML): initial_global_assignments, num_slots and
layer_updates_per_iter, these three keys alone.

Assignments are keyed by the model's own layer index, MoE layers only; a MoE layer that is missing
is a KeyError in the engine. Slot j lies on rank j // (num_slots / ranks).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ...errors import InputError
from ...traces.atomic_file import replacing
from ...traces.spec import ModelSpec
from ..plan import Plan
from .full_rows import full_rows, model_layers
from .imported import ImportedPlan, Known, build, whole_numbers

HOLDS_DUPLICATES = True
HOLDS_UNEVEN = False
ASSIGNMENTS, UPDATES, SLOTS = "initial_global_assignments", "layer_updates_per_iter", "num_slots"


def write(plan: Plan, path: Path, model: ModelSpec | None) -> tuple[str, ...]:
    """A static plan: layer_updates_per_iter 0."""
    rows = full_rows(plan, "TensorRT-LLM")
    layers, notes = model_layers(plan, model)
    lines = [f"{ASSIGNMENTS}:"]
    lines += [f"  {layer}: {row.tolist()}" for layer, row in zip(layers, rows, strict=True)]
    lines += [f"{UPDATES}: 0", f"{SLOTS}: {rows.shape[1]}", ""]
    with replacing(path) as file:
        file.write("\n".join(lines).encode())
    return (*notes, f"{UPDATES} is 0: the engine keeps this plan and does not re-plan")


def read(known: Known) -> ImportedPlan:
    """All three keys checked; layers in ascending order of their index."""
    content = _yaml(known)
    assignments, slots = content.get(ASSIGNMENTS), content.get(SLOTS)
    if not isinstance(assignments, dict) or not assignments:
        raise InputError(f"{known.path}: {ASSIGNMENTS} holds no layer: there is no plan in it")
    if type(slots) is not int or slots < 1:
        raise InputError(f"{known.path}: {SLOTS} must be a whole number, is {slots!r}")
    for layer in assignments:
        if type(layer) is not int or layer < 0:
            raise InputError(f"{known.path}: layer {layer!r} is not a layer index")
    layers = sorted(assignments)
    _check_layers(known, layers)
    names = [f"layer {layer}" for layer in layers]
    rows = []
    for layer, name in zip(layers, names, strict=True):
        row = whole_numbers(assignments[layer], f"{known.path}: {name}")
        if len(row) != slots:
            raise InputError(f"{known.path}: {name} lists {len(row)} slots, {SLOTS} says {slots}")
        rows.append(row)
    notes = []
    if content.get(UPDATES):
        notes.append(f"{UPDATES} is {content[UPDATES]}: the engine will not keep this plan")
    return build(known, rows, names, layers, "trtllm", notes)


def _check_layers(known: Known, layers: list[int]) -> None:
    model = known.model
    if model is None:
        return
    own = model.own_layer_indices()
    missing = sorted(set(own) - set(layers))
    unknown = sorted(set(layers) - set(own))
    if missing:
        raise InputError(f"{known.path}: MoE layer {missing[0]} of {model.name} is missing")
    if unknown:
        raise InputError(f"{known.path}: layer {unknown[0]} is no MoE layer of {model.name}")


class _OncePerKey(yaml.SafeLoader):
    """YAML lets a later key replace an earlier one without a word; a plan must not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.YAMLError(f"key {key!r} occurs twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _yaml(known: Known) -> dict[Any, Any]:
    try:
        content = yaml.load(known.text(), Loader=_OncePerKey)  # a SafeLoader
    except (yaml.YAMLError, TypeError) as error:
        first_line = str(error).splitlines()[0]
        raise InputError(f"{known.path}: not usable YAML: {first_line}") from error
    keys = {ASSIGNMENTS, UPDATES, SLOTS}
    if not isinstance(content, dict) or not keys >= set(content):
        extra = sorted(map(str, set(content) - keys)) if isinstance(content, dict) else []
        raise InputError(
            f"{known.path}: not a TensorRT-LLM plan: it takes {', '.join(sorted(keys))} alone"
            + (f", not {extra[0]!r}" if extra else "")
        )
    return content
