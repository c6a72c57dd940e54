"""What every importer starts from and hands back, and the checks they share.

Knows rows of expert numbers. Knows nothing of any engine's file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError, UsageError
from ...traces.spec import ModelSpec
from ..plan import Plan, PlanError, Provenance


@dataclass(frozen=True)
class ImportedPlan:
    """An engine's plan as ours, and what its file could not tell."""

    plan: Plan
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Known:
    """The file, and what the caller knows that the file may not say."""

    path: Path
    num_devices: int | None
    num_experts: int | None
    model: ModelSpec | None

    def bytes(self) -> bytes:
        """The file's content. Raises InputError when there is none."""
        try:
            return self.path.read_bytes()
        except (FileNotFoundError, IsADirectoryError) as error:
            raise InputError(f"{self.path}: no such plan file") from error

    def text(self) -> str:
        """The file's content as UTF-8."""
        try:
            return self.bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path}: not a text file") from error

    def devices(self) -> int:
        """Devices, for files that do not say. Raises UsageError when the caller did not either."""
        if self.num_devices is None:
            raise UsageError(
                f"{self.path}: this format does not say on how many devices its slots lie: "
                "give the number (--devices)"
            )
        if self.num_devices < 1:
            raise UsageError(f"{self.num_devices} devices: at least 1")
        return self.num_devices


def whole_numbers(value: Any, where: str) -> list[int]:
    """A list of integers, nothing else (True is none). Raises InputError naming the place."""
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: must be a list of expert numbers, is {type(value).__name__}")
    for position, item in enumerate(value):
        if type(item) is not int:
            raise InputError(f"{where}, slot {position}: {item!r} is not a whole number")
    return value


def build(
    known: Known,
    rows: Sequence[Sequence[int]],
    names: Sequence[str],
    layer_indices: Sequence[int],
    engine: str,
    notes: Sequence[str] = (),
) -> ImportedPlan:
    """A plan from one full row of global slots per layer; slot s lies on device s // (S / G).

    names: what to call each row in an error. Raises InputError on rows of different length, slots
    that do not divide, unknown experts, and experts without a slot.
    """
    said = list(notes)
    devices, width = known.devices(), len(rows[0])
    for name, row in zip(names, rows, strict=True):
        if len(row) != width:
            raise InputError(
                f"{known.path}: {name} has {len(row)} slots, {names[0]} has {width}: all layers "
                "need the same number"
            )
    if width % devices:
        raise InputError(
            f"{known.path}: {width} slots do not divide over {devices} devices: wrong number of "
            "devices?"
        )
    experts = known.num_experts
    if experts is None:
        experts = max(max(row) for row in rows) + 1
        said.append(f"the file does not say how many experts there are: took {experts}")
    for name, row in zip(names, rows, strict=True):
        check_row(known.path, name, row, experts)
    slots = np.array(rows, np.int64).reshape(len(rows), devices, width // devices)
    return ImportedPlan(plan_of(slots, experts, layer_indices, engine), tuple(said))


def check_row(path: Path, name: str, row: Sequence[int], experts: int) -> None:
    """Every expert known and none missing in one layer's slots."""
    for slot, expert in enumerate(row):
        if not 0 <= expert < experts:
            raise InputError(
                f"{path}: {name}, slot {slot} names expert {expert}; experts are 0..{experts - 1}"
            )
    missing = sorted(set(range(experts)) - set(row))
    if missing:
        raise InputError(
            f"{path}: {name} has no slot for expert {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + ": tokens sent there would be lost"
        )


def plan_of(slots: Any, experts: int, layer_indices: Sequence[int], engine: str) -> Plan:
    """The plan, with where it came from."""
    try:
        return Plan(
            slots=slots, num_experts=experts, layer_indices=tuple(layer_indices),
            provenance=Provenance(method=f"imported from {engine}"),
        )
    except PlanError as error:
        raise InputError(str(error)) from error
