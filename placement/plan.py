"""Plan: which device holds which expert, and how tokens choose among replicas.

Knows slots, experts and the evidence for a plan. Knows nothing of how a plan is found, of traces,
clocks or files of other engines (`formats/`). A plan that breaks an invariant cannot be made.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from ..errors import InputError, LoadmasterError, naming
from ..foundation.arrays import SlotArray
from ..foundation.atomic_file import replacing
from ..foundation.documents import first_fault, parse_json, read_text

SCHEMA_VERSION = 1
EMPTY = -1


class PlanError(InputError):
    """The slots do not form a plan."""


class DispatchSpec(BaseModel):
    """The policy that splits an expert's tokens over its replicas, and its parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: str = "balanced"
    parameters: dict[str, float | int | str] = Field(default_factory=dict)


class Provenance(BaseModel):
    """How the plan came to be; nothing here depends on the clock."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = "manual"
    seed: int = 0
    effort: str = "normal"
    trace_digest: str = ""
    version: str = ""
    notes: tuple[str, ...] = ()


class LayerEvidence(BaseModel):
    """One layer's figures, in the units of the objective."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    objective: float
    bound: float
    imbalance_mean: float | None = None
    replicas: int = 0
    copies: float | None = Field(
        default=None,
        description="remote transfers per token on the planning steps, between nodes if there are "
        "any; None where they cost nothing",
    )


class Promise(BaseModel):
    """What whoever chose the plan was told of it: judged on requests held back from planning."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str = Field(description="step_time_us, imbalance_mean or peak_mean")
    value: float
    reach: float | None = Field(description="of its 95 % band; None = cannot be told")
    requests: int = Field(description="that judged it")
    step_tokens: int
    concurrency: int
    order: str
    trace_digest: str = Field(description="of the trace that both parts were taken from")


class Evidence(BaseModel):
    """How good the plan is, and on what it was judged."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    objective_name: str = Field(description='"balance" (imbalance, 1 = perfect) or "time" (us)')
    objective: float = Field(description="on the planning steps")
    bound: float = Field(description="no plan can be better on the planning steps")
    gap: float = Field(ge=0, description="(objective - bound) / bound")
    validation: float | None = Field(default=None, description="the objective on held-back steps")
    layers: tuple[LayerEvidence, ...] = ()
    steps: str = Field(default="", description="what the steps were: sampler, how many, notes")
    bound_kind: str = ""
    notes: tuple[str, ...] = ()
    copies: float | None = Field(default=None, description="mean over layers")
    promise: Promise | None = None

    @model_serializer(mode="wrap")
    def _without_what_is_not_promised(
        self, whole: SerializerFunctionWrapHandler
    ) -> dict[str, Any]:
        """Documents of plans that nobody judged read as they always did."""
        document: dict[str, Any] = whole(self)
        if self.promise is None:
            del document["promise"]
        return document


