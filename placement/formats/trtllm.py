"""TensorRT-LLM's plan: the load balancer's YAML, strict about its keys.

Keys of initial_global_assignments are model layer indices of MoE layers, draft layers' too; slot j
is on rank j // (num_slots / ranks). What the engine defaults may be absent.
"""

from __future__ import annotations

from pathlib import Path

from ...errors import InputError, UsageError
from ...foundation.atomic_file import replacing
from ...foundation.documents import read_yaml
from ...traces.model_layers import draft_layers
from ...traces.model_spec import ModelSpec
from ..plan import Plan
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

ASSIGNMENTS, UPDATES, SLOTS = "initial_global_assignments", "layer_updates_per_iter", "num_slots"
MODE, OTHER = "mode", ("auxiliary_sms",)     # of newer engines


def read(known: Known) -> ImportedPlan:
    """Raises InputError on a key too many, a list that is not num_slots long, a missing layer."""
    path = known.path
    document = read_yaml(path)
    if isinstance(document, dict) and document.get(ASSIGNMENTS) is None and (
        SLOTS in document or UPDATES in document
    ):
        raise InputError(
            f"{path}: has no {ASSIGNMENTS}: TensorRT-LLM then places experts itself, and there is "
            "no plan to import: plan from its statistics, `loadmaster plan FOLDER --out plan.json`"
        )
    document = require_keys(document, (ASSIGNMENTS, SLOTS), str(path), (UPDATES, MODE, *OTHER))
    num_slots = _whole(document[SLOTS], 1, f"{path}: {SLOTS}")
    updates = _whole(document.get(UPDATES, 0), 0, f"{path}: {UPDATES}")
    if document.get(MODE, "standard") != "standard":
        raise InputError(
            f"{path}: {MODE} {shown(document[MODE])} takes no plan, TensorRT-LLM then refuses "
            f"{ASSIGNMENTS}: set it to standard"
        )
    table = _table(path, document[ASSIGNMENTS])
    for layer, row in table.items():
        if len(row) != num_slots:
            raise InputError(
                f"{path}: layer {layer} lists {len(row)} slots, {SLOTS} says {num_slots}: every "
                "slot of every layer needs an expert"
            )
    layers, said = _layers(known, table)
    names = [f"layer {layer}" for layer in layers]
    slots = split_rows([table[layer] for layer in layers], names, known.devices(), path)
    num_experts, notes = known.experts(int(slots.max()))
    plan = build_plan(
        known, slots, num_experts, names, layers, engine="trtllm", dispatch="trtllm_round_robin"
    )
    if updates:
        notes += (f"{UPDATES} is {updates}: TensorRT-LLM starts from this plan and changes it",)
    return ImportedPlan(plan, notes + said)


def write(plan: Plan, path: Path, model: ModelSpec | None) -> tuple[str, ...]:
    """A static plan: no updates while the engine runs."""
    rows_LS = even_rows_LS(plan, "TensorRT-LLM")
    layers, notes = model_layers(plan, model)
    if layers is None:
        raise UsageError(
            "TensorRT-LLM names layers by the model's own index, and this plan counts MoE layers "
            "from 0: name the model with --model"
        )
    lines = [f"{ASSIGNMENTS}:"]
    lines += [f"  {layer}: {row}" for layer, row in zip(layers, rows_LS.tolist(), strict=True)]
    lines += [f"{UPDATES}: 0", f"{SLOTS}: {rows_LS.shape[1]}", ""]
    with replacing(path) as file:
        file.write("\n".join(lines).encode())
    return (
        f"name {path} as load_balancer in TensorRT-LLM's MoE configuration, expert parallelism "
        f"{plan.num_devices}", *notes,
    )


def _layers(
    known: Known, table: dict[int, list[int]]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The file's layers, and notes; the model's MoE layers must all be among them."""
    layers = tuple(sorted(table))
    if known.model is None:
        return layers, ()
    own, draft = known.model.own_layer_indices(), draft_layers(known.model)
    for layer in sorted(set(own) ^ set(table)):
        if layer in own or layer not in draft:
            fault = "is missing" if layer in own else "is no MoE layer of the model"
            raise InputError(
                f"{known.path}: layer {layer} {fault}: TensorRT-LLM wants each MoE layer once"
            )
    return layers, known.rows(len(layers), layers).notes


def _table(path: Path, value: object) -> dict[int, list[int]]:
    if not isinstance(value, dict) or not value:
        raise InputError(f"{path}: {ASSIGNMENTS} must map layers to slots, not {shown(value)}")
    return {
        _whole(layer, 0, f"{path}: a layer of {ASSIGNMENTS}"):
            expert_ids(row, f"{path}: layer {shown(layer)}")
        for layer, row in value.items()
    }


def _whole(value: object, low: int, where: str) -> int:
    if type(value) is not int or not low <= value < 2**31:
        raise InputError(f"{where}: must be a whole number from {low}, not {shown(value)}")
    return value
