"""Cluster: nodes, devices, links and the traffic mode that a plan is made for.

Knows sizes and speeds. Knows nothing of experts, plans or traces. Presets are YAML files next to
this module; a user's own cluster is the same YAML.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..errors import InputError, UsageError
from ..foundation.documents import first_fault, parse_yaml, read_mapping
from .hardware import HardwareProfile

PRESETS = ("h100", "h200", "b200", "gb200", "a100", "pcie", "cpu")

MOST_DEVICES, MOST_SLOTS = 65_536, 32_767   # far beyond any cluster and any layer
RESERVED_SHARE = 0.1         # of a device's memory, where nobody says: what engines leave as well

TrafficMode = Literal["return_home", "allgather", "coherent"]
Payload = Literal["per_expert", "per_rank", "per_node"]


class Traffic(BaseModel):
    """What crosses the links (design: "Traffic mode"). Written "return_home/per_node"."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: TrafficMode = "return_home"
    payload: Payload = "per_expert"

    @classmethod
    def parse(cls, text: str) -> Self:
        """From "mode" or "mode/payload"; payload matters for return_home only."""
        mode, _, payload = text.partition("/")
        payloads = ("", *get_args(Payload)) if mode == "return_home" else ("",)
        if mode not in get_args(TrafficMode) or payload not in payloads:
            raise UsageError(
                f"unknown traffic {text!r}: return_home/per_expert, return_home/per_rank, "
                "return_home/per_node, allgather or coherent"
            )
        return cls.model_validate({"mode": mode, "payload": payload or "per_expert"})

    def __str__(self) -> str:
        return f"{self.mode}/{self.payload}" if self.mode == "return_home" else self.mode


