"""Load of every device in every layer, over the layer's mean: where the stragglers are."""

from __future__ import annotations

import altair as alt
import numpy as np

from ....foundation.arrays import FloatArray
from .theme import DIVERGING, Drawing, below, inline

CELL = 9                     # pixels of a layer, between these
SHORTEST, TALLEST = 140, 560


def load_map(load_LG: FloatArray, name: str, highest: float) -> Drawing:
    """load_LG: tokens over the layer's mean. highest: the end of the colours, the same for every
    plan that is compared; 1 is pale, below it blue, above it orange."""
    layers, devices = load_LG.shape
    layer_N, device_N = np.divmod(np.arange(load_LG.size), devices)
    highest = max(highest, 1.001)
    return (
        alt.Chart(
            inline({"layer": layer_N, "device": device_N, "load": load_LG.reshape(-1)}), title=name,
        )
        .mark_rect()
        .encode(
            alt.X("device:O", axis=alt.Axis(labelOverlap=True, labelAngle=0)).title("device"),
            alt.Y("layer:O", axis=alt.Axis(labelOverlap=True)).title("MoE layer"),
            alt.Color(
                "load:Q", title="load / mean", legend=below(),
                scale=alt.Scale(scheme=DIVERGING, domain=[2 - highest, highest], domainMid=1,
                                clamp=True),
            ),
            tooltip=[alt.Tooltip("layer:O"), alt.Tooltip("device:O"),
             alt.Tooltip("load:Q", format=".3f", title="load / mean")],
        )
        .properties(width="container", height=int(np.clip(layers * CELL, SHORTEST, TALLEST)))
    )
