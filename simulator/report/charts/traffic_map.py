"""Who sends to whom: token transfers a step from device to device, node borders drawn."""

from __future__ import annotations

import altair as alt
import numpy as np

from ....foundation.arrays import FloatArray, IntArray
from .theme import SEQUENTIAL, Drawing, below, inline

SIDE = 380                   # pixels


def traffic_map(
    traffic_GG: FloatArray, node_G: IntArray, name: str, highest: float
) -> Drawing:
    """traffic_GG: transfers a step, source by target; the diagonal stays at home and is left out.
    highest: the end of the colours, the same for every plan compared."""
    devices = len(traffic_GG)
    source_N, target_N = np.divmod(np.arange(devices * devices), devices)
    away = source_N != target_N
    source = alt.Y("source:Q", scale=alt.Scale(domain=[0, devices], nice=False, reverse=True),
                   axis=alt.Axis(tickMinStep=1, format="d")).title("from device")
    target = alt.X("target:Q", scale=alt.Scale(domain=[0, devices], nice=False),
                   axis=alt.Axis(tickMinStep=1, format="d")).title("to device")
    cells = (
        alt.Chart(inline({
            "source": source_N[away], "target": target_N[away],
            "transfers": traffic_GG.reshape(-1)[away],
        }))
        .transform_calculate(target2="datum.target + 1", source2="datum.source + 1")
        .mark_rect(stroke=None)
        .encode(
            target, source, x2="target2:Q", y2="source2:Q",
            color=alt.Color(
                "transfers:Q", title="transfers / step", legend=below(),
                scale=alt.Scale(scheme=SEQUENTIAL, domain=[0, max(highest, 1e-9)]),
            ),
            tooltip=[alt.Tooltip("source:Q", title="from device"),
                     alt.Tooltip("target:Q", title="to device"),
                     alt.Tooltip("transfers:Q", format=".4s", title="transfers / step")],
        )
    )
    borders = np.flatnonzero(np.diff(node_G)) + 1
    if not len(borders):
        return alt.layer(cells, title=name).properties(width="container", height=SIDE)
    data = inline({"border": borders})
    line = alt.Chart(data).mark_rule(color="white", strokeWidth=3)
    return alt.layer(
        cells, line.encode(x="border:Q"), line.encode(y="border:Q"), title=name
    ).properties(width="container", height=SIDE)
