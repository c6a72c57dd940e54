"""What an importer is given, what it returns, and the checks that all importers share.

Knows slots, experts and layer numbers. Knows nothing of any engine's file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import InputError, UsageError
from ...traces.model_layers import (
    LayerRows,
    draft_layers,
    layers_in_model,
    rows_of_model,
)
from ...traces.model_spec import ModelSpec
from ..cost.unplanned import layers_of
from ..plan import DispatchSpec, Plan, Provenance

MAX_EXPERTS = 32767


@dataclass(frozen=True)
class ImportedPlan:
    """An engine's plan as ours, and what its file could not tell."""

    plan: Plan
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Known:
    """The file, and what the caller knows in addition."""

    path: Path
    num_devices: int | None = None
    num_experts: int | None = None
    model: ModelSpec | None = None

    def __post_init__(self) -> None:
        for name, value in (("devices", self.num_devices), ("experts", self.num_experts)):
            if value is not None and not 1 <= value <= MAX_EXPERTS:
                raise UsageError(f"the number of {name}, {value}, must lie in [1, {MAX_EXPERTS}]")
        if self.model is not None and self.num_experts not in (None, self.model.num_experts):
            raise UsageError(
                f"{self.num_experts} experts were asked for, but the model has "
                f"{self.model.num_experts}: leave --num-experts out"
            )

    def devices(self, stated: int | None = None) -> int:
        """G: what the file says, which the caller must not contradict, else what they know."""
        found = self.num_devices if stated is None else stated
        if found is None:
            raise UsageError(
                f"{self.path}: this format does not say on how many devices its slots lie: give "
                "--devices"
            )
        if self.num_devices not in (None, found):
            raise UsageError(
                f"{self.path}: is for {found} devices, not {self.num_devices}: leave --devices "
                "out, or plan anew"
            )
        return found

    def experts(self, largest: int, stated: int | None = None) -> tuple[int, tuple[str, ...]]:
        """(E, notes): from the file, the model or the caller, else from the largest id named."""
        wanted = self.model.num_experts if self.model is not None else self.num_experts
        if stated is not None and wanted not in (None, stated):
            raise InputError(
                f"{self.path}: is for {stated} experts per layer, not {wanted}: it belongs to "
                "another model"
            )
        found = stated if stated is not None else wanted
        if found is not None:
            return found, ()
        return largest + 1, (
            f"{largest + 1} experts per layer, going by the largest id in the file: --num-experts "
            "or --model makes sure of it",
        )

    def layers(self, found: int) -> tuple[int, ...]:
        """The model's own numbers of the `found` MoE layers, its draft layers perhaps behind them;
        () without a model. Raises InputError where they are not as many.
        """
        if self.model is None:
            return ()
        own, draft = self.model.own_layer_indices(), draft_layers(self.model)
        for numbers in (own, own + draft):
            if len(numbers) == found:
                return numbers
        raise InputError(
            f"{self.path}: holds {found} MoE layers, the model {self.model.name} has "
            f"{self.model.num_layers}: it belongs to another model"
        )

    def rows(self, found: int, numbers: Sequence[int] | None = None) -> LayerRows:
        """Which of the file's rows are which of the model's layers. Raises InputError."""
        if self.model is None:
            return LayerRows(tuple(range(found)), tuple(numbers or range(found)))
        try:
            return rows_of_model(self.model, found, numbers)
        except InputError as error:
            raise InputError(f"{self.path}: {error.typed}") from None


def expert_ids(value: object, where: str) -> list[int]:
    """A list of whole numbers that can be expert ids. Raises InputError naming the slot."""
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: must be a list of expert ids, not {shown(value)}")
    for slot, expert in enumerate(value):
        if type(expert) is not int or not 0 <= expert < MAX_EXPERTS:
            raise InputError(
                f"{where}, slot {slot}: {shown(expert)} is no expert id: a whole number from 0 to "
                f"{MAX_EXPERTS - 1}"
            )
    return value


