"""ModelSpec: the numbers of an MoE model that placement needs.

Knows shapes and sizes. Knows nothing of weights, checkpoints' contents or devices.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import InputError
from ..foundation.documents import first_fault
from .model_config.checkpoint import BY_HAND, checkpoint_fields
from .model_config.dense_weights import ModelShape, estimated_dense_bytes
from .model_config.files import ModelFiles, find_files
from .model_config.layer_ranges import MOST_LAYERS
from .model_config.on_disk import dense_bytes

# Far beyond any model, and small enough that bytes and operations stay whole numbers.
MOST_EXPERTS, MOST_WIDE, MOST_BYTES = 65_536, 2**24, 2**50


class DraftLayers(BaseModel):
    """Layers that guess tokens ahead (MTP) and have experts; counted apart from a step's own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer_indices: tuple[int, ...] = Field(
        min_length=1, description="the model's own indices, after its hidden layers"
    )
    num_experts: int = Field(gt=0, le=MOST_EXPERTS)
    top_k: int = Field(gt=0)
    bytes_per_expert: int | None = Field(
        default=None, gt=0, le=MOST_BYTES, description="where it is not that of the other layers"
    )


class ModelSpec(BaseModel):
    """Shapes and sizes of one MoE model; only what routes and is placed.

    Layers are MoE layers, counted from 0; `layer_indices` names them in the model's own count
    (a DeepSeek-V3 checkpoint has 61 layers of which 3..60 are MoE).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = "model"
    num_layers: int = Field(gt=0, le=MOST_LAYERS, description="L, MoE layers")
    num_experts: int = Field(gt=0, le=MOST_EXPERTS, description="E, logical experts per layer")
    top_k: int = Field(gt=0, description="K, experts chosen per token")
    hidden: int | None = Field(default=None, gt=0, le=MOST_WIDE, description="H")
    intermediate: int | None = Field(
        default=None, gt=0, le=MOST_WIDE, description="I, per expert"
    )
    matrices_per_expert: int = Field(
        default=3, gt=0, le=64, description="gate, up, down; 2 without gate"
    )
    bytes_per_parameter: float = Field(default=2.0, gt=0, le=64)
    scale_bytes_per_expert: int = Field(
        default=0, ge=0, le=MOST_BYTES, description="quantisation scales, biases"
    )
    activation_bytes: float = Field(
        default=2.0, gt=0, le=64, description="bytes per activation sent"
    )
    num_shared_experts: int = Field(default=0, ge=0)
    num_expert_groups: int = Field(default=1, gt=0, description="routing groups (DeepSeek n_group)")
    groups_per_token: int | None = Field(default=None, gt=0)
    expert_bytes: tuple[int, ...] | None = Field(
        default=None, description="[E] bytes per expert where experts differ in size"
    )
    layer_indices: tuple[int, ...] | None = Field(
        default=None, description="[L] the model's own indices of its MoE layers"
    )
    total_layers: int | None = Field(default=None, gt=0, description="all hidden layers, dense too")
    draft_layers: DraftLayers | None = Field(
        default=None, description="MoE layers that only speculative decoding runs"
    )
    weights_known: bool = Field(
        default=True, description="false: bytes per expert could not be read, so no time either"
    )
    notes: tuple[str, ...] = Field(
        default=(), description="what was read with a doubt, each beside the figure it may change"
    )
    dense_bytes: int | None = Field(
        default=None, ge=0, le=MOST_BYTES,
        description="weights beside the routed experts, as every device holds them; None = "
        "estimated from the sizes",
    )
    dense_is_estimated: bool = Field(
        default=False, description="dense_bytes was reckoned from a configuration's widths"
    )
    other_time_us: float = Field(
        default=0.0, ge=0, description="time of a step outside the experts and their exchange"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k {self.top_k} is larger than num_experts {self.num_experts}: "
                "a token cannot choose more experts than a layer has"
            )
        if self.expert_bytes is not None and len(self.expert_bytes) != self.num_experts:
            raise ValueError(
                f"expert_bytes lists {len(self.expert_bytes)} sizes for {self.num_experts} experts"
            )
        if not all(0 < size <= MOST_BYTES for size in self.expert_bytes or ()):
            raise ValueError(f"expert_bytes must all lie in 1..{MOST_BYTES}")
        if self.layer_indices is not None and len(self.layer_indices) != self.num_layers:
            raise ValueError(
                f"layer_indices lists {len(self.layer_indices)} layers, num_layers is "
                f"{self.num_layers}"
            )
        own = self.layer_indices or ()
        if len(set(own)) != len(own) or min(own, default=0) < 0:
            raise ValueError(
                f"layer_indices {list(own)[:8]} must be the model's own layer numbers, from 0, "
                "each once"
            )
        if self.num_experts % self.num_expert_groups:
            raise ValueError(
                f"{self.num_experts} experts do not divide into {self.num_expert_groups} groups"
            )
        return self

    @classmethod
    def from_pretrained(cls, folder: Path | str, *, moe_layers: str | None = None) -> ModelSpec:
        """The model in a checkpoint's folder; or its config.json or params.json may be named.

        Where weights lie beside the configuration, their headers decide, and `notes` say where the
        two differ. moe_layers: "3-60", where the files do not say which layers are MoE. Raises
        InputError where the model is not MoE or cannot be understood, saying which fields were
        looked for and how to answer.
        """
        path = Path(folder)
        fields = checkpoint_fields(path, moe_layers)
        try:
            return cls(**fields)._with_dense_weights(find_files(path))
        except ValidationError as error:
            named = path / "config.json" if path.is_dir() else path
            raise InputError(f"{named}: {first_fault(error)}", **BY_HAND) from error

    @property
    def knows_sizes(self) -> bool:
        """Whether time can be computed: both widths and the weights' format are known."""
        return self.hidden is not None and self.intermediate is not None and self.weights_known

    @property
    def unsized(self) -> str:
        """Why no time can be computed: which sizes are missing."""
        if self.hidden is None or self.intermediate is None:
            return "its hidden and intermediate sizes are not known"
        told = [note for note in self.notes if note.startswith("bytes per expert: unknown")]
        return told[0] if told else "the format of its experts' weights is not known"

    @property
    def knows_bytes(self) -> bool:
        """Whether `bytes_per_expert_E` are bytes: from the sizes, or listed expert by expert."""
        return self.knows_sizes or self.expert_bytes is not None

    def bytes_per_expert_E(self) -> npt.NDArray[np.int64]:
        """[E] weight bytes of each expert of a layer (gate, up, down, scales); 1 if unknown."""
        if self.expert_bytes is not None:
            return np.asarray(self.expert_bytes, np.int64)
        if self.hidden is None or self.intermediate is None or not self.weights_known:
            return np.ones(self.num_experts, np.int64)
        parameters = self.matrices_per_expert * self.hidden * self.intermediate
        weights = parameters * self.bytes_per_parameter
        return np.full(
            self.num_experts, round(weights) + self.scale_bytes_per_expert, np.int64
        )

    def listed_bytes_E(self) -> npt.NDArray[np.int64] | None:
        """[E] weight bytes of each expert where they are listed; None where all have one size."""
        return None if self.expert_bytes is None else self.bytes_per_expert_E()

    @property
    def flops_per_assignment(self) -> float:
        """Floating point operations of one token in one expert: 6·H·I with three matrices."""
        if self.hidden is None or self.intermediate is None:
            return 0.0
        return 2.0 * self.matrices_per_expert * self.hidden * self.intermediate

    def own_layer_indices(self) -> tuple[int, ...]:
        """[L] the model's own layer indices; 0..L-1 where not recorded."""
        return self.layer_indices or tuple(range(self.num_layers))

    def dense_weights(self) -> tuple[int, bool] | None:
        """(bytes beside the routed experts, whether that is an estimate); None = sizes unknown."""
        if self.dense_bytes is not None:
            return self.dense_bytes, self.dense_is_estimated
        shape = self._shape()
        return None if shape is None else (estimated_dense_bytes(shape), True)

    def _with_dense_weights(self, files: ModelFiles) -> Self:
        """The same with `dense_bytes` from the weights beside a configuration, or its widths."""
        try:
            found = dense_bytes(files.folder, self.total_layers)
        except InputError:          # a note says so already: their experts were looked for first
            found = None
        estimated = found is None
        if found is None and (shape := self._shape()) is not None:
            found = estimated_dense_bytes(shape, files.config)
        return self.model_copy(update={"dense_bytes": found, "dense_is_estimated": estimated})

    def _shape(self) -> ModelShape | None:
        if self.hidden is None or self.intermediate is None or not self.knows_sizes:
            return None
        return ModelShape(
            self.hidden, self.total_layers or max(self.own_layer_indices()) + 1, self.num_layers,
            self.num_experts, self.intermediate, self.num_shared_experts,
            self.matrices_per_expert, self.bytes_per_parameter,
        )

    def digest(self) -> str:
        """Fingerprint of what a plan rests on: not the name, notes, drafts or other weights."""
        aside = {"name", "notes", "draft_layers", "dense_bytes", "dense_is_estimated"}
        if self.weights_known:      # as models were fingerprinted before it could be unknown
            aside.add("weights_known")
        text = self.model_dump_json(exclude=aside)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
