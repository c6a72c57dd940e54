"""What a group and its ranks are started with. Light to import: no torch, no Ray.

Knows names, sizes and limits. Knows nothing of how they are used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ...errors import UsageError
from ...placement.cluster import Cluster
from ...placement.dispatch.token_limit import CapacityRule
from ...traces.model_spec import ModelSpec
from .phase_plans import PhasePlans

DTYPE_BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}
SERVED_TRAFFIC = ("return_home/per_expert", "return_home/per_rank")


@dataclass(frozen=True)
class Limits:
    """How much a step and a rank take.

    step_tokens: a rank takes no further prompt chunk once the step's rows on it reach its share
    (step_tokens / ranks), so a step is at least that large while prompts wait. chunk_tokens: the
    grid on which prompts are cut. active_requests: at most so many in flight on one rank.
    """

    step_tokens: int = 4096
    chunk_tokens: int = 512
    active_requests: int = 64


@dataclass(frozen=True)
class RankSettings:
    """What a rank is born with. The cluster's traffic is what it serves: one of SERVED_TRAFFIC."""

    rank: int
    ranks: int
    model_dir: str
    cluster: Cluster
    dtype: str = "bfloat16"
    record_to: str | None = None
    resume_recording: bool = False     # this rank recorded before and was replaced
    capacity: CapacityRule | None = None      # drop or reroute overflow; changes the output
    device: str = "cpu"


@dataclass(frozen=True)
class GroupSettings:
    """What a group is started with."""

    name: str
    ranks: tuple[RankSettings, ...]
    plans: PhasePlans
    model_spec: ModelSpec
    journal: str                          # folder of the journal of plan switches
    limits: Limits = field(default_factory=Limits)
    step_timeout_s: float = 120.0         # hard limit of a step; a silent rank is noticed sooner
    start_timeout_s: float = 300.0
    replace_timeout_s: float = 60.0       # then a lost rank counts as lost for good
    stage_budget_bytes: int = 4 << 20     # per rank and direction in one step
    most_slots: int | None = None         # per rank and layer, in an emergency


def served_spec(model_dir: str | Path, dtype: str) -> ModelSpec:
    """The numbers of a checkpoint's model when weights and activations are held in `dtype`.

    Raises InputError on a checkpoint that is no MoE model we know, UsageError on the dtype.
    """
    if dtype not in DTYPE_BYTES:
        raise UsageError(f"dtype {dtype!r} is not served; use one of {', '.join(DTYPE_BYTES)}")
    spec = ModelSpec.from_pretrained(model_dir)
    size = DTYPE_BYTES[dtype]
    # What comes on top are biases, as the checkpoint stores them: nothing quantised is served.
    biases = round(spec.scale_bytes_per_expert / spec.bytes_per_parameter)
    return spec.model_copy(
        update={
            "bytes_per_parameter": float(size),
            "activation_bytes": float(size),
            "scale_bytes_per_expert": biases * size,
        }
    )