def shown(value: object) -> str:
    """A foreign value in a message: short, whatever it is."""
    if isinstance(value, (list, dict, tuple)):
        return f"{'a' if value else 'an empty'} {type(value).__name__}"
    if type(value) is int and abs(value) >= 2**63:
        return "a number beyond 64 bits"
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def require_keys(
    document: object, needed: Sequence[str], where: str, optional: Sequence[str] = ()
) -> dict[str, Any]:
    """A mapping with these keys and no others. Raises InputError naming the first that is off."""
    found = require_mapping_with(document, needed, where)
    known = (*needed, *optional)
    for key in found:
        if key not in known:
            raise InputError(
                f"{where}: the key {shown(key)} must go: the format has {', '.join(known)} alone"
            )
    return found


def require_mapping_with(
    document: object, needed: Sequence[str], where: str
) -> dict[str, Any]:
    """A mapping with these keys and any others. Raises InputError naming the first it lacks."""
    if not isinstance(document, dict):
        raise InputError(f"{where}: must be a mapping with {', '.join(needed)}; is "
                         f"{shown(document)}")
    for key in needed:
        if key not in document:
            raise InputError(f"{where}: lacks the key {key!r}")
    return document


def split_rows(
    rows: Sequence[Sequence[int]], names: Sequence[str], num_devices: int, path: Path
) -> npt.NDArray[np.int64]:
    """[L, G, C] of rows of S = G * C slots; slot s is on device s // C.

    Raises InputError where a row is longer or shorter than most, or S does not divide.
    """
    lengths = [len(row) for row in rows]
    usual = max(sorted(set(lengths)), key=lengths.count)
    for name, length in zip(names, lengths, strict=True):
        if length != usual:
            raise InputError(
                f"{path}: {name} has {length} slots, the other layers have {usual}: all layers "
                "need the same number"
            )
    if usual % num_devices:
        raise InputError(
            f"{path}: {usual} slots per layer do not divide over {num_devices} devices: check "
            "--devices against the engine's number of ranks"
        )
    return np.array(rows, np.int64).reshape(len(rows), num_devices, -1)


def build_plan(
    known: Known,
    slots_LGC: npt.NDArray[np.int64],
    num_experts: int,
    names: Sequence[str],
    layer_indices: tuple[int, ...],
    *,
    engine: str,
    dispatch: str,
) -> Plan:
    """The plan; faults are named by what the file calls its layers."""
    unknown = np.argwhere(slots_LGC >= num_experts)
    if len(unknown):
        layer, device, slot = unknown[0]
        raise InputError(
            f"{known.path}: {names[layer]}, device {device}, slot {slot} holds expert "
            f"{slots_LGC[layer, device, slot]}; a layer has experts 0 to {num_experts - 1}"
        )
    for name, row in zip(names, slots_LGC, strict=True):
        missing = np.setdiff1d(np.arange(num_experts), row)
        if len(missing):
            more = f", nor have {len(missing) - 1} more" if len(missing) > 1 else ""
            raise InputError(
                f"{known.path}: {name}: expert {missing[0]} has no slot on any device{more}; "
                "tokens sent there would be lost: give it one"
            )
    return Plan(
        slots=slots_LGC.astype(np.int16), num_experts=num_experts, layer_indices=layer_indices,
        dispatch=DispatchSpec(policy=dispatch),
        provenance=Provenance(method=f"imported from {engine}"),
    )


def moe_layer_names(count: int) -> list[str]:
    """For files that count MoE layers from 0."""
    return [f"MoE layer {layer}" for layer in range(count)]


def named_layers(plan: Plan) -> tuple[int, ...]:
    """The plan's layer numbers; () where they merely count up from 0."""
    return () if plan.layer_indices == tuple(range(plan.num_layers)) else plan.layer_indices


def model_layers(plan: Plan, model: ModelSpec | None) -> tuple[tuple[int, ...] | None, list[str]]:
    """(the model's own index of every layer, notes); None where neither plan nor model tells.

    Raises InputError where both tell and differ.
    """
    named = named_layers(plan)
    if model is None:
        return named or None, []
    try:
        layers = layers_in_model(model, layers_of(plan))
    except InputError as error:
        raise InputError(f"the plan's {error.typed}") from None
    moved = not named and layers != tuple(range(plan.num_layers))
    return layers, (
        [f"layers are taken to be the model's MoE layers, {layers[0]} to {layers[-1]}"]
        if moved else []
    )
