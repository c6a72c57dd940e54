"""How a figure spreads over steps, plan by plan: mean and its band, quartiles, the worst steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import altair as alt
import numpy as np

from ....foundation.arrays import FloatArray
from .theme import ROW, Drawing, colours, inline


@dataclass(frozen=True, eq=False)
class PerStep:
    """One plan's figure in every step, and the 95 % band of its mean (infinite = not known)."""

    value_W: FloatArray
    low: float
    high: float


def spread(plans: Mapping[str, PerStep], title: str) -> Drawing:
    """A row a plan: thin line 1st to 99th percentile, thick line the quartiles, dot the mean, its
    band in the dot's own colour. title: of the axis, with its unit."""
    names = list(plans)
    values = [p.value_W[np.isfinite(p.value_W)] for p in plans.values()]
    quantiles = np.array([np.quantile(v, (0.01, 0.25, 0.75, 0.99)) if len(v) else [np.nan] * 4
                          for v in values])
    mean = np.array([v.mean() if len(v) else np.nan for v in values])
    low = np.array([p.low if np.isfinite(p.low) else np.nan for p in plans.values()])
    high = np.array([p.high if np.isfinite(p.high) else np.nan for p in plans.values()])
    base = alt.Chart(inline({
        "plan": names, "p1": quantiles[:, 0], "p25": quantiles[:, 1], "p75": quantiles[:, 2],
        "p99": quantiles[:, 3], "mean": mean, "low": low, "high": high,
    })).encode(
        alt.Y("plan:N", sort=names, title=None),
        color=alt.Color("plan:N", scale=colours(names), legend=None),
        tooltip=["plan:N", *(alt.Tooltip(f"{f}:Q", format=",.4~r") for f in
                             ("mean", "low", "high", "p1", "p25", "p75", "p99"))],
    )
    axis = alt.X("p1:Q", title=title, scale=alt.Scale(zero=False))
    return alt.layer(
        base.mark_rule(opacity=0.55).encode(axis, x2="p99:Q"),
        base.mark_rule(strokeWidth=9, opacity=0.45).encode(x="p25:Q", x2="p75:Q"),
        base.mark_rule(strokeWidth=3).encode(x="low:Q", x2="high:Q"),
        base.mark_point(filled=True, size=90, opacity=1).encode(x="mean:Q"),
    ).properties(width="container", height=ROW * max(len(names), 1))