class _PlanFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: str = "loadmaster-plan"
    schema_version: int = SCHEMA_VERSION
    num_experts: int
    slots: list[list[list[int]]]
    layer_indices: list[int] = Field(default_factory=list)
    dispatch: DispatchSpec = DispatchSpec()
    model_digest: str = ""
    cluster_digest: str = ""
    provenance: Provenance = Provenance()
    evidence: Evidence | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """slots [L, G, C] int16: the expert in every slot, EMPTY (-1) = none.

    Devices or layers with fewer slots than C are padded with EMPTY at the end. Global slot number
    s = g · C + c. Raises PlanError if an expert has no slot, an id is unknown or shapes are off.
    """

    slots: SlotArray
    num_experts: int
    dispatch: DispatchSpec = field(default_factory=DispatchSpec)
    layer_indices: tuple[int, ...] = ()
    model_digest: str = ""
    cluster_digest: str = ""
    provenance: Provenance = field(default_factory=Provenance)
    evidence: Evidence | None = None

    def __post_init__(self) -> None:
        slots = np.array(self.slots)
        if slots.ndim != 3 or slots.dtype.kind not in "iu" or 0 in slots.shape:
            raise PlanError(
                f"slots must be integers [L, G, C]; got {slots.dtype} {list(slots.shape)}"
            )
        if not 1 <= self.num_experts <= 32767:
            raise PlanError(f"num_experts {self.num_experts} must lie in [1, 32767]")
        bad = np.argwhere((slots < EMPTY) | (slots >= self.num_experts))
        if len(bad):
            layer, device, slot = bad[0]
            raise PlanError(
                f"layer {layer}, device {device}, slot {slot} names expert "
                f"{slots[layer, device, slot]}; experts are 0..{self.num_experts - 1}, -1 = empty"
            )
        slots = np.ascontiguousarray(slots, np.int16)
        slots.flags.writeable = False
        object.__setattr__(self, "slots", slots)
        missing = np.argwhere(self.replicas_LE == 0)
        if len(missing):
            layer, expert = missing[0]
            raise PlanError(
                f"expert {expert} of layer {layer} has no slot ({len(missing)} such experts): "
                "every expert needs at least one"
            )
        if self.layer_indices and len(self.layer_indices) != slots.shape[0]:
            raise PlanError(
                f"layer_indices names {len(self.layer_indices)} layers, slots have {slots.shape[0]}"
            )
        own = self.layer_indices
        if len(set(own)) != len(own) or min(own, default=0) < 0:
            raise PlanError(
                f"layer_indices {list(own)[:8]} must be the model's own layer numbers, from 0, "
                "each once"
            )

    # ---- shape and counts -----------------------------------------------------------------

    @property
    def num_layers(self) -> int:
        return int(self.slots.shape[0])

    @property
    def num_devices(self) -> int:
        return int(self.slots.shape[1])

    @property
    def slots_per_device(self) -> int:
        """C, the widest device's slots."""
        return int(self.slots.shape[2])

    @property
    def replicas_LE(self) -> npt.NDArray[np.int64]:
        """[L, E] replicas of each expert."""
        copies: npt.NDArray[np.int64] = self.replicas_LGE().sum(axis=1)
        return copies

    def replicas_LGE(self) -> npt.NDArray[np.int64]:
        """[L, G, E] replicas of each expert on each device."""
        layers, devices, _ = self.slots.shape
        width = self.num_experts + 1
        row = np.arange(layers * devices)[:, None] * width
        flat = (row + self.slots.reshape(layers * devices, -1) + 1).reshape(-1)
        counts = np.bincount(flat, minlength=layers * devices * width)
        return counts.reshape(layers, devices, width)[:, :, 1:]

    @property
    def duplicates(self) -> int:
        """Second and further replicas of an expert on one device: pure waste."""
        return int(np.maximum(self.replicas_LGE() - 1, 0).sum())

    @property
    def spare_slots(self) -> int:
        """Filled slots beyond one per expert, over all layers."""
        return int((self.slots >= 0).sum()) - self.num_layers * self.num_experts

    def moves_to(self, target: Plan) -> list[tuple[int, int, int]]:
        """(layer, device, expert) that `target` holds and this plan does not, sorted.

        Each is one expert's weights to send. Raises PlanError on plans of different shapes.
        """
        if (self.num_layers, self.num_experts, self.num_devices) != (
            target.num_layers, target.num_experts, target.num_devices,
        ):
            raise PlanError(
                f"plans differ in shape: {self.num_layers} layers x {self.num_experts} experts on "
                f"{self.num_devices} devices against {target.num_layers} x {target.num_experts} on "
                f"{target.num_devices}"
            )
        new = (target.replicas_LGE() > 0) & (self.replicas_LGE() == 0)
        return [(int(a), int(b), int(c)) for a, b, c in np.argwhere(new)]

    # ---- files ----------------------------------------------------------------------------

    def to_json(self) -> str:
        """The plan's file, byte for byte the same for equal plans."""
        file = _PlanFile(
            num_experts=self.num_experts,
            slots=self.slots.tolist(),
            layer_indices=list(self.layer_indices),
            dispatch=self.dispatch,
            model_digest=self.model_digest,
            cluster_digest=self.cluster_digest,
            provenance=self.provenance,
            evidence=self.evidence,
        )
        return json.dumps(file.model_dump(mode="json"), separators=(",", ":")) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str = "plan") -> Self:
        """Read `to_json`'s text. Raises PlanError naming the field."""
        try:
            data = parse_json(text, where)
        except InputError as error:
            raise PlanError(str(error)) from error
        if not isinstance(data, dict) or data.get("format") != "loadmaster-plan":
            raise PlanError(
                f"{where}: not a Loadmaster plan",
                call="`placement.formats.import_plan` reads the engines' own",
                command="`loadmaster plan-import` reads the engines' own",
            )
        if data.get("schema_version") != SCHEMA_VERSION:
            raise PlanError(
                f"{where}: plan schema {data.get('schema_version')}, this version reads "
                f"{SCHEMA_VERSION}: upgrade loadmaster"
            )
        try:
            file = _PlanFile.model_validate(data)
            slots = np.array(file.slots, np.int64)
        except ValidationError as error:
            known = ", ".join(_PlanFile.model_fields)
            raise PlanError(f"{where}: {first_fault(error, known)}") from error
        except OverflowError as error:
            raise PlanError(f"{where}: slots: a number that is no expert's") from error
        except ValueError as error:
            raise PlanError(f"{where}: slots: rows differ in length") from error
        with naming(where):
            return cls(
                slots=slots.astype(np.int64),
                num_experts=file.num_experts,
                dispatch=file.dispatch,
                layer_indices=tuple(file.layer_indices),
                model_digest=file.model_digest,
                cluster_digest=file.cluster_digest,
                provenance=file.provenance,
                evidence=file.evidence,
            )

    def save(self, path: str | Path) -> None:
        """Write atomically: the file is whole or absent. Raises LoadmasterError where it cannot."""
        try:
            with replacing(Path(path)) as file:
                file.write(self.to_json().encode())
        except OSError as error:
            reason = error.strerror or error
            raise LoadmasterError(f"{path}: cannot be written: {reason}") from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a plan file. Raises PlanError naming the file and field."""
        try:
            text = read_text(Path(path), "plan")
        except InputError as error:
            raise PlanError(str(error)) from error
        return cls.from_json(text, where=str(path))

    def same_slots(self, other: Plan) -> bool:
        """Whether both plans hold the same experts in the same slots."""
        return np.array_equal(self.slots, other.slots)


def plan_schema() -> dict[str, Any]:
    """JSON Schema of the plan file."""
    return _PlanFile.model_json_schema()
