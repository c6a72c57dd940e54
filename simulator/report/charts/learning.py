"""Is the trace long enough: what a plan is worth on unseen requests, by tokens planned from."""

from __future__ import annotations

import altair as alt
import numpy as np

from ....traces.analysis.learning_curve import LearningCurve
from .theme import HEIGHT, PALETTE, Drawing, inline


def learning(curve: LearningCurve) -> Drawing:
    """The mean with one standard deviation, and where a doubling stops to matter."""
    mean, spread = np.array(curve.imbalance), np.array(curve.spread)
    base = alt.Chart(inline({
        "tokens": list(curve.tokens), "imbalance": mean, "low": mean - spread,
        "high": mean + spread,
    })).encode(
        alt.X("tokens:Q", scale=alt.Scale(type="log", nice=False),
              axis=alt.Axis(format="~s", tickCount=6)).title("tokens planned from"),
        tooltip=[alt.Tooltip("tokens:Q", format=","),
                 *(alt.Tooltip(f"{f}:Q", format=".4f") for f in ("imbalance", "low", "high"))],
    )
    value = alt.Y("imbalance:Q", title="imbalance on unseen requests", scale=alt.Scale(zero=False))
    layers = [
        base.mark_area(opacity=0.25, color=PALETTE[0]).encode(
            alt.Y("low:Q", title="imbalance on unseen requests", scale=alt.Scale(zero=False)),
            y2="high:Q"),
        base.mark_line(point=True, color=PALETTE[0]).encode(value),
    ]
    if min(curve.tokens) <= curve.needed_tokens <= max(curve.tokens):
        needed = alt.Chart(inline({"tokens": [curve.needed_tokens]}))
        layers.append(needed.mark_rule(color=PALETTE[5], strokeDash=[4, 3]).encode(
            x="tokens:Q", tooltip=[alt.Tooltip("tokens:Q", title="long enough from", format=",")],
        ))
    return alt.layer(*layers).properties(width="container", height=HEIGHT)
