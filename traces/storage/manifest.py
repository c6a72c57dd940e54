"""The manifest of a stored trace: what is in the folder, and the sha256 of every shard.

Knows the file format and its versions. Knows nothing of Parquet or of routing itself.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ...errors import InputError, LoadmasterError, UsageError
from ...foundation.atomic_file import TEMPORARY_PREFIX, replacing
from ...foundation.documents import first_fault, read_json
from ...foundation.lock import folder_lock
from ..model_spec import ModelSpec

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION = 1
PER_TOKEN_COLUMNS = ("gates", "k_of_token", "step", "request", "source", "phase", "domain")
_SHARD_NAME = re.compile(r"rank-\d{3,}/shard-\d{5,}\.parquet")


class Shard(BaseModel):
    """One Parquet file of a trace."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="path inside the trace folder, rank-NNN/shard-NNNNN.parquet")
    tokens: int = Field(gt=0)
    bytes: int = Field(gt=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @field_validator("name")
    @classmethod
    def _inside_the_folder(cls, name: str) -> str:
        if not _SHARD_NAME.fullmatch(name):
            raise ValueError(
                f"shard name {name!r} is not of the form rank-NNN/shard-NNNNN.parquet; absolute "
                "paths and '..' are refused"
            )
        return name


class Manifest(BaseModel):
    """What a trace folder holds. Written last, so that a shard it does not name does not count."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["loadmaster-trace"] = "loadmaster-trace"
    schema_version: Literal[1] = 1
    model_name: str = ""
    num_layers: int = Field(gt=0, description="L, MoE layers")
    num_experts: int = Field(gt=0, le=65536, description="E, logical experts per layer")
    top_k: int = Field(gt=0, description="K, experts chosen per token")
    layer_indices: tuple[int, ...] = Field(description="[L] the model's own layer numbers")
    model: ModelSpec | None = Field(default=None, description="sizes, where known")
    columns: tuple[str, ...] = Field(description="per-token columns stored with the ids")
    domain_names: tuple[str, ...] = ()
    ranks: int = Field(default=1, gt=0, description="how many writers may add shards")
    plan_at_capture: str | None = Field(
        default=None, description="digest of the active plan when recording began"
    )
    shards: tuple[Shard, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} is larger than num_experts {self.num_experts}")
        if len(self.layer_indices) != self.num_layers:
            raise ValueError(
                f"layer_indices names {len(self.layer_indices)} of {self.num_layers} layers"
            )
        unknown = [c for c in self.columns if c not in PER_TOKEN_COLUMNS]
        if unknown or len(set(self.columns)) != len(self.columns):
            raise ValueError(f"columns {list(self.columns)} must be some of {PER_TOKEN_COLUMNS}")
        names = [shard.name for shard in self.shards]
        if len(set(names)) != len(names):
            raise ValueError("a shard is listed twice")
        return self

    @classmethod
    def of_model(
        cls, model: ModelSpec, *, columns: tuple[str, ...], ranks: int = 1,
        domain_names: tuple[str, ...] = (), plan_at_capture: str | None = None,
    ) -> Self:
        """The manifest of an empty trace of this model."""
        return cls(
            model_name=model.name, num_layers=model.num_layers, num_experts=model.num_experts,
            top_k=model.top_k, layer_indices=model.own_layer_indices(), model=model,
            columns=columns, domain_names=domain_names, ranks=ranks,
            plan_at_capture=plan_at_capture,
        )

    @property
    def tokens(self) -> int:
        """Tokens in all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def id_bytes(self) -> int:
        """Bytes of one expert id in the files: 1 up to 256 experts, 2 above."""
        return 1 if self.num_experts <= 256 else 2

    def same_recording(self, other: Manifest) -> bool:
        """Whether shards of both may be in one folder: all but shards and domain names agree."""
        but = {"shards", "domain_names"}
        return self.model_dump(exclude=but) == other.model_dump(exclude=but)


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder`/manifest.json. Raises InputError saying what is wrong and where."""
    path = folder / MANIFEST_NAME
    if not os.path.lexists(path):
        raise InputError(
            f"{folder}: no {MANIFEST_NAME} in it, so this is not a stored trace; give the folder "
            "that `trace record` or `trace import` wrote"
        )
    try:
        raw = read_json(path)
    except InputError as error:
        raise InputError(f"{error}; restore it or record again") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if not isinstance(version, int):
        raise InputError(f"{path}: holds no schema_version, so this is not a trace's manifest")
    if version > SCHEMA_VERSION:
        raise InputError(
            f"{path}: schema version {version} is newer than this Loadmaster reads (up to "
            f"{SCHEMA_VERSION}): upgrade Loadmaster, or record again with this version"
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        raise InputError(f"{path}: {first_fault(error)}; restore it or record again") from error


def create_manifest(folder: Path, manifest: Manifest) -> None:
    """Begin a trace in a new or empty folder.

    Raises UsageError where the folder already holds anything: nothing is ever overwritten.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with folder_lock(folder):
            require_unused(folder)
            _write(folder, manifest)
    except OSError as error:
        raise LoadmasterError(f"{folder}: cannot begin a trace here: {error.strerror}") from error


def require_unused(folder: Path) -> None:
    """Raise UsageError where something exists at `folder` already, be it a file or a full folder,
    and InputError where no folder can be made.

    An empty folder is fine, and so is what an unfinished write left behind.
    """
    if folder.is_dir():
        used = any(not p.name.startswith(TEMPORARY_PREFIX) for p in folder.iterdir())
    else:
        used = folder.exists() or folder.is_symlink()
    if used:
        raise UsageError(
            f"{folder}: exists already; existing files are never overwritten, give a new folder"
        )
    above = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not above.is_dir():
        raise InputError(f"{folder}: {above} is no folder, so none can be made in it")
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: the folder {above} cannot be written to: give another one")


def commit_shard(folder: Path, shard: Shard, domain_names: tuple[str, ...] = ()) -> Manifest:
    """Name a shard that is already whole on disk; from now on it is part of the trace.

    Safe while other ranks write to the same folder. Raises OSError as the system does.
    """
    with folder_lock(folder):
        manifest = read_manifest(folder)
        names = _longer(manifest.domain_names, domain_names)
        manifest = manifest.model_copy(
            update={"shards": (*manifest.shards, shard), "domain_names": names}
        )
        _write(folder, manifest)
    return manifest


def _longer(known: tuple[str, ...], new: tuple[str, ...]) -> tuple[str, ...]:
    """Domain names may only be added at the end: an index means the same in every shard."""
    short, long = sorted((known, new), key=len)
    if long[: len(short)] != short:
        raise InputError(
            f"domains are named {list(known)} in this trace and {list(new)} in the new tokens: "
            "number them alike on every rank"
        )
    return long


def _write(folder: Path, manifest: Manifest) -> None:
    text = manifest.model_dump_json(indent=1, exclude_none=True) + "\n"
    with replacing(folder / MANIFEST_NAME) as file:
        file.write(text.encode())
