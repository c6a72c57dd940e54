"""What expert replicas leave for the KV cache; whether they fit at all is `placement/memory.py`'s.

Knows bytes. Knows nothing of requests or time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...errors import InfeasibleError, UsageError
from ...placement.cluster import Cluster
from ...placement.memory import plan_bytes_G, require_plan_fits
from ...placement.plan import Plan
from ...traces.model_spec import ModelSpec


@dataclass(frozen=True)
class MemorySpec:
    """Bytes of all but the experts.

    kv_bytes_per_token: keys and values of one token over all layers, on the device that serves it.
    other_bytes: attention, embeddings, activations, on every device. usable: share of the memory
    that may be filled.
    """

    kv_bytes_per_token: float
    other_bytes: int = 0
    usable: float = 0.9

    def __post_init__(self) -> None:
        if not (np.isfinite(self.kv_bytes_per_token) and self.kv_bytes_per_token > 0):
            raise UsageError(f"kv_bytes_per_token {self.kv_bytes_per_token} must be above 0")
        if self.other_bytes < 0 or not 0 < self.usable <= 1:
            raise UsageError(
                f"other_bytes {self.other_bytes} must be >= 0 and usable {self.usable} in (0, 1]"
            )


def kv_tokens_per_device(
    plan: Plan, cluster: Cluster, model: ModelSpec, memory: MemorySpec
) -> tuple[int, ...]:
    """[G] tokens of KV cache that each device can hold next to the plan's experts.

    Raises InfeasibleError when a device cannot even hold its experts.
    """
    require_plan_fits(plan, cluster, model)
    limit = round(cluster.memory_bytes * memory.usable)
    held_G = plan_bytes_G(plan, model)
    free_G = limit - memory.other_bytes - held_G
    if (free_G < 0).any():
        g = int(np.argmin(free_G))
        raise InfeasibleError(
            f"device {g}: the plan's experts need {held_G[g]:,} bytes and other weights "
            f"{memory.other_bytes:,}, usable memory is {limit:,}: use fewer slots, more devices or "
            "narrower weights"
        )
    return tuple(int(t) for t in free_G // memory.kv_bytes_per_token)
