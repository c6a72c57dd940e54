"""What replicas buy: each plan's figure against the replicas it keeps, with its 95 % band."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import altair as alt
import numpy as np

from .theme import HEIGHT, Drawing, colours, inline


@dataclass(frozen=True)
class Offer:
    """One plan: replicas beyond one of each expert, all layers together, and what it reaches."""

    name: str
    replicas: int
    value: float
    low: float
    high: float


def replica_gain(offers: Sequence[Offer], title: str) -> Drawing:
    """title: of the figure, with its unit. Lower and further left is better."""
    def known(value: float) -> float:
        return value if np.isfinite(value) else np.nan

    names = [o.name for o in offers]
    base = alt.Chart(inline({
        "plan": names, "replicas": [o.replicas for o in offers],
        "value": [o.value for o in offers], "low": [known(o.low) for o in offers],
        "high": [known(o.high) for o in offers],
    })).encode(
        alt.X("replicas:Q", title="replicas, all layers", scale=alt.Scale(padding=20)),
        alt.Y("value:Q", title=title, scale=alt.Scale(zero=False, padding=12)),
        color=alt.Color("plan:N", scale=colours(names), title=None,
                        legend=alt.Legend(orient="bottom", columns=4)),
        tooltip=["plan:N", "replicas:Q", *(alt.Tooltip(f"{f}:Q", format=",.4~r")
                                           for f in ("value", "low", "high"))],
    )
    return alt.layer(
        base.mark_rule(strokeWidth=2, opacity=0.6).encode(y="low:Q", y2="high:Q"),
        base.mark_point(filled=True, size=110, opacity=1),
    ).properties(width="container", height=HEIGHT)