class Device(BaseModel):
    """One rank: the node it sits in, its expert slots per layer, memory and relative speed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    node: int = Field(ge=0)
    slots: int = Field(gt=0, le=MOST_SLOTS, description="expert slots in each MoE layer")
    expert_memory_bytes: int | None = Field(
        default=None, gt=0, description="for all layers' expert weights; None = slots are the limit"
    )
    speed: float = Field(default=1.0, gt=0, description="relative compute speed")

    @field_validator("speed")
    @classmethod
    def _finite(cls, speed: float) -> float:
        if not np.isfinite(speed):
            raise ValueError("speed must be finite")
        return speed


class Cluster(BaseModel):
    """G devices in N nodes. Device order is rank order; a node's devices are consecutive."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "cluster"
    devices: tuple[Device, ...] = Field(min_length=1, max_length=MOST_DEVICES)
    traffic: Traffic = Traffic()
    hardware: HardwareProfile
    reserved_bytes: int | None = Field(
        default=None, ge=0,
        description="of each device's memory, kept free of weights for KV cache, activations and "
        "the runtime; None = a tenth",
    )

    @field_validator("traffic", mode="before")
    @classmethod
    def _traffic(cls, value: Any) -> Any:
        return Traffic.parse(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _nodes(self) -> Self:
        nodes = [d.node for d in self.devices]
        if nodes != sorted(nodes) or sorted(set(nodes)) != list(range(max(nodes) + 1)):
            raise ValueError("devices must be listed node by node, nodes counted 0, 1, 2, ...")
        return self

    @model_validator(mode="after")
    def _reserve(self) -> Self:
        if self.reserved_bytes is not None and self.reserved_bytes >= self.memory_bytes:
            raise ValueError(
                f"reserved_bytes {self.reserved_bytes:,} leave nothing of a device's "
                f"{self.memory_bytes:,} bytes of memory: keep less free"
            )
        return self

    # ---- making one -----------------------------------------------------------------------

    @classmethod
    def preset(
        cls,
        name: str,
        *,
        nodes: int = 1,
        devices_per_node: int = 8,
        slots_per_device: int,
        traffic: str = "return_home/per_expert",
        speeds: Sequence[float] | None = None,
    ) -> Self:
        """A cluster of equal devices of a known kind; `speeds [G]` makes them differ.

        Raises UsageError on an unknown preset or impossible sizes.
        """
        if nodes < 1 or devices_per_node < 1 or slots_per_device < 1:
            raise UsageError(
                f"nodes {nodes}, devices_per_node {devices_per_node} and slots_per_device "
                f"{slots_per_device} must all be at least 1"
            )
        total = nodes * devices_per_node
        _require_possible(total, slots_per_device)
        if speeds is not None and len(speeds) != total:
            raise UsageError(f"speeds lists {len(speeds)} values for {total} devices")
        if speeds is not None and not all(np.isfinite(s) and s > 0 for s in speeds):
            raise UsageError(f"speeds must be finite and above 0; got {list(speeds)}")
        devices = tuple(
            Device(node=g // devices_per_node, slots=slots_per_device,
                   speed=1.0 if speeds is None else float(speeds[g]))
            for g in range(total)
        )
        return cls(name=name, devices=devices, traffic=Traffic.parse(traffic),
                   hardware=preset_hardware(name))

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a cluster file; `hardware:` may be a preset's name. InputError names the field."""
        path = Path(path)
        data = read_mapping(path, "cluster", "`devices` and `hardware`")
        try:
            if isinstance(data.get("hardware"), str):
                data["hardware"] = preset_hardware(data["hardware"])
            return cls.model_validate(_expand(data))
        except ValidationError as error:
            known = ", ".join(cls.model_fields)
            raise InputError(f"{path}: {first_fault(error, known)}") from error
        except UsageError as error:
            raise InputError(f"{path}: {error.typed}") from error

    def to_yaml(self) -> str:
        """The file `from_yaml` reads."""
        data = self.model_dump(mode="json", exclude={"traffic"})
        return yaml.safe_dump(data | {"traffic": str(self.traffic)}, sort_keys=False)

    # ---- arrays ---------------------------------------------------------------------------

    @property
    def num_devices(self) -> int:
        return len(self.devices)

    @property
    def num_nodes(self) -> int:
        return self.devices[-1].node + 1

    @functools.cached_property
    def slots_G(self) -> npt.NDArray[np.int64]:
        """[G] slots per layer of each device."""
        return np.array([d.slots for d in self.devices], np.int64)

    @property
    def total_slots(self) -> int:
        """S, slots of one layer."""
        return int(self.slots_G.sum())

    @functools.cached_property
    def node_G(self) -> npt.NDArray[np.int64]:
        """[G] node of each device."""
        return np.array([d.node for d in self.devices], np.int64)

    @functools.cached_property
    def speed_G(self) -> npt.NDArray[np.float64]:
        """[G] relative speed."""
        return np.array([d.speed for d in self.devices], np.float64)

    @property
    def memory_bytes(self) -> int:
        """Memory of each device."""
        return self.hardware.memory_bytes

    @property
    def kept_free_bytes(self) -> int:
        """Of that, what no weights may fill."""
        if self.reserved_bytes is not None:
            return self.reserved_bytes
        return round(RESERVED_SHARE * self.memory_bytes)

    def with_reserved(self, reserved_bytes: int | None) -> Self:
        """The same cluster with so much of each device's memory kept free of weights; None = as is.

        Raises UsageError where that leaves nothing.
        """
        if reserved_bytes is None:
            return self
        if not 0 <= reserved_bytes < self.memory_bytes:
            raise UsageError(
                f"reserve_bytes {reserved_bytes:,} must lie in 0..{self.memory_bytes - 1:,}: a "
                f"device has {self.memory_bytes:,} bytes of memory"
            )
        return self.model_copy(update={"reserved_bytes": reserved_bytes})

    def with_traffic(self, traffic: str) -> Self:
        """The same cluster under another traffic mode."""
        return self.model_copy(update={"traffic": Traffic.parse(traffic)})

    def with_oversubscription(self, ratio: float) -> Self:
        """The same cluster with a spine per node that carries its NICs' bandwidth over `ratio`.

        Sized for the largest node; 2 is the usual 2:1. Raises UsageError below 1.
        """
        if not (np.isfinite(ratio) and ratio >= 1):
            raise UsageError(
                f"oversubscription {ratio} must be at least 1: what a node's NICs could carry over "
                "what its spine does"
            )
        most = int(np.bincount(self.node_G).max())
        legs = {
            leg: link.model_copy(update={"spine_bytes_per_s": most * link.nic_bytes_per_s / ratio})
            for leg, link in (("dispatch", self.hardware.dispatch),
                              ("combine", self.hardware.combine))
        }
        return self.model_copy(update={"hardware": self.hardware.model_copy(update=legs)})

    def with_slots(self, slots_per_device: int) -> Self:
        """The same cluster with another number of slots on every device."""
        devices = tuple(d.model_copy(update={"slots": slots_per_device}) for d in self.devices)
        return self.model_validate(self.model_dump() | {"devices": devices})

    def digest(self) -> str:
        """Fingerprint of devices, traffic and hardware numbers; names and reserves do not count."""
        aside = {"name", "hardware", "reserved_bytes"}
        text = self.model_dump_json(exclude=aside) + self.hardware.digest()
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def preset_hardware(name: str) -> HardwareProfile:
    """The hardware profile of a preset. Raises UsageError on an unknown name."""
    if name not in PRESETS:
        raise UsageError(f"unknown hardware preset {name!r}; there are: {', '.join(PRESETS)}")
    file = resources.files(__package__).joinpath("presets", f"{name}.yaml")
    return HardwareProfile.model_validate(parse_yaml(file.read_text("utf-8"), file.name))


def _expand(data: dict[str, Any]) -> dict[str, Any]:
    """`nodes`, `devices_per_node`, `slots_per_device` as a short form of `devices`."""
    short = ("nodes", "devices_per_node", "slots_per_device")
    if "devices" in data or not any(k in data for k in short):
        return data
    rest = {k: v for k, v in data.items() if k not in short}
    sizes = {"nodes": 1, "devices_per_node": 8} | {k: data[k] for k in short if k in data}
    if "slots_per_device" not in sizes:
        raise UsageError("slots_per_device: is missing: how many experts each device holds")
    for name, value in sizes.items():
        if type(value) is not int or value < 1:
            raise UsageError(f"{name}: must be a whole number of at least 1, not {value!r}")
    _require_possible(sizes["nodes"] * sizes["devices_per_node"], sizes["slots_per_device"])
    devices = [
        {"node": node, "slots": sizes["slots_per_device"]}
        for node in range(sizes["nodes"]) for _ in range(sizes["devices_per_node"])
    ]
    return rest | {"devices": devices}


def _require_possible(devices: int, slots: int) -> None:
    """Raises UsageError before a device list is made that no memory holds."""
    if devices > MOST_DEVICES or slots > MOST_SLOTS:
        raise UsageError(
            f"{devices} devices of {slots} slots: at most {MOST_DEVICES} devices of {MOST_SLOTS} "
            "slots are planned for"
        )
