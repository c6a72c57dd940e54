"""Whether steps lie below what a hardware profile was measured on.

Beyond the last measured point `step_cost` goes on along the last slope and notes it; below the
first it keeps the first value, and this notes it. Knows work, traffic and tables. Knows nothing of
time.
"""

from __future__ import annotations

import numpy as np

from ...placement.cluster import Cluster
from ...placement.cost.step_loads import StepLoads
from ...traces.model_spec import ModelSpec


def below_measured(loads: StepLoads, model: ModelSpec, cluster: Cluster) -> tuple[str, ...]:
    """Notes, each with the first point that was measured; none for a fitted line."""
    notes = []
    compute = cluster.hardware.compute.expert_table_tokens
    if compute and compute[0] > 1:
        active = np.maximum(loads.active_WLG, 1)
        if ((loads.tokens_WLG > 0) & (loads.tokens_WLG < compute[0] * active)).any():
            notes.append(
                f"fewer tokens per expert than the compute table measured ({compute[0]:g} on): "
                "priced as its first point"
            )
    starts = [
        (side.table_bytes[0], bytes_per_value)
        for side, bytes_per_value in (
            (cluster.hardware.dispatch, cluster.hardware.dispatch_bytes_per_value),
            (cluster.hardware.combine, cluster.hardware.combine_bytes_per_value),
        )
        if side.table_bytes
    ]
    if starts and cluster.num_devices > 1:
        most = np.maximum(loads.nvlink_out_WLG.max(axis=2), loads.nvlink_in_WLG.max(axis=2))
        for first, bytes_per_value in starts:
            sent = most * (model.hidden or 0) * bytes_per_value
            if ((sent > 0) & (sent < first)).any():
                notes.append(
                    f"fewer bytes per port than the exchange table measured ({first:,.0f} on): "
                    "priced as its first point"
                )
    return tuple(dict.fromkeys(notes))
