"""What a switch sends: experts that arrive, layer by device."""

from __future__ import annotations

import altair as alt
import numpy as np

from ....foundation.arrays import IntArray
from .load_map import CELL, SHORTEST, TALLEST
from .theme import SEQUENTIAL, Drawing, below, inline


def switch_moves(arrive_LG: IntArray, name: str) -> Drawing:
    """arrive_LG: experts that a device must receive before the plan is active."""
    layers, devices = arrive_LG.shape
    layer_N, device_N = np.divmod(np.arange(arrive_LG.size), devices)
    return (
        alt.Chart(inline({
            "layer": layer_N, "device": device_N, "experts": arrive_LG.reshape(-1),
        }), title=name)
        .mark_rect()
        .encode(
            alt.X("device:O", axis=alt.Axis(labelOverlap=True, labelAngle=0)).title("device"),
            alt.Y("layer:O", axis=alt.Axis(labelOverlap=True)).title("MoE layer"),
            alt.Color(
                "experts:Q", title="experts that arrive", legend=below(),
                scale=alt.Scale(scheme=SEQUENTIAL, domain=[0, max(int(arrive_LG.max()), 1)]),
            ),
            tooltip=["layer:O", "device:O", alt.Tooltip("experts:Q", title="experts that arrive")],
        )
        .properties(width="container", height=int(np.clip(layers * CELL, SHORTEST, TALLEST)))
    )
