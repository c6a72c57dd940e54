"""Where a mean step's time goes, plan by plan."""

from __future__ import annotations

from collections.abc import Mapping

import altair as alt

from .theme import ROW, Drawing, colours, inline


def time_parts(parts_us: Mapping[str, Mapping[str, float]]) -> Drawing:
    """parts_us: plan -> cause -> microseconds of a mean step. A negative network is what overlap
    hides beyond the exchange's own time."""
    rows = [
        (plan, cause, us / 1e3, order, us / sum(causes.values()))
        for plan, causes in parts_us.items() for order, (cause, us) in enumerate(causes.items())
        if us
    ]
    names = list(dict.fromkeys(c for causes in parts_us.values() for c in causes))
    columns = zip(*rows, strict=True)
    data = inline(dict(zip(("plan", "cause", "ms", "order", "share"), columns, strict=True)))
    return (
        alt.Chart(data)
        .mark_bar()
        .encode(
            alt.X("ms:Q", title="milliseconds of a mean step", stack="zero"),
            alt.Y("plan:N", sort=list(parts_us), title=None),
            alt.Color("cause:N", scale=colours(names), title=None,
                      legend=alt.Legend(orient="bottom", columns=3, labelLimit=240)),
            alt.Order("order:Q"),
            tooltip=["plan:N", "cause:N", alt.Tooltip("ms:Q", format=",.3~r"),
             alt.Tooltip("share:Q", format=".1%")],
        )
        .properties(width="container", height=ROW * max(len(parts_us), 1))
    )
