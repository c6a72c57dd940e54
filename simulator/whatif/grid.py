"""The what-if grid: which scenarios to try, read from YAML.

    base: {preset: h100, nodes: 1, devices_per_node: 8, slots_per_device: 5}
    axes: {nodes: [1, 2], method: [eplb, auto], failure: [none, slow]}
    failures: {slow: [{kind: slow_device, device: 0, factor: 2.0}]}
    slo: {ttft_us: 1000000, tpot_us: 50000}

Every combination of the axes' values is a cell; what no axis names comes from `base`. Knows fields
and their types. Knows nothing of how a cell is run. A value that cannot be is found when its cell
runs, so that it does not stop the others; an unknown field is an error at once.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...errors import InputError
from ...foundation.documents import first_fault, read_mapping
from ..events.fault_file import Fault, fault_of, fault_schema


class Scenario(BaseModel):
    """One cell: everything that may differ between scenarios."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    preset: str = "h100"
    nodes: int = Field(default=1, gt=0)
    devices_per_node: int = Field(default=8, gt=0)
    slots_per_device: int | None = Field(default=None, gt=0, description="None = just enough")
    traffic: str = "return_home/per_expert"
    nvlink: float = Field(default=1.0, gt=0, description="times the preset's NVLink rate")
    nic: float = Field(default=1.0, gt=0, description="times the preset's network rate")
    oversubscription: float | None = Field(default=None, ge=1, description="of a node's spine")
    reserved_bytes: int | None = Field(
        default=None, ge=0, description="of each device's memory, kept free of weights"
    )
    load: float = Field(default=1.0, gt=0, description="times the workload's rate")
    method: str = "eplb"
    dispatch: str = "balanced"
    overlap: Literal["none", "two_batch", "pipeline"] = "none"
    groups: int = Field(default=1, gt=0, description="equal clusters behind one queue")
    step_tokens: int = Field(default=8192, gt=0)
    max_requests: int = Field(default=1024, gt=0)
    failure: str = Field(default="none", description="a name under `failures`, or none")

    @property
    def devices(self) -> int:
        """Devices of all groups."""
        return self.nodes * self.devices_per_node * self.groups


class SloFields(BaseModel):
    """The service level that goodput counts."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    ttft_us: float = Field(gt=0)
    tpot_us: float = Field(gt=0)


class Grid(BaseModel):
    """The file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: dict[str, Any] = Field(default_factory=dict)
    axes: dict[str, list[Any]] = Field(default_factory=dict)
    failures: dict[str, list[dict[str, Any]]] = Field(default_factory=dict)
    slo: SloFields | None = None
    seed: int = Field(default=0, ge=0)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read and check a grid file. Raises InputError naming the field."""
        path = Path(path)
        data = read_mapping(path, "grid", "`base` and `axes`")
        return cls.parse(data, where=str(path))

    @classmethod
    def parse(cls, data: dict[str, Any], *, where: str = "grid") -> Self:
        """From a mapping. Raises InputError naming the field."""
        try:
            grid = cls.model_validate(data)
        except ValidationError as error:
            raise InputError(
                f"{where}: {first_fault(error, ', '.join(cls.model_fields))}"
            ) from error
        known = set(Scenario.model_fields)
        for section, names in (("base", grid.base), ("axes", grid.axes)):
            unknown = sorted(set(names) - known)
            if unknown:
                raise InputError(
                    f"{where}: {section}.{unknown[0]}: no such field; there are: "
                    f"{', '.join(sorted(known))}"
                )
        empty = [name for name, values in grid.axes.items() if not values]
        if empty:
            raise InputError(f"{where}: axes.{empty[0]}: lists no value")
        return grid

    def cells(self) -> list[dict[str, Any]]:
        """The fields of every cell, in the order of the axes, the last axis fastest."""
        names = list(self.axes)
        return [
            self.base | dict(zip(names, values, strict=True))
            for values in itertools.product(*self.axes.values())
        ]

    def scenario(self, fields: dict[str, Any]) -> Scenario:
        """A cell's checked fields. Raises InputError naming the field."""
        try:
            scenario = Scenario.model_validate(fields)
        except ValidationError as error:
            raise InputError(first_fault(error)) from error
        if scenario.failure != "none" and scenario.failure not in self.failures:
            raise InputError(
                f"failure: no {scenario.failure!r} under `failures`; there are: "
                f"{', '.join(['none', *self.failures])}"
            )
        return scenario

    def interventions(self, scenario: Scenario) -> list[Fault]:
        """The scenario's faults. Raises InputError naming the failure and field."""
        if scenario.failure == "none":
            return []
        return [
            fault_of(fields, f"failures.{scenario.failure}")
            for fields in self.failures[scenario.failure]
        ]


def grid_schema() -> dict[str, Any]:
    """JSON Schema of the grid file."""
    schema, fault = Grid.model_json_schema(), fault_schema()
    definitions = schema.setdefault("$defs", {})
    definitions |= fault.pop("$defs") | {"Scenario": Scenario.model_json_schema(), "Fault": fault}
    one = {"type": "array", "items": {"$ref": "#/$defs/Fault"}}
    schema["properties"]["base"] = {"$ref": "#/$defs/Scenario"}
    schema["properties"]["failures"]["additionalProperties"] = one
    return schema


def cell_text(fields: dict[str, Any]) -> str:
    """A cell's fields as one canonical line."""
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), default=str)
