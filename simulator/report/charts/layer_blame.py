"""Blame, layer by layer: experts' work, waiting for the slowest device, dispatch and combine."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

from ...pricing.attribution import LayerBlame
from .theme import HEIGHT, Drawing, colours, inline

PARTS = ("experts, mean device", "waiting for the slowest", "dispatch", "combine")


def layer_blame(layers: Sequence[LayerBlame], name: str) -> Drawing:
    """A bar a layer; hovering names the device and the port that set it most often."""
    rows = [
        (b.layer, part, us, order, f"{b.slowest_device} ({b.slowest_device_share:.0%} of steps)",
         b.port)
        for b in layers
        for order, (part, us) in enumerate(zip(PARTS, (
            b.mean_compute_us, b.slowest_compute_us - b.mean_compute_us, b.dispatch_us,
            b.combine_us,
        ), strict=True))
    ]
    columns = zip(*rows, strict=True)
    names = ("layer", "part", "us", "order", "device", "port")
    return (
        alt.Chart(inline(dict(zip(names, columns, strict=True))), title=name)
        .mark_bar()
        .encode(
            alt.X("layer:O", title="MoE layer", axis=alt.Axis(labelOverlap=True, labelAngle=0)),
            alt.Y("us:Q", title="microseconds of a mean step", stack="zero"),
            alt.Color("part:N", scale=colours(PARTS), title=None,
                      legend=alt.Legend(orient="bottom", columns=2, labelLimit=240)),
            alt.Order("order:Q"),
            tooltip=["layer:O", "part:N", alt.Tooltip("us:Q", format=",.3~r"),
             alt.Tooltip("device:N", title="slowest device"),
             alt.Tooltip("port:N", title="port that sets the dispatch")],
        )
        .properties(width="container", height=HEIGHT)
    )
