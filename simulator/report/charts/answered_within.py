"""What users wait: the share of requests answered within a time, plan by plan."""

from __future__ import annotations

from collections.abc import Mapping

import altair as alt
import numpy as np

from ....foundation.arrays import FloatArray
from .theme import HEIGHT, Drawing, colours, inline

POINTS = 120


def answered_within(latency_us: Mapping[str, FloatArray]) -> Drawing:
    """latency_us: plan -> [R] of its requests."""
    names = list(latency_us)
    share = np.linspace(0, 1, POINTS)
    return (
        alt.Chart(inline({
            "plan": [n for n in names for _ in share], "share": np.tile(share, len(names)),
            "ms": np.concatenate([np.quantile(latency_us[n], share) / 1e3 for n in names]),
        }))
        .mark_line(interpolate="step-after")
        .encode(
            alt.X("ms:Q", title="latency, ms"),
            alt.Y("share:Q", title="requests answered within", axis=alt.Axis(format="%")),
            alt.Color("plan:N", scale=colours(names), title=None,
                      legend=alt.Legend(orient="bottom")),
            alt.Order("share:Q"),
            tooltip=["plan:N", alt.Tooltip("ms:Q", format=",.4~r"),
             alt.Tooltip("share:Q", format=".1%")],
        )
        .properties(width="container", height=HEIGHT)
    )
