"""HardwareProfile: what a device computes and a link carries, in microseconds and bytes per second.

Numbers only, each with its source and its error. Knows nothing of plans, traces or queues; fitting
these numbers from measurements is `simulator/calibrate/fits.py`, measuring them is the workers' and
the kernels' business.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..foundation.arrays import FloatArray


class ComputeProfile(BaseModel):
    """Time of one device's experts in one layer.

    Additive model: start_us + sum over active experts of (weight bytes / hbm + fixed) + tokens x
    flops / rate. `expert_table` (tokens -> us per active expert, linear interpolation, continued
    and flagged past its end) replaces the last two terms where the device was measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    start_us: float = Field(default=0.0, ge=0, description="paid once per layer and device")
    active_expert_us: float = Field(default=0.0, ge=0, description="beyond the weight read")
    hbm_bytes_per_s: float = Field(gt=0, description="achieved, not nominal")
    flops_per_s: float = Field(gt=0, description="achieved at this format")
    expert_table_tokens: tuple[float, ...] = ()
    expert_table_us: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _table(self) -> Self:
        tokens = self.expert_table_tokens
        if len(tokens) != len(self.expert_table_us):
            raise ValueError("expert_table_tokens and expert_table_us differ in length")
        if any(b <= a for a, b in itertools.pairwise(tokens)):
            raise ValueError("expert_table_tokens must increase")
        return self


class ExchangeProfile(BaseModel):
    """Time of one all-to-all (dispatch or combine) of one layer.

    alpha_us + alpha_per_log2_node_us · log2(N) + the most loaded port's bytes over its rate, and
    between nodes no less than under fair sharing where rates are max-min fair
    (`cost/max_min_rates.py`). `table` (bytes on the most loaded port -> us, linear) replaces the
    line where it fits badly, as NCCL's plateau does inside a node.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    alpha_us: float = Field(default=0.0, ge=0)
    alpha_per_log2_node_us: float = Field(default=0.0, ge=0)
    nvlink_bytes_per_s: float = Field(gt=0, description="per device and direction, in the node")
    nic_bytes_per_s: float = Field(gt=0, description="per device and direction, between nodes")
    spine_bytes_per_s: float | None = Field(
        default=None, gt=0, description="all devices of one node together; None = non-blocking"
    )
    table_bytes: tuple[float, ...] = ()
    table_us: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _table(self) -> Self:
        if len(self.table_bytes) != len(self.table_us):
            raise ValueError("table_bytes and table_us differ in length")
        if any(b <= a for a, b in itertools.pairwise(self.table_bytes)):
            raise ValueError("table_bytes must increase")
        return self


class HardwareProfile(BaseModel):
    """One kind of device and its links, with where the numbers come from and how wrong they are."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    compute: ComputeProfile
    dispatch: ExchangeProfile
    combine: ExchangeProfile
    counts_collective_us: float = Field(
        default=0.0, ge=0, description="all-gather of [G, E] counts, paid where dispatch needs it"
    )
    counts_always: bool = Field(
        default=False, description="gathered in every layer under any dispatch, as live workers do"
    )
    memory_bytes: int = Field(gt=0, description="device memory")
    dispatch_bytes_per_value: float = Field(default=2.0, gt=0, description="1.03 for fp8 + scales")
    combine_bytes_per_value: float = Field(default=2.0, gt=0)
    host_to_device_bytes_per_s: float = Field(default=25e9, gt=0)
    source: str = Field(description="where the numbers come from")
    error: str = Field(description="how far they were off where they were checked")

    def digest(self) -> str:
        """Fingerprint of the numbers; the texts do not count."""
        text = self.model_dump_json(exclude={"name", "source", "error"})
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def interpolate(
    at: npt.ArrayLike, points: Sequence[float], values: Sequence[float]
) -> tuple[FloatArray, bool]:
    """(values at `at`, whether any of them lies past the last point). points must increase."""
    x = np.asarray(at, np.float64)
    inside = np.interp(x, points, values)
    past = x > points[-1]
    if not past.any():
        return inside, False
    slope = 0.0
    if len(points) > 1:
        slope = max(0.0, (values[-1] - values[-2]) / (points[-1] - points[-2]))
    return np.where(past, values[-1] + slope * (x - points[-1]), inside), True
