"""Faults as people write them: fields in a YAML or JSON file, checked, and what happens in a run.

    faults:
    - {kind: slow_device, device: 0, factor: 2.0, at_us: 1000000, until_us: 5000000}
    - {kind: jitter, sigma: 0.1}
    - {kind: lost_devices, node: 1, at_us: 2000000, back_after_us: 60000000}

Knows fields, units and which devices a cluster has. What a fault does is `faults.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from ...errors import InputError
from ...foundation.documents import first_fault, read_mapping
from ...placement.cluster import Cluster
from .faults import FlappingNic, Jitter, LostDevices, SlowDevice

Fault = SlowDevice | Jitter | FlappingNic | LostDevices

LATEST_US = 1e15             # 31 years; the clock is 64-bit nanoseconds
FROM_US = Field(default=0.0, ge=0, le=LATEST_US, description="when it begins, microseconds")
UNTIL_US = Field(default=None, ge=0, le=LATEST_US, description="when it ends; none = never")
GROUP = Field(default=0, ge=0, description="the serving group it is in")
DEVICE = Field(ge=0, description="device of the cluster, from 0")


class _Fields(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    makes: ClassVar[type[Fault]]

    def fault(self) -> Fault:
        """What happens in a run."""
        return self.makes(**{name: value for name, value in self if name != "kind"})


def _require_order(at_us: float, until_us: float | None) -> None:
    if until_us is not None and until_us < at_us:
        raise ValueError(f"until_us {until_us} is before at_us {at_us}")


class SlowDeviceFields(_Fields):
    """A device computes `factor` times as long; several on one device multiply."""

    makes = SlowDevice
    kind: Literal["slow_device"]
    device: int = DEVICE
    factor: float = Field(ge=1, le=1e6, description="how many times as long it computes")
    at_us: float = FROM_US
    until_us: float | None = UNTIL_US
    group: int = GROUP

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        _require_order(self.at_us, self.until_us)
        return self


class JitterFields(_Fields):
    """Devices' step times vary: exp(sigma x |normal|), drawn anew each step; several multiply."""

    makes = Jitter
    kind: Literal["jitter"]
    sigma: float = Field(ge=0, le=4, description="spread of the logarithm of a device's time")
    devices: tuple[int, ...] | None = Field(default=None, description="none = all")


class FlappingNicFields(_Fields):
    """A device's network port falls to a share of its rate, again and again."""

    makes = FlappingNic
    kind: Literal["flapping_nic"]
    device: int = DEVICE
    share: float = Field(ge=1e-6, le=1, description="what is left of the port's rate while down")
    period_us: float = Field(gt=0, le=LATEST_US, description="from one fall to the next")
    down_us: float = Field(gt=0, description="how long each lasts; less than period_us")
    at_us: float = FROM_US
    until_us: float | None = UNTIL_US
    group: int = GROUP

    @model_validator(mode="after")
    def _comes_up(self) -> Self:
        _require_order(self.at_us, self.until_us)
        if self.down_us >= self.period_us:
            raise ValueError(f"down_us {self.down_us} must be less than period_us {self.period_us}")
        return self


class LostDevicesFields(_Fields):
    """Devices, or a whole node, are gone; survivors take over, and they may come back."""

    makes = LostDevices
    kind: Literal["lost_devices"]
    at_us: float = Field(ge=0, le=LATEST_US, description="when they are gone, microseconds")
    devices: tuple[int, ...] = Field(default=(), description="devices of the cluster, from 0")
    node: int | None = Field(default=None, ge=0, description="a whole node, from 0")
    detect_us: float = Field(
        default=1e6, ge=0, le=LATEST_US, description="until it is noticed"
    )
    replan_us: float = Field(
        default=1e6, ge=0, le=LATEST_US, description="until the emergency plan is there"
    )
    back_after_us: float | None = Field(
        default=None, ge=0, le=LATEST_US, description="when they return; none = never"
    )
    group: int = GROUP

    @model_validator(mode="after")
    def _loses_some(self) -> Self:
        if not self.devices and self.node is None:
            raise ValueError("name devices or a node")
        return self


AnyFields = SlowDeviceFields | JitterFields | FlappingNicFields | LostDevicesFields
KINDS: dict[str, type[AnyFields]] = {
    "slow_device": SlowDeviceFields, "jitter": JitterFields,
    "flapping_nic": FlappingNicFields, "lost_devices": LostDevicesFields,
}


class FaultsFile(BaseModel):
    """The file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    faults: list[Annotated[AnyFields, Field(discriminator="kind")]]


def fault_of(fields: Any, where: str) -> Fault:
    """One fault from its fields. Raises InputError naming `where`, the kind and the field."""
    kind = fields.get("kind") if isinstance(fields, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(f"{where}: kind {kind!r}; there are: {', '.join(KINDS)}")
    shape = KINDS[kind]
    try:
        return shape.model_validate(fields).fault()
    except ValidationError as error:
        known = ", ".join(name for name in shape.model_fields if name != "kind")
        join = "." if error.errors()[0]["loc"] else ": "
        raise InputError(f"{where}: {kind}{join}{first_fault(error, known)}") from error


def read_faults(path: Path, cluster: Cluster, groups: int = 1) -> list[Fault]:
    """A faults file, checked against the devices that are there.

    Raises InputError naming the file, the fault's place in it and the field.
    """
    data = read_mapping(path, "faults", "`faults`: a list")
    if unknown := sorted(str(name) for name in data if name != "faults"):
        raise InputError(f"{path}: {unknown[0]}: no such field; there is: faults")
    listed = data.get("faults")
    if not isinstance(listed, list) or not listed:
        raise InputError(f"{path}: faults: must list at least one fault")
    faults = [fault_of(fields, f"{path}: faults.{i}") for i, fields in enumerate(listed)]
    require_there(faults, cluster, groups, str(path))
    return faults


def require_there(
    faults: Sequence[Fault], cluster: Cluster, groups: int, where: str
) -> None:
    """Raises InputError for a fault of a device, node or serving group that is not there."""
    for i, fault in enumerate(faults):
        for device in _devices(fault):
            if not 0 <= device < cluster.num_devices:
                raise InputError(
                    f"{where}: faults.{i}: device {device}: the cluster has devices "
                    f"0..{cluster.num_devices - 1}"
                )
        node = fault.node if isinstance(fault, LostDevices) else None
        if node is not None and not 0 <= node < cluster.num_nodes:
            raise InputError(
                f"{where}: faults.{i}: node {node}: the cluster has nodes "
                f"0..{cluster.num_nodes - 1}"
            )
        if not isinstance(fault, Jitter) and not 0 <= fault.group < groups:
            raise InputError(
                f"{where}: faults.{i}: group {fault.group}: there are {groups} serving groups"
            )


def _devices(fault: Fault) -> tuple[int, ...]:
    if isinstance(fault, SlowDevice | FlappingNic):
        return (fault.device,)
    return fault.devices or ()


def faults_schema() -> dict[str, Any]:
    """JSON Schema of the faults file."""
    return FaultsFile.model_json_schema()


def fault_schema() -> dict[str, Any]:
    """JSON Schema of one fault, for files that hold faults among other things."""
    one: Any = Annotated[AnyFields, Field(discriminator="kind")]
    return TypeAdapter(one).json_schema(ref_template="#/$defs/{model}")
