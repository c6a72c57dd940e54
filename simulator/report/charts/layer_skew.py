"""How uneven a router is: the hottest expert's load over the mean, layer by layer."""

from __future__ import annotations

import altair as alt
import numpy as np

from ....foundation.arrays import FloatArray
from .theme import HEIGHT, PALETTE, Drawing, inline


def layer_skew(skew_L: FloatArray) -> Drawing:
    """A bar a layer; 1 would be perfectly even."""
    return (
        alt.Chart(inline({"layer": np.arange(len(skew_L)), "skew": skew_L}))
        .mark_bar(color=PALETTE[0])
        .encode(
            alt.X("layer:O", title="MoE layer", axis=alt.Axis(labelOverlap=True, labelAngle=0)),
            alt.Y("skew:Q", title="hottest expert / mean"),
            tooltip=["layer:O", alt.Tooltip("skew:Q", format=".2f")],
        )
        .properties(width="container", height=HEIGHT)
    )
