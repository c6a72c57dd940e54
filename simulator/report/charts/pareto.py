"""The front of a study: cost against latency, the choices that nothing beats in colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import altair as alt

from .theme import HEIGHT, PALETTE, Drawing, inline


@dataclass(frozen=True)
class Choice:
    """One scenario. label: the fields that set it apart."""

    label: str
    latency_us: float
    devices: float
    device_bytes: float
    on_front: bool


def pareto(choices: Sequence[Choice]) -> Drawing:
    """Devices against mean latency; a larger dot keeps more expert bytes on each device."""
    return (
        alt.Chart(inline({
            "scenario": [c.label for c in choices],
            "ms": [c.latency_us / 1e3 for c in choices],
            "devices": [c.devices for c in choices],
            "gigabytes": [c.device_bytes / 1e9 for c in choices],
            "front": ["nothing beats it" if c.on_front else "beaten" for c in choices],
        }))
        .mark_point(filled=True, opacity=0.85)
        .encode(
            alt.X("devices:Q", scale=alt.Scale(zero=False, padding=20),
                  axis=alt.Axis(tickMinStep=1, format="d")).title("devices"),
            alt.Y("ms:Q", title="mean latency, ms", scale=alt.Scale(zero=False, padding=10)),
            alt.Color("front:N", title=None, legend=alt.Legend(orient="bottom"),
                      scale=alt.Scale(domain=["nothing beats it", "beaten"],
                                      range=[PALETTE[5], PALETTE[7]])),
            alt.Size("gigabytes:Q", title="experts, GB a device",
                     scale=alt.Scale(range=[60, 500]), legend=alt.Legend(orient="bottom")),
            tooltip=["scenario:N", "devices:Q",
             alt.Tooltip("ms:Q", format=",.4~r", title="latency, ms"),
             alt.Tooltip("gigabytes:Q", format=".3~r"), "front:N"],
        )
        .properties(width="container", height=HEIGHT)
    )
